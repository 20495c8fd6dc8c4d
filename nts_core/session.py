"""The life of a client's session with one server, as a pure state machine (RFC 8915 sections 4.2 and 5.7).

    phase      what it means                                polls   key establishment
    EMPTY      no keys, or no cookie left                   no      as soon as the back-off allows
    UNPROVEN   fresh keys, no authentic answer yet          yes     at refresh time
    RESUMED    keys of an earlier run, no answer yet        yes     at refresh time
    KEYED      an authentic answer came                     yes     at refresh time
    DOUBTED    the last poll was in vain: the next decides  yes     at refresh time
    RENEWING   the next was in vain as well (rule 6)        yes     as soon as the back-off allows
    STOPPED    the server refused us (DENY, RSTR)           no      no

`next` says what to do and when; the other methods are told what happened. `_LIFE` has the transitions. Rules:

1. NTSN is a hint. One forged NTSN costs nothing; a valid answer to the next poll clears it. While key establishment
   fails, the old cookies stay in use. Fresh ones replace them altogether.
2. A cookie leaves the session before its request is made, and never comes back.
3. The back-off counts attempts. Only an answer that is protected by the keys of the last attempt ends it.
4. RATE makes the interval longer for good. Only authentic kisses count; NTSN alone cannot be one.
5. The first answers after key establishment must lie within the certificate's validity (section 8.5).
6. While the server has addresses that were not tried, a first poll that finds silence is enough to go to the next.

Times called `now` or `at` are nanoseconds of the caller's monotonic clock. There is no plain NTP to fall back to.
"""

from dataclasses import dataclass, field, replace
from enum import StrEnum, auto

from nts_core.aead import SessionKeys
from nts_core.cookies import MAX_COOKIES

SECOND = 1_000_000_000
DAY = 86_400 * SECOND
# Section 4.2: t = min(10 * 1.5^(n-1), 432000) seconds before the nth retry.
MIN_RETRY = 10 * SECOND
MAX_RETRY = 432_000 * SECOND
_RETRY_BASE = 1.5
# From this retry on the maximum is reached; a higher power would only overflow.
_MAX_EXPONENT = 30
# Between two key establishments of which nothing is left but answers without cookies.
WITHOUT_COOKIES = 3600 * SECOND
# An attempt that never left this host or found no address says nothing of the server.
UNREACHED_RETRY = 30 * SECOND
# Keys are renewed after this time although they still work, as chrony does: the certificate is seen again.
REFRESH_AFTER = 28 * DAY
# Servers keep retired cookie keys for about ten days; older cookies would only earn an NTSN.
COOKIE_LIFETIME = 10 * DAY
# RFC 5905's MINPOLL and MAXPOLL.
MIN_INTERVAL = 16 * SECOND
MAX_INTERVAL = (1 << 17) * SECOND
# How many answers after key establishment are held against the certificate's validity.
CHECKED_ANSWERS = MAX_COOKIES


class CertificateTime(StrEnum):
    """How the validity of the server's certificate was checked (section 8.5)."""

    STRICT = "strict"  # at the system's time
    FLOOR = "floor"  # it did not end before the last recorded time; the system's time was not relied on


@dataclass(frozen=True, slots=True)
class Credentials:
    """What one key establishment left: enough to resume the session (section 5.7).

    `host` is the NTP server's IP address. `not_before` and `not_after` are the certificate's validity in Unix
    nanoseconds; `unchecked` is how many answers are still to be held against it. `alternative` are the keys of
    another export of the same TLS session, for servers that do not say which one they use; None once an
    authentic answer has come.
    """

    keys: SessionKeys = field(repr=False)
    cookies: tuple[bytes, ...] = field(repr=False)
    host: str
    port: int
    not_before: int
    not_after: int
    certificate_time: CertificateTime
    alternative: SessionKeys | None = field(default=None, repr=False)
    unchecked: int = CHECKED_ANSWERS


@dataclass(frozen=True, slots=True)
class EstablishAt:
    """Run key establishment, not before `at`."""

    at: int


@dataclass(frozen=True, slots=True)
class PollAt:
    """Send one request, not before `at`."""

    at: int


@dataclass(frozen=True, slots=True)
class Stop:
    """Send nothing to this server any more."""

    reason: str


Action = EstablishAt | PollAt | Stop


class Phase(StrEnum):
    """Where a session is in its life."""

    EMPTY = auto()
    UNPROVEN = auto()
    RESUMED = auto()
    KEYED = auto()
    DOUBTED = auto()
    RENEWING = auto()
    STOPPED = auto()


