"""The models of the Switch family: the two stacks, and the model with a language-modelling head.

Letters: B batch, S source length, T target length or tokens, D model width, E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import MoEModelOutputWithPastAndCrossAttentions, Seq2SeqMoEOutput
from transformers.models.switch_transformers import modeling_switch_transformers as upstream
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from pregate.models.families.switch_config import STACKS, PreGatedSwitchTransformersConfig, gate_std, moe_layers
from pregate.models.families.switch_layers import (
    FAST,
    REFERENCE,
    PreGatedSparseMLP,
    PreGatedSwitchBlock,
    use_fast_norms,
)
from pregate.models.families.switch_router import EmbeddingGate, SwitchGate
from pregate.models.family import MoEBlock
from pregate.models.pregated_models import PreGatedModel, ServedModel
from pregate.models.route_handover import RouteListener, Routes
from pregate.models.router_losses import balance_loss, z_loss
from pregate.models.vocabulary_losses import IGNORED, Lesson, head_losses


@dataclass
class LossOutput(Seq2SeqMoEOutput):
    """`terms`: with `loss_only`, those of `head_losses`."""

    terms: Tensor | None = None


class PreGatedSwitchPreTrainedModel(PreGatedModel, upstream.SwitchTransformersPreTrainedModel):
    config: PreGatedSwitchTransformersConfig
    config_class = PreGatedSwitchTransformersConfig
    _no_split_modules = ["PreGatedSwitchBlock"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SwitchGate):
            # unit-variance logits on normalised states; upstream's unit-variance weights saturate the softmax
            init.normal_(module.classifier.weight, mean=0.0, std=gate_std(self.config))
            if module.classifier.bias is not None:
                init.zeros_(module.classifier.bias)


class PreGatedSwitchStack(PreGatedSwitchPreTrainedModel):
    """The encoder or the decoder. Makes the routes of each call and hands them to its layers."""

    _can_record_outputs = {
        "hidden_states": PreGatedSwitchBlock,
        "attentions": OutputRecorder(upstream.SwitchTransformersAttention, index=-1, layer_name="layer.0"),
        "cross_attentions": OutputRecorder(upstream.SwitchTransformersAttention, index=-1, layer_name="layer.1"),
        "router_logits": OutputRecorder(PreGatedSparseMLP, index=1),
    }

    def __init__(self, config: PreGatedSwitchTransformersConfig) -> None:
        super().__init__(config)
        self.is_decoder = config.is_decoder
        self.stack_name = STACKS[int(config.is_decoder)]
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        sparse_layers = moe_layers(config, self.stack_name)
        if config.is_decoder:
            config.num_layers = config.num_decoder_layers or config.num_layers
        self.block = nn.ModuleList()
        for layer in range(config.num_layers):
            if layer in sparse_layers:
                mlp = PreGatedSparseMLP(config, self.stack_name, sparse_layers.index(layer), len(sparse_layers))
            else:
                mlp = upstream.SwitchTransformersDenseActDense(config)
            self.block.append(PreGatedSwitchBlock(config, layer, mlp))
        entries = config.pregating.embedding_entries(self.stack_name, len(sparse_layers))
        self.entry_gates = nn.ModuleDict({str(block): EmbeddingGate(config) for block in entries})
        self.listener: RouteListener | None = None
        self.final_layer_norm = upstream.SwitchTransformersLayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoEModelOutputWithPastAndCrossAttentions:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        past_key_values = self._cache(past_key_values, use_cache)
        mask, encoder_attention_mask = self._masks(
            inputs_embeds, attention_mask, encoder_hidden_states, encoder_attention_mask, past_key_values
        )
        routes = Routes(self.stack_name, self.listener)
        for block, gate in self.entry_gates.items():
            routes.commit(int(block), gate(inputs_embeds))
        hidden_BTD = self.dropout(inputs_embeds)
        self_bias = cross_bias = None
        for layer in self.block:
            hidden_BTD, self_bias, new_cross_bias = layer(
                hidden_BTD,
                mask,
                self_bias,
                encoder_hidden_states,
                encoder_attention_mask,
                cross_bias,
                routes,
                past_key_values=past_key_values,
                **kwargs,
            )
            if encoder_hidden_states is not None:
                cross_bias = new_cross_bias
        routes.end()
        return MoEModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.dropout(self.final_layer_norm(hidden_BTD)), past_key_values=past_key_values
        )

    def _cache(self, past_key_values: Any, use_cache: bool | None) -> Any:
        if not self.is_decoder:
            if use_cache:
                raise ValueError("use_cache belongs to the decoder.")
            return None
        if use_cache and past_key_values is None:
            return EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        return past_key_values

    def _masks(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        encoder_hidden_states: Tensor | None,
        encoder_attention_mask: Tensor | None,
        past_key_values: Any,
    ) -> tuple[Tensor | None, Tensor | None]:
        B, T = inputs_embeds.shape[:2]
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        if attention_mask is None:
            attention_mask = torch.ones(B, seen + T, device=inputs_embeds.device)
        if self.is_decoder:
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
            )
        else:
            visible = attention_mask[:, None, None, :].to(inputs_embeds.dtype)
            mask = (1.0 - visible) * torch.finfo(inputs_embeds.dtype).min
        if encoder_attention_mask is not None:
            encoder_attention_mask = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=encoder_attention_mask,
                encoder_hidden_states=encoder_hidden_states,
            )
        return mask, encoder_attention_mask


class PreGatedSwitchTransformersForConditionalGeneration(
    ServedModel, PreGatedSwitchPreTrainedModel, upstream.SwitchTransformersForConditionalGeneration
):
    """Switch Transformers with a language-modelling head, its gates `config.pregate.lookahead` MoE blocks ahead."""

    def __init__(self, config: PreGatedSwitchTransformersConfig) -> None:
        upstream.SwitchTransformersPreTrainedModel.__init__(self, config)
        self.model_dim = config.d_model
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        encoder_config, decoder_config = copy.deepcopy(config), copy.deepcopy(config)
        encoder_config.is_decoder, encoder_config.use_cache = False, False
        decoder_config.is_decoder = True
        self.encoder = PreGatedSwitchStack(encoder_config)
        self.decoder = PreGatedSwitchStack(decoder_config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.router_z_loss_coef = config.router_z_loss_coef
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.post_init()

    def moe_blocks(self) -> Iterator[MoEBlock]:
        for name in STACKS:
            for number, layer in enumerate(getattr(self, name).block):
                if layer.is_sparse:
                    mlp = layer.layer[-1].mlp
                    yield MoEBlock(name, mlp.index, number, module=mlp, gates=mlp, layer_module=layer)

    def stack_module(self, stack: str) -> PreGatedSwitchStack:
        return getattr(self, stack)

    def stack_layers(self, stack: str) -> nn.ModuleList:
        return self.stack_module(stack).block

    def set_expert_path(self, path: str) -> None:
        """`reference` (upstream's order of operations, bit for bit) or `grouped` (faster, equal within rounding), of
        experts and, in training, of attention and norms."""
        for block in self.moe_blocks():
            block.module.experts.path = str(path)
        for name in STACKS:
            self.stack_module(name).config._attn_implementation = REFERENCE if path == "reference" else FAST
        use_fast_norms(self, path != "reference")

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_router_logits: bool | None = False,
        loss_only: bool = False,
        lesson: Lesson | None = None,
        logits_at: Tensor | None = None,
        **kwargs: Any,
    ) -> LossOutput:
        """As upstream's, except that the router losses are per block and never count padding.

        With `labels` (B, T; -100 is ignored) the loss is the mean cross-entropy over target tokens, and with
        `output_router_logits` also the weighted balance and z losses, averaged over the blocks of each stack; without
        `labels` no losses are computed. With `loss_only` there are no logits, and the loss is the cross-entropy alone,
        summed over target tokens, and with a `lesson` the weighted divergence from a teacher too. `logits_at` (B, T), a
        mask, asks for the logits of those N positions alone, (N, V) in row-major order: a vocabulary is wide, and
        padding needs none of it.

        Raises `ValueError` for `labels` together with `logits_at`.
        """
        if labels is not None and logits_at is not None:
            raise ValueError("Give labels, for a loss over all positions, or logits_at, not both.")
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                output_router_logits=output_router_logits,
                **kwargs,
            )
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self._shift_right(labels)
        decoded = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            inputs_embeds=decoder_inputs_embeds,
            past_key_values=past_key_values,
            encoder_hidden_states=encoder_outputs[0],
            encoder_attention_mask=attention_mask,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        states_BTD = decoded.last_hidden_state
        if self.config.tie_word_embeddings:
            states_BTD = states_BTD * (self.model_dim**-0.5)
        losses: dict[str, Tensor] = {}
        if output_router_logits and labels is not None and not loss_only:
            losses = {
                **self._router_losses("encoder", getattr(encoder_outputs, "router_logits", None), attention_mask),
                **self._router_losses("decoder", decoded.router_logits, labels != IGNORED),
            }
        logits = loss = terms = None
        if loss_only:
            assert labels is not None, "a loss needs labels"
            loss, terms = head_losses(self.lm_head, states_BTD.flatten(0, 1), labels.flatten(), lesson)
        else:
            logits = self.lm_head(states_BTD if logits_at is None else states_BTD[logits_at])
            loss = None if labels is None else self._loss(logits, labels, losses)
        return LossOutput(
            loss=loss,
            terms=terms,
            logits=logits,  # type: ignore[arg-type]
            **losses,  # type: ignore[arg-type]
            past_key_values=decoded.past_key_values,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            decoder_router_logits=decoded.router_logits,
            encoder_last_hidden_state=encoder_outputs[0],
            encoder_hidden_states=getattr(encoder_outputs, "hidden_states", None),
            encoder_attentions=getattr(encoder_outputs, "attentions", None),
            encoder_router_logits=getattr(encoder_outputs, "router_logits", None),
        )

    def _loss(self, logits_BTV: Tensor, labels_BT: Tensor, router_losses: dict[str, Tensor]) -> Tensor:
        """Mean cross-entropy over target tokens plus the weighted router losses."""
        labels_BT = labels_BT.to(logits_BTV.device)
        loss = nn.functional.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED)
        for name, value in router_losses.items():
            loss = loss + value * (self.router_z_loss_coef if name.endswith("z_loss") else self.router_aux_loss_coef)
        return loss

    @staticmethod
    def _router_losses(stack: str, logits: tuple[Tensor, ...] | None, mask: Tensor | None) -> dict[str, Tensor]:
        if not logits:
            return {}
        return {
            f"{stack}_aux_loss": torch.stack([balance_loss(block, mask) for block in logits]).mean(),
            f"{stack}_z_loss": torch.stack([z_loss(block, mask) for block in logits]).mean(),
        }
