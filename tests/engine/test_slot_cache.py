"""The slot table against a naive simulation, and its promises about slots in use."""

from __future__ import annotations

import random

import pytest

from pregate.config import CacheRule
from pregate.engine.slot_cache import SlotTable
from pregate.models.experts import ExpertKey


def key(number: int) -> ExpertKey:
    return ExpertKey("decoder", number // 4, number % 4)


def test_without_keeping_a_slot_is_free_after_use() -> None:
    table = SlotTable(1, CacheRule.none)
    assert table.place(key(0)) == (0, None)
    assert table.place(key(1)) is None
    table.pin(key(0))
    table.release(key(0))
    assert table.find(key(0)) is None
    assert table.place(key(1)) == (0, None)


def test_keeping_evicts_the_least_recently_used() -> None:
    table = SlotTable(2, CacheRule.lru)
    for number in (0, 1):
        table.place(key(number))
        table.pin(key(number))
        table.release(key(number))
    table.reserve(key(0))
    table.pin(key(0))
    table.release(key(0))
    table.place(key(2))
    assert table.find(key(1)) is None
    assert table.find(key(0)) is not None


def test_steal_takes_the_farthest_announced_and_never_a_pinned_one() -> None:
    table = SlotTable(3, CacheRule.none)
    for number in (0, 1, 2):
        table.place(key(number))
    table.pin(key(2))
    slot, loser = table.steal(key(3))
    assert loser == key(1)
    assert slot == table.find(key(3))


def test_clear_forgets_everything() -> None:
    table = SlotTable(2, CacheRule.lru)
    table.place(key(0))
    table.pin(key(0))
    table.place(key(1))
    table.clear()
    assert table.find(key(0)) is table.find(key(1)) is None
    assert table.reserved_keys() == []
    assert {table.place(key(2)), table.place(key(3))} == {(0, None), (1, None)}


def used(table: SlotTable, number: int) -> ExpertKey | None:
    """Place or reserve, use and release a slab; returns what it drove out."""
    evicted = None
    if table.find(key(number)) is None:
        placed = table.place(key(number))
        assert placed is not None
        evicted = placed.evicted
    else:
        table.reserve(key(number))
    table.pin(key(number))
    table.release(key(number))
    return evicted


@pytest.mark.parametrize(("rule", "leaves"), [(CacheRule.lru, 1), (CacheRule.lfu, 2), (CacheRule.lifo, 2)])
def test_each_rule_has_its_own_victim(rule: CacheRule, leaves: int) -> None:
    """0, 1 and 2 come in this order; 1 and 0 are used again, so 1 is the oldest use, and 2 the rarest and last come."""
    table = SlotTable(3, rule)
    for number in (0, 1, 2, 1, 1, 2, 0, 0) if rule is CacheRule.lru else (0, 1, 2, 1, 0):
        assert used(table, number) is None
    assert used(table, 3) == key(leaves)


def test_lfu_remembers_uses_from_before_an_eviction() -> None:
    table = SlotTable(2, CacheRule.lfu)
    for number in (0, 0, 0, 1, 1):
        used(table, number)
    assert used(table, 2) == key(1)
    assert used(table, 1) == key(2)
    # 0 and 1 were used three times each, and 0 has been unused for longer
    assert used(table, 3) == key(0)


@pytest.mark.parametrize("keep", [True, False])
def test_random_steps_equal_a_naive_simulation(keep: bool) -> None:
    """Three thousand random operations; the naive model holds one record a slab and searches it."""
    draw = random.Random(0)
    table = SlotTable(5, CacheRule.lru if keep else CacheRule.none)
    held: dict[ExpertKey, dict[str, int | bool]] = {}
    clock = 0
    for _ in range(3000):
        clock += 1
        wanted = key(draw.randrange(12))
        action = draw.choice(["place", "pin", "release"])
        if action == "place" and wanted not in held:
            idle = [k for k, s in held.items() if not s["reserved"] and not s["pinned"]]
            placed = table.place(wanted)
            slot = placed.slot if placed else None
            if len(held) < 5:
                assert slot is not None
            elif idle:
                assert slot is not None
                del held[min(idle, key=lambda k: held[k]["released"])]
            else:
                assert slot is None
                continue
            held[wanted] = {"slot": slot, "reserved": True, "pinned": False, "released": 0}
        elif action == "pin" and wanted in held and not held[wanted]["pinned"]:
            assert table.pin(wanted) == held[wanted]["slot"]
            held[wanted] |= {"pinned": True, "reserved": False}
        elif action == "release" and wanted in held and (held[wanted]["pinned"] or held[wanted]["reserved"]):
            table.release(wanted)
            if keep:
                held[wanted] |= {"pinned": False, "reserved": False, "released": clock}
            else:
                del held[wanted]
        assert {k: table.find(k) for k in held} == {k: s["slot"] for k, s in held.items()}
        assert all(table.find(key(number)) is None for number in range(12) if key(number) not in held)
        assert set(table.reserved_keys()) == {k for k, s in held.items() if s["reserved"]}
