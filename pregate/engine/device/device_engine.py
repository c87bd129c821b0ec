"""The device-driven engine: the host asks for a step, the device does the rest.

    with OffloadEngine.open("checkpoint", drive="device", device="cuda", device_budget="25%", cache="lru") as engine:
        tokens = engine.generate(input_ids=ids, attention_mask=mask, max_new_tokens=64)

The host drives the model over the prompt (`prefill`); then graph-captured steps, one or several at a time, route, fetch
and compute by themselves (`decode`). Without CUDA the same code runs step by step. Knows stores, slots and requests;
knows nothing about tasks or metrics.

Letters: B rows of a request, S source places, T target places, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pregate.config import CacheRule, Policy, SlabDtype, Tier, UsageError
from pregate.engine.base import Engine
from pregate.engine.device.device_addresses import device_addresses
from pregate.engine.device.fetching import BlockShape, SlabMemory, make_experts
from pregate.engine.device.generation_settings import Request, read_request
from pregate.engine.device.graph import STEPS_AT_ONCE, StepGraphs, side_stream
from pregate.engine.device.limits import refuse_settings, slots_for
from pregate.engine.device.ops.expert_forms import into_and_out
from pregate.engine.device.ops.language import require_triton
from pregate.engine.device.sampler_state import Sampling, StepKind
from pregate.engine.device.slots import ERRORS, EVICTIONS, HITS, MISSES, DeviceSlots
from pregate.engine.device.steps.registry import step_of
from pregate.engine.host import HostDriver
from pregate.engine.opening import Checkpoint, Opened
from pregate.engine.storage.store import Store
from pregate.engine.trace import Counters
from pregate.models.experts import ExpertKey
from pregate.system.machine import compute_device

EOS_CHECK_EVERY = STEPS_AT_ONCE
"""Steps between two looks at whether every row has ended; each look waits for the device."""


class DeviceEngine(Engine):
    """A served checkpoint. Use `open`; close it, or use it as a context manager."""

    def __init__(
        self,
        opened: Opened,
        store: Store,
        policy: Policy,
        host: HostDriver,
        model: Any,
        *,
        keep: bool,
        batch: int,
        max_source_len: int,
        max_new_tokens: int,
    ) -> None:
        super().__init__(opened, store, policy, host, model)
        self.batch, self.max_source_len, self.max_new_tokens = batch, max_source_len, max_new_tokens
        keys = self.family.keys()
        self.table = DeviceSlots.empty(len(keys), self.num_slots, self._device)
        addresses_G = device_addresses(_slabs(store, keys), self._device)
        memory = SlabMemory(store.layout, host.lend_slots(), addresses_G, self.table, keep)
        stack, layers = list(self.family.layers.items())[-1]
        blocks = BlockShape(
            [keys.index(ExpertKey(stack, block, 0)) for block in range(len(layers))],
            self.family.num_experts,
            self.family.top_k,
            batch,
            self.family.activation,
            self.family.constants,
        )
        self._experts = make_experts(policy, memory, blocks, side_stream(self._device))
        self.decoder = step_of(opened.config)(
            model, self._experts, batch=batch, max_source_len=max_source_len, max_new_tokens=max_new_tokens
        )
        self._graphs = StepGraphs(self.decoder.step, self._begin_nothing, self._device)
        self._kind = StepKind()
        self._left: int | None = None
        """Tokens that there is room for in the request that `prefill` began; None where there is none to go on with."""
        self._closers.append(self._forget_steps)

    @classmethod
    def open(
        cls,
        checkpoint: Checkpoint,
        *,
        batch: int = 1,
        max_source_len: int = 512,
        max_new_tokens: int = 256,
        policy: Policy = Policy.pre_gated,
        tier: Tier = Tier.auto,
        device: torch.device | str = "cpu",
        device_budget: str | None = None,
        cache: CacheRule = CacheRule.none,
        slab_dtype: SlabDtype = SlabDtype.source,
        store: Store | None = None,
    ) -> DeviceEngine:
        """Open a directory for requests of at most `batch` rows (up to 32), `max_source_len` source and
        `max_new_tokens` new tokens; the same as `OffloadEngine.open` with `drive="device"`.

        All experts live in host memory (tier `dram`), page-locked for a GPU. `cache`: `none`, or `lru` to keep slabs in
        their slots from step to step. `device_budget`, `slab_dtype`, `store`: as for `OffloadEngine.open`; without a
        budget, the fewest slots or the policy's default, whichever is more. Raises `UsageError` for what cannot be
        served this way.
        """
        policy, cache, device = Policy(policy), CacheRule(cache), compute_device(device)
        refuse_settings(batch, max_source_len, max_new_tokens, cache, Tier(tier), store)
        opened = Opened(checkpoint)
        step_of(opened.config)
        if device.type == "cuda":
            require_triton()
            if opened.dtype is torch.float64:
                raise UsageError("engine.drive=device has no kernels for float64: use engine.drive=host.")
        layout = opened.layout(SlabDtype(slab_dtype), store)
        into_and_out(layout, opened.family.activation)
        return cls._assemble(
            opened,
            layout,
            slots_for(device_budget, policy, opened.config, layout.slab_bytes, batch),
            store or (lambda: opened.store(layout, Tier.dram, device)),
            policy=policy,
            cache=cache,
            device=device,
            keep=cache is CacheRule.lru,
            batch=batch,
            max_source_len=max_source_len,
            max_new_tokens=max_new_tokens,
        )

    @torch.inference_mode()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """Hugging Face `generate` for greedy search and sampling by temperature; takes and returns the same.

        input_ids (B, S), attention_mask (B, S; without one, no token is padding). Understood `options`:
        `max_new_tokens` (default: what the engine was opened for), `min_new_tokens`, `do_sample`, `temperature`,
        `repetition_penalty`, the special tokens, `return_dict_in_generate` and `output_logits`. Sampling draws from
        all tokens, and repeats itself after `torch.manual_seed`. Raises `UsageError` for every other setting and for
        larger requests than the engine was opened for.
        """
        with self._served():
            request = self.request(input_ids, **options)
            self._prefill(input_ids, attention_mask, request.sampling)
            logits, done = [], 0
            at_once = 1 if request.with_logits else EOS_CHECK_EVERY
            while done < request.new_tokens:
                steps = min(at_once, request.new_tokens - done)
                self._decode(steps)
                done += steps
                if request.with_logits:
                    logits.append(self.decoder.sampler.logits_BV[: len(input_ids)].clone())
                looks = request.sampling.eos and done % EOS_CHECK_EVERY == 0
                if looks and not self.decoder.sampler.live_B.any().item():
                    break
            self._check_errors()
            tokens_BT = self._tokens(len(input_ids), request)
            sequences = self.decoder.sequences(tokens_BT, input_ids)
            if not request.as_dict:
                return sequences
            return self.decoder.output(sequences, logits[: tokens_BT.shape[1] - 1] if request.with_logits else None)

    def forward(self, **inputs: Any) -> Any:
        """One teacher-forced call of the model, driven by the host: same arguments and result as its `forward`."""
        with self._served():
            self._wait_for_steps()
            counted = self.table.counters.clone()  # of the steps of a request that may go on
            try:
                return self.host.run(self.model, inputs)
            finally:
                self._take_slots()
                self.table.counters.copy_(counted)

    def request(self, input_ids: Tensor, **options: Any) -> Request:
        """`options` of `generate` as the steps need them. Raises `UsageError` for what they cannot follow."""
        prompt_len = input_ids.shape[1] if self.decoder.continues_prompt else None
        vocab_size = self.model.config.vocab_size
        return read_request(self.model.generation_config, options, vocab_size, self.max_new_tokens, prompt_len)

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None, sampling: Sampling) -> None:
        """Read the prompt and get ready for `decode_one_token`. Raises `UsageError` for one that is too large, and
        `RuntimeError` for a closed engine, for a call from within a request and for a model that has a listener."""
        with self._served():
            self._prefill(input_ids, attention_mask, sampling)

    def _prefill(self, input_ids: Tensor, attention_mask: Tensor | None, sampling: Sampling) -> None:
        rows, places = input_ids.shape
        if rows > self.batch or places > self.max_source_len:
            raise UsageError(
                f"A request of {rows} rows and {places} source tokens is too large for an engine opened for "
                f"{self.batch} and {self.max_source_len}: open it with more."
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        self._left = None
        self._wait_for_steps()
        self._follow_the_model()
        self._graphs.prepare(sampling.kind)
        prompt = self.decoder.read_prompt(self.host.run, input_ids, attention_mask)
        self._take_slots()
        self.decoder.begin(prompt, attention_mask, sampling)
        self._kind, self._left = sampling.kind, self.max_new_tokens

    @torch.inference_mode()
    def decode(self, num_tokens: int) -> None:
        """So many more tokens for every row of the request that `prefill` began, in all at most what the engine was
        opened for. Returns before the device has made them. Raises `UsageError` for more than that or less than 0, and
        `RuntimeError` without a request and for a closed engine."""
        with self._served():
            self._decode(num_tokens)

    def _decode(self, num_tokens: int) -> None:
        left = self._left
        if left is None:
            raise RuntimeError("This engine has no request to decode: begin one with prefill.")
        if not 0 <= num_tokens <= left:
            raise UsageError(
                f"{num_tokens} more tokens are asked for, but this request has room for {left} of the "
                f"{self.max_new_tokens} that the engine was opened for: ask for 0 to {left}, or open it with a larger "
                "max_new_tokens."
            )
        self._left = None  # a step that is cut short leaves nothing to go on with
        self._graphs.run(self._kind, num_tokens)
        self._left = left - num_tokens

    def decode_one_token(self) -> None:
        """One more token for every row of the request that `prefill` began. Returns before the device has done it."""
        self.decode(1)

    def tokens(self) -> Tensor:
        """The start token, or the last of the prompt, and all tokens so far of every row there is room for (batch,
        max_new_tokens + 1). The next request overwrites them."""
        return self.decoder.sampler.tokens_BT

    def rows_not_finite(self) -> list[int]:
        """Rows of the last request with a NaN or an infinity among the logits of a step. Waits for the device."""
        return (~self.decoder.sampler.finite_B).nonzero().flatten().tolist()

    @property
    def counters(self) -> Counters:
        """Of the decoding steps since `prefill`. Waits for the device. Raises `RuntimeError` as `generate` does."""
        counted = self._check_errors()
        moved = counted[MISSES] * self.slab_bytes
        return Counters(counted[HITS], counted[MISSES], counted[EVICTIONS], bytes_moved=moved, bytes_read=moved)

    def expected_bytes(self) -> dict[str, int]:
        """What the engine takes by its own account: the parts that every engine has, and `static`, the caches and
        buffers of the decoding step."""
        return {**super().expected_bytes(), "static": self.decoder.num_bytes + self._experts.num_bytes}

    def _follow_the_model(self) -> None:
        """A gate or a weight that was replaced since the steps were captured: they are captured anew."""
        if self.decoder.has_changed():
            self._graphs.forget()
        if self.decoder.listener not in (None, self.host.on_route):
            raise RuntimeError(
                "The model of this engine has a listener, which steps driven by the device do not tell of routes: take "
                "it away with set_listener(None), or serve with OffloadEngine."
            )

    def _take_slots(self) -> None:
        """The slots change hands: neither side may believe what the other has put into them."""
        self.host.lend_slots()
        self.table.clear()

    @torch.inference_mode()
    def _begin_nothing(self) -> None:
        """A state in which a step may run: no row lives, and of the policies only `prefetch_all` fetches even so."""
        self._take_slots()
        self.decoder.sampler.begin(Sampling(), rows=0)

    def _forget_steps(self) -> None:
        """For an engine that is closed."""
        self._wait_for_steps()
        self._graphs.forget()
        self._experts.forget_slots()

    def _wait_for_steps(self) -> None:
        """Steps of the last request may still read slots that the host is about to fill."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _check_errors(self) -> list[int]:
        counted: list[int] = self.table.counters.tolist()
        if counted[ERRORS]:
            raise RuntimeError(
                f"{counted[ERRORS]} experts found no slot among {self.num_slots}: more were wanted than the engine was "
                "opened for; this is a fault of the engine."
            )
        return counted

    def _tokens(self, rows: int, request: Request) -> Tensor:
        """The tokens of a request, as far as its longest row goes."""
        tokens_BT = self.tokens()[:rows, : request.new_tokens + 1].clone()
        if not request.sampling.eos:
            return tokens_BT
        ended_BT = torch.isin(tokens_BT[:, 1:], torch.tensor(list(request.sampling.eos), device=tokens_BT.device))
        steps_B = torch.where(ended_BT.any(1), ended_BT.int().argmax(1) + 1, request.new_tokens)
        return tokens_BT[:, : int(steps_B.max()) + 1]


def _slabs(store: Store, keys: Sequence[ExpertKey]) -> Iterator[Tensor]:
    for key in keys:
        slab = store.slab(key)
        assert slab is not None, "a store in host memory gives its slabs"
        yield slab
