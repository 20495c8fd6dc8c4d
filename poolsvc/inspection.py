"""A look at a server from outside, because its people or its agent ask for one: findings, each with its remedy.

Rules:

1. Looked at are the addresses that are proved, and those that the agent called from within the last hour: the registry
   is no scanner. Each is checked by `Guard` before it is dialled.
2. A server is looked at `policy.checks_per_hour` times at most, so many at a time in one process, and none for longer
   than `DEADLINE`.
3. Nothing follows from what is found: no score, stage or state.
"""

import asyncio
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from http import HTTPStatus

from cryptography import x509
from sqlalchemy.ext.asyncio import AsyncSession

from nts_core.aead import AeadId
from nts_core.association import Association, Plain, Sample
from nts_core.certificates import renew_by
from nts_core.client import ClientError, Established, exchange, is_own_fault
from nts_core.control import ACME_PATH, CheckStatus, Finding, ProbeResult, ProofWay, Stage, Validation
from nts_core.errors import KissOfDeath, OutOfCookies, printable
from nts_core.tls import Trust
from poolsvc import commands, issuance, monitoring, own_account, scoring, servers, validation
from poolsvc.config import Settings
from poolsvc.errors import InvalidAddress, RateLimited, WrongState
from poolsvc.explain import REMEDIES
from poolsvc.models import CommandKind, Server
from poolsvc.outbound import FetchError, Guard, Outbound, TooLong, http_origin
from poolsvc.prober import ProbeImpossible, key_establishment, measured, refuse_own_fault

# Seconds for all of one server, whose addresses are looked at side by side; for a connection, for an answer over HTTP.
DEADLINE = 20.0
_CONNECT, _HTTP = 5.0, 4.0
# Servers at a time in one process.
MAX_AT_ONCE = 16
_CALLED = timedelta(hours=1)
# One lost packet says nothing.
_TRIES = 2
# The algorithm that every server has; the cookies of faster ones are shorter, and so are their requests.
_OFFERED = (AeadId.AES_SIV_CMAC_256,)
_HTTP_LIMIT = 4096
_MAX_TEXT = 300
# A name that nobody can have (RFC 6761).
_FOREIGN_HOST = "host-rule.invalid"


class Check(StrEnum):
    """What is looked at, in this order."""

    HTTP = "http"
    HOST = "host"
    TLS_ALPN = "tls-alpn"
    TCP = "tcp"
    TLS = "tls"
    CERTIFICATE = "certificate"
    KE = "ke"
    COOKIES = "cookies"
    NTP_PLAIN = "ntp-plain"
    NTS_SHORT = "nts-short"
    NTS_LONG = "nts-long"
    CLOCK = "clock"


_OF_HTTP = (Check.HTTP, Check.HOST)
_OF_NTS = tuple(check for check in Check if check not in (*_OF_HTTP, Check.TLS_ALPN))
_OF_KE = (Check.TCP, Check.TLS, Check.CERTIFICATE, Check.KE, Check.COOKIES)
_CLOSED = "run the agent, and let everybody reach this port over TCP"
_HTTP_HOST = "let nothing but the agent answer on the HTTP port of this address"
_NOT_RENEWED = "see the agent's log for why it does not get or install another one: `pool-agent renew`"
_NOT_OURS = "let the agent serve the certificate that it got from the pool, and nothing else the NTS-KE port"
_LONG_LOST = (
    "have what drops long NTP packets (a firewall, or the provider's filter on UDP port 123) let them pass"
)
_KISSED = "let the registry ask as everybody may: see the limits of the server"


def addresses_of(server: Server, now: datetime) -> list[str]:
    """Those that may be looked at."""
    return [
        row.address
        for row in server.addresses
        if row.proved_at is not None or (row.called_at is not None and now - row.called_at < _CALLED)
    ]


async def begin(session: AsyncSession, settings: Settings, server: Server, now: datetime) -> None:
    """Count one look at a server. Raises WrongState, TooManyRequests."""
    if not addresses_of(server, now):
        raise WrongState(
            f"no address of {server.name} is proved, and none was called from within the hour",
            remedy="run `pool-agent run`: the registry connects only to where it was called from",
        )
    await commands.take(session, server, CommandKind.CHECK, settings.policy.checks_per_hour, now)


