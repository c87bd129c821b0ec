"""The processes of one run after they have met: which of them reports how the run ended, and how the others exit.

Imports no torch, because an error in a command line is reported without it.
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pregate.system.launcher_environment import rank

SILENCE_S = 30.0
"""How long a process without a report waits for its launcher to stop it."""


class PeerFailedError(Exception):
    """Another process of this run has failed. That process reports the reason."""


@dataclass
class Group:
    """The processes that train together, as one of them sees it; `store` is what they share beside tensors.
    `held`: the store of the process group, which rank 0 may hold for all; it has to live as long as this process."""

    rank: int
    size: int
    store: Any = None
    held: Any = None
    calls: int = 0


group: Group | None = None
"""None until the processes have met."""


def may_tell() -> bool:
    """Whether this process is the one that reports how the run ended.

    Before the processes have met, all fail of the same, and rank 0 reports. After that, the first that fails reports.
    The others call `end_in_silence`.
    """
    if group is None or group.store is None:
        return rank() == 0
    try:
        return group.store.add("told", 1) == 1
    except RuntimeError:  # the process that holds the store has exited, after its own report
        return False


def end_in_silence(status: int) -> None:
    """Exit after a pause.

    A launcher stops all processes when the first exits, and the process that reports may not have finished.
    """
    with suppress(KeyboardInterrupt):
        time.sleep(SILENCE_S)
    sys.exit(status)


def lost_connection(error: BaseException) -> str | None:
    """One sentence if `error` says that another process of this run was lost, else None."""
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
