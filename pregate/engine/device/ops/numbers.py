"""How the kernels read and write numbers of every dtype, and round where torch does.

bfloat16 is handled as the upper half of a float32, and fp8 (e4m3) as a float16 with its bits moved, which is exact:
neither needs a type that some devices, or the interpreter, lack. Knows dtypes only.
"""

from __future__ import annotations

import torch

from pregate.engine.device.ops.language import tl, triton

FLOATS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
RAW = {"bf16": torch.int16, "fp16": torch.float16, "fp32": torch.float32, "int8": torch.int8, "fp8": torch.uint8}
"""What tensors of each kind are viewed as."""


@triton.jit
def numbers(raw, KIND: tl.constexpr):
    """float32 from what was loaded."""
    if KIND == "bf16":
        value = (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif KIND == "fp8":
        # the bits of an e4m3 number, moved, are a float16 of 2 ** -8 times its value, subnormal ones included
        code = raw.to(tl.int16)
        value = (((code & 0x80) << 8) | ((code & 0x7F) << 7)).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    else:
        value = raw.to(tl.float32)
    return value


@triton.jit
def rounded(value, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """The nearest number of `KIND` (ties to even), in float32. The interpreter's own cast to bfloat16 cuts off."""
    if KIND == "fp16":
        value = value.to(tl.float16).to(tl.float32)
    elif KIND == "bf16" and NATIVE:
        value = value.to(tl.bfloat16).to(tl.float32)
    elif KIND == "bf16":
        bits = value.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        # a NaN stays one, whichever of its bits are cut off
        value = tl.where(value == value, nearest, bits | 0x400000).to(tl.float32, bitcast=True)
    return value


@triton.jit
def stored(value, KIND: tl.constexpr):
    """What `numbers` reads back as `value`, a float32 that is rounded already."""
    if KIND == "bf16":
        value = (value.to(tl.int32, bitcast=True) >> 16).to(tl.int16)
    elif KIND == "fp16":
        value = value.to(tl.float16)
    return value


@triton.jit
def operand(value, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """A rounded float32 as the tensor cores take it; the interpreter multiplies in float32, which is as exact."""
    if KIND == "fp16":
        value = value.to(tl.float16)
    elif KIND == "bf16" and NATIVE:
        value = value.to(tl.bfloat16)
    return value