@dataclass(slots=True)
class _Look:
    """What is found at one address. `otherwise` is why a check was not made that no other one had stopped."""

    address: str
    found: dict[Check, Finding] = field(default_factory=dict)
    otherwise: str = "not reached"

    def ok(self, check: Check, detail: str = "") -> None:
        self._note(check, CheckStatus.OK, detail)

    def failed(self, check: Check, detail: str, remedy: str) -> None:
        self._note(check, CheckStatus.FAILED, detail, remedy)

    def skipped(self, check: Check, detail: str) -> None:
        self._note(check, CheckStatus.SKIPPED, detail)

    def _note(self, check: Check, status: CheckStatus, detail: str, remedy: str = "") -> None:
        self.found[check] = Finding(self.address, check, status, printable(detail)[:_MAX_TEXT], remedy)

    def is_ok(self, check: Check) -> bool:
        return check in self.found and self.found[check].status is CheckStatus.OK

    def findings(self) -> list[Finding]:
        """One for each check, in order."""
        for checks in (_OF_HTTP, (Check.TLS_ALPN,), _OF_NTS):
            stopped = self.otherwise
            for check in checks:
                if check not in self.found:
                    self.skipped(check, stopped)
                elif self.found[check].status is CheckStatus.FAILED:
                    stopped = f"after {check} failed"
        return [self.found[check] for check in Check]


