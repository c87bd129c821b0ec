"""The slot table against a naive simulation, and its promises about slots in use."""

from __future__ import annotations

import random

import pytest

from pregate.engine.cache import SlotTable
from pregate.models.adapter import ExpertKey


def key(number: int) -> ExpertKey:
    return ExpertKey("decoder", number // 4, number % 4)


def test_without_keeping_a_slot_is_free_after_use() -> None:
    table = SlotTable(1, keep=False)
    assert table.place(key(0)) == 0
    assert table.place(key(1)) is None
    table.pin(key(0))
    table.release(key(0))
    assert table.find(key(0)) is None
    assert table.place(key(1)) == 0


def test_keeping_evicts_the_least_recently_used() -> None:
    table = SlotTable(2, keep=True)
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
    table = SlotTable(3, keep=False)
    for number in (0, 1, 2):
        table.place(key(number))
    table.pin(key(2))
    slot, loser = table.steal(key(3))
    assert loser == key(1)
    assert slot == table.find(key(3))


def test_a_dropped_slab_is_gone_and_its_slot_free() -> None:
    table = SlotTable(1, keep=True)
    table.place(key(0))
    table.pin(key(0))
    table.drop(key(0))
    assert table.find(key(0)) is None
    assert table.place(key(1)) == 0


@pytest.mark.parametrize("keep", [True, False])
def test_random_steps_equal_a_naive_simulation(keep: bool) -> None:
    """Three thousand random operations; the naive model holds one record a slab and searches it."""
    draw = random.Random(0)
    table = SlotTable(5, keep)
    held: dict[ExpertKey, dict[str, int | bool]] = {}
    clock = 0
    for _ in range(3000):
        clock += 1
        wanted = key(draw.randrange(12))
        action = draw.choice(["place", "pin", "release"])
        if action == "place" and wanted not in held:
            idle = [k for k, s in held.items() if not s["reserved"] and not s["pinned"]]
            slot = table.place(wanted)
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
        assert len(table.resident_keys()) == len(held)
        assert set(table.reserved_keys()) == {k for k, s in held.items() if s["reserved"]}
