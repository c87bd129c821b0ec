"""Prompts: which fields of a record one shows, and the fields of a text that it has made.

Knows format strings; knows nothing about records, tokens or tasks.
"""

from __future__ import annotations

import re
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


def prompt_values(prompt: str, text: str) -> dict[str, str]:
    """The fields of a `text` that `prompt` has formatted; where that is ambiguous, the earlier fields are the shorter.

    Raises `ValueError` for a text of another prompt.
    """
    pattern, seen = "", set()
    for literal, field, _, _ in string.Formatter().parse(prompt):
        pattern += re.escape(literal)
        if field is not None:
            pattern += f"(?P={field})" if field in seen else f"(?P<{field}>.*?)"
            seen.add(field)
    found = re.fullmatch(pattern, text, re.DOTALL)
    if found is None:
        raise ValueError(f"{text[:80]!r} was not made with the prompt {prompt!r}.")
    return found.groupdict()
