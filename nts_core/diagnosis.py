"""What was seen of a pool from this host, and what it means: a verdict, a stable code, a remedy. Pure.

`check` looks, this module judges. Each step stands for one question to one thing (a resolver, the pool, an address of a
server); its `code` is empty when there is nothing to mend. `failure` is what the step's fault would make of a whole run.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from cryptography import x509

from nts_core import select
from nts_core.aead import AeadId
from nts_core.association import Sample
from nts_core.certificates import renew_by
from nts_core.client import STARTING, ClientError, Failure
from nts_core.errors import printable
from nts_core.independence import Bond, Candidate, choose, given_up
from nts_core.packet import HEADER_LENGTH
from nts_core.resolve import ResolveError
from nts_core.srv import is_own, is_own_around
from nts_core.tls import dns_names
from nts_core.verdict import Verdict

# Nanoseconds; from then on a clock is worth a warning, as certificates and signatures are judged by it.
_WRONG = 1_000_000_000
# Seconds; clients that look at DNS again each TTL should not use a removed server for longer.
_LONG_TTL = 3600


class Part(StrEnum):
    """The steps, in their order."""

    RESOLVER = "resolver"
    SIGNATURES = "signatures"
    VALIDATION = "validation"
    LONG_ANSWERS = "long-answers"
    CLOCK = "clock"
    SRV = "srv"
    TARGETS = "targets"
    ADDRESSES = "addresses"
    METADATA = "metadata"
    INDEPENDENCE = "independence"
    TTL = "ttl"
    KE = "ke"
    NTP = "ntp"
    TIME = "time"


@dataclass(frozen=True, slots=True)
class Step:
    """What was seen of one thing (`about`), in words, and what to do about it."""

    part: Part
    about: str
    verdict: Verdict
    found: str
    remedy: str = ""
    code: str = ""
    failure: Failure | None = None


def _ok(part: Part, about: str, found: str) -> Step:
    return Step(part, about, Verdict.OK, found)


def skipped(part: Part, about: str, found: str, code: str = "needs-earlier") -> Step:
    """A step that was not made, for a reason that an earlier one tells or that is nobody's fault."""
    return Step(part, about, Verdict.SKIPPED, found, code=code)


# DNS


@dataclass(frozen=True, slots=True)
class ResolverSeen:
    """What became of a short question, of one that is validated up to the anchor, and of one over TCP: None is well."""

    about: str
    short: ResolveError | None
    validated: ResolveError | None = None
    tcp: ResolveError | None = None

    @property
    def is_good(self) -> bool:
        return self.short is None and self.validated is None

    @property
    def is_expired(self) -> bool:
        return self.validated is not None and self.validated.code == "expired"


def judge_resolver(seen: ResolverSeen) -> list[Step]:
    """Whether a resolver answers, passes signatures on, passes validation, and gives long answers."""
    about = seen.about
    if seen.short is not None:
        rest = (Part.SIGNATURES, Part.VALIDATION, Part.LONG_ANSWERS)
        why = "the resolver does not answer"
        return [_dns(Part.RESOLVER, about, seen.short), *(skipped(part, about, why) for part in rest)]
    steps = [_ok(Part.RESOLVER, about, "it answers")]
    error = seen.validated
    code = "" if error is None else error.code
    if error is None:
        steps.append(_ok(Part.SIGNATURES, about, "it passes DNSSEC signatures on"))
        steps.append(_ok(Part.VALIDATION, about, "its answers are valid up to the trust anchor"))
    elif code == "resolver-no-dnssec":
        steps.append(_dns(Part.SIGNATURES, about, error))
        steps.append(skipped(Part.VALIDATION, about, "there are no signatures"))
    elif code == "resolver-unreachable":
        steps.append(skipped(Part.SIGNATURES, about, "answers with signatures do not come"))
        steps.append(skipped(Part.VALIDATION, about, "answers with signatures do not come"))
    elif code == "resolver-failed":
        steps.append(skipped(Part.SIGNATURES, about, "not all questions are answered"))
        steps.append(_dns(Part.VALIDATION, about, error))
    else:
        steps.append(_ok(Part.SIGNATURES, about, "it passes DNSSEC signatures on"))
        steps.append(_dns(Part.VALIDATION, about, error))
    return [*steps, _long_answers(seen)]


