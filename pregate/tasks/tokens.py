"""Which tokenizer a run has, and how examples become batches of token ids.

Knows texts and token ids; knows nothing about where examples come from or what a model does with them.
B batch, S source length, T target length.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from pregate.config import Learn, Run, TaskConfig, TaskKind, UsageError
from pregate.config.task import OWN_TEMPLATE
from pregate.models.objectives import Objective
from pregate.models.packing_and_padding import Row
from pregate.system.console import say
from pregate.tasks.base import Example
from pregate.tasks.conversation_tokens import ChatTemplate, Written, read_template
from pregate.tasks.generated import generated_tokenizer

KEPT_TOKENS = 1 << 25
"""Token ids that one `Collator` keeps: 128 MiB of them."""


def load_tokenizer(run: Run) -> Any:
    """The tokenizer of `run`: the one saved in `checkpoint`, else `model.tokenizer`, else the generated set's own, else
    the one of `checkpoint` or `model.source` on the hub. It takes the chat template of `task.chat_template`, if that is
    a file, and so every checkpoint that it is saved with has it.

    Raises `UsageError` where there is no tokenizer, its directory is missing, it has no end-of-sequence token, or there
    is no such template.
    """
    tokenizer, template = _tokenizer_of(run), run.task.chat_template
    if template not in (None, OWN_TEMPLATE):
        tokenizer.chat_template = read_template(template)
    return tokenizer


def _tokenizer_of(run: Run) -> Any:
    if run.checkpoint is not None and (Path(run.checkpoint).expanduser() / "tokenizer_config.json").is_file():
        return pretrained_tokenizer("checkpoint", run.checkpoint, None)
    if run.model.tokenizer is None and run.task.generated is not None:
        return generated_tokenizer(run.task.generated)
    if run.model.tokenizer is not None:
        key, where, revision = "model.tokenizer", run.model.tokenizer, None
    elif run.checkpoint is not None:
        key, where, revision = "checkpoint", run.checkpoint, None
    else:
        key, where, revision = "model.source", run.model.source, run.model.revision
    if where is None:
        raise UsageError("There is no tokenizer: set model.tokenizer=DIR_OR_ID, or model.source=DIR_OR_ID.")
    return pretrained_tokenizer(key, where, revision)


def check_vocabulary(tokenizer: Any, model: str, config: dict[str, Any], setting: str = "model.tokenizer") -> None:
    """Refuse a tokenizer with more ids than the model has embeddings. Raises `UsageError`."""
    rows = config.get("vocab_size")
    if rows is not None and len(tokenizer) > rows:
        raise UsageError(
            f"The tokenizer has {len(tokenizer)} ids but {model} has {rows} embeddings: set {setting} to the one that "
            "the model was trained with."
        )


def pretrained_tokenizer(
    key: str, where: str, revision: str | None, setting: str = "model.tokenizer", **options: Any
) -> Any:
    """The tokenizer of a directory or hub id. `key`: what has named it. `setting`: what can name another. `options` go
    to `from_pretrained`. Raises `UsageError` for one that does not exist or has no vocabulary or end of sequence."""
    path = Path(where).expanduser()
    if where.startswith("None/"):
        raise UsageError(f"{key}={where} is built from data.root, which is not set: set data.root=DIR or PREGATE_DATA.")
    # A hub id is "name" or "owner/name"; anything else can only be meant as a directory.
    if not path.is_dir() and (path.is_absolute() or where.startswith((".", "~")) or where.count("/") > 1):
        raise UsageError(f"{key}={where} is not a directory: name a directory with a tokenizer, or a hub id.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path) if path.is_dir() else where, revision=revision, **options)
    except Exception as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise UsageError(
            f"{key}={where} gives no tokenizer ({reason}): set {setting} to a directory or hub id that holds one."
        ) from error
    # of a directory without a tokenizer some classes are made all the same, with special tokens and perhaps a space
    special = set(tokenizer.all_special_ids)
    if not any(c.isalnum() for token, i in tokenizer.get_vocab().items() if i not in special for c in token):
        raise UsageError(
            f"{key}={where} gives no tokenizer, because it holds no vocabulary: set {setting} to a directory "
            "or hub id that holds one."
        )
    if tokenizer.eos_token_id is None:
        raise UsageError(
            f"The tokenizer of {key}={where} lacks an end-of-sequence token: set {setting} to one that has it."
        )
    return tokenizer


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, without what the tokenizer puts around it."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def opening_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text: its beginning-of-sequence token, or nothing."""
    plain, whole = plain_ids(tokenizer, "a"), list(tokenizer("a")["input_ids"])
    starts = (start for start in range(len(whole)) if whole[start : start + len(plain)] == plain)
    return whole[: next(starts, 0)]


