"""Learning from what the teacher answers: the answers, the rows that are learnt, a stopped run, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from pregate.cli import compose_run
from pregate.config import DistillData, UsageError
from pregate.models.loading import load_resident
from pregate.models.objectives import until_end
from pregate.models.packing_and_padding import Row
from pregate.tasks import own_answers
from pregate.tasks.base import Example
from pregate.tasks.tokens import Collator
from pregate.training import taught_answers
from pregate.training.taught_answers import FILE, batches_to_answer
from tests.engine.olmoe import olmoe
from tests.tiny import SEQ2SEQ, upstream_model
from tests.training.copying import SHALLOW, Recorder, train_tiny, word_tokenizer


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A Switch teacher, and for packed examples an OLMoE one."""
    root = tmp_path_factory.mktemp("teachers")
    upstream_model(seed=2, **SHALLOW).save_pretrained(root / "switch")
    torch.manual_seed(5)
    olmoe().save_pretrained(root / "olmoe")
    return {False: root / "switch", True: root / "olmoe"}


def lesson(teacher: Path, packing: bool, **more: Any) -> dict[str, Any]:
    return {
        "teacher": str(teacher),
        "distill_logits": 1.0,
        "distill_data": DistillData.generations,
        "packing": packing,
        "micro_batch_tokens": 40,
        **more,
    }


def naive_answer(teacher: Any, source: list[int], packing: bool) -> list[int]:
    """Up to four tokens, each the most likely one behind all before, up to the first end (id 1)."""
    answer: list[int] = []
    while len(answer) < 4 and 1 not in answer:
        if packing:
            logits = teacher(input_ids=torch.tensor([source + answer])).logits
        else:
            logits = teacher(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([[0, *answer]])).logits
        answer.append(int(logits[0, -1].argmax()))
    return answer


