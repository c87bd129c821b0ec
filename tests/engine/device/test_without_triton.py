"""Without Triton everything but the kernels works, and what needs them says so."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pregate.config import UsageError
from pregate.engine.device import require_triton

PROGRAM = """
import sys
sys.modules["triton"] = None
import torch
import pregate.engine.device.ops.experts, pregate.engine.device.ops.gather, pregate.engine.device.host_memory
import studies.profiles.gather_probe
from pregate.engine.device.slots import DeviceSlots, FetchPlan, assign_slots

plan = FetchPlan.empty(2, "cpu")
wanted_N = torch.tensor([3, 3], dtype=torch.int32)
assign_slots(DeviceSlots.empty(4, 2, "cpu"), wanted_N, plan, keep=True, protected_fetches=0)
print(plan.copy_slab_N.tolist())
"""


def test_the_twins_need_no_triton() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[3, -1]\n"), done.stderr


def test_a_missing_triton_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UsageError, match="needs Triton: pip install triton"):
        require_triton()
