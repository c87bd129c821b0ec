"""`python -m pregate.harness`: the harness's own command with our model, on tasks from local files."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pandas
import pytest

from pregate import harness
from pregate.config import PreGateConfig, UsageError
from pregate.conversion.write import convert
from tests.tasks.test_chat import chat_tokenizer

ROOT = Path(__file__).parent.parent
TASKS = ROOT / "studies" / "lm_eval_tasks"
NAMES = sorted(path.stem for path in TASKS.glob("*.yaml"))
ENDING = {
    "activity_label": "Roof",
    "ctx_a": "A man is sitting on a roof.",
    "ctx_b": "he",
    "endings": ["[step] rolls a roof.", "is ripping up tiles.", "is a roof.", "sits on a man."],
    "label": "3",
}
QUESTIONS: dict[str, list[dict[str, Any]]] = {
    "hub": [{"question": "Is it a gas?", "choices": {"text": ["iron", "air"], "label": ["A", "B"]}, "answerKey": "B"}],
    "archive": [
        {
            "question": {
                "stem": "Is it a gas?",
                "choices": [{"text": "iron", "label": "A"}, {"text": "air", "label": "B"}],
            },
            "answerKey": "B",
        }
    ],
}
SENTENCES = (
    "Ada wrote a book in the year 1843. It was a long book, and it went on and on and on until the end of it all. "
)


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"The package lm_eval is missing: pip install '\.\[harness\]' in the"):
        harness.main()


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"pregate\.harness runs as one process, but WORLD_SIZE=2 asks for 2"):
        harness.main()


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little of every data set."""
    root = tmp_path_factory.mktemp("data")
    write_lines(root / "lambada" / "test.jsonl", [{"text": "Ada wrote a book, and this is the book"}] * 2)
    write_lines(root / "hellaswag" / "validation.jsonl", [ENDING, {**ENDING, "label": 0}])
    write_lines(root / "arc" / "test.jsonl", QUESTIONS["hub"])
    write_lines(root / "web_questions" / "test.jsonl", [{"question": "Who wrote it?", "answers": ["Ada", "Ada B."]}])
    (root / "corpus").mkdir()
    texts = [SENTENCES + "There is no other word in the end than the same book.", SENTENCES]
    pandas.DataFrame({"text": texts, "source": ["made", "up"]}).to_parquet(root / "corpus" / "validation.parquet")
    return root


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["pregate.harness", *arguments])
    runpy.run_module("pregate.harness", run_name="__main__")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("lm_eval")
    from tests.measure.test_lm_eval_model import upstream

    root, tokenizer = tmp_path_factory.mktemp("checkpoint"), chat_tokenizer(None)
    upstream(len(tokenizer), max_position_embeddings=256).save_pretrained(root / "plain")
    tokenizer.save_pretrained(root / "plain")
    convert(str(root / "plain"), root / "ahead", PreGateConfig(lookahead=1))
    return root / "ahead"


ENGINE = {"engine": "offloaded", "policy": "pre_gated", "device_budget": "25%"}


def numbers(results: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in results.items() if isinstance(value, float)}


