"""The whole model and Accelerate's offload, built from a checkpoint, against a model built another way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pregate.config import SlabDtype, Tier
from pregate.engine.engine import OffloadEngine
from pregate.engine.opening import open_store
from pregate.engine.storage.aligned_memory import aligned_bytes
from pregate.measure.bench.baseline_models import (
    cpu_offloaded,
    dequantised_resident,
    disk_offloaded,
    resident_model,
    write_offload_folder,
)
from pregate.measure.bench.models import BenchModel, bench_model
from pregate.models.experts import ExpertKey
from pregate.models.families.switch import SwitchFamily
from pregate.models.pregating import PreGating
from pregate.models.synthetic import synthetic_checkpoint
from tests.tiny import GEOMETRY, batch

CPU = torch.device("cpu")


def tiny(dtype: torch.dtype = torch.bfloat16, entry: str = "embedding") -> BenchModel:
    return bench_model("tiny", None, synthetic_checkpoint(SwitchFamily(), GEOMETRY, PreGating(1, entry=entry), dtype))


def request(size: int = 3) -> dict[str, Any]:
    inputs = batch(0, size=size)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    return {k: inputs[k] for k in ("input_ids", "attention_mask")} | options


@torch.inference_mode()
def generated(model: Any) -> torch.Tensor:
    return model.generate(**request())


def test_the_whole_model_of_a_checkpoint_that_lies_nowhere_is_the_engines() -> None:
    model = tiny()
    whole = resident_model(model, CPU)
    assert whole.dtype is torch.bfloat16 and not whole.training
    assert whole.lm_head.weight is whole.shared.weight, "tied weights are one tensor"
    with OffloadEngine.open(model.source, tier=Tier.dram) as engine:
        assert torch.equal(engine.generate(**request()), generated(whole))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("entry", ["own", "embedding"])
def test_accelerate_serves_the_same_model_from_disk(tmp_path: Path, dtype: torch.dtype, entry: str) -> None:
    model = tiny(dtype, entry)
    write_offload_folder(model, tmp_path / "weights")
    offloaded = disk_offloaded(model, tmp_path / "weights", CPU)
    experts = [p for name, p in offloaded.named_parameters() if ".experts." in name]
    assert experts and all(p.is_meta for p in experts), "nothing but the gates is in memory"
    assert torch.equal(generated(offloaded), generated(resident_model(model, CPU)))
    assert all(p.is_meta for p in experts)


def test_a_weight_with_several_names_is_written_once(tmp_path: Path) -> None:
    write_offload_folder(tiny(), tmp_path)
    assert not (tmp_path / "shared.weight.dat").is_symlink()
    assert (tmp_path / "lm_head.weight.dat").readlink() == Path("shared.weight.dat")
    total = sum(file.stat().st_size for file in tmp_path.glob("*.dat") if not file.is_symlink())
    assert total == tiny().num_bytes()


def test_accelerate_serves_the_same_model_from_host_memory() -> None:
    model = tiny()
    assert torch.equal(generated(cpu_offloaded(model, CPU)), generated(resident_model(model, CPU)))


@pytest.mark.parametrize("slab_dtype", [SlabDtype.int8, SlabDtype.fp8])
def test_the_dequantised_model_holds_what_the_engine_computes_with(slab_dtype: SlabDtype) -> None:
    model = tiny(torch.float32)
    store = open_store(model.source, tier=Tier.dram, slab_dtype=slab_dtype)
    whole = dequantised_resident(resident_model(model, CPU), model, store)
    slab = aligned_bytes(store.layout.slab_bytes)
    store.read_into(ExpertKey("decoder", 2, 3), slab)
    wi, wo = store.layout.decode(slab)
    expert = next(b for b in whole.moe_blocks() if (b.stack, b.index) == ("decoder", 2)).module.experts["expert_3"]
    assert torch.equal(expert.wi.weight, wi) and torch.equal(expert.wo.weight, wo)
    assert not torch.equal(wi, model.source.read([n := model.family.tensor_names(ExpertKey("decoder", 2, 3))[0]])[n])
    with OffloadEngine.open(model.source, store=store) as engine:
        assert torch.equal(engine.generate(**request()), generated(whole))
    store.close()


@pytest.mark.gpu
def test_accelerate_serves_a_gpu_from_host_memory_and_disk(tmp_path: Path) -> None:
    model, cuda = tiny(), torch.device("cuda")
    inputs = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in request().items()}
    with torch.inference_mode():
        expected = resident_model(model, cuda).generate(**inputs)
        assert torch.equal(cpu_offloaded(model, cuda).generate(**inputs), expected)
        write_offload_folder(model, tmp_path)
        assert torch.equal(disk_offloaded(model, tmp_path, cuda).generate(**inputs), expected)