def _lead(tokenizer: Any) -> str:
    """What stands before a word that goes on from another text: a space, unless the tokenizer adds it by itself."""
    return "" if plain_ids(tokenizer, "a a") == 2 * plain_ids(tokenizer, "a") else " "


@dataclass(frozen=True)
class _Side:
    """How the texts of one side of an example become tokens: what stands before and behind them, and how many tokens
    there are at most in all. A row without a token becomes `nothing`."""

    name: str
    max_tokens: int
    lead: str = ""
    before: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()
    nothing: tuple[int, ...] = ()

    @property
    def room(self) -> int:
        """For the tokens of the text."""
        return self.max_tokens - len(self.before) - len(self.behind)


class Collator:
    """Turns examples into the tensors of one batch, as the objective lays them out.

    Texts are cut to `max_source_tokens` and `max_target_tokens`, both counted with the end-of-sequence token that
    closes a row, so that a cut text still ends in one; the first target that is cut is told of. The objective says
    whether it closes sources. Where the target goes on from the source, the source begins as the tokenizer begins a
    text and ends in `separator`, or `chat` writes both as a conversation; `learn` says what of it is learnt. Token ids
    are kept, up to `KEPT_TOKENS` of them, so that a text seen again (the next epoch, the next validation, a label) is
    not tokenized again. Where the target goes on from the source, a tokenizer without a padding token pads with its
    end-of-sequence token: masks say what is padding. Raises `UsageError` where nothing of a source has room, or a
    padding token is missing.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_source_tokens: int,
        max_target_tokens: int,
        objective: Objective,
        *,
        separator: str = "",
        learn: Learn = Learn.answers,
        chat: ChatTemplate | None = None,
        multiple: int = 1,
    ) -> None:
        self.multiple = multiple
        self.tokenizer, self.objective, self.learn, self.chat = tokenizer, objective, learn, chat
        self.max_source_tokens, self.max_target_tokens = max_source_tokens, max_target_tokens
        end = (tokenizer.eos_token_id,)
        if objective.closes_sources and tokenizer.pad_token_id is None:
            raise UsageError("The tokenizer lacks a padding token: set model.tokenizer to one that has it.")
        self.padding: int = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        if objective.closes_sources:
            self._source = _Side("source", max_source_tokens, behind=end)
            self._target = _Side("target", max_target_tokens, behind=end)
        else:
            lead, before = _lead(tokenizer), tuple(opening_tokens(tokenizer))
            behind = tuple(plain_ids(tokenizer, lead + separator)) if separator else ()
            # a row without a token has nothing to predict the first token of the target from
            self._source = _Side("source", max_source_tokens, before=before, behind=behind, nothing=end)
            self._target = _Side("target", max_target_tokens, lead, behind=end)
        if self._source.room < 1 and chat is None:
            raise UsageError(
                f"task.max_source_tokens={max_source_tokens} leaves no room for a prompt: set it to more than "
                f"{max_source_tokens - self._source.room}, which task.separator={separator!r} takes."
            )
        self._kept: dict[Any, Any] = {}
        self._kept_tokens = 0
        self._told = False

    @classmethod
    def for_task(cls, task: TaskConfig, tokenizer: Any, objective: Objective, multiple: int = 1) -> Collator:
        """As `task` says; the lengths of a batch are multiples of `multiple`. Raises `UsageError` for a chat template
        that is missing or cannot be used."""
        sizes = task.max_source_tokens, task.max_target_tokens
        chat = None
        if not objective.closes_sources and task.chat_template is not None and tokenizer.chat_template:
            chat = ChatTemplate(tokenizer, *sizes)
        if task.kind is TaskKind.chat and chat is None:
            raise UsageError(
                f"Task {task.name!r} needs a chat template and the tokenizer has none: set task.chat_template=FILE."
            )
        return cls(
            tokenizer, *sizes, objective, separator=task.separator, learn=task.learn, chat=chat, multiple=multiple
        )

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `labels` padded with -100, all int64, see `Objective.batch`."""
        return self.of_rows(self.rows(examples))

    def prompts(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask` (B, S) of the sources alone, int64, for `generate`."""
        return self.objective.prompts(self._prompts(examples), self.padding)

    def rendering(self, example: Example) -> list[Any]:
        """How `example` is written, on whatever day: plain numbers. Nothing is told or kept. Raises as `rows`."""
        quiet = copy(self)
        quiet._kept, quiet._told, quiet.chat = {}, True, self.chat and self.chat.undated()
        (row,) = quiet.rows([example])
        learnt = [[part.start, part.stop] for part in row.learnt]
        return [quiet.source_lengths([example]), row.source.tolist(), row.target.tolist(), learnt]

    def stopping(self, model: Any) -> dict[str, Any]:
        """Options by which `generate` of `model` stops where the chat template ends an answer; none if it does so."""
        own = model.generation_config.eos_token_id
        ends = [] if own is None else [own] if isinstance(own, int) else [*own]
        end = self.chat and self.chat.end
        return {} if end is None or end in ends else {"eos_token_id": [*ends, end]}

    def of_rows(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """A batch of examples that are in tokens already."""
        return self.objective.batch(rows, self.padding, self.multiple)

    def packed_rows(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """The same with several examples in a row, see `Objective.packed`."""
        most = self.max_source_tokens + self.max_target_tokens
        return self.objective.packed(rows, self.padding, most)

    def forget(self) -> None:
        """Let the tokens that are kept go."""
        self._kept.clear()
        self._kept_tokens = 0

    def source_lengths(self, examples: Sequence[Example]) -> list[int]:
        """How many source tokens each example has, cut and closed as in a batch."""
        return [len(row) for row in self._prompts(examples)]

    def rows(self, examples: Sequence[Example]) -> list[Row]:
        """Each example in tokens, with what of its source is learnt."""
        if self.chat:
            rows = [written.row for written in self._conversations(examples)]
        else:
            targets = self._token_ids([example.target for example in examples], self._target)
            rows = [*map(Row, self._prompts(examples), targets)]
        if self.learn is Learn.everything:
            return [row._replace(learnt=(range(len(row.source)),)) for row in rows]
        return rows if self.learn is Learn.answers else [row._replace(learnt=()) for row in rows]

    def _prompts(self, examples: Sequence[Example]) -> list[array[int]]:
        if self.chat:
            return [written.prompt for written in self._conversations(examples)]
        return self._token_ids([example.source for example in examples], self._source)

    def _conversations(self, examples: Sequence[Example]) -> list[Written]:
        assert self.chat is not None
        found = []
        for example in examples:
            key = example.conversation
            written = self._kept.get(key) or self.chat.write(example, earlier_answers=self.learn is Learn.answers)
            self._keep(key, written, len(written.prompt) + len(written.row.source) + len(written.row.target))
            self._tell_of_cut(written.cuts_target, example.target)
            found.append(written)
        return found

    def _token_ids(self, texts: list[str], side: _Side) -> list[array[int]]:
        rows = {text: self._kept.get((side.name, text)) for text in texts}
        new = [text for text, row in rows.items() if row is None]
        for text, row in zip(new, self._tokenize(new, side), strict=True):
            rows[text] = row
            self._keep((side.name, text), row, len(row))
        return [rows[text] for text in texts]  # type: ignore[misc]

    def _keep(self, key: Any, tokens: Any, count: int) -> None:
        if key not in self._kept and self._kept_tokens < KEPT_TOKENS:
            self._kept[key] = tokens
            self._kept_tokens += count

    def _tokenize(self, texts: list[str], side: _Side) -> list[array[int]]:
        if not texts:
            return []
        led = [side.lead + text for text in texts]
        found = self.tokenizer(led, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        rows = []
        for text, ids in zip(texts, found, strict=True):
            if len(ids) > side.room:
                self._tell_of_cut(side is self._target, text)
                left = getattr(self.tokenizer, "truncation_side", "right") == "left"
                ids = ids[-side.room :] if left else ids[: side.room]
            rows.append(array("i", [*side.before, *ids, *side.behind] or side.nothing))
        return rows

    def _tell_of_cut(self, cut: bool, target: str) -> None:
        if cut and not self._told:
            self._told = True
            say(
                f"targets of more than task.max_target_tokens={self.max_target_tokens} tokens are cut, the first is "
                f"{' '.join(target.split())[:40]!r}."
            )
