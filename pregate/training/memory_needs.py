"""What a training run needs before it starts: memory of the device, memory of the host, and disk.

Computed from geometry and settings; nothing is measured or allocated. Weights, gradients, optimizer and slots are
exact. Activations are an upper estimate of what torch keeps for the backward pass. Knows sizes; reads no weights.

Letters: D model width, F expert hidden width, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pregate.config import Experts, Learn, LoraTarget, Run, TaskKind, Tier, Trainable, TrainConfig
from pregate.engine.budget import host_buffers_within, resolve_tier
from pregate.engine.storage.slabs import SlabLayout
from pregate.engine.training_engine import training_slots
from pregate.models.checkpoint import read_config
from pregate.models.experts import ExpertSpec
from pregate.models.family import config_of, experts_of, family_named, family_of, family_of_model
from pregate.models.loading import open_model
from pregate.models.pregated_models import without_experts
from pregate.system.byte_sizes import human_bytes
from pregate.system.memory import free_memory
from pregate.training.lora import parts_of
from pregate.training.optimizer_and_schedule import autocast_dtype, state_bytes

STATES = 24
"""How many numbers of width D a layer keeps for each token, beside its experts."""
CHOSEN, ACTIVE = 3, 3
"""How many of width D and of width F the resident experts keep for each choice of a token."""
STREAMED = 5
"""How many of width D offloaded experts hold for each choice of a token, in one block at a time."""
SCORES = 3
"""How many of the size of the attention's scores are kept where attention is not computed in parts."""
FP32 = torch.float32.itemsize


@dataclass
class Needs:
    """Bytes by what they are for. `host` counts apart only where the device has memory of its own."""

    device: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)

    def line(self, device: torch.device) -> str:
        """A sentence to print."""
        parts, where = {"memory": self.device | self.host}, ""
        if device.type != "cpu":
            parts, where = {"memory on the device": self.device, "memory of the host": self.host}, " on the device"
        parts["disk"] = self.disk
        said = [_said(what, sizes) for what, sizes in parts.items() if sum(sizes.values())]
        free = human_bytes(free_memory(device))
        return f"This run needs about {'; '.join(said)}. {free} of memory are free{where}."


def _said(what: str, sizes: dict[str, int]) -> str:
    listed = ", ".join(f"{name} {human_bytes(size)}" for name, size in sizes.items() if size)
    return f"{human_bytes(sum(sizes.values()))} of {what} ({listed})"


def needs_of(run: Run, config: Any, dtype: torch.dtype, device: torch.device) -> Needs:
    """Of fine-tuning in `run`. `config` and `dtype` (of experts): those that the trained checkpoint will have."""
    train, model, spec = run.train, _outline(config), experts_of(config)
    offloaded = train.experts is Experts.offloaded
    others = [tuple(p.shape) for p in model.parameters()]
    gates = [tuple(p.shape) for gate in model.gates() for p in gate.parameters()]
    experts = list(spec.matrices.values()) * len(spec.keys())
    learning = {
        Trainable.all: others + experts,
        Trainable.all_but_experts: others,
        Trainable.gates: gates,
        Trainable.lora: gates + _adapters(train, model, spec),
    }[train.trainable]
    layout = SlabLayout.of(spec, dtype, run.engine.slab_dtype)
    optimizer = state_bytes(train.optimizer, learning)
    needs = Needs()
    needs.device["weights"] = FP32 * _count(others if offloaded else others + experts)
    needs.device["gradients"] = FP32 * _count(learning)
    needs.device["optimizer"] = optimizer
    needs.device["activations"] = _activations(run, config, model, spec)
    tier = resolve_tier(run.engine.tier, device)
    packed = len(spec.keys()) * layout.slab_bytes
    if offloaded:
        slots = training_slots(run.engine.device_budget, spec, layout.slab_bytes)
        needs.device["slots"] = slots * layout.slab_bytes + layout.is_quantised * layout.matrix_bytes
        needs.host["experts"] = packed if tier is Tier.dram else 0
        buffers = host_buffers_within(run.engine.host_budget, spec, layout.slab_bytes)
        needs.host["buffers"] = buffers * layout.slab_bytes if tier is Tier.disk else 0
    if train.teacher is not None:
        _add_teacher(needs, run, train.teacher, device)
    saved = FP32 * _count(learning if offloaded else others + experts)
    checkpoint = dtype.itemsize * _count(others + experts)
    needs.disk["conversion"] = checkpoint if _converts(run) else 0
    needs.disk["states"] = 2 * (saved + optimizer)
    needs.disk["checkpoint"] = checkpoint
    needs.disk["packed experts"] = packed if tier is Tier.disk and (offloaded or run.then_eval) else 0
    return needs