def _long_answers(seen: ResolverSeen) -> Step:
    if seen.validated is not None and seen.validated.code == "resolver-unreachable":
        return Step(
            Part.LONG_ANSWERS,
            seen.about,
            Verdict.FAIL,
            "short answers come, long ones with signatures do not come over UDP"
            + ("" if seen.tcp is None else ", and none over TCP"),
            "let long UDP answers and TCP from port 53 through, or use another resolver",
            "long-answers",
            Failure.DNS,
        )
    if seen.tcp is not None:
        return Step(
            Part.LONG_ANSWERS,
            seen.about,
            Verdict.WARN,
            "there is no answer over TCP: what is too long for UDP is lost",
            "let TCP to port 53 through, or use another resolver",
            "no-tcp",
        )
    return _ok(Part.LONG_ANSWERS, seen.about, "over UDP and over TCP")


def _dns(part: Part, about: str, error: ResolveError) -> Step:
    return Step(part, about, Verdict.FAIL, error.message, error.remedy, error.code, Failure.DNS)


def judge_clock(now: datetime, *, is_synchronised: bool, is_expired: bool) -> Step:
    """The clock of this host, by what the kernel says and by the signatures that should be valid now."""
    about = f"{now:%Y-%m-%d %H:%M:%S} UTC"
    if is_expired:
        return Step(
            Part.CLOCK,
            about,
            Verdict.FAIL,
            "signatures in DNS are not valid at this time: the clock may be wrong",
            "set the clock to within a day, then try again; if it is right, the pool's zone was not signed in time",
            "expired",
            Failure.DNS,
        )
    if not is_synchronised:
        return Step(
            Part.CLOCK,
            about,
            Verdict.WARN,
            "the kernel says that it is not synchronised",
            "certificates and signatures are judged by it: see that the date is right",
            "clock-unsynchronised",
        )
    return _ok(Part.CLOCK, about, "the kernel says that it is synchronised")


@dataclass(frozen=True, slots=True)
class MembersSeen:
    """A pool's SRV answer: `listed` as far as they can be used, `unusable` with the reason; `ttl` is in seconds."""

    listed: Sequence[Candidate] = ()
    unusable: dict[str, str] = field(default_factory=dict)
    problem: ResolveError | None = None
    ttl: int = 0


def judge_members(pool: str, seen: MembersSeen, wanted: int) -> list[Step]:
    """Whether DNS names enough servers, in order and independent enough for `wanted` sources."""
    if seen.problem is not None:
        rest = (Part.TARGETS, Part.ADDRESSES, Part.METADATA, Part.INDEPENDENCE, Part.TTL)
        return [
            _dns(Part.SRV, pool, seen.problem),
            *(skipped(part, pool, "there is no list of servers") for part in rest),
        ]
    return [
        _srv(pool, seen, wanted),
        _targets(pool, [*(each.name for each in seen.listed), *seen.unusable]),
        _addresses(pool, seen),
        _metadata(pool, seen.listed),
        _independence(pool, seen.listed, wanted),
        _ttl(pool, seen.ttl),
    ]


def _srv(pool: str, seen: MembersSeen, wanted: int) -> Step:
    count = len(seen.listed) + len(seen.unusable)
    found = f"{_several(count, 'server')} listed"
    if count < wanted:
        remedy = f"with fewer than {wanted} nobody can tell who is wrong: add servers of another pool"
        return Step(Part.SRV, pool, Verdict.WARN, found, remedy, "few-targets")
    return _ok(Part.SRV, pool, found)


