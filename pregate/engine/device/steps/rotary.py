"""One decoding step of a decoder-only model with rotary attention, with fixed shapes and fixed addresses.

The layers are the model's own, with its gates, residuals and shared experts; in the place of their attention, norms and
experts stand parts that keep their shapes. So a step computes what the model computes for one token a row, whatever
the family's router rule is. The position of the step's tokens is a tensor. How experts get where they are computed is
left to `StepExperts`.

Letters: B batch, S places of a prompt, T places of the cache, D model width, G key-value heads, C width of a head,
R half of the width that is turned, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerateDecoderOnlyOutput

from pregate.config import UsageError
from pregate.engine.device.recapture import is_same, state_of
from pregate.engine.device.sampler_state import Sampler, Sampling, StepKind
from pregate.engine.device.steps.base import Run, StepExperts
from pregate.engine.device.steps.shadow import shadow
from pregate.engine.device.steps.static_norm import static_norm
from pregate.engine.device.steps.static_rotary_attention import (
    Places,
    PromptLayer,
    StaticRotaryAttention,
)
from pregate.models.decoder_only import STACK
from pregate.models.route_handover import Routes
from pregate.models.routing import Routing

FIXED_FREQUENCIES = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embeddings whose frequencies no length changes."""


class RotaryDecoder:
    """The step of `model` for `batch` rows of at most `max_source_len` prompt and `max_new_tokens` new tokens.

    `read_prompt` fills the caches from all of a prompt but its last token, which is the input of the first step; each
    `step` appends a token a row.
    """

    continues_prompt: ClassVar[bool] = True

    def __init__(
        self, model: Any, experts: StepExperts, *, batch: int, max_source_len: int, max_new_tokens: int
    ) -> None:
        self._model, self._stack, self._config = model, model.model, model.config
        self._head, self._experts = model.lm_head, experts
        weight, attention = self._stack.embed_tokens.weight, self._stack.layers[0].self_attn
        self.batch, self.max_source_len, self.max_new_tokens = batch, max_source_len, max_new_tokens
        self._dtype = weight.dtype
        self.sampler = Sampler(batch, max_new_tokens + 1, self._config.vocab_size, weight.device)
        # the last new token is never an input
        length = max_source_len + max_new_tokens - 1
        shape = (2, batch, self._config.num_key_value_heads, length, attention.head_dim)
        self._caches = [torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in self._stack.layers]
        self._places = Places.empty(batch, length, weight.device)
        self._before_1 = torch.zeros(1, dtype=torch.int64, device=weight.device)
        """Places of the prompt before the first step's."""
        self._layers: list[Any] = []
        self._norm: Any = None
        self._state: list[Any] = []
        self.has_changed()

    @staticmethod
    def check(config: Any) -> None:
        """Raises `UsageError` for rotary embeddings whose frequencies depend on the length."""
        rope = getattr(config, "rope_parameters", None) or {}
        kind = rope.get("rope_type", "default")
        if kind not in FIXED_FREQUENCIES:
            raise UsageError(
                f"engine.drive=device has no rotary embeddings of the type {kind!r}, only "
                f"{', '.join(FIXED_FREQUENCIES)}: use engine.drive=host."
            )

    @property
    def listener(self) -> Any:
        """The listener of the model's routes, which a step does not call."""
        return self._stack.listener

    @torch.inference_mode()
    def has_changed(self) -> bool:
        """Whether a gate, a setting of one, or where a weight lies, is another than at the last call; what was captured
        before knows nothing of it. Gets ready for steps of the model as it is now."""
        blocks = list(self._model.moe_blocks())
        self._layers = [
            self._static(number, layer, next((block for block in blocks if block.layer == number), None))
            for number, layer in enumerate(self._stack.layers)
        ]
        self._norm = static_norm(self._stack.norm, self._dtype)
        gates = [*self._model.gates(), *(block.gates for block in blocks)]
        before, self._state = self._state, state_of(gates, (self._stack, self._head))
        return not is_same(before, self._state)

    def _static(self, number: int, layer: nn.Module, block: Any) -> Any:
        """The layer with parts that keep their shapes; `block`: its MoE block, or None."""
        parts: dict[str, Callable[..., Any]] = {
            name: static_norm(part, self._dtype) for name, part in layer.named_children()
        }
        parts["self_attn"] = StaticRotaryAttention(
            layer.self_attn, self._config, number, self._caches[number], self._places
        )
        if block is not None:
            name = next(name for name, part in layer.named_children() if part is block.module)
            parts[name] = shadow(block.module, experts=_BlockExperts(self._experts, block.index))
        return shadow(layer, **parts)

    @property
    def num_bytes(self) -> int:
        """What the step's own tensors take: caches, places, tokens and logits."""
        return sum(cache.nbytes for cache in self._caches) + self._places.num_bytes + self.sampler.num_bytes

    def read_prompt(self, run: Run, input_ids_BS: Tensor, attention_mask_BS: Tensor) -> Tensor:
        """Fill the caches with all of a prompt but its last token, and return its ids. Raises `UsageError` for a row
        that ends in padding."""
        if not bool(attention_mask_BS[:, -1].all()):
            raise UsageError("A row of the prompt ends in padding: pad the rows of a decoder-only model on the left.")
        before_BS = attention_mask_BS[:, :-1]
        if before_BS.shape[1]:
            positions_BS = (before_BS.long().cumsum(1) - 1).clamp_min(0)
            cache = Cache(layers=[PromptLayer(cache_2BGTC) for cache_2BGTC in self._caches])
            inputs = {"input_ids": input_ids_BS[:, :-1], "attention_mask": before_BS, "position_ids": positions_BS}
            run(self._stack, {**inputs, "past_key_values": cache, "use_cache": True})
        return input_ids_BS

    def sequences(self, tokens_BT: Tensor, input_ids_BS: Tensor) -> Tensor:
        """What `generate` of the model returns: the prompt and the new tokens."""
        return torch.cat([input_ids_BS[:, :-1], tokens_BT], dim=1)

    def output(self, sequences: Tensor, logits: Sequence[Tensor] | None) -> GenerateDecoderOnlyOutput:
        """What `generate` of the model returns as a dictionary."""
        kept: Any = None if logits is None else tuple(logits)
        return GenerateDecoderOnlyOutput(sequences=sequences, logits=kept)  # type: ignore[arg-type]

    @torch.inference_mode()
    def begin(self, prompt: Tensor, attention_mask_BS: Tensor, sampling: Sampling) -> None:
        """Start a request behind the prompt that `read_prompt` gave. Fewer rows than `batch` and fewer places than
        `max_source_len` are fine."""
        rows, places = attention_mask_BS.shape
        assert rows <= self.batch and places <= self.max_source_len
        self._places.begin(attention_mask_BS)
        self._before_1.fill_(places - 1)
        self.sampler.begin(sampling, rows, (prompt, attention_mask_BS))

    @torch.inference_mode()
    def step(self, kind: StepKind) -> None:
        """One token for every row. Never synchronises with the host; the same launches whatever the data."""
        sampler, places, stack = self.sampler, self._places, self._stack
        torch.add(self._before_1, sampler.position_1, out=places.place_1)
        hidden_B1D = _scaled(stack.embed_tokens(sampler.token_B[:, None]), stack.embedding_multiplier)
        self._experts.begin_step()
        routes = Routes(STACK, self._committed)
        for block, gate in stack.entry_gates.items():
            routes.commit(int(block), gate(hidden_B1D))
        turns = self._turns(hidden_B1D)
        for layer in self._layers:
            # not called: hooks of the layer are of the host's calls
            hidden_B1D = layer.forward(hidden_B1D, position_embeddings=turns, use_cache=False, routes=routes)
        logits_BV = self._head(self._norm(hidden_B1D))[:, 0]
        sampler.choose(_scaled(logits_BV, 1.0 / self._model.logits_scaling), kind)
        routes.end()

    def _turns(self, hidden_B1D: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine (B, R) of the step's positions. Upstream gives each twice, for both halves, or once."""
        rotary = self._stack.rotary_emb
        half = rotary.inv_freq.shape[-1]
        positions_B1 = (self._places.place_1 - self._places.padding_B)[:, None]
        cos_B1R, sin_B1R = rotary(hidden_B1D, positions_B1)
        return cos_B1R[:, 0, :half].contiguous(), sin_B1R[:, 0, :half].contiguous()

    def _committed(self, _: str, block: int, routing: Routing) -> None:
        self._experts.commit(block, routing.expert_ids_BTK, self.sampler.live_B)


def _scaled(states: Tensor, factor: float) -> Tensor:
    """One launch less where there is nothing to scale."""
    return states if factor == 1.0 else states * factor


class _BlockExperts:
    """The experts of one block, called as upstream calls them."""

    def __init__(self, experts: StepExperts, block: int) -> None:
        self._experts, self._block = experts, block

    def __call__(self, hidden_BD: Tensor, _: Tensor, weights_BK: Tensor) -> Tensor:
        return self._experts.run(self._block, hidden_BD, weights_BK)
