"""Optimizers, learning-rate schedules, clipping and the dtype of the forward pass.

Knows `TrainConfig` and torch parameters; knows nothing about batches, losses or checkpoints. Schedules are pure
functions of the step, so there is no scheduler state to save.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.optimization import Adafactor

from pregate.config import Optimizer, Precision, Schedule, TrainConfig, UsageError
from pregate.models.nonlinear import NAME as NONLINEAR
from pregate.training.sharding import local, whole

CLIP_MARGIN = 1e-6
"""What torch adds to the norm of the gradients before it divides by it."""
LEAST_RMS = 1e-3
"""For steps relative to a parameter's size: a smaller one counts as that large, or zeros would never move."""
BEGIN_AT_ZERO = re.compile(rf"\.lora_B\.|\.{NONLINEAR}\.down$")
"""The names of matrices that begin at zero, so that what they belong to changes nothing at first."""
LEAST_8BIT = 4096
"""Of fewer numbers than these bitsandbytes keeps the moments in float32."""


def learning_rate(train: TrainConfig, step: int) -> float:
    """The learning rate of update number `step`, counted from 0.

    Warm-up rises linearly and reaches `train.learning_rate` with update `warmup_steps - 1`. After it, `linear` and
    `cosine` fall towards 0, which they would reach at update `train.steps`.
    """
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    if train.schedule == Schedule.constant:
        return train.learning_rate
    done = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    if train.schedule == Schedule.linear:
        return train.learning_rate * (1.0 - done)
    return train.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def freeze_all_but(model: nn.Module, learning: Iterable[nn.Module]) -> None:
    """Let only the parameters of the modules `learning` have gradients."""
    model.requires_grad_(False)
    for module in learning:
        module.requires_grad_(True)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Trainable parameters in two groups; norms and biases, relative position biases included, do not decay."""
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim < 2 or "bias" in name else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (fused on CPU and CUDA), AdamW with steps relative to each parameter's size or with moments of 8 bits, or
    Adafactor with a fixed learning rate and no parameter scaling."""
    groups = parameter_groups(model, train.weight_decay)
    rate = learning_rate(train, 0)
    if train.optimizer == Optimizer.adafactor:
        return Adafactor(groups, lr=rate, scale_parameter=False, relative_step=False, warmup_init=False)
    if train.optimizer == Optimizer.adamw_8bit:
        from bitsandbytes.optim.adamw import AdamW8bit

        return AdamW8bit(groups, lr=rate)
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in model.parameters())
    if train.optimizer == Optimizer.adamw_scaled:
        return ScaledAdamW(groups, least_rms(model), lr=rate, fused=fused)
    return torch.optim.AdamW(groups, lr=rate, fused=fused)


def least_rms(model: nn.Module) -> dict[nn.Parameter, float]:
    """How large the matrices that begin at zero count at least: as a random one with as many inputs, or a step relative
    to their size would be too small to see."""
    return {p: p.shape[-1] ** -0.5 for name, p in model.named_parameters() if BEGIN_AT_ZERO.search(name)}


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """The size that the state of `optimizer` will have, which is made in its first step; but for a few scalars."""
    shapes = [tuple(p.shape) for group in optimizer.param_groups for p in group["params"]]
    if isinstance(optimizer, torch.optim.AdamW):
        return state_bytes(Optimizer.adamw, shapes)
    return state_bytes(Optimizer.adamw_8bit if has_8bit_state(optimizer) else Optimizer.adafactor, shapes)


def state_bytes(kind: Optimizer, shapes: Iterable[tuple[int, ...]]) -> int:
    """The size of the state of an optimizer for float32 parameters of these shapes; but for a few scalars."""
    return sum(_state_bytes(kind, shape) for shape in shapes)


def _state_bytes(kind: Optimizer, shape: tuple[int, ...]) -> int:
    size = math.prod(shape)
    if kind is Optimizer.adafactor and len(shape) > 1:
        # second moments: of a matrix the means of its rows and of its columns
        return 4 * (size // shape[-1] + size // shape[-2])
    if kind is Optimizer.adafactor:
        return 4 * size
    if kind is Optimizer.adamw_8bit and size >= LEAST_8BIT:
        # two code books of 256 numbers, and a scale for each 256 moments
        return 2 * size + 8 * -(-size // 256) + 2048
    return 8 * size


def has_8bit_state(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer).__name__ == "AdamW8bit"


def check_8bit(train: TrainConfig) -> None:
    """Raises `UsageError` where moments of 8 bits are asked for and the package that keeps them is missing."""
    if train.optimizer == Optimizer.adamw_8bit and find_spec("bitsandbytes") is None:
        raise UsageError(
            "train.optimizer=adamw_8bit needs the package bitsandbytes: pip install '.[8bit]' in the directory of "
            "pregate, or pip install bitsandbytes, or set train.optimizer=adafactor."
        )


class ScaledAdamW(torch.optim.AdamW):
    """AdamW whose learning rate is relative: that of a parameter is multiplied by the root mean square of its values.

    Adafactor's parameter scaling (Shazeer and Stern 2018, section 8) on AdamW, as in nanoT5 (Nawrot 2023). T5 draws
    embeddings with a standard deviation of 1 and matrices with one of a tenth or less, so that one absolute rate is too
    small for the ones or too large for the others. `least`: the least size that a parameter counts as, where that is
    not `LEAST_RMS`.
    """

    def __init__(self, groups: list[dict[str, Any]], least: Mapping[nn.Parameter, float], **options: Any) -> None:
        super().__init__([{**group, "params": [p]} for group in groups for p in group["params"]], **options)
        self._least = least

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        rates = [group["lr"] for group in self.param_groups]
        parameters = [group["params"][0] for group in self.param_groups]
        norms = norms_of(parameters).tolist()
        for group, parameter, rate, norm in zip(self.param_groups, parameters, rates, norms, strict=True):
            least = self._least.get(parameter, LEAST_RMS)
            group["lr"] = rate * max(least, norm / math.sqrt(parameter.numel()))
        try:
            return super().step(closure)
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate


def norms_of(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of each tensor, in fp32. Of sharded ones all processes must ask, and one message tells all norms."""
    norms = torch.stack([torch.linalg.vector_norm(local(tensor), dtype=torch.float32) for tensor in tensors])
    if not any(isinstance(tensor, DTensor) for tensor in tensors):
        return norms
    squares = norms.square()
    torch.distributed.all_reduce(squares)
    return squares.sqrt()


def clip_gradients(parameters: Iterable[nn.Parameter], clip_norm: float | None) -> Tensor:
    """Scale gradients down to `clip_norm` if it is given; return the norm they had before."""
    parameters = [p for p in parameters if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    # a factor of 1 would read and write every gradient
    if clip_norm is not None and norm > clip_norm - CLIP_MARGIN:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    return norm


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """The dtype to autocast the forward pass to, or None for none.

    `auto` is bf16 on a CUDA device that has it in hardware and fp32 elsewhere; weights and optimizer stay as they are.
    """
    if precision == Precision.auto:
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else None
    return torch.bfloat16 if precision == Precision.bf16 else None


def set_dropout(model: nn.Module, probability: float) -> None:
    """Override dropout everywhere: in `nn.Dropout` modules and in attention modules that keep it as a number."""
    holder: Any
    for holder in model.modules():
        if isinstance(holder, nn.Dropout):
            holder.p = probability
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(holder, name, None), float | int):
                setattr(holder, name, probability)
