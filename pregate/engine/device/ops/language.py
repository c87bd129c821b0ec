"""Triton where it is installed, and a placeholder where it is not, so that kernels can be defined either way.

torch brings Triton for CUDA. An installation for the CPU has none, and runs the reference implementations.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pregate.config import UsageError


class _Absent:
    """Leaves kernels as plain functions, which nothing can launch."""

    @staticmethod
    def jit(kernel: Callable[..., Any]) -> Callable[..., Any]:
        return kernel

    @staticmethod
    def constexpr(value: Any) -> Any:
        return value


if TYPE_CHECKING:
    import triton.language as tl

    triton: Any = None
else:
    try:
        import triton
        import triton.language as tl
    except ImportError:
        triton = tl = _Absent()


def require_triton() -> None:
    """Raises `UsageError` where the kernels cannot be compiled, before any memory is taken for them."""
    try:
        import_module("triton")
    except ImportError as error:
        raise UsageError("Decoding on the device needs Triton: pip install triton, or use the host engine.") from error
