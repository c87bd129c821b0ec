"""Tokens of training examples on the disk: made once, found by content, whole or absent, never all in memory."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

from pregate.config import Run, TaskConfig, UsageError
from pregate.tasks import token_cache
from pregate.tasks.qa import QuestionAnswering
from pregate.tasks.token_cache import TokenRows, token_rows
from pregate.tasks.tokens import Collator
from tests.tiny import SEQ2SEQ
from tests.training.copying import WORDS, word_tokenizer
from tests.training.test_loop import in_two_processes


def write(path: Path, count: int = 9, words: int = 3, answer: str = "w1") -> Path:
    texts = (" ".join(WORDS[i % 9 : i % 9 + words]) for i in range(count))
    lines = ({"id": f"q{i}", "question": text, "answers": [answer]} for i, text in enumerate(texts))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def asked(tmp_path: Path, file: Path, **changes: Any) -> tuple[Run, QuestionAnswering, Collator]:
    settings = {"max_source_tokens": 12, "max_target_tokens": 4, "prompt": "{question}", "columns": {"id": "id"}}
    run = Run(task=TaskConfig(**{"files": {"train": str(file)}, **settings, **changes}))
    run.data.cache = str(tmp_path / "cache")
    return run, QuestionAnswering(run), Collator.for_task(run.task, word_tokenizer(), SEQ2SEQ)


def rows(tmp_path: Path, file: Path, limit: int | None = None, **changes: Any) -> TokenRows:
    run, task, collate = asked(tmp_path, file, **changes)
    return token_rows(run, task, "train", task.fingerprint("train"), limit, collate)


def entries(tmp_path: Path) -> int:
    return len(list((tmp_path / "cache").iterdir()))


def test_kept_rows_make_the_batches_of_the_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "CHUNK_EXAMPLES", 4)
    file = write(tmp_path / "a.jsonl")
    kept = rows(tmp_path, file)
    _, task, collate = asked(tmp_path, file)
    examples, chosen = task.examples("train"), [7, 0, 3]
    assert len(kept) == 9 and kept.ids(chosen) == ["q7", "q0", "q3"]
    expected = collate([examples[i] for i in chosen])
    found = collate.of_rows(kept.__getitems__(chosen))
    assert expected["labels"].numel() > 3 and all(torch.equal(found[name], expected[name]) for name in expected)
    assert kept.prompt_lengths(chosen) == collate.source_lengths([examples[i] for i in chosen])
    assert kept[3] == kept.__getitems__([3])[0]


def test_only_what_changes_the_tokens_makes_a_new_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.jsonl")
    rows(tmp_path, file)
    with monkeypatch.context() as patched:
        patched.setattr(QuestionAnswering, "stream", lambda *_: pytest.fail("tokenized again"))
        rows(tmp_path, file)
        moved = write(tmp_path / "moved.jsonl")
        rows(tmp_path, moved, primary_metric="em", name="renamed")
    assert entries(tmp_path) == 1
    write(file, answer="w2")
    assert rows(tmp_path, file)[0].target != rows(tmp_path, moved)[0].target
    rows(tmp_path, moved, limit=5)
    rows(tmp_path, moved, max_source_tokens=2)
    assert entries(tmp_path) == 4


def test_another_rendering_makes_a_new_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.jsonl")
    before, honest = rows(tmp_path, file), Collator._tokenize
    monkeypatch.setattr(Collator, "_tokenize", lambda *given: [row[::-1] for row in honest(*given)])
    after = rows(tmp_path, file)
    assert entries(tmp_path) == 2 and after.directory != before.directory
    assert after[0].source == before[0].source[::-1] != before[0].source


def test_what_is_half_written_or_damaged_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.jsonl")
    honest = token_cache._record_batch
    monkeypatch.setattr(token_cache, "CHUNK_EXAMPLES", 4)

    def killed(examples: Any, collate: Collator) -> Any:
        if examples[0].id != "q0":
            raise KeyboardInterrupt
        return honest(examples, collate)

    monkeypatch.setattr(token_cache, "_record_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        rows(tmp_path, file)
    assert entries(tmp_path) == 0
    monkeypatch.setattr(token_cache, "_record_batch", honest)
    assert len(rows(tmp_path, file)) == 9
    (entry,) = (tmp_path / "cache").iterdir()
    data = (entry / token_cache.ROWS_FILE).read_bytes()
    (entry / token_cache.ROWS_FILE).write_bytes(data[:-100])
    assert len(rows(tmp_path, file)) == 9 and (entry / token_cache.ROWS_FILE).read_bytes() == data


def test_another_process_may_be_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.jsonl")
    honest = token_cache._record_batch

    def overtaken(examples: Any, collate: Collator) -> Any:
        monkeypatch.setattr(token_cache, "_record_batch", honest)
        rows(tmp_path, file)
        return honest(examples, collate)

    monkeypatch.setattr(token_cache, "_record_batch", overtaken)
    assert len(rows(tmp_path, file)) == 9 and entries(tmp_path) == 1


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(UsageError, match=r"tokens of split 'train' cannot be kept in .*cache .*set data\.cache=DIR\.$"):
        rows(tmp_path, write(tmp_path / "a.jsonl"))


TWO_MACHINES = """
import os, sys, time
from datetime import timedelta
from pathlib import Path
import torch
from accelerate import PartialState
from pregate.tasks import token_cache
from tests.tasks.test_token_cache import rows, write

rank, place = os.environ["RANK"], Path(sys.argv[1])
os.environ["LOCAL_RANK"] = "0"
PartialState(cpu=True, timeout=timedelta(seconds=2))
honest = token_cache._record_batch

def slow(*given):
    time.sleep(4 if rank == "1" else 0)
    return honest(*given)

token_cache._record_batch = slow
kept = rows(place / rank, place / "a.jsonl")
total = torch.tensor([float(len(kept))])
torch.distributed.all_reduce(total)
assert total.item() == 18 and len(list((place / rank / "cache").iterdir())) == 1
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_machines_with_disks_of_their_own_wait_for_each_other(tmp_path: Path) -> None:
    """Longer than a collective would."""
    write(tmp_path / "a.jsonl")
    for rank in "01":
        (tmp_path / rank).mkdir()
    in_two_processes(tmp_path, TWO_MACHINES, [str(tmp_path)], 0)


def test_a_set_larger_than_memory_is_never_all_in_memory(tmp_path: Path) -> None:
    """With more examples the peak does not grow, beside a few bytes for each."""
    line = json.dumps({"id": "q", "question": "w1 w2 " * 150, "answers": ["w1"]}) + "\n"
    file = tmp_path / "a.jsonl"

    def peak(count: int) -> int:
        file.write_text(line * count)
        run, task, collate = asked(tmp_path, file, max_source_tokens=200)
        tracemalloc.start()
        task.check(word_tokenizer(), {"train": None})
        kept = token_rows(run, task, "train", task.fingerprint("train"), None, collate)
        assert len(kept) == count and len(kept[count - 1].source) == 200
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few = peak(2000)  # more than are read at a time
    many = peak(8000)
    assert many - few < 0.1 * len(line) * 6000, (few, many)
