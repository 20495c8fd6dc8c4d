"""What some authoritative server may not show as the zone has it, and whose turn it is to be asked for. Pure.

The newest is asked for first, so that a change does not wait for the zone. What was asked for in vain waits in a line of
its own, the longest first, and gets no more than half of a turn: neither keeps the other from being asked for.
"""

from collections.abc import Collection, Iterable
from itertools import islice

from poolsvc.zone import Key


class Unconfirmed:
    def __init__(self) -> None:
        self._new: dict[Key, None] = {}  # the newest last
        self._vain: dict[Key, None] = {}

    def __len__(self) -> int:
        return len(self._new) + len(self._vain)

    def __contains__(self, key: Key) -> bool:
        return key in self._new or key in self._vain

    def covers(self, keys: Iterable[Key]) -> bool:
        """Whether any of the keys is not confirmed."""
        return any(key in self for key in keys)

    @property
    def has_new(self) -> bool:
        """Whether there is more than was asked for in vain."""
        return bool(self._new)

    def add(self, keys: Iterable[Key]) -> None:
        """They have changed, or somebody waits for them: they come first."""
        for key in keys:
            self._vain.pop(key, None)
            self._new.pop(key, None)
            self._new[key] = None

    def add_last(self, keys: Iterable[Key]) -> None:
        """Nothing is known against them: they come when there is nothing else."""
        more = dict.fromkeys(key for key in keys if key not in self)
        self._new = more | self._new

    def turn(self, count: int, *, again: bool) -> list[Key]:
        """So many at most to be asked for now; `again` with some that were asked for in vain."""
        vain = list(islice(self._vain, count // 2)) if again else []
        return [*islice(reversed(self._new), count - len(vain)), *vain]

    def answered(self, asked: Iterable[Key], wrong: Collection[Key]) -> None:
        """Of what was asked for everything is confirmed but what is wrong."""
        for key in asked:
            self._new.pop(key, None)
            self._vain.pop(key, None)
            if key in wrong:
                self._vain[key] = None

    def clear(self) -> None:
        self._new.clear()
        self._vain.clear()
