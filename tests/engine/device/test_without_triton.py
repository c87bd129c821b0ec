"""Without Triton everything but the kernels works, and what needs them says so."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pregate.config import UsageError
from pregate.engine.device.ops.language import require_triton

PROGRAM = """
import sys
sys.modules["triton"] = None
import torch
import pregate.engine.device.device_engine
import studies.profiles.gather_probe
from pregate.engine.device.ops.assign_slots import assign_slots
from pregate.engine.device.slots import DeviceSlots, Fetch

fetch = Fetch.empty(2, "cpu")
wanted_N = torch.tensor([3, 3], dtype=torch.int32)
assign_slots(*DeviceSlots.empty(4, 2, "cpu"), wanted_N, *fetch, True, 0)
print(fetch.copy_slab_N.tolist())
"""


def test_the_reference_implementations_need_no_triton() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[3, -1]\n"), done.stderr


def test_a_missing_triton_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UsageError, match="needs Triton: pip install triton"):
        require_triton()
