"""The long-running agent: serve, and keep in step with the registry.

    `serve`   a stand-alone server with a certificate from files
    `run`     a pool member: report, prove addresses, answer challenges, install certificates, serve

What runs is always reconciled from what is wanted: a registry that is down changes nothing here, and the server
goes on with the certificate it has.
"""

import asyncio
import base64
import contextlib
import ipaddress
import math
import re
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import structlog
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from member_agent import metrics
from member_agent.challenges import ChallengeError, Responder, validate_challenge
from member_agent.clock import Clock
from member_agent.config import AgentSettings
from member_agent.engines.builtin import BuiltinEngine
from member_agent.errors import AgentError, ExitStatus
from member_agent.install import CertificateStore, InstalledPair, InstallError, load_pair
from member_agent.ntp_server import Meter
from member_agent.registry import Registry, RegistryError
from member_agent.sockets import Endpoint, is_local
from member_agent.state import Membership, StateDirectory
from member_agent.tracking import parse_source
from nts_core.control import (
    ACME_PATH,
    PROOF_PATH,
    AgentReport,
    Assignment,
    CsrAnswer,
    proof_statement,
)
from nts_core.errors import TlsError
from nts_core.tls import ServerCredentials, ServerKey

_log = structlog.get_logger()
# Bounds of what a registry may ask for as the time to the next report, and the wait while it is away.
_MIN_POLL, _MAX_POLL, _AWAY_POLL = 0.05, 3600.0, 60.0
_FIRST_RETRY = 1.0
_SERVER = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_POOL = re.compile(r"([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?[.])+[a-z0-9-]{2,63}")
_MAX_PROOFS = 32


def load_credentials(cert: Path, key: Path) -> ServerCredentials:
    """Certificate and key from PEM files. Raises AgentError with the remedy."""
    try:
        load_pair(cert, key)
        chain = x509.load_pem_x509_certificates(cert.read_bytes())
        private = serialization.load_pem_private_key(key.read_bytes(), None)
    except InstallError as error:
        raise AgentError(error.message, error.remedy, ExitStatus.CERTIFICATE) from None
    except (OSError, ValueError) as error:
        raise AgentError(f"{cert}, {key}: {error}", "check both files", ExitStatus.CERTIFICATE) from None
    if not isinstance(private, ServerKey):
        raise AgentError(
            f"{key}: a kind of key that TLS does not use", "use a P-256 key", ExitStatus.CERTIFICATE
        )
    now = datetime.now(UTC)
    begins, ends = chain[0].not_valid_before_utc, chain[0].not_valid_after_utc
    if not begins <= now <= ends:
        # It may be the clock that is wrong, so it is served all the same.
        _log.warning("certificate_not_valid_now", begins=begins.isoformat(), ends=ends.isoformat())
    try:
        return ServerCredentials(chain, private)
    except TlsError as error:
        raise AgentError(f"{cert}, {key}: {error}", "check both files", ExitStatus.CERTIFICATE) from None