def _targets(pool: str, names: Sequence[str]) -> Step:
    outside = [name for name in names if not is_own_around(name, pool)]
    if outside:
        return Step(
            Part.TARGETS,
            pool,
            Verdict.WARN,
            f"not below servers.{pool}: {_some(outside)}",
            "the pool cannot take such a name away from a server: ask its operator whether that is meant",
            "targets-outside",
        )
    if all(is_own(name, pool) for name in names):
        return _ok(Part.TARGETS, pool, f"all below servers.{pool}")
    around = pool.partition(".")[2]
    return _ok(Part.TARGETS, pool, f"all below servers.{around}: a region of the pool {around}")


def _addresses(pool: str, seen: MembersSeen) -> Step:
    found = f"IPv4 at {_having(seen.listed, 4)} of them, IPv6 at {_having(seen.listed, 6)}"
    if not seen.unusable:
        return _ok(Part.ADDRESSES, pool, found)
    remedy = "tell the pool's operator; the other servers can be used"
    reasons = _some(list(seen.unusable.values()))
    if not seen.listed:
        return Step(
            Part.ADDRESSES, pool, Verdict.FAIL, reasons, "tell the pool's operator", "addresses", Failure.DNS
        )
    return Step(Part.ADDRESSES, pool, Verdict.WARN, f"{found}; {reasons}", remedy, "addresses")


def family(address: str) -> int:
    """The IP version."""
    return 6 if ":" in address else 4


def _having(listed: Iterable[Candidate], version: int) -> int:
    return sum(any(family(address) == version for address in each.addresses) for each in listed)


def _metadata(pool: str, listed: Sequence[Candidate]) -> Step:
    unknown = [each.name for each in listed if each.metadata is None]
    if unknown:
        remedy = "whether these depend on each other is not known: ask the pool's operator to publish it"
        found = f"the pool does not say whose they are: {_some(unknown)}"
        return Step(Part.METADATA, pool, Verdict.WARN, found, remedy, "no-metadata")
    return _ok(Part.METADATA, pool, "the pool says of each whose it is")


def operators(servers: Iterable[Candidate]) -> int:
    """How many run them; one of whom nothing is known is not assumed to be another."""
    return len({each.name if each.metadata is None else each.metadata.operator for each in servers})


def _independence(pool: str, listed: Sequence[Candidate], wanted: int) -> Step:
    different = operators(listed)
    chosen = choose(listed, wanted)
    found = f"{_several(different, 'operator')} listed"
    shared = sorted(given_up(chosen), key=lambda pair: pair.bonds[0])
    if shared:
        found += (
            f"; of the best {len(chosen)}, {_several(len(shared), 'pair')} may fail together: {shared[0]}"
        )
    if different < wanted:
        remedy = f"for {wanted} independent sources add servers of another pool"
        return Step(Part.INDEPENDENCE, pool, Verdict.WARN, found, remedy, "few-operators")
    if shared and Bond.OPERATOR in shared[0].bonds:
        remedy = "the pool's own order (priorities) leads there: ask its operator"
        return Step(Part.INDEPENDENCE, pool, Verdict.WARN, found, remedy, "few-operators")
    return _ok(Part.INDEPENDENCE, pool, found)


def _ttl(pool: str, seconds: int) -> Step:
    found = f"the list may be kept for {seconds} s"
    if seconds > _LONG_TTL:
        remedy = "a removed server stays in use so long: ask the pool's operator for a shorter TTL"
        return Step(Part.TTL, pool, Verdict.WARN, found, remedy, "long-ttl")
    return _ok(Part.TTL, pool, found)


# Servers


@dataclass(frozen=True, slots=True)
class KeSeen:
    """Key establishment at one address of a server, or why there was none. `took` is in nanoseconds."""

    name: str
    address: str
    port: int
    error: ClientError | None = None
    chain: Sequence[x509.Certificate] = ()
    aead: AeadId | None = None
    cookies: int = 0
    took: int = 0

    @property
    def about(self) -> str:
        return f"{self.name} at {place(self.address, self.port)}"


def place(address: str, port: int) -> str:
    """An endpoint, as people write it."""
    return f"[{address}]:{port}" if family(address) == 6 else f"{address}:{port}"