class Inspector:
    """Looks at servers, as many at a time as one process can bear."""

    def __init__(self, settings: Settings, roots: Sequence[x509.Certificate]) -> None:
        self._settings = settings
        self._roots = roots
        self._guard = Guard(settings)
        self._outbound = Outbound(settings)
        self._running = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place among those that are looked at now. Raises RateLimited."""
        if self._running >= MAX_AT_ONCE:
            raise RateLimited("too many servers are looked at now", remedy="ask again in some seconds")
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    async def inspect(self, server: Server, now: datetime) -> tuple[Finding, ...]:
        """What is found at each address of a server, with what belongs to it."""
        looks = [_Look(address) for address in addresses_of(server, now)]
        own = frozenset(look.address for look in looks)
        trust = Trust.of(self._roots, now)
        found = await asyncio.gather(*(self._inspect(look, server, own, trust, now) for look in looks))
        return tuple(finding for findings in found for finding in findings)

    async def _inspect(
        self, look: _Look, server: Server, own: frozenset[str], trust: Trust, now: datetime
    ) -> list[Finding]:
        try:
            async with asyncio.timeout(DEADLINE), asyncio.TaskGroup() as all_at_once:
                all_at_once.create_task(self._http(look, server))
                all_at_once.create_task(self._tls_alpn(look, server))
                all_at_once.create_task(self._nts(look, server, own, trust, now))
        except TimeoutError:
            look.otherwise = "there was no time left for it"
        return look.findings()

    async def _http(self, look: _Look, server: Server) -> None:
        """The HTTP port, if the host needs it, and who answers there for which host."""
        if not self._needs_http(look, server):
            for check in _OF_HTTP:
                look.skipped(check, "the host answers the CA and the registry otherwise")
        elif not await self._reaches(look, Check.HTTP, self._settings.ports.http):
            return
        elif server.agentless:
            look.skipped(Check.HOST, "the server has no agent")
        elif server.validation is Validation.REDIRECT:
            await self._redirects(look, server)
        elif await self._answers_foreign(look):
            look.failed(Check.HOST, "answers with a page for a host that is not its own", _HTTP_HOST)
        else:
            await self._answers_own(look, server)

    def _needs_http(self, look: _Look, server: Server) -> bool:
        in_dns = validation.is_in_dns(self._settings, server)
        by_http = server.validation is not Validation.TLS_ALPN_01 and not in_dns
        is_proof = any(
            row.address == look.address and row.proof_by is ProofWay.HTTP for row in server.addresses
        )
        return server.agentless or by_http or is_proof

    async def _tls_alpn(self, look: _Look, server: Server) -> None:
        """The port on which the host answers the CA by TLS, if it does; what is there is seen with each order."""
        if server.validation is Validation.TLS_ALPN_01 and not validation.is_in_dns(self._settings, server):
            await self._reaches(look, Check.TLS_ALPN, self._settings.ports.tls)
        else:
            look.skipped(Check.TLS_ALPN, "the host answers the CA otherwise")

    async def _reaches(self, look: _Look, check: Check, port: int) -> bool:
        """Whether a TCP port answers."""
        try:
            self._guard.check(look.address, port)
            async with asyncio.timeout(_CONNECT):
                _, writer = await asyncio.open_connection(look.address, port)
            writer.transport.abort()
        except InvalidAddress as error:
            look.failed(check, f"not dialled: {error.detail}", error.remedy)
        except TimeoutError:
            detail = f"timeout: TCP port {port} does not answer within {_CONNECT:g} s, as behind a firewall"
            look.failed(check, detail, _CLOSED)
        except ConnectionRefusedError:
            look.failed(check, f"closed: nothing listens on TCP port {port}", _CLOSED)
        except OSError as error:
            if is_own_fault(error, look.address):
                look.skipped(check, "the registry itself cannot connect now")
            else:
                look.failed(check, f"no connection to TCP port {port}: {error.strerror}", _CLOSED)
        else:
            look.ok(check, f"TCP port {port} answers")
        return look.is_ok(check)

    async def _redirects(self, look: _Look, server: Server) -> None:
        """The member's own web server sends the CA to the registry; what else it says is not looked at."""
        token, domain = secrets.token_urlsafe(16), self._settings.domain_of(server.name)
        try:
            answer = await self._outbound.get(
                self._challenge_url(look, token), host=domain, deadline=_HTTP, limit=_HTTP_LIMIT
            )
            validation.check_redirect(self._settings, f"{ACME_PATH}{token}", answer)
        except FetchError as error:
            look.failed(Check.HOST, f"for {domain}: {error}", error.remedy)
        else:
            look.ok(Check.HOST, "sends the CA to the registry")

    async def _answers_foreign(self, look: _Look) -> bool:
        """Whether there is a page for a host that the server is not; silence is as good as a refusal."""
        url = self._challenge_url(look, secrets.token_urlsafe(16))
        try:
            answer = await self._outbound.get(url, host=_FOREIGN_HOST, deadline=_HTTP, limit=_HTTP_LIMIT)
        except FetchError as error:
            return isinstance(error, TooLong)
        return answer.status == HTTPStatus.OK and bool(answer.body)

    async def _answers_own(self, look: _Look, server: Server) -> None:
        """The challenge that is open is answered, and nothing else."""
        order, domain = issuance.open_order(server), self._settings.domain_of(server.name)
        token, content = secrets.token_urlsafe(16), None
        if order is not None and order.served_at is not None:
            for challenge in validation.http_challenges(order):
                token, content = challenge.token, challenge.key_authorization
        try:
            answer = await self._outbound.get(
                self._challenge_url(look, token), host=domain, deadline=_HTTP, limit=_HTTP_LIMIT
            )
        except FetchError as error:
            look.failed(Check.HOST, f"for {domain}: {error}", error.remedy)
            return
        if content is None and answer.status == HTTPStatus.NOT_FOUND:
            look.ok(Check.HOST, "answers for its own name, and for no foreign host")
        elif content is not None and (answer.status, answer.body.strip()) == (
            HTTPStatus.OK,
            content.encode(),
        ):
            look.ok(Check.HOST, "answers the challenge that is open, and no foreign host")
        else:
            wanted = "404" if content is None else "the challenge that is open"
            look.failed(
                Check.HOST, f"HTTP status {answer.status} for {domain} instead of {wanted}", _HTTP_HOST
            )

    def _challenge_url(self, look: _Look, token: str) -> str:
        return f"{http_origin(look.address, self._settings.ports.http)}{ACME_PATH}{token}"

    async def _nts(
        self, look: _Look, server: Server, own: frozenset[str], trust: Trust, now: datetime
    ) -> None:
        """Key establishment, then NTP."""
        try:
            found, established = await key_establishment(
                self._settings.domain_of(server.name),
                look.address,
                self._settings.ports.ke,
                trust,
                own_addresses=own,
                guard=self._guard,
                is_own=own_account.is_used(server),
                offered=_OFFERED,
            )
            for check in _OF_KE:
                if found.failed is not None and check == found.failed.value:
                    look.failed(check, found.detail, REMEDIES[found.failed])
                    break
                look.ok(check)
            if look.is_ok(Check.CERTIFICATE) and found.fingerprint is not None:
                _judge_certificate(look, server, found, now)
            if established is not None:
                await self._ntp(look, established, found)
        except ProbeImpossible as error:
            look.otherwise = f"the registry itself cannot look now: {error}"

    async def _ntp(self, look: _Look, established: Established, found: ProbeResult) -> None:
        """Packets as short and as long as clients send them; what is between here and there may drop some."""
        result = established.result
        requests: Mapping[Check, _Request] = {
            Check.NTP_PLAIN: lambda: Plain(secrets.token_bytes),
            Check.NTS_SHORT: lambda: Association(result, secrets.token_bytes),
            # With a single cookie it asks for seven more. The short one sends another.
            Check.NTS_LONG: lambda: Association(
                replace(result, cookies=result.cookies[-1:]), secrets.token_bytes
            ),
        }
        asked = (_ask(make, established.ntp_host, established.ntp_port) for make in requests.values())
        answers = dict(zip(requests, await asyncio.gather(*asked), strict=True))
        octets = {check: len(make().poll()) for check, make in requests.items()}
        most = max((octets[check] for check, answer in answers.items() if answer.passed), default=0)
        for check, answer in answers.items():
            _judge_size(look, check, answer, octets[check], most)
        samples = [answers[check].sample for check in (Check.NTS_SHORT, Check.NTS_LONG)]
        if there := [sample for sample in samples if sample is not None]:
            self._judge_clock(look, measured(found, there))

    def _judge_clock(self, look: _Look, result: ProbeResult) -> None:
        assert result.offset is not None
        step = scoring.step(result, max_stratum=self._settings.policy.max_stratum)
        seen = f"offset {result.offset / 1e6:+.3f} ms, stratum {result.stratum}"
        if step.value >= scoring.FULL_STEP:
            look.ok(Check.CLOCK, seen)
        else:
            look.failed(Check.CLOCK, f"{seen}: {step.reason}", REMEDIES[Stage.OFFSET])


