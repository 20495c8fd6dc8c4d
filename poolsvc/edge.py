"""An edge's answer sets: `poolsvc dns edge` beside a knotd that answers for the pool, with Knot's geoip module.

It asks the embedded server, with the key by which knotd gets the zone, for the sets that are in place there, writes them as
knotd reads them, and has knotd reload. knotd signs them then, and gives each question one. The marker's TXT is in the same
file, so what it tells is what the edge answers from.

Whatever fails, knotd goes on with the sets that it has: a source that is away or has no draw yet, a reload that knotd
refuses. It is tried again, and told.
"""

import asyncio
import re
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import dns.asyncquery
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.rrset
import dns.tsig
import structlog
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from pydantic import Field
from pydantic_settings import SettingsConfigDict

from nts_core.exposition import expose
from nts_core.shell import ProgramSettings, SettingsError, replace_file
from poolsvc.config import (
    DomainName,
    EndpointText,
    KeyName,
    ListeningEndpoint,
    TsigAlgorithm,
    bare_environment,
    split_endpoint,
)
from poolsvc.errors import PoolError
from poolsvc.nameserver import records
from poolsvc.nameserver.records import Name
from poolsvc.nameserver.sets import NO_DRAW, Head, Malformed, decode, target
from poolsvc.primary import PublishError, Rejected, Unreachable, primary_errors, read_secret, refusal

_log = structlog.get_logger()
_TYPE = dns.rdatatype.RdataType.make(records.SETS)
_IN = dns.rdataclass.IN
_MESSAGE = 5.0  # seconds for a connection, and for each message
_ANSWER = 60.0  # for all of them
_MOST_OCTETS, _MOST_SETS = 32 * 1024 * 1024, 32_768
_RELOADING = 120.0
_ASKING, _TRIES = 2.0, 3
# Of a name that stands in Knot's file as it is.
_PLAIN = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*\.")
_EMPTY = b"# The answer sets, by `poolsvc dns edge`\n"
_SHOWN = 300  # characters of what knotc says
_LEAST_SECRET = 16


class EdgeUnusable(PoolError):
    """The settings are wrong, and no waiting helps."""

    code = "edge-unusable"


class EdgeSettings(ProgramSettings):
    """What `poolsvc dns edge` needs to know. Relative paths are relative to the settings file."""

    model_config = SettingsConfigDict(env_prefix="POOL_EDGE_")

    pool: DomainName
    source: EndpointText = Field(description="the embedded server, as knotd's `master` has it")
    tsig_name: KeyName
    tsig_secret_file: Path
    tsig_algorithm: TsigAlgorithm = "hmac-sha256"
    sets_file: Path = Field(description="the `config-file` of knotd's mod-geoip")
    knot_config: Path = Path("/etc/knot/knot.conf")
    knotd: EndpointText = Field(
        "127.0.0.1:53", description="where knotd answers, to see that it shows the sets"
    )
    interval: float = Field(2.0, ge=0.1, le=60, description="seconds between two questions to the source")
    metrics: ListeningEndpoint | None = None

    @classmethod
    def read(cls, file: Path) -> Self:
        """Raises EdgeUnusable."""
        if not file.is_file():
            raise EdgeUnusable(f"{file}: there is no such settings file", remedy="see docs/dns-servers.md")
        try:
            settings = cls.load(file)
        except SettingsError as error:
            raise EdgeUnusable(str(error), remedy="correct the setting; see docs/dns-servers.md") from None
        base = file.resolve().parent
        paths = {
            name: base / getattr(settings, name) for name in ("tsig_secret_file", "sets_file", "knot_config")
        }
        return settings.model_copy(update=paths)


@dataclass(frozen=True, slots=True)
class Fetched:
    """The sets that are in place at the source: by owner, each of SRV data; `version` tells these from any others."""

    marker: Name
    head: Head
    found: Mapping[Name, list[tuple[bytes, ...]]]

    @property
    def version(self) -> str:
        return self.head.token

    @property
    def count(self) -> int:
        return sum(map(len, self.found.values()))


@dataclass(slots=True)
class Inbound:
    """The source's answer, message by message. Garbage raises Unreachable."""

    apex: Name
    known: str | None
    octets: int = 0
    count: int = 0
    _head: tuple[Name, Head] | None = None
    _found: dict[Name, list[tuple[bytes, ...]]] = field(default_factory=dict)

    def take(self, answer: Iterable[dns.rrset.RRset]) -> Fetched | None:
        """Take a message's records, each apart; all that came once it was the last."""
        try:
            for rrset in answer:
                owner, data = records.to_wire(rrset.name), records.canonical(rrset[0])
                if (done := self._take(owner, rrset.rdtype, data)) is not None:
                    return done
        except Malformed as error:
            raise Unreachable(f"the source's answer: {error}") from None
        return None

    def _take(self, owner: Name, rdtype: int, data: bytes) -> Fetched | None:
        if rdtype != _TYPE or not records.is_below(owner, self.apex):
            raise Malformed("records of another type or zone")
        self.octets += len(data)
        if data[:1] == b"\1" and self._head is not None:
            some = decode(data, self.apex)
            self.count += len(some)
            if self.octets > _MOST_OCTETS or self.count > _MOST_SETS:
                raise Malformed(f"more than {_MOST_OCTETS} octets or {_MOST_SETS} sets")
            self._found.setdefault(owner, []).extend(some)
            return None
        head = owner, Head.decode(data)
        if self._head is None:
            self._head = head
            return Fetched(*head, {}) if head[1].token in (self.known, NO_DRAW) else None
        if head != self._head:
            raise Malformed("it ends with another head than it began with")
        return Fetched(*head, self._found)


