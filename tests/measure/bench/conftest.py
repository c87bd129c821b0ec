"""What all tests of the benchmark share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> Iterator[None]:
    """Each row collects garbage, which among a test session's modules takes longer than the row."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
