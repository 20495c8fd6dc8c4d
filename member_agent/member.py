"""One server of this host in its pool: what the registry assigns is done, and what was done is reported.

What runs is always reconciled from what is wanted: a registry that is down changes nothing here, and the server goes on
with the certificate it has.
"""

import asyncio
import base64
import contextlib
import ipaddress
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from member_agent import hooks
from member_agent.challenges import ChallengeError, validate_challenge
from member_agent.config import AcmeMode, AgentSettings, Proof
from member_agent.errors import AgentError
from member_agent.host import Host, Served
from member_agent.install import CertificateStore, InstalledPair, InstallError, chain_fingerprint
from member_agent.ntp_server import Meter
from member_agent.registry import Registry, RegistryError
from member_agent.sockets import Endpoint
from member_agent.state import Listening, MemberDirectory, StateDirectory, read_agent_key, unusable
from member_agent.tls_answers import validate_tls_challenge
from nts_core.control import (
    ACME_PATH,
    PROOF_PATH,
    AgentReport,
    Assignment,
    CsrAnswer,
    HttpChallenge,
    IssuedCertificate,
    ProofWay,
    TlsChallenge,
    Validation,
    proof_statement,
)
from nts_core.errors import printable

if TYPE_CHECKING:
    from member_agent.own_account import OwnAccount

_log = structlog.get_logger()
# Bounds of what a registry may ask for as the time to the next report, and of the wait while it is away.
_MIN_POLL, _MAX_POLL = 0.05, 3600.0
_FIRST_RETRY, _AWAY_POLL = 1.0, 60.0
# Of one that does not know us any more: whoever restores it notices by then, and until then we only cost it.
_REFUSED_POLL = 3600.0
_MAX_PROOFS = 32
# What an assignment may have: a server has eight addresses, and one order at a time.
_MAX_ADDRESSES, _MAX_CHALLENGES = 16, 8
_MAX_ORDER = 2**63
# Reports that follow each other at once because something new is to be said; then the pace is the registry's again.
_MAX_ROUNDS = 20
# Seconds after which the API token is replaced by another: who has stolen it has it no longer than that.
_TOKEN_LIFE = 30 * 86_400
# What is left of a certificate's life when it is time to worry: it is renewed with a third of it left.
_WORRY = 0.2
_random = secrets.SystemRandom()


def _bounded(seconds: float) -> float:
    """What a registry asks for as the time to the next report, within our bounds."""
    return min(max(seconds, _MIN_POLL), _MAX_POLL) if math.isfinite(seconds) else _MAX_POLL


def patience(failures: int, asked: float | None, chance: float, *, is_refused: bool = False) -> float:
    """Seconds until a registry that has failed so often in a row is asked again: from one to a minute, doubled each time.

    It is an hour if it was reached and does not want us. Up to half of it is left out by `chance` (0 to 1), as all its
    agents lose it at once. No sooner than it asked for.
    """
    longest = _REFUSED_POLL if is_refused else min(_AWAY_POLL, _FIRST_RETRY * 2.0 ** min(failures - 1, 10))
    return max(longest * (1 - chance / 2), _bounded(asked or 0))


def token_is_old(token_at: int, now: float) -> bool:
    """One of the future was had while the clock was wrong; nobody knows how old it is."""
    return abs(now - token_at) > _TOKEN_LIFE


def _is(pair: InstalledPair | None, issued: IssuedCertificate | None) -> bool:
    return pair is not None and issued is not None and pair.fingerprint == issued.fingerprint


def is_worrying(pair: InstalledPair, now: datetime) -> bool:
    """Whether the certificate should have been renewed by now."""
    return pair.left(now) < _WORRY


def _words(error: Exception) -> str:
    """What is wrong, and what to do."""
    if isinstance(error, AgentError):
        return f"{error.message}; {error.remedy}"
    if isinstance(error, OSError):
        return f"{error}; check the state directory's owner, rights and space"
    return str(error)


