"""The settings of serving: policy, budgets, where experts are, and how the engine is measured in an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field

from pregate.config.choices import CacheRule, Device, Drive, Policy, SlabDtype, Tier
from pregate.config.validators import at_least, setting, share_of

SOME_POLICY = {"empty": "name at least one of " + ", ".join(Policy)}


@dataclass
class EngineConfig:
    """How the offloaded engine serves. `device_budget` is bytes ("4GB"), a share of all experts ("25%") or null.

    `drive: device` decodes without the host: experts in host memory, greedy decoding or sampling by temperature.
    `tier: auto` is page-locked host memory for a GPU, and the disk where the compute device is host memory itself.
    `host_budget`: host memory that caches slabs of the disk tier, in the units of `device_budget`; null is none.
    `cache`: what becomes of used experts in their slots; `none` as in the paper. `io_threads`: slabs in flight from the
    disk, more where they are smaller than 4 MiB. `io_uring`: on a CPU let the kernel read by itself where it can, not
    threads. `prefill_chunk`: how many tokens of a prompt a decoder-only model reads at a time; null is all of them.
    """

    policy: Policy = Policy.pre_gated
    policies: list[Policy] = field(default_factory=lambda: list(Policy), metadata=SOME_POLICY)
    tier: Tier = Tier.auto
    drive: Drive = Drive.host
    device: Device = Device.auto
    device_budget: str | None = None
    pack_dir: str | None = None
    host_budget: str | None = None
    cache: CacheRule = CacheRule.none
    slab_dtype: SlabDtype = SlabDtype.source
    io_threads: int = setting(2, at_least(1))
    io_uring: bool = True
    prefill_chunk: int | None = setting(4096, at_least(1, ", or null for whole prompts"))
    bench_prompts: int = setting(4, at_least(1))
    bench_new_tokens: int = setting(16, at_least(1))
    bench_repeats: int = setting(3, at_least(1))

    def check(self, prefix: str) -> None:
        share_of(f"{prefix}device_budget", self.device_budget or "")
        share_of(f"{prefix}host_budget", self.host_budget or "")
