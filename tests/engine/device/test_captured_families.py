"""Every decoder-only family that has a static step: on a GPU, where steps are captured, with every policy and every
kind of gates; a few of them on a CPU, by the same function. More of the steps without a GPU: steps/test_rotary."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from pregate.config import CacheRule, Policy
from pregate.engine.device.device_engine import DeviceEngine
from pregate.engine.device.graph import STEPS_AT_ONCE
from tests.engine.device.stepping import assert_equal_while_live
from tests.engine.device.steps.test_rotary import CAPTURED, generated, prompts
from tests.engine.families import GATES, Source, checkpoint

LENGTH = 9
STEPS = {"cpu": STEPS_AT_ONCE + 1, "cuda": 2 * STEPS_AT_ONCE + 3}
REQUESTS = {"cpu": [(3, 5), (1, 6)], "cuda": [(3, 5), (1, 6), (3, 7), (2, 8)]}
"""Their rows and the seeds of their prompts."""
ON_CPU = [("olmoe", Policy.pre_gated, "early"), ("gpt_oss", Policy.prefetch_all, "start")]
ON_GPU = [(name, policy, "early") for name in CAPTURED for policy in Policy]
ON_GPU += [(name, Policy.pre_gated, gates) for name in CAPTURED for gates in GATES if gates != "early"]


@pytest.mark.parametrize(
    ("name", "policy", "gates", "device"),
    [
        *((*case, "cpu") for case in ON_CPU),
        *(pytest.param(*case, "cuda", marks=pytest.mark.gpu) for case in ON_GPU),
    ],
)
def test_steps_are_those_of_the_resident_model(
    families: Path, name: str, policy: Policy, gates: str, device: str
) -> None:
    """Requests of several rows and of one, with steps one by one for their logits and several at a time without."""
    directory, model = checkpoint(families, Source(name, "float32"), gates)
    resident = copy.deepcopy(model).to(device)
    steps, atol, ties = STEPS[device], *((1e-4, 0.0) if device == "cpu" else (1e-3, 1e-3))
    sizes = {"batch": 3, "max_source_len": LENGTH, "max_new_tokens": steps}
    with DeviceEngine.open(directory, policy=policy, cache=CacheRule.lru, device=device, **sizes) as engine:
        for rows, seed in REQUESTS[device]:
            inputs = {key: tensor.to(device) for key, tensor in prompts(rows, LENGTH, seed).items()}
            asked = {"max_new_tokens": steps}
            wanted, got = (generated(generate, inputs, **asked) for generate in (resident.generate, engine.generate))
            assert wanted[1].isfinite().all() and len(wanted[0][:, LENGTH:].unique()) > 2
            # the prompt's last token stands for the start token
            pairs = [(tokens[:, LENGTH - 1 :], logits) for tokens, logits in (got, wanted)]
            assert assert_equal_while_live(pairs[0], pairs[1], None, atol, ties) >= rows * steps // 2
            at_once = engine.generate(**inputs, **asked, do_sample=False, eos_token_id=None, repetition_penalty=1.3)
            assert (at_once == got[0]).all(), f"several steps at a time:\n{at_once}\none by one:\n{got[0]}"
        assert (engine.counters.bytes_moved > 0) == (policy is not Policy.gpu_only)
