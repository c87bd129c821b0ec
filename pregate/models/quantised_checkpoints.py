"""Quantised checkpoints as a view: their weights are read together with their scales, and decoded as they are read.

Two forms are known: block fp8 (DeepSeek-V3, Qwen3-FP8) and MXFP4 (gpt-oss). Everything is checked from the headers.
Knows how numbers are stored; knows nothing about model families.

Letters: R rows and C columns of a matrix, E experts, G groups of 32 numbers that share a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pregate.config import UsageError
from pregate.models.checkpoint import QUANTISATION, Encoding, SourceCheckpoint, TensorInfo

FP8_SCALES, FP4_BLOCKS, FP4_SCALES = "_scale_inv", "_blocks", "_scales"
FP8_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
GROUP, STRIP = 32, 64
"""Numbers of MXFP4 that share a scale and take 16 bytes; rows that are decoded at a time."""
READ = "use the model in bfloat16 or float16, in block fp8, or in MXFP4"
DAMAGED = "fetch the checkpoint again from its publisher"


class Quantised(NamedTuple):
    """A tensor of the model and how it is stored: the names of its numbers and its scales, what shape and dtype the
    scales must have, the shape of the decoded tensor, and the decoding, which is also given the dtype."""

    name: str
    numbers: str
    scales: str
    scales_shape: tuple[int, ...]
    scales_dtypes: tuple[torch.dtype, ...]
    shape: tuple[int, ...]
    decode: Callable[..., Tensor]


def decoded(checkpoint: SourceCheckpoint) -> SourceCheckpoint:
    """`checkpoint` as the model that it was quantised from, in the dtype of its config, or bfloat16 where that names
    none; `checkpoint` itself where it is not quantised.

    Raises `UsageError` for another quantisation, and for numbers without scales or scales without numbers.
    """
    said = checkpoint.config.get(QUANTISATION)
    if said is None:
        _refuse_lone(checkpoint, (FP8_SCALES, FP4_BLOCKS), f"its config.json has no {QUANTISATION}")
        return checkpoint
    method = said.get("quant_method") if isinstance(said, dict) else None
    if method not in METHODS:
        raise UsageError(f"{checkpoint.directory} is quantised by {method or 'a nameless method'}: {READ}.")
    find, suffixes = METHODS[method]
    dtype = _dtype(checkpoint.config)
    views: dict[str, tuple[str, TensorInfo]] = {}
    scales: set[str] = set()
    for found in find(checkpoint, said):
        parts = tuple(_part(checkpoint, name) for name in (found.numbers, found.scales))
        _check_scales(checkpoint, found, parts[1])
        encoding = Encoding(parts, partial(found.decode, dtype=dtype))
        views[found.numbers] = found.name, TensorInfo(parts[0].file, found.shape, dtype, parts[0].key, encoding)
        scales.add(found.scales)
    kept = {name: info for name, info in checkpoint.tensors.items() if name not in scales}
    tensors = dict(views.get(name, (name, info)) for name, info in kept.items())
    if len(tensors) < len(kept):
        twice = next(name for name, _ in views.values() if name in kept and name not in views)
        raise UsageError(f"{checkpoint.directory} holds {twice} both quantised and not: {DAMAGED}.")
    config = {name: value for name, value in checkpoint.config.items() if name != QUANTISATION}
    opened = replace(checkpoint, tensors=tensors, config=config)
    _refuse_lone(opened, suffixes, "not the numbers that belong to it")
    return opened


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    named = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch."), None)
    floating = isinstance(named, torch.dtype) and named.is_floating_point and named.itemsize > 1
    return named if floating else torch.bfloat16  # type: ignore[return-value]


def _part(checkpoint: SourceCheckpoint, name: str) -> TensorInfo:
    info = checkpoint.tensors.get(name)
    if info is None:
        raise UsageError(f"{checkpoint.directory} is quantised and lacks {name}: {DAMAGED}.")
    return replace(info, key=info.key or name)


def _check_scales(checkpoint: SourceCheckpoint, found: Quantised, scales: TensorInfo) -> None:
    if scales.shape != found.scales_shape:
        raise UsageError(
            f"{checkpoint.directory} holds {found.scales} of shape {scales.shape}, not {found.scales_shape}, which "
            f"the shape of {found.numbers} asks for: {DAMAGED}."
        )
    if scales.dtype not in found.scales_dtypes:
        name = str(scales.dtype).removeprefix("torch.")
        raise UsageError(f"{checkpoint.directory} holds {found.scales} in {name}, which is not read: {READ}.")


def _refuse_lone(checkpoint: SourceCheckpoint, suffixes: tuple[str, ...], lacking: str) -> None:
    lone = next((name for name in checkpoint.tensors if name.endswith(suffixes)), None)
    if lone is not None:
        what = "packed numbers" if lone.endswith(FP4_BLOCKS) else "a scale"
        raise UsageError(f"{checkpoint.directory} holds {lone}, {what}, but {lacking}: {DAMAGED}.")


# --- block fp8 ------------------------------------------------------------------------------------------------------


def _find_block_fp8(checkpoint: SourceCheckpoint, said: Mapping[str, Any]) -> Iterator[Quantised]:
    """Every matrix of fp8 numbers, which has one scale for each block of rows and columns. It may have leading
    dimensions, and so have the scales."""
    block = said.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(type(side) is int and side > 0 for side in block)):
        raise UsageError(f"{checkpoint.directory} is quantised in fp8 with weight_block_size={block}: {READ}.")
    for name, info in checkpoint.tensors.items():
        if info.dtype is torch.float8_e4m3fn and len(info.shape) >= 2:
            *leading, R, C = info.shape
            grid = (*leading, -(-R // block[0]), -(-C // block[1]))
            decode = partial(decode_block_fp8, block=tuple(block))
            yield Quantised(name, name, name + FP8_SCALES, grid, FP8_SCALE_DTYPES, info.shape, decode)


def decode_block_fp8(stored: Sequence[Tensor], block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """`stored`: numbers (…, R, C) and the scales of their blocks. Products are made in float32, a strip of blocks at
    a time. The scale multiplies, although checkpoints call it an inverse."""
    numbers, scales = stored
    decoded = torch.empty(numbers.shape, dtype=dtype)
    of_matrices = (t.reshape(-1, *t.shape[-2:]) for t in (numbers.view(torch.uint8), scales.float(), decoded))
    for codes_RC, scales_of_blocks, decoded_RC in zip(*of_matrices, strict=True):
        strips = codes_RC.split(block[0]), scales_of_blocks, decoded_RC.split(block[0])
        for codes, scale, into in zip(*strips, strict=True):
            # looking up all 256 values is several times faster than torch's conversion on a CPU
            values = _values(torch.float8_e4m3fn).index_select(0, codes.flatten().int()).view(codes.shape)
            torch.mul(values, scale.repeat_interleave(block[1])[: codes.shape[1]], out=into)
    return decoded


@lru_cache
def _values(dtype: torch.dtype) -> Tensor:
    """What each code of a one-byte dtype means, in float32."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).float()


