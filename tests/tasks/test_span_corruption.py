"""Span corruption: lengths, masks and targets as T5 defines them, and a packed stream that can be entered anywhere."""

from __future__ import annotations

import collections
from itertools import islice
from pathlib import Path

import numpy as np
import pandas
import pytest
from transformers import PreTrainedTokenizerFast

from pregate.cli import compose_run
from pregate.config import UsageError
from pregate.tasks import span_corruption, text_stream
from pregate.tasks.registry import build_task, build_training_task
from pregate.tasks.span_corruption import PackedRow, SpanCollator, SpanLengths, noise_masks
from pregate.tasks.text_stream import Position
from tests.tasks.corpora import SETTINGS, corpus_task, sentinel_tokenizer, write_corpus


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_stream, "BLOCK_DOCUMENTS", 7)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "data")


def test_lengths_are_those_of_the_t5_recipe() -> None:
    """512 source tokens are 568 tokens of text and targets of 114, as the reference computes them."""
    lengths = SpanLengths.filling(512, 0.15, 3.0)
    assert (lengths.row, lengths.source, lengths.target, lengths.spans) == (568, 512, 114, 28)


@pytest.mark.parametrize("density", [0.1, 0.15, 0.3])
@pytest.mark.parametrize("mean_span", [1.0, 3.0, 4.5])
def test_rows_fill_the_source_exactly(density: float, mean_span: float) -> None:
    for source in range(8, 140):
        lengths = SpanLengths.filling(source, density, mean_span)
        assert lengths.source == source
        assert SpanLengths.of_row(lengths.row + 1, density, mean_span).source > source


def test_a_mask_hides_as_many_tokens_in_as_many_spans_as_it_should() -> None:
    lengths = SpanLengths.of_row(141, 0.15, 3.0)
    masks = noise_masks(lengths, 400, np.random.default_rng(0))
    assert masks.shape == (400, 141)
    assert (masks.sum(1) == lengths.hidden).all()
    assert ((np.diff(masks.astype(int)) == 1).sum(1) == lengths.spans).all()
    assert (lengths.hidden, lengths.spans) == (21, 7)
    assert not masks[:, 0].any()
    assert masks[:, -1].all()
    share = masks.mean(0)
    assert 0.05 < share[5:-10].min() < share[5:-10].max() < 0.35


def test_partitions_are_drawn_uniformly() -> None:
    drawn = span_corruption._segments(6000, 5, 3, np.random.default_rng(0))
    counts = collections.Counter(map(tuple, drawn.tolist()))
    assert len(counts) == 6
    assert min(counts.values()) > 850, counts


def naive(row: PackedRow, sentinels: list[int]) -> tuple[list[int], list[int]]:
    source: list[int] = []
    target: list[int] = []
    number, previous = -1, False
    opened = 0
    for token, hidden in zip(row.tokens.tolist(), row.hidden.tolist(), strict=True):
        if hidden:
            if not previous:
                number += 1
                source.append(sentinels[number])
            target.append(token)
        else:
            if previous or not source:
                target.append(sentinels[opened])
                opened += 1
            source.append(token)
        previous = hidden
    return [*source, 1], [*target, 1]


def test_batches_are_those_of_a_naive_loop() -> None:
    lengths, sentinels = SpanLengths.filling(40, 0.3, 2.0), list(range(99, 60, -1))
    masks = noise_masks(lengths, 6, np.random.default_rng(0))
    rows = [PackedRow(np.arange(2, 2 + lengths.row) + 100 * i, masks[i]) for i in range(6)]
    batch = SpanCollator(lengths, sentinels, 1)(rows)
    assert batch["input_ids"].shape == (6, 40)
    assert batch["labels"].shape == (6, lengths.target)
    assert batch["attention_mask"].all()
    for i, row in enumerate(rows):
        source, target = naive(row, sentinels)
        assert batch["input_ids"][i].tolist() == source
        assert batch["labels"][i].tolist() == target


def documents(root: Path, pattern: str) -> list[str]:
    files = sorted((root / "corpus").glob(pattern))
    return [text for file in files for text in pandas.read_parquet(file)["text"]]


def test_validation_rows_are_the_documents_in_order_with_eos_between(root: Path) -> None:
    task, tokenizer = corpus_task(root), sentinel_tokenizer()
    rows = task.first_rows("validation", tokenizer, 5)
    words = [w for text in documents(root, "validation*") for w in (*text.split(), "</s>")]
    assert tokenizer.convert_ids_to_tokens(np.concatenate([r.tokens for r in rows])) == words[: 5 * task.lengths.row]
    assert len({row.hidden.tobytes() for row in rows}) > 1


