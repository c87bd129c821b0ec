"""Where the time of a decoding step goes: the kernels of captured steps, by the device's own clock.

    python -m studies.profiles.step_profile --model switch_base_8 --out DIR

For each policy the time of a token (as `pregate.bench` takes it), then a profile of as many steps as one graph holds: a
table of what was launched, and a trace that Perfetto opens. Random weights, batch 1, entry gates on the embeddings.
Without a GPU the same code profiles the operations of the reference implementations, which says nothing about kernels.
"""

from __future__ import annotations

import argparse
import gzip
import statistics
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pregate.config import Device, Entry, Policy, Precision, Run, SlabDtype, Tier, UsageError
from pregate.engine.device.device_engine import DeviceEngine
from pregate.engine.device.graph import STEPS_AT_ONCE
from pregate.engine.opening import open_store
from pregate.measure.bench.models import BenchModel, bench_models
from pregate.measure.bench.requests import Requests, greedy
from pregate.measure.device_steps import time_steps
from pregate.system.machine import environment, pick_device

TABLE = "step_profile.md"
REPEATS = 5
POLICIES = (Policy.gpu_only, Policy.pre_gated)


@dataclass(frozen=True)
class Launches:
    """So many of one kernel (on a CPU: operation) a step, and what all of them take, in microseconds."""

    name: str
    count: float
    us: float


def profile_model(
    model: BenchModel,
    device: torch.device,
    out_dir: Path,
    policies: Sequence[Policy] = POLICIES,
    slab_dtype: SlabDtype = SlabDtype.source,
    prompt_len: int = 256,
    new_tokens: int = 64,
) -> str:
    """Profile every policy, leaving `POLICY.json.gz` of each and `step_profile.md` in `out_dir`; returns the latter.
    Raises `UsageError` for a model or setting that cannot be served."""
    out_dir.mkdir(parents=True, exist_ok=True)
    requests = Requests(1, prompt_len, model.vocab_size, 0, device)
    parts = [f"# Steps of {model.name}, {model.dtype_name}, {slab_dtype} slabs"]
    opened = open_store(model.source, tier=Tier.dram, device=device, slab_dtype=slab_dtype)
    with closing(opened) as store:
        for policy in policies:
            with DeviceEngine.open(
                model.source,
                max_source_len=prompt_len,
                max_new_tokens=max(new_tokens, 2 * STEPS_AT_ONCE),
                policy=policy,
                device=device,
                store=store,
            ) as engine:
                ms = _token_ms(engine, requests, new_tokens)
                parts.append(_part(policy, ms, _launches(engine, requests, out_dir / f"{policy}.json.gz")))
    found = environment()
    parts.append(f"Environment: torch {found['torch']}, {', '.join(found.get('gpu') or ['no GPU'])}.")
    text = "\n\n".join(parts) + "\n"
    (out_dir / TABLE).write_text(text, encoding="utf-8")
    return text


def _token_ms(engine: DeviceEngine, requests: Requests, new_tokens: int) -> list[float]:
    times = []
    for number in range(REPEATS + 1):
        timed = time_steps(engine, **requests.prompt(number), device=requests.device, **greedy(new_tokens))
        if number and timed.tpot_ms is not None:  # the first warms up
            times.append(timed.tpot_ms)
    return times


def _launches(engine: DeviceEngine, requests: Requests, trace: Path) -> list[Launches]:
    """Of the second graph of steps of a request, so that the caches hold something."""
    from torch.profiler import ProfilerActivity, profile

    cuda = requests.device.type == "cuda"
    prompt = requests.prompt(0)
    request = engine.request(prompt["input_ids"], **greedy(2 * STEPS_AT_ONCE))
    engine.prefill(**prompt, sampling=request.sampling)
    engine.decode(STEPS_AT_ONCE)
    _wait(cuda)
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiled:
        engine.decode(STEPS_AT_ONCE)
        _wait(cuda)
    plain = trace.with_suffix("")
    profiled.export_chrome_trace(str(plain))
    trace.write_bytes(gzip.compress(plain.read_bytes().replace(str(plain).encode(), plain.name.encode())))
    plain.unlink()
    found = []
    for event in profiled.key_averages():
        us = event.self_device_time_total if cuda else event.self_cpu_time_total
        if us > 0:
            found.append(Launches(event.key, event.count / STEPS_AT_ONCE, us / STEPS_AT_ONCE))
    return sorted(found, key=lambda launches: -launches.us)


def _wait(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


def _part(policy: Policy, token_ms: Sequence[float], launches: Sequence[Launches]) -> str:
    lines = [
        f"## {policy}: {statistics.median(token_ms):.3f} ms a token ({min(token_ms):.3f} to {max(token_ms):.3f})",
        "",
        "| launched | times a step | µs a step |",
        "|---|---:|---:|",
        *(f"| `{_short(one.name)}` | {one.count:.3g} | {one.us:.1f} |" for one in launches),
        f"| all | {sum(one.count for one in launches):.0f} | {sum(one.us for one in launches):.1f} |",
    ]
    return "\n".join(lines)


def _short(name: str) -> str:
    """A kernel's name without what a table has no room for."""
    return name.replace("|", "/")[:80]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m studies.profiles.step_profile",
        description="Where the time of a captured decoding step goes.",
    )
    parser.add_argument("--model", default="switch_base_8", help="a member of the config group model")
    parser.add_argument("--out", type=Path, required=True, help=f"directory for {TABLE} and the traces")
    parser.add_argument("--policies", nargs="+", choices=[str(policy) for policy in Policy], default=POLICIES)
    parser.add_argument("--slab-dtype", choices=[str(dtype) for dtype in SlabDtype], default=str(SlabDtype.source))
    parser.add_argument("--device", choices=[str(device) for device in Device], default=str(Device.auto))
    parser.add_argument("--prompt-len", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=64)
    given = parser.parse_args(arguments)
    run = Run()
    run = replace(
        run,
        bench=replace(run.bench, models=[given.model], dtype=Precision.bf16),
        pregate=replace(run.pregate, entry=Entry.embedding),
    )
    try:
        [model] = bench_models(run)
        text = profile_model(
            model,
            pick_device(Device(given.device)),
            given.out,
            [Policy(policy) for policy in given.policies],
            SlabDtype(given.slab_dtype),
            given.prompt_len,
            given.new_tokens,
        )
    except UsageError as error:
        parser.exit(2, f"pregate: {error}\n")
    print(text, end="")


if __name__ == "__main__":
    main()