class Setback(StrEnum):
    """Why key establishment failed, as far as the next attempt depends on it."""

    FAILED = auto()  # the server, or the way there: back off
    UNACCEPTABLE = auto()  # errors 0 and 1: the same request is not to be sent again (section 4.1.3)
    UNREACHED = auto()  # nothing left this host, or there is no address


class _Event(StrEnum):
    AUTHENTIC = auto()  # a protected answer, with time or with a kiss code
    NAK = auto()  # NTSN and no valid answer until the deadline
    SILENCE = auto()  # nothing until the deadline


# What an event makes of a phase; an event that is not listed changes nothing.
_LIFE = {
    Phase.UNPROVEN: {_Event.AUTHENTIC: Phase.KEYED, _Event.NAK: Phase.DOUBTED},
    # The server may have moved or lost its keys since: silence makes kept keys doubtful too.
    Phase.RESUMED: {
        _Event.AUTHENTIC: Phase.KEYED,
        _Event.NAK: Phase.DOUBTED,
        _Event.SILENCE: Phase.DOUBTED,
    },
    Phase.KEYED: {_Event.NAK: Phase.DOUBTED},
    Phase.DOUBTED: {
        _Event.AUTHENTIC: Phase.KEYED,
        _Event.NAK: Phase.RENEWING,
        _Event.SILENCE: Phase.RENEWING,
    },
    Phase.RENEWING: {_Event.AUTHENTIC: Phase.KEYED},
}


def retry_interval(retry: int) -> int:
    """Nanoseconds before the `retry`th retry of key establishment, counted from 1 (section 4.2)."""
    return min(round(MIN_RETRY * _RETRY_BASE ** min(retry - 1, _MAX_EXPONENT)), MAX_RETRY)


