"""What a benchmark keeps between runs belongs to the weights it was made with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pregate.config import Policy
from pregate.measure.bench.baseline_rows import Accelerated
from pregate.measure.bench.grid import ACCELERATE_WARM, RowSpec
from pregate.measure.bench.models import bench_model
from pregate.measure.bench.references import References
from pregate.measure.bench.requests import Effort
from pregate.models.checkpoint import open_checkpoint
from tests.tiny import pregated_model

SPEC = RowSpec("tiny", "float32", 1, "own", str(Policy.on_demand), 1, 4, 4, 0)


def test_references_are_those_of_the_weights(tmp_path: Path) -> None:
    paths = []
    for seed in (0, 0, 1):
        pregated_model(seed).save_pretrained(tmp_path / "model")
        model = bench_model("tiny", None, open_checkpoint(str(tmp_path / "model")))
        paths.append(References(tmp_path, 3, 4, model.fingerprint).path(SPEC, "source"))
        assert References(tmp_path, 3, 4, model.fingerprint).path(SPEC, "source") == paths[-1]
    assert paths[2] not in paths[:2]


def test_what_a_killed_run_left_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be of other weights, or a part of them."""
    folder = tmp_path / "tiny-accelerate"
    folder.mkdir()
    (folder / "index.json").write_text("{}")
    written: list[Path] = []
    module = "pregate.measure.bench.baseline_rows"
    monkeypatch.setattr(f"{module}.write_offload_folder", lambda _, place: (place.mkdir(), written.append(place)))
    monkeypatch.setattr(f"{module}.Accelerated._row", lambda *_: {})
    for name in ("drop_page_cache", "fill_page_cache"):
        monkeypatch.setattr(f"{module}.{name}", lambda _: None)
    monkeypatch.setattr(f"{module}.cached_share", lambda _: None)
    model: Any = None
    rows: list[dict[str, Any]] = []
    spec = RowSpec(**{**SPEC.to_dict(), "policy": ACCELERATE_WARM, "tier": "disk"})
    references = References(tmp_path, 3, 4, "")
    Accelerated(model, torch.device("cpu"), Effort(1, 0, 1), references, folder).measure([spec], rows.append)
    assert written == [folder] and rows == [{}] and not folder.exists()
