"""What the evaluation at the end of a training run could not be served with is refused before anything is trained: by
the model that the run will have, not by the one it starts from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pregate import train as command
from pregate.cli import compose_run
from pregate.config import Run, UsageError
from pregate.measure import servable
from pregate.measure.servable import check_engine
from pregate.tasks.registry import splits_read
from pregate.training.checks import trained_config
from tests.tiny import upstream_model

FP32, BF16 = 8192, 4096
"""Bytes of an expert: two matrices of 560 numbers, in whole pages."""


def saved(directory: Path, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    upstream_model(0, **changes).to(dtype).save_pretrained(directory)
    return directory


def run_of(source: Path, *overrides: str) -> Run:
    """Four rows a step, so that a block can need four of its five experts."""
    return compose_run(
        [
            f"model.source={source}",
            f"run_dir={source / 'run'}",
            "task=qa",
            "task.files.train=none.jsonl",
            "task.files.validation=none.jsonl",
            "then_eval=true",
            "engine.device=cpu",
            "engine.drive=device",
            "engine.policies=[pre_gated]",
            "eval.batch_size=4",
            *overrides,
        ]
    )


def check(run: Run) -> None:
    check_engine(run, *trained_config(run))


def test_a_budget_is_judged_by_the_lookahead_that_the_run_will_have(tmp_path: Path) -> None:
    """The blocks under way together: two with a lookahead of 1, three with 2, one in a conventional decoder."""
    source = saved(tmp_path)
    for lookahead, stacks, fewest in [
        (0, "encoder,decoder", 4),
        (1, "encoder,decoder", 8),
        (1, "encoder", 4),
        (2, "decoder", 12),
    ]:
        gates = [f"pregate.lookahead={lookahead}", f"pregate.stacks=[{stacks}]"]
        check(run_of(source, *gates, f"engine.device_budget={fewest * FP32}B"))
        run = run_of(source, *gates, f"engine.device_budget={(fewest - 1) * FP32}B")
        with pytest.raises(
            UsageError, match=rf"holds {fewest - 1} experts, .* can need {fewest}: give {fewest * FP32}B"
        ):
            command.main(run)
        assert not (source / "run").exists(), "something was begun"


def test_a_geometry_is_judged_by_it_too(tmp_path: Path) -> None:
    run = compose_run(
        [
            "+experiment=quickstart",
            f"run_dir={tmp_path / 'run'}",
            "engine.device=cpu",
            "engine.drive=device",
            "engine.device_budget=1%",
            "pregate.lookahead=2",
        ]
    )
    with pytest.raises(UsageError, match=r"engine\.device_budget=1% .*: give"):
        command.main(run)
    assert not (tmp_path / "run").exists()


def test_slabs_are_those_of_trained_weights(tmp_path: Path) -> None:
    """Training saves float32, whatever the source has; a run of no steps keeps the source's weights."""
    source = saved(tmp_path, torch.bfloat16)
    for drive in ("host", "device"):
        kept = run_of(source, f"engine.drive={drive}", f"engine.device_budget={8 * BF16}B", "train.steps=0")
        check(kept)
        assert trained_config(kept)[1] is torch.bfloat16
    with pytest.raises(UsageError, match=rf"holds 4 experts, .* can need 8: give {8 * FP32}B"):
        check(run_of(source, f"engine.device_budget={8 * BF16}B"))
    with pytest.raises(UsageError, match=rf"less than one expert of 8\.19 kB: give at least {FP32}B"):
        check(run_of(source, "engine.drive=host", f"engine.device_budget={BF16}B"))


def test_what_the_device_cannot_compute_or_decode_is_refused_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved(tmp_path / "gelu", dense_act_fn="gelu", feed_forward_proj="gelu")
    with pytest.raises(UsageError, match="activation 'gelu'"):
        check(run_of(source))
    check(run_of(source, "engine.drive=host"))
    source = saved(tmp_path / "settings")
    check(run_of(source))
    settings = json.loads((source / "generation_config.json").read_text())
    (source / "generation_config.json").write_text(json.dumps({**settings, "no_repeat_ngram_size": 2}))
    with pytest.raises(
        UsageError, match=r"cannot follow no_repeat_ngram_size=2: leave it out, or use engine\.drive=host"
    ):
        check(run_of(source))
    with pytest.raises(UsageError, match="cannot follow no_repeat_ngram_size=2"):
        servable.check_servable(run_of(source), str(source))
    (source / "generation_config.json").write_text(json.dumps({**settings, "num_beams": 3}))
    check(run_of(source))  # an evaluation says itself how many

    def missing() -> None:
        raise UsageError("Decoding on the device needs Triton")

    monkeypatch.setattr(servable, "pick_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(servable, "require_triton", missing)
    with pytest.raises(UsageError, match="needs Triton"):
        check(run_of(source))


def test_the_split_of_the_evaluation_is_looked_at_before_training(tmp_path: Path) -> None:
    assert list(splits_read(run_of(tmp_path, "eval.split=test"))) == ["train", "validation", "test"]
    assert list(splits_read(run_of(tmp_path, "eval.split=test", "then_eval=false"))) == ["train", "validation"]
    assert list(splits_read(run_of(tmp_path, "eval.split=validation"))) == ["train", "validation"]
