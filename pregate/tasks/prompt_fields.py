"""Prompts: which fields of a record one shows.

Knows format strings; knows nothing about records, tokens or tasks.
"""

from __future__ import annotations

import string

from pregate.config import UsageError


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