class Source:
    """Where the sets come from."""

    def __init__(self, settings: EdgeSettings) -> None:
        """Raises EdgeUnusable."""
        try:
            secret = read_secret(settings.tsig_secret_file, _LEAST_SECRET)
            self._key = dns.tsig.Key(settings.tsig_name, secret, settings.tsig_algorithm)
        except (OSError, ValueError) as error:
            raise EdgeUnusable(
                f"tsig_secret_file: {error}", remedy="give a readable file with the key's base64 secret"
            ) from None
        self._endpoint = split_endpoint(settings.source)
        self._apex = dns.name.from_text(settings.pool)

    async def fetch(self, known: str | None) -> Fetched:
        """The sets that are in place; without the sets when these are known, or none are. Raises PublishError."""
        query = dns.message.make_query(self._apex, _TYPE, flags=0)
        if known is not None:
            rdata = dns.rdata.GenericRdata(_IN, _TYPE, Head(0, 1, known).encode())
            query.authority.append(dns.rrset.from_rdata(self._apex, 0, rdata))
        query.use_tsig(self._key)
        with primary_errors():
            async with asyncio.timeout(_ANSWER):
                async with asyncio.timeout(_MESSAGE):
                    reader, writer = await asyncio.open_connection(*self._endpoint)
                try:
                    writer.write(query.to_wire(prepend_length=True))
                    return await self._read(query, reader, Inbound(records.to_wire(self._apex), known))
                finally:
                    writer.close()

    @staticmethod
    async def _read(query: dns.message.Message, reader: asyncio.StreamReader, inbound: Inbound) -> Fetched:
        context: Any = None
        while True:
            async with asyncio.timeout(_MESSAGE):
                size = int.from_bytes(await reader.readexactly(2), "big")
                octets = await reader.readexactly(size)
            answer = dns.message.from_wire(
                octets,
                keyring=query.keyring,
                request_mac=query.mac,
                multi=True,
                tsig_ctx=context,
                one_rr_per_rrset=True,
            )
            context = answer.tsig_ctx
            if not answer.had_tsig or answer.id != query.id or not answer.flags & dns.flags.QR:
                raise Rejected("the source's answer is not signed, or is none to the question")
            if answer.rcode():
                raise refusal(answer.rcode())
            if not answer.answer:
                raise Rejected("the source has no answer sets: only the embedded server does")
            if (done := inbound.take(answer.answer)) is not None:
                return done


def configuration(fetched: Fetched) -> bytes:
    """The sets and the marker as mod-geoip reads them in its weighted mode. Raises Rejected."""
    return b"".join(_lines(fetched))


def _lines(fetched: Fetched) -> Iterator[bytes]:
    yield _EMPTY
    for owner, some in fetched.found.items():
        yield f"{_plain(owner)}:\n".encode()
        names = {rdata: _srv(rdata) for rdatas in some for rdata in rdatas}
        for rdatas in some:
            yield f"  - weight: 1\n    SRV: [{', '.join(names[rdata] for rdata in rdatas)}]\n".encode()
    yield f'{_plain(fetched.marker)}:\n  - weight: 1\n    TXT: "{fetched.head.draw}"\n'.encode()


def _srv(rdata: bytes) -> str:
    priority, weight, port = (int.from_bytes(rdata[at : at + 2], "big") for at in (0, 2, 4))
    return f'"{priority} {weight} {port} {_plain(target(rdata))}"'


def _plain(name: Name) -> str:
    """A name that means nothing else in Knot's file. Raises Rejected."""
    text = records.text(name)
    if not _PLAIN.fullmatch(text):
        raise Rejected(f"the source has sets with a name of other characters: {text!r}")
    return text


class NotServed(Exception):
    """knotd does not answer from what was written; the text says why."""


