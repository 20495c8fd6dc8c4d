"""A time daemon that the member runs already, told to serve NTS with our pairs.

A change is written beside the user's configuration (`files`), the daemon told, and then asked, as a client would, for
each name at each address, until it shows the new certificate and answers by NTP. If it does not, what was there before
comes back and the daemon is told again; the error holds what it logged meanwhile.

Only root may do so. The agent itself has no such rights on a well-kept host, and asks by a file instead (`requests`).
"""

import asyncio
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import structlog

from member_agent.config import EngineSettings
from member_agent.engines import EngineError, Service, chrony, ntpd_rs, ntpsec, requests
from member_agent.engines.files import Content, OwnFiles, Served
from member_agent.engines.layout import MARK, Kind, Layout, Offer, OwnFile, Places, TimeDaemon, check_ours
from member_agent.engines.probe import ask
from member_agent.install import Bundle, InstallError, bundle
from member_agent.sockets import Endpoint
from nts_core.children import QUOTED_LINES, quoted, run
from nts_core.client import ClientError

_log = structlog.get_logger()
DAEMONS = {each.kind: each for each in (chrony.DAEMON, ntpsec.DAEMON, ntpd_rs.DAEMON)}
# What runs as root finds programs where packages put them, and nowhere else.
SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_LOOK = 3600.0  # seconds between looks at files that nobody should have changed
_PAUSE = 0.2  # seconds between two questions to a daemon that is not there yet
_LOG_READ = 64 * 1024
_JOURNAL_DEADLINE = 10.0


def places_of(daemon: TimeDaemon, settings: EngineSettings) -> Places:
    """Debian's, but for what the settings say of the daemon that they name."""
    told = settings.config_dir if settings.kind == daemon.kind else None
    return Places(told or daemon.config, settings.unit_dir, settings.state_dir)


@dataclass(frozen=True, slots=True)
class Change:
    """A file that will be written, and how: for people to read before it happens."""

    path: Path
    lines: tuple[str, ...]


class Word(StrEnum):
    """What a daemon is told; what `engine.reload` gets."""

    RESTART = "restart"
    RELOAD = "reload"  # by SIGHUP


class ExternalEngine:
    """The engine of one time daemon, as the agent uses it."""

    packets = None  # a daemon has its own
    # Each attempt restarts the daemon twice.
    patience: tuple[float, ...] = (60.0, 600.0, 6000.0, 86_400.0)

    def __init__(self, kind: Kind, settings: EngineSettings, state: Path) -> None:
        """`state` is the agent's directory, by which it asks for what it may not do itself."""
        self.name = kind.value
        self._kind = kind
        self._settings = settings
        self._state = state
        self._hands = Hands(kind, settings)
        self._service: Service | None = None

    @property
    def requests(self) -> int | None:
        """The daemon counts for itself."""
        return None

    @property
    def ke_requests(self) -> int | None:
        """The daemon counts for itself."""
        return None

    @property
    def may_write(self) -> bool:
        """Whether it needs nobody for that."""
        return self._hands.may_write

    def plan(self, offer: Offer) -> tuple[Change, ...]:
        """What `apply` would write. EngineError when the user's configuration is in the way."""
        return self._hands.plan(offer)

    def how(self) -> str:
        """How the daemon gets to know, in words."""
        return self._hands.how()

    async def apply(self, service: Service) -> None:
        if self.may_write:
            await self._hands.apply(await asyncio.to_thread(_bundles, service), service.ke, service.ntp)
        else:
            await requests.ask(self._state, self._kind, service, self._settings.deadline)
        self._service = service

    async def tend(self) -> None:
        """Look each hour whether what was written is still there: packages and people change such directories."""
        while True:
            await asyncio.sleep(_LOOK)
            try:
                if self._service is not None:
                    await self.apply(self._service)
            except EngineError as error:
                _log.error("engine_not_mended", engine=self.name, detail=error.message, remedy=error.remedy)

    async def close(self) -> None:
        """The daemon goes on."""

    async def remove(self) -> None:
        self._service = None
        if self.may_write:
            await self._hands.remove()
        else:
            await requests.ask(self._state, self._kind, Service({}, (), ()), self._settings.deadline)


