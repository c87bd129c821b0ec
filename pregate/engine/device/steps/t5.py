"""One decoding step of a Switch decoder with fixed shapes and fixed addresses, for as many replays as a request needs.

Computes what the model's own decoder computes for one token a row, from the same parameters and through the model's own
gates and norms: pre-gates of any lookahead, entry gates, conventional decoders. The position of the step's tokens is
a tensor, so nothing in it depends on the host. Knows the family's layers; how experts get where they are computed is
left to `StepExperts`.

Letters: B batch, S source places, T target places, D model width, E experts, K experts per token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.generation.utils import GenerateEncoderDecoderOutput

from pregate.engine.device.ops.residual_and_norm import add_norm, norm
from pregate.engine.device.recapture import is_same, state_of
from pregate.engine.device.sampler_state import Sampler, Sampling, StepKind
from pregate.engine.device.steps.base import Run, StepExperts
from pregate.engine.device.steps.gates import decide, for_steps, is_called
from pregate.engine.device.steps.static_t5_attention import (
    PositionBias,
    StaticCrossAttention,
    StaticSelfAttention,
    source_mask,
)
from pregate.models.families.switch_layers import PreGatedSparseMLP, finite
from pregate.models.families.switch_router import EmbeddingGate, SwitchGate
from pregate.models.route_handover import Routes
from pregate.models.routing import Routing


class StaticDecoder:
    """The decoder of `model` for `batch` rows of at most `max_source_len` source and `max_new_tokens` new tokens.

    `begin` prepares a request, then each `step` appends a token a row. The parameters stay the model's own; those
    of self-attention are laid out anew (`join_projections`), those of gates converted (`for_steps`).
    """

    continues_prompt: ClassVar[bool] = False

    def __init__(
        self, model: Any, experts: StepExperts, *, batch: int, max_source_len: int, max_new_tokens: int
    ) -> None:
        decoder, config = model.decoder, model.config
        weight = decoder.embed_tokens.weight
        self.batch, self.max_source_len, self.max_new_tokens = batch, max_source_len, max_new_tokens
        # the last new token is never an input, the start token always is
        self.sampler = Sampler(batch, max_new_tokens + 1, config.vocab_size, weight.device)
        self._embed, self._norm, self._head = decoder.embed_tokens, decoder.final_layer_norm, model.lm_head
        self._scale = config.d_model**-0.5 if config.tie_word_embeddings else 1.0
        self._experts = experts
        self._encoder, self._decoder = model.encoder, decoder
        self._gates: list[nn.Module] = []
        self._state: list[Any] = []
        self._bias = PositionBias(decoder.block[0].layer[0].SelfAttention, max_new_tokens)
        self._layers = [_StaticLayer(layer, self, max_source_len, max_new_tokens) for layer in decoder.block]
        self._mask_B11S = torch.zeros(batch, 1, 1, max_source_len, dtype=weight.dtype, device=weight.device)
        self.has_changed()

    @staticmethod
    def check(config: Any) -> None:
        """It computes every model of its family."""

    @property
    def listener(self) -> Any:
        """The listener of the decoder's routes, which a step does not call."""
        return self._decoder.listener

    @torch.inference_mode()
    def has_changed(self) -> bool:
        """Whether a gate, or where a weight lies, is another than at the last call; what was captured before knows
        nothing of it. Gets ready for steps of the model as it is now."""
        gates: list[Any] = list(self._decoder.entry_gates.values())
        for layer in self._decoder.block:
            mlp = layer.layer[-1].mlp if layer.is_sparse else None
            gates += [] if mlp is None else [gate for gate in (mlp.router, mlp.pre_gate) if gate is not None]
        for gate in gates:
            # once, or it would undo what has been put there since
            if isinstance(gate, SwitchGate) and all(gate is not known for known in self._gates):
                for_steps(gate)
        for layer in self._layers:
            layer.attention.join()
        self._bias.look_up()
        before, self._gates = self._state, gates
        self._state = state_of(gates, (self._decoder, self._head))
        return not is_same(before, self._state)

    @property
    def num_bytes(self) -> int:
        """What the step's own tensors take: caches, mask, tokens and logits."""
        caches = sum(layer.attention.cache_2BHTC.nbytes + layer.cross.cache_2BHSC.nbytes for layer in self._layers)
        return caches + self._mask_B11S.nbytes + self.sampler.num_bytes

    def read_prompt(self, run: Run, input_ids_BS: Tensor, attention_mask_BS: Tensor) -> Tensor:
        """The last hidden states (B, S, D) of the source, for `begin`."""
        inputs = {"input_ids": input_ids_BS, "attention_mask": attention_mask_BS}
        return run(self._encoder, inputs).last_hidden_state

    def sequences(self, tokens_BT: Tensor, input_ids_BS: Tensor) -> Tensor:
        """What `generate` of the model returns: the start token and the new tokens."""
        return tokens_BT

    def output(self, sequences: Tensor, logits: Sequence[Tensor] | None) -> GenerateEncoderDecoderOutput:
        """What `generate` of the model returns as a dictionary."""
        kept: Any = None if logits is None else tuple(logits)
        return GenerateEncoderDecoderOutput(sequences=sequences, logits=kept)  # type: ignore[arg-type]

    @torch.inference_mode()
    def begin(self, prompt: Tensor, attention_mask_BS: Tensor, sampling: Sampling) -> None:
        """Start a request: keys and values of the encoder's last states, which `read_prompt` gave, and the sampling.
        Fewer rows than `batch` and fewer places than `max_source_len` are fine."""
        rows, places = attention_mask_BS.shape
        assert rows <= self.batch and places <= self.max_source_len
        source_mask(attention_mask_BS, self._mask_B11S)
        for layer in self._layers:
            layer.attention.begin()
            layer.cross.fill(prompt)
        self.sampler.begin(sampling, rows)

    @torch.inference_mode()
    def step(self, kind: StepKind) -> None:
        """One token for every row. Never synchronises with the host; the same launches whatever the data."""
        sampler = self.sampler
        hidden_B1D = self._embed(sampler.token_B[:, None])
        self._experts.begin_step()
        routes = Routes(self._decoder.stack_name, self._committed)
        for block, gate in self._decoder.entry_gates.items():
            routes.commit(int(block), self._entry(gate, hidden_B1D))
        # behind the entry gates, for which fetches wait
        bias_1H1T = self._bias(sampler.position_1)
        added_B1D = None
        for layer in self._layers:
            hidden_B1D, normed_B1D = _add_norm(hidden_B1D, added_B1D, layer.attention.norm)
            added_B1D = layer.attention(normed_B1D, sampler.position_1, bias_1H1T)
            hidden_B1D, normed_B1D = _add_norm(hidden_B1D, added_B1D, layer.cross.norm)
            added_B1D = layer.cross(normed_B1D, self._mask_B11S)
            hidden_B1D, normed_B1D = _add_norm(hidden_B1D, added_B1D, layer.norm)
            added_B1D = layer.feed_forward(normed_B1D, routes)
        _, normed_B1D = _add_norm(hidden_B1D, added_B1D, self._norm, self._scale)
        sampler.choose(self._head(normed_B1D)[:, 0], kind)
        routes.end()

    def _entry(self, gate: Any, embedded_B1D: Tensor) -> Routing:
        if is_called(gate):
            return gate(embedded_B1D)
        if isinstance(gate, EmbeddingGate):
            _, embedded_B1D = _add_norm(embedded_B1D, None, gate.layer_norm)
        return gate.decide(embedded_B1D, embedded_B1D.dtype)

    def _committed(self, _: str, block: int, routing: Routing) -> None:
        self._experts.commit(block, routing.expert_ids_BTK, self.sampler.live_B)

    def sparse(self, mlp: PreGatedSparseMLP, normed_B1D: Tensor, routes: Routes) -> Tensor:
        """The feed-forward of one MoE block: its gates, and its experts by the committed route."""
        weights_BK = mlp.route(normed_B1D, routes, decide).weights_BTK[:, 0]
        return self._experts.run(mlp.index, normed_B1D[:, 0], weights_BK)[:, None]


