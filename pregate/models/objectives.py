"""How an example, a source text and a target text, becomes the inputs of a model, and what is learnt from it.

`Seq2Seq`: the source is encoded, the target decoded. `Causal`: the target continues the source in one sequence.
Training, calibration and evaluation ask the same object. Knows token ids and masks; knows nothing about tasks or
models' insides.

Letters: B batch, S source length, T target length or whole length, V vocabulary.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from pregate.models.packing_and_padding import Row, Rows, end_to_end, first_fit, labels_of, ones, padded
from pregate.models.vocabulary_losses import IGNORED


@dataclass(frozen=True)
class TokenCounts:
    """Tokens that are not padding, on the source side and on the target side."""

    source: int = 0
    target: int = 0

    def __add__(self, other: TokenCounts) -> TokenCounts:
        return TokenCounts(self.source + other.source, self.target + other.target)


class Objective(Protocol):
    auto_class: Any
    """transformers' Auto class of such models."""
    closes_sources: bool
    """Whether a source text ends in the end-of-sequence token; otherwise the target goes on from it."""
    packs: bool
    """Whether several examples can stand in one row without seeing each other."""
    continues_prompts: bool
    """Whether what is generated continues the prompt, in the same stack and behind it in the same KV cache."""

    def batch(self, rows: Sequence[Row], pad_token_id: int, multiple: int = 1) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` (1 where there is no padding) and `labels`, int64, labels padded with -100.
        Lengths are rounded up to a multiple of `multiple`."""
        ...

    def packed(self, rows: Sequence[Row], pad_token_id: int, row_tokens: int) -> dict[str, Tensor]:
        """As `batch`, with as many rows as fit into `row_tokens` one behind the other, and `position_ids`, which begin
        again with each of them. Only where `packs`."""
        ...

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a model reads of a batch, without what it is to learn."""
        ...

    def prompts(self, sources: Rows, pad_token_id: int) -> dict[str, Tensor]:
        """Inputs of `generate`: `input_ids` and `attention_mask` (B, S)."""
        ...

    def new_tokens(self, generated_BT: Tensor, prompts_BS: Tensor) -> Tensor:
        """What `generate` has added: all but the prompt (or the start token, which decodes to nothing)."""
        ...

    def forced(self, prompts: Mapping[str, Tensor], generated_BT: Tensor) -> dict[str, Tensor]:
        """Inputs of a forward call that reads what `generate` gave for `prompts`, or the first tokens of it, and so
        gives the logits behind each of these tokens."""
        ...

    def count(self, batch: Mapping[str, Tensor]) -> TokenCounts:
        """Of one batch."""
        ...

    def tokens_by_stack(self, counts: TokenCounts) -> dict[str, int]:
        """How many tokens pass through each stack."""
        ...

    def real_tokens(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Which positions of a batch are no padding: stack -> mask, in the shape of the stack's input."""
        ...

    def router_logits(self, outputs: Any) -> dict[str, tuple[Tensor, ...]]:
        """The router logits in a model's outputs: stack -> one (B, S or T, E) a MoE block."""
        ...

    def expert_ids(self, outputs: Any) -> dict[str, tuple[Tensor, ...]]:
        """The chosen experts in a model's outputs, as for `router_logits`: one (B, S or T, K) a MoE block."""
        ...

    def run_stack(self, model: Any, stack: str, inputs: Mapping[str, Any]) -> None:
        """Run a model as far as `stack` and, if it must, further. `inputs`: a batch and what `settled` gave."""
        ...

    def settled(self, model: Any, stack: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What the stacks behind `stack` read of it, as further inputs of the model."""
        ...

    def target_rows(self, model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs, beside `input_ids` and `attention_mask`, of a teacher-forced call that gives the logits of target
        tokens alone, (N, V) in row-major order."""
        ...


class Seq2Seq:
    """A source stack reads the source; a target stack is given the target shifted by one."""

    auto_class, closes_sources, packs, continues_prompts = AutoModelForSeq2SeqLM, True, False, False

    def __init__(self, source_stack: str, target_stack: str) -> None:
        self._source, self._target = source_stack, target_stack

    def batch(self, rows: Sequence[Row], pad_token_id: int, multiple: int = 1) -> dict[str, Tensor]:
        sources, targets = [row.source for row in rows], [row.target for row in rows]
        return {
            "input_ids": padded(sources, pad_token_id, multiple=multiple),
            "attention_mask": padded(ones(sources), 0, multiple=multiple),
            "labels": padded(targets, IGNORED, multiple=multiple),
        }

    def packed(self, rows: Sequence[Row], pad_token_id: int, row_tokens: int) -> dict[str, Tensor]:
        raise AssertionError("a source and its target are two rows")

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def prompts(self, sources: Rows, pad_token_id: int) -> dict[str, Tensor]:
        return {"input_ids": padded(sources, pad_token_id), "attention_mask": padded(ones(sources), 0)}

    def new_tokens(self, generated_BT: Tensor, prompts_BS: Tensor) -> Tensor:
        return generated_BT

    def forced(self, prompts: Mapping[str, Tensor], generated_BT: Tensor) -> dict[str, Tensor]:
        return {**prompts, "decoder_input_ids": generated_BT}

    def count(self, batch: Mapping[str, Tensor]) -> TokenCounts:
        return TokenCounts(int(batch["attention_mask"].bool().sum()), int((batch["labels"] != IGNORED).sum()))

    def tokens_by_stack(self, counts: TokenCounts) -> dict[str, int]:
        return {self._source: counts.source, self._target: counts.target}

    def real_tokens(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self._source: batch["attention_mask"].bool(), self._target: batch["labels"] != IGNORED}

    def router_logits(self, outputs: Any) -> dict[str, tuple[Tensor, ...]]:
        return {stack: getattr(outputs, f"{stack}_router_logits") or () for stack in (self._source, self._target)}

    def expert_ids(self, outputs: Any) -> dict[str, tuple[Tensor, ...]]:
        # such models choose one expert, and what capacity drops is a choice all the same
        found = self.router_logits(outputs)
        return {stack: tuple(logits.argmax(-1, keepdim=True) for logits in blocks) for stack, blocks in found.items()}

    def run_stack(self, model: Any, stack: str, inputs: Mapping[str, Any]) -> None:
        if stack == self._source:
            self.settled(model, stack, inputs)
        else:
            model(**inputs, use_cache=False)

    def settled(self, model: Any, stack: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        if stack != self._source:
            return {}
        source = model.stack_module(stack)
        read = source(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        return {"encoder_outputs": (read.last_hidden_state,)}

    def target_rows(self, model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        labels_BT = batch["labels"]
        return {
            "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels_BT),
            "logits_at": labels_BT != IGNORED,
        }


class Causal:
    """One stack reads source and target as one sequence, and learns the target. Prompts of several rows are padded on
    the left, so that all rows go on at the same place. `packs`: false for a model whose layers carry a state along the
    row, such as linear attention."""

    auto_class, closes_sources, continues_prompts = AutoModelForCausalLM, False, True

    def __init__(self, stack: str, packs: bool = True) -> None:
        self._stack, self.packs = stack, packs

    def batch(self, rows: Sequence[Row], pad_token_id: int, multiple: int = 1) -> dict[str, Tensor]:
        whole = [row.source + row.target for row in rows]
        return {
            "input_ids": padded(whole, pad_token_id, multiple=multiple),
            "attention_mask": padded(ones(whole), 0, multiple=multiple),
            "labels": padded([labels_of(row) for row in rows], IGNORED, multiple=multiple),
        }

    def packed(self, rows: Sequence[Row], pad_token_id: int, row_tokens: int) -> dict[str, Tensor]:
        lengths = [row.num_tokens for row in rows]
        bins = first_fit(lengths, row_tokens)
        batch = self.batch([end_to_end([rows[i] for i in each]) for each in bins], pad_token_id)
        places = [array("i", (place for i in each for place in range(lengths[i]))) for each in bins]
        return {**batch, "position_ids": padded(places, 0)}

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # upstream isolates what begins again at position 0, but only in the absence of a mask
        mask = "position_ids" if "position_ids" in batch else "attention_mask"
        return {name: batch[name] for name in ("input_ids", mask)}

    def prompts(self, sources: Rows, pad_token_id: int) -> dict[str, Tensor]:
        return {
            "input_ids": padded(sources, pad_token_id, left=True),
            "attention_mask": padded(ones(sources), 0, left=True),
        }

    def new_tokens(self, generated_BT: Tensor, prompts_BS: Tensor) -> Tensor:
        return generated_BT[:, prompts_BS.shape[1] :]

    def forced(self, prompts: Mapping[str, Tensor], generated_BT: Tensor) -> dict[str, Tensor]:
        mask_BS = prompts["attention_mask"]
        seen_BT = mask_BS.new_ones(generated_BT.shape)
        seen_BT[:, : mask_BS.shape[1]] = mask_BS[:, : generated_BT.shape[1]]
        return {"input_ids": generated_BT, "attention_mask": seen_BT}

    def count(self, batch: Mapping[str, Tensor]) -> TokenCounts:
        target = int(predicting(batch["labels"]).sum())
        return TokenCounts(int(batch["attention_mask"].bool().sum()) - target, target)

    def tokens_by_stack(self, counts: TokenCounts) -> dict[str, int]:
        return {self._stack: counts.source + counts.target}

    def real_tokens(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self._stack: batch["attention_mask"].bool()}

    def router_logits(self, outputs: Any) -> dict[str, tuple[Tensor, ...]]:
        return {self._stack: outputs.router_logits or ()}

    def expert_ids(self, outputs: Any) -> dict[str, tuple[Tensor, ...]]:
        return {self._stack: outputs.expert_ids or ()}

    def run_stack(self, model: Any, stack: str, inputs: Mapping[str, Any]) -> None:
        model(**inputs, use_cache=False)

    def settled(self, model: Any, stack: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def target_rows(self, model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"logits_at": predicting(batch["labels"])}


def until_end(new_BN: Tensor, ends: int | Sequence[int] | None) -> Tensor:
    """Which generated tokens (B, N) a row said: up to and with the first of `ends`. Behind it stands padding."""
    if ends is None:
        return torch.ones_like(new_BN, dtype=torch.bool)
    is_end_BN = torch.isin(new_BN, torch.as_tensor(ends, device=new_BN.device)).long()
    return is_end_BN.cumsum(1) - is_end_BN == 0


def predicting(labels_BT: Tensor) -> Tensor:
    """Where a causal model predicts a target token: the places (B, T) before those whose label is not -100."""
    at_BT = torch.zeros_like(labels_BT, dtype=torch.bool)
    at_BT[:, :-1] = labels_BT[:, 1:] != IGNORED
    return at_BT
