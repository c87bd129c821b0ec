"""The processes of one run after they have met: which of them tells how the run ended, and how the others end.

Imports no torch: an error in a command line is told without it.
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pregate.system.launch import rank

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


group: Group | None = None
"""None until the processes have met."""


def may_tell() -> bool:
    """Whether this process is the one of its run that tells how it ended: rank 0 before the processes have met, when
    all see the same, and the first that fails after that. The others `end_in_silence`."""
    if group is None or group.store is None:
        return rank() == 0
    try:
        return group.store.add("told", 1) == 1
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
    if group is None or group.store is None:
        return None
    # by name, as torch is not imported here; gloo raises plain RuntimeErrors that hold its name
    if not ("DistError" in (kind.__name__ for kind in type(error).__mro__) or "gloo" in str(error)):
        return None
    reason = " ".join(str(error).split())[:160].rstrip(".")
    return (
        f"The connection to another process of this run broke, which was killed or ran out of memory ({reason}): what "
        "was saved is kept, and the same command goes on with resume=true."
    )
