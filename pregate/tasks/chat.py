"""Conversations: the model writes the last answer, from all turns before it.

Knows what a conversation is; knows nothing about how a chat template writes one.
"""

from __future__ import annotations

from typing import Any

from pregate.tasks.base import ASSISTANT, SYSTEM, USER, Example, Message, Task
from pregate.tasks.cell_values import CellError, of_type, whole_text
from pregate.tasks.metrics import Overlap
from pregate.tasks.records import Chunk

ROLES = (SYSTEM, USER, ASSISTANT)
NEEDS = "a conversation is a list of messages {role, content}, in which the assistant answers the user last"


class Chat(Task):
    """`messages` is a list of structs {role, content}; training teaches the answers in it, and the last is scored."""

    metric = Overlap
    target_field = "messages"
    no_reference = "have an empty last answer"

    def example(self, chunk: Chunk, row: int, split: str) -> Example:
        messages = chunk.read(row, self.target_field, conversation)
        before, answer = messages[:-1], messages[-1].content
        source = "\n".join(f"{role}: {content}" for role, content in before)
        return Example("", source, answer, (answer,) if answer.strip() else (), messages)


def conversation(cell: Any) -> tuple[Message, ...]:
    """The messages of a cell. Raises `CellError` for anything but a conversation that ends in an answer."""
    if not isinstance(cell, list):
        raise CellError("nothing" if cell is None else of_type(cell), NEEDS)
    messages = tuple(_message(item) for item in cell)
    roles = [message.role for message in messages]
    if roles[-2:] != [USER, ASSISTANT]:
        raise CellError(f"messages of {', '.join(roles) or 'nobody'}", NEEDS)
    return messages


def _message(item: Any) -> Message:
    if not isinstance(item, dict) or not {"role", "content"} <= item.keys():
        raise CellError(f"{of_type(item)} inside a list", NEEDS)
    role, content = (whole_text(item[name], NEEDS) for name in Message._fields)
    if role not in ROLES:
        raise CellError(f"a message of {role!r}", f"the roles are {', '.join(ROLES)}")
    return Message(role, content)
