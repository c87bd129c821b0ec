"""The small files beside the weights of a model that a conversion and a training take along unchanged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pregate.models.checkpoint import GENERATION, local_directory

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
TOKENIZER_FILES = (
    TOKENIZER,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
SIDE_FILES = (GENERATION, *TOKENIZER_FILES)


def side_files(source: str, revision: str | None = None, names: tuple[str, ...] = SIDE_FILES) -> list[Path]:
    """The small files beside the weights (tokenizer, generation config) that `source` has. Raises `UsageError`."""
    directory = local_directory(source, revision, list(names))
    return [directory / name for name in names if (directory / name).is_file()]


def tokenizer_is_code(files: Sequence[Path]) -> bool:
    """Whether the tokenizer among `files` cannot be opened without code that its checkpoint brings: `auto_map` names a
    class, and there is no `tokenizer.json`."""
    found = {file.name: file for file in files}
    if TOKENIZER in found or TOKENIZER_CONFIG not in found:
        return False
    try:
        described = json.loads(found[TOKENIZER_CONFIG].read_text(encoding="utf-8"))
    except ValueError:
        return False  # said by whoever opens it
    classes = described.get("auto_map") or {}
    return isinstance(classes, list) or "AutoTokenizer" in classes