def judge_routes(pool: str, missing: Iterable[int], *, is_any_left: bool) -> list[Step]:
    """What is not asked because this host has no route there: `missing` are IP versions. It is a fault if nothing is left."""
    if is_any_left:
        return [
            skipped(Part.KE, f"IPv{version}", f"this host has no IPv{version}", f"no-ipv{version}")
            for version in missing
        ]
    found = "this host has no route to any server"
    remedy = "check this host's network: it needs IPv4 or IPv6, whichever the servers have"
    return [Step(Part.KE, pool, Verdict.FAIL, found, remedy, "no-route", Failure.LOCAL)]


def judge_ke(seen: KeSeen, now: datetime) -> Step:
    """Whether NTS-KE works at one address; if not, whether the network, somebody on the way or the server is at fault."""
    error = seen.error
    if error is None:
        return _established(seen, now)
    failure = Failure(error.code)
    code, remedy = _ke_fault(seen, failure, error, now)
    found = error.message
    if error.shown:
        found += _who(error.shown[0])
    return Step(Part.KE, seen.about, Verdict.FAIL, found, remedy, code, failure)


def _established(seen: KeSeen, now: datetime) -> Step:
    leaf = seen.chain[0]
    begin, end = leaf.not_valid_before_utc, leaf.not_valid_after_utc
    algorithm = "" if seen.aead is None else f", AEAD {int(seen.aead)}"
    found = f"{_several(seen.cookies, 'cookie')}{algorithm}, {seen.took / 1e6:.0f} ms; certificate until {end:%Y-%m-%d}"
    if now > renew_by(begin, end):
        remedy = "nothing to do here; if it stays so, the server will fail then: tell the pool's operator"
        found += ": its renewal is late"
        return Step(Part.KE, seen.about, Verdict.WARN, found, remedy, "certificate-ends")
    return _ok(Part.KE, seen.about, found)


def _ke_fault(seen: KeSeen, failure: Failure, error: ClientError, now: datetime) -> tuple[str, str]:
    match failure:
        case Failure.TCP if error.is_silent:
            return (
                "ke-silent",
                f"let TCP to port {seen.port} out: a firewall seems to drop it; if others answer, the server is down",
            )
        case Failure.TCP:
            return "ke-refused", f"let TCP to port {seen.port} out; if others answer, the server does not run"
        case Failure.TLS if error.is_silent:
            return (
                "tls-silent",
                f"exempt TCP port {seen.port} from inspection: something takes the connection and does not answer",
            )
        case Failure.TLS:
            return (
                "tls",
                f"exempt TCP port {seen.port} from inspection: something else than an NTS-KE server answers",
            )
        case Failure.CERTIFICATE:
            return _certificate_fault(seen, error, now)
        case _:
            return str(failure), error.remedy


def _certificate_fault(seen: KeSeen, error: ClientError, now: datetime) -> tuple[str, str]:
    leaf = error.shown[0] if error.shown else None
    if leaf is not None and not leaf.not_valid_before_utc <= now <= leaf.not_valid_after_utc:
        return (
            "certificate-dates",
            f"see whether this clock is right, {now:%Y-%m-%d %H:%M} UTC; if so the server's certificate was not renewed",
        )
    if leaf is not None and seen.name not in dns_names(leaf):
        return (
            "certificate-name",
            f"exempt TCP port {seen.port} from proxies of this network: somebody else answers for this server",
        )
    return (
        "certificate-untrusted",
        f"exempt TCP port {seen.port} from inspection: TLS seems to be opened on the way; a pool's own CA needs --ca",
    )


def _who(leaf: x509.Certificate) -> str:
    """Whose certificate was shown, and who issued it."""
    try:
        issuer = leaf.issuer.rfc4514_string()
    except ValueError:
        issuer = "an issuer that cannot be read"
    names = _some(list(dns_names(leaf))) or "no name"
    return printable(f"; it is for {names}, issued by {issuer or 'nobody'}", 300)