def _converts(run: Run) -> bool:
    """Whether the model to train is made of its source, and not the source itself."""
    source, revision = run.model.source, run.model.revision
    opened = None if source is None else read_config(source, revision)
    return run.pregate.lookahead > 0 and not (opened and family_of(opened).is_pregated(opened))


def _outline(config: Any) -> Any:
    """The model without its experts and without memory."""
    with without_experts(), torch.device("meta"):
        return family_named(config.model_type).model_class(config)


def _count(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)


def _adapters(train: TrainConfig, model: Any, spec: ExpertSpec) -> list[tuple[int, ...]]:
    """The shapes of what `train.lora` adds."""
    rank, matrices = train.lora.rank, list[tuple[int, ...]]()
    for target in train.lora.targets:
        if target is LoraTarget.experts:
            matrices += [shape for shape in spec.matrices.values() if len(shape) == 2] * len(spec.keys())
        else:
            linears = (module for part in parts_of(model, target) for module in part.modules())
            matrices += [tuple(module.weight.shape) for module in linears if isinstance(module, nn.Linear)]
    return [shape for rows, columns in matrices for shape in ((rank, columns), (rows, rank))]


def _activations(run: Run, config: Any, model: Any, spec: ExpertSpec) -> int:
    """Of one micro batch whose rows are as long as the task allows."""
    train, longest = run.train, run.task.max_source_tokens + run.task.max_target_tokens
    tokens, D = _rows(run) * longest, config.hidden_size
    K, F = spec.top_k, max(_count([shape]) for shape in spec.matrices.values()) // D
    layers = sum(len(model.stack_layers(stack)) for stack in family_of_model(model).stacks)
    offloaded = train.experts is Experts.offloaded
    of_experts = D if offloaded else K * (CHOSEN * D + ACTIVE * F)
    scores = 0 if model._supports_sdpa else SCORES * config.num_attention_heads * longest
    of_layer = STATES * D + scores
    blocks = sum(map(len, spec.layers.values()))
    if train.gradient_checkpointing:
        kept = layers * D + of_layer + of_experts
    else:
        kept = layers * of_layer + blocks * of_experts
    return FP32 * tokens * (kept + offloaded * STREAMED * K * D)


def _rows(run: Run) -> int:
    """The sequences of one micro batch."""
    train = run.train
    return max(1, min(train.batch_sequences, train.micro_batch_tokens // run.task.max_source_tokens))


def _add_teacher(needs: Needs, run: Run, teacher: str, device: torch.device) -> None:
    """A teacher that is not the source itself is taken to have other experts."""
    opened = open_model(teacher)
    config = config_of(opened.config)
    spec = experts_of(config)
    others = _count(tuple(p.shape) for p in _outline(config).parameters())
    experts = _count(spec.matrices.values()) * len(spec.keys())
    size = (autocast_dtype(run.train.precision, device) or torch.float32).itemsize
    if run.train.distill_logits:
        task = run.task
        learnt = task.max_source_tokens if task.kind is TaskKind.language_modelling else task.max_target_tokens
        if task.learn is Learn.everything:
            learnt = task.max_source_tokens + task.max_target_tokens
        needs.device["teacher's logits"] = size * _rows(run) * learnt * config.vocab_size
    if run.train.experts is Experts.resident:
        needs.device["teacher"] = size * (others + experts)
        return
    own = 0 if teacher == run.model.source else 1
    needs.device["teacher"] = size * others + own * needs.device["slots"]
    needs.host["experts"] *= 1 + own