class Counting:
    """A tokenizer that notes how many texts it was given each time."""

    eos_token_id = 1

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.texts: list[int] = []

    def __call__(self, texts: list[str], **options: object) -> object:
        self.texts.append(len(texts))
        return self.tokenizer(texts, **options)


def test_first_rows_end_with_the_data(root: Path) -> None:
    task, tokenizer = corpus_task(root), sentinel_tokenizer()
    text = sum(len(t.split()) + 1 for t in documents(root, "validation*"))
    counting = Counting(tokenizer)
    rows = task.first_rows("validation", counting, 10_000)
    assert counting.texts == [7, 7, 7, 7, 2, 7], "one pass, and the block that shows its end"
    assert text / task.lengths.row - 5 < len(rows) <= text / task.lengths.row  # at most one row lost a block


def test_the_stream_can_be_entered_at_any_position(root: Path) -> None:
    task, tokenizer = corpus_task(root), sentinel_tokenizer()
    whole = list(islice(task.rows("train", tokenizer), 200))
    assert whole[-1][1].epoch >= 2
    for cut in (0, 1, 17, 60, 61, 130):
        rest = task.rows("train", tokenizer, whole[cut][1])
        for (row, after), (again, after_again) in zip(whole[cut + 1 :], rest, strict=False):
            assert after == after_again
            assert (row.hidden == again.hidden).all()
            assert (row.tokens == again.tokens).all()


def test_a_pass_holds_almost_every_token_once_and_no_two_passes_are_alike(root: Path) -> None:
    task, tokenizer = corpus_task(root), sentinel_tokenizer()
    passes: dict[int, list[np.ndarray]] = collections.defaultdict(list)
    for row, after in islice(task.rows("train", tokenizer), 200):
        passes[after.epoch].append(row.tokens)
    there = collections.Counter(i for t in documents(root, "train*") for i in (*tokenizer(t)["input_ids"], 1))
    seen = collections.Counter(np.concatenate(passes[0]).tolist())
    assert seen <= there
    assert seen.total() > there.total() - 10 * task.lengths.row
    assert not np.array_equal(passes[0][:20], passes[1][:20])


def test_the_seed_decides_the_order(root: Path) -> None:
    tokenizer = sentinel_tokenizer()
    one, other = (
        [row for row, _ in islice(corpus_task(root, f"seed={seed}").rows("train", tokenizer), 20)] for seed in (0, 1)
    )
    assert not np.array_equal([r.tokens for r in one], [r.tokens for r in other])
    validation = [corpus_task(root, f"seed={seed}").first_rows("validation", tokenizer, 3) for seed in (0, 1)]
    assert all((a.hidden == b.hidden).all() for a, b in zip(*validation, strict=True))


def test_only_the_asked_for_blocks_are_tokenized(root: Path) -> None:
    counting = Counting(sentinel_tokenizer())
    next(corpus_task(root).rows("train", counting, Position(0, 3, 0)))
    assert counting.texts == [7]


def test_bad_input_is_refused(root: Path, tmp_path: Path) -> None:
    tokenizer = sentinel_tokenizer()
    corpus_task(root).check(tokenizer, ("train", "validation"))
    with pytest.raises(UsageError, match="no <extra_id_1>, but 2 sentinels"):
        corpus_task(root).check(sentinel_tokenizer(1), ())
    with pytest.raises(UsageError, match=r"targets of 5 tokens: set task.max_target_tokens=5"):
        corpus_task(root, "task.max_target_tokens=4")
    with pytest.raises(UsageError, match="too little text for one row of 399"):
        corpus_task(root, "task.max_source_tokens=400", "task.max_target_tokens=400").check(
            sentinel_tokenizer(100), ("validation",)
        )
    with pytest.raises(UsageError, match=r"finds no test.parquet"):
        corpus_task(root).check(tokenizer, ("test",))
    with pytest.raises(UsageError, match="no column 'body'"):
        corpus_task(root, "task.columns.text=body").check(tokenizer, ("train",))
    with pytest.raises(UsageError, match="holds no directory 'corpus'"):
        corpus_task(root / "corpus")
    with pytest.raises(UsageError, match="has no source of data"):
        corpus_task(root, "data.root=null", "task.hub=null")
    with pytest.raises(UsageError, match="is no metric of a denoising task"):
        corpus_task(root, "task.primary_metric=f1")


def test_it_has_no_predictions_to_score(root: Path) -> None:
    run = compose_run([f"data.root={root}", *SETTINGS])
    assert isinstance(build_training_task(run), span_corruption.SpanCorruption)
    with pytest.raises(UsageError, match="has no predictions to score"):
        build_task(run)