class Session:
    """One server as a client knows it. See the module for the rules."""

    def __init__(self, now: int, interval: int, rate_floor: int = 0) -> None:
        """`interval` is the wanted time between polls; a server's RATE makes it longer, never shorter.

        `rate_floor` is what an earlier run was told by RATE.
        """
        self.phase = Phase.EMPTY
        self.interval = interval
        self.rate_floor = rate_floor
        self.credentials: Credentials | None = None
        self._stop_reason = ""
        self._attempts = 0
        self._is_counted = False
        self._last_attempt = now
        self._establish_at = now
        self._refresh_at = now
        self._poll_at = now
        self._last_poll: int | None = None
        self._is_last_attempt_good = False
        # Addresses of the last attempt that may still be tried as a part of it.
        self.spare = 0

    @classmethod
    def resume(
        cls, credentials: Credentials, now: int, interval: int, *, age: int, rate_floor: int = 0
    ) -> "Session":
        """A session with the credentials of an earlier run, established `age` nanoseconds ago."""
        session = cls(now, interval, rate_floor)
        if credentials.cookies:
            session.credentials = credentials
            session.phase = Phase.RESUMED
            session._refresh_at = now + max(REFRESH_AFTER - max(age, 0), 0)
        return session

    def next(self, now: int) -> Action:
        """What to do next. Of two things that are due, key establishment comes first."""
        if self.phase is Phase.STOPPED:
            return Stop(self._stop_reason)
        is_wanted = self.phase in {Phase.EMPTY, Phase.RENEWING}
        establish_at = self._establish_at if is_wanted else max(self._establish_at, self._refresh_at)
        if self.phase is Phase.EMPTY or establish_at <= max(now, self._poll_at):
            return EstablishAt(establish_at)
        return PollAt(self._poll_at)

    # Key establishment

    def establishing(self, now: int) -> None:
        """An attempt begins."""
        # Another address that is left belongs to the attempt that found it.
        self._is_counted = not self.spare
        if self._is_counted:
            self._attempts += 1
        else:
            self.spare -= 1
        self._last_attempt = now
        self._is_last_attempt_good = False
        self._establish_at = now + retry_interval(self._attempts)

    def established(self, credentials: Credentials, now: int, *, spare: int = 0) -> None:
        """It succeeded: whatever was kept before is forgotten.

        `spare` is how many addresses of the server were not tried. If NTP does not work at the one that was
        used, each of them may be tried at once, as a part of the same attempt.
        """
        self.phase = Phase.UNPROVEN
        self.credentials = credentials
        self._is_last_attempt_good = True
        self.spare = spare
        self._refresh_at = now + REFRESH_AFTER
        self._poll_at = self._soonest_poll(now)

    def establishment_failed(self, setback: Setback, now: int) -> None:
        """It failed at every address. Credentials that are there stay in use."""
        self.spare = 0
        match setback:
            case Setback.FAILED:
                pass
            case Setback.UNACCEPTABLE:
                self._establish_at = now + MAX_RETRY
            case Setback.UNREACHED if self._is_counted:
                self._attempts -= 1
                self._establish_at = now + max(retry_interval(max(self._attempts, 1)), UNREACHED_RETRY)
            case Setback.UNREACHED:
                # The attempt did reach the server, at another address: it counts, and its back-off holds.
                pass

    def renew(self, now: int) -> None:
        """Keys are to be renewed as soon as the back-off allows; those that are there serve until then."""
        self._refresh_at = min(self._refresh_at, now)

    # Polls

    def polling(self, now: int) -> Credentials:
        """A poll begins: what its request is made of, the first cookie being the one to use.

        That cookie is no longer the session's. Whoever keeps `credentials` on disk writes them anew before
        the request is sent.
        """
        assert self.credentials is not None, "a poll without credentials"
        used = self.credentials
        self.credentials = replace(used, cookies=used.cookies[1:])
        self._last_poll = now
        self._poll_at = now + max(self.interval, self.rate_floor)
        return used

    def answered(self, cookies: tuple[bytes, ...], server_time: int) -> bool:
        """An authentic answer with the time `server_time` (Unix nanoseconds); `cookies` are all there are now.

        False when the answer lies outside the certificate's validity: then it is not to be used, and what key
        establishment gave is forgotten.
        """
        credentials = self._accept(cookies)
        if credentials.unchecked:
            if not credentials.not_before <= server_time <= credentials.not_after:
                self._forget()
                return False
            self.credentials = replace(credentials, unchecked=credentials.unchecked - 1)
        if self._is_last_attempt_good:
            self._attempts = 0
            # A server that gives no cookies with its answers is not asked for keys at each poll.
            self._establish_at = self._last_attempt + (MIN_RETRY if cookies else WITHOUT_COOKIES)
        return True

    def kissed(self, code: str, cookies: tuple[bytes, ...], now: int) -> None:
        """An authentic kiss code (RFC 5905 section 7.4). Others than these three say nothing to a client."""
        self._accept(cookies)
        match code:
            case "DENY" | "RSTR":
                self._forget()
                self.phase = Phase.STOPPED
                self._stop_reason = code
            case "RATE":
                longer = 2 * max(self.interval, self.rate_floor)
                self.rate_floor = min(max(longer, MIN_INTERVAL), MAX_INTERVAL)
                self._poll_at = now + self.rate_floor

    def unanswered(self, now: int, *, is_nak: bool) -> None:
        """The deadline passed without a valid answer; `is_nak`: NTSN came meanwhile."""
        credentials = self.credentials
        assert credentials is not None, "a poll without credentials"
        if is_nak and credentials.alternative is not None:
            # Nothing but NTSN so far: the server may have exported its keys the other way. Tried once.
            self.credentials = replace(credentials, keys=credentials.alternative, alternative=None)
            self._poll_at = self._soonest_poll(now)
        elif self.phase is Phase.UNPROVEN and self.spare and not is_nak:
            # NTP may be blocked on the way to this address only, and its next poll is an interval away.
            self.phase = Phase.RENEWING
        else:
            self._become(_Event.NAK if is_nak else _Event.SILENCE)
        if self.phase is Phase.RENEWING and self.spare:
            self._establish_at = now
        self._check_cookies(now)

    def unsent(self, now: int) -> None:
        """The request never left this host, or nobody waits for its answer. Its cookie is gone all the same."""
        self._check_cookies(now)

    def _accept(self, cookies: tuple[bytes, ...]) -> Credentials:
        assert self.credentials is not None, "an answer without credentials"
        self._become(_Event.AUTHENTIC)
        self.spare = 0
        self.credentials = replace(self.credentials, cookies=cookies[-MAX_COOKIES:], alternative=None)
        if not cookies:
            self.phase = Phase.EMPTY
        return self.credentials

    def _check_cookies(self, now: int) -> None:
        if self.credentials is not None and not self.credentials.cookies:
            self.phase = Phase.EMPTY
            if self.spare:
                self._establish_at = now

    def _become(self, event: _Event) -> None:
        self.phase = _LIFE.get(self.phase, {}).get(event, self.phase)

    def _forget(self) -> None:
        self.phase = Phase.EMPTY
        self.credentials = None
        self.spare = 0

    def _soonest_poll(self, now: int) -> int:
        """At once, unless a server's RATE forbids it."""
        return now if self._last_poll is None else max(now, self._last_poll + self.rate_floor)
