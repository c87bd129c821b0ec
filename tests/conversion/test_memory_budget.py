"""What a calibration through the engine makes of its memory, against values that are counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pregate.config import CalibrationConfig, SlabDtype, Through, Tier, UsageError
from pregate.conversion.calibrate import memory_budget
from pregate.engine.opening import Opened
from pregate.models.loading import open_model
from tests.conversion.test_calibration_streamed import olmoe


def test_memory_is_shared_by_slots_and_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a model with 4 blocks of 7 experts, of which a token has 3."""
    olmoe(tmp_path)
    opened, device = Opened(open_model(str(tmp_path))), torch.device("cpu")
    monkeypatch.setattr(memory_budget, "bytes_in_use", lambda _: 10**6)
    slab = 12_288  # three matrices of 24 by 40 numbers, rounded up to whole pages
    attention, norms, router = 2 * 24 * 24 + 2 * 24 * 12, 2 * 24 + 24 + 12, 7 * 24
    fixed = 10**6 + 4 * (2 * 67 * 24 + 24 + 4 * (attention + norms + router))
    fit = 16 * 10 * 24 + 64 * 24**2 + 2 * 2 * 7 * 24 * 4
    example = 5 * 4 * ((16 + 6 * 3) * 24 + 3 * 3 * 40)
    assert example < fit < 2 * example

    def room(memory: int | None, tier: Tier = Tier.disk) -> tuple[int, int]:
        """Of fits on 10 tokens, and of at most 8 examples of at most 5 tokens."""
        given = None if memory is None else f"{memory}B"
        told = CalibrationConfig(steps=2, batch_size=8, tokens=10, through=Through.engine, memory=given)
        found = memory_budget.room_for(told, opened, opened.layout(SlabDtype.source), tier, 5, device, torch.float32)
        return found.num_slots, found.batch_size

    assert room(fixed + fit + slab) == (1, 1)
    with pytest.raises(UsageError, match="is too little"):
        room(fixed + fit + slab - 1)
    # one byte less than a slot takes is left for the batch
    assert [room(fixed + fit + 4 * slab - less) for less in (0, 1)] == [(4, 1), (3, 2)]
    # the slots of one block come first, then batches, then the next block
    assert room(fixed + fit + 7 * slab) == (7, 1)
    assert [room(fixed + 7 * slab + 3 * example - less) for less in (0, 1)] == [(7, 3), (8, 2)]
    assert room(fixed + 9 * slab + 8 * example) == (9, 8)
    assert room(64 * 10**9) == room(None) == (14, 8)
    # in host memory are all experts, and slots are beside them
    assert room(fixed + fit + (4 * 7 + 2) * slab, Tier.dram) == (2, 1)
