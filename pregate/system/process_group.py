"""How the processes of a training meet, wait for each other and part.

Knows Accelerate's process state; knows nothing about models or training.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, broadcast_object_list
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _get_default_store

from pregate.config import UsageError
from pregate.system import process_exit
from pregate.system.console import reason_of
from pregate.system.launcher_environment import ONE, SEVERAL, asked, asked_for, check_launch
from pregate.system.process_exit import Group, PeerFailedError

WAIT_S = (0.01, 1.0)
"""The first and the longest pause between two looks at what rank 0 has done."""
TELL_AFTER_S = 60.0
"""After this time a waiting process says once what it waits for."""
PART_S = 30.0
"""How long rank 0 waits at the end for the others to notice that it is done."""


def join() -> PartialState:
    """The state of this process among those that train together; the first call brings them together.

    Raises `UsageError` if they cannot meet, or are not as many as were asked for.
    """
    if process_exit.group is None:
        check_launch()
        variable, size = asked()
        state = _meet(size)
        if state.num_processes != size:
            raise UsageError(
                f"{variable}={size} asks for {size} processes, but this one runs as {state.process_index + 1} of "
                f"{state.num_processes}: start {SEVERAL} for several, {ONE.format(command='train')} without {variable} "
                "for one, and set ACCELERATE_USE_CPU=true to keep off an accelerator."
            )
        store, held = (_shared_store(), _get_default_store()) if size > 1 else (None, None)
        process_exit.group = Group(state.process_index, state.num_processes, store, held)
    return PartialState()


def _meet(size: int) -> PartialState:
    if size > 1:
        _check_gpus(torch.cuda.device_count())
    # Accelerate forms a group of CPU processes only with cpu=True, and PartialState reads no flag by itself
    try:
        state = PartialState(cpu=asked_for("ACCELERATE_USE_CPU") or (size > 1 and not torch.accelerator.is_available()))
    except (torch.distributed.DistError, ValueError) as error:
        reason = reason_of(error)
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
    on_gpus = "TORCHELASTIC_RUN_ID" in os.environ and not asked_for("ACCELERATE_USE_CPU")
    if count and here > count and on_gpus:
        raise UsageError(
            f"{here} processes were started for {count} GPU{'s' if count > 1 else ''}: start one for each GPU, or "
            "set ACCELERATE_USE_CPU=true to train on the CPU."
        )


def _shared_store() -> Any:
    """A client of the store through which the processes met, with keys of this attempt's own: a launcher that starts
    failed processes again keeps the store."""
    attempt = broadcast_object_list([uuid4().hex])[0]
    client = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return PrefixStore(f"pregate/{attempt}", client)


def main_only(work: Callable[[], object], what: str) -> None:
    """Let rank 0 do `work`, called `what`, while the others wait, however long it takes.

    A collective would end the run after 10 minutes (NCCL) or 30 (gloo), while a conversion may take hours: the others
    look for a mark in the store, which has no limit. Raises what `work` raises, and on the others `PeerFailedError`.
    """
    join()
    group = process_exit.group
    assert group is not None
    if group.store is None:
        work()
        return
    group.calls += 1
    key = f"main/{group.calls}"
    if group.rank:
        _wait_for(group.store, key, f"process {group.rank} waits for the main process, which is {what}")
        return
    outcome = "failed"
    try:
        work()
        outcome = "done"
    finally:
        group.store.set(key, outcome)


def each_machine(work: Callable[[], object], what: str) -> None:
    """Let one process of each machine do `work`, called `what`, rank 0 first, while the others wait, however long it
    takes: machines that share a disk find it done. Raises as `main_only`."""
    main_only(work, what)
    group = process_exit.group
    assert group is not None
    if group.store is None:
        return
    group.calls += 1
    key = f"machines/{group.calls}"
    try:
        if group.rank and join().local_process_index <= 0:  # -1 where the launcher does not say
            work()
    except BaseException:
        group.store.set(key, "failed")
        raise
    if group.store.add(f"{key}/ready", 1) == group.size:
        group.store.set(key, "done")
    _wait_for(group.store, key, f"process {group.rank} waits for another machine, which is {what}")


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
    """End the collective part of a run. What follows is rank 0's, and the others wait for it in `main_only`."""
    if process_exit.group is not None and process_exit.group.store is not None:
        torch.distributed.destroy_process_group()


def part() -> None:
    """End a run: no process ends before rank 0 has come here, and rank 0 ends last.

    torchrun ends all processes 5 minutes after those of one machine have ended. Without torchrun the store is in the
    process of rank 0, and the others must read in it that the work is done.
    """
    main_only(lambda: None, "ending")
    group = process_exit.group
    if group is None or group.store is None:
        return
    parted, limit = group.store.add("parted", 1), time.monotonic() + PART_S
    while group.rank == 0 and parted < group.size and time.monotonic() < limit:
        time.sleep(WAIT_S[0])
        parted = group.store.add("parted", 0)
