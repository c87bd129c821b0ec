"""Names of tensors as files have them, and as the model has them: without what wrappers and training frameworks add."""

from __future__ import annotations

import re
from dataclasses import replace

from pregate.config import UsageError
from pregate.models.checkpoint import SourceCheckpoint, TensorInfo
from pregate.models.family import Family
from pregate.system.console import first_of, say_once

PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")
"""What wrappers put before every name: DistributedDataParallel, torch.compile, FSDP. A training framework may put
`model.` before them; a family whose own names begin so says which names those are."""
INSIDE = re.compile(r"(?<=\.)(_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.)")
"""What they put into names where layers are wrapped one by one; the last is activation checkpointing."""


def plain_names(checkpoint: SourceCheckpoint, family: Family) -> dict[str, TensorInfo]:
    """The tensors by the names of the family, without what wrappers put into them, in the order of the files. Raises
    `UsageError` where two stored names mean one tensor."""
    found: dict[str, TensorInfo] = {}
    removed: dict[str, set[str]] = {"before": set(), "inside": set()}
    for stored, info in checkpoint.tensors.items():
        whole = _without_prefixes(stored, family)
        name = INSIDE.sub("", whole)
        for old, new in family.renames:
            name = name.replace(old, new)
        if name in found:
            raise UsageError(
                f"{checkpoint.directory} holds both {found[name].key or name} and {stored}, which name the same "
                "tensor: keep the one of the trained model."
            )
        found[name] = replace(info, key=info.key or stored)
        removed["before"] |= {stored.removesuffix(whole)} - {""}
        removed["inside"] |= set(INSIDE.findall(whole))
    for where, parts in removed.items():
        if parts:
            say_once(
                f"{checkpoint.directory} has {first_of(sorted(parts), 3)} {where} the names of tensors, as wrapped "
                "models have: it is left out."
            )
    return found


def _without_prefixes(name: str, family: Family) -> str:
    prefixes = PREFIXES + family.prefixes
    while prefix := next((prefix for prefix in prefixes if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name
