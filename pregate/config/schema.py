"""The one typed schema of every entry point: what may be set, and which settings cannot work.

YAML is merged into these dataclasses before any work starts; a `Run` refuses impossible values as it is made. Knows
nothing about Hydra's command line (`cli`), torch, models or data. What depends on a model, a checkpoint or a machine is
refused where that is opened. A `Run` is read-only by convention: nothing downstream writes to it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pregate.config.calibration import CalibrationConfig as CalibrationConfig
from pregate.config.choices import (
    PRE_TRAINING,
    Baseline,
    CacheRule,
    Device,
    DistillData,
    Drive,
    Entry,
    ExpertPath,
    Experts,
    GateKind,
    Init,
    Keep,
    Optimizer,
    Policy,
    Precision,
    RoutingLoss,
    Schedule,
    Sharding,
    SlabDtype,
    Tier,
    Tracker,
    Trainable,
    WandbMode,
    Weights,
)
from pregate.config.lora import LoraConfig as LoraConfig
from pregate.config.task import TaskConfig
from pregate.config.validators import (
    TEMPERATURE,
    WEIGHT,
    Limit,
    above,
    at_least,
    check_section,
    need,
    setting,
    share_of,
)
from pregate.config.validators import (
    UsageError as UsageError,
)
from pregate.system.durable import write_text

SIZES = ("d_model", "d_kv", "d_ff", "num_heads", "num_layers", "num_decoder_layers", "num_experts", "expert_capacity")
"""Those parts of a geometry of which there must be at least one."""


@dataclass
class ModelConfig:
    """Where the conventional model comes from: `source` (directory or hub id), or `geometry` trained from scratch.

    `family`: the `model_type` of a model of that geometry; a source says its own.
    """

    name: str = "switch-base-8"
    family: str = "switch_transformers"
    source: str | None = None
    revision: str | None = None
    geometry: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None

    def check(self, prefix: str) -> None:
        for key, value in self.geometry.items():
            whole = isinstance(value, int) and key in SIZES
            need(not whole or value > 0, f"{prefix}geometry.{key}={value} must be at least 1.")
            rate = isinstance(value, int | float) and key == "dropout_rate"
            need(not rate or 0 <= value <= 1, f"{prefix}geometry.{key}={value} must lie between 0 and 1.")


LOOKAHEADS = Limit(lambda n: 0 <= n <= 3, "is outside 0 to 3: 0 is conventional, 1 the paper's choice")


@dataclass
class PreGateConfig:
    """How routers are re-attached; `lookahead: 0` is the conventional model, `stacks: null` all stacks that it has.
    `weights`: who weighs the experts that a gate ahead has chosen. `start`: so many MoE blocks of each stack stay
    conventional. `gate`: whether gates that decide for another block are linear, or have beside it a network of two
    layers with `gate_width` hidden numbers."""

    lookahead: int = setting(1, LOOKAHEADS)
    stacks: list[str] | None = None
    entry: Entry = Entry.own
    init: Init = Init.source
    weights: Weights = Weights.early
    start: int = setting(0, at_least(0))
    gate: GateKind = GateKind.linear
    gate_width: int = setting(256, at_least(1))

    def check(self, prefix: str) -> None:
        need(
            self.lookahead > 0 or self.gate == GateKind.linear,
            f"{prefix}gate={self.gate} needs a gate that decides ahead, and {prefix}lookahead=0 has none: set "
            f"{prefix}lookahead=1, or leave {prefix}gate out.",
        )
        named = self.stacks
        need(
            named is None or 0 < len(named) == len(set(named)),
            f"{prefix}stacks={named} must name at least one stack, each once, or be null for all.",
        )


@dataclass
class DataConfig:
    """`cache`: where the tokens of the training examples are kept; null is `PREGATE_CACHE`, or else a folder `pregate`
    in the cache of Hugging Face's libraries."""

    root: str | None = None
    cache: str | None = None
    max_train_examples: int | None = None
    num_workers: int = setting(0, at_least(0))


DROPOUT = Limit(lambda rate: 0 <= rate < 1, "must lie in [0, 1), or be null to keep the model's own")


