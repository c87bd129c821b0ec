"""Whether what is served has finite logits, and the resident model's: equal tokens alone tell neither.

Tokens stay equal for a while with wrong experts, and a NaN is chosen as a token like any number. So the tokens that
were generated are given as input, and the logits for them compared. Knows logits and engines; knows nothing about rows
or reports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pregate.config import Policy
from pregate.engine.device.device_engine import DeviceEngine
from pregate.engine.engine import OffloadEngine
from pregate.models.finite import finite_logits

LOGIT_TOKENS = 8
"""Target positions whose logits a benchmark compares; a batch of 32 then takes 33 MB with T5's vocabulary."""
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Norm of the difference as a share of the norm. Sums in another order, in bfloat16 with a token or two that a near tie
sends to another expert, stay below a fourth of it; an expert with another one's weights does not."""


def tolerance(dtypes: Iterable[torch.dtype]) -> float:
    """Of a model that computes in `dtypes`: that of the coarsest."""
    return max((TOLERANCE.get(dtype, 0.0) for dtype in dtypes), default=0.0)


def logit_difference(logits: Tensor, source: Tensor | None) -> dict[str, float]:
    """Largest absolute difference, and the norm of the difference as a share of the norm of `source`. Empty where there
    is no number to give: without a source, and where something is not finite."""
    if source is None:
        return {}
    difference = logits.float() - source.float()
    largest = float(difference.abs().max())
    share = float(difference.norm()) / max(float(source.float().norm()), torch.finfo(torch.float32).tiny)
    finite = abs(largest) < float("inf") and share < float("inf")
    return {"logits_max_abs_diff": largest, "logits_rel_diff": share} if finite else {}


def compare_logits(
    logits: Sequence[Tensor], expected: Sequence[Tensor] | None, most: float | None = None, broke: bool = False
) -> dict[str, Any]:
    """`logits_finite`: of `logits`, and of the steps that were timed, unless one `broke`. Against what the resident
    model gave for the same tokens also `logits_max_diff`, the largest absolute difference, and, if `most` is given (see
    `TOLERANCE`), `logits_equal_resident`."""
    found: dict[str, Any] = {"logits_finite": not broke and all(bool(one.isfinite().all()) for one in logits)}
    if expected is None:
        return found
    mine, theirs = (torch.cat([one.flatten().float() for one in side]) for side in (logits, expected))
    differs = logit_difference(mine, theirs)
    if differs:
        found["logits_max_diff"] = differs["logits_max_abs_diff"]
    if most is not None:
        found["logits_equal_resident"] = bool(differs) and differs["logits_rel_diff"] <= most
    return found


@contextmanager
def watched(engine: OffloadEngine | DeviceEngine) -> Iterator[Callable[[], list[int]]]:
    """A function that says which rows of the last requests had logits that were not finite."""
    if isinstance(engine, DeviceEngine):
        yield engine.rows_not_finite
        return
    with finite_logits(engine.model) as found:
        yield found.rows_not_finite


def check_moved(policy: Policy | str, bytes_moved: float) -> None:
    """Raises `RuntimeError` where experts should have moved and none has: then equal tokens tell nothing."""
    if policy != Policy.gpu_only and not bytes_moved:
        raise RuntimeError(f"No expert has moved with policy {policy}: this is a fault of the engine.")
