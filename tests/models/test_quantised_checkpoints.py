"""Quantised checkpoints are read with their scales or refused: against loops over single numbers, and upstream."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, GptOssForCausalLM, OlmoeForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.utils.quantization_config import Mxfp4Config

from pregate import OffloadEngine
from pregate.config import Policy, PreGateConfig, SlabDtype, Tier, UsageError
from pregate.conversion.write import convert
from pregate.engine.opening import Opened
from pregate.engine.storage.pack import SLABS
from pregate.models.checkpoint import SourceCheckpoint
from pregate.models.family import dtype_name
from pregate.models.loading import load_resident, open_model
from pregate.models.quantised_checkpoints import decode_block_fp8, decode_mxfp4
from pregate.training.stages import _copy_model
from tests.models import quantised
from tests.models.families.test_decoder_only import Row, every_family, upstream_model
from tests.models.quantised import FP8, from_block_fp8, in_block_fp8, write
from tests.models.test_checkpoint import sentence

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Tensors = dict[str, Tensor]
PROMPT = {"input_ids": torch.tensor([[5, 9, 2, 30, 17], [8, 8, 40, 3, 11]])}

# --- numbers --------------------------------------------------------------------------------------------------------


def fp8_number(code: int) -> float:
    """One sign bit, four exponent bits with an offset of 7, three mantissa bits; no infinity."""
    sign, exponent, mantissa = -1.0 if code & 128 else 1.0, (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def fp4_number(code: int) -> float:
    """One sign bit, two exponent bits with an offset of 1, one mantissa bit."""
    sign, exponent, mantissa = -1.0 if code & 8 else 1.0, (code >> 1) & 3, code & 1
    return sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_every_fp8_number_times_the_scale_of_its_block(dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    """Of two matrices whose last blocks are cut off in both directions."""
    codes = torch.arange(2 * 13 * 20).reshape(2, 13, 20).mul(7).remainder(256).to(torch.uint8)
    scales = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)).add(0.1).to(scale_dtype)
    got = decode_block_fp8([codes.view(torch.float8_e4m3fn), scales], block=(5, 6), dtype=dtype)
    expected = torch.tensor(
        [
            [
                [fp8_number(int(codes[m, r, c])) * float(scales[m, r // 5, c // 6].float()) for c in range(20)]
                for r in range(13)
            ]
            for m in range(2)
        ]
    )
    assert set(codes.flatten().tolist()) == set(range(256)) and got.dtype is dtype
    torch.testing.assert_close(got, expected.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_fp4_number_times_every_scale(dtype: torch.dtype) -> None:
    """Row r has the exponent r. Byte i holds the number i in its low half and the number 15 - i in its high half."""
    blocks = (torch.arange(16) + (15 - torch.arange(16)) * 16).to(torch.uint8).expand(1, 256, 1, 16)
    scales = torch.arange(256, dtype=torch.uint8).view(1, 256, 1)
    got = decode_mxfp4([blocks, scales], dtype=dtype)
    numbers = [fp4_number(code) for i in range(16) for code in (i, 15 - i)]
    assert sorted(set(numbers)) == [-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]
    powers = [2.0 ** (exponent - 127) if exponent < 255 else math.nan for exponent in range(256)]
    expected = torch.tensor([[[n * power for power in powers] for n in numbers]], dtype=torch.float64).to(dtype)
    assert got.shape == (1, 32, 256) and got.is_contiguous()
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_mxfp4_is_what_upstream_makes_of_it() -> None:
    draw = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 2, 16), dtype=torch.uint8, generator=draw)
    scales = torch.randint(90, 160, (3, 10, 2), dtype=torch.uint8, generator=draw)
    got = decode_mxfp4([blocks, scales], dtype=torch.bfloat16)
    assert torch.equal(got, convert_moe_packed_tensors(blocks, scales)) and got.abs().max() > 1000


# --- models ---------------------------------------------------------------------------------------------------------


@cache
def contents(
    kind: str, dtype: torch.dtype = torch.bfloat16
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """The config of a quantised checkpoint, its tensors, and those of the same model in `dtype`."""
    if kind == "mxfp4":
        config, stored = quantised.gpt_oss()
        plain = {name: tensor for name, tensor in stored.items() if not name.endswith(("_blocks", "_scales"))}
        for name in (name.removesuffix("_blocks") for name in stored if name.endswith("_blocks")):
            parts = stored[f"{name}_blocks"], stored[f"{name}_scales"]
            plain[name] = convert_moe_packed_tensors(*parts, dtype=dtype)
        return config, stored, plain
    config, tensors = quantised.olmoe()
    stored = in_block_fp8(tensors, torch.bfloat16 if kind == "fp8, scales in bf16" else torch.float32)
    return {**config, "quantization_config": FP8}, stored, from_block_fp8(stored, dtype)


KINDS = ("fp8", "fp8, scales in bf16", "mxfp4")


def both(root: Path, kind: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Path, Path]:
    """The quantised checkpoint, and one of the same model in `dtype`, which the config names unless it is bfloat16."""
    config, stored, plain = contents(kind, dtype)
    settings = {} if dtype is torch.bfloat16 else {"dtype": dtype_name(dtype)}
    same = {name: value for name, value in config.items() if name != "quantization_config"}
    return write(root / "quantised", {**config, **settings}, stored), write(root / "plain", {**same, **settings}, plain)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.isfinite().all() and tensor.dtype is other[name].dtype
        assert torch.equal(tensor, other[name]), name


def stored_in(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_model_in_bfloat16(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    directory, plain = both(tmp_path, kind)
    one, other = load_resident(directory), load_resident(plain)
    assert one.dtype is torch.bfloat16 and not hasattr(one.config, "quantization_config")
    assert_same(one.state_dict(), other.state_dict())
    told = [line for line in capsys.readouterr().err.splitlines() if "quantised" in line]
    assert told == [
        f"pregate: {directory} is quantised: its weights are decoded to bfloat16 as they are read, and a checkpoint "
        "that is made from it holds them so."
    ]
    load_resident(directory)
    assert "quantised" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_it_is_the_model_that_upstream_loads(tmp_path: Path, kind: str) -> None:
    """Upstream decodes too, on a CPU, but only matrices that blocks fill."""
    if kind == "mxfp4":
        directory, _ = both(tmp_path, kind)
        theirs: Any = GptOssForCausalLM.from_pretrained(directory, quantization_config=Mxfp4Config(dequantize=True))
    else:
        config, tensors = quantised.olmoe(hidden_size=48, intermediate_size=32)
        directory = write(tmp_path / "fp8", {**config, "quantization_config": FP8}, in_block_fp8(tensors))
        says = FineGrainedFP8Config(dequantize=True, weight_block_size=quantised.BLOCK)
        theirs = OlmoeForCausalLM.from_pretrained(directory, quantization_config=says)
    assert_same(load_resident(directory).state_dict(), theirs.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_converted_to_bfloat16(tmp_path: Path, kind: str) -> None:
    """No read takes more than a file of the output, or one tensor where that is larger."""
    directory, plain = both(tmp_path, kind)
    most, reads, read = 30_000, [], SourceCheckpoint.read

    def counted(source: SourceCheckpoint, names: Any) -> dict[str, Tensor]:
        found = read(source, names)
        reads.append([tensor.nbytes for tensor in found.values()])
        return found

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(SourceCheckpoint, "read", counted)
        convert(str(directory), tmp_path / "one", PreGateConfig(lookahead=1), max_shard_bytes=most)
    convert(str(plain), tmp_path / "other", PreGateConfig(lookahead=1), max_shard_bytes=most)
    assert len(reads) > 5 and all(sum(sizes) <= most or len(sizes) == 1 for sizes in reads), reads
    assert_same(stored_in(tmp_path / "one"), stored_in(tmp_path / "other"))
    config, other = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "other"))
    assert config == other and "quantization_config" not in config
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert_same(model.state_dict(), load_resident(tmp_path / "other").state_dict())


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_a_copy_is_written_decoded(tmp_path: Path, kind: str) -> None:
    """As training writes it where it has no steps to make."""
    directory, plain = both(tmp_path, kind)
    (tmp_path / "copy").mkdir()
    _copy_model(str(directory), None, tmp_path / "copy")
    assert "quantization_config" not in json.loads((tmp_path / "copy" / "config.json").read_text())
    assert_same(load_resident(tmp_path / "copy").state_dict(), load_resident(plain).state_dict())


@pytest.mark.parametrize("stored", [SlabDtype.source, SlabDtype.int8])
@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_experts_are_packed_decoded(tmp_path: Path, kind: str, stored: SlabDtype) -> None:
    """The packs are equal byte for byte. A tensor that holds many experts is decoded once, not for each run of them."""
    directory, plain = both(tmp_path, kind)
    read_names: list[str] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("pregate.engine.storage.origin.MAPPED_BYTES", 1)
        read = SourceCheckpoint.read
        patched.setattr(SourceCheckpoint, "read", lambda s, names: read_names.extend(names) or read(s, names))
        for source in (directory, plain):
            opened = Opened(source)
            read_names.clear()
            opened.store(
                opened.layout(stored), Tier.disk, torch.device("cpu"), tmp_path / f"pack-{source.name}"
            ).close()
            read_encoded = [name for name in read_names if opened.source.tensors[name].encoding]
            assert len(read_encoded) == len(set(read_encoded)) and bool(read_encoded) is (source is directory)
    one, other = ((tmp_path / f"pack-{name}" / SLABS).read_bytes() for name in ("quantised", "plain"))
    assert one == other and len(set(one)) > 100


@pytest.mark.parametrize("policy", [Policy.on_demand, Policy.prefetch_all, Policy.pre_gated])
@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_the_engine_serves_it(tmp_path: Path, kind: str, policy: Policy) -> None:
    """In float32, which the config asks for: sums round differently at another alignment, and bfloat16 shows it."""
    directory, plain = both(tmp_path, kind, torch.float32)
    asked = {**PROMPT, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    resident: Any = load_resident(plain)
    expected = resident.generate(**asked)
    assert len(set(expected[:, 5:].flatten().tolist())) > 3
    for tier in (Tier.disk, Tier.dram):
        with OffloadEngine.open(directory, policy=policy, tier=tier, device_budget="50%") as engine:
            tokens = engine.generate(**asked)
            logits = engine.forward(**PROMPT).logits
            assert engine.counters.bytes_moved > 0 and logits.isfinite().all()
        assert torch.equal(tokens, expected)
        torch.testing.assert_close(logits, resident(**PROMPT).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("named", ["dtype", "torch_dtype"])
def test_the_config_names_the_dtype(tmp_path: Path, named: str) -> None:
    config, stored, _ = contents("fp8")
    said = {name: value for name, value in config.items() if name != "dtype"}
    opened = open_model(str(write(tmp_path / "model", {**said, named: "float32"}, stored)))
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    assert opened.dtype(name) is torch.float32 and opened.num_bytes(name) == 4 * stored[name].numel()
    expected = from_block_fp8(stored, torch.float32)[name]
    assert torch.equal(opened.read([name])[name], expected)
    assert not torch.equal(expected, expected.bfloat16().float()), "it holds more than bfloat16 can"


@every_family
def test_every_family_is_read_from_block_fp8(row: Row, tmp_path: Path) -> None:
    """Named as on the hub, where some names are others than in the model, and some experts are one tensor."""
    upstream_model(row, 30).to(torch.bfloat16).save_pretrained(tmp_path / "hub")
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    stored = in_block_fp8(stored_in(tmp_path / "hub"), matrices=r"experts.*(weight|proj)$|_(proj|linear)\.weight$")
    numbers = [name for name in stored if name.endswith("_scale_inv")]
    assert any("expert" in n or "moe" in n for n in numbers) and any("attn" in n for n in numbers), sorted(stored)
    directory = write(tmp_path / "quantised", {**config, "quantization_config": FP8}, stored)
    plain = write(tmp_path / "plain", config, from_block_fp8(stored))
    assert_same(load_resident(directory).state_dict(), load_resident(plain).state_dict())


def test_prefixes_of_wrappers_stand_before_scales_too(tmp_path: Path) -> None:
    config, stored, plain = contents("fp8")
    directory = write(tmp_path / "model", config, {f"module.{name}": tensor for name, tensor in stored.items()})
    opened = open_model(str(directory))
    assert_same(opened.read(opened.names()), plain)


# --- refusals -------------------------------------------------------------------------------------------------------

WEIGHT = "model.layers.1.mlp.experts.2.up_proj.weight"
BLOCKS = "model.layers.1.mlp.experts.down_proj_blocks"
SCALES = "model.layers.1.mlp.experts.down_proj_scales"
Change = Callable[[dict[str, Any], dict[str, Tensor]], Any]


def quantised_by(**said: Any) -> Change:
    return lambda config, _: config.update(quantization_config=said)


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda _, tensors: tensors.update({name: change(tensors[name])})


def dropped(name: str) -> Change:
    return lambda _, tensors: tensors.pop(name)


REFUSED: dict[str, tuple[str, Change, str]] = {
    **{
        method: (
            "fp8",
            quantised_by(quant_method=method, bits=4),
            f"is quantised by {method}: use the model in bfloat16",
        )
        for method in ("gptq", "awq", "bitsandbytes", "compressed-tensors")
    },
    "no method": ("fp8", quantised_by(bits=4), "is quantised by a nameless method"),
    "no section": ("fp8", lambda config, _: config.pop("quantization_config"), "has no quantization_config"),
    "one scale a tensor": ("fp8", quantised_by(quant_method="fp8"), "in fp8 with weight_block_size=None"),
    "no block": ("fp8", quantised_by(quant_method="fp8", weight_block_size=[128, 0]), "weight_block_size=[128, 0]"),
    "another block": (
        "fp8",
        quantised_by(quant_method="fp8", weight_block_size=[128, 128]),
        "_proj.weight_scale_inv of shape (3, 3), not (1, 1)",
    ),
    "no scale": ("fp8", dropped(f"{WEIGHT}_scale_inv"), f"is quantised and lacks {WEIGHT}_scale_inv"),
    "a lone scale": (
        "fp8",
        changed(WEIGHT, Tensor.bfloat16),
        f"holds {WEIGHT}_scale_inv, a scale, but not the numbers",
    ),
    "a scale without its matrix": ("fp8", dropped(WEIGHT), f"holds {WEIGHT}_scale_inv, a scale, but not the numbers"),
    "a scale of another shape": (
        "fp8",
        changed(f"{WEIGHT}_scale_inv", lambda scale: scale[:1]),
        f"{WEIGHT}_scale_inv of shape (1, 5), not (2, 5)",
    ),
    "a scale of whole numbers": (
        "fp8",
        changed(f"{WEIGHT}_scale_inv", lambda scale: scale.to(torch.uint8)),
        f"{WEIGHT}_scale_inv in uint8, which is not read",
    ),
    "another fp8": ("fp8", changed(WEIGHT, lambda t: t.to(torch.float8_e5m2)), f"{WEIGHT}_scale_inv, a scale, but not"),
    "a vector of fp8": (
        "fp8",
        changed("model.norm.weight", lambda t: t.to(torch.float8_e4m3fn)),
        "holds model.norm.weight in float8_e4m3fn",
    ),
    "no mxfp4 scale": ("mxfp4", dropped(SCALES), f"is quantised and lacks {SCALES}"),
    "a lone mxfp4 scale": ("mxfp4", dropped(BLOCKS), f"holds {SCALES}, a scale, but not the numbers"),
    "mxfp4 without a section": (
        "mxfp4",
        lambda config, _: config.pop("quantization_config"),
        "packed numbers, but its",
    ),
    "another mxfp4 scale": (
        "mxfp4",
        changed(SCALES, lambda t: t[:, 1:]),
        f"{SCALES} of shape (4, 63, 1), not (4, 64, 1)",
    ),
    "blocks of another size": ("mxfp4", changed(BLOCKS, lambda t: t[..., :8]), "which is no MXFP4"),
    "both": (
        "mxfp4",
        lambda _, tensors: tensors.update({BLOCKS.removesuffix("_blocks"): torch.ones(4, 32, 64)}),
        "down_proj both quantised and not",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_decoded_is_refused_before_any_work(tmp_path: Path, case: str) -> None:
    kind, change, reason = REFUSED[case]
    config, tensors = dict(contents(kind)[0]), dict(contents(kind)[1])
    change(config, tensors)
    directory = write(tmp_path / "model", config, tensors)
    with pytest.MonkeyPatch.context() as patched:
        patched.delattr(SourceCheckpoint, "read")
        for way in (open_model, load_resident, OffloadEngine.open):
            with pytest.raises(UsageError) as error:
                way(str(directory))
            assert reason in sentence(error), sentence(error)
        with pytest.raises(UsageError) as error:
            convert(str(directory), tmp_path / "converted", PreGateConfig(lookahead=1))
        assert reason in sentence(error) and not (tmp_path / "converted").exists()


def test_numbers_with_scales_of_a_state_dict_file_are_read_too(tmp_path: Path) -> None:
    config, stored, plain = contents("fp8")
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    torch.save(stored, tmp_path / "pytorch_model.bin")
    opened = open_model(str(tmp_path))
    assert_same(opened.read(opened.names()), plain)
    assert save_file(opened.read([WEIGHT]), tmp_path / "one.safetensors") is None