def _is_address(text: str) -> bool:
    """Of no zone, which may be any text."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return "%" not in text


def last_served(directory: MemberDirectory, settings: AgentSettings) -> Served | None:
    """What was served for a server in the last run, if it still can be. It blocks; raises AgentError, InstallError, OSError."""
    last = directory.listening()
    if last is None:
        return None
    pair = CertificateStore(directory.certificates, directory.membership().domain).current()
    return None if pair is None else _served(pair, last.hosts, last.ke_port, settings)


async def all_last_served(state: StateDirectory, settings: AgentSettings) -> dict[str, Served]:
    """`last_served` of all servers that this host is and means to be, by domain. Raises AgentError."""
    found: dict[str, Served] = {}
    for domain, directory in state.members().items():
        try:
            served = await asyncio.to_thread(last_served, directory, settings)
        except (AgentError, InstallError, OSError):
            continue  # whoever follows it will say so
        if served is not None and not directory.is_given_up:
            found[domain] = served
    return found


async def take_away(host: Host, directory: MemberDirectory) -> None:
    """Nothing here answers for the server any more, and its keys go. Raises AgentError.

    A server that is joined anew while a time daemon is told keeps what came of that, and is followed again.
    """
    stamp = directory.stamp()
    # In whatever run it has served: a time daemon may have lines for it.
    await host.forget(directory.path.name, has_served=directory.listening() is not None)
    if directory.stamp() == stamp:
        directory.remove()


def _served(pair: InstalledPair, hosts: tuple[str, ...], ke_port: int, settings: AgentSettings) -> Served:
    ke, ntp = (tuple(Endpoint(host, port) for host in hosts) for port in (ke_port, settings.ntp_port))
    return Served(pair, ke, ntp)


@dataclass(slots=True)
class _Facts:
    """What the agent will tell the registry next."""

    serving: tuple[str, ...] = ()
    csr: CsrAnswer | None = None
    installed: str | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def problem(self) -> str | None:
        return "; ".join(self.problems) or None


@dataclass(slots=True)
class Contact:
    """How it stands with the registry. Times are Unix seconds; `error` is why it could not be had, since `error_at`.

    `is_refused`: it was reached, and does not know us or does not let us in.
    """

    at: int | None = None
    error: str | None = None
    error_at: int | None = None
    is_refused: bool = False
    answered: int = 0
    failures: int = 0
    failures_in_a_row: int = 0

    def had(self) -> None:
        self.at, self.error, self.error_at = int(time.time()), None, None
        self.is_refused = False
        self.answered += 1
        self.failures_in_a_row = 0

    def failed(self, error: str, *, is_refused: bool = False) -> bool:
        """Whether that is news."""
        self.failures += 1
        self.failures_in_a_row += 1
        is_news = self.error is None or is_refused != self.is_refused
        self.error, self.is_refused = error, is_refused
        if is_news:
            self.error_at = int(time.time())
        return is_news


class Member:
    """Keeps one server in step.

    `contact`, `problem`, `certificate` (what is installed) and `installs` (how often one was) are for people who look on.
    """

    def __init__(self, directory: MemberDirectory, host: Host, settings: AgentSettings) -> None:
        """Raises AgentError for a state that cannot be used."""
        me = directory.membership()
        self.me = me
        self._directory = directory
        self._host = host
        self._settings = settings
        try:
            self._key = read_agent_key(me.key.encode())
            self._store = CertificateStore(directory.certificates, me.domain)
            self._own = self._own_account()
        except (OSError, ValueError) as error:
            raise unusable(directory.path, error) from None
        self.contact = Contact()
        self.problem: str | None = None
        self.certificate: InstalledPair | None = None
        self.installs = 0
        self._registry = Registry(me.registry, me.token, Path(me.ca) if me.ca else None)
        self._facts = _Facts()
        self._told: set[object] = set()
        self._challenges: tuple[HttpChallenge, ...] = ()
        self._tls_challenges: tuple[TlsChallenge, ...] = ()
        self._meter, self._ke_meter = Meter(), Meter()
        self._proofs = directory.proofs()
        self._wake = asyncio.Event()
        self._worry: str | None = None
        self._hooked: str | None = None
        self._hooked_before: str | None = None
        self._settled: str | None = None
        # The pair in use when another one was seen that is not kept here.
        self._doubted: str | None = None
        self._is_token_kept = True

    def _own_account(self) -> "OwnAccount | None":
        """The account at a CA that orders in place of the registry's, where the member wants that."""
        if self._settings.acme.mode is not AcmeMode.OWN_ACCOUNT:
            return None
        from member_agent.own_account import OwnAccount  # noqa: PLC0415 - the ACME library takes 7 MB

        return OwnAccount(
            self._directory,
            self._store,
            self.me.domain,
            self._settings.acme,
            install=self._put,
            changed=self._follow_own_account,
        )

    def _follow_own_account(self) -> None:
        """Our own account has another challenge, certificate or problem."""
        self._publish()
        self.wake()

    def renew(self) -> None:
        """Have our own account order now; what the registry orders is asked for there."""
        if self._own is not None:
            self._own.renew()

    def wake(self) -> None:
        """Ask the registry at once."""
        self._wake.set()

    async def follow(self) -> None:
        """Keep in step until the server has left the pool, or is given up here. Raises AgentError when this membership is
        of no use any more: the server was joined anew, and somebody has to follow it by what is on the disk now.
        """
        self._host.http.replace(self.me.domain, {})
        async with self._registry, self._ordering():
            try:
                await self._keep_in_step()
            except RegistryError as error:
                if not error.has_left:
                    raise
                _log.warning("left_the_pool", domain=self.me.domain, detail=error.message)

    @contextlib.asynccontextmanager
    async def _ordering(self) -> AsyncIterator[None]:
        """Meanwhile our own account orders, if there is one."""
        task = None if self._own is None else asyncio.create_task(self._own.follow())
        try:
            yield
        finally:
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def _keep_in_step(self) -> None:
        rounds = 0
        while not self._directory.is_given_up:
            # Whoever wakes us from here on wants another report.
            self._wake.clear()
            try:
                assignment = await self._sync()
                self._check(assignment)
                self._facts = _Facts()
                wait = _bounded(assignment.poll_after)
                await self._obey(assignment)
                self.contact.had()
                if self._has_news() and rounds < _MAX_ROUNDS:
                    rounds += 1
                    continue
            except RegistryError as error:
                if error.has_left or (error.is_final and self._is_joined_anew()):
                    raise
                said = _words(error) if error.is_final else error.message
                wait = await self._do_without(said, error.retry_after, is_refused=error.is_final)
            except (ValueError, TypeError, OverflowError, OSError) as error:
                # Nothing that a registry says may end the service.
                wait = await self._do_without(
                    f"the registry's assignment is not understood: {type(error).__name__}", _AWAY_POLL
                )
            rounds = 0
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), wait)

    def _is_joined_anew(self) -> bool:
        """Whether another key has joined as this server since we began: ours is refused for a good reason."""
        try:
            return self._directory.membership().key != self.me.key
        except AgentError:
            return False

    async def _do_without(self, error: str, retry_after: float | None, *, is_refused: bool = False) -> float:
        """The registry is away, or of no use, or does not know us: go on with what there is, and ask again after so many
        seconds. A registry that was restored from a wrong copy must not end what its pool serves.
        """
        if self.contact.failed(error, is_refused=is_refused):
            event = "registry_refuses" if is_refused else "registry_unreachable"
            _log.log(
                logging.ERROR if is_refused else logging.WARNING, event, domain=self.me.domain, detail=error
            )
        await self._serve_what_there_is()
        failures, chance = self.contact.failures_in_a_row, _random.random()
        return patience(failures, retry_after, chance, is_refused=is_refused)

    async def _sync(self) -> Assignment:
        """Report; with a new token when the old one is old, or is not known any more to a registry that was restored."""
        if token_is_old(self.me.token_at, time.time()):
            await self._rejoin()
        try:
            return await self._registry.sync(self._report())
        except RegistryError as error:
            if error.code != "unauthenticated":
                raise
            _log.warning("token_refused", domain=self.me.domain, detail=error.message)
        await self._rejoin()
        return await self._registry.sync(self._report())

    async def _rejoin(self) -> None:
        """A new token by the key that joined. A crash before it is written down is mended by another one."""
        token = await self._registry.rejoin(self._key, pool=self.me.pool, server=self.me.server)
        self.me = replace(self.me, token=token, token_at=int(time.time()))
        self._is_token_kept = False
        # It is good here all the same; `_obey` tries again, and says why not.
        with contextlib.suppress(AgentError):
            self._keep_token()
        _log.info("joined_again", domain=self.me.domain)

    def _keep_token(self) -> None:
        if not self._is_token_kept:
            self._directory.save_token(self.me)
            self._is_token_kept = True

    def _has_news(self) -> bool:
        """Whether the registry waits for what has just been done: a request, or an answer that is served now."""
        news: set[object] = {*self._facts.serving}
        if self._facts.csr is not None:
            news.add(self._facts.csr)
        is_new = not news <= self._told
        self._told = news
        return is_new

    def _report(self) -> AgentReport:
        facts, limits, engine, now = self._facts, self._settings.limits, self._host.engine, time.monotonic()
        ke_traffic = self._ke_meter.read(engine.ke_requests, now)
        return AgentReport(
            engine=engine.name,
            clock=self._host.clock.describe(),
            serving=facts.serving,
            csr=facts.csr,
            installed=facts.installed,
            problem=facts.problem,
            traffic_cap=limits.ntp_pps,
            traffic=self._meter.read(engine.requests, now),
            ke_cap=limits.ke_per_minute,
            ke_traffic=None if ke_traffic is None else 60 * ke_traffic,
            validation=self._settings.acme.validation,
            account_uri=None if self._own is None else self._own.uri,
        )

    def _check(self, assignment: Assignment) -> None:
        """Refuse an assignment for other names than those confirmed at join: the registry owns no host."""
        ours = (self.me.pool, self.me.server, self.me.domain)
        if (assignment.pool, assignment.server, assignment.domain) != ours:
            raise RegistryError(
                "the registry assigns names that this agent never joined as",
                "ask the pool's operator; nothing was changed",
            )
        if (
            len(assignment.addresses) > _MAX_ADDRESSES
            or len(assignment.challenges) + len(assignment.tls_challenges) > _MAX_CHALLENGES
        ):
            raise RegistryError(
                "the registry assigns more addresses or challenges than a server has",
                "ask the pool's operator; nothing was changed",
            )
        orders = [] if assignment.csr_for is None else [assignment.csr_for]
        orders += [] if assignment.certificate is None else [assignment.certificate.order]
        if not all(0 < order < _MAX_ORDER for order in orders):
            raise RegistryError(
                "the registry assigns an order that is none", "ask the pool's operator; nothing was changed"
            )
        ports = (assignment.http_port, assignment.ke_port, assignment.tls_port)
        if not all(0 < port < 65536 for port in ports) or not all(
            _is_address(entry.address) for entry in assignment.addresses
        ):
            raise RegistryError(
                "the registry assigns ports or addresses that are none",
                "ask the pool's operator; nothing was changed",
            )

    async def _obey(self, assignment: Assignment) -> None:
        """Do what is wanted. What cannot be done stops nothing else, least of all the service with what there is."""
        hosts = self._host.addresses(entry.address for entry in assignment.addresses)
        places = Listening(hosts, assignment.ke_port, assignment.http_port, assignment.tls_port)
        with self._noting():
            self._keep_token()
        with self._noting():
            await self._install(assignment, places)
        with self._noting():
            await self._answer(assignment, places)
        if self._is_unanswered(assignment):
            self._facts.problems.append(
                "nobody answers the CA: the registry does not do it in DNS for this server; let acme.validation be another"
                " one, or ask the pool's operator (policy.dns_01)"
            )
        if self._own is not None:
            self._own.refused = printable(assignment.account_refused)
            if self._own.problem is not None:
                self._facts.problems.append(self._own.problem)
        self._tell(self._facts.problem)

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        """What cannot be done becomes the problem that the next report tells."""
        try:
            yield
        except RegistryError:
            raise
        except (AgentError, ChallengeError, InstallError, OSError) as error:
            self._facts.problems.append(_words(error))

    def _tell(self, problem: str | None) -> None:
        """Say what is wrong, once."""
        is_news = problem is not None and problem != self.problem
        self.problem = problem
        if is_news:
            _log.error("not_as_it_should_be", domain=self.me.domain, detail=problem)

    async def _answer(self, assignment: Assignment, places: Listening) -> None:
        """Prove addresses and the name, and ask for certificates."""
        for challenge in assignment.challenges:
            validate_challenge(challenge)
        for tls_challenge in assignment.tls_challenges:
            validate_tls_challenge(tls_challenge)
        await self._listen(places)
        if self._own is not None:
            self._own.allow(may_order=assignment.may_order)
        await self._prove(assignment)
        await self._answer_challenges(assignment)

    async def _listen(self, places: Listening) -> None:
        """On the ports of the answers that this host gives itself."""
        validation, domain = self._settings.acme.validation, self.me.domain
        needs_http = validation is Validation.HTTP_01 or self._proof is ProofWay.HTTP
        needs_tls = validation is Validation.TLS_ALPN_01
        ports = {
            self._host.http: places.http_port if needs_http else None,
            self._host.alpn: places.tls_port if needs_tls else None,
            self._host.proofs: places.ke_port if self._proof is ProofWay.TLS else None,
        }
        for attendant, port in ports.items():
            endpoints = [] if port is None else [Endpoint(host, port) for host in places.hosts]
            try:
                await self._host.answer(attendant, domain, endpoints)
            except AgentError as error:
                if self._own is not None:
                    self._own.hold()
                raise AgentError(
                    error.message,
                    f"{error.remedy}; or let acme.validation in the settings be one that needs no port of another"
                    " program's",
                    error.status,
                ) from None

    @property
    def _proof(self) -> ProofWay:
        """How an address is proved: over HTTP where port 80 is ours."""
        if self._settings.proof is not Proof.AUTO:
            return ProofWay(self._settings.proof)
        return ProofWay.HTTP if self._settings.acme.validation is Validation.HTTP_01 else ProofWay.TLS

    async def _prove(self, assignment: Assignment) -> None:
        for entry in sorted(assignment.addresses, key=lambda entry: ":" not in entry.address):
            if not entry.call:
                continue
            try:
                nonce = await self._registry.request_proof(entry.address, self._proof)
            except RegistryError as error:
                if error.is_final:
                    raise
                self._facts.problems.append(f"{entry.address}: {error.message}; {error.remedy}")
                continue
            statement = proof_statement(
                pool=self.me.pool, server=self.me.server, address=entry.address, nonce=nonce
            )
            while len(self._proofs) >= _MAX_PROOFS:
                del self._proofs[next(iter(self._proofs))]
            self._proofs[nonce] = base64.b64encode(self._key.sign(statement))
            self._publish()
            with self._noting():
                # The registry may come after a restart.
                self._directory.save_proofs(self._proofs)

    async def _answer_challenges(self, assignment: Assignment) -> None:
        """What the registry needs for an order of its own, and to prove addresses."""
        self._challenges, self._tls_challenges = assignment.challenges, assignment.tls_challenges
        self._publish()
        tokens = (challenge.token for challenge in assignment.challenges)
        digests = (challenge.digest for challenge in assignment.tls_challenges)
        self._facts.serving = (*tokens, *digests, *self._proofs)
        order = assignment.csr_for
        # One that nobody answers for would only use up the CA's limits.
        if order is not None and self._own is None and not self._is_unanswered(assignment):
            pem = await asyncio.to_thread(self._store.pending, order)
            self._facts.csr = CsrAnswer(order, pem)

    def _is_unanswered(self, assignment: Assignment) -> bool:
        """Whether this host leaves the CA to the registry, and the registry does not answer it."""
        return self._settings.acme.validation is Validation.DNS_01 and assignment.in_dns is False

    def _publish(self) -> None:
        """Answer what the registry relays, or what our own account was told, and proofs."""
        asked, asked_by_tls = self._challenges, self._tls_challenges
        if self._own is not None:
            asked, asked_by_tls = self._own.challenges, self._own.tls_challenges
        challenges = {
            ACME_PATH + challenge.token: challenge.key_authorization.encode("ascii") for challenge in asked
        }
        proofs = {PROOF_PATH + nonce: signature for nonce, signature in self._proofs.items()}
        self._host.http.replace(self.me.domain, {**proofs, **challenges})
        self._host.alpn.replace(self.me.domain, asked_by_tls)
        self._host.proofs.replace(self.me.domain, self._proofs)

    async def _install(self, assignment: Assignment, places: Listening) -> None:
        # Where our own account orders, what the registry ordered before is older than what there is.
        wanted = assignment.certificate if self._own is None else None
        current = await asyncio.to_thread(self._store.current)
        if wanted is not None and not _is(current, wanted):
            with self._noting():
                if chain_fingerprint(wanted.chain) != wanted.fingerprint:
                    # Otherwise it would be installed again and again.
                    raise InstallError(
                        "the registry's certificate is not the one that it names", "ask the pool's operator"
                    )
                await self._put(wanted.order, wanted.chain)
        staged = await asyncio.to_thread(self._store.next)
        if self._own is None and not _is(staged, wanted):
            staged = None
        current = await self._use(staged, places)
        if current is not None:
            await self._settle(current, assignment.seen)

    async def _use(self, staged: InstalledPair | None, places: Listening) -> InstalledPair | None:
        """Serve what was staged, or go on with what there is; the pair that is served now."""
        current, now = await asyncio.to_thread(self._store.current), datetime.now(UTC)
        if staged is not None and now < staged.not_after:
            with self._noting():
                await self._change(current, staged, places)
                # From here on it is served, whether that can be written down or not.
                current = staged
                await asyncio.to_thread(self._store.adopt)
                self.installs += 1
                _log.info("certificate_installed", domain=self.me.domain, order=staged.order)
        if current is not None:
            self._watch(current, now)
            with self._noting():
                self._directory.save_listening(places)
            await self._serve(current, places.hosts, places.ke_port)
            self._facts.installed = current.fingerprint
            with self._noting():
                await self._hook_after(current)
        return current

    async def _put(self, order: int, chain: str) -> None:
        """Keep what was issued, to be served with the next report. Raises InstallError."""
        await asyncio.to_thread(self._store.stage, order, chain, now=datetime.now(UTC))

    async def _change(self, old: InstalledPair | None, new: InstalledPair, places: Listening) -> None:
        """Serve another pair. Raises AgentError, of the member's hook or of the engine, which goes on as it was."""
        if self._hooked_before != new.fingerprint:
            await self._hook("before", self._settings.hooks.before, old)
            self._hooked_before = new.fingerprint
        await self._serve(new, places.hosts, places.ke_port)

    async def _settle(self, current: InstalledPair, seen: str | None) -> None:
        """The registry has seen it work from outside: the one before it is not kept any more."""
        if seen == current.fingerprint:
            if self._settled != seen:
                await asyncio.to_thread(self._store.settle)
                self._settled = seen
        elif (
            seen is not None
            and self._doubted != current.fingerprint
            and seen not in await asyncio.to_thread(self._store.fingerprints)
        ):
            _log.info("another_certificate_seen", domain=self.me.domain, seen=printable(seen))
            self._doubted = current.fingerprint

    async def _hook_after(self, pair: InstalledPair) -> None:
        """Once for each certificate, also after a crash; one that fails is said and not repeated."""
        command = self._settings.hooks.after
        if not command or pair.fingerprint in {self._hooked, self._directory.hooked()}:
            return
        # A disk that is full would have it run with each report.
        self._hooked = pair.fingerprint
        try:
            await self._hook("after", command, pair)
        finally:
            self._directory.save_hooked(pair.fingerprint)

    async def _hook(self, name: str, command: tuple[str, ...], pair: InstalledPair | None) -> None:
        files = {} if pair is None else {"chain": str(pair.chain_path), "key": str(pair.key_path)}
        await hooks.run(name, command, {"domain": self.me.domain, **files})

    async def _serve(self, pair: InstalledPair, hosts: tuple[str, ...], ke_port: int) -> None:
        await self._host.serve(self.me.domain, _served(pair, hosts, ke_port, self._settings))

    async def _serve_what_there_is(self) -> None:
        """Where we served before: the last certificate, or the next one, which our own account may have had since."""
        last = self._directory.listening()
        if last is None:
            return
        self._facts.problems.clear()
        with self._noting():
            await self._use(await asyncio.to_thread(self._store.next), last)
        if self._own is not None:
            with self._noting():
                await self._listen(last)
                self._own.allow(may_order=None)
        self._tell(self._facts.problem)

    def _watch(self, pair: InstalledPair, now: datetime) -> None:
        """Say, once, that a certificate ends soon and was not renewed."""
        self.certificate = pair
        worry = None
        if is_worrying(pair, now):
            worry = f"the certificate ends {pair.not_after:%Y-%m-%d %H:%M} UTC and was not renewed; see `pool-agent check`"
        if worry is not None and worry != self._worry:
            _log.error(
                "certificate_ends_soon", domain=self.me.domain, detail=worry, registry=self.contact.error
            )
        self._worry = worry

    def facts(self) -> dict[str, Any]:
        """What the agent knows of this server, for `pool-agent status`; times are Unix seconds."""
        pair = self.certificate
        return {
            "domain": self.me.domain,
            "registry": self.me.registry,
            "contact_at": self.contact.at,
            "contact_error": self.contact.error,
            "contact_error_at": self.contact.error_at,
            "contact_refused": self.contact.is_refused,
            "problem": self.problem or self._worry or (None if self._own is None else self._own.problem),
            "own_account": None if self._own is None else self._own.facts(pair, datetime.now(UTC)),
            "certificate_ends": None if pair is None else int(pair.not_after.timestamp()),
            "fingerprint": None if pair is None else pair.fingerprint,
            "seen_from_outside": pair is not None and pair.fingerprint == self._settled,
        }
