"""Every decoder-only family from every form of its weights and with every kind of gates, under every policy, cache,
tier and slab dtype, for one row and for four: the engine gives the resident model's tokens and logits.

Every pair of these choices is in the default suite. The slow tests have every combination with linear gates that
decide and weigh early, and every three of the choices with the other gates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from functools import lru_cache
from itertools import combinations, groupby, product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from pregate.config import CacheRule, Policy, SlabDtype, Tier
from pregate.engine.engine import OffloadEngine
from pregate.engine.opening import Opened, open_store
from pregate.engine.storage.store import Store
from tests.engine.families import GATES, LOOKAHEAD, SOURCES, Source, checkpoint
from tests.engine.hostile import poison_slots
from tests.engine.serving import as_stored, assert_same, generated
from tests.models.families.test_decoder_only import LEFT, batch

LENGTH = 7
WITHIN = {torch.float32: {"rtol": 1e-4, "atol": 1e-4}, torch.bfloat16: {"rtol": 2e-2, "atol": 5e-2}}


class Combination(NamedTuple):
    source: Source
    slab_dtype: SlabDtype
    tier: Tier
    policy: Policy
    cache: CacheRule
    gates: str

    def choices(self, together: int) -> set[Any]:
        """Every `together` of its choices, where the family and the form of its weights are two."""
        return set(combinations(enumerate([*self.source, *self[1:]]), together))


CHOICES = product(SOURCES, SlabDtype, (Tier.dram, Tier.disk), Policy, CacheRule, GATES)
PRODUCT = [row for row in map(Combination._make, CHOICES) if row.gates == "early" or row.source.form in LOOKAHEAD]


def covering(product: list[Combination], together: int) -> Iterator[Combination]:
    """Few combinations that hold every `together` choices: each time the one that holds the most which are left."""
    choices = {row: row.choices(together) for row in product}
    left = set().union(*choices.values())
    while left:
        row = max(choices, key=lambda row: len(choices[row] & left))
        left -= choices[row]
        yield row


def by_source(rows: Iterable[Combination]) -> dict[Source, list[Combination]]:
    return {source: list(of_source) for source, of_source in groupby(sorted(rows), key=lambda row: row.source)}


DEFAULT = by_source(covering(PRODUCT, 2))


def asked(rows: int) -> dict[str, Any]:
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    return batch(LEFT, rows, LENGTH) | options | {"return_dict_in_generate": True, "output_logits": True}


@lru_cache(maxsize=8)
def resident(root: Path, source: Source, slab_dtype: SlabDtype, gates: str) -> dict[int, tuple[Tensor, Tensor]]:
    """What the resident model with the weights that slabs hold gives, for each number of rows."""
    directory, model = checkpoint(root, source, gates)
    whole = as_stored(model, Opened(directory).layout(slab_dtype))
    return {rows: generated(whole.generate, asked(rows)) for rows in (1, 4)}


def assert_row(root: Path, row: Combination, store: Store) -> None:
    directory, model = checkpoint(root, row.source, row.gates)
    budget = None if row.policy is Policy.gpu_only else "40%"
    options: dict[str, Any] = {"policy": row.policy, "cache": row.cache, "device_budget": budget, "store": store}
    with OffloadEngine.open(directory, **options) as engine:
        poison_slots(engine)
        for rows, expected in resident(root, row.source, row.slab_dtype, row.gates).items():
            engine.reset_counters()
            tokens, logits = generated(engine.generate, asked(rows))
            assert logits.isfinite().all() and len(tokens[:, LENGTH:].unique()) > 1, row
            assert_same((tokens, logits), expected, **WITHIN[model.dtype])
            assert (engine.counters.bytes_moved > 0) == (row.policy is not Policy.gpu_only), row


def assert_rows(root: Path, rows: Iterable[Combination]) -> None:
    """`rows` of one source; those that share a store come one after the other."""
    for (source, slab_dtype, tier, gates), same in groupby(rows, key=lambda row: (*row[:3], row.gates)):
        directory, _ = checkpoint(root, source, gates)
        with closing(open_store(directory, tier=tier, slab_dtype=slab_dtype)) as store:
            for row in same:
                assert_row(root, row, store)


def test_every_choice_stands_beside_every_other() -> None:
    rows = [row for rows in DEFAULT.values() for row in rows]
    assert len(set(rows)) == len(rows) < 50 and list(DEFAULT) == sorted(SOURCES)
    assert set().union(*(row.choices(2) for row in rows)) == set().union(*(row.choices(2) for row in PRODUCT))


@pytest.mark.parametrize("source", DEFAULT, ids=str)
def test_the_engine_equals_the_resident_model(families: Path, source: Source) -> None:
    assert_rows(families, DEFAULT[source])


@pytest.mark.slow
@pytest.mark.parametrize("slab_dtype", SlabDtype)
@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_the_engine_equals_the_resident_model_everywhere(families: Path, source: Source, slab_dtype: SlabDtype) -> None:
    # a gpu_only engine has one cache, whatever it is asked for
    rows = [row for row in PRODUCT if row.policy is not Policy.gpu_only or row.cache is CacheRule.none]
    assert_rows(families, [row for row in rows if row[:2] == (source, slab_dtype) and row.gates == "early"])


@lru_cache(maxsize=1)
def threes() -> dict[Source, list[Combination]]:
    return by_source(covering([row for row in PRODUCT if row.gates != "early"], 3))


@pytest.mark.slow
@pytest.mark.parametrize("source", [source for source in SOURCES if source.form in LOOKAHEAD], ids=str)
def test_the_engine_equals_the_resident_model_with_other_gates(families: Path, source: Source) -> None:
    assert_rows(families, threes()[source])
