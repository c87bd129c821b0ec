"""One small checkpoint that most tests of the engine serve, with the model it was saved from, and what it generates."""

from __future__ import annotations

import gc
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import Tensor

from tests.engine.serving import Served, generated, request
from tests.tiny import pregated_model


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    directory, model = tmp_path_factory.mktemp("served"), pregated_model(3, lookahead=1)
    model.save_pretrained(directory)
    return Served(directory, model)


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `families.checkpoint` makes checkpoints."""
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="session")
def expected(served: Served) -> tuple[Tensor, Tensor]:
    """What `hostile.serve` gives with the resident model."""
    return generated(served.model.generate, request(2))


@pytest.fixture
def nothing_left_behind() -> Iterator[None]:
    """The test may leave no thread and no open file, whatever went wrong in it."""
    before = resources()
    yield
    if resources() != before:
        gc.collect()
    assert resources() == before


def resources() -> tuple[set[str], Counter[str]]:
    """Names of the engine's threads, and what every open file is."""
    threads = {thread.name for thread in threading.enumerate() if thread.name.startswith("pregate")}
    files: Counter[str] = Counter()
    for number in Path("/proc/self/fd").iterdir():
        try:
            files[str(number.readlink())] += 1
        except OSError:  # the listing's own
            continue
    return threads, files
