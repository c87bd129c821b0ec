"""A job of a sweep that submitit has started, on a cluster or on this machine: its processes, and the end of its time.

Knows submitit's environment and signals; knows nothing about the work, and not torch.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType

from pregate.system.stopping import Terminated, Termination


def do_submitted(work: Callable[[], None]) -> None:
    """Do `work` in one of the processes of the job.

    Several processes train together as those of torchrun do. When the job's time is nearly up, the work ends as after
    SIGTERM, and submitit then puts the job into the queue again, as often as it was told to.
    """
    import submitit

    if submitit.JobEnvironment().num_tasks > 1:
        # each process still sees all devices of its machine, and takes the one of its number
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    until_time_is_up(work, getattr(signal, "SIG" + os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2")))


def until_time_is_up(work: Callable[[], None], number: int) -> None:
    """`number`: of the signal that says so, for which submitit has set a handler that queues the job and exits."""
    queue_again, times = signal.getsignal(number), []

    def stop(number: int, frame: FrameType | None) -> None:
        times.append(number)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, Termination())  # which submitit ignores
    signal.signal(number, stop)
    try:
        work()
    except Terminated:
        if times and callable(queue_again):
            queue_again(number, None)
        raise
    finally:
        signal.signal(number, queue_again)
        signal.signal(signal.SIGTERM, before)
