"""What the engine's tests ask of an engine, and what they compare it with: the resident model that computes with the
very weights the slabs hold."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from pregate.config import Policy
from pregate.engine.base import Engine
from pregate.engine.engine import OffloadEngine
from pregate.engine.io.ring import Ring, RingUnavailableError
from pregate.engine.storage.aligned_memory import PAGE, aligned_bytes
from pregate.engine.storage.slabs import SlabLayout
from pregate.models.family import experts_of
from tests.tiny import batch, pregated_model

SLAB = 8192
"""Bytes of one expert of `served`, which has 30."""
OFFLOADED = [Policy.on_demand, Policy.prefetch_all, Policy.pre_gated]


def has_io_uring() -> bool:
    try:
        Ring(1, [(aligned_bytes(PAGE).data_ptr(), PAGE)]).close()
    except RingUnavailableError:
        return False
    return True


needs_io_uring = pytest.mark.skipif(not has_io_uring(), reason="this system refuses io_uring to this process")


class Served(NamedTuple):
    """A saved checkpoint and the model it was saved from."""

    directory: Path
    model: Any


@lru_cache(maxsize=64)
def saved(root: Path, options: tuple[tuple[str, Any], ...], dtype: torch.dtype) -> tuple[Path, Any]:
    """A `pregated_model` of `options` in a directory under `root`, made once."""
    model = pregated_model(**dict(options)).to(dtype)
    directory = root / str(len(list(root.iterdir())))
    model.save_pretrained(directory)
    return directory, model


def as_stored(model: Any, layout: SlabLayout) -> Any:
    """The resident model with every expert replaced by what its slab holds, at the alignment that slabs have."""
    family = experts_of(model.config)
    stored = copy.deepcopy(model)
    weights = dict(stored.named_parameters())
    slab = aligned_bytes(layout.slab_bytes)
    for key in family.keys():  # noqa: SIM118 - not a mapping
        matrices = [part.of(weights[part.tensor].detach()) for part in family.slices(key)]
        layout.encode(matrices, slab)
        for matrix, held in zip(matrices, layout.decode(slab), strict=True):
            matrix.copy_(held)
    return stored


def request(size: int, num_beams: int = 1, seed: int = 0, new_tokens: int = 5, sample: bool = False) -> dict[str, Any]:
    """A generation whose tokens depend on the experts: the tiny models would repeat their first token for ever."""
    inputs = batch(seed, size=size)
    return {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"],
        "num_beams": num_beams,
        "do_sample": sample,
        "repetition_penalty": 1e6,
        "max_new_tokens": new_tokens,
        "eos_token_id": None,
        "return_dict_in_generate": True,
        "output_logits": True,
    }


def generated(generate: Callable[..., Any], options: dict[str, Any], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens, and the logits of every step (step, batch × beams, V)."""
    torch.manual_seed(seed)
    result = generate(**options)
    return result.sequences, torch.stack(result.logits)


def assert_same(
    got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], rtol: float = 0.0, atol: float = 0.0
) -> None:
    """Equal tokens, and logits bit for bit unless a tolerance is given; both sides are printed if not."""
    for name, one, other in zip(("tokens", "logits"), got, expected, strict=True):
        exact = name == "tokens" or rtol == atol == 0.0
        same = torch.equal(one, other) if exact else torch.allclose(one, other, rtol=rtol, atol=atol)
        assert same, f"{name} of the engine:\n{one}\n{name} of the resident model:\n{other}"


def serve(engine: OffloadEngine) -> tuple[Tensor, Tensor]:
    return generated(engine.generate, request(2))


def assert_serves(engine: OffloadEngine, expected: tuple[Tensor, Tensor]) -> None:
    """The engine generates what the resident model does, again and again."""
    for _ in range(2):
        assert_same(serve(engine), expected)


def lasting(engine: Engine) -> list[Tensor]:
    """What an engine has from the beginning to the end: its model's tensors and its slots."""
    slots, scratch = engine.host.matrices._slots_NB, engine.host.matrices._scratch
    return [*engine.model.parameters(), *engine.model.buffers(), slots, *scratch]


class ClosedBehind:
    """A request that waits in the middle while another thread closes the engine behind it."""

    def __init__(self) -> None:
        self._inside, self._went_on, self._closed = threading.Event(), threading.Event(), threading.Event()

    def wait(self, *_: Any) -> None:
        """Called from within the request: lets the other thread try, and holds that it has not come through."""
        self._inside.set()
        assert self._went_on.wait(30)
        assert not self._closed.is_set(), "the engine was closed under a request"

    def run(self, request: Callable[[], object], close: Callable[[], object]) -> None:
        """Serve `request`, which calls `wait`, and `close` beside it; both have ended at the end."""

        def then_closed() -> None:
            close()
            self._closed.set()

        serving = threading.Thread(target=request)
        serving.start()
        assert self._inside.wait(30)
        closing = threading.Thread(target=then_closed)
        closing.start()
        # as long as it takes a thread that does not wait to get through
        closing.join(0.2)
        self._went_on.set()
        for thread in (serving, closing):
            thread.join(30)
        assert self._closed.is_set()
