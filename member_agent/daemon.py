"""The long-running agent: serve, and keep in step with the registries.

`serve`   a stand-alone server with a certificate from files
`run`     a member of pools: report, prove addresses, answer challenges, install certificates, serve
"""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import structlog

from member_agent import local
from member_agent.clock import Clock, clock_of
from member_agent.config import AgentSettings
from member_agent.engines import Engine, Service
from member_agent.engines.builtin import BuiltinEngine
from member_agent.engines.choice import engine_of
from member_agent.engines.serving import Protocol
from member_agent.engines.succession import Succession
from member_agent.errors import AgentError, ExitStatus
from member_agent.host import Host
from member_agent.install import InstalledPair, InstallError, load_pair
from member_agent.member import Member, all_last_served, take_away
from member_agent.privileges import become
from member_agent.sockets import Endpoint
from member_agent.state import MemberDirectory, StateDirectory
from nts_core.shell import until
from nts_core.systemd import Notifier

_log = structlog.get_logger()
# Seconds between looks for what was joined meanwhile.
_RESCAN = 5.0


@contextlib.asynccontextmanager
async def _signals(on_hangup: Callable[[], object]) -> AsyncIterator[asyncio.Event]:
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


def _expose(
    settings: AgentSettings, engine: Engine, clock: Clock, members: Callable[[], Iterable[Member]] = tuple
) -> None:
    """Serve metrics if they are wanted; an idle agent should not hold what serves them otherwise."""
    if settings.metrics is not None:
        from member_agent import metrics  # noqa: PLC0415 - with prometheus_client it is 2 MB

        metrics.expose(settings.metrics, *metrics.sources(engine, settings, clock, members))


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
    become(settings.user, settings.group, state.path if state else None)
    if state is not None:
        state.lock()
    clock = clock_of(settings)
    service = Service({cert.name: _pair(cert, key)}, tuple(ke), tuple(ntp))
    engine = BuiltinEngine(clock, settings, state)
    hangup = asyncio.Event()

    async def reload() -> None:
        while await hangup.wait():
            hangup.clear()
            try:
                with notify.reloading():
                    await engine.apply(service)
            except AgentError as error:
                _log.error("certificate_not_reloaded", detail=error.message, remedy=error.remedy)
            else:
                _log.info("certificate_reloaded")

    async with _signals(hangup.set) as stop:
        await clock.refresh()
        try:
            await engine.apply(service)
            _expose(settings, engine, clock)
            ready(
                f"ready ke={','.join(map(str, engine.endpoints(Protocol.KE)))}"
                f" ntp={','.join(map(str, engine.endpoints(Protocol.NTP)))}"
            )
            _log.info("serving", packets=engine.packets, clock=clock.describe())
            async with Notifier() as notify:
                notify.ready("serving")
                await until(stop, *map(asyncio.create_task, (engine.tend(), clock.follow(), reload())))
        finally:
            await engine.close()


def _pair(cert: Path, key: Path) -> InstalledPair:
    """Certificate and key from PEM files. Raises AgentError with the remedy."""
    try:
        return load_pair(cert, key)
    except InstallError as error:
        raise AgentError(error.message, error.remedy, ExitStatus.CERTIFICATE) from None


class Agent:
    """All servers that this host is, with what they share."""

    def __init__(self, state: StateDirectory, settings: AgentSettings) -> None:
        """Raises AgentError when there is no membership, or a state or setting that cannot be used."""
        become(settings.user, settings.group, state.path)
        state.lock()
        # Also when nothing else is left: keys of a server that was being removed.
        state.clean()
        state.require_members()
        self._state = state
        self._settings = settings
        self._clock = clock_of(settings)
        self._engine = engine_of(settings, state, self._clock)
        succession = Succession(state.path, settings.engine, self._engine.name)
        self._host = Host(settings, self._clock, self._engine, succession)
        self._members: dict[str, Member] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        # Memberships by domain as they were begun with: what has ended is begun again only when it has changed.
        self._begun: dict[str, int] = {}
        # And as they were when those that are followed were woken last: who joins anew is not to wait for an hour.
        self._woken: dict[str, int] = {}

    async def run(self) -> None:
        """Serve and keep in step until SIGTERM, or until every server has left its pool."""
        answers = {"status": self._status, "wake": self._wake, "renew": self._renew}
        async with _signals(self._wake) as stop, local.answering(self._state.path, answers):
            _expose(self._settings, self._engine, self._clock, lambda: tuple(self._members.values()))
            try:
                await self._clock.refresh()
                works = (self._follow_all(), self._clock.follow(), self._engine.tend())
                async with Notifier() as notify:
                    notify.ready(f"for {', '.join(self._state.members())}")
                    await until(stop, *map(asyncio.create_task, works))
            finally:
                for task in self._tasks.values():
                    task.cancel()
                await asyncio.gather(*self._tasks.values(), return_exceptions=True)
                await self._host.close()

    def _wake(self) -> dict[str, Any]:
        for member in self._members.values():
            member.wake()
        return {}

    def _renew(self) -> dict[str, Any]:
        for member in self._members.values():
            member.renew()
        return {}

    def _status(self) -> dict[str, Any]:
        return {
            "engine": self._engine.name,
            "packets": self._engine.packets,
            "clock": self._clock.describe(),
            "servers": [member.facts() for member in self._members.values()],
        }

    async def _follow_all(self) -> None:
        """Every server there is, also those that are joined while we run. Raises what the last one ended by."""
        last: AgentError | None = None
        await self._resume()
        while True:
            try:
                self._begin()
            except AgentError:
                # Those that are followed need no directory, but somebody has to be.
                if not self._tasks:
                    raise
            if not self._tasks and last is not None:
                raise last
            await asyncio.wait(self._tasks.values(), timeout=_RESCAN, return_when=asyncio.FIRST_COMPLETED)
            for domain, task in tuple(self._tasks.items()):
                if task.done():
                    del self._tasks[domain]
                    last = _end_of(domain, task)

    def _begin(self) -> None:
        """Follow whom nobody follows yet."""
        for domain, directory in self._state.members().items():
            stamp = directory.stamp()
            if domain in self._members and stamp != self._woken.get(domain):
                self._members[domain].wake()
            self._woken[domain] = stamp
            if domain not in self._tasks and stamp != self._begun.get(domain):
                self._begun[domain] = stamp
                self._tasks[domain] = asyncio.create_task(self._follow(domain, directory))

    async def _resume(self) -> None:
        """Serve at once, and together, what was served in the last run: a time daemon is told once."""
        try:
            await self._host.resume(await all_last_served(self._state, self._settings))
        except AgentError as error:
            _log.error("not_resumed", detail=error.message, remedy=error.remedy)

    async def _follow(self, domain: str, directory: MemberDirectory) -> None:
        if not directory.is_given_up:
            self._members[domain] = member = Member(directory, self._host, self._settings)
            try:
                await member.follow()
            finally:
                del self._members[domain]
        if directory.is_given_up:
            _log.warning("given_up", domain=domain)
        await take_away(self._host, directory)


def _end_of(domain: str, task: asyncio.Task[None]) -> AgentError:
    """Why a server is followed no more, which is logged. What nobody foresaw is raised."""
    error = task.exception()
    if error is None:
        error = AgentError(
            f"{domain} has left the pool", "this agent can be stopped and removed", ExitStatus.REMOVED
        )
    elif not isinstance(error, AgentError):
        raise error
    _log.error("server_given_up", domain=domain, detail=error.message, remedy=error.remedy)
    return error
