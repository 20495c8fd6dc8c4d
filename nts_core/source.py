"""One server as a source of time over months (asyncio): a session, driven by real sockets, clocks and files.

    async with Source("time.example.net", 4460, roots, state=Path("/var/lib/pool-client")) as source:
        async for sample in source.samples():
            ...

`session` decides what is done and when, `store` keeps what must survive. `query` is the same for a single run that
waits for nothing. Files are written in the event loop: some milliseconds before each poll, never within one.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Self

from cryptography import x509

from nts_core import select
from nts_core.aead import SUPPORTED, AeadId
from nts_core.association import Association, Sample
from nts_core.client import (
    STARTING,
    ClientError,
    Established,
    Failure,
    establish_any,
    exchange,
    ntp_address,
    system_addresses,
)
from nts_core.errors import KissOfDeath, WireError
from nts_core.ke import KeResult, host_of
from nts_core.kernel import read_kernel
from nts_core.session import (
    SECOND,
    Action,
    CertificateTime,
    Credentials,
    EstablishAt,
    Phase,
    PollAt,
    Session,
    Setback,
    Stop,
)
from nts_core.store import Binding, CookieFile, Kept, TimeRecord
from nts_core.tls import Trust

# Seconds between polls: RFC 5905's default minimum.
INTERVAL = 64.0
# How often the time is recorded at most.
_RECORD_EVERY = 3600 * SECOND
# Of a server's addresses, so many are tried.
_MAX_ADDRESSES = 8
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# What happens before anything reaches the server.
_UNREACHED = frozenset({Failure.LOCAL, Failure.DNS})


class CertificateCheck(StrEnum):
    """At which time certificates are checked (RFC 8915 section 8.5)."""

    AUTO = "auto"  # strictly if the clock is known to be right, else down to the last recorded time
    STRICT = "strict"  # always at the system's time


def _is_synchronised() -> bool:
    return read_kernel().synchronised


@dataclass(frozen=True, slots=True)
class SystemClock:
    """What this host knows of the time: Unix nanoseconds, and whether they are known to be right."""

    now: Callable[[], int] = time.time_ns
    is_good: Callable[[], bool] = _is_synchronised


class Source:
    """One server, for as long as the context lasts.

    `name` is the server's in TLS: a host name, with or without its last dot, or an IP address. `interval` is
    in seconds; a server's RATE makes it longer. `addresses` are where to connect instead of what the system's
    resolver says; several are tried in their order. Without `state` nothing is kept, and as there is no
    recorded time then, certificates are checked strictly. A disk that takes no more is an error, or, unless it `must_keep`,
    a warning: then nothing of this server is on it. Raises ClientError for a name that is none.
    """

    def __init__(
        self,
        name: str,
        port: int,
        roots: Sequence[x509.Certificate],
        *,
        addresses: Sequence[str] = (),
        state: Path | None = None,
        check: CertificateCheck = CertificateCheck.AUTO,
        interval: float = INTERVAL,
        offered: Sequence[AeadId] = SUPPORTED,
        clock: SystemClock | None = None,
        must_keep: bool = True,
    ) -> None:
        self.name = _host(name)
        self.port = port
        self._roots = tuple(roots)
        self._addresses = tuple(addresses)
        self._state = state
        self._must_keep = must_keep
        self._check = check
        self._offered = tuple(offered)
        self._clock = clock or SystemClock()
        self._session = Session(time.monotonic_ns(), round(interval * SECOND))
        self._file: CookieFile | None = None
        self._record = None if state is None else TimeRecord(state)
        self._recorded_at: int | None = None
        self._ke_address = ""
        self._established_at = 0
        self._received_at = 0
        # Addresses of the last attempt at key establishment that were not tried.
        self._spare: list[str] = []
        self._is_changed = False
        self.establishments = 0
        self.warnings: list[str] = []
        self.last_failure: ClientError | None = None

    async def __aenter__(self) -> Self:
        """Take up what an earlier run kept. Raises ClientError when the state cannot be used or is in use."""
        if self._state is not None:
            binding = Binding.of(self.name, self.port, self._roots)
            self._file = await CookieFile.open(self._state, binding)
            self._take_up(self._file)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Keep what is left, if it is not what was there before."""
        if self._file is not None:
            try:
                if self._is_changed:
                    self._keep()
            finally:
                self._file.close()

    def _take_up(self, file: CookieFile) -> None:
        kept, fault = file.load(self._clock.now())
        self._warn(fault)
        if kept is None or not self._is_usable(kept):
            return
        self._ke_address = kept.ke_address
        self._established_at, self._received_at = kept.established_at, kept.received_at
        self._session = Session.resume(
            kept.credentials,
            time.monotonic_ns(),
            self._session.interval,
            age=self._clock.now() - kept.established_at,
            rate_floor=kept.rate_floor,
        )

    def _is_usable(self, kept: Kept) -> bool:
        """Whether what an earlier run kept is what we would get by asking anew."""
        credentials = kept.credentials
        is_strict = credentials.certificate_time is CertificateTime.STRICT
        return (
            (is_strict or self._check is not CertificateCheck.STRICT)
            and credentials.keys.aead in self._offered
            and (not self._addresses or kept.ke_address in self._addresses)
        )

    @property
    def action(self) -> Action:
        """What `next` will do, and when by the monotonic clock."""
        return self._session.next(time.monotonic_ns())

    @property
    def phase(self) -> Phase:
        """Where the session is in its life."""
        return self._session.phase

    @property
    def credentials(self) -> Credentials | None:
        """What the session lives by now."""
        return self._session.credentials

    @property
    def address(self) -> str | None:
        """Where key establishment was done, once it was."""
        return self._ke_address or None

    def renew(self) -> None:
        """Have keys renewed as soon as that is polite, as when the server's certificate has ended."""
        self._session.renew(time.monotonic_ns())

    def forget(self) -> None:
        """Keep nothing of this server, on disk neither. Raises ClientError."""
        self._session = Session(time.monotonic_ns(), self._session.interval)
        self._keep()

    @property
    def interval(self) -> float:
        """The wanted seconds between polls. May be set; what RATE demanded is never undercut."""
        return self._session.interval / SECOND

    @interval.setter
    def interval(self, seconds: float) -> None:
        self._session.interval = round(seconds * SECOND)

    async def samples(self) -> AsyncIterator[Sample]:
        """Samples as they come, for as long as the server does not refuse us.

        Failures are in `last_failure`, and what is due is done again. The server may say of itself that it is
        not synchronised: see `Sample.synchronised`.
        """
        while not isinstance(self.action, Stop):
            try:
                sample = await self.next()
            except ClientError as error:
                self.last_failure = error
            else:
                self.last_failure = None
                yield sample

    async def next(self) -> Sample:
        """Wait until something is due, and do it, until there is a sample.

        Raises ClientError when key establishment or an exchange failed; calling it again waits for what is due
        then. After a refusal (DENY, RSTR) it always raises.
        """
        while True:
            sample = await self.step()
            if sample is not None:
                return sample

    async def step(self) -> Sample | None:
        """The same for one action; None after key establishment."""
        match self.action:
            case Stop(reason):
                raise ClientError(Failure.KISS, f"the server answered with the kiss code {reason}")
            case EstablishAt(at):
                await _sleep_until(at)
                await self._establish()
                return None
            case PollAt(at):
                await _sleep_until(at)
                return await self._poll()

    # Key establishment

    async def _establish(self) -> None:
        if not self._session.spare:
            self._spare = []
        self._session.establishing(time.monotonic_ns())
        setback = None
        try:
            established, trust = await self._try_addresses()
            # From here on the server has been asked, whatever the resolver says.
            setback = Setback.FAILED
            host = await ntp_address(established)
        except ClientError as error:
            self._spare = []
            self._session.establishment_failed(setback or _setback(error), time.monotonic_ns())
            raise
        self.establishments += 1
        leaf, result = established.chain[0], established.result
        credentials = Credentials(
            keys=result.keys,
            alternative=result.alternative,
            cookies=result.cookies,
            host=host,
            port=established.ntp_port,
            not_before=_unix_ns(leaf.not_valid_before_utc),
            not_after=_unix_ns(leaf.not_valid_after_utc),
            certificate_time=CertificateTime.STRICT if trust.floor is None else CertificateTime.FLOOR,
        )
        self._ke_address = established.address
        self._established_at = self._received_at = self._clock.now()
        self._session.established(credentials, time.monotonic_ns(), spare=len(self._spare))
        self._keep()

    async def _try_addresses(self) -> tuple[Established, Trust]:
        """The first address that works, those that are left staying spare. Raises the ClientError that says most."""
        trust = self._trust()
        if not self._spare:
            found = self._addresses or await system_addresses(self.name)
            self._spare = list(found[:_MAX_ADDRESSES])
        failure: ClientError | None = None
        while self._spare:
            try:
                established = await establish_any(
                    self.name, self._spare, self.port, trust, offered=self._offered
                )
                return established, trust
            except ClientError as error:
                if failure is None or error.code not in _UNREACHED:
                    failure = error
                if error.is_unacceptable:
                    break
        assert failure is not None
        raise failure

    def _trust(self) -> Trust:
        """The roots, and the time at which certificates are checked now (section 8.5)."""
        now = self._clock.now()
        at = _EPOCH + timedelta(microseconds=now // 1000)
        is_good = self._clock.is_good()
        if is_good:
            self._record_time(now)
        if is_good or self._record is None or self._check is CertificateCheck.STRICT:
            return Trust.of(self._roots, at)
        floor, fault = self._record.floor()
        self._warn(fault)
        return Trust.of(self._roots, at, floor)

    # Polls

    async def _poll(self) -> Sample:
        session = self._session
        used = session.polling(time.monotonic_ns())
        association = Association(KeResult(used.keys, used.cookies), secrets.token_bytes)
        try:
            # From here on no run of this program knows the cookie that the request is going to use.
            self._keep()
            sample = await exchange(association, used.host, used.port)
        except KissOfDeath as kiss:
            if kiss.authentic:
                session.kissed(kiss.code, tuple(association.jar), time.monotonic_ns())
                self._received_at = self._clock.now()
                self._keep()
            else:
                session.unanswered(time.monotonic_ns(), is_nak=True)
            code = Failure.UNSYNCHRONISED if kiss.code in STARTING else Failure.KISS
            raise ClientError(code, str(kiss)) from None
        except ClientError as error:
            if error.code == Failure.NTP:
                session.unanswered(time.monotonic_ns(), is_nak=False)
            else:
                session.unsent(time.monotonic_ns())
            raise
        except BaseException:
            session.unsent(time.monotonic_ns())
            raise
        # The sample's times are the kernel's, whatever clock the certificates are checked with.
        now = time.time_ns()
        self._received_at = self._clock.now()
        if not session.answered(tuple(association.jar), now + sample.offset):
            self._keep()
            raise ClientError(
                Failure.CERTIFICATE,
                f"the time that {self.name} gives is outside of its certificate's validity",
                "use another server: either its clock is wrong or its certificate has ended",
            )
        if self._clock.is_good() or self._check is CertificateCheck.STRICT:
            self._record_time(min(now, now + sample.offset))
        return sample

    # Files

    def _keep(self) -> None:
        """Bring the file to what the session holds; without cookies there is none."""
        if self._file is None:
            return
        self._is_changed = True
        credentials = self._session.credentials
        if credentials is None or not credentials.cookies:
            self._file.forget()
        else:
            floor = self._session.rate_floor
            kept = Kept(credentials, self._ke_address, self._established_at, self._received_at, floor)
            try:
                self._file.save(kept)
            except ClientError as error:
                if self._must_keep:
                    raise
                # No cookie that is going to be used may stay there.
                self._file.forget()
                self._warn(error.message)

    def _warn(self, fault: str | None) -> None:
        if fault is not None and fault not in self.warnings:
            self.warnings.append(fault)

    def _record_time(self, now: int) -> None:
        if self._record is None:
            return
        monotonic = time.monotonic_ns()
        if self._recorded_at is None or monotonic - self._recorded_at >= _RECORD_EVERY:
            self._recorded_at = monotonic
            try:
                self._record.save(now)
            except ClientError as error:
                if self._must_keep:
                    raise
                self._warn(error.message)


def _host(name: str) -> str:
    """The one form of a name that TLS, the certificate and the files use. Raises ClientError."""
    try:
        return host_of(name.encode())
    except (UnicodeEncodeError, WireError):
        raise ClientError(
            Failure.CONFIGURATION,
            f"{name!r} is not a host name or an address",
            "write it in its ASCII form, such as time.example.net or 2001:db8::1, without the port",
        ) from None


def _setback(error: ClientError) -> Setback:
    if error.is_unacceptable:
        return Setback.UNACCEPTABLE
    return Setback.UNREACHED if error.code in _UNREACHED else Setback.FAILED


def _unix_ns(moment: datetime) -> int:
    return (moment - _EPOCH) // timedelta(microseconds=1) * 1000


async def _sleep_until(at: int) -> None:
    """Wait until a time of the monotonic clock."""
    await asyncio.sleep(max(at - time.monotonic_ns(), 0) / SECOND)


@dataclass(frozen=True, slots=True)
class QueryResult:
    """What a single run found. `cookies` is how many key establishment gave, or an earlier run had kept."""

    samples: tuple[Sample, ...]
    ntp_host: str
    ntp_port: int
    aead: AeadId
    cookies: int
    key_establishment: bool
    certificate_time: CertificateTime

    @property
    def best(self) -> Sample:
        return select.best(self.samples)


async def query(source: Source, samples: int = 4) -> QueryResult:
    """Open `source` and take `samples`; one lost packet is made up for. What would need waiting is not done.

    Raises ClientError if there is no sample at all, and whenever the server refuses us or says that it is still
    starting.
    """
    async with source:
        return await _Query(source, samples).run()


class _Query:
    def __init__(self, source: Source, samples: int) -> None:
        self._source = source
        self._wanted = samples
        self._taken: list[Sample] = []
        self._tries = 0
        self._given = 0
        self._lived_by: Credentials | None = None
        self._failures: dict[type[Action], ClientError] = {}

    async def run(self) -> QueryResult:
        if self._source.credentials is not None:
            self._given = len(self._source.credentials.cookies)
        while len(self._taken) < self._wanted and self._is_due():
            await self._step()
        if self._lived_by is None:
            # Why there are no cookies explains why there is no answer.
            raise self._failures.get(EstablishAt) or self._failures[PollAt]
        credentials = self._lived_by
        return QueryResult(
            samples=tuple(self._taken),
            ntp_host=credentials.host,
            ntp_port=credentials.port,
            aead=credentials.keys.aead,
            cookies=self._given,
            key_establishment=self._source.establishments > 0,
            certificate_time=credentials.certificate_time,
        )

    def _is_due(self) -> bool:
        match self._source.action:
            case Stop():
                raise self._failures[PollAt]
            case PollAt() if self._tries > self._wanted:
                return False
            case PollAt() if EstablishAt in self._failures and not self._taken:
                # Neither kept cookies nor new ones: those that are left are for a time when somebody answers.
                return False
            case EstablishAt(at) | PollAt(at):
                return at <= time.monotonic_ns()

    async def _step(self) -> None:
        kind = type(self._source.action)
        try:
            sample = await self._source.step()
        except ClientError as error:
            if error.code in {Failure.CONFIGURATION, Failure.UNSYNCHRONISED}:
                raise
            self._failures[kind] = error
            self._tries += kind is PollAt
            return
        credentials = self._source.credentials
        assert credentials is not None, "neither cookies nor a failure"
        if sample is None:
            self._failures.clear()
            self._tries, self._given = 0, len(credentials.cookies)
        else:
            self._tries += 1
            self._taken.append(sample)
            self._lived_by = credentials
