"""The device-driven engine: the host asks for a step, the device does the rest.

    with DeviceEngine.open("checkpoint", device="cuda", device_budget="25%", cache="lru") as engine:
        tokens = engine.generate(input_ids=ids, attention_mask=mask, max_new_tokens=64)

The source is encoded by the host-driven engine over the same slots (`prefill`); then every token is one replay of a
captured graph that routes, fetches and computes by itself (`decode_one_token`). Without CUDA the same code runs step by
step. Knows stores, slots and requests; knows nothing about tasks or metrics.

Letters: B rows of a request, S source places, T target places, V vocabulary.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from transformers.generation.utils import GenerateEncoderDecoderOutput

from pregate.config import CacheRule, Policy, SlabDtype, Tier, UsageError
from pregate.engine.budget import slots_within
from pregate.engine.decode import Checkpoint, OffloadEngine, open_store
from pregate.engine.device.graph import StepGraphs, side_stream
from pregate.engine.device.moves import BlockShape, SlabMemory, make_moves, slots_needed
from pregate.engine.device.request import Request, read_request
from pregate.engine.device.sampling import Sampling, StepKind
from pregate.engine.device.slots import DeviceSlots
from pregate.engine.device.static_step import StaticDecoder
from pregate.engine.policy import default_slots
from pregate.engine.store import Store
from pregate.engine.trace import Counters
from pregate.models.adapter import ExpertKey
from pregate.runtime import human_bytes

MOST_ROWS = 32
"""A step of more tokens than that is better served by matrix products over groups of tokens."""
EOS_CHECK_EVERY = 8
"""Steps between two looks at whether every row has ended; each look waits for the device."""


class DeviceEngine:
    """A served checkpoint. Use `open`; close it, or use it as a context manager."""

    def __init__(
        self, host: OffloadEngine, store: Store, *, keep: bool, batch: int, max_source_len: int, max_new_tokens: int
    ) -> None:
        self.host, self.model, self.policy = host, host.model, host.policy
        self.family, self.num_slots, self.slab_bytes = host.family, host.num_slots, host.slab_bytes
        self.batch, self.max_source_len, self.max_new_tokens = batch, max_source_len, max_new_tokens
        self._device = host.model.device
        keys = host.family.keys()
        self.table = DeviceSlots.empty(len(keys), host.num_slots, self._device)
        memory = SlabMemory(store.layout, host.lend_slots(), _addresses(store, keys, self._device), self.table, keep)
        config = host.model.config
        blocks = BlockShape(
            [keys.index(ExpertKey("decoder", b, 0)) for b in range(len(host.family.layers["decoder"]))],
            host.family.num_experts,
            host.family.top_k,
            batch,
            config.d_model,
            config.dense_act_fn,
        )
        self._experts = make_moves(host.policy, memory, blocks, side_stream(self._device))
        self.decoder = StaticDecoder(
            host.model, self._experts, batch=batch, max_source_len=max_source_len, max_new_tokens=max_new_tokens
        )
        self._graphs = StepGraphs(self.decoder.step, self._begin_nothing, self._device)
        self._kind = StepKind()
        self._store: Store | None = None
        self._serving = threading.RLock()
        self._closed = False

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
        """Open a pre-gated or conventional Switch directory for requests of at most `batch` rows (up to 32),
        `max_source_len` source and `max_new_tokens` new tokens.

        All experts live in host memory (tier `dram`), page-locked for a GPU. `cache`: `none`, or `lru` to keep slabs in
        their slots from step to step. `device_budget`, `slab_dtype`, `store`: as for `OffloadEngine.open`; without a
        budget, the fewest slots or the policy's default, whichever is more. Raises `UsageError` for what cannot be
        served this way.
        """
        policy, cache, tier, device = Policy(policy), CacheRule(cache), Tier(tier), torch.device(device)
        _refuse(batch, max_source_len, max_new_tokens, cache, tier, store)
        opened = store or open_store(checkpoint, tier=Tier.dram, device=device, slab_dtype=SlabDtype(slab_dtype))
        host = None
        try:
            # one slot to begin with: how many there must be follows from what the checkpoint's headers say
            host = OffloadEngine.open(
                checkpoint,
                policy=policy,
                device=device,
                store=opened,
                slots=lambda family, lookahead, slab_bytes: _num_slots(
                    device_budget, policy, family, lookahead, slab_bytes, batch
                ),
                cache=cache,
            )
            engine = cls(
                host,
                opened,
                keep=cache is CacheRule.lru,
                batch=batch,
                max_source_len=max_source_len,
                max_new_tokens=max_new_tokens,
            )
        except BaseException:
            if host is not None:
                host.close()
            if store is None:
                opened.close()
            raise
        engine._store = opened if store is None else None
        return engine
