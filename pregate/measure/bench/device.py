"""The device-driven engine as a server of a benchmark's rows, and what T_compute means for it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pregate.config import CacheRule, Drive, Policy
from pregate.engine.device.engine import DeviceEngine
from pregate.measure.bench.active_experts import forced_experts
from pregate.measure.bench.baselines import use_generation_config
from pregate.measure.bench.grid import RowSpec
from pregate.measure.bench.link import Ground
from pregate.measure.bench.models import BenchModel
from pregate.measure.bench.requests import Requests, greedy
from pregate.measure.bench.servers import LOGIT_TOKENS, engine_report, first_logits
from pregate.measure.device_steps import StepsTimed, stepped_logits, time_steps
from pregate.measure.logits import check_moved


@dataclass
class DeviceDriven:
    """A `Server` whose decoding steps run without the host. Nothing is read from a disk here."""

    engine: DeviceEngine
    spec: RowSpec
    requests: Requests
    dtypes: Sequence[torch.dtype]
    reader: str = "threads"

    @property
    def captured(self) -> bool:
        # forced by its place in a call, a token has another route alone than among others
        return self.spec.forced_experts is None

    def warm_up(self, number: int) -> None:
        self.serve(number)

    def serve(self, number: int) -> StepsTimed:
        return serve_one(self.engine, self.requests, number, self.spec.new_tokens)

    def report(self, timed: Sequence[Any]) -> dict[str, Any]:
        for one in timed:  # nothing stays in a slot from request to request
            check_moved(self.spec.policy, one.counted["bytes_moved"])
        self._broke = not all(one.finite for one in timed)
        row = {name: round(statistics.mean(one.counted[name] for one in timed), 2) for name in timed[0].counted}
        if self.captured and self.spec.policy in (Policy.on_demand, Policy.pre_gated):
            # the other policies fetch without regard to routes, so their counts do not tell
            row["active_experts"] = round(statistics.mean(one.distinct for one in timed), 2)
        return row | engine_report(self.engine, [(one.readings[-1] - one.readings[0]) / one.steps for one in timed])

    def rows_not_finite(self) -> Sequence[int]:
        return range(self.spec.batch) if self._broke else ()

    def forward(self, **inputs: Any) -> Any:
        return self.engine.forward(**inputs)

    def logits(self, tokens_BT: Tensor) -> Tensor:
        if not self.captured:
            return first_logits(self.forward, self.requests, tokens_BT)
        given = tokens_BT[:, : min(LOGIT_TOKENS, self.spec.new_tokens)].to(self.requests.device)
        return stepped_logits(self.engine, **self.requests.prompt(0), tokens_BT=given)


@contextmanager
def device_engine(spec: RowSpec, model: BenchModel, ground: Ground) -> Iterator[DeviceDriven]:
    """The engine of a row. Raises what opening it raises."""
    with (
        DeviceEngine.open(
            model.source,
            batch=spec.batch,
            max_source_len=spec.prompt_len,
            max_new_tokens=spec.new_tokens,
            policy=Policy(spec.policy),
            device=ground.device,
            device_budget=spec.budget,
            cache=CacheRule(spec.cache or CacheRule.none),
            store=ground.store,
        ) as engine,
        forced_experts(engine.model, spec.forced_experts),
    ):
        use_generation_config(engine.model, model)
        requests = Requests.of(spec, model.vocab_size, ground.device)
        yield DeviceDriven(engine, spec, requests, (model.dtype, engine.model.dtype))


def serve_one(engine: DeviceEngine, requests: Requests, number: int, new_tokens: int) -> StepsTimed:
    prompt = requests.prompt(number)
    return time_steps(engine, **prompt, new_tokens=new_tokens, device=requests.device, **greedy(new_tokens))


def captured_compute_ms(
    spec: RowSpec, new_tokens: int, find: Callable[[RowSpec], dict[str, Any] | None]
) -> float | None:
    """T_compute of a device-driven row: a token's time with all experts on the device, driven the same way and for
    `new_tokens`. None until that row is measured."""
    row = find(
        replace(spec, policy=str(Policy.gpu_only), cache=None, budget=None, host_budget=None, new_tokens=new_tokens)
    )
    return None if row is None else row["tpot_ms"]


def is_device_driven(spec: RowSpec) -> bool:
    return spec.drive == Drive.device
