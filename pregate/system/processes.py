"""Whether this process works alone or with others, who of them speaks, and how they end together.

Knows what launchers leave in the environment, and Accelerate's process state; knows nothing about models or training.
torch is imported only where processes meet, so that a command line is checked without it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from pregate.config import UsageError

if TYPE_CHECKING:
    from accelerate import PartialState

SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
"""As torchrun and mpirun set them, in the order in which Accelerate looks."""
PLUGINS = {
    "FSDP": "ACCELERATE_USE_FSDP",
    "DeepSpeed": "ACCELERATE_USE_DEEPSPEED",
    "Megatron-LM": "ACCELERATE_USE_MEGATRON_LM",
    "A parallelism config": "ACCELERATE_USE_PARALLELISM_CONFIG",
}
ONE = "`python -m pregate.{command} …`"
SEVERAL = "`torchrun --nproc_per_node N -m pregate.train …`"
TRUE = ("1", "true", "yes", "on", "t", "y")
WAIT_S = (0.01, 1.0)
"""The first and the longest pause between two looks at what rank 0 has done."""
TELL_AFTER_S = 60.0
"""After this time a process that waits tells once what for."""
SILENCE_S = 30.0
"""How long a process that has nothing to tell waits for its launcher to end it."""


class PeerFailedError(Exception):
    """Another process of this run has failed, and tells why itself."""


@dataclass
class Group:
    """The processes that train together, as one of them sees it; `store` is what they share beside tensors."""

    rank: int
    size: int
    store: Any = None
    calls: int = 0


_group: Group | None = None


def rank() -> int:
    """The rank of this process, before the processes have met and after."""
    return _first_number(RANKS, 0)[1]


def asked() -> tuple[str, int]:
    """How many processes were asked for, and the variable that says so."""
    return _first_number(SIZES, 1)


def _first_number(names: tuple[str, ...], otherwise: int) -> tuple[str, int]:
    for name in names:
        value = os.environ.get(name, "")
        if value:
            try:
                return name, int(value)
            except ValueError as error:
                raise UsageError(f"The environment variable {name}={value} must be a whole number.") from error
    return names[0], otherwise


def _asked_for(variable: str) -> bool:
    """Whether an environment variable is set to one of the words that Accelerate takes for yes."""
    return os.environ.get(variable, "").lower() in TRUE


def check_alone(command: str) -> None:
    """Refuse several processes for a command that works as one. Raises `UsageError`."""
    variable, size = asked()
    if size > 1:
        raise UsageError(
            f"pregate.{command} runs as one process, but {variable}={size} asks for {size}: start it without a "
            f"launcher and without {variable}, as {ONE.format(command=command)}."
        )
    _check_launcher(command)


def check_launch() -> None:
    """Refuse what a launcher was asked for and training cannot honour. Raises `UsageError`."""
    _check_launcher("train")
    for name, variable in PLUGINS.items():
        if _asked_for(variable):
            raise UsageError(
                f"{name} was asked for ({variable}={os.environ[variable]}), but training is plain data parallel "
                f"(DDP): leave it out of the launcher's options and configuration, or start {SEVERAL}."
            )
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps != "1":
        raise UsageError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={steps} does not apply: train.batch_sequences and "
            "train.micro_batch_tokens decide; leave it out of the launcher's options and configuration."
        )


def _check_launcher(command: str) -> None:
    """`accelerate launch` starts one process where it sees no GPUs, whatever --num_processes says. Its traces: it has
    set ACCELERATE_USE_CPU, and an address to meet at, and nobody has a rank."""
    given = os.environ
    launched = "ACCELERATE_USE_CPU" in given and "MASTER_ADDR" in given
    if launched and not any(name in given for name in (*SIZES, *RANKS, "LOCAL_RANK")):
        several = f"start {SEVERAL} for N of them, or " if command == "train" else ""
        raise UsageError(
            "`accelerate launch` was asked for several processes (it set MASTER_ADDR) and has started one, as it "
            f"does on CPUs and on one GPU: {several}start {ONE.format(command=command)} for one."
        )


def check_mixed_precision(resolved: str) -> None:
    """Refuse a mixed precision that was asked of a launcher and is not what training uses. Raises `UsageError`."""
    wanted = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if wanted not in ("no", resolved):
        raise UsageError(
            f"Mixed precision {wanted} was asked of the launcher, but train.precision decides, and gives {resolved} "
            "here: set train.precision, and start with --mixed_precision no."
        )


def join() -> PartialState:
    """The state of this process among those that train together; the first call brings them together.

    Raises `UsageError` if they cannot meet, or are not as many as were asked for.
    """
    from accelerate import PartialState

    global _group
    if _group is None:
        check_launch()
        variable, size = asked()
        state = _meet(size)
        if state.num_processes != size:
            raise UsageError(
                f"{variable}={size} asks for {size} processes, but this one runs as {state.process_index + 1} of "
                f"{state.num_processes}: start {SEVERAL} for several, {ONE.format(command='train')} without {variable} "
                "for one, and set ACCELERATE_USE_CPU=true to keep off an accelerator."
            )
        _group = Group(state.process_index, state.num_processes, _shared_store() if size > 1 else None)
    return PartialState()


def _meet(size: int) -> PartialState:
    import torch
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    if size > 1:
        _check_gpus(torch.cuda.device_count())
    # Accelerate forms a group of CPU processes only if told to use the CPU, and PartialState reads no flag by itself
    try:
        state = PartialState(
            cpu=_asked_for("ACCELERATE_USE_CPU") or (size > 1 and not torch.accelerator.is_available())
        )
    except (torch.distributed.DistError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UsageError(f"The {size} processes cannot meet ({reason}): start {SEVERAL}.") from error
    allowed = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    if state.distributed_type not in allowed:
        raise UsageError(
            f"Training runs on one process or under DDP, not {state.distributed_type.value}: "
            f"start {SEVERAL}, or {ONE.format(command='train')}."
        )
    return state


def _check_gpus(count: int) -> None:
    """torchrun gives all its processes the same GPUs; other launchers may give each its own."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    on_gpus = "TORCHELASTIC_RUN_ID" in os.environ and not _asked_for("ACCELERATE_USE_CPU")
    if count and here > count and on_gpus:
        raise UsageError(
            f"{here} processes were started for {count} GPU{'s' if count > 1 else ''}: start one for each GPU, or "
            "set ACCELERATE_USE_CPU=true to train on the CPU."
        )


