"""Timing a request of the device-driven engine: inside a captured step nothing can be timed or asked, so all steps are
timed together, from the moment the first token is known to the moment the last is.

Time spent waiting and the time of a block are therefore absent. Knows the device-driven engine; knows nothing about
rows, policies or reports.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from pregate.engine.device.device_engine import DeviceEngine
from pregate.measure.request_timing import Timed


def time_steps(
    engine: DeviceEngine, input_ids: Tensor, attention_mask: Tensor, device: torch.device, **options: Any
) -> Timed:
    """One request with the generation `options`, of `max_new_tokens` whatever their ends. The device is waited for at
    the ends of what is timed and nowhere between. What is counted includes the reading of the prompt."""
    request, new_tokens = engine.request(input_ids, **options), options["max_new_tokens"]
    engine.host.reset_counters()
    begun = _now(device)
    engine.prefill(input_ids, attention_mask, request.sampling)
    engine.decode_one_token()
    first = _now(device) - begun
    moved_first = engine.counters.bytes_moved
    begun = _now(device)
    engine.decode(new_tokens - 1)
    rest = _now(device) - begun
    counted, prompt = engine.counters, engine.host.counters.to_dict()
    num_blocks = len(list(engine.family.layers.values())[-1])
    return Timed(
        tokens=engine.decoder.sequences(engine.tokens()[: len(input_ids), : new_tokens + 1], input_ids).clone().cpu(),
        seconds=[first, first + rest],
        readings=[moved_first, counted.bytes_moved],
        spans=None,
        steps=new_tokens - 1,
        counted={name: value + prompt[name] for name, value in counted.to_dict().items()},
        distinct=(counted.hits + counted.misses) / (num_blocks * new_tokens),
        finite=not engine.rows_not_finite(),
    )


@torch.inference_mode()
def stepped_logits(engine: DeviceEngine, input_ids: Tensor, attention_mask: Tensor, tokens_BT: Tensor) -> Tensor:
    """Float32 logits (B, T, V) of captured steps, each given the token of `tokens_BT` at its place whatever the step
    before has chosen. Where the tokens continue the prompt, only those from its last token on. As many new tokens as
    the engine was opened for are enough."""
    if engine.decoder.continues_prompt:
        tokens_BT = tokens_BT[:, input_ids.shape[1] - 1 :]
    steps = tokens_BT.shape[1]
    request = engine.request(input_ids, do_sample=False, num_beams=1, min_new_tokens=steps, max_new_tokens=steps)
    engine.prefill(input_ids, attention_mask, request.sampling)
    sampler, found = engine.decoder.sampler, []
    for place in range(steps):
        sampler.token_B[: len(tokens_BT)].copy_(tokens_BT[:, place])
        engine.decode_one_token()
        found.append(sampler.logits_BV[: len(tokens_BT)].clone())
    return torch.stack(found, dim=1).cpu()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
