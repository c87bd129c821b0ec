"""The words that settings take, one enumeration for each kind of choice."""

from __future__ import annotations

from enum import StrEnum


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