def test_local_files_are_scored_as_by_the_harness(checkpoint: Path, data: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import pregate.measure.lm_eval_model  # noqa: F401 - registers the model

    found: dict[str, Any] = {}
    for model, options in {"hf": {}, "pregate": ENGINE}.items():
        # without the thousands of tasks of the harness, which take it half a minute to list
        manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"data_root": str(data)})
        asked = {"pretrained": str(checkpoint), **options}
        settings: dict[str, Any] = {"batch_size": 2, "device": "cpu", "bootstrap_iters": 0, "task_manager": manager}
        found[model] = simple_evaluate(model=model, model_args=asked, tasks=list(NAMES), **settings)
    assert sorted(found["pregate"]["results"]) == NAMES
    counts = {name: count["effective"] for name, count in found["pregate"]["n-samples"].items()}
    once = dict.fromkeys(("local_arc", "local_last_words", "local_web_questions"), 1)
    assert counts == {**once, "local_hellaswag": 2, "local_lambada": 2, "local_text": 2}
    for name in NAMES:
        own = numbers(found["hf"]["results"][name])
        assert own and numbers(found["pregate"]["results"][name]) == pytest.approx(own, rel=1e-4)
    told = found["pregate"]["config"]
    assert told["policy"] == "pre_gated" and told["bytes_moved"] > 0 and told["num_slots"] == 6


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_commands_of_the_page_run(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With local tasks in the place of those from the hub."""
    monkeypatch.setenv("PREGATE_DATA", str(data))
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs" / "lm_eval.md").read_text(), re.MULTILINE | re.DOTALL)
    commands = [shlex.split(block.replace("\\\n", " ").replace("MODEL", str(checkpoint))) for block in blocks]
    assert len(commands) == 3
    names = "local_hellaswag,local_arc,local_lambada"
    for words in commands:
        words = [names if word == "hellaswag,arc_easy,lambada_openai" else word for word in words]
        start = words.index("pregate.harness") + 1
        assert words[start - 3 : start] == ["python", "-m", "pregate.harness"]
        places = {"scores": str(tmp_path), "studies/lm_eval_tasks": str(TASKS)}
        arguments = [places.get(word, word) for word in words[start:]]
        assert names in arguments
        arguments += [] if "--include_path" in arguments else ["--include_path", str(TASKS)]
        command(monkeypatch, *arguments, "--device", "cpu")
        printed = capsys.readouterr().out
        assert all(f"|{name}" in printed for name in names.split(","))
    [results] = tmp_path.rglob("results_*.json")
    assert json.loads(results.read_text())["config"]["bytes_moved"] > 0


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_a_users_error_ends_the_command_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    arguments = ("--model", "pregate", "--include_path", str(TASKS), "--tasks", "local_arc")
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, *arguments, "--model_args", f"pretrained={tmp_path / 'nowhere'}")
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"pregate: There is no directory '{tmp_path / 'nowhere'}'")


@pytest.fixture(scope="module")
def local_files() -> Any:
    pytest.importorskip("lm_eval")
    from studies.lm_eval_tasks import local_files

    return local_files


def test_what_is_read_of_each_file(local_files: Any, data: Path, tmp_path: Path) -> None:
    known = {"data_root": str(data), "pretrained": "what else the harness knows"}
    assert local_files.lambada("test", **known)["test"][0] == {
        "context": "Ada wrote a book, and this is the",
        "word": "book",
    }
    ending = local_files.hellaswag("validation", **known)["validation"][0]
    assert ending["query"] == "Roof: A man is sitting on a roof. He" and ending["gold"] == 3
    assert ending["choices"][0] == " rolls a roof."
    [passage] = local_files.last_words("validation", **known)["validation"]
    assert passage["word"] == "book" and passage["context"].endswith("the end than the same")
    expected = {"question": "Is it a gas?", "choices": ["iron", "air"], "gold": 1}
    for form, rows in QUESTIONS.items():
        write_lines(tmp_path / form / "arc" / "test.jsonl", rows)
        assert local_files.arc("test", data_root=tmp_path / form)["test"][0] == expected


WRONG = {
    "lambada": ({"text": 7}, "7 in text, which must be text"),
    "hellaswag": ({**ENDING, "label": 4}, "label 4, which is none of its 4 endings"),
    "arc": ({**QUESTIONS["hub"][0], "answerKey": "E"}, "the answerKey E, which is none of the labels A, B"),
    "web_questions": (
        {"question": "Who?", "answers": "Ada"},
        "'Ada' in answers, which must be a list of texts",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_row_is_refused(local_files: Any, name: str, tmp_path: Path) -> None:
    row, sentence = WRONG[name]
    write_lines(tmp_path / name / "test.jsonl", [row])
    with pytest.raises(UsageError) as refused:
        getattr(local_files, name)("test", data_root=str(tmp_path))
    path = tmp_path / name / "test.jsonl"
    assert str(refused.value) == f"Row 1 of {path} holds {sentence}: repair or remove it."


def test_files_that_cannot_be_used_are_refused(
    local_files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREGATE_DATA", raising=False)
    with pytest.raises(UsageError, match="There is no data: set PREGATE_DATA=DIR, or --metadata data_root=DIR"):
        local_files.arc("test")
    with pytest.raises(UsageError, match=r"arc holds nothing, but one of test\.jsonl, test\.json, test\.parquet is"):
        local_files.arc("test", data_root=str(tmp_path))
    (tmp_path / "lambada").mkdir()
    path = tmp_path / "lambada" / "test.jsonl"
    path.write_text('{"text": "cut')
    with pytest.raises(UsageError, match=r"test\.jsonl cannot be read as jsonl \(.*line 1.*\): repair it"):
        local_files.lambada("test", data_root=str(tmp_path))
    path.write_text("")
    with pytest.raises(UsageError, match=r"test\.jsonl holds nothing to score: give a file with other rows"):
        local_files.lambada("test", data_root=str(tmp_path))
    (tmp_path / "lambada" / "test.json").write_text("[]")
    with pytest.raises(UsageError, match=r"holds test\.jsonl and test\.json: leave one of them there"):
        local_files.lambada("test", data_root=str(tmp_path))
