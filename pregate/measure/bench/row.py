"""Measuring one row of a benchmark: what is timed, what is compared, and the floors beside it.

The same for every server. Knows servers, references and probes; knows nothing about grids or files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pregate.measure.bench.grid import RowSpec
from pregate.measure.bench.probes import Decoding, Probes, floors
from pregate.measure.bench.references import Reference
from pregate.measure.bench.requests import WARM_UP, Effort
from pregate.measure.bench.servers import Server, first_logits
from pregate.measure.latency import Timed, medians
from pregate.measure.logits import compare_logits, logit_difference, tolerance
from pregate.system.memory import PeakMemory


@dataclass(frozen=True)
class Beside:
    """What a row is compared with; None where it was not measured."""

    probes: Probes
    reference: Reference | None = None
    """With the weights that are served: dequantised ones for quantised slabs."""
    source_reference: Reference | None = None


class Measured(NamedTuple):
    """A row, and the requests and logits of request 0 that it was made from."""

    row: dict[str, Any]
    timed: list[Timed]
    logits: Tensor


def measure_row(spec: RowSpec, server: Server, effort: Effort, peak: PeakMemory, beside: Beside) -> Measured:
    """One row, complete. `peak` was begun before the server was opened."""
    reference, probes = beside.reference, beside.probes
    for number in range(effort.warmup):
        server.warm_up(WARM_UP + number)
    timed = effort.run(server.serve, lambda: probes.take(peak))
    row = {**spec.to_dict(), **server.report(timed), **figures(timed, spec, reference)}
    link_bytes = row.pop("link_bytes", None)
    if (peak_bytes := peak.read()) is not None:
        row["peak_device_bytes"] = peak_bytes
    with peak.left_out():
        row |= _beside_the_source(server, beside.source_reference)
        tokens_BT = timed[0].tokens if reference is None else reference.tokens[0]
        logits = server.logits(tokens_BT)
    row |= logits_record(logits, reference, bool(server.rows_not_finite()), server.dtypes)
    if server.captured and reference is not None and reference.logits is not None:
        differs = logit_difference(logits, reference.logits[:, : logits.shape[1]])
        row |= {"step_logits_rel_diff": differs["logits_rel_diff"]} if differs else {}
    if link_bytes is not None:
        steps = [Decoding(one.tpot_ms or 0.0, moved) for one, moved in zip(timed, link_bytes, strict=True)]
        row |= floors(steps, probes, spec.batch)
    return Measured(row, timed, logits)


def _beside_the_source(server: Server, source: Reference | None) -> dict[str, float]:
    """How far the logits are from those of the unquantised model."""
    if source is None or source.logits is None:
        return {}
    return logit_difference(first_logits(server.forward, server.requests, source.tokens[0]), source.logits)


def logits_record(
    logits: Tensor, reference: Reference | None, broke: bool, dtypes: Iterable[torch.dtype]
) -> dict[str, Any]:
    """`compare_logits` of request 0 with the whole model's; `broke`: a step of some request had logits that were not
    finite."""
    wanted_BtV = None if reference is None or reference.logits is None else reference.logits[:, : logits.shape[1]]
    found = compare_logits([logits], None if wanted_BtV is None else [wanted_BtV], tolerance(dtypes))
    if broke or not found["logits_finite"]:
        # NaN is chosen like any token, so that its tokens are equal is no equality
        found |= {"logits_finite": False, **({} if reference is None else {"tokens_equal_resident": False})}
    return found


def figures(timed: Sequence[Timed], spec: RowSpec, reference: Reference | None) -> dict[str, Any]:
    """What any server is measured by: medians over repeats, the spread of `tpot_ms`, and whether the tokens are the
    whole model's (see also `logits_record`). `tokens_per_s` is while decoding, of the whole batch. Where tokens differ,
    `tokens_equal_until`: new tokens before the first difference of any row and request."""
    tpot = [request.tpot_ms for request in timed if request.tpot_ms is not None]
    found: dict[str, Any] = medians(timed)
    found |= {
        "tpot_ms_min": min(tpot),
        "tpot_ms_max": max(tpot),
        "tokens_per_s": spec.batch * 1e3 / found["tpot_ms"],
        "repeats": len(timed),
    }
    if spec.forced_experts is not None:
        found["active_experts"] = spec.forced_experts
    if reference is not None:
        compared = zip(range(reference.tokens.shape[0]), timed, strict=False)
        equal = [reference.equal_until(number, request.tokens) for number, request in compared]
        departs = [tokens for tokens in equal if tokens is not None]
        found["tokens_equal_resident"] = not departs
        if departs:
            found["tokens_equal_until"] = min(departs)
    return found