class Edge:
    """Keeps one knotd's sets as the source has them."""

    def __init__(self, settings: EdgeSettings) -> None:
        """Raises EdgeUnusable."""
        self._settings = settings
        self._source = Source(settings)
        self._version: str | None = None  # of what knotd has
        self._trouble: str | None = None
        self.counters: Counter[str] = Counter(dict.fromkeys(("fetched", "failed", "reloaded"), 0))
        self._sets = 0
        self._fetched_at = 0.0

    def prepare(self) -> None:
        """Make the file that knotd needs to start with, if it is not there. Raises EdgeUnusable."""
        file = self._settings.sets_file
        try:
            if not file.exists():
                replace_file(file, _EMPTY)
        except OSError as error:
            raise EdgeUnusable(
                f"sets_file: {file}: {error.strerror}",
                remedy="give a file in a directory that this user may write to and knotd may read",
            ) from None

    async def run(self) -> None:
        """Until cancelled. What can never work at its first turn raises EdgeUnusable; later it is told."""
        is_first = True
        while True:
            try:
                await self.once()
            except (PublishError, NotServed, OSError) as error:
                if is_first and isinstance(error, Rejected):
                    raise EdgeUnusable(
                        f"source: {error}", remedy="compare the key with the registry's"
                    ) from None
                self.counters["failed"] += 1
                if self._trouble != str(error):
                    _log.error("answer_sets_not_renewed", reason=str(error))
                self._trouble = str(error)
            else:
                is_first = False
                if self._trouble is not None:
                    _log.info("answer_sets_renewed_again")
                self._trouble = None
            await asyncio.sleep(self._settings.interval)

    async def once(self) -> bool:
        """Fetch what is new, and have knotd answer from it; whether there was anything.

        Raises PublishError, NotServed, OSError; knotd then has what it had.
        """
        fetched = await self._source.fetch(self._version)
        self._fetched_at = time.time()
        self.counters["fetched"] += 1
        if fetched.version in (self._version, NO_DRAW):
            return False
        content = await asyncio.to_thread(configuration, fetched)
        file = self._settings.sets_file
        with suppress(FileNotFoundError):
            if await asyncio.to_thread(file.read_bytes) == content and await self._shows(fetched):
                self._keep(fetched)
                return False
        await asyncio.to_thread(replace_file, file, content)
        await self._reload()
        if not await self._shows(fetched):
            raise NotServed(
                f"knotd at {self._settings.knotd} does not show the sets after a reload: include mod-geoip with"
                f" {file} in its zone, as knot-edge.conf has it"
            )
        self._keep(fetched)
        self.counters["reloaded"] += 1
        _log.info("answer_sets_served", draw=fetched.head.draw, sets=fetched.count)
        return True

    def _keep(self, fetched: Fetched) -> None:
        self._version, self._sets = fetched.version, fetched.count

    async def _reload(self) -> None:
        command = ["knotc", "-c", str(self._settings.knot_config), "-t", str(int(_RELOADING)), "reload"]
        try:
            child = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=bare_environment(),
                cwd=self._settings.knot_config.parent,
            )
        except OSError as error:
            raise NotServed(f"knotc: {error.strerror}; install knot on this host") from None
        try:
            async with asyncio.timeout(_RELOADING):
                said, _ = await child.communicate()
        except TimeoutError:
            raise NotServed(f"knotc reload did not end within {_RELOADING:g} s") from None
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()
        if child.returncode:
            text = " ".join(said.decode(errors="replace").split())[:_SHOWN]
            raise NotServed(f"knotd does not reload, and goes on with the sets before: {text}")

    async def _shows(self, fetched: Fetched) -> bool:
        """Whether knotd answers from these."""
        query = dns.message.make_query(records.from_wire(fetched.marker), "TXT", flags=0)
        address, port = split_endpoint(self._settings.knotd)
        for _ in range(_TRIES):
            try:
                answer, _ = await dns.asyncquery.udp_with_fallback(
                    query, address, _ASKING, port, ignore_unexpected=True
                )
            except (OSError, EOFError, dns.exception.DNSException):
                continue
            shown = {rdata.to_text().strip('"') for rrset in answer.answer for rdata in rrset}
            return shown == {fetched.head.draw}
        return False

    def families(self) -> Iterable[Metric]:
        """For Prometheus."""
        events = CounterMetricFamily(
            "truechimer_edge_events", "Questions to the source, failures, reloads of knotd", labels=["event"]
        )
        for name, count in self.counters.items():
            events.add_metric([name], count)
        yield events
        yield GaugeMetricFamily("truechimer_edge_sets", "Answer sets that knotd has", self._sets)
        yield GaugeMetricFamily(
            "truechimer_edge_source_answered_seconds",
            "Unix time of the source's last answer",
            self._fetched_at,
        )


async def serve(settings: EdgeSettings) -> None:
    """Until SIGTERM. Raises EdgeUnusable."""
    edge = Edge(settings)
    edge.prepare()
    if settings.metrics is not None:
        try:
            expose(*split_endpoint(settings.metrics), edge.families)
        except OSError as error:
            raise EdgeUnusable(
                f"metrics {settings.metrics}: {error.strerror}", remedy="choose another address or port"
            ) from None
    work = asyncio.create_task(edge.run())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, work.cancel)
    with suppress(asyncio.CancelledError):
        await work


async def once(settings: EdgeSettings) -> bool:
    """One turn; whether there was anything new. Raises EdgeUnusable, PublishError, NotServed, OSError."""
    edge = Edge(settings)
    edge.prepare()
    return await edge.once()