@contextlib.asynccontextmanager
async def _signals(on_hangup: Callable[[], None]) -> AsyncIterator[asyncio.Event]:
    """An event that SIGTERM and SIGINT set; SIGHUP calls `on_hangup`."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    handlers = {signal.SIGTERM: stop.set, signal.SIGINT: stop.set, signal.SIGHUP: on_hangup}
    for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)
    try:
        yield stop
    finally:
        for number in handlers:
            loop.remove_signal_handler(number)


async def _rotate(engine: BuiltinEngine) -> None:
    while True:
        _rotate_if_due(engine)
        await asyncio.sleep(min(engine.seconds_to_rotation(), _MAX_POLL))


def _rotate_if_due(engine: BuiltinEngine) -> None:
    try:
        engine.rotate_if_due()
    except AgentError as error:
        # The old key goes on sealing; a full disk must not stop the service.
        _log.error("cookie_key_not_saved", detail=error.message)


async def _until(stop: asyncio.Event, *tasks: asyncio.Task[None]) -> None:
    """Wait for the stop signal or for a task that ends, whose error is raised; end the others."""
    stopped = asyncio.create_task(stop.wait())
    try:
        done, _ = await asyncio.wait({stopped, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in (stopped, *tasks):
            task.cancel()
        await asyncio.gather(stopped, *tasks, return_exceptions=True)


async def serve(
    settings: AgentSettings,
    *,
    cert: Path,
    key: Path,
    ke: Sequence[Endpoint],
    ntp: Sequence[Endpoint],
    state: StateDirectory | None,
    ready: Callable[[str], None],
) -> None:
    """A stand-alone NTS server until SIGTERM. `ready` gets the one line that says where it listens."""
    if state is not None:
        state.lock()
    clock = clock_of(settings)
    engine = BuiltinEngine(load_credentials(cert, key), clock, settings, state)

    def reload() -> None:
        try:
            engine.use_credentials(load_credentials(cert, key))
        except AgentError as error:
            _log.error("certificate_not_reloaded", detail=error.message, remedy=error.remedy)
        else:
            _log.info("certificate_reloaded")

    async with _signals(reload) as stop:
        await clock.refresh()
        await engine.start(ke, ntp)
        metrics.expose(settings.metrics, metrics.engine_families(engine))
        try:
            ready(
                f"ready ke={','.join(map(str, engine.ke.endpoints))}"
                f" ntp={','.join(map(str, engine.ntp.endpoints))}"
            )
            _log.info("serving", clock=clock.describe())
            await _until(stop, asyncio.create_task(_rotate(engine)), asyncio.create_task(clock.follow()))
        finally:
            await engine.stop()


async def join(url: str, token: str, state: StateDirectory, ca: Path | None, agent: str) -> Membership:
    """Become a member with a join token; `ca` is an absolute path.

    Raises AgentError when this state directory already is a member's.
    """
    state.lock()
    known = state.membership()
    if known is not None:
        raise AgentError(
            f"this host already is {known.domain}",
            "run `pool-agent run`; to join anew, use another --state or move this one away",
            ExitStatus.STATE,
        )
    answer = await Registry(url, token, ca).join(state.agent_key(), agent)
    if not _SERVER.fullmatch(answer.server) or not _POOL.fullmatch(answer.pool):
        raise RegistryError("the registry's names are not host names", "ask the pool's operator")
    if answer.domain != f"{answer.server}.servers.{answer.pool}":
        # Otherwise a registry could have this host answer challenges for any name that leads here.
        raise RegistryError("the registry's name for this server is not under its pool", "ask the operator")
    membership = Membership(
        registry=url.rstrip("/"),
        pool=answer.pool,
        server=answer.server,
        domain=answer.domain,
        token=answer.token,
        ca=str(ca) if ca else None,
    )
    state.save_membership(membership)
    return membership


def _bounded(seconds: float) -> float:
    """What a registry asks for as the time to the next report, within our bounds."""
    return min(max(seconds, _MIN_POLL), _MAX_POLL) if math.isfinite(seconds) else _MAX_POLL


def clock_of(settings: AgentSettings) -> Clock:
    """The clock that a member's settings ask for. Raises AgentError that names the option."""
    return Clock(
        settings.local_stratum, round(settings.clock_offset * 1e9), parse_source(settings.clock_source)
    )


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


@dataclass(slots=True)
class _Facts:
    """What the agent will tell the registry next."""

    serving: tuple[str, ...] = ()
    csr: CsrAnswer | None = None
    installed: str | None = None
    problem: str | None = None