@dataclass(frozen=True, slots=True)
class NtpSeen:
    """What came back from one NTP port.

    `longest` is the length of the longest NTS request that was answered (0: none), `full` that of the longest one that a
    client may have to send, in octets. `kiss` is a kiss code, by which something came through but no time.
    """

    name: str
    address: str
    port: int
    is_plain_answered: bool = False
    longest: int = 0
    full: int = 0
    sample: Sample | None = None
    kiss: str = ""
    error: ClientError | None = None

    @property
    def about(self) -> str:
        return f"{self.name} at {place(self.address, self.port)}"


def judge_ntp(seen: NtpSeen) -> Step:
    """Whether NTP packets of all lengths that NTS needs come through at one address, and bring time."""
    if seen.error is not None:
        failure = Failure(seen.error.code)
        return _ntp_fault(seen, seen.error.message, seen.error.remedy, str(failure), failure)
    if seen.longest == 0:
        return _nothing_long(seen)
    if seen.sample is None:
        remedy = _KISSES.get(seen.kiss, "the server refuses us: ask its operator, or use another server")
        return _ntp_fault(
            seen, f"it answers with the kiss code {seen.kiss}", remedy, "kiss-of-death", Failure.KISS
        )
    if not seen.sample.synchronised:
        remedy = "the server does not know the time itself now: use another one"
        found = "it says that it is not synchronised"
        return _ntp_fault(seen, found, remedy, "unsynchronised", Failure.UNSYNCHRONISED)
    if seen.longest < seen.full:
        return Step(
            Part.NTP,
            seen.about,
            Verdict.WARN,
            f"long NTP packets are dropped on the way: {seen.longest} octets are answered, {seen.full} are not",
            f"let UDP packets of all lengths pass to port {seen.port}; until then a client loses its keys after some lost packets",
            "long-packets",
        )
    return _ok(
        Part.NTP, seen.about, f"{seen.full} octets are answered, delay {seen.sample.delay / 1e6:.1f} ms"
    )


_KISSES = {
    "RATE": "it was asked too often from here: try again in an hour",
    "NTSN": "the server does not know its own cookies: tell the pool's operator",
    **dict.fromkeys(STARTING, "the server has just started: try again in some minutes"),
}


def _nothing_long(seen: NtpSeen) -> Step:
    if seen.is_plain_answered:
        return _ntp_fault(
            seen,
            f"long NTP packets are dropped on the way: {HEADER_LENGTH} octets are answered, those of NTS are not",
            f"let UDP packets longer than {HEADER_LENGTH} octets pass to port {seen.port}; many networks drop them on port 123",
            "long-packets",
            Failure.NTP,
        )
    return _ntp_fault(
        seen,
        f"neither {HEADER_LENGTH} octets are answered nor requests of NTS",
        f"let UDP to port {seen.port} out: a firewall seems to drop it; if others answer, the server is down",
        "udp-silent",
        Failure.NTP,
    )


def _ntp_fault(seen: NtpSeen, found: str, remedy: str, code: str, failure: Failure) -> Step:
    return Step(Part.NTP, seen.about, Verdict.FAIL, found, remedy, code, failure)


# All together


@dataclass(frozen=True, slots=True)
class Told:
    """The time of one server, which may have been taken at several of its addresses; the first counts."""

    candidate: Candidate
    sample: Sample


