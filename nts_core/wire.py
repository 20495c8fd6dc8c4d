"""Bounded reading of octets, in network byte order."""

from nts_core.errors import WireError


class Reader:
    """A cursor over octets that never reads past their end."""

    __slots__ = ("_data", "_position")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    @property
    def position(self) -> int:
        return self._position

    @property
    def remaining(self) -> int:
        return len(self._data) - self._position

    def take(self, count: int) -> bytes:
        """The next `count` octets; WireError when there are fewer."""
        end = self._position + count
        if end > len(self._data):
            raise WireError(f"{count} octets expected at {self._position}, {self.remaining} left")
        octets = self._data[self._position : end]
        self._position = end
        return octets

    def uint16(self) -> int:
        return int.from_bytes(self.take(2), "big")


def uint16(value: int) -> bytes:
    return value.to_bytes(2, "big")


def uint16_list(body: bytes) -> tuple[int, ...]:
    """A body that is a sequence of 16-bit integers; WireError when a half is left over."""
    if len(body) % 2:
        raise WireError(f"a list of 16-bit integers has {len(body)} octets")
    return tuple(int.from_bytes(body[i : i + 2], "big") for i in range(0, len(body), 2))


def pad4(octets: bytes) -> bytes:
    """`octets` with zeroes up to the next multiple of four."""
    missing = -len(octets) % 4
    return octets + bytes(missing) if missing else octets
