"""A CA's limit as it truly stands, to hold the registry's reckoning against."""

from datetime import datetime, timedelta
from fractions import Fraction

from poolsvc.budget import Limit

_TICK = timedelta(microseconds=1)


class ExactBucket:
    """A bucket that is watched from the beginning, when it is full, in fractions."""

    def __init__(self, limit: Limit, begin: datetime) -> None:
        self._limit, self._at = limit, begin
        self.held = Fraction(limit.count)

    def wait(self, until: datetime) -> None:
        """Let come what comes until then."""
        came = Fraction((until - self._at) // _TICK, self._limit.interval // _TICK)
        self._at, self.held = until, min(Fraction(self._limit.count), self.held + came)

    def take(self, at: datetime) -> None:
        """Raises AssertionError where the CA would say no."""
        self.wait(at)
        assert self.held >= 1, f"more than the CA allows at {at}"
        self.held -= 1

    def lose(self, at: datetime) -> None:
        """Somebody took one, if there was one."""
        self.wait(at)
        self.held = max(Fraction(0), self.held - 1)
