"""Whether the source of a resumed run has the weights that it had when the run began.

The file system says so if nothing was written or moved in between; else content decides. Knows weight files; knows
nothing about what a run makes of them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from pregate.config import Run
from pregate.conversion.manifest import MANIFEST
from pregate.models.checkpoint import SourceCheckpoint
from pregate.models.loading import open_model
from pregate.system.byte_sizes import human_bytes
from pregate.system.console import say
from pregate.system.durable import digest_file, make_directory, read_object, write_json
from pregate.training.resume_changes import CONTENT, permit

SEEN = "source.json"
"""In a run whose state lacks the experts of its source: by which signs the source is known again."""
LONG_CHECK = 10**9
"""Comparing more bytes than these takes so long that a line is printed."""
BACK = "put its weights back"


def check_converted(run: Run, source: str, converted: Path) -> None:
    """Compare `source` with what `converted` was made from. One of an earlier version does not know that.

    Raises `UsageError` if the weights differ and `run.allow_changes` does not name the source.
    """
    manifest = read_object(converted / MANIFEST) or {}
    opened = open_model(source, run.model.revision)
    identity, settled = opened.identity(), opened.settled()
    if "source_identity" not in manifest or manifest["source_identity"] == identity:
        return
    size = sum(file.stat().st_size for file in opened.files)
    if size > LONG_CHECK:
        say(f"{source} was written or moved since {converted} was made: comparing {human_bytes(size)}, once.")
    if {file.name: _sha256(file) for file in opened.files} != manifest["source_sha256"]:
        permit(run, CONTENT, f"{converted} was made from other weights than {source} has now", BACK)
    elif settled:
        write_json(converted / MANIFEST, manifest | {"source_identity": identity})


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    digest_file(digest, file)
    return digest.hexdigest()


def check_experts(run: Run, run_dir: Path, source: SourceCheckpoint, begun: bool) -> None:
    """Compare `source`, whose experts a state in `run_dir` lacks, with that which the run has `begun` with.

    By sizes and by bytes spread over the files, as a copy has them too. Raises as `check_converted`.
    """
    identity = source.identity()
    # without times and numbers of files, which a copy has of its own
    signs: dict[str, Any] = identity | {"files": {name: [s[0], s[-1]] for name, s in identity["files"].items()}}
    seen = read_object(run_dir / SEEN)
    if begun and seen not in (None, signs):
        told = f"the state in {run_dir} was trained on the experts of other weights than {source.directory} has now"
        permit(run, CONTENT, told, BACK)
    if seen != signs and (seen or not begun):
        make_directory(run_dir)
        write_json(run_dir / SEEN, signs)
