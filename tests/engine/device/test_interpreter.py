"""The tests of the kernels, in a process of their own in which Triton interprets them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent.parent


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_kernel_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this process is the interpreter's")
    suites = sorted((HERE / "ops").glob("test_*.py"))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "interpreter", *map(str, suites)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (\w+)", done.stdout.splitlines()[-1])}
    assert counts.get("passed", 0) >= 20 and "skipped" not in counts, done.stdout[-2000:]
