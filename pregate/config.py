"""The one typed schema of every entry point: what may be set. Which combinations cannot work: `config_check`.

Knows nothing about Hydra's command line (`cli`), torch, models or data. YAML is merged into these dataclasses before
any work starts. A `Run` is read-only by convention: nothing downstream writes to it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from pregate.system.durable import write_text


class UsageError(ValueError):
    """The user's input cannot work; the message is one sentence that says what to do instead."""


class Entry(StrEnum):
    own = "own"
    embedding = "embedding"


class Init(StrEnum):
    source = "source"
    random = "random"
    calibrated = "calibrated"


class TaskKind(StrEnum):
    qa = "qa"
    summarization = "summarization"
    classification = "classification"
    denoising = "denoising"


class Optimizer(StrEnum):
    adamw = "adamw"
    adamw_scaled = "adamw_scaled"
    adafactor = "adafactor"


class Schedule(StrEnum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Precision(StrEnum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class Trainable(StrEnum):
    """Which parameters learn: all, or the gates alone while the rest stays as it is."""

    all = "all"
    gates = "gates"


class Keep(StrEnum):
    """Which state becomes the checkpoint: the best in validation, or the last, which no validation has chosen."""

    best = "best"
    last = "last"


class ExpertPath(StrEnum):
    reference = "reference"
    grouped = "grouped"


class Policy(StrEnum):
    gpu_only = "gpu_only"
    on_demand = "on_demand"
    prefetch_all = "prefetch_all"
    pre_gated = "pre_gated"


class Tier(StrEnum):
    auto = "auto"
    dram = "dram"
    disk = "disk"


class Drive(StrEnum):
    """Who decides what moves while decoding: the host, step by step, or the device inside one captured step."""

    host = "host"
    device = "device"


class CacheRule(StrEnum):
    """Which used slab leaves its slot first; `none`: all of them, at once."""

    none = "none"
    lru = "lru"
    lfu = "lfu"
    lifo = "lifo"


class SlabDtype(StrEnum):
    """How experts are stored and moved: as in the checkpoint, or weight-only quantised with a scale for each row."""

    source = "source"
    int8 = "int8"
    fp8 = "fp8"


class Baseline(StrEnum):
    """What a benchmark measures beside the engine's policies."""

    resident = "resident"
    accelerate = "accelerate"


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Tracker(StrEnum):
    wandb = "wandb"
    jsonl = "jsonl"


class WandbMode(StrEnum):
    auto = "auto"
    online = "online"
    offline = "offline"


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


@dataclass
class PreGateConfig:
    """How routers are re-attached; `lookahead: 0` is the conventional model. `stacks`: null means all of them."""

    lookahead: int = 1
    stacks: list[str] | None = None
    entry: Entry = Entry.own
    init: Init = Init.source


@dataclass
class GeneratedConfig:
    """The generated reading-comprehension set of the quickstart (see `pregate.tasks.generated`)."""

    seed: int = 0
    train: int = 20000
    validation: int = 500
    facts: int = 5
    vocab_size: int = 512


@dataclass
class TaskConfig:
    """What is learned and scored. `columns` maps a record field to a column, with dots into structs.

    `header`: the names of the columns of csv and tsv files that have none in their first line.
    `noise_density` (share of tokens that are hidden) and `mean_span_tokens` are those of span corruption.
    """

    name: str = "squad"
    kind: TaskKind = TaskKind.qa
    hub: str | None = None
    hub_config: str | None = None
    hub_revision: str | None = None
    files: dict[str, str | None] = field(default_factory=lambda: dict.fromkeys(("train", "validation", "test")))
    header: list[str] = field(default_factory=list)
    generated: GeneratedConfig | None = None
    train_split: str = "train"
    eval_split: str = "validation"
    columns: dict[str, str | None] = field(default_factory=dict)
    group_by: str | None = None
    prompt: str = "question: {question} context: {context}"
    labels: list[str] = field(default_factory=list)
    primary_metric: str = "em"
    max_source_tokens: int = 256
    max_target_tokens: int = 32
    noise_density: float = 0.15
    mean_span_tokens: float = 3.0


@dataclass
class DataConfig:
    root: str | None = None
    max_train_examples: int | None = None
    num_workers: int = 0


@dataclass
class TrainConfig:
    """One fine-tuning (or from-scratch) run. Batch sizes count sequences over all devices per optimizer step.

    `steps: 0` of `train` leaves the converted model as it is. `teacher`: a model of the same family (directory or hub
    id) to learn from beside the data; `distill_logits` and `distill_routing` weight what is learned from it, see
    `pregate.training.distill`, and `distill_temperature` softens the output logits.
    """

    steps: int = 2048
    batch_sequences: int = 256
    micro_batch_tokens: int = 4096
    optimizer: Optimizer = Optimizer.adamw
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    schedule: Schedule = Schedule.constant
    warmup_steps: int = 0
    clip_norm: float | None = 1.0
    precision: Precision = Precision.auto
    balance_loss: float = 1e-2
    z_loss: float = 1e-3
    dropout: float | None = None
    teacher: str | None = None
    distill_logits: float = 0.0
    distill_routing: float = 0.0
    distill_temperature: float = 1.0
    trainable: Trainable = Trainable.all
    keep: Keep = Keep.best
    expert_path: ExpertPath = ExpertPath.grouped
    gradient_checkpointing: bool = False
    eval_every: int = 256
    eval_examples: int = 256
    save_every: int = 256
    log_every: int = 10


@dataclass
class CalibrationConfig:
    """How `pregate.init: calibrated` fits gates, without training anything else (see `pregate.conversion.calibration`).

    Examples of the training split are drawn until there are `examples` of them or `tokens` in their sources and targets
    together, and pass through the models `batch_size` at a time. The share `held_out` of them chooses between fits.
    `steps`: most iterations that refine a fit at each temperature; 0 leaves the closed form.
    """

    examples: int = 1024
    tokens: int = 24576
    held_out: float = 0.2
    batch_size: int = 32
    steps: int = 20


@dataclass
class EngineConfig:
    """How the offloaded engine serves. `device_budget` is bytes ("4GB"), a share of all experts ("25%") or null.

    `drive: device` decodes without the host: experts in host memory, greedy decoding or sampling by temperature.
    `tier: auto` is page-locked host memory for a GPU, and the disk where the compute device is host memory itself.
    `host_budget`: host memory that caches slabs of the disk tier, in the units of `device_budget`; null is none.
    `cache`: what becomes of used experts in their slots; `none` as in the paper. `io_threads`: slabs in flight from the
    disk. `io_uring`: on a CPU let the kernel read by itself where it can, not threads.
    """

    policy: Policy = Policy.pre_gated
    policies: list[Policy] = field(default_factory=lambda: list(Policy))
    tier: Tier = Tier.auto
    drive: Drive = Drive.host
    device: Device = Device.auto
    device_budget: str | None = None
    pack_dir: str | None = None
    host_budget: str | None = None
    cache: CacheRule = CacheRule.none
    slab_dtype: SlabDtype = SlabDtype.source
    io_threads: int = 2
    io_uring: bool = True
    bench_prompts: int = 4
    bench_new_tokens: int = 16
    bench_repeats: int = 3


@dataclass
class BenchConfig:
    """What `pregate.bench` measures: one row for each combination of the lists that makes sense, for every policy of
    `engine.policies`.

    `drives`: values of `engine.drive`; what `device` cannot serve is measured with `host` alone. `models`: members of
    the model group, served with random weights, in `dtype` or in one of their own as in
    `switch_large_128@bf16`; a `checkpoint` given takes their place. `budgets`: values of `engine.device_budget`.
    `active_experts`: route every block to exactly so many experts (empty: as the gates decide). `new_tokens`,
    `repeats`, `warmup` (tokens and requests) are per row; prefetch_all and Accelerate decode `slow_new_tokens`
    at most, and no row begins another repeat after `max_seconds_per_row`.
    """

    models: list[str] = field(default_factory=list)
    dtype: Precision = Precision.auto
    tiers: list[Tier] = field(default_factory=lambda: [Tier.auto])
    drives: list[Drive] = field(default_factory=lambda: [Drive.host])
    slab_dtypes: list[SlabDtype] = field(default_factory=lambda: [SlabDtype.source])
    caches: list[CacheRule] = field(default_factory=lambda: [CacheRule.none])
    budgets: list[str | None] = field(default_factory=lambda: [None])
    batches: list[int] = field(default_factory=lambda: [1])
    active_experts: list[int] = field(default_factory=list)
    baselines: list[Baseline] = field(default_factory=lambda: [Baseline.resident])
    prompt_len: int = 256
    new_tokens: int = 32
    slow_new_tokens: int = 4
    repeats: int = 3
    warmup: int = 1
    max_seconds_per_row: int = 60


@dataclass
class EvalConfig:
    split: str | None = None
    examples: int | None = None
    batch_size: int = 16
    num_beams: int = 1
    max_new_tokens: int | None = None
    agreement_examples: int = 64
    bootstrap_samples: int = 2000
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


@dataclass
class Run:
    """Everything one command needs; built once by `entry_point`, never changed. `overrides`: the command line."""

    name: str = "run"
    run_dir: str = "runs/run"
    seed: int = 0
    resume: bool = False
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


def to_dict(run: Run) -> dict[str, Any]:
    """The `Run` as plain JSON-able values, as written to `config.yaml` and sent to trackers."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, StrEnum) else value

    return plain(asdict(run))


def save_run(run: Run, path: Path) -> None:
    from omegaconf import OmegaConf

    write_text(path, OmegaConf.to_yaml(OmegaConf.create(to_dict(run))))
