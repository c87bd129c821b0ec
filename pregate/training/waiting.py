"""How processes wait for work that the main one does alone, such as converting or writing a checkpoint.

Knows the store that the processes share; knows nothing about the work.
"""

from __future__ import annotations

import itertools
import sys
import time
from typing import Any

from accelerate import PartialState
from torch.distributed import distributed_c10d

from pregate.config import UsageError

LOOK_EVERY_S = 0.2
TELL_AFTER_S = 60.0
_rounds = itertools.count()
"""Numbers the waits of this process, which are those of every other."""


def wait_for_main(what: str) -> None:
    """Return in all processes once the main one has come here, however long `what` it does takes.

    A collective alone would end the run after 10 minutes (NCCL) or 30 (gloo), while a conversion may take hours: the
    others first look for a mark in the store, which has no limit, and then all meet. Raises `UsageError` if the main
    process ends meanwhile.
    """
    state = PartialState()
    if state.num_processes == 1:
        return
    store, mark = _store(), f"pregate/{next(_rounds)}"
    if state.is_main_process:
        store.set(mark, what)
    else:
        _look_for(store, mark, what, state.process_index)
    state.wait_for_everyone()


def _look_for(store: Any, mark: str, what: str, rank: int) -> None:
    began, told = time.monotonic(), False
    try:
        while not store.check([mark]):
            if not told and time.monotonic() - began > TELL_AFTER_S:
                told = True
                print(f"pregate: process {rank} waits for the main process, which is {what}", file=sys.stderr)
            time.sleep(LOOK_EVERY_S)
    except RuntimeError as error:  # the store went with the process that held it
        raise UsageError(f"The main process ended while it was {what}: see what it says.") from error


def _store() -> Any:
    return distributed_c10d._get_default_store()
