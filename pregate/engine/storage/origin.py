"""What a pack was made from: the content of every expert, and by which signs it is known without reading all of it.

Sizes and times can be what they were though every weight is another: copies keep them. So content decides, unless the
file system says that nothing was written since content was last compared. Knows checkpoints and digests; knows nothing
about slabs.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import xxhash
from torch import Tensor

from pregate.config import UsageError
from pregate.models.checkpoint import SourceCheckpoint
from pregate.models.experts import ExpertKey, ExpertSpec, TensorSlice
from pregate.system.byte_sizes import human_bytes
from pregate.system.console import say
from pregate.system.durable import write_json

SEEN = "source.json"
"""In a pack: what the file system said of the checkpoint when its content was last found to be what was packed."""
MAPPED_BYTES = 64 << 20
"""Experts are read from the checkpoint in runs of about this size: mapped pages are resident memory until dropped."""
LONG_CHECK = 10**9
"""Comparing more bytes than these takes so long that a line is printed."""

_known: dict[tuple[Path, str], dict[str, Any]] = {}
"""As `SEEN`, by pack and index, for packs that cannot be written to."""


def read_experts(
    checkpoint: SourceCheckpoint, family: ExpertSpec, first: int = 0
) -> Iterator[tuple[ExpertKey, list[Tensor]]]:
    """The matrices of every expert from number `first` on, as they are stored, in the order of execution."""
    keys = family.keys()
    itemsize = checkpoint.dtype(family.tensor_names(keys[0])[0]).itemsize if keys else 0
    num_bytes = itemsize * sum(torch.Size(shape).numel() for shape in family.matrices.values())
    at_once = max(1, MAPPED_BYTES // max(1, num_bytes))
    E = max(1, family.num_experts)
    blocks = [keys[max(begin, first) : begin + E] for begin in range(0, len(keys), E)]
    runs = [block[begin : begin + at_once] for block in blocks for begin in range(0, len(block), at_once)]
    names_of = [dict.fromkeys(name for key in run for name in family.tensor_names(key)) for run in runs]
    tensors: dict[str, Tensor] = {}
    for run, names, soon in zip(runs, names_of, [*names_of[1:], {}], strict=True):
        checkpoint.will_read([name for name in soon if name not in names])
        # a mapped tensor is dropped with its pages; a decoded one is kept while more of its experts are wanted
        tensors = {name: tensors[name] for name in names if name in tensors and checkpoint.tensors[name].encoding}
        tensors |= checkpoint.read([name for name in names if name not in tensors])
        for key in run:
            yield key, [_part(checkpoint, part, tensors[part.tensor]) for part in family.slices(key)]


def _part(checkpoint: SourceCheckpoint, part: TensorSlice, tensor: Tensor) -> Tensor:
    """A view of a mapped tensor; of a decoded one a copy, since a view would keep the whole of it in memory."""
    found = part.of(tensor)
    return found.clone() if part.index and checkpoint.tensors[part.tensor].encoding else found


def content(matrices: Sequence[Tensor]) -> int:
    """XXH3-64 of an expert as it is stored: of the bytes and the dtype of each matrix."""
    digest = xxhash.xxh3_64()
    for matrix in matrices:
        digest.update(f"{matrix.dtype}{tuple(matrix.shape)}".encode())
        digest.update(cast(Any, matrix.contiguous().view(-1).view(torch.uint8).numpy()))
    return digest.intdigest()


class Unchanged:
    """`with Unchanged(checkpoint) as signs: …`: raises `UsageError` at the end if the weights changed meanwhile."""

    def __init__(self, checkpoint: SourceCheckpoint) -> None:
        self._checkpoint = checkpoint

    def __enter__(self) -> Unchanged:
        self.identity, self.settled = self._checkpoint.identity(), self._checkpoint.settled()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._checkpoint.identity() != self.identity:
            raise UsageError(
                f"{self._checkpoint.directory} was written to while it was read: run the command again when its "
                "weights are complete."
            )


def is_origin(
    pack_dir: Path, index: str, contents: Mapping[ExpertKey, int], checkpoint: SourceCheckpoint, family: ExpertSpec
) -> bool:
    """Whether the experts of `checkpoint` are those that a pack was made from: `index` is the digest of its index,
    `contents` what that says of each expert. By the signs of an earlier look if they are the same; else all experts are
    read, until one differs.
    """
    with Unchanged(checkpoint) as signs:
        if _signs(index, signs.identity, family) in (_seen(pack_dir), _known.get((pack_dir.absolute(), index))):
            return True
        names = {name for key in family.keys() for name in family.tensor_names(key)}  # noqa: SIM118
        size = sum(checkpoint.num_bytes(name) for name in names)
        if size > LONG_CHECK:
            say(
                f"the weights in {checkpoint.directory} were written or moved since {pack_dir} was packed: comparing "
                f"{human_bytes(size)} of experts, once."
            )
        if any(content(matrices) != contents[key] for key, matrices in read_experts(checkpoint, family)):
            return False
    remember(pack_dir, index, signs, family)
    return True


def remember(pack_dir: Path, index: str, signs: Unchanged, family: ExpertSpec) -> None:
    """Keep the signs by which a checkpoint, just compared or packed, is known again. A later write would show in them,
    unless it came within the same tick of the file system's clock: where that can be, content is compared once more."""
    if not signs.settled:
        return
    seen = _signs(index, signs.identity, family)
    _known[pack_dir.absolute(), index] = seen
    with contextlib.suppress(OSError):  # a pack that must not be written to
        write_json(pack_dir / SEEN, seen)


def _signs(index: str, identity: dict[str, Any], family: ExpertSpec) -> dict[str, Any]:
    names = "\n".join(name for key in family.keys() for name in family.tensor_names(key))  # noqa: SIM118
    return {"index": index, "experts": xxhash.xxh3_64_hexdigest(names.encode()), "source": identity}


def _seen(pack_dir: Path) -> Any:
    try:
        return json.loads((pack_dir / SEEN).read_text())
    except (OSError, ValueError):
        return None