@dataclass
class TrainConfig:
    """One fine-tuning (or from-scratch) run. Batch sizes count sequences over all devices per optimizer step.

    `steps: 0` of `train` leaves the converted model as it is. `teacher`: a model of the same family (directory or hub
    id) to learn from beside the data; `distill_logits` and `distill_routing` weight what is learned from it, see
    `pregate.training.distill`, and `distill_temperature` softens the output logits. `distill_data: generations` puts
    the teacher's answers in place of the targets. `packing`: several examples stand in one row and do not see each
    other. `keep_last`: how many states to resume from are kept, the newest included.
    `sharding: full` splits weights, gradients and optimizer state over the processes (FSDP2). `experts: offloaded`:
    those of the model and of its teacher stay frozen where `engine` says. `lora`: what learns beside the gates with
    `trainable: lora`.
    """

    steps: int = setting(2048, at_least(0))
    batch_sequences: int = setting(256, at_least(1))
    micro_batch_tokens: int = setting(4096, at_least(1))
    packing: bool = False
    optimizer: Optimizer = Optimizer.adamw
    learning_rate: float = setting(1e-4, above(0))
    weight_decay: float = 0.0
    schedule: Schedule = Schedule.constant
    warmup_steps: int = 0
    clip_norm: float | None = setting(1.0, above(0, ", or null for no clipping"))
    precision: Precision = Precision.auto
    balance_loss: float = 1e-2
    z_loss: float = 1e-3
    dropout: float | None = setting(None, DROPOUT)
    teacher: str | None = None
    distill_logits: float = setting(0.0, WEIGHT)
    distill_routing: float = setting(0.0, WEIGHT)
    distill_routing_loss: RoutingLoss = RoutingLoss.kl
    distill_temperature: float = setting(1.0, TEMPERATURE)
    distill_data: DistillData = DistillData.task
    trainable: Trainable = Trainable.all
    experts: Experts = Experts.resident
    lora: LoraConfig = field(default_factory=LoraConfig)
    keep: Keep = Keep.best
    expert_path: ExpertPath = ExpertPath.grouped
    gradient_checkpointing: bool = False
    sharding: Sharding = Sharding.none
    eval_every: int = setting(256, at_least(1))
    eval_examples: int = setting(256, at_least(1))
    save_every: int = setting(256, at_least(1))
    keep_last: int = setting(2, at_least(1))
    log_every: int = setting(10, at_least(1))

    def check(self, prefix: str) -> None:
        need(
            self.warmup_steps >= 0 and (self.warmup_steps <= self.steps or self.steps == 0),
            f"{prefix}warmup_steps={self.warmup_steps} must lie between 0 and {prefix}steps={self.steps}.",
        )
        need(
            self.trainable is Trainable.lora or self.lora == LoraConfig(),
            f"{prefix}lora is for {prefix}trainable=lora: set both, or leave it out.",
        )
        weighted = self.distill_logits > 0 or self.distill_routing > 0
        need(
            not weighted or self.teacher is not None,
            f"{prefix}distill_logits and {prefix}distill_routing need a teacher: set {prefix}teacher=DIR_OR_ID, or "
            "both to 0.",
        )
        need(
            weighted or self.distill_data is DistillData.generations or self.teacher is None,
            f"{prefix}teacher={self.teacher} teaches nothing: set {prefix}distill_logits or {prefix}distill_routing "
            f"above 0, or {prefix}distill_data=generations, or {prefix}teacher=null.",
        )
        need(
            self.distill_routing > 0 or self.distill_routing_loss is RoutingLoss.kl,
            f"{prefix}distill_routing_loss={self.distill_routing_loss} has no weight: set {prefix}distill_routing "
            "above 0, or leave it out.",
        )
        whole = self.sharding == Sharding.none
        need(
            whole or self.optimizer in (Optimizer.adamw, Optimizer.adamw_scaled),
            f"{prefix}optimizer={self.optimizer} needs whole matrices, and {prefix}sharding={self.sharding} splits "
            f"them: set {prefix}optimizer=adamw or adamw_scaled, or {prefix}sharding=none.",
        )
        need(
            whole or self.trainable is not Trainable.lora,
            f"{prefix}trainable=lora needs whole matrices, and {prefix}sharding={self.sharding} splits them: set "
            f"{prefix}sharding=none.",
        )
        resident = self.experts is Experts.resident
        need(
            self.distill_data is DistillData.task or (self.teacher is not None and whole and resident),
            f"{prefix}distill_data={self.distill_data} needs a teacher that is whole in memory: set "
            f"{prefix}teacher=DIR_OR_ID, {prefix}sharding=none and {prefix}experts=resident.",
        )
        need(
            resident or self.trainable in (Trainable.all_but_experts, Trainable.gates),
            f"{prefix}experts=offloaded leaves the experts as they are and has no adapters: set "
            f"{prefix}trainable=all_but_experts or gates instead of {self.trainable}, or {prefix}experts=resident.",
        )
        need(
            resident or self.expert_path is ExpertPath.grouped,
            f"{prefix}expert_path={self.expert_path} needs the experts in memory: leave it out, or set "
            f"{prefix}experts=resident.",
        )


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


FILLED = {"empty": "name at least one, or leave the setting out"}
EACH_POSITIVE = {"each": Limit(lambda value: value > 0, "must all be at least 1")}


