"""What a mover is: it copies slabs from the store into slots, ahead of the computation, and says when they are there.

Knows nothing about which slab should move. A slot handed to `start` must not be in use until its transfer is over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from pregate.models.experts import ExpertKey

CLOSED = "This engine is closed: open it again."


class MoverClosedError(RuntimeError):
    """A read was asked of an engine that is closed, or was called off."""


class Move(NamedTuple):
    """A slab, and the slot that it goes into."""

    key: ExpertKey
    slot: Any


class Transfer(Protocol):
    def done(self) -> bool:
        """Whether computing with the slab would not wait."""
        ...

    def wait(self) -> None:
        """Make the computation that follows see the slab. Raises what the copy raised."""
        ...


class Mover(Protocol):
    reader: str
    """What reads slabs from a disk: `threads` or `io_uring`."""

    @property
    def host_bytes(self) -> int:
        """Host memory taken for buffers."""
        ...

    def start(self, moves: Sequence[Move]) -> list[Transfer]:
        """Begin `moves`, the first one first. Many in one call cost less than one by one."""
        ...

    def used(self, slot: Any) -> None:
        """The computation submitted so far is the last that reads `slot` as it is now."""
        ...

    def drain(self) -> None:
        """Wait until nothing moves, also transfers that nothing refers to. Never raises what they raised."""
        ...

    def close(self) -> None: ...
