"""Conversations in tokens, exactly as a tokenizer's chat template writes them.

The tokens of a conversation are those of `apply_chat_template`. An answer of the assistant begins where the template,
asked for a generation prompt, stops; if it then writes more than white space ahead of the answer's text, behind that.
Knows messages and token ids; knows nothing about batches or models.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pregate.config import UsageError
from pregate.models.packing_and_padding import Row
from pregate.system.console import reason_of
from pregate.tasks.base import ASSISTANT, SYSTEM, USER, Example, Message

QUESTION, ANSWERS = Message(USER, "a"), (Message(ASSISTANT, "b"), Message(ASSISTANT, "0"))
"""A probe: what the template writes alike for both answers stands around an answer."""
UNDATED = "{% macro strftime_now(form) %}{{ form }}{% endmacro %}"
"""Ahead of a template: what it asks the date with gives the form of the date."""
OTHER = "set task.chat_template=FILE to one that can, or task.chat_template=null for plain prompts"


def read_template(file: str) -> str:
    """Raises `UsageError` for a file that cannot be read."""
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"task.chat_template={file} cannot be read ({reason_of(error)}): give the path of a Jinja template, own "
            "for that of the tokenizer, or null for none."
        ) from error


@dataclass(frozen=True)
class Written:
    """A conversation in tokens. prompt: what `generate` is given. row: the whole of it, cut where the last answer
    begins. cuts_target: whether that answer was too long."""

    prompt: array[int]
    row: Row
    cuts_target: bool


class ChatTemplate:
    """The chat template of a tokenizer. `end`: the special token that ends an answer, if there is one. Raises
    `UsageError` for a template that cannot be cut where an answer begins."""

    def __init__(self, tokenizer: Any, max_source_tokens: int, max_target_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.max_source_tokens, self.max_target_tokens = max_source_tokens, max_target_tokens
        # a template that knows no thinking takes no notice of it
        self._options: dict[str, Any] = {"enable_thinking": False}
        try:
            prompt = self._text((QUESTION,), answering=True)
            whole, other = (self._text((QUESTION, answer)) for answer in ANSWERS)
        except Exception as error:  # a template raises what it likes
            raise UsageError(
                f"The chat template cannot write a user's turn and an answer ({reason_of(error)}): {OTHER}."
            ) from error
        ids = self._ids(prompt)
        if not whole.startswith(prompt) or self._ids(whole)[: len(ids)] != ids:
            raise UsageError(
                "The chat template cannot be cut where the assistant's turn begins, because its generation prompt is "
                f"not the beginning of that turn: {OTHER}."
            )
        lead = whole[len(prompt) : _in_common(whole, other)]
        ending = whole[len(whole) - _in_common(whole[::-1], other[::-1]) :]
        # as the channel of gpt-oss; white space is the answer's, as a token may join it with the text
        self._lead = lead.rstrip()
        added = tokenizer.added_tokens_decoder
        self.end = next((token for token in self._ids(ending) if token in added and added[token].special), None)

    def undated(self) -> ChatTemplate:
        """The same where a template that writes today's date does not."""
        other = copy(self)
        other._options = {**self._options, "chat_template": UNDATED + self.tokenizer.get_chat_template()}
        return other

    def write(self, example: Example, earlier_answers: bool) -> Written:
        """`example` in tokens. Turns ahead of the last answer are left out, the earliest first, until
        `max_source_tokens` hold the rest, and if need be the last of them is cut; the answer is cut to
        `max_target_tokens`. `earlier_answers`: those that are left are learnt too.

        Raises `UsageError`, naming the example, for a conversation that the template does not write, or writes in
        another way when more follows, and for limits that leave no room.
        """
        try:
            asked = self._fitting(example.conversation[:-1])
            answer, cut = self._cut_answer(asked, example.conversation[-1])
            text, prompt = self._text((*asked, answer)), self._prompt(asked)
            whole, prompt_ids = self._ids(text), self._ids(prompt)
            learnt = self._answers(asked, text, whole) if earlier_answers else ()
        except UsageError as error:
            raise UsageError(f"Example {example.id!r}: {error}") from error
        except Exception as error:
            raise UsageError(f"The chat template refuses example {example.id!r}: {reason_of(error)}.") from error
        start = self._start(asked, text)
        if not text.startswith(start):
            raise UsageError(f"The chat template cannot be cut at the last answer of example {example.id!r}: {OTHER}.")
        # a token that joins the end of the prompt and the beginning of the answer counts as the answer's
        begin = _in_common(self._ids(start), whole)
        row = Row(array("i", whole[:begin]), array("i", whole[begin:]), learnt)
        return Written(array("i", prompt_ids), row, cut)

    def _answers(self, asked: Sequence[Message], text: str, whole: list[int]) -> tuple[range, ...]:
        """The places of the answers in `asked`, which `text`, in tokens `whole`, begins with."""
        found = []
        for turn, message in enumerate(asked):
            if message.role == ASSISTANT:
                before, behind = self._start(asked[:turn], text), self._text(asked[: turn + 1])
                if not (text.startswith(before) and text.startswith(behind)):
                    raise UsageError(
                        "the chat template writes an earlier answer in another way than the last one: set "
                        "task.learn=last_answer."
                    )
                found.append(range(*(_in_common(self._ids(part), whole) for part in (before, behind))))
        return tuple(found)

    def _fitting(self, asked: Sequence[Message]) -> list[Message]:
        """What is left of the turns ahead of the last answer."""
        asked = list(asked)
        while excess := self._excess(asked):
            first = int(asked[0].role == SYSTEM)
            later = [turn for turn in range(first + 1, len(asked)) if asked[turn].role == USER]
            if later:
                del asked[first : later[0]]
            else:
                asked[-1] = self._shortened(asked[-1], excess, "task.max_source_tokens")
        return asked

    def _excess(self, asked: Sequence[Message]) -> int:
        return max(0, len(self._ids(self._prompt(asked))) - self.max_source_tokens)

    def _cut_answer(self, asked: Sequence[Message], answer: Message) -> tuple[Message, bool]:
        cut, prompt = False, len(self._ids(self._prompt(asked)))
        while (excess := len(self._ids(self._text((*asked, answer)))) - prompt - self.max_target_tokens) > 0:
            answer, cut = self._shortened(answer, excess, "task.max_target_tokens"), True
        return answer, cut

    def _shortened(self, message: Message, excess: int, limit: str) -> Message:
        """Without the last `excess` tokens of its text. Raises `UsageError` where there is none."""
        found = self.tokenizer(message.content, add_special_tokens=False, return_offsets_mapping=True)
        places = found["offset_mapping"]
        if not message.content:
            raise UsageError(f"{limit} leaves no room beside what the chat template writes: raise it.")
        # a cut text may have other tokens, but it always has fewer characters
        end = places[-excess][0] if excess < len(places) else 0
        return message._replace(content=message.content[: min(end, len(message.content) - 1)])

    def _prompt(self, asked: Sequence[Message]) -> str:
        """Everything ahead of the text of the answer to `asked`, but white space."""
        return self._text(asked, answering=True) + self._lead

    def _start(self, asked: Sequence[Message], text: str) -> str:
        """The same in `text`, which may write some answers, such as those with a thought, without the lead."""
        prompt = self._prompt(asked)
        return prompt if text.startswith(prompt) else self._text(asked, answering=True)

    def _text(self, messages: Sequence[Message], answering: bool = False) -> str:
        turns = [message._asdict() for message in messages]
        return self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=answering, **self._options
        )

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _in_common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """With how many tokens, or characters, both begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
