"""Fills Jinja templates, which hold the words and the layout of what people read.

Knows nothing about what the values are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape


def fill(template: Path, **values: Any) -> str:
    """The text of `template`, with everything escaped that a page `*.html.j2` is given.

    Raises jinja2's `UndefinedError` for a name that the template uses and `values` lacks.
    """
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=select_autoescape(["html.j2"], default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template.name).render(values)