@dataclass
class BenchConfig:
    """What `pregate.bench` measures: one row for each combination of the lists that makes sense, for every policy of
    `engine.policies`.

    `drives`: values of `engine.drive`; what `device` cannot serve is measured with `host` alone. `models`: members of
    the model group, served with random weights, in `dtype` or in one of their own as in
    `switch_large_128@bf16`; a `checkpoint` given takes their place. `num_blocks`: so many MoE blocks a stack of each of
    them, for a machine that is too small for all; the rows say so. `budgets`: values of `engine.device_budget`.
    `active_experts`: route every block to exactly so many experts (empty: as the gates decide). `new_tokens`,
    `repeats`, `warmup` (tokens and requests) are per row; prefetch_all and Accelerate decode `slow_new_tokens`
    at most, and no row begins another repeat after `max_seconds_per_row`.
    """

    models: list[str] = field(default_factory=list)
    dtype: Precision = Precision.auto
    num_blocks: int | None = setting(None, at_least(1, ", or null for all"))
    tiers: list[Tier] = field(default_factory=lambda: [Tier.auto], metadata=FILLED)
    drives: list[Drive] = field(default_factory=lambda: [Drive.host], metadata=FILLED)
    slab_dtypes: list[SlabDtype] = field(default_factory=lambda: [SlabDtype.source], metadata=FILLED)
    caches: list[CacheRule] = field(default_factory=lambda: [CacheRule.none], metadata=FILLED)
    budgets: list[str | None] = field(default_factory=lambda: [None], metadata=FILLED)
    batches: list[int] = field(default_factory=lambda: [1], metadata=FILLED | EACH_POSITIVE)
    active_experts: list[int] = field(default_factory=list, metadata=EACH_POSITIVE)
    baselines: list[Baseline] = field(default_factory=lambda: [Baseline.resident])
    prompt_len: int = setting(256, at_least(1))
    new_tokens: int = setting(32, at_least(2, ", to time tokens apart"))
    slow_new_tokens: int = setting(4, at_least(2, ", to time tokens apart"))
    repeats: int = setting(3, at_least(1))
    warmup: int = setting(1, at_least(1))
    max_seconds_per_row: int = setting(60, at_least(1))

    def check(self, prefix: str) -> None:
        for budget in self.budgets:
            share_of(f"{prefix}budgets", budget or "")


@dataclass
class EvalConfig:
    split: str | None = None
    examples: int | None = setting(None, at_least(1, ", or null for the whole split"))
    batch_size: int = setting(16, at_least(1))
    num_beams: int = setting(1, at_least(1))
    max_new_tokens: int | None = setting(None, at_least(1, ", or null for task.max_target_tokens"))
    agreement_examples: int = setting(64, at_least(0))
    bootstrap_samples: int = setting(2000, at_least(1))
    report: bool = True


@dataclass
class TrackingConfig:
    kind: Tracker = Tracker.wandb
    mode: WandbMode = WandbMode.auto
    project: str = "pregate"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    log_checkpoint: bool = False


NAMED = {"empty": "give it a value, or leave it out"}


@dataclass
class Run:
    """Everything one command needs; built once by `entry_point`, never changed. `overrides`: the command line.

    `allow_changes`: what a resumed run may have otherwise than before although its result changes: names of settings or
    of sections, and `processes`.
    """

    name: str = field(default="run", metadata=NAMED)
    run_dir: str = field(default="runs/run", metadata=NAMED)
    seed: int = 0
    resume: bool = False
    allow_changes: list[str] = field(default_factory=list)
    then_eval: bool = True
    plan: bool = False
    source: str | None = None
    output: str | None = None
    checkpoint: str | None = None
    reference: str | None = None
    overrides: list[str] = field(default_factory=list)
    model: ModelConfig = field(default_factory=ModelConfig)
    pregate: PreGateConfig = field(default_factory=PreGateConfig)
    data: DataConfig = field(default_factory=DataConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    source_train: TrainConfig | None = None
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        """Refuse what cannot work, before any work starts. Raises `UsageError`.

        A section does not check itself, because only the run knows its name: `train` and `source_train` share a class.
        """
        check_section(self, "")

    def check(self, prefix: str) -> None:
        """What concerns several sections."""
        gate, source = self.pregate, self.source_train
        need(
            not (gate.init is Init.calibrated and gate.lookahead and self.task.kind in PRE_TRAINING),
            "pregate.init=calibrated fits the gates of a trained model, which pre-training has none of: leave it out.",
        )
        # a run may leave its converted model as it is, but a source must be trained
        need(source is None or source.steps > 0, "source_train.steps=0 must be at least 1.")
        need(
            source is None or source.experts is Experts.resident,
            "source_train.experts=offloaded leaves experts as they are, and a model that is trained from scratch has "
            "none on the disk: set source_train.experts=resident.",
        )


def to_dict(run: Run) -> dict[str, Any]:
    """The `Run` as plain JSON-able values, as written to `config.yaml` and sent to trackers."""
    return json.loads(json.dumps(asdict(run)))


def save_run(run: Run, path: Path) -> None:
    write_text(path, OmegaConf.to_yaml(OmegaConf.create(to_dict(run))))
