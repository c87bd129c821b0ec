"""The device-driven engine: which slab goes where, moving it and computing with it, all without asking the host.

Every operation here has two forms with one result: a Triton kernel for tensors on a GPU, and a twin in plain torch
for tensors in host memory. Triton is imported only when a kernel runs, so that importing this package needs none.
"""

from __future__ import annotations

from pregate.config import UsageError


def require_triton() -> None:
    """Raises `UsageError` where the kernels cannot be compiled, before any memory is taken for them."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise UsageError("Decoding on the device needs Triton: pip install triton, or use the host engine.") from error
