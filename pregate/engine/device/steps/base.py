"""What a static decoding step is, and what it asks of the experts. A family names its step in `Family.step`.

Letters: B batch, S source places, T target places, D model width, K experts per token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor

from pregate.engine.device.sampler_state import Sampler, Sampling, StepKind

Run = Callable[[Callable[..., Any], dict[str, Any]], Any]
"""Calls a model, or a part of it, with these arguments, while the host fetches its experts."""


class StepExperts(Protocol):
    """The experts of all blocks of a step. Called in the order of the computation, the same in every step."""

    def begin_step(self) -> None:
        """A decoding step begins: no route is known."""
        ...

    def commit(self, block: int, expert_ids_BTK: Tensor, live_B: Tensor) -> None:
        """The route of `block` is committed; rows that have ended need no expert."""
        ...

    def run(self, block: int, hidden_BD: Tensor, weights_BK: Tensor) -> Tensor:
        """The block's output (B, D) by its committed route; arbitrary for rows that have ended."""
        ...


class StaticStep(Protocol):
    """One token for every row, with fixed shapes and addresses, so that a graph can replay it."""

    continues_prompt: ClassVar[bool]
    """Whether the new tokens continue the prompt. Else they follow a start token."""
    sampler: Sampler

    def __init__(
        self, model: Any, experts: StepExperts, *, batch: int, max_source_len: int, max_new_tokens: int
    ) -> None: ...

    @staticmethod
    def check(config: Any) -> None:
        """Raises `UsageError` for a model of the family that the step cannot compute."""
        ...

    @property
    def listener(self) -> Any:
        """The listener of the model's routes, which a step does not call."""
        ...

    @property
    def num_bytes(self) -> int:
        """What the step's own tensors take."""
        ...

    def has_changed(self) -> bool:
        """Whether steps captured before the last call compute with what the model no longer has."""
        ...

    def read_prompt(self, run: Run, input_ids_BS: Tensor, attention_mask_BS: Tensor) -> Any:
        """What the model makes of a prompt, for `begin`."""
        ...

    def begin(self, prompt: Any, attention_mask_BS: Tensor, sampling: Sampling) -> None:
        """Start a request."""
        ...

    def step(self, kind: StepKind) -> None:
        """Append a token to every row. Never synchronises with the host; the same launches whatever the data."""
        ...

    def sequences(self, tokens_BT: Tensor, input_ids_BS: Tensor) -> Tensor:
        """What `generate` of the model returns: of the sampler's tokens and the prompt."""
        ...

    def output(self, sequences: Tensor, logits: Sequence[Tensor] | None) -> Any:
        """What `generate` of the model returns as a dictionary."""
        ...
