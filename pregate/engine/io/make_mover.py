"""Which mover serves a device and a store. Knows all of them; knows nothing about which slab should move."""

from __future__ import annotations

import errno
import warnings

from torch import Tensor

from pregate.engine.io.base import Mover
from pregate.engine.io.cuda import CudaMover
from pregate.engine.io.ring import RingUnavailableError
from pregate.engine.io.threads import ThreadMover
from pregate.engine.io.uring import UringMover, reads_in_flight
from pregate.engine.storage.store import DiskStore, Store
from pregate.engine.trace import Counters, Trace


def make_mover(
    store: Store,
    trace: Trace,
    counters: Counters,
    io_threads: int,
    slots_NB: Tensor,
    host_buffers: int = 0,
    io_uring: bool = True,
) -> Mover:
    """The mover from `store` into `slots_NB` (slots, bytes), on the device that they are on.

    `io_threads`: slabs in flight from a disk, more where they are small; `host_buffers`: of slabs that pass through
    host memory. `io_uring`: let the kernel read by itself; where it refuses, threads read, and a warning says what
    would help.
    """
    if slots_NB.device.type == "cuda":
        return CudaMover(store, trace, counters, io_threads, slots_NB.device, host_buffers)
    if io_uring and isinstance(store, DiskStore) and store.direct and not host_buffers:
        try:
            return UringMover(store, trace, counters, reads_in_flight(io_threads, slots_NB), slots_NB)
        except RingUnavailableError as error:
            if error.errno != errno.ENOSYS:  # there is nothing to be done about that
                warnings.warn(
                    f"Experts are read by threads, which slows the computation beside them: {error.strerror}; "
                    "engine.io_uring=false silences this.",
                    stacklevel=3,
                )
    return ThreadMover(store, trace, counters, io_threads, host_buffers)
