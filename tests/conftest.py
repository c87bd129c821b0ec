"""Test-wide settings: one thread, because tiny tensors spend longer waking threads than computing."""

import atexit
import os
import shutil
import signal
import tempfile

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ["PREGATE_CACHE"] = tempfile.mkdtemp(prefix="pregate-tokens-")
atexit.register(shutil.rmtree, os.environ["PREGATE_CACHE"], ignore_errors=True)


def pytest_configure(config: pytest.Config) -> None:
    import torch

    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # a shell starts its background jobs so; tests press Ctrl-C, and what they start would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture
def in_process_hydra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep Hydra from configuring logging: it closes every handler of the process, and with them the streams that
    pytest has lent to libraries."""
    for module in ("hydra._internal.hydra", "hydra.core.utils"):
        monkeypatch.setattr(f"{module}.configure_log", lambda *args, **kwargs: None)
