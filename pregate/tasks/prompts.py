"""Prompts: which fields of a record one shows, and the text that it becomes with them.

Knows format strings and rows; knows nothing about tokens or kinds of tasks.
"""

from __future__ import annotations

import string
from collections.abc import Sequence

from pregate.config import TaskConfig, UsageError
from pregate.tasks.cell_values import prompt_text
from pregate.tasks.records import Chunk
from pregate.tasks.sources import key_of


def prompt_fields(prompt: str) -> tuple[str, ...]:
    """The record fields that a prompt such as "question: {question}" shows, each once.

    Raises `UsageError` for unbalanced braces, a brace with anything but a plain name, and a prompt that shows no field.
    """
    try:
        parts = [part[1:] for part in string.Formatter().parse(prompt) if part[1] is not None]
    except ValueError as error:
        raise UsageError(
            f"task.prompt={prompt!r} cannot be read ({error}): write each field as {{name}}, a literal brace as {{{{."
        ) from error
    named = [str(field) for field, _, _ in parts]
    wrong = [
        f"{field}{f'!{conversion}' if conversion else ''}{f':{spec}' if spec else ''}"
        for field, spec, conversion in parts
        if spec or conversion or not str(field).isidentifier()
    ]
    if wrong or not named:
        what = f"holds {{{wrong[0]}}}" if wrong else "shows no field"
        raise UsageError(f"task.prompt={prompt!r} {what}: write fields as plain names, such as {{question}}.")
    return tuple(dict.fromkeys(named))


def prompt_of(task: TaskConfig, fields: Sequence[str], chunk: Chunk, row: int, split: str) -> str:
    """The prompt of one row. Raises `UsageError` where a field that it shows is empty or no text."""
    shown = {}
    for field in fields:
        shown[field] = chunk.read(row, field, prompt_text)
        if shown[field] is None:
            raise UsageError(
                f"Split {split!r} of task {task.name!r} has rows without {field!r}, which task.prompt shows "
                f"(the first is {chunk.place(row)}): fill or remove them, or name another column with "
                f"{key_of(task, 'columns', field)}=COLUMN."
            )
    return task.prompt.format(**shown)
