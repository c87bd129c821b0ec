"""What a resumed command finds in its run directory, and when it must not go on from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pregate.config import PreGateConfig, Run, UsageError
from pregate.conversion import convert
from pregate.training.checkpoint import steps_done
from pregate.training.stages import CONVERTED, claim_run_dir, get_converted
from tests.tiny import upstream_model
from tests.training.copying import train_tiny


def test_a_conversion_of_other_settings_is_not_gone_on_with(tmp_path: Path) -> None:
    upstream_model(0).save_pretrained(tmp_path / "source")
    convert(str(tmp_path / "source"), tmp_path / CONVERTED, PreGateConfig(lookahead=1))
    source = str(tmp_path / "source")
    assert get_converted(Run(pregate=PreGateConfig(lookahead=1)), tmp_path, source) == str(tmp_path / CONVERTED)
    for other in (PreGateConfig(lookahead=2), PreGateConfig(stacks=["decoder"])):
        with pytest.raises(UsageError, match="was converted with other pregate settings"):
            get_converted(Run(pregate=other), tmp_path, source)


def test_the_steps_of_an_interrupted_run_are_known(tmp_path: Path) -> None:
    assert steps_done(tmp_path / "last") == 0
    train_tiny(tmp_path, steps=3)
    assert steps_done(tmp_path / "last") == 3


def test_a_run_directory_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot be written .*: choose another run_dir=DIR\."):
        claim_run_dir(Run(run_dir=str(tmp_path / "file" / "run")))
