"""The words that settings take, one enumeration for each kind of choice."""

from __future__ import annotations

from enum import StrEnum

Entry = StrEnum("Entry", ["own", "embedding"])
Weights = StrEnum("Weights", ["early", "late"])
"""Whose combine weights a block uses: those of the gate that has chosen its experts, or those of its own router."""
GateKind = StrEnum("GateKind", ["linear", "mlp"])
"""What a gate that decides for another block computes its logits with: its linear map, or that and a small network."""
Init = StrEnum("Init", ["source", "random", "calibrated"])
TaskKind = StrEnum("TaskKind", ["qa", "summarization", "classification", "chat", "denoising", "language_modelling"])
PRE_TRAINING = frozenset({TaskKind.denoising, TaskKind.language_modelling})
"""They learn from text alone and have no answers to score."""
Learn = StrEnum("Learn", ["answers", "last_answer", "everything"])
"""Which tokens of a decoder-only model's input are learnt."""
Optimizer = StrEnum("Optimizer", ["adamw", "adamw_scaled", "adamw_8bit", "adafactor"])
Schedule = StrEnum("Schedule", ["constant", "linear", "cosine"])
Precision = StrEnum("Precision", ["auto", "fp32", "bf16"])
Trainable = StrEnum("Trainable", ["all", "all_but_experts", "gates", "lora"])
"""Which parameters learn: all, all but the experts, the gates alone, or gates and adapters. The rest stays as it is."""
LoraTarget = StrEnum("LoraTarget", ["attention", "experts", "shared_experts", "dense"])
"""Which matrices get adapters; `dense`: those of feed-forward layers without experts."""
Experts = StrEnum("Experts", ["resident", "offloaded"])
"""Where the experts are in training: in memory with the rest, or frozen in the engine's store."""
Sharding = StrEnum("Sharding", ["none", "full"])
"""What of a training is split over several processes: nothing, each holds all; or weights, gradients and optimizer."""
RoutingLoss = StrEnum("RoutingLoss", ["kl", "rank"])
"""How a teacher's routes are learned: as distributions over experts, or as which experts stand above the rest."""
DistillData = StrEnum("DistillData", ["task", "generations"])
"""The targets beside which a teacher teaches: those of the task, or what the teacher itself answers."""
Keep = StrEnum("Keep", ["best", "last"])
"""Which state becomes the checkpoint: the best in validation, or the last, which no validation has chosen."""
ExpertPath = StrEnum("ExpertPath", ["reference", "grouped"])
Policy = StrEnum("Policy", ["gpu_only", "on_demand", "prefetch_all", "pre_gated"])
Tier = StrEnum("Tier", ["auto", "dram", "disk"])
Through = StrEnum("Through", ["memory", "engine"])
"""How calibration runs the source: with all of it in memory, or with its experts streamed, a layer at a time."""
CalibrationData = StrEnum("CalibrationData", ["task", "text", "generations"])
"""What gates are fitted on: the task's examples, a text file, or what the source itself answers to the task."""
Drive = StrEnum("Drive", ["host", "device"])
"""Who decides what moves while decoding: the host, step by step, or the device inside one captured step."""
CacheRule = StrEnum("CacheRule", ["none", "lru", "lfu", "lifo"])
"""Which used slab leaves its slot first; `none`: all of them, at once."""
SlabDtype = StrEnum("SlabDtype", ["source", "int8", "fp8"])
"""How experts are stored and moved: as in the checkpoint, or weight-only quantised with a scale for each row."""
Baseline = StrEnum("Baseline", ["resident", "accelerate"])
"""What a benchmark measures beside the engine's policies."""
Device = StrEnum("Device", ["auto", "cpu", "cuda"])
Tracker = StrEnum("Tracker", ["wandb", "jsonl"])
WandbMode = StrEnum("WandbMode", ["auto", "online", "offline"])
