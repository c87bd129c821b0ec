"""What pre-gated models of all families have in common, as mixins of their transformers classes.

Knows configs, saving and loading of such models, and models that are built without their experts. Knows nothing about
layers of a family.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from pregate.config import UsageError
from pregate.models.family import MoEBlock, family_named
from pregate.models.nonlinear import Nonlinear, up_std
from pregate.models.pregating import PreGating
from pregate.models.route_handover import RouteListener
from pregate.system.console import first_of

_experts_elsewhere: ContextVar[bool] = ContextVar("experts_elsewhere", default=False)


@contextmanager
def without_experts() -> Iterator[None]:
    """Models that are built inside have no experts. Their configs say nothing of it, so no file does either."""
    before = _experts_elsewhere.set(True)
    try:
        yield
    finally:
        _experts_elsewhere.reset(before)


def experts_elsewhere() -> bool:
    """Whether this code runs inside of `without_experts`."""
    return _experts_elsewhere.get()


@torch.no_grad()
def compute_buffers(model: Any, device: torch.device) -> None:
    """Compute what a model that was built on the meta device holds beside its parameters and loads from no file, such
    as the frequencies of rotary embeddings."""
    for module in list(model.modules()):
        waiting = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in waiting:
            setattr(module, name, torch.empty_like(getattr(module, name), device=device))
        if waiting:
            model._init_weights(module)


def place(model: Any, name: str, stored: Tensor, device: torch.device, dtype: torch.dtype) -> None:
    """Put a copy of `stored` where `model`, which was built on the meta device, has the parameter or buffer `name`: in
    `dtype`, or in float32 where upstream keeps it so, such as a correction bias."""
    wider = model._get_dtype_plan(dtype)  # part of a name -> dtype
    dtype = next((wide for part, wide in wider.items() if part in name), dtype)
    owned = stored.to(device=device, dtype=dtype, copy=True)
    # load_state_dict would walk all modules for each tensor
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    setattr(module, leaf, owned if leaf in module._buffers else nn.Parameter(owned, requires_grad=False))


class PreGatedConfig:
    """A config with a `pregate` section, in which the stacks are named. Raises `UsageError` for a stack that the model
    cannot have."""

    model_type: str
    pregate: dict[str, Any]

    @property
    def pregating(self) -> PreGating:
        return PreGating.from_dict(self.pregate)

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        num_blocks = family_named(self.model_type).num_blocks(self)
        self.pregate = self.pregating.within(num_blocks).to_dict()


class PreGatedModel:
    """A model, or one stack of it, that is loaded whole, saved whole and recomputed in a way that sees routes."""

    modules: Any
    config: Any
    config_class: Any

    def post_init(self) -> None:
        """As upstream's, and names the tensors that may be in a checkpoint though the model does not read them."""
        super().post_init()  # type: ignore[misc]
        extras = family_named(self.config.model_type).extras(self.config)
        self._keys_to_ignore_on_load_unexpected = self._keys_to_ignore_on_load_unexpected.union(extras)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, Nonlinear):
            init.normal_(module.up, mean=0.0, std=up_std(module.up.shape[1]))
            init.zeros_(module.down)

    @classmethod
    def is_custom_code(cls) -> bool:
        # upstream skips composite modules of "custom code" at initialisation, which leaves attention and experts
        # with unit-variance weights; ours initialise through transformers.initialization, as its own classes do
        return False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As upstream's, but a parameter without a weight is no random one, and a weight without a parameter is not
        dropped. Raises `UsageError` for both. `pregate.models.loading.load_resident` says so before it loads."""
        with_info = kwargs.pop("output_loading_info", False)
        kwargs["output_loading_info"] = True
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]
        model, info = loaded
        leftovers = family_named(cls.config_class.model_type).leftovers
        for what, keys in (("lack", info["missing_keys"]), ("hold unknown tensors, namely", info["unexpected_keys"])):
            names = sorted(set(keys) - leftovers)
            if names:
                raise UsageError(
                    f"The weights of {pretrained_model_name_or_path or 'the model'} {what} {first_of(names, 3)}: use "
                    "the complete weights of the model that its config.json describes."
                )
        return (model, info) if with_info else model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream's. Raises `UsageError` for a model without its experts, which the files would lack."""
        self._refuse_without_experts()
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream's. Raises `UsageError` as `save_pretrained` does, before the hub is asked for anything."""
        self._refuse_without_experts()
        return super().push_to_hub(*args, **kwargs)  # type: ignore[misc]

    @property
    def has_experts(self) -> bool:
        """Whether the experts are part of the model; an engine holds them elsewhere."""
        blocks = (module for module in self.modules() if getattr(module, "holds_experts", False))
        return all(next(block.experts.parameters(), None) is not None for block in blocks)

    def _refuse_without_experts(self) -> None:
        if not self.has_experts:
            raise UsageError(
                "This model cannot be saved, because an engine holds its experts: copy the directory that the engine "
                "was opened with, or load that with load_resident and save what it gives."
            )

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Recompute layers in the backward pass. Raises `ValueError` for the re-entrant variant, which does not see
        gradients of routes handed between layers."""
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if options["use_reentrant"]:
            raise ValueError("pre-gated models need gradient checkpointing with use_reentrant=False.")
        with warnings.catch_warnings():
            # the newer name calls this one, and this one's deprecation is upstream's matter, not the user's
            warnings.simplefilter("ignore", FutureWarning)
            super().gradient_checkpointing_enable(  # type: ignore[misc]
                gradient_checkpointing_kwargs=options, **kwargs
            )


class Gate(nn.Module):
    """A router, wherever it sits: maps hidden states (B, T, D) to a `Routing`. nonlinear: what is added to the logits
    of its linear map, or None."""

    nonlinear: Nonlinear | None

    @property
    def linear(self) -> Any:
        """The module that holds the weight (E, D) and the bias (E) or None."""
        raise NotImplementedError

    def read(self, hidden_BTD: Tensor) -> Tensor:
        """The states that the linear map sees, before any jitter."""
        return hidden_BTD

    def choices(self, logits_TE: Tensor) -> Tensor:
        """The experts (T, K) that its rule chooses by these logits, before any capacity."""
        raise NotImplementedError

    def weigh(self, hidden_BTD: Tensor, expert_ids_BTK: Tensor) -> Tensor:
        """The combine weights (B, T, K) that its rule gives to experts that were chosen elsewhere. No hook of the gate
        sees this: it decides nothing."""
        raise NotImplementedError


class ServedModel:
    """What conversion, training and engines ask of a whole model. A subclass says where its blocks and stacks are."""

    modules: Any
    accepts_loss_kwargs = False
    """For transformers' Trainer, which would take any `forward` with `**kwargs` to divide by the number of targets of
    all micro batches. The loss is the mean of its own batch, so the Trainer divides by their number."""

    def moe_blocks(self) -> Iterator[MoEBlock]:
        """Stack by stack, in the order of execution."""
        raise NotImplementedError

    def stack_module(self, stack: str) -> Any:
        """The module of a stack. It has `listener`, `entry_gates` and the layers of the stack."""
        raise NotImplementedError

    def stack_layers(self, stack: str) -> nn.ModuleList:
        """The layers of a stack, with experts or dense, in the order of execution."""
        raise NotImplementedError

    def gates(self, stack: str | None = None) -> Iterator[Gate]:
        """All gates, wherever they sit, or those of one stack."""
        within = self if stack is None else self.stack_module(stack)
        yield from (module for module in within.modules() if isinstance(module, Gate))

    def set_listener(self, listener: RouteListener | None) -> None:
        """Have `listener` get every route at the moment when it is committed; None stops that. Each forward call of a
        stack hands it to the routes of that call."""
        for stack in {block.stack for block in self.moe_blocks()}:
            self.stack_module(stack).listener = listener
