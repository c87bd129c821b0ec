"""The small files beside the weights of a model that a conversion and a training take along unchanged."""

from __future__ import annotations

from pathlib import Path

from pregate.models.checkpoint import GENERATION, local_directory

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
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