def _add_norm(hidden_B1D: Tensor, added_B1D: Tensor | None, layer: Any, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """The residual stream behind a part of a layer, and the normed input of the next part."""
    if hidden_B1D.dtype == torch.float16 and added_B1D is not None:
        hidden_B1D, added_B1D = finite(hidden_B1D + added_B1D), None
    if added_B1D is None:
        return hidden_B1D, norm(hidden_B1D, layer.weight, layer.variance_epsilon, factor)
    return add_norm(hidden_B1D, added_B1D, layer.weight, layer.variance_epsilon, factor)


class _StaticLayer:
    def __init__(self, layer: Any, decoder: StaticDecoder, max_source_len: int, max_new_tokens: int) -> None:
        self.attention = StaticSelfAttention(layer.layer[0], decoder.batch, max_new_tokens)
        self.cross = StaticCrossAttention(layer.layer[1], decoder.batch, max_source_len)
        self.norm: Any = layer.layer[-1].layer_norm
        self._mlp: Any = layer.layer[-1].mlp
        self._sparse = decoder.sparse if layer.is_sparse else None

    def feed_forward(self, normed_B1D: Tensor, routes: Routes) -> Tensor:
        return self._mlp(normed_B1D) if self._sparse is None else self._sparse(self._mlp, normed_B1D, routes)
