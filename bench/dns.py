"""`python -m bench.dns`: answers of the embedded DNS server a second, beside Knot's of the same signed zone.

dnsperf asks both in turn, with EDNS and DO, from one thread on the same machine. Some answers of each turn are asked for
apart and validated; one that is not right ends the bench with an error. The limits of both on how often a network is
answered are out of reach here, but ours counts them all the same. A name of its own has many signed sets, which the second
Knot, an edge of ours, signs as well and draws by its geoip module.
"""

import asyncio
import random
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import dns.dnssec
import dns.exception
import dns.message
import dns.name
import dns.query
import dns.rcode
import dns.rdataclass
import dns.rrset
import dns.tsig
import dns.update
from dns.rdatatype import DNSKEY, NSEC, RRSIG, RdataType

from bench import report
from bench.contenders import Contender
from bench.load import LoadError
from bench.report import Comparison, Goal, Turn
from lab.embedded import Embedded
from lab.knot import Knot, KnotEdge
from lab.nameservers import NameServer, Primary
from lab.processes import LabError, require
from lab.programs import poolsvc
from poolsvc.primary import Nameserver, PrimaryConfig
from poolsvc.publisher import Publisher
from poolsvc.subsets import Sink
from poolsvc.zone import ZonePolicy

_EMBEDDED, _KNOT = "embedded", "knot"
_GOALS = (Goal(_EMBEDDED, _KNOT),)
_MEMBERS = 2000
_IN_ONE_UPDATE = 250
_TARGETS = 8
_CHECKED = 5
_PAYLOAD = 1232
# Seconds for an answer to one question, and for a part of the zone.
ANSWERED_WITHIN, _FILLED_WITHIN = 5.0, 30.0
_SERVICE = "_ntske._tcp.pool.example."
_DRAWN = "_ntske._tcp.drawn.pool.example."
_SETS = 256
POLICY = ZonePolicy("pool.example", srv_ttl=60, address_ttl=300, ke_port=4460, caa=())
TITLES = {
    "service": ("SRV of eight targets, signed, one name", "answer"),
    "drawn": (f"SRV of eight targets, one of {_SETS} signed sets, one name", "answer"),
    "addresses": (f"addresses of {_MEMBERS:,} members, signed", "answer"),
    "absences": ("names that do not exist, each asked once, proved by NSEC", "answer"),
}


def _domain(number: int) -> str:
    return f"m{number}.servers.pool.example."


def _questions(kind: str) -> list[str]:
    match kind:
        case "service":
            return [f"{_SERVICE} SRV"]
        case "drawn":
            return [f"{_DRAWN} SRV"]
        case "addresses":
            return [f"{_domain(number)} A" for number in range(_MEMBERS)]
        case _:
            return [f"x{secrets.token_hex(6)}.servers.pool.example. A" for _ in range(50_000)]


@dataclass(frozen=True, slots=True)
class DnsServer(Contender):
    """One of the two, with its zone's keys."""

    server: NameServer
    keys: dns.rrset.RRset

    @classmethod
    def of(cls, name: str, server: NameServer) -> "DnsServer":
        keys = _answer(server, "pool.example.", DNSKEY).find_rrset(
            dns.message.ANSWER, dns.name.from_text("pool.example."), dns.rdataclass.IN, DNSKEY
        )
        return cls(name, server.pid, server, keys)


def _fill(server: Primary) -> None:
    targets = tuple(f"0 10 4460 {_domain(number)}" for number in range(_TARGETS))
    update = dns.update.UpdateMessage("pool.example.")
    # Knot lets nobody write the other name, as the shipped configuration has it.
    for owner in (_SERVICE, _DRAWN) if isinstance(server, Embedded) else (_SERVICE,):
        update.add(owner, 60, "SRV", *targets)
    _send(server, update)
    for first in range(0, _MEMBERS, _IN_ONE_UPDATE):
        update = dns.update.UpdateMessage("pool.example.")
        for number in range(first, first + _IN_ONE_UPDATE):
            update.add(_domain(number), 300, "A", f"198.18.{number // 250}.{number % 250}")
        _send(server, update)


def _send(server: Primary, update: dns.update.UpdateMessage) -> None:
    update.use_tsig(dns.tsig.Key(server.tsig_name, server.tsig_secret, "hmac-sha256"))
    answer = _ask(dns.query.tcp, update, server, _FILLED_WITHIN)
    if answer.rcode() != dns.rcode.NOERROR:
        raise LoadError(f"the zone was refused: {dns.rcode.to_text(answer.rcode())}")


def _answer(server: NameServer, name: str, kind: RdataType) -> dns.message.Message:
    query = dns.message.make_query(name, kind, want_dnssec=True, payload=_PAYLOAD)
    return _ask(dns.query.udp, query, server, ANSWERED_WITHIN)