def _bundles(service: Service) -> dict[str, Bundle]:
    """The pairs of a service, read and checked. EngineError when one is none."""
    found: dict[str, Bundle] = {}
    for domain, pair in service.pairs.items():
        try:
            found[domain] = bundle(pair.chain_path.read_bytes(), pair.key_path.read_bytes(), domain)
        except InstallError as error:
            raise EngineError(f"{domain}: {error.message}", error.remedy) from None
        except OSError as error:
            raise EngineError(
                f"{domain}: the pair cannot be read: {error.strerror}", "check the agent's directory"
            ) from None
    return found


class Hands:
    """What may write to a daemon's directories and tell it so."""

    def __init__(self, kind: Kind, settings: EngineSettings) -> None:
        self._daemon = DAEMONS[kind]
        self._settings = settings
        self._places = places_of(self._daemon, settings)
        self._files = OwnFiles(self._places.own, settings.user or self._daemon.user)
        self._control = _Control(self._daemon.unit, settings)

    @property
    def may_write(self) -> bool:
        directories = (self._places.config, self._places.units)
        return os.geteuid() == 0 or all(os.access(each, os.W_OK | os.X_OK) for each in directories)

    def plan(self, offer: Offer) -> tuple[Change, ...]:
        layout = self._lay_out(offer)
        return tuple(
            Change(
                file.path,
                (f"the key and the certificate of {file.pair_of}",) if file.pair_of else (MARK, *file.lines),
            )
            for file in layout.files
        )

    def how(self) -> str:
        return self._control.how()

    def _lay_out(self, offer: Offer) -> Layout:
        layout = self._daemon.lay_out(self._places, offer)
        check_ours(layout.files)
        return layout

    async def apply(
        self, bundles: Mapping[str, Bundle], ke: tuple[Endpoint, ...], ntp: tuple[Endpoint, ...]
    ) -> None:
        """Make the daemon serve this. After EngineError it serves what it did before."""
        layout = await asyncio.to_thread(self._lay_out, Offer(tuple(sorted(bundles)), ke, ntp))
        wanted = {file.path: _content(file, bundles) for file in layout.files}
        target = Served(
            fingerprints={domain: each.fingerprint for domain, each in bundles.items()},
            ke=ke,
            ntp=ntp,
            files=tuple(wanted),
            pairs=frozenset(file.path for file in layout.files if file.pair_of),
            state=layout.state,
            made=frozenset(),
        )
        try:
            with await asyncio.to_thread(self._files.lock):
                await self._change(wanted, target, can_reload=layout.pairs_reload)
        except OSError as error:
            raise self._not_written(error) from None

    async def _change(self, wanted: dict[Path, Content], target: Served, *, can_reload: bool) -> None:
        is_known = not await asyncio.to_thread(self._files.mend)
        served = self._files.served()
        is_same = served is not None and replace(served, made=target.made) == target
        if is_known and is_same and await asyncio.to_thread(self._files.is_as_wanted, wanted, served):
            return
        mark = self._control.mark()
        changed = await asyncio.to_thread(self._files.begin, wanted, target.state, served)
        is_small = can_reload and is_known and served is not None and changed <= target.pairs
        try:
            await self._control.tell(Word.RELOAD if is_small else Word.RESTART)
            await _until_served(target, self._settings.deadline)
            await asyncio.to_thread(self._files.commit, target)
        except (EngineError, OSError) as error:
            fault = error if isinstance(error, EngineError) else self._not_written(error)
            log = await self._control.logged(mark)
            after = await self._go_back(served)
            raise EngineError(f"{fault.message}; {after}{log}", fault.remedy) from None

    async def _go_back(self, served: Served | None) -> str:
        """What was served before is served again, or else stays to be tried again; in words."""
        try:
            await asyncio.to_thread(self._files.undo)
            await self._control.tell(Word.RESTART)
            if served is not None:
                await _until_served(served, self._settings.deadline)
            await asyncio.to_thread(self._files.abandon)
        except (EngineError, OSError) as error:
            return f"what was there before does not work either: {error}"
        return "what was there before is back"

    async def remove(self) -> None:
        """Take away everything that `apply` ever wrote, and tell the daemon."""
        if not self._files.is_there:
            return
        fault: EngineError | None = None
        try:
            with await asyncio.to_thread(self._files.lock):
                await asyncio.to_thread(self._files.mend)
                await asyncio.to_thread(self._files.withdraw, pairs=False)
                mark = self._control.mark()
                try:
                    await self._control.tell(Word.RESTART)
                except EngineError as error:
                    # Its own configuration is as it was before us: there is nothing to go back to.
                    log = await self._control.logged(mark)
                    fault = EngineError(
                        f"{error.message}; nothing of ours is there any more{log}", error.remedy
                    )
                await asyncio.to_thread(self._files.withdraw, pairs=True)
                await asyncio.to_thread(self._files.clear)
        except OSError as error:
            raise self._not_written(error) from None
        if fault is not None:
            raise fault

    def _not_written(self, error: OSError) -> EngineError:
        place = f"{error.filename}: " if error.filename else ""
        return EngineError(
            f"{self._daemon.kind} was not told: {place}{error.strerror}",
            f"check the rights and the space of {self._places.config} and {self._places.units}",
        )


