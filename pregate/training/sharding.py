"""A model whose weights, gradients and optimizer state are split over the processes (FSDP2).

Every layer is gathered when it runs, in the forward and in the backward pass, and let go after it. So the processes
must make the same calls in the same order, whatever their examples are. Knows torch's `fully_shard`; knows nothing
about files.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from pregate.config import Sharding
from pregate.models.family import family_of_model


class ShardedModel:
    """What a training does with a model that it has sharded, in place. `layers`: sharded one by one."""

    def __init__(self, model: Any, layers: Sequence[nn.Module], device: torch.device) -> None:
        self.model, self.layers = model, layers
        # of each layer that the backward pass went through, since the last step
        self._used: dict[nn.Module, list[bool]] = {}
        self._device = device
        for layer in layers:
            # behind the hook by which FSDP gathers, so that in the backward pass it comes before that by which it sums
            layer.register_forward_pre_hook(self._complete_gradients, with_kwargs=True)

    def _complete_gradients(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Note which parameters of `layer` the backward pass reaches, and give the others a gradient of zeros there.

        An expert without tokens has no gradient on this process and perhaps one on another. FSDP sums what has one, and
        would sum tensors of different length.
        """
        if not torch.is_grad_enabled():
            return args, kwargs

        def complete() -> None:
            learning = _learning(layer)
            used = self._used.setdefault(layer, [False] * len(learning))
            for index, parameter in enumerate(learning):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                else:
                    used[index] = True

        hidden, *rest = args
        return (_InBackward.apply(hidden, complete), *rest), kwargs

    def drop_unused(self) -> None:
        """Take the gradients of zeros away again from parameters that no process has used in the whole step, so that
        the optimizer passes them over as it does in one process."""
        parameters = {layer: _learning(layer) for layer in self.layers}
        here = [self._used.get(layer, [True] * len(learning)) for layer, learning in parameters.items()]
        anywhere = torch.tensor([int(used) for layer in here for used in layer], device=self._device)
        torch.distributed.all_reduce(anywhere, torch.distributed.ReduceOp.MAX)
        all_parameters = (parameter for learning in parameters.values() for parameter in learning)
        for parameter, used in zip(all_parameters, anywhere.tolist(), strict=True):
            if not used:
                parameter.grad = None
        self._used.clear()

    @contextmanager
    def generating(self) -> Iterator[None]:
        """While it lasts, parts of the model can be called by themselves, as `generate` does."""
        self.model.unshard()
        try:
            yield
        finally:
            self.let_go()

    def let_go(self) -> None:
        """Keep only the parts of this process, where forward passes without a backward pass have gathered more."""
        for module in (*self.layers, self.model):
            module.reshard()  # type: ignore[operator]


class _InBackward(torch.autograd.Function):
    """The identity; calls `work` when the gradient passes."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, work: Any) -> Tensor:
        ctx.work = work
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.work()
        return grads[0], None


def _learning(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def splits(sharding: Sharding, num_processes: int) -> bool:
    """Whether a model is split over the processes."""
    return sharding == Sharding.full and num_processes > 1


def shard(model: Any, sharding: Sharding, device: torch.device, num_processes: int) -> ShardedModel | None:
    """Shard `model` in place, its parts moved to `device`; None if that is not asked for, or there is one process.

    All processes must hold the same weights, or fill them in afterwards. Parameters are new objects afterwards.
    """
    if not splits(sharding, num_processes):
        return None
    mesh = init_device_mesh(device.type, (num_processes,))
    layers = [layer for stack in family_of_model(model).stacks for layer in model.stack_layers(stack)]
    # a layer may return a view (of a bias for attention); nobody changes it in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    # the rest, with which every call begins and ends: embeddings, the head, entry gates, the last norms
    fully_shard(model, mesh=mesh)
    return ShardedModel(model, layers, device)


def local(tensor: Tensor) -> Tensor:
    """The part of `tensor` that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of `tensor`, gathered where it is sharded: every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
