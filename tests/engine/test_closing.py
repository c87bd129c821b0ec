"""What an engine takes, refuses to take, shares, and gives back."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from pregate.config import CacheRule, SlabDtype, Tier, UsageError
from pregate.engine import budget
from pregate.engine.budget import DeviceFullError, allocate_slots
from pregate.engine.engine import OffloadEngine
from pregate.engine.opening import open_store
from tests.engine.serving import OFFLOADED, Served, assert_same, assert_serves, generated, request, serve
from tests.tiny import pregated_model

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("nothing_left_behind")]


def test_a_budget_below_one_expert(served: Served) -> None:
    for setting in ("device_budget", "host_budget"):
        with pytest.raises(
            UsageError, match=rf"engine\.{setting}=8191 .* less than one expert of 8\.19 kB: give at least"
        ):
            OffloadEngine.open(served.directory, **{setting: "8191"})
    with pytest.raises(UsageError, match="io_threads=0 must be at least 1"):
        OffloadEngine.open(served.directory, io_threads=0)


def test_a_device_without_room_for_the_slots(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = open_store(served.directory)
    with pytest.raises(DeviceFullError, match=r"slots need 563 TB on cpu, .* lower engine\.device_budget"):
        allocate_slots(1 << 36, disk.layout, torch.device("cpu"))
    disk.close()

    def full(size: int) -> Tensor:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(budget, "aligned_bytes", full)
    for host_budget in (None, "50%"):
        with pytest.raises(DeviceFullError, match=r"8 slots need 65\.5 kB on cpu"):
            OffloadEngine.open(served.directory, host_budget=host_budget)


@pytest.mark.parametrize(
    ("tier", "slab_dtype"),
    [(Tier.dram, SlabDtype.source), (Tier.disk, SlabDtype.source), (Tier.disk, SlabDtype.int8)],
)
@pytest.mark.parametrize("fault", [False, True])
def test_a_closed_engine_keeps_no_memory_and_says_that_it_is_closed(
    served: Served, tier: Tier, slab_dtype: SlabDtype, fault: bool
) -> None:
    """Though the engine is still referred to, and also after a read that failed."""
    engine: Any = OffloadEngine.open(
        served.directory, tier=tier, slab_dtype=slab_dtype, cache=CacheRule.lru, host_budget="10%", device_budget="50%"
    )
    serve(engine)
    memory = [StorageWeakRef(tensor.untyped_storage()) for tensor in allocations(engine)]
    assert len(memory) == 2 + 2 * (slab_dtype is SlabDtype.int8)
    if fault:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError):
            patch.setattr(type(engine.host.mover._store), "read_part", gone)
            engine.generate(**request(3, seed=2))
    engine.close()
    engine.close()
    if fault:
        gc.collect()  # the error's traceback holds frames which hold the error
    assert [storage.expired() for storage in memory] == [True] * len(memory)
    for call in (engine.generate, engine.forward):
        with pytest.raises(RuntimeError, match="closed: open it again"):
            call(**request(1))


def gone(*_: Any) -> None:
    raise OSError("the disk is gone")


def allocations(engine: Any) -> list[Tensor]:
    """Slots, scratch for dequantised experts, host buffers, and the experts in host memory."""
    reader, store = engine.host.mover._reader, engine.host.mover._store
    host = [] if reader._buffers is None else [reader._buffers._memory]
    return [engine.host.matrices._slots_NB, *engine.host.matrices._scratch, *host, *getattr(store, "_chunks", [])]


def test_the_wrong_store_is_refused(served: Served, tmp_path: Path) -> None:
    pregated_model(0, d_ff=36).save_pretrained(tmp_path)
    other = open_store(tmp_path)
    with pytest.raises(UsageError, match=r"holds no experts of .*: open one with open_store"):
        OffloadEngine.open(served.directory, store=other)
    other.close()


def test_calls_from_several_threads_are_served_one_after_the_other(
    served: Served, expected: tuple[Tensor, Tensor]
) -> None:
    options = [request(2, seed=seed) for seed in range(4)]
    wanted = [generated(served.model.generate, each) for each in options]
    got: dict[int, tuple[Tensor, Tensor]] = {}

    def call(engine: OffloadEngine, number: int) -> None:
        result = engine.generate(**options[number])
        got[number] = result.sequences, torch.stack(result.logits)

    with OffloadEngine.open(served.directory, device_budget="20%", cache=CacheRule.lru) as engine:
        threads = [threading.Thread(target=call, args=(engine, number)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, one in enumerate(wanted):
        assert_same(got[number], one)


def test_a_shared_store_outlives_its_engines(served: Served, expected: tuple[Tensor, Tensor]) -> None:
    shared = open_store(served.directory)
    engines = [OffloadEngine.open(served.directory, store=shared, policy=policy) for policy in OFFLOADED]
    for engine in engines:
        assert_serves(engine, expected)
        engine.close()
    with OffloadEngine.open(served.directory, store=shared) as engine:
        assert_serves(engine, expected)
    shared.close()


@pytest.mark.gpu
def test_a_gpu_engine_gives_its_memory_back(served: Served) -> None:
    torch.cuda.synchronize()
    gc.collect()
    before = torch.cuda.memory_allocated()
    with pytest.raises(DeviceFullError, match=r"lower engine\.device_budget"):
        allocate_slots(1 << 30, open_layout(served), torch.device("cuda"))
    for tier in (Tier.dram, Tier.disk):
        engine = OffloadEngine.open(served.directory, tier=tier, device="cuda", device_budget="100%")
        engine.close()
        del engine
        gc.collect()
        assert torch.cuda.memory_allocated() == before


def open_layout(served: Served) -> Any:
    disk = open_store(served.directory, tier=Tier.disk)
    disk.close()
    return disk.layout
