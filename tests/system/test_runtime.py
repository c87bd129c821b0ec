import json
import random
import re
import socket
import subprocess

import numpy as np
import pytest
import torch

from pregate.config import Device, UsageError
from pregate.system import runtime


def test_set_seed_repeats_every_generator():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    runtime.set_seed(7)
    first = draw()
    runtime.set_seed(7)
    assert draw() == first
    runtime.set_seed(2**40 + 1)
    assert draw() != first


def test_pick_device_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runtime.pick_device(Device.auto).type == "cpu"
    with pytest.raises(UsageError, match=r"engine\.device=cpu"):
        runtime.pick_device(Device.cuda)


def test_pick_device_with_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [runtime.pick_device(d).type for d in (Device.auto, Device.cuda, Device.cpu)] == ["cuda", "cuda", "cpu"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4GB", 4_000_000_000),
        ("512MiB", 512 * 2**20),
        ("1.5G", 1_500_000_000),
        ("1.5gib", 3 * 2**29),
        (" 20 kB ", 20_000),
        (".5T", 500_000_000_000),
        ("4096", 4096),
        ("17B", 17),
        (123, 123),
        ("9007199254740993", 9007199254740993),  # 2**53 + 1: a float would lose the last byte
    ],
)
def test_parse_bytes(text, expected):
    assert runtime.parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1", "4 apples", "25%", "1e9", "4PB", "nan", "4i", "1.2.3G", True])
def test_parse_bytes_refuses(text):
    with pytest.raises(UsageError, match="is not a size"):
        runtime.parse_bytes(text)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (4_718_592, "4.72 MB"),
        (47_185_920, "47.2 MB"),
        (999_600, "1.00 MB"),
        (25e9, "25.0 GB"),
        (3.2e15, "3200 TB"),
    ],
)
def test_human_bytes(size, expected):
    assert runtime.human_bytes(size) == expected


def test_first_of_tells_how_many_more_there_are():
    assert runtime.first_of(["a"]) == "a"
    assert runtime.first_of(["a", "b", "c"]) == "a and 2 more"
    assert runtime.first_of(["a", "b", "c"], 3, " ") == "a b c"


def test_environment_is_publishable_json(monkeypatch):
    facts = runtime.environment()
    text = json.dumps(facts)
    assert {"python", "torch", "transformers", "pregate", "cpu", "cores", "memory_gib", "platform"} <= set(facts)
    assert facts["torch"] == torch.__version__.split("+")[0] or facts["torch"] == torch.__version__
    assert facts["cores"] >= 1
    assert facts["memory_gib"] > 0
    names = [socket.gethostname(), str(runtime.Path(runtime.__file__).parent)]
    assert not [name for name in names if re.search(rf"\b{re.escape(name)}\b", text)]


def test_git_state_only_of_a_checkout_that_tracks_the_file(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    tracked, stray = tmp_path / "tracked.py", tmp_path / "stray.py"
    tracked.write_text("1")
    stray.write_text("1")
    assert runtime._git_state(tracked) is None
    git("init", "-q")
    git("add", "tracked.py")
    git("commit", "-qm", "x")
    state = runtime._git_state(tracked)
    assert state is not None
    assert re.fullmatch(r"[0-9a-f]{40}", state["commit"])
    assert state["dirty"] is False
    assert runtime._git_state(stray) is None
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "cells.jsonl").write_text("1")
    git("add", "results")
    state = runtime._git_state(tracked)
    assert state is not None and state["dirty"] is False, "what a run records about itself is no change"
    tracked.write_text("2")
    dirty = runtime._git_state(tracked)
    assert dirty is not None
    assert dirty["dirty"] is True


def test_write_json_is_whole_or_untouched(tmp_path):
    path = tmp_path / "a.json"
    runtime.write_json(path, {"x": np.float32(0.5), "t": torch.tensor([1, 2]), "bad": float("nan"), "d": Device.cpu})
    assert json.loads(path.read_text()) == {"x": 0.5, "t": [1, 2], "bad": None, "d": "cpu"}

    class Unprintable:
        def __str__(self):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        runtime.write_json(path, {"x": Unprintable()})
    assert json.loads(path.read_text())["x"] == 0.5
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_console_is_wide_enough_for_the_tables_when_piped(capsys):
    assert runtime.console().width == 100
