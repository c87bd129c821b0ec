"""What an engine cannot be opened with is one sentence before anything is read or packed; a fault of the device is not
taken for a lack of memory."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pregate.bench
import pregate.convert
import pregate.eval
import pregate.train
from pregate.cli import compose_run
from pregate.config import PreGateConfig, Tier, UsageError
from pregate.conversion.write import convert
from pregate.engine import budget
from pregate.engine.budget import DeviceFullError, allocate_slots, slabs_within
from pregate.engine.device import device_addresses
from pregate.engine.device.device_engine import DeviceEngine
from pregate.engine.engine import OffloadEngine
from pregate.engine.io import host_cache
from pregate.engine.opening import open_store
from pregate.engine.storage import aligned_memory as memory
from pregate.engine.storage import pack, store
from pregate.engine.storage.aligned_memory import aligned_bytes, page_lock, page_unlock
from pregate.system.machine import compute_device
from pregate.system.memory import is_out_of_memory
from tests.engine.serving import SLAB, Served
from tests.tiny import pregated_model

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "share", ["150%", "100.1%", "0%", "0.0 %", "-5%", "nan%", "inf%", "1e2%", "%", "five%", "1_0%"]
)
def test_a_share_of_nothing_or_of_more_than_all(served: Served, tmp_path: Path, share: str) -> None:
    for open_engine in (OffloadEngine.open, DeviceEngine.open):
        with pytest.raises(UsageError, match=rf"engine\.device_budget={share} is not a share of the experts: write"):
            open_engine(served.directory, device_budget=share)
    with pytest.raises(UsageError, match=rf"engine\.host_budget={share} is not a share of the experts: write a"):
        OffloadEngine.open(served.directory, host_budget=share, tier=Tier.disk, pack_dir=tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


@pytest.mark.parametrize("setting", ["engine.device_budget=150%", "engine.host_budget=0%", "bench.budgets=[50%,101%]"])
def test_a_command_refuses_it_at_once(setting: str) -> None:
    with pytest.raises(UsageError, match=r"(engine|bench)\.\w+=\d+% is not a share of the experts"):
        compose_run([setting])


@pytest.mark.parametrize("size", ["nan", "-5", "-1GB", "inf", "", "half"])
def test_what_is_no_size(served: Served, size: str) -> None:
    for setting in ("device_budget", "host_budget"):
        with pytest.raises(UsageError, match=rf"engine\.{setting}: '{size}' is not a size: write bytes, or a number"):
            OffloadEngine.open(served.directory, **{setting: size})
    with pytest.raises(UsageError, match=r"engine\.device_budget=0 is 0 B, less than one expert"):
        DeviceEngine.open(served.directory, device_budget="0")


@pytest.mark.parametrize(
    ("share", "slots"), [("100%", 30), ("100.0 %", 30), ("50%", 15), (" .5% ", None), ("3.4%", 1), ("99.99%", 29)]
)
def test_a_share_that_is_one(share: str, slots: int | None) -> None:
    if slots is None:
        with pytest.raises(UsageError, match="less than one expert"):
            slabs_within("engine.device_budget", share, 30, SLAB)
    else:
        assert slabs_within("engine.device_budget", share, 30, SLAB) == slots
    # a size may be larger than all experts: the device has that much
    assert slabs_within("engine.device_budget", "1GB", 30, SLAB) == 30


def test_a_budget_is_refused_before_the_experts_are_read(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "read_slabs", lambda *_: pytest.fail("experts were read"))
    for wrong in ("150%", "1KB", "5%"):
        with pytest.raises(UsageError, match=r"engine\.device_budget="):
            DeviceEngine.open(served.directory, batch=4, device_budget=wrong)


@pytest.mark.parametrize(
    ("device", "sentence"),
    [
        ("gpu", "device=gpu names no device: write cpu, cuda, or"),
        ("cuda:x", "device=cuda:x names no device: write cpu"),
        ("", "device= names no device: write cpu"),
        (None, "device=None names no device"),
        ("meta", "device=meta, but experts are served on cpu and cuda alone"),
        ("mps", "device=mps, but experts are served on cpu and cuda alone"),
        ("cpu:3", "device=cpu:3, but experts are served on cpu and cuda alone"),
    ],
)
def test_a_device_that_is_none(served: Served, tmp_path: Path, device: Any, sentence: str) -> None:
    openings = (OffloadEngine.open, DeviceEngine.open, lambda d, **rest: open_store(d, pack_dir=tmp_path / "p", **rest))
    for opening in openings:
        with pytest.raises(UsageError, match=sentence) as caught:
            opening(served.directory, device=device)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "p").exists()


def test_a_gpu_that_is_not_there(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for opening in (OffloadEngine.open, DeviceEngine.open, open_store):
        with pytest.raises(UsageError, match="device=cuda, but torch finds no CUDA GPU: use cpu"):
            opening(served.directory, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match=r"device=cuda:7, but torch finds 1 of CUDA's GPUs: write cuda:0\.$"):
        OffloadEngine.open(served.directory, device="cuda:7")
    assert compute_device("cuda:0") == torch.device("cuda:0") and compute_device("cuda") == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(UsageError, match=r"torch finds 4 of CUDA's GPUs: write cuda:0 to cuda:3\.$"):
        compute_device(torch.device("cuda:4"))
    assert compute_device("cuda:3").index == 3


class AcceleratorError(RuntimeError):
    """As torch raises where CUDA itself reports a fault."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"CUDA error: {text}")
        self.error_code = code


FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError("no"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    AcceleratorError(2, "out of memory"),
]
BROKEN = [
    AcceleratorError(700, "an illegal memory access was encountered"),
    AcceleratorError(719, "unspecified launch failure"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA driver error: invalid device context"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    OSError(errno.EIO, "Input/output error"),
    AssertionError("Torch not compiled with CUDA enabled"),
]


@pytest.mark.parametrize("error", FULL, ids=repr)
def test_memory_that_has_run_out_is_a_full_device(
    served: Served, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    assert is_out_of_memory(error)
    monkeypatch.setattr(budget, "aligned_bytes", raising(error))
    with pytest.raises(DeviceFullError, match=r"4 slots need 32\.8 kB on cpu, .*: lower engine\.device_budget"):
        OffloadEngine.open(served.directory, device_budget=f"{4 * SLAB}")


@pytest.mark.parametrize("error", BROKEN, ids=repr)
def test_a_fault_of_the_device_surfaces(served: Served, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """As itself: whoever leaves out a row because it does not fit does not leave out this one."""
    assert not is_out_of_memory(error)
    monkeypatch.setattr(budget, "aligned_bytes", raising(error))
    with pytest.raises(type(error)) as caught:
        OffloadEngine.open(served.directory)
    assert caught.value is error and not isinstance(error, UsageError)


def test_what_torch_and_the_system_really_raise(served: Served) -> None:
    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(1 << 50, dtype=torch.uint8)
    assert is_out_of_memory(of_torch.value)
    with pytest.raises(MemoryError, match=r"no 1126 TB of host memory"):
        aligned_bytes(1 << 50)
    disk = open_store(served.directory)
    disk.close()
    with pytest.raises(DeviceFullError, match="slots need 563 TB on cpu"):
        allocate_slots(1 << 36, disk.layout, CPU)


def raising(error: BaseException) -> Any:
    def raises(*_: Any, **__: Any) -> Tensor:
        raise error

    return raises


def test_host_memory_that_has_run_out_is_one_sentence(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(store, "aligned_bytes", raising(MemoryError("no")))
        with pytest.raises(UsageError, match=r"experts need 246 kB of host memory, .*: use engine\.tier=disk"):
            open_store(served.directory, tier=Tier.dram)
    monkeypatch.setattr(host_cache, "aligned_bytes", raising(MemoryError("no")))
    with pytest.raises(UsageError, match=r"15 experts in host memory need 123 kB, .*: lower engine\.host_budget"):
        OffloadEngine.open(served.directory, tier=Tier.disk, host_budget="50%")


@pytest.mark.parametrize(
    ("status", "kind"), [(2, UsageError), (304, UsageError), (801, UsageError), (700, RuntimeError)]
)
def test_page_locking_that_fails(monkeypatch: pytest.MonkeyPatch, status: int, kind: type[Exception]) -> None:
    """And whatever runs next does not raise the error that CUDA keeps of it, nor that of memory that was not locked."""
    kept = []

    class Runtime:
        def cudaHostRegister(self, *_: int) -> int:
            kept.append(status)
            return status

        def cudaHostUnregister(self, *_: int) -> int:
            return self.cudaHostRegister()

    class Kernel:
        def add_(self, _: int) -> None:
            if kept:
                raise RuntimeError(f"CUDA error {kept.pop()}, as torch tells behind a kernel")

    def ones(size: int, device: str) -> Kernel:
        assert (size, device) == (1, "cuda")
        return Kernel()

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch, "ones", ones)
    with pytest.raises(kind, match=rf"CUDA error {status}") as caught:
        page_lock(aligned_bytes(memory.PAGE))
    assert isinstance(caught.value, UsageError) == (kind is UsageError)
    assert kept == []
    page_unlock(aligned_bytes(memory.PAGE))
    assert kept == []


@pytest.mark.parametrize("status", [700, 201])
def test_a_drivers_fault_is_not_memory_that_is_not_page_locked(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    class Driver:
        def cuPointerGetAttribute(self, *_: Any) -> int:
            return status

        def cuMemHostAlloc(self, *_: Any) -> int:
            return status

    monkeypatch.setattr(device_addresses, "_driver", Driver)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    with pytest.raises(RuntimeError, match=f"CUDA error {status}") as seen:
        device_addresses._seen_by_device(1 << 40)
    with (
        pytest.raises(RuntimeError, match=f"CUDA error {status}") as asked,
        device_addresses.host_allocated(4096, write_combined=False),
    ):
        pass
    assert not isinstance(seen.value, UsageError) and not isinstance(asked.value, UsageError)


def test_float64_has_no_kernels(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pregated_model(1).double().save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("pregate.engine.device.device_engine.require_triton", lambda: None)
    with pytest.raises(UsageError, match=r"no kernels for float64: use engine\.drive=host"):
        DeviceEngine.open(tmp_path, device="cuda")
    with OffloadEngine.open(tmp_path) as engine:
        assert engine.model.dtype == torch.float64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "model"
    pregated_model(1).save_pretrained(directory)
    return directory


OUTPUTS = {
    "eval": (pregate.eval.main, ["checkpoint={model}", "task=sst2"], "output"),
    "eval of a run": (pregate.eval.main, ["run_dir={run}", "task=sst2"], "output"),
    "convert": (pregate.convert.work, ["source={model}"], "output"),
    "calibrate": (pregate.convert.work, ["source={model}", "pregate.init=calibrated", "task=sst2"], "output"),
    "bench": (pregate.bench.main, ["checkpoint={model}"], "run_dir"),
    "plan": (pregate.bench.main, ["plan=true"], "run_dir"),
    "train": (pregate.train.main, ["model.source={model}", "task=sst2"], "run_dir"),
    "resumed": (pregate.train.main, ["model.source={model}", "task=sst2", "resume=true"], "run_dir"),
}


MODEL, PACK = ("holds a model: choose another {setting}=DIR", "is where the experts of a model are packed: choose an")
PLACES = {
    "{model}": MODEL,
    "{model}/experts": PACK,
    "{model}/": MODEL,
    "{model}/x/../experts": PACK,
    "{model}/experts-int8": PACK,
    "{model}/experts-fp8/deep/below": PACK,
    "{link}/experts": PACK,
    "{packed}": PACK,
    "{packed}/deep": PACK,
}


@pytest.mark.parametrize(
    ("command", "place"),
    [(command, place) for command in OUTPUTS for place in list(PLACES)[: 2 if command != "eval" else None]],
)
def test_results_do_not_go_into_a_model(model: Path, tmp_path: Path, command: str, place: str) -> None:
    """Nor into its pack, whether that is there yet or not, wherever it is; told before anything is read or written."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint").symlink_to(model)
    packed = tmp_path / "elsewhere"
    if "packed" in place:
        open_store(model, tier=Tier.disk, pack_dir=packed).close()
    places = {"model": str(model), "link": str(tmp_path / "run" / "checkpoint"), "packed": str(packed)}
    work, arguments, setting = OUTPUTS[command]
    run = compose_run([each.format(run=tmp_path / "run", **places) for each in (*arguments, f"{setting}={place}")])
    before = {path: path.stat().st_mtime_ns for path in (*model.rglob("*"), *tmp_path.rglob("*"))}
    with pytest.raises(UsageError, match=PLACES[place].format(setting=setting)):
        work(run)
    assert before == {path: path.stat().st_mtime_ns for path in (*model.rglob("*"), *tmp_path.rglob("*"))}


@pytest.mark.parametrize("place", ["model-eval", "model/eval", "experts", "model/experts2", "run"])
def test_results_may_go_beside_or_below_a_model(model: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("name: run")
    pack.refuse_output("output", (tmp_path if place == "run" else model.parent) / place)


def test_a_conversion_refuses_it_too(model: Path) -> None:
    with pytest.raises(UsageError, match="is where the experts of a model are packed"):
        convert(str(model), model / "experts", PreGateConfig())
    assert not (model / "experts").exists()


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ({"policy": "magic"}, "policy=magic is not known: write gpu_only, on_demand, prefetch_all or pre_gated."),
        ({"cache": "fifo"}, "cache=fifo is not known: write none, lru, lfu or lifo."),
        ({"tier": "tape"}, "tier=tape is not known: write auto, dram or disk."),
        ({"slab_dtype": "int4"}, "slab_dtype=int4 is not known: write source, int8 or fp8."),
        ({"drive": "self"}, "drive=self is not known: write host or device."),
        ({"prefill_chunk": 0}, "prefill_chunk=0 must be at least 1."),
    ],
)
def test_an_unknown_choice_is_answered_with_those_there_are(option: dict[str, Any], sentence: str) -> None:
    """Before anything is looked for."""
    with pytest.raises(UsageError) as caught:
        OffloadEngine.open("no such directory", **option)
    assert str(caught.value) == sentence
