"""Where kernels run in these tests: on a GPU, or in Triton's interpreter, for which a process must be set up from its
start (`test_interpreter.py` starts one that runs the tests of all kernels)."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(
    params=[pytest.param("cpu", id="interpreter"), pytest.param("cuda", id="gpu", marks=pytest.mark.gpu)],
)
def kernel_device(request: pytest.FixtureRequest) -> str:
    """The device whose tensors a kernel is given."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("runs in the interpreter, started by test_interpreter.py")
    if request.param == "cuda" and INTERPRETED:
        pytest.skip("this process interprets kernels")
    return request.param


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that compile kernels, which needs no GPU."""
    pytest.importorskip("triton")
    if INTERPRETED:
        pytest.skip("this process interprets kernels")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