def judge_time(pool: str, told: Sequence[Told]) -> tuple[Step, list[Candidate]]:
    """Who of the servers is right, with what that says of this clock."""
    fit = [each for each in told if select.unfit(each.sample) is None]
    if not told:
        return skipped(Part.TIME, pool, "no server tells the time"), []
    if not fit:
        found = "no server that answers is sure of the time"
        remedy = "try later, or use another pool"
        return Step(Part.TIME, pool, Verdict.FAIL, found, remedy, "unfit", Failure.UNSYNCHRONISED), []
    selection = select.select([select.estimate([each.sample]) for each in fit])
    if selection.offset is None:
        found = f"the {len(fit)} servers that answer do not agree"
        remedy = "use more servers: nobody can tell now who is wrong"
        return Step(Part.TIME, pool, Verdict.FAIL, found, remedy, "disagree", Failure.TOO_FEW_SOURCES), []
    right = [each.candidate for index, each in enumerate(fit) if index in selection.truechimers]
    wrong = [each.candidate.name for index, each in enumerate(fit) if index not in selection.truechimers]
    seconds = abs(selection.offset) / 1e9
    side = "behind" if selection.offset > 0 else "ahead"
    found = f"{len(right)} of {len(told)} servers agree; this clock is {seconds:.3f} s {side}"
    if abs(selection.offset) > _WRONG:
        remedy = "set the clock, or let a time daemon do it"
        return Step(Part.TIME, pool, Verdict.WARN, found, remedy, "clock-offset"), right
    if wrong:
        remedy = "clients leave these out by themselves; tell the pool's operator"
        return Step(
            Part.TIME, pool, Verdict.WARN, f"{found}; not {_some(wrong)}", remedy, "falseticker"
        ), right
    return _ok(Part.TIME, pool, found), right


class Outcome(StrEnum):
    """What the pool is good for from here."""

    USABLE = "usable"
    FEW_SOURCES = "few-sources"
    UNUSABLE = "unusable"


@dataclass(frozen=True, slots=True)
class Summary:
    """`servers` can be used, of so many `operators`; `first` is what to mend first, if anything."""

    outcome: Outcome
    servers: int
    operators: int
    first: Step | None
    error: ClientError | None

    def __str__(self) -> str:
        counted = f"{_several(self.servers, 'server')} of {_several(self.operators, 'operator')} can be used"
        match self.outcome:
            case Outcome.USABLE:
                return f"usable: {counted}"
            case Outcome.FEW_SOURCES:
                return f"usable with fewer independent sources than wanted: {counted}"
            case Outcome.UNUSABLE:
                return "not usable from here"


def summarise(steps: Sequence[Step], working: Sequence[Candidate], wanted: int) -> Summary:
    """What all steps come to, when `wanted` independent sources are needed and `working` servers agree on the time."""
    different = operators(working)
    if different >= wanted:
        return Summary(Outcome.USABLE, len(working), different, _first_fault(steps), None)
    if working:
        error = ClientError(
            Failure.TOO_FEW_SOURCES,
            f"{_several(different, 'operator')} of servers can be used here, and {wanted} are needed for independent sources",
            "see the steps that failed; or add servers of another pool",
        )
        return Summary(Outcome.FEW_SOURCES, len(working), different, _first_fault(steps), error)
    first = _blocking(steps)
    return Summary(Outcome.UNUSABLE, 0, 0, first, None if first is None else _as_error(first, steps))


def _first_fault(steps: Sequence[Step]) -> Step | None:
    by_verdict = {
        verdict: [step for step in steps if step.verdict is verdict]
        for verdict in (Verdict.FAIL, Verdict.WARN)
    }
    return next((found[0] for found in by_verdict.values() if found), None)


def _blocking(steps: Sequence[Step]) -> Step | None:
    """The first fault of the first part that nothing got past. A wrong clock explains what is not valid by it."""
    failed = [step for step in steps if step.verdict is Verdict.FAIL]
    passed = {step.part for step in steps if step.verdict not in _STOPPED}
    blocked = [step for step in failed if step.part not in passed]
    clock = [step for step in blocked if step.part is Part.CLOCK]
    return next(iter([*clock, *blocked, *failed]), None)


_STOPPED = frozenset({Verdict.FAIL, Verdict.SKIPPED})


def _as_error(first: Step, steps: Sequence[Step]) -> ClientError:
    alike = [step for step in steps if step.part is first.part and step.code == first.code]
    more = f" (and so at {len(alike) - 1} others)" if len(alike) > 1 else ""
    return ClientError(first.failure or Failure.DNS, f"{first.about}: {first.found}{more}", first.remedy)


def _several(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _some(words: Sequence[str], most: int = 3) -> str:
    """A few of many."""
    rest = len(words) - most
    return ", ".join(words[:most]) + (f" and {rest} more" if rest > 0 else "")