def _ask(
    by: Callable[..., dns.message.Message], query: dns.message.Message, server: NameServer, seconds: float
) -> dns.message.Message:
    """Raises LoadError when no answer comes."""
    try:
        return by(query, server.address, timeout=seconds, port=server.port)
    except dns.exception.Timeout:
        raise LoadError(f"no answer to {query.question[0]} within {seconds:g} s") from None


def _check(asked: DnsServer, question: str) -> None:
    """Raises LoadError for an answer that does not prove what it says."""
    name, kind = question.split()
    answer = _answer(asked.server, name, RdataType.make(kind))
    section = answer.answer or [rrset for rrset in answer.authority if rrset.rdtype == NSEC]
    proved = [rrset for rrset in section if rrset.rdtype != RRSIG]
    try:
        for rrset in proved:
            signatures = next(
                each
                for each in (*answer.answer, *answer.authority)
                if each.rdtype == RRSIG and each.name == rrset.name and each.covers == rrset.rdtype
            )
            dns.dnssec.validate(rrset, signatures, {asked.keys.name: asked.keys})
    except (StopIteration, dns.exception.ValidationFailure) as error:
        raise LoadError(f"a wrong answer of {asked.name} to {question}: {error}") from None
    if not proved:
        raise LoadError(f"{asked.name} proves nothing to {question}")


def _turn(kind: str, seconds: float, asked: DnsServer) -> Turn:
    questions = _questions(kind)
    with tempfile.NamedTemporaryFile("w", suffix=".questions") as file:
        file.write("".join(f"{question}\n" for question in questions))
        file.flush()
        address = ["-s", asked.server.address, "-p", str(asked.server.port)]
        command = [require("dnsperf"), *address, "-d", file.name, "-e", "-D", "-c", "1", "-T", "1"]
        before = asked.cpu_ns()
        done = subprocess.run(
            [*command, "-b", str(_PAYLOAD), "-l", f"{seconds:.3f}"],
            capture_output=True,
            text=True,
            check=False,
        )
        cpu_ns = asked.cpu_ns() - before
    found = dict(re.findall(r"(Queries completed|Queries lost|Run time \(s\)): +([0-9.]+)", done.stdout))
    if done.returncode or len(found) != 3:
        raise LoadError(f"dnsperf: {done.stderr or done.stdout}")
    for question in questions[:_CHECKED]:
        _check(asked, question)
    return Turn(
        int(found["Queries completed"]),
        int(found["Queries lost"]),
        len(questions[:_CHECKED]),
        float(found["Run time (s)"]),
        cpu_ns,
    )


async def _draw(server: Primary) -> None:
    publisher = publisher_of(server)
    await publisher.take_fence(1)
    names = [f"m{number}" for number in range(_MEMBERS)]
    chosen = random.Random(1)
    await Sink(publisher).publish({_DRAWN: [chosen.sample(names, _TARGETS) for _ in range(_SETS)]}, 1, 1)


def start_edge(edge: KnotEdge, primary: Embedded) -> None:
    """With the zone's key, and with the sets of the primary."""
    edge.prepare()
    config = str(edge.directory / "knot.conf")
    done = primary.poolsvc("dns", "keys", "copy-to-knot", "--knot-config", config)
    edge.stop()
    if done.status == 0:
        edge.start()
        done = poolsvc(edge.settings, "dns", "edge", "--once")
    if done.status:
        raise LabError(done.stderr)


def publisher_of(server: Primary) -> Publisher:
    config = PrimaryConfig(
        address=server.address,
        port=server.port,
        tsig_name=server.tsig_name,
        tsig_secret=server.tsig_secret,
        nameservers=(Nameserver(server.address, server.port),),
    )
    return Publisher(POLICY, config)


def measure(seconds: float, rounds: int) -> dict[str, Comparison]:
    """`seconds` of load in all."""
    with tempfile.TemporaryDirectory(prefix="truechimer-bench-") as name, ExitStack() as stack:
        directory = Path(name)
        ours = Embedded(directory / "embedded", ttl=60, soa_minimum=60)
        edge = KnotEdge(directory / "edge", ours)
        theirs = Knot(directory / "knot", ttl=60, soa_minimum=60)
        for server in (ours, theirs):
            stack.enter_context(server)
            _fill(server)
        asyncio.run(_draw(ours))
        stack.callback(edge.stop)
        start_edge(edge, ours)
        embedded, knot = DnsServer.of(_EMBEDDED, ours), DnsServer.of(_KNOT, theirs)
        contenders = dict.fromkeys(TITLES, (embedded, knot))
        contenders["drawn"] = embedded, DnsServer.of(_KNOT, edge)
        length = seconds / (rounds * 2 * len(TITLES))
        return {
            kind: Comparison.run(contenders[kind], rounds, partial(_turn, kind, length), _GOALS)
            for kind in TITLES
        }


def main() -> int:
    return report.main("dns", "the embedded DNS server beside Knot, on loopback", measure, TITLES)


if __name__ == "__main__":
    sys.exit(main())
