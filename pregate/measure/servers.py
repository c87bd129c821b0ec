"""Who serves the requests that are timed: a whole model through Hugging Face, or an engine, by the host or the device.

The benchmark and the evaluation measure all of them in the same way. Knows models and engines; knows nothing about
policies, rows or reports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from pregate.engine.device.device_engine import DeviceEngine
from pregate.engine.engine import OffloadEngine
from pregate.measure.device_steps import stepped_logits, time_steps
from pregate.measure.equality import check_moved
from pregate.measure.request_timing import Timed, TokenClock, time_request
from pregate.models.family import family_of_model
from pregate.models.finite import finite_logits
from pregate.models.objectives import Objective

Inputs = dict[str, Tensor]
"""`input_ids` and `attention_mask` of one prompt, (B, S) each."""


class Server(Protocol):
    @property
    def engine(self) -> OffloadEngine | DeviceEngine | None: ...

    device: torch.device
    objective: Objective
    captured: bool
    """Whether it decodes by another path than the model's `forward`."""

    def serve(self, inputs: Inputs, options: dict[str, Any], traced: bool = True) -> Timed:
        """One request of `options["max_new_tokens"]` new tokens."""
        ...

    def forward(self, **inputs: Any) -> Any:
        """The model's `forward`."""
        ...

    def logits(self, inputs: Inputs, tokens_BT: Tensor) -> Tensor:
        """Float32 logits (B, T, V) of `tokens_BT` given as input, by the path that decodes."""
        ...

    def rows_not_finite(self) -> Sequence[int]:
        """Rows of the requests so far whose logits were not finite."""
        ...


def forced_logits(forward: Callable[..., Any], objective: Objective, inputs: Inputs, tokens_BT: Tensor) -> Tensor:
    """Float32 logits (B, T, V) of a forward call with `tokens_BT`, the first that `generate` gave, as input."""
    forced = objective.forced(inputs, tokens_BT.to(inputs["input_ids"].device))
    with torch.inference_mode():
        return forward(**forced, use_cache=False).logits.float().cpu()


@dataclass
class HostServer:
    """Whatever has `generate` and `forward`, with what an engine counts and sees."""

    generate: Callable[..., Tensor]
    forward: Callable[..., Any]
    rows_not_finite: Callable[[], Sequence[int]]
    device: torch.device
    objective: Objective
    clock: TokenClock
    engine: OffloadEngine | None = None
    captured: bool = False

    @torch.inference_mode()
    def serve(self, inputs: Inputs, options: dict[str, Any], traced: bool = True) -> Timed:
        if self.engine is None:
            return time_request(self.generate, {**inputs, **options}, self.clock)
        self.engine.reset_counters()
        timed = time_request(self.generate, {**inputs, **options}, self.clock, self.engine.trace if traced else None)
        return replace(timed, counted=self.engine.counters.to_dict())

    def logits(self, inputs: Inputs, tokens_BT: Tensor) -> Tensor:
        return forced_logits(self.forward, self.objective, inputs, tokens_BT)


@dataclass
class DeviceServer:
    """The device-driven engine, whose steps run without the host."""

    engine: DeviceEngine
    device: torch.device
    objective: Objective
    captured: bool = True
    _broke: bool = False

    def serve(self, inputs: Inputs, options: dict[str, Any], traced: bool = True) -> Timed:
        timed = time_steps(self.engine, **inputs, device=self.device, **options)
        # nothing stays in a slot from request to request
        check_moved(self.engine.policy, timed.counted["bytes_moved"])
        self._broke |= not timed.finite
        return timed

    def forward(self, **inputs: Any) -> Any:
        return self.engine.forward(**inputs)

    def logits(self, inputs: Inputs, tokens_BT: Tensor) -> Tensor:
        if not self.captured:
            return forced_logits(self.forward, self.objective, inputs, tokens_BT)
        stepped_BTV = stepped_logits(self.engine, **inputs, tokens_BT=tokens_BT.to(self.device))
        read = tokens_BT.shape[1] - stepped_BTV.shape[1]
        if not read:
            return stepped_BTV
        # all of the prompt but its last token is read by the host
        return torch.cat([forced_logits(self.forward, self.objective, inputs, tokens_BT[:, :read]), stepped_BTV], dim=1)

    def rows_not_finite(self) -> Sequence[int]:
        return [0] if self._broke else []


@contextmanager
def whole_server(model: Any, device: torch.device, between: Callable[[], None] | None = None) -> Iterator[HostServer]:
    """A model served by Hugging Face; `between`: work before every step that is not timed."""
    with finite_logits(model) as finite:
        clock, objective = TokenClock(device, between=between), family_of_model(model).objective
        yield HostServer(model.generate, model, finite.rows_not_finite, device, objective, clock)


@contextmanager
def engine_server(
    engine: OffloadEngine | DeviceEngine, device: torch.device, link: str = "bytes_moved"
) -> Iterator[HostServer | DeviceServer]:
    """An opened engine. `link`: the counter that is read with every token."""
    objective = family_of_model(engine.model).objective
    if isinstance(engine, DeviceEngine):
        yield DeviceServer(engine, device, objective)
        return
    with finite_logits(engine.model) as finite:
        clock = TokenClock(device, read=lambda: getattr(engine.counters, link))
        yield HostServer(engine.generate, engine.forward, finite.rows_not_finite, device, objective, clock, engine)
