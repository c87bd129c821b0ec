import json
import random
import re
import socket
import subprocess

import numpy as np
import pytest
import torch

from pregate.config import Device, UsageError
from pregate.system import machine
from pregate.system.memory import PeakMemory, free_memory


def test_set_seed_repeats_every_generator():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    machine.set_seed(7)
    first = draw()
    machine.set_seed(7)
    assert draw() == first
    machine.set_seed(2**40 + 1)
    assert draw() != first


def test_pick_device_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.pick_device(Device.auto).type == "cpu"
    with pytest.raises(UsageError, match=r"engine\.device=cpu"):
        machine.pick_device(Device.cuda)


def test_pick_device_with_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [machine.pick_device(d).type for d in (Device.auto, Device.cuda, Device.cpu)] == ["cuda", "cuda", "cpu"]


def test_environment_is_publishable_json(monkeypatch):
    facts = machine.environment()
    text = json.dumps(facts)
    assert {"python", "torch", "transformers", "pregate", "cpu", "cores", "memory_gib", "platform"} <= set(facts)
    assert facts["torch"] == torch.__version__.split("+")[0] or facts["torch"] == torch.__version__
    assert facts["cores"] >= 1
    assert facts["memory_gib"] > 0
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", text)
    assert str(machine.Path(machine.__file__).parent) not in text


def test_git_state_only_of_a_checkout_that_tracks_the_file(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    tracked, stray = tmp_path / "tracked.py", tmp_path / "stray.py"
    tracked.write_text("1")
    stray.write_text("1")
    assert machine._git_state(tracked) is None
    git("init", "-q")
    git("add", "tracked.py")
    git("commit", "-qm", "x")
    state = machine._git_state(tracked)
    assert state is not None
    assert re.fullmatch(r"[0-9a-f]{40}", state["commit"])
    assert state["dirty"] is False
    assert machine._git_state(stray) is None
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "cells.jsonl").write_text("1")
    git("add", "results")
    state = machine._git_state(tracked)
    assert state is not None and state["dirty"] is False, "what a run records about itself is no change"
    tracked.write_text("2")
    dirty = machine._git_state(tracked)
    assert dirty is not None
    assert dirty["dirty"] is True


def test_what_tensors_have_given_back_is_free_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's allocator keeps it, so that the device counts it as used."""
    asked = []
    for name, told in {"mem_get_info": (1000, 9000), "memory_reserved": 700, "memory_allocated": 200}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, told=told: asked.append(device) or told)
    device = torch.device("cuda", 1)
    assert free_memory(device) == 1500
    assert asked == [device] * 3


@pytest.mark.parametrize("supported", [True, False])
def test_half_precision_gives_way_where_a_cpu_has_no_instructions_for_it(
    supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    cpu, expected = torch.device("cpu"), torch.bfloat16 if supported else torch.float32
    assert machine.fast_dtype(torch.bfloat16, cpu) is expected
    assert machine.fast_dtype(torch.bfloat16, torch.device("cuda")) is torch.bfloat16
    assert machine.fast_dtype(torch.float32, cpu) is torch.float32


def test_a_peak_can_be_lowered_to_an_earlier_one() -> None:
    """Or a small load that follows a large one would have the peak of the large one."""
    with PeakMemory(torch.device("cpu")) as peak:
        if peak.read() is None:
            pytest.skip("this system does not tell peaks of memory")
        large = torch.ones(50_000_000)
        first = peak.read() or 0
        del large
        peak.lower_to(1000)
        assert first > 190_000_000 > (peak.read() or 0)


def test_peak_memory_sees_a_large_allocation_and_forgets_it() -> None:
    with PeakMemory(torch.device("cpu")) as first:
        torch.ones(8_000_000)
    with PeakMemory(torch.device("cpu")) as second:
        torch.ones(10)
    if first.num_bytes is None:  # a kernel that does not let the mark be reset
        pytest.skip("this kernel does not let the mark be reset")
    assert 30e6 < first.num_bytes < 60e6
    assert second.num_bytes is not None and second.num_bytes < 10e6


def test_what_is_left_out_of_a_peak_does_not_count() -> None:
    with PeakMemory(torch.device("cpu")) as peak:
        torch.ones(2_000_000)
        with peak.left_out():
            torch.ones(16_000_000)
        torch.ones(4_000_000)
    if peak.num_bytes is None:
        pytest.skip("this kernel does not let the mark be reset")
    assert 14e6 < peak.num_bytes < 50e6, "16 MB, not 64 MB"
    with PeakMemory(torch.device("cpu")) as peak:
        torch.ones(16_000_000)
        with peak.left_out():
            torch.ones(10)
    assert peak.num_bytes is not None and peak.num_bytes > 60e6, "what came before stays"