def _judge_certificate(look: _Look, server: Server, found: ProbeResult, now: datetime) -> None:
    """Whether a valid certificate is one that the server should have, and lasts."""
    assert found.not_before is not None
    assert found.not_after is not None
    begins, ends = (datetime.fromtimestamp(moment, UTC) for moment in (found.not_before, found.not_after))
    until = f"until {ends:%Y-%m-%d %H:%M} UTC"
    newest = servers.newest_certificate(server)
    if not monitoring.is_ours(server, found):
        look.failed(Check.CERTIFICATE, f"valid {until}, but not one that the pool ordered", _NOT_OURS)
    elif renew_by(begins, ends) <= now:
        look.failed(Check.CERTIFICATE, f"valid {until} only, and not renewed", _NOT_RENEWED)
    elif newest is not None and newest.fingerprint != found.fingerprint:
        look.ok(Check.CERTIFICATE, f"valid {until}; a newer one is not installed yet")
    else:
        look.ok(Check.CERTIFICATE, f"valid {until}")


_Request = Callable[[], Association | Plain]


@dataclass(frozen=True, slots=True)
class _Answer:
    """What came back of requests of one size: a sample, or a kiss code in words, or nothing."""

    sample: Sample | None = None
    kiss: str = ""

    @property
    def passed(self) -> bool:
        return self.sample is not None or bool(self.kiss)


async def _ask(make: _Request, host: str, port: int) -> _Answer:
    """Ask with a new request each time, until there is an answer. Raises ProbeImpossible."""
    for _ in range(_TRIES):
        try:
            return _Answer(await exchange(make(), host, port))
        except KissOfDeath as kiss:
            return _Answer(kiss=str(kiss))
        except (ClientError, OutOfCookies) as error:
            refuse_own_fault(error)
    return _Answer()


def _judge_size(look: _Look, check: Check, answer: _Answer, octets: int, most: int) -> None:
    """What the answer to requests of one size says, when packets of `most` octets at most were answered."""
    is_plain = check is Check.NTP_PLAIN
    if answer.sample is not None:
        look.ok(check, f"{octets} octets pass")
    elif answer.kiss and is_plain:
        look.ok(check, f"{octets} octets pass; {answer.kiss}")
    elif answer.kiss:
        look.failed(check, answer.kiss, _KISSED)
    elif is_plain and most:
        look.ok(check, "no answer without NTS, which clients of the pool do not need")
    elif 0 < most < octets:
        look.failed(check, f"no answer to {octets} octets, while {most} octets pass", _LONG_LOST)
    else:
        look.failed(check, f"no answer to {octets} octets", REMEDIES[Stage.NTP_KE_COOKIE])
