"""Measuring one row of a benchmark: what is timed, what is compared, and the floors beside it.

The same for every server. Knows servers, references and probes; knows nothing about grids or files.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pregate.config import Policy
from pregate.engine.device.device_engine import DeviceEngine
from pregate.engine.engine import OffloadEngine
from pregate.measure.bench.active_experts import counted_experts
from pregate.measure.bench.floors import Decoding, Probes, floors
from pregate.measure.bench.grid import RowSpec
from pregate.measure.bench.models import BenchModel
from pregate.measure.bench.references import Reference
from pregate.measure.bench.requests import WARM_UP, Effort, Requests, greedy
from pregate.measure.equality import LOGIT_TOKENS, check_moved, compare_logits, logit_difference, tolerance
from pregate.measure.request_timing import Timed, medians
from pregate.measure.servers import Server, forced_logits
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


def measure_row(
    spec: RowSpec, model: BenchModel, server: Server, effort: Effort, peak: PeakMemory, beside: Beside
) -> Measured:
    """One row, complete. `peak` was begun before the server was opened."""
    requests = Requests.of(spec, model.vocab_size, server.device)
    reference, probes, options = beside.reference, beside.probes, greedy(spec.new_tokens)
    engine = server.engine
    with counted_experts(engine.model) if isinstance(engine, OffloadEngine) else nullcontext([]) as active:
        warm_up = [
            server.serve(requests.prompt(WARM_UP + number), options, traced=False) for number in range(effort.warmup)
        ]
    timed = effort.run(lambda number: server.serve(requests.prompt(number), options), lambda: probes.take(peak))
    row: dict[str, Any] = spec.to_dict() | {"fingerprint": model.fingerprint, "device": server.device.type}
    if engine is not None:
        check_moved(spec.policy, sum(one.counted["bytes_moved"] for one in [*warm_up, *timed]))
        row |= engine_report(engine, spec, timed, active)
        row |= floors([Decoding(one.tpot_ms or 0.0, one.read_per_step) for one in timed], probes, spec.batch)
    row |= figures(timed, spec, reference)
    if (peak_bytes := peak.read()) is not None:
        row["peak_device_bytes"] = peak_bytes
        row |= {"peak_over_expected": peak_bytes / row["expected_bytes"]} if row.get("expected_bytes") else {}
    tokens_BT = timed[0].tokens if reference is None else reference.tokens[0]
    with peak.left_out():
        logits = server.logits(requests.prompt(0), compared(server, requests, spec, tokens_BT))
        row |= _beside_the_source(server, requests, spec, beside.source_reference)
    dtypes = [model.dtype] if engine is None else [model.dtype, engine.model.dtype]
    row |= logits_record(logits, reference, bool(server.rows_not_finite()), dtypes)
    if server.captured and reference is not None and reference.logits is not None:
        differs = logit_difference(logits, reference.logits[:, : logits.shape[1]])
        row |= {"step_logits_rel_diff": differs["logits_rel_diff"]} if differs else {}
    return Measured(row, timed, logits)


def compared(server: Server, requests: Requests, spec: RowSpec, tokens_BT: Tensor) -> Tensor:
    """The tokens that are given as input to compare logits: the first new ones, and the prompt where `generate` repeats
    it."""
    num_new = server.objective.new_tokens(tokens_BT, requests.prompt(0)["input_ids"]).shape[1]
    return tokens_BT[:, : tokens_BT.shape[1] - num_new + min(LOGIT_TOKENS, spec.new_tokens)]


def engine_report(
    engine: OffloadEngine | DeviceEngine, spec: RowSpec, timed: Sequence[Timed], active: Sequence[int]
) -> dict[str, Any]:
    """What a row says of an engine. `active`: the distinct experts of each block and step of the warm-up."""
    expected = engine.expected_bytes()
    row: dict[str, Any] = {name: _mean([one.counted[name] for one in timed]) for name in timed[0].counted}
    row |= {
        "slots": engine.num_slots,
        "slab_bytes": engine.slab_bytes,
        "link_bytes_per_step": statistics.mean(one.read_per_step for one in timed),
        "expected_bytes": sum(expected.values()),
        "expected_bytes_parts": expected,
    }
    if isinstance(engine, OffloadEngine):
        return row | {"reader": engine.reader, "active_experts": _mean(active)}
    # the other policies fetch without regard to routes, so their counts do not tell
    if spec.forced_experts is None and spec.policy in (Policy.on_demand, Policy.pre_gated):
        row["active_experts"] = round(statistics.mean(one.distinct or 0.0 for one in timed), 2)
    return row


def _mean(numbers: Sequence[int]) -> int | float:
    """Of counts: whole where it is whole."""
    mean = statistics.mean(numbers)
    return int(mean) if mean == int(mean) else round(mean, 2)


def _beside_the_source(server: Server, requests: Requests, spec: RowSpec, source: Reference | None) -> dict[str, float]:
    """How far the logits are from those of the unquantised model."""
    if source is None or source.logits is None:
        return {}
    tokens_BT = compared(server, requests, spec, source.tokens[0])
    logits = forced_logits(server.forward, server.objective, requests.prompt(0), tokens_BT)
    return logit_difference(logits, source.logits[:, : logits.shape[1]])


def logits_record(
    logits: Tensor, reference: Reference | None, broke: bool, dtypes: Iterable[torch.dtype]
) -> dict[str, Any]:
    """`compare_logits` of request 0 with the whole model's; `broke`: a step of some request had logits that were not
    finite."""
    wanted_BtV = None if reference is None or reference.logits is None else reference.logits[:, : logits.shape[1]]
    found = compare_logits([logits], None if wanted_BtV is None else [wanted_BtV], tolerance(dtypes), broke)
    if reference is not None and not found["logits_finite"]:
        # NaN is chosen like any token, so that its tokens are equal is no equality
        found["tokens_equal_resident"] = False
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
        equal = [reference.equal_until(number, request.tokens, spec.new_tokens) for number, request in compared]
        departs = [tokens for tokens in equal if tokens is not None]
        found["tokens_equal_resident"] = not departs
        if departs:
            found["tokens_equal_until"] = min(departs)
    return found
