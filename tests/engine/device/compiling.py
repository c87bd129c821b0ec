"""Compiles a kernel for a GPU that need not be there."""

from __future__ import annotations

from typing import Any

MANY = [["tt.divisibility", 16]]


def compiled(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], num_warps: int, architecture: int = 90
) -> Any:
    """`kernel` for aligned tensors (and sizes), as a launch with them compiles it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(place,): MANY for place, name in enumerate(kernel.arg_names) if name in signature}
    source = ASTSource(kernel, types, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": num_warps})
