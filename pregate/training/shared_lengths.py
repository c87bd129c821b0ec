"""The lengths of examples, each found out by one process and told to the others.

All processes order the examples of a window by length, and so need all lengths. What takes time is to tokenize. The
lengths travel through the store in which the processes have met. Knows nothing about tokenizers.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence

from pregate.system import peers
from pregate.system.peers import Group
from pregate.training.batch_order import Lengths

PATIENCE_S = 1.0
"""So long at least a process waits for the share of another; then it finds those lengths out itself. Waiting without
end could be for ever: processes read ahead differently far, and the other may be waiting for this one."""
LOOK_EVERY_S = 0.01


class SharedLengths:
    """As `lengths`, which the processes of `group` share out. All ask for the same, in the same order. `name`: the same
    in all processes, and no other has it."""

    def __init__(self, lengths: Lengths, group: Group, name: str) -> None:
        self.lengths, self.group, self.name = lengths, group, name
        self._asked = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def of(self, indices: Sequence[int]) -> list[int]:
        rank, size, started = self.group.rank, self.group.size, time.monotonic()
        self._asked += 1
        found = [0] * len(indices)
        found[rank::size] = self.lengths.of(indices[rank::size])
        self.group.store.set(self._key(self._asked, rank), array("q", found[rank::size]).tobytes())
        now = time.monotonic()
        until = now + max(PATIENCE_S, 4 * (now - started))
        for other in range(size):
            if other != rank:
                told = self._told(self._key(self._asked, other), until)
                found[other::size] = self.lengths.of(indices[other::size]) if told is None else told
        self.group.store.delete_key(self._key(self._asked - 2, rank))
        return found

    def _told(self, key: str, until: float) -> list[int] | None:
        """What another process has told under `key`, or None if it has not by the time `until`."""
        while not self.group.store.check([key]):
            if time.monotonic() > until:
                return None
            time.sleep(LOOK_EVERY_S)
        return array("q", self.group.store.get(key)).tolist()

    def _key(self, asked: int, rank: int) -> str:
        return f"lengths/{self.name}/{asked}/{rank}"


def shared(lengths: Lengths) -> Lengths:
    """`lengths`, shared out if several processes train. Every process calls it at the same place of its work."""
    group = peers.group
    return lengths if group is None or group.store is None else SharedLengths(lengths, group, str(group.calls))
