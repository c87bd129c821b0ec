"""Who serves the requests of a row: a whole model through Hugging Face, or the host-driven engine.

All servers are measured in the same way (`row`). The device-driven engine is in `device`. Knows models and engines;
knows nothing about floors or files.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from pregate.config import CacheRule, Policy
from pregate.engine.engine import OffloadEngine
from pregate.measure.bench.active_experts import counted_experts, forced_experts
from pregate.measure.bench.baselines import use_generation_config
from pregate.measure.bench.grid import RowSpec
from pregate.measure.bench.link import Ground
from pregate.measure.bench.models import BenchModel
from pregate.measure.bench.requests import Requests
from pregate.measure.latency import Timed, TokenClock
from pregate.measure.logits import check_moved, watched
from pregate.models.finite import finite_logits

LOGIT_TOKENS = 8
"""Target positions whose logits are compared; a batch of 32 then takes 33 MB with T5's vocabulary."""


class Server(Protocol):
    """Serves requests that are known by their numbers."""

    dtypes: Sequence[torch.dtype]
    """In which it computes, as far as that decides how far its logits may be off."""
    reader: str
    """Who reads from a disk: `threads` or `io_uring`."""
    requests: Requests
    captured: bool
    """Whether it decodes by another path than the model's `forward`."""

    def warm_up(self, number: int) -> None: ...

    def serve(self, number: int) -> Timed: ...

    def report(self, timed: Sequence[Timed]) -> dict[str, Any]:
        """What only this kind of server knows of the requests. `link_bytes`, which is no field of a row: the bytes
        over the link for each step of each request."""
        ...

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Float32 logits (B, t, V) for the first of `tokens_BT`, given as input to request 0, by the path that also
        decodes."""
        ...

    def forward(self, **inputs: Any) -> Any:
        """The model's `forward`."""
        ...

    def rows_not_finite(self) -> Sequence[int]:
        """Rows of any request with logits that were not finite."""
        ...


def first_logits(forward: Callable[..., Any], requests: Requests, tokens_BT: Tensor) -> Tensor:
    """Float32 logits (B, t, V) for the first of `tokens_BT`, request 0 of the whole model, given as input."""
    targets = tokens_BT[:, :LOGIT_TOKENS].to(requests.device)
    with torch.inference_mode():
        return forward(**requests.prompt(0), decoder_input_ids=targets).logits.float().cpu()


def engine_report(engine: Any, link_bytes: list[float]) -> dict[str, Any]:
    """What a row says of an engine, whoever drives it."""
    expected = engine.expected_bytes()
    return {
        "slots": engine.num_slots,
        "slab_bytes": engine.slab_bytes,
        "link_bytes": link_bytes,
        "link_bytes_per_step": statistics.mean(link_bytes),
        "expected_bytes": sum(expected.values()),
        "expected_bytes_parts": expected,
    }


# --- a whole model through Hugging Face -----------------------------------------------------------------------------


@dataclass
class WholeModel:
    """A `Server`; also of weights that Accelerate offloads."""

    model: Any
    requests: Requests
    new_tokens: int
    clock: TokenClock
    dtypes: Sequence[torch.dtype]
    rows_not_finite: Callable[[], Sequence[int]]
    reader: str = "threads"
    captured: bool = False

    @torch.inference_mode()
    def warm_up(self, number: int) -> None:
        self.serve(number)

    @torch.inference_mode()
    def serve(self, number: int) -> Timed:
        return self.requests.serve(self.model.generate, number, self.new_tokens, self.clock)

    def report(self, timed: Sequence[Timed]) -> dict[str, Any]:
        return {}

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def logits(self, tokens_BT: Tensor) -> Tensor:
        return first_logits(self.forward, self.requests, tokens_BT)


@contextmanager
def whole_model(
    model: Any,
    spec: RowSpec,
    requests: Requests,
    dtypes: Sequence[torch.dtype] = (),
    between: Callable[[], None] | None = None,
) -> Iterator[WholeModel]:
    """`between`: work before every step that is not timed."""
    with forced_experts(model, spec.forced_experts), finite_logits(model) as finite:
        clock = TokenClock(requests.device, between=between)
        yield WholeModel(model, requests, spec.new_tokens, clock, dtypes, finite.rows_not_finite)


# --- the host-driven engine -----------------------------------------------------------------------------------------


@dataclass
class HostEngine:
    """A `Server`. Counts the experts of its warm-up, and what moves in every request."""

    engine: OffloadEngine
    spec: RowSpec
    requests: Requests
    clock: TokenClock
    dtypes: Sequence[torch.dtype]
    rows_not_finite: Callable[[], Sequence[int]]
    reader: str
    io_threads: int
    active: list[int] = field(default_factory=list)
    counts: list[dict[str, int]] = field(default_factory=list)
    ever_moved: int = 0
    captured: bool = False

    def warm_up(self, number: int) -> None:
        with counted_experts(self.engine.model) as active:
            self._request(number, traced=False)
        self.active += active

    def serve(self, number: int) -> Timed:
        timed = self._request(number, traced=True)
        self.counts.append(self.engine.counters.to_dict())
        return timed

    def _request(self, number: int, traced: bool) -> Timed:
        engine = self.engine
        engine.reset_counters()
        trace = engine.trace if traced else None
        timed = self.requests.serve(engine.generate, number, self.spec.new_tokens, self.clock, trace)
        self.ever_moved += engine.counters.bytes_moved
        return timed

    def report(self, timed: Sequence[Timed]) -> dict[str, Any]:
        check_moved(self.spec.policy, self.ever_moved)
        # over the link, for each step after the first token
        moved = [(one.readings[-1] - one.readings[0]) / (len(one.readings) - 1) for one in timed]
        return {
            "io_threads": self.io_threads,
            "reader": self.reader,
            "active_experts": _mean(self.active),
            **{name: _mean([count[name] for count in self.counts]) for name in self.counts[0]},
            **engine_report(self.engine, moved),
        }

    def forward(self, **inputs: Any) -> Any:
        return self.engine.forward(**inputs)

    def logits(self, tokens_BT: Tensor) -> Tensor:
        return first_logits(self.forward, self.requests, tokens_BT)


@contextmanager
def host_engine(spec: RowSpec, model: BenchModel, ground: Ground) -> Iterator[HostEngine]:
    """The engine of a row. Raises what opening it raises."""
    device, store = ground.device, ground.store
    with (
        OffloadEngine.open(
            model.source,
            policy=Policy(spec.policy),
            device=device,
            device_budget=spec.budget,
            host_budget=spec.host_budget,
            cache=CacheRule(spec.cache or CacheRule.none),
            store=store,
            **vars(ground.reading),
        ) as engine,
        forced_experts(engine.model, spec.forced_experts),
        watched(engine) as rows_not_finite,
    ):
        use_generation_config(engine.model, model)
        link = "bytes_moved" if device.type == "cuda" and store.in_host_memory else "bytes_read"
        clock = TokenClock(device, read=lambda: getattr(engine.counters, link))
        requests = Requests.of(spec, model.vocab_size, device)
        dtypes = (model.dtype, engine.model.dtype)
        yield HostEngine(
            engine, spec, requests, clock, dtypes, rows_not_finite, engine.reader, ground.reading.io_threads
        )


def _mean(numbers: Sequence[int]) -> int | float:
    """Of counts: whole where it is whole."""
    mean = statistics.mean(numbers)
    return int(mean) if mean == int(mean) else round(mean, 2)
