"""Training as a user starts it on two processes: the documented commands train as one process does."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from pregate.cli import compose_run
from pregate.config import GeneratedConfig
from pregate.tasks.generated import generated_tokenizer
from pregate.train import main
from tests.system.test_process_group import ROOT, launched, told
from tests.tiny import upstream_model
from tests.training.copying import SHALLOW
from tests.training.test_loop import in_two_processes

STEPS = 4


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny source, 32 questions of unlike lengths, and a recipe of uneven micro batches that every process count
    sums alike: the balance loss is none that adds up."""
    root = tmp_path_factory.mktemp("inputs")
    upstream_model(0, vocab_size=512, **SHALLOW).save_pretrained(root / "source")
    generated_tokenizer(GeneratedConfig(train=200, validation=20)).save_pretrained(root / "source")
    rows = [
        {"question": f"who is {i}?", "context": f"it is number {i}" + " and more" * (i % 7), "answers": [f"number {i}"]}
        for i in range(32)
    ]
    (root / "rows.jsonl").write_text("\n".join(json.dumps({**row, "id": str(i)}) for i, row in enumerate(rows)))
    train = {"steps": STEPS, "batch_sequences": 7, "micro_batch_tokens": 64, "learning_rate": 1e-3, "precision": "fp32"}
    train |= {"balance_loss": 0, "log_every": 1, "eval_every": STEPS, "save_every": STEPS, "eval_examples": 4}
    return [
        *(f"task.files.{split}={root}/rows.jsonl" for split in ("train", "validation")),
        *(f"train.{key}={value}" for key, value in train.items()),
        f"model.source={root}/source",
        *("task=qa", "tracking=jsonl", "task.max_target_tokens=8", "task.max_source_tokens=32", "then_eval=false"),
    ]


@pytest.fixture(scope="module")
def single(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    run_dir = tmp_path_factory.mktemp("single") / "run"
    main(compose_run([*settings, f"run_dir={run_dir}"]))
    return run_dir


def curve(run_dir: Path, metric: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[metric] for line in lines if metric in line}


def documented(launcher: str) -> list[str]:
    """The command of the settings page, with two processes and without its experiment."""
    text = (ROOT / "docs" / "settings.md").read_text()
    (line,) = re.findall(rf"^({launcher} .* -m pregate\.train) \+experiment=.*$", text, re.MULTILINE)
    return shlex.split(re.sub(r"(--num_processes|--nproc_per_node) \d+", r"\1 2", line))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate launch"])
def test_the_documented_commands_train_as_one_process_does(
    launcher: str, settings: list[str], single: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "two"
    done = launched([*documented(launcher), *settings, f"run_dir={run_dir}"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Run: ") == 1 and "Warning" not in done.stderr
    for metric in ("train/loss", "train/z", "train/grad_norm", "train/eval/loss"):
        one, two = curve(single, metric), curve(run_dir, metric)
        assert set(two) == ({STEPS} if "eval" in metric else set(range(1, STEPS + 1)))
        assert two == pytest.approx(one, rel=1e-4), metric
    loss = curve(run_dir, "train/loss")
    assert loss[STEPS] < 0.95 * loss[1], "nothing was learned"
    alone, state = (json.loads((place / "last" / "train_state.json").read_text()) for place in (single, run_dir))
    assert len(state["random"]) == 2 and state["random"][0] != state["random"][1], "two ranks, seeded apart"
    # counted over both: had each taken all of a batch, this would be twice as much
    assert state["state"]["target_tokens"] == alone["state"]["target_tokens"] > 0
    assert json.loads((run_dir / "summary.json").read_text())["train"]["steps"] == STEPS
    assert sorted(path.name for path in run_dir.iterdir()) == sorted(path.name for path in single.iterdir())


EVALUATING = """
import os, sys, time
from pathlib import Path
from pregate.cli import compose_run, ending_in_one_sentence
from pregate.config import UsageError
from pregate.measure import evaluation
from pregate.train import main

done, how = Path(sys.argv[1]), sys.argv[2]

def evaluate(*_):
    time.sleep(3)
    if how == "fails":
        raise UsageError("The evaluation cannot.")
    done.write_text(os.environ["RANK"])
    return {"scores": {"pre_gated": {"em": 12.5}}}

evaluation.prepare, evaluation.evaluate = lambda *_: None, evaluate
ending_in_one_sentence(lambda: main(compose_run(sys.argv[3:])))
assert done.read_text() == "0", "the main process still evaluates"
"""


@pytest.mark.slow
def test_no_process_ends_before_the_evaluation_has(settings: list[str], tmp_path: Path) -> None:
    """Without torchrun, where the store by which the others wait is in the process of rank 0."""
    run_dir, done = tmp_path / "run", tmp_path / "done"
    arguments = [*settings, f"run_dir={run_dir}", "then_eval=true", "train.steps=1"]
    in_two_processes(tmp_path, EVALUATING, [str(done), "works", *arguments], 0)
    assert json.loads((run_dir / "summary.json").read_text())["scores"] == {"pre_gated": {"em": 12.5}}


@pytest.mark.slow
def test_an_evaluation_that_fails_ends_all_in_one_sentence(settings: list[str], tmp_path: Path) -> None:
    (script := tmp_path / "script.py").write_text(EVALUATING)
    arguments = [*settings, f"run_dir={tmp_path / 'run'}", "then_eval=true", "train.steps=1"]
    command = ["torchrun", "--nproc_per_node", "2", str(script), str(tmp_path / "done"), "fails", *arguments]
    done = launched(command, tmp_path)
    assert done.returncode and told(done.stderr)[-1:] == ["pregate: The evaluation cannot."], done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("torchrun --nproc_per_node 2", "holds files but no run: choose another run_dir=DIR."),
        ("accelerate launch --use_fsdp --num_processes 2", "FSDP was asked for (ACCELERATE_USE_FSDP=true)"),
        ("accelerate launch --cpu --num_processes 2", "was asked for several processes"),
    ],
)
def test_what_cannot_be_done_together_ends_in_one_sentence(
    command: str, said: str, settings: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    if "holds" in said:
        run_dir.mkdir()
        (run_dir / "thesis.tex").write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    done = launched([*command.split(), "-m", "pregate.train", *settings, f"run_dir={run_dir}"], tmp_path)
    assert done.returncode != 0
    sentences = told(done.stderr)
    assert len(sentences) == 1 and said in sentences[0], done.stderr
    assert sorted(tmp_path.rglob("*")) == before