# --- MXFP4 ----------------------------------------------------------------------------------------------------------


def _find_mxfp4(checkpoint: SourceCheckpoint, said: Mapping[str, Any]) -> Iterator[Quantised]:
    """Every pair `NAME_blocks` (E, R, G, 16) and `NAME_scales` (E, R, G). The model has NAME the other way round:
    (E, C, R) with C = 32 G."""
    for name, info in checkpoint.tensors.items():
        if name.endswith(FP4_BLOCKS):
            if info.dtype is not torch.uint8 or len(info.shape) != 4 or info.shape[3] != GROUP // 2:
                raise UsageError(
                    f"{checkpoint.directory} holds {name} of shape {info.shape} in "
                    f"{str(info.dtype).removeprefix('torch.')}, which is no MXFP4: {READ}."
                )
            E, R, G, _ = info.shape
            stem = name.removesuffix(FP4_BLOCKS)
            yield Quantised(stem, name, stem + FP4_SCALES, (E, R, G), (torch.uint8,), (E, G * GROUP, R), decode_mxfp4)


def decode_mxfp4(stored: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """`stored`: blocks (E, R, G, 16), two numbers a byte with the first in its low half, and the exponents of their
    powers of two (E, R, G), with an offset of 127; 255 is NaN. Gives (E, 32 G, R)."""
    blocks, scales = stored
    E, R, G, _ = blocks.shape
    decoded = torch.empty(E, G * GROUP, R, dtype=dtype)
    for blocks_RG, scales_RG, decoded_CR in zip(blocks, scales, decoded, strict=True):
        # a strip of rows stays in cache until it is transposed, which is eight times faster than all rows at once
        strips = (part.split(STRIP, axis) for part, axis in ((blocks_RG, 0), (scales_RG, 0), (decoded_CR, 1)))
        for codes, exponents, into in zip(*strips, strict=True):
            numbers = _pairs().index_select(0, codes.flatten().int()).view(torch.float32).view(-1, G, GROUP)
            numbers *= _values(torch.float8_e8m0fnu)[exponents.int()].unsqueeze(-1)
            into.copy_(numbers.view(-1, G * GROUP).to(dtype).mT)
    return decoded


@lru_cache
def _pairs() -> Tensor:
    """(256,): the two float32 numbers that each byte holds, as one element, which is looked up faster than two. A
    number has one sign bit, two exponent bits and one mantissa bit."""
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    numbers = torch.cat([magnitudes, -magnitudes])
    return torch.stack([numbers.repeat(16), numbers.repeat_interleave(16)], 1).view(torch.int64).flatten()


METHODS = {
    "fp8": (_find_block_fp8, (FP8_SCALES,)),
    "mxfp4": (_find_mxfp4, (FP4_SCALES, FP4_BLOCKS)),
}
"""`quant_method` -> what finds the quantised tensors, and how the names end that must not be left over."""