def _content(file: OwnFile, bundles: Mapping[str, Bundle]) -> Content:
    if file.pair_of is None:
        return Content(file.text.encode("utf-8", "surrogateescape"), file.is_private)
    return Content(f"{MARK}\n{bundles[file.pair_of].pem}".encode(), is_private=True)


async def _until_served(wanted: Served, deadline: float) -> None:
    """Ask as a client does, until all is served. EngineError with the last failure after `deadline` seconds."""
    problem = "no answer"
    try:
        async with asyncio.timeout(deadline):
            for domain, fingerprint in sorted(wanted.fingerprints.items()):
                for endpoint in wanted.ke:
                    while failure := await _fault(domain, fingerprint, endpoint):
                        problem = f"{domain} at {endpoint}: {failure}"
                        await asyncio.sleep(_PAUSE)
    except TimeoutError:
        raise EngineError(
            f"the daemon does not serve within {deadline:g} s: {problem}",
            "see its log; check that nothing else uses its ports",
        ) from None


async def _fault(domain: str, fingerprint: str, endpoint: Endpoint) -> str | None:
    """Why a client would not be served there; None when it would. One that does not know the time yet will do."""
    try:
        await ask(domain, fingerprint, endpoint)
    except ClientError as error:
        return error.message
    return None


class _Control:
    """Tells a daemon to look at its files, and reads what it logs: by systemd, or as the settings say."""

    def __init__(self, unit: str, settings: EngineSettings) -> None:
        self._unit = unit
        self._settings = settings

    def _commands(self, word: Word) -> list[list[str]]:
        if self._settings.reload:
            return [[*self._settings.reload, word.value]]
        if word is Word.RELOAD:
            return [["systemctl", "kill", "--signal=HUP", "--kill-who=main", self._unit]]
        return [["systemctl", "daemon-reload"], ["systemctl", "restart", self._unit]]

    def how(self) -> str:
        return " && ".join(" ".join(command) for command in self._commands(Word.RESTART))

    async def tell(self, word: Word) -> None:
        """EngineError when the command fails: with systemd, also when the daemon does not start."""
        for command in self._commands(word):
            status, said = await run(command, self._settings.deadline, path=SYSTEM_PATH)
            if status != 0:
                ended = "does not end" if status is None else f"ends with {status}"
                raise EngineError(
                    f"`{' '.join(command)}` {ended}{quoted(said)}",
                    f"see the daemon's log, and `systemctl status {self._unit}`",
                )

    def mark(self) -> float:
        """Where the log ends now."""
        log = self._settings.log
        if log is None:
            return time.time()
        with suppress(OSError):
            return float(log.stat().st_size)
        return 0.0

    async def logged(self, mark: float) -> str:
        """The last lines since then, to end a message with."""
        log = self._settings.log
        if log is not None:
            try:
                with log.open("rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    file.seek(max(int(mark) if mark <= size else 0, size - _LOG_READ))
                    octets = file.read(_LOG_READ)
            except OSError as error:
                return f"; its log {log} cannot be read: {error.strerror}"
        else:
            command = [
                "journalctl",
                f"--unit={self._unit}",
                f"--since=@{int(mark)}",
                f"--lines={QUOTED_LINES}",
            ]
            command += ["--no-pager", "--quiet", "--output=cat"]
            _, octets = await run(command, _JOURNAL_DEADLINE, path=SYSTEM_PATH)
        return quoted(octets, "its log: ")
