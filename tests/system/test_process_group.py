"""Several processes of one run: what launchers ask for, who speaks, and how all end together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import PartialState
from accelerate.state import AcceleratorState
from torch.distributed import DistNetworkError, HashStore

from pregate.cli import ending_in_one_sentence
from pregate.config import UsageError
from pregate.system import launcher_environment, process_exit, process_group
from pregate.system.console import say

ROOT = Path(__file__).parents[2]
LAUNCHED = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that no launcher started and that has met no other; what Accelerate notes is forgotten after it."""
    monkeypatch.setattr(process_exit, "group", None)
    monkeypatch.setattr(PartialState, "_shared_state", {})
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    written = (
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        *launcher_environment.SIZES,
        *launcher_environment.RANKS,
    )
    for name in {*written, *(name for name in os.environ if name.startswith("ACCELERATE_"))}:
        monkeypatch.setenv(name, "")  # noted, so that it is as before afterwards
        monkeypatch.delenv(name)


def given(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (
            {"ACCELERATE_USE_FSDP": "true"},
            r"FSDP was asked for .*train\.sharding=full .* leave it out .*`torchrun --nproc_per_node N",
        ),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed was asked for"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM was asked for"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "A parallelism config was asked for"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, r"=4 does not apply: train\.batch_sequences"),
        (LAUNCHED, r"several processes .* has started one.* start `torchrun --nproc_per_node N -m pregate.train …`"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two must be a whole number"),
        # nobody else comes: a process that is told so by its launcher must not train by itself
        ({"WORLD_SIZE": "2", "RANK": "0", "ACCELERATE_TORCH_DEVICE": "cpu"}, "cannot meet"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given(monkeypatch, variables)
    with pytest.raises(UsageError, match=said) as refused:
        process_group.join()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "variables", [{}, {"ACCELERATE_USE_FSDP": "false"}, {"ACCELERATE_USE_CPU": "True"}, {"WORLD_SIZE": "1"}]
)
def test_one_process_needs_no_launcher(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, variables)
    state = process_group.join()
    assert (state.num_processes, state.process_index) == (1, 0)
    done: list[int] = []
    process_group.main_only(lambda: done.append(1), "counting")
    assert done == [1] and process_exit.may_tell()


@pytest.mark.parametrize("variable", launcher_environment.SIZES)
@pytest.mark.parametrize("command", ["eval", "convert", "bench"])
def test_commands_for_one_process_refuse_several(command: str, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, {variable: "2"})
    with pytest.raises(UsageError, match=rf"{variable}=2 asks for 2: .* `python -m pregate\.{command} …`"):
        launcher_environment.check_alone(command)
    monkeypatch.setenv(variable, "1")
    launcher_environment.check_alone(command)
    given(monkeypatch, LAUNCHED)
    launcher_environment.check_alone(command)
    monkeypatch.delenv(variable)
    with pytest.raises(UsageError, match="several processes"):
        launcher_environment.check_alone(command)


@pytest.mark.parametrize("command", ["eval", "convert", "bench"])
def test_those_commands_ask(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    from pregate.config import Run

    given(monkeypatch, {"WORLD_SIZE": "3"})
    module = importlib.import_module(f"pregate.{command}")
    with pytest.raises(UsageError, match=rf"pregate\.{command} runs as one process, but WORLD_SIZE=3"):
        (getattr(module, "main", None) or module.work)(Run())


def test_a_mixed_precision_that_is_not_used_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for wanted, resolved in (("no", "bf16"), ("no", "no"), ("bf16", "bf16")):
        given(monkeypatch, {"ACCELERATE_MIXED_PRECISION": wanted})
        launcher_environment.check_mixed_precision(resolved)
    for wanted, resolved in (("bf16", "no"), ("fp16", "bf16"), ("fp8", "no")):
        given(monkeypatch, {"ACCELERATE_MIXED_PRECISION": wanted})
        with pytest.raises(UsageError, match=rf"{wanted} was asked .* gives {resolved} here: set train\.precision"):
            launcher_environment.check_mixed_precision(resolved)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, {"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"})
    process_group._check_gpus(0)
    process_group._check_gpus(2)
    with pytest.raises(UsageError, match="2 processes were started for 1 GPU: start one for each GPU, or set"):
        process_group._check_gpus(1)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    process_group._check_gpus(1)
    for name in ("ACCELERATE_USE_CPU", "TORCHELASTIC_RUN_ID"):  # a launcher that gives each its own GPU
        monkeypatch.delenv(name)
    process_group._check_gpus(1)


def test_rank_0_speaks_before_they_meet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given(monkeypatch, {"WORLD_SIZE": "2", "RANK": "1"})
    say("something")
    assert not process_exit.may_tell()
    monkeypatch.setenv("RANK", "0")
    assert process_exit.may_tell()
    say("something else")
    assert capsys.readouterr().err == "pregate: something else\n"


def as_one_of_two(rank: int, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_exit, "group", process_exit.Group(rank, 2, store))


def test_the_others_wait_for_rank_0_and_fail_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    store, done = HashStore(), []
    as_one_of_two(0, store, monkeypatch)
    process_group.main_only(lambda: done.append("saved"), "saving")
    with pytest.raises(OSError, match="disk full"):
        process_group.main_only(full_disk, "saving")
    as_one_of_two(1, store, monkeypatch)
    process_group.main_only(lambda: done.append("saved twice"), "saving")
    with pytest.raises(process_exit.PeerFailedError):
        process_group.main_only(lambda: done.append("not reached"), "saving")
    assert done == ["saved"]


def test_who_waits_long_tells_once_what_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store, looks = HashStore(), iter(range(9))
    monkeypatch.setattr(process_group, "TELL_AFTER_S", -1.0)
    monkeypatch.setattr(process_group.time, "sleep", lambda _: next(looks) == 5 and store.set("main/1", "done"))
    as_one_of_two(1, store, monkeypatch)
    process_group.main_only(lambda: None, "converting")
    assert next(looks) == 6, "it went on before the main process was done"
    assert capsys.readouterr().err == "pregate: process 1 waits for the main process, which is converting\n"


def test_the_others_end_with_a_main_process_that_takes_the_store_along(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def check(self, keys: list[str]) -> bool:
            raise DistNetworkError("Connection reset by peer")

        def add(self, key: str, count: int) -> int:
            raise DistNetworkError("Connection reset by peer")

    as_one_of_two(1, Gone(), monkeypatch)
    with pytest.raises(process_exit.PeerFailedError):
        process_group.main_only(lambda: None, "converting")
    assert not process_exit.may_tell()


@pytest.mark.parametrize(("local", "works"), [(0, True), (-1, True), (1, False)])
def test_one_process_of_each_machine_works_and_all_wait(
    local: int, works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, looks, done = HashStore(), iter(range(9)), []
    state = SimpleNamespace(num_processes=3, process_index=1, local_process_index=local)
    monkeypatch.setattr(process_group, "PartialState", lambda: state)
    as_one_of_two(1, store, monkeypatch)
    store.set("main/1", "done")
    store.set("main/3", "done")
    store.set("machines/4", "failed")  # by another machine, later on
    monkeypatch.setattr(process_group.time, "sleep", lambda _: next(looks) == 5 and store.set("machines/2", "done"))
    process_group.each_machine(lambda: done.append("made"), "making")
    assert next(looks) == 6, "it did not wait for the other machine"
    assert done == ["made"] * works and store.add("machines/2/ready", 0) == 1
    with pytest.raises(process_exit.PeerFailedError):
        process_group.each_machine(lambda: None, "making")
    if works:
        store.set("main/5", "done")
        with pytest.raises(OSError, match="disk full"):
            process_group.each_machine(full_disk, "making")
        assert store.get("machines/6") == b"failed"


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_ends_last(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    store, looks = HashStore(), iter(range(9))
    other = {0: lambda: store.add("parted", 1), 1: lambda: store.set("main/1", "done")}[rank]
    monkeypatch.setattr(process_group.time, "sleep", lambda _: next(looks) == 5 and other())
    as_one_of_two(rank, store, monkeypatch)
    process_group.part()
    assert next(looks) == 6, "it ended before the other was ready"
    assert store.add("parted", 0) == 2 - rank


def full_disk() -> None:
    raise OSError("disk full")


def refused() -> None:
    raise UsageError("Impossible.")


def bug() -> None:
    raise RuntimeError("bug")


def lost() -> None:
    raise RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer.")


def peer_failed() -> None:
    raise process_exit.PeerFailedError


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(("work", "status"), [(refused, 2), (lost, 1)])
def test_the_first_that_fails_tells_and_the_others_are_silent(
    first: int, work: Any, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the others fail of: with the first, connections break everywhere."""
    monkeypatch.setattr(process_exit, "SILENCE_S", 0.0)
    store = HashStore()
    as_one_of_two(first, store, monkeypatch)
    with pytest.raises(SystemExit) as ended:
        ending_in_one_sentence(work)
    assert ended.value.code == status
    sentence = capsys.readouterr().err
    assert sentence.startswith("pregate: " + ("Impossible." if work is refused else "The connection to another"))
    assert sentence.count("\n") == 1
    as_one_of_two(1 - first, store, monkeypatch)
    for other in (refused, bug, lost, peer_failed):
        with pytest.raises(SystemExit) as ended:
            ending_in_one_sentence(other)
        assert ended.value.code and capsys.readouterr().err == ""


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    as_one_of_two(1, HashStore(), monkeypatch)
    with pytest.raises(RuntimeError, match="bug"):
        ending_in_one_sentence(bug)


TWO = """
import os, sys, time
import torch
from pregate.system import process_exit, process_group

process_exit.SILENCE_S = 60.0
state = process_group.join()
assert (state.num_processes, state.process_index) == (2, int(os.environ["RANK"])), state
total = torch.tensor([1.0 + state.process_index])
torch.distributed.all_reduce(total)
assert total.item() == 3.0
seen = []
def work():
    time.sleep(0.2)
    seen.append(1)
    open(os.environ["DONE"], "w").close()
process_group.main_only(work, "working")
assert os.path.exists(os.environ["DONE"]) and len(seen) == (state.process_index == 0)
from pregate.cli import ending_in_one_sentence
from pregate.config import UsageError

def failing():
    def refuse():
        raise UsageError("The main process alone cannot.")
    process_group.main_only(refuse, "refusing")
    raise AssertionError("not reached")
ending_in_one_sentence(failing)
"""


@pytest.mark.slow
def test_two_processes_meet_wait_and_end_with_one_sentence(tmp_path: Path) -> None:
    """Under torchrun on the CPU, as a user starts it."""
    script = tmp_path / "two.py"
    script.write_text(TWO)
    done = launched(["torchrun", "--nproc_per_node", "2", str(script)], tmp_path, DONE=str(tmp_path / "done"))
    assert done.returncode != 0
    assert told(done.stderr) == ["pregate: The main process alone cannot."]
    assert "AssertionError" not in done.stderr


def launched(command: list[str], cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a launcher that lies beside this Python, on the CPU, at a free port."""
    bin_dir = Path(sys.executable).parent
    rest = ["--standalone"] if command[0] == "torchrun" else ["--main_process_port", "0"]
    at = 1 if command[0] == "torchrun" else 2
    return subprocess.run(
        [str(bin_dir / command[0]), *command[1:at], *rest, *command[at:]],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def told(text: str) -> list[str]:
    """The sentences of pregate itself; launchers add their own report."""
    return [line for line in text.splitlines() if line.startswith("pregate: ")]