class Member:
    """A pool member's agent: one server, its addresses, one certificate."""

    def __init__(self, state: StateDirectory, settings: AgentSettings) -> None:
        membership = state.require_membership()
        self._state = state
        self._settings = settings
        self._me = membership
        self._key = state.agent_key()
        self._registry = Registry(
            membership.registry, membership.token, Path(membership.ca) if membership.ca else None
        )
        try:
            self._store = CertificateStore(state.path / "certificates", membership.domain)
        except OSError as error:
            raise AgentError(
                f"{state.path / 'certificates'}: {error.strerror}",
                "check the directory's owner, rights and space",
                ExitStatus.STATE,
            ) from None
        self._responder = Responder([membership.domain])
        self._clock = clock_of(settings)
        self._engine: BuiltinEngine | None = None
        self._facts = _Facts()
        self._told: set[object] = set()
        self._meter = Meter()
        self._proofs: dict[str, bytes] = {}
        self._listening = False

    async def run(self) -> None:
        """Serve and keep in step until SIGTERM, or until the server has left the pool."""
        self._state.lock()
        wake = asyncio.Event()
        async with _signals(wake.set) as stop, self._responder, self._registry:
            metrics.expose(
                self._settings.metrics,
                lambda: metrics.engine_families(self._engine)() if self._engine else [],
            )
            try:
                await self._clock.refresh()
                await _until(
                    stop,
                    asyncio.create_task(self._keep_in_step(wake)),
                    asyncio.create_task(self._clock.follow()),
                )
            finally:
                if self._engine is not None:
                    await self._engine.stop()

    async def _sync(self) -> Assignment:
        """Report; with a new token when the registry, restored perhaps, knows the old one no more."""
        try:
            return await self._registry.sync(self._report())
        except RegistryError as error:
            if error.code != "unauthenticated":
                raise
            _log.warning("token_refused", detail=error.message)
        token = await self._registry.rejoin(self._key, pool=self._me.pool, server=self._me.server)
        self._me = replace(self._me, token=token)
        self._state.save_membership(self._me)
        _log.info("joined_again", server=self._me.server)
        return await self._registry.sync(self._report())

    async def _keep_in_step(self, wake: asyncio.Event) -> None:
        wait = _FIRST_RETRY
        failing = False
        while True:
            try:
                assignment = await self._sync()
                self._check(assignment)
                self._facts = _Facts()
                wait = _bounded(assignment.poll_after)
                await self._follow(assignment)
                failing = False
                if self._has_news():
                    continue
            except RegistryError as error:
                if error.code == "removed":
                    raise AgentError(error.message, error.remedy, ExitStatus.REMOVED) from None
                if error.is_final:
                    raise
                if not failing:
                    _log.warning("registry_unreachable", detail=error.message)
                failing = True
                await self._serve_what_there_is()
                wait = min(_AWAY_POLL, wait)
            except (ValueError, TypeError, OverflowError, OSError) as error:
                # Nothing that a registry says may end the service.
                _log.error("assignment_not_understood", error=type(error).__name__)
                wait = _AWAY_POLL
            if self._engine is not None:
                _rotate_if_due(self._engine)
            wake.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(wake.wait(), wait)

    def _has_news(self) -> bool:
        """Whether the registry waits for what has just been done: a request, or an answer that is served now."""
        news: set[object] = {*self._facts.serving}
        if self._facts.csr is not None:
            news.add(self._facts.csr)
        is_new = not news <= self._told
        self._told = news
        return is_new

    def _report(self) -> AgentReport:
        facts = self._facts
        return AgentReport(
            engine=BuiltinEngine.name,
            clock=self._clock.describe(),
            serving=facts.serving,
            csr=facts.csr,
            installed=facts.installed,
            problem=facts.problem,
            traffic_cap=self._settings.limits.traffic_cap,
            traffic=self._meter.read(self._engine.ntp.requests, time.monotonic()) if self._engine else None,
        )

    def _check(self, assignment: Assignment) -> None:
        """Refuse an assignment for other names than those confirmed at join: the registry owns no host."""
        ours = (self._me.pool, self._me.server, self._me.domain)
        if (assignment.pool, assignment.server, assignment.domain) != ours:
            raise RegistryError(
                "the registry assigns names that this agent never joined as",
                "ask the pool's operator; nothing was changed",
            )
        ports = (assignment.http_port, assignment.ke_port)
        if not all(0 < port < 65536 for port in ports) or not all(
            _is_address(entry.address) for entry in assignment.addresses
        ):
            raise RegistryError(
                "the registry assigns ports or addresses that are none",
                "ask the pool's operator; nothing was changed",
            )

    async def _follow(self, assignment: Assignment) -> None:
        """Do what is wanted; what cannot be done becomes the problem that the next report tells."""
        try:
            for challenge in assignment.challenges:
                validate_challenge(challenge)
            await self._listen(assignment)
            await self._prove(assignment)
            self._answer_challenges(assignment)
            if assignment.csr_for is not None:
                pem = await asyncio.to_thread(self._store.pending, assignment.csr_for)
                self._facts.csr = CsrAnswer(assignment.csr_for, pem)
            await self._install(assignment)
        except RegistryError:
            raise
        except (AgentError, ChallengeError, InstallError, OSError) as error:
            self._facts.problem = str(error)
            _log.error("assignment_not_followed", detail=str(error))

    async def _listen(self, assignment: Assignment) -> None:
        if self._listening:
            return
        hosts = self._listen_addresses(assignment)
        try:
            await self._responder.listen(*((host, assignment.http_port) for host in hosts))
        except OSError as error:
            raise AgentError(
                f"cannot listen on the HTTP port {assignment.http_port}: {error.strerror}",
                "stop the web server there; ports below 1024 need root or CAP_NET_BIND_SERVICE",
                ExitStatus.CONFIGURATION,
            ) from None
        self._listening = True

    def _listen_addresses(self, assignment: Assignment) -> list[str]:
        """The server's addresses, or every address of the family where it is translated on the way (NAT)."""
        if self._settings.listen:
            return [str(address) for address in self._settings.listen]
        found: dict[str, None] = {}
        for entry in assignment.addresses:
            wildcard = "::" if ":" in entry.address else "0.0.0.0"
            found[entry.address if is_local(entry.address) else wildcard] = None
        return list(found)

    async def _prove(self, assignment: Assignment) -> None:
        for entry in assignment.addresses:
            if not entry.call:
                continue
            try:
                nonce = await self._registry.request_proof(entry.address)
            except RegistryError as error:
                if error.is_final:
                    raise
                self._facts.problem = f"{entry.address}: {error.message}"
                continue
            statement = proof_statement(
                pool=self._me.pool, server=self._me.server, address=entry.address, nonce=nonce
            )
            while len(self._proofs) >= _MAX_PROOFS:
                del self._proofs[next(iter(self._proofs))]
            self._proofs[PROOF_PATH + nonce] = base64.b64encode(self._key.sign(statement))
            self._publish(assignment)

    def _answer_challenges(self, assignment: Assignment) -> None:
        self._publish(assignment)
        nonces = (path.removeprefix(PROOF_PATH) for path in self._proofs)
        self._facts.serving = (*(challenge.token for challenge in assignment.challenges), *nonces)

    def _publish(self, assignment: Assignment) -> None:
        challenges = {
            ACME_PATH + challenge.token: challenge.key_authorization.encode("ascii")
            for challenge in assignment.challenges
        }
        self._responder.replace(self._me.domain, {**self._proofs, **challenges})

    async def _install(self, assignment: Assignment) -> None:
        wanted = assignment.certificate
        current = await asyncio.to_thread(self._store.current)
        if wanted is not None and (current is None or current.fingerprint != wanted.fingerprint):
            await asyncio.to_thread(self._store.install, wanted.order, wanted.chain, now=datetime.now(UTC))
            current = await asyncio.to_thread(self._store.current)
            _log.info("certificate_installed", order=wanted.order)
            if current is not None and self._engine is not None:
                self._engine.use_credentials(load_credentials(current.chain_path, current.key_path))
        if current is None:
            return
        if self._engine is None:
            await self._start_engine(current, self._listen_addresses(assignment), assignment.ke_port)
        self._facts.installed = current.fingerprint

    async def _start_engine(self, pair: InstalledPair, hosts: Sequence[str], ke_port: int) -> None:
        credentials = load_credentials(pair.chain_path, pair.key_path)
        engine = BuiltinEngine(credentials, self._clock, self._settings, self._state)
        try:
            await engine.start(
                [Endpoint(host, ke_port) for host in hosts],
                [Endpoint(host, self._settings.ntp_port) for host in hosts],
            )
        except AgentError:
            await engine.stop()
            raise
        self._engine = engine
        self._state.save_listening(hosts, ke_port)
        _log.info("serving", hosts=list(hosts), ke_port=ke_port, clock=self._clock.describe())

    async def _serve_what_there_is(self) -> None:
        """While the registry is away since the start: serve the last certificate where we served before."""
        last = self._state.listening()
        if self._engine is not None or last is None:
            return
        try:
            current = await asyncio.to_thread(self._store.current)
            if current is not None:
                await self._start_engine(current, last.hosts, last.ke_port)
        except (AgentError, InstallError, OSError) as error:
            _log.error("not_serving", detail=str(error))
