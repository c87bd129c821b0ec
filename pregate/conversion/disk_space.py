"""Whether a conversion may write where it was asked to: nothing else is there, and the disk has room."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pregate.config import UsageError
from pregate.engine.storage.pack import refuse_output
from pregate.system.byte_sizes import human_bytes
from pregate.system.directory_lock import refuse_unwritable
from pregate.system.durable import free_bytes
from pregate.system.unfinished import reclaimable_bytes


def refuse_occupied(output: Path) -> None:
    """Raises `UsageError` for an output in use, and one that cannot be written."""
    refuse_output("output", output)
    empty = output.is_dir() and not any(output.iterdir())
    if not empty and (output.exists() or output.is_symlink()):
        raise UsageError(f"{output} exists already: name a new output directory, or remove it first.")
    refuse_unwritable(output, "output")


def refuse_full_disk(output: Path, shard_bytes: Iterable[int]) -> None:
    """Raises `UsageError` for a disk without room for shards of so many bytes."""
    free, needed = free_bytes(output.parent) + reclaimable_bytes(output), sum(shard_bytes)
    if needed > free:
        raise UsageError(
            f"The checkpoint needs {human_bytes(needed)} and the disk of {output} has {human_bytes(free)} free: "
            "make room, or choose another disk."
        )
