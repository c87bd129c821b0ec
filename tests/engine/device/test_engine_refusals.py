"""What the device-driven engine refuses, each in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pregate.config import Tier, UsageError
from pregate.engine.device.device_engine import DeviceEngine
from pregate.engine.engine import OffloadEngine
from pregate.engine.opening import open_store
from pregate.models.family import family_of_model
from tests.engine.device.steps.test_t5 import inputs_of
from tests.engine.serving import SLAB, Served


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch": 33}, "serves 1 to 32 rows, not 33: use engine.drive=host"),
        ({"batch": 0}, "serves 1 to 32 rows"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"max_source_len": 0}, "max_source_len=0 must be at least 1"),
        ({"tier": "disk"}, "set engine.tier=dram, or use engine.drive=host"),
        ({"cache": "lfu"}, "caches none and lru, not lfu"),
        ({"batch": 4, "device_budget": "20%"}, f"holds 6 experts, .* can need 8: give {8 * SLAB}B"),
        ({"policy": "gpu_only", "device_budget": "50%"}, "gpu_only keeps all of them on the device"),
        ({"policy": "prefetch_all", "device_budget": "9%"}, "can need 10: give"),
    ],
)
def test_what_cannot_be_served_is_refused(served: Served, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as refused:
        DeviceEngine.open(served.directory, **options)
    assert "\n" not in str(refused.value)


def test_experts_of_another_activation_are_refused(served: Served, tmp_path: Path) -> None:
    for file in filter(Path.is_file, served.directory.iterdir()):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dense_act_fn": "gelu"}))
    with pytest.raises(UsageError, match="activation 'gelu'"):
        DeviceEngine.open(tmp_path)


def test_a_family_without_a_step_is_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(family_of_model(served.model)), "step", None)
    with pytest.raises(UsageError, match=r"no decoding step for a 'switch_transformers' model: use engine\.drive=host"):
        OffloadEngine.open(served.directory, drive="device")


def test_a_store_on_disk_is_refused(served: Served, tmp_path: Path) -> None:
    store = open_store(served.directory, tier=Tier.disk, pack_dir=tmp_path / "pack")
    with pytest.raises(UsageError, match="not from the disk"):
        DeviceEngine.open(served.directory, store=store)
    store.close()


def test_requests_that_are_too_large_are_refused(served: Served) -> None:
    with DeviceEngine.open(served.directory, batch=2, max_source_len=9, max_new_tokens=4) as engine:
        for inputs, options, said in [
            (inputs_of(0, 3), {}, "3 rows and 9 source tokens is too large for an engine opened for 2 and 9"),
            (inputs_of(0, 1, source=10), {}, "1 rows and 10 source tokens"),
            (inputs_of(0, 1), {"max_new_tokens": 5}, "5 new tokens are asked for, .* opened for 1 to 4"),
            (inputs_of(0, 1), {"num_beams": 2}, "cannot follow num_beams=2"),
        ]:
            with pytest.raises(UsageError, match=said):
                engine.generate(**inputs, **options)
        assert engine.generate(**inputs_of(0, 2), max_new_tokens=4, eos_token_id=None).shape == (2, 5)