@pytest.mark.parametrize("packing", [False, True])
def test_rows_are_learnt_with_the_teachers_answers(
    packing: bool, teachers: dict[bool, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt: list[Row] = []
    name = "packed_rows" if packing else "of_rows"
    makes = getattr(Collator, name)
    monkeypatch.setattr(Collator, name, lambda self, rows: learnt.extend(rows) or makes(self, rows))
    _, told, _ = train_tiny(tmp_path / "own", **lesson(teachers[packing], packing))
    with torch.no_grad():
        teacher = load_resident(teachers[packing]).eval()
        rows = learnt[: 4 * 6]
        answers = [naive_answer(teacher, list(row.source), packing) for row in rows]
    assert [list(row.target) for row in rows] == answers
    assert len({tuple(answer) for answer in answers}) > 3

    learnt.clear()
    _, other, _ = train_tiny(tmp_path / "task", **lesson(teachers[packing], packing, distill_data=DistillData.task))
    assert [row.source for row in learnt[: 4 * 6]] == [row.source for row in rows], "the same examples"
    losses = [[run.at["tiny/loss", step] for step in range(1, 5)] for run in (told, other)]
    assert all(math.isfinite(loss) for each in losses for loss in each) and losses[0] != losses[1]


def test_answers_alone_are_a_lesson(teachers: dict[bool, Path], tmp_path: Path) -> None:
    _, both, _ = train_tiny(tmp_path / "both", **lesson(teachers[False], False))
    _, alone, _ = train_tiny(tmp_path / "alone", **lesson(teachers[False], False, distill_logits=0.0))
    assert ("tiny/kl", 1) in both.at and ("tiny/kl", 1) not in alone.at
    losses = [[run.at["tiny/loss", step] for step in range(1, 5)] for run in (both, alone)]
    assert losses[0][0] == losses[1][0] and losses[0][1] != losses[1][1], "the same targets, another gradient"
    assert all(math.isfinite(loss) for each in losses for loss in each)


def test_a_stopped_run_goes_on_with_the_same_answers(
    teachers: dict[bool, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = lesson(teachers[False], False, steps=6)
    _, unbroken, _ = train_tiny(tmp_path / "unbroken", **given)
    whole = (tmp_path / "unbroken" / FILE).read_text()
    asked = []
    answers = taught_answers.answers
    monkeypatch.setattr(taught_answers, "answers", lambda rows, *rest: asked.append(len(rows)) or answers(rows, *rest))

    recorder = Recorder(interrupt_at=3)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path / "run", tracker=recorder, **given)
    assert sum(asked) == len({row for line in whole.splitlines()[1:] for row in json.loads(line)["rows"]})
    # killed while it asked, too: of the last two batches one is missing and one is torn
    kept = whole.splitlines(keepends=True)
    (tmp_path / "run" / FILE).write_text("".join(kept[:-2]) + kept[-2][:-9])
    asked.clear()
    train_tiny(tmp_path / "run", resume=True, tracker=recorder, **given)
    assert len(asked) == 2 and sum(asked) <= 6
    assert sorted((tmp_path / "run" / FILE).read_text().splitlines()) == sorted(whole.splitlines())
    losses = [[run.at["tiny/loss", step] for step in range(1, 7)] for run in (unbroken, recorder)]
    assert losses[0] == losses[1] and all(map(math.isfinite, losses[0]))

    # another teacher's answers are no use
    other = upstream_model(seed=3, **SHALLOW)
    other.save_pretrained(tmp_path / "other")
    asked.clear()
    train_tiny(tmp_path / "run", resume=True, **lesson(tmp_path / "other", False, steps=7))
    assert sum(asked) > 6


def test_each_row_is_answered_once_and_longer_runs_only_add() -> None:
    used = [(7 * i) % 97 for i in range(200)]
    batches = batches_to_answer(used[:60], lambda window: [row % 10 for row in window], 3)
    longer = batches_to_answer(used, lambda window: [row % 10 for row in window], 3)
    assert sorted(row for batch in longer for row in batch) == list(range(97))
    assert max(map(len, batches)) == 3 and batches[:16] == longer[:16]
    assert all(abs(a % 10 - b % 10) <= 2 for batch in longer[:16] for a, b in pairwise(batch))


def test_an_answer_ends_with_whatever_stops_generation() -> None:
    """Behind it stands padding, up to the longest answer of the batch; padding may be one of the ends itself."""
    said_BN = until_end(torch.tensor([[7, 5, 1, 1], [7, 1, 1, 1], [7, 8, 9, 7]]), [1, 5])
    assert said_BN.tolist() == [[True, True, False, False]] * 2 + [[True] * 4]
    assert until_end(torch.tensor([[7, 8]]), None).all()
    model = upstream_model(seed=2, **SHALLOW).eval()
    collate = Collator(word_tokenizer(), 10, 4, SEQ2SEQ)
    prompts = collate.rows([Example("a", "w1 w2 w3", "w1", ("w1",))])
    [whole] = own_answers.answers(prompts, model, model.generate, collate)
    assert len(whole) > 1 and whole[0] != 1
    model.generation_config.num_beams = 3
    assert own_answers.answers(prompts, model, model.generate, collate) == [whole], "greedily, whatever is usual"
    model.generation_config.eos_token_id = [1, whole[0]]
    assert own_answers.answers(prompts, model, model.generate, collate)[0].tolist() == [whole[0]]


def test_answers_of_a_teacher_that_was_replaced_are_asked_for_again(
    teachers: dict[bool, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(teachers[False], tmp_path / "teacher")
    given = lesson(tmp_path / "teacher", False)
    train_tiny(tmp_path / "run", **given)
    asked, answers = [], taught_answers.answers
    monkeypatch.setattr(taught_answers, "answers", lambda rows, *rest: asked.append(len(rows)) or answers(rows, *rest))
    train_tiny(tmp_path / "run", resume=True, **given)
    assert not asked
    upstream_model(seed=9, **SHALLOW).save_pretrained(tmp_path / "teacher")
    shutil.rmtree(tmp_path / "run" / "last")
    train_tiny(tmp_path / "run", resume=True, **given)
    assert sum(asked) > 10


@pytest.mark.parametrize(
    "given",
    [
        ["train.distill_data=generations"],
        ["train.distill_data=generations", "train.teacher=x", "train.distill_logits=1", "train.sharding=full"],
    ],
)
def test_a_teacher_that_cannot_answer_is_refused(given: list[str]) -> None:
    with pytest.raises(UsageError, match="needs a teacher that is whole in memory"):
        compose_run(given)