def _shared_store() -> Any:
    """A client of the store through which the processes met, with keys of this attempt's own: a launcher that starts
    failed processes again keeps the store."""
    from accelerate.utils import broadcast_object_list
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    attempt = broadcast_object_list([uuid4().hex])[0]
    client = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return PrefixStore(f"pregate/{attempt}", client)


def main_only(work: Callable[[], object], what: str) -> None:
    """Let rank 0 do `work`, called `what`, while the others wait, however long it takes.

    A collective would end the run after 10 minutes (NCCL) or 30 (gloo), while a conversion may take hours: the others
    look for a mark in the store, which has no limit. Raises what `work` raises, and on the others `PeerFailedError`.
    """
    join()
    assert _group is not None
    if _group.store is None:
        work()
        return
    _group.calls += 1
    key = f"main/{_group.calls}"
    if _group.rank:
        _wait_for(_group.store, key, f"process {_group.rank} waits for the main process, which is {what}")
        return
    outcome = "failed"
    try:
        work()
        outcome = "done"
    finally:
        _group.store.set(key, outcome)


def _wait_for(store: Any, key: str, sentence: str) -> None:
    pause_s, longest_s = WAIT_S
    began, told = time.monotonic(), False
    try:
        while not store.check([key]):
            if not told and time.monotonic() - began > TELL_AFTER_S:
                told = True
                print(f"pregate: {sentence}", file=sys.stderr)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, longest_s)
        outcome = store.get(key)
    except RuntimeError as error:  # the process that holds the store is gone
        raise PeerFailedError from error
    if outcome != b"done":
        raise PeerFailedError


def leave() -> None:
    """End the collective part of a run; what follows is rank 0's, and the others may end."""
    import torch

    if _group is not None and _group.store is not None:
        torch.distributed.destroy_process_group()


def may_tell() -> bool:
    """Whether this process is the one of its run that tells how it ended: rank 0 before the processes have met, when
    all see the same, and the first that fails after that. The others `end_in_silence`."""
    if _group is None or _group.store is None:
        return rank() == 0
    try:
        return _group.store.add("told", 1) == 1
    except RuntimeError:  # the process that holds the store is gone, and has told
        return False


def end_in_silence(status: int) -> None:
    """Exit, but not at once: a launcher stops all processes when the first exits, and the one that tells may not have
    finished its sentence."""
    with suppress(KeyboardInterrupt):
        time.sleep(SILENCE_S)
    sys.exit(status)


def lost_connection(error: BaseException) -> str | None:
    """One sentence if `error` says that another process of this run has vanished without a word, else None."""
    if _group is None or _group.store is None:
        return None
    import torch

    # Gloo raises plain RuntimeErrors that hold its name
    if not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
        return None
    reason = " ".join(str(error).split())[:160].rstrip(".")
    return (
        f"The connection to another process of this run broke, which was killed or ran out of memory ({reason}): what "
        "was saved is kept, and the same command goes on with resume=true."
    )
