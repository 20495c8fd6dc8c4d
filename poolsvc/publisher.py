"""The zone's only writer: RFC 2136 updates under TSIG to a primary, fenced and compare-and-set.

Three rules make it safe beside a stale leader or a hand on the primary. Every update carries the leader's
epoch and the old value of every RRset it touches as prerequisites (RFC 2136 section 2.4), so that the
primary itself refuses what is out of date. NOERROR is never taken as done, because primaries acknowledge
updates that they ignore (an address beside a CNAME, for one): what counts is the zone seen again, by what happened
to it since it was last seen (IXFR), so that also what others do there is known. And `verify` asks the authoritative
servers, which is what clients see.
"""

import asyncio
import time
from collections import ChainMap
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime

import dns.asyncquery
import dns.dnssec
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.query
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdataset
import dns.rdatatype
import dns.rrset
import dns.serial
import dns.tsig
import dns.update

from poolsvc import zone_transfer
from poolsvc.primary import (
    NO_DRAW,
    UNMET,
    Conflict,
    Fenced,
    Nameserver,
    PrimaryConfig,
    PublishError,
    Rejected,
    Unreachable,
    primary_errors,
    refusal,
)
from poolsvc.zone import MANAGED_TYPES, Change, Key, RRset, Zone, ZonePolicy, diff, make, managed
from poolsvc.zone_transfer import NotIncremental, Record, Since, Source, Whole

CHUNK_RECORDS = 400  # old and new records of one message, which primaries sign in a fraction of a second
CHUNK_OCTETS = 40_000  # of their text; a message holds 64 KiB
ATTEMPTS = 5  # rounds of observe and apply before a moving zone is reported
SERVFAIL_TRIES = 2  # of one message
VERIFY_CONCURRENCY = 16  # questions in flight to one authoritative server
VERIFY_PAYLOAD = 1232
VERIFY_TRIES = 2
# Of one server's answer, or it could let us work for as long as it likes (CVE-2023-50387).
_MAX_KEYS, _MAX_SIGNATURES = 16, 4
_IN = dns.rdataclass.IN


@dataclass(frozen=True, slots=True)
class Observation:
    """The managed part of the zone on the primary, and the fence. Both are never changed.

    `soa_minimum` (seconds) is how long resolvers may still deny new names (RFC 8198).
    """

    serial: int
    zone: Zone
    soa_minimum: int
    fence: RRset | None

    @property
    def epoch(self) -> str | None:
        """What the fence says; of several texts all, which is no epoch of anybody's."""
        if self.fence is None:
            return None
        return " ".join(sorted(text.strip('"') for text in self.fence.rdatas))


Plan = Callable[[Zone], Awaitable[Sequence[Change]]]
"""What is to be done in a zone that is as given."""


@dataclass(frozen=True, slots=True)
class Published:
    """The primary holds what was wanted: `changes` is what that took, and `foreign` what somebody else did meanwhile."""

    seen: Observation
    changes: tuple[Change, ...]
    foreign: tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """What an authoritative server shows is not wanted; `key` is None when it does not answer at all."""

    nameserver: Nameserver
    key: Key | None
    reason: str
    remedy: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Draw:
    """What is answered in place of the zone's RRsets of these keys: the draws that count, by their tokens.

    `marker` is the owner whose TXT tells from which one a nameserver answers.
    """

    marker: str
    tokens: frozenset[str]
    keys: frozenset[Key]


class Publisher:
    """Reads, changes and verifies one pool's zone; it keeps no state between calls."""

    def __init__(self, policy: ZonePolicy, config: PrimaryConfig) -> None:
        self._policy = policy
        self._config = config
        self._apex = dns.name.from_text(policy.apex)
        self._tsig = dns.tsig.Key(config.tsig_name, config.tsig_secret, config.tsig_algorithm)

    @property
    def policy(self) -> ZonePolicy:
        return self._policy

    async def observe(self) -> Observation:
        """The zone by AXFR."""
        found = await zone_transfer.whole(self._source(), self._config.transfer_timeout)
        return await asyncio.to_thread(self._observation, found)

    async def follow(self, seen: Observation) -> tuple[Observation, tuple[Change, ...]]:
        """The zone as it has become since it was seen, and what happened to it, whoever did it.

        By IXFR where the primary has the changes, or sends a small zone in their place; else by AXFR.
        """
        try:
            found = await zone_transfer.since(self._source(), seen.serial)
            if isinstance(found, Since):
                return self._later(seen, found)
            now = self._observation(found)
        except NotIncremental:
            now = await self.observe()
        return now, diff(now.zone, seen.zone)

    async def take_fence(self, epoch: int) -> None:
        """Make `epoch` the zone's epoch; Fenced when the zone has a higher one."""
        for _ in range(ATTEMPTS):
            held = await self.fence()
            if held == epoch:
                return
            if held is not None and held > epoch:
                raise Fenced(f"the zone's epoch is {held}, ours is {epoch}")
            update = self._update()
            if held is None:
                update.absent(self._policy.fence, "TXT")
            else:
                update.present(self._policy.fence, "TXT", str(held))
            update.replace(self._policy.fence, 0, "TXT", str(epoch))
            with suppress(Conflict):
                await self._exchange(update)
        raise Conflict(f"the fence did not become {epoch} in {ATTEMPTS} attempts")

    async def apply(self, changes: Iterable[Change], epoch: int) -> int:
        """Make the changes in their order, each message whole or not at all; the number of messages.

        Conflict when an RRset no longer has its old value, Fenced when the epoch is no longer ours;
        messages before the one that failed stay made.
        """
        messages = 0
        for chunk in _chunks(changes):
            update = self._update()
            update.present(self._policy.fence, "TXT", str(epoch))
            for change in chunk:
                _add_change(update, change)
            await self._send(update, epoch)
            messages += 1
        return messages

    async def hand(self, records: Iterable[tuple[str, int, dns.rdata.Rdata]], epoch: int) -> None:
        """Add records, each with its owner and TTL, in one message; Fenced when the epoch is no longer ours."""
        update = self._update()
        update.present(self._policy.fence, "TXT", str(epoch))
        for owner, ttl, rdata in records:
            update.add(owner, ttl, rdata)
        await self._send(update, epoch)

    async def ask(self, owner: str, rdtype: str, authority: dns.rrset.RRset) -> dns.message.Message:
        """A signed question to the primary, with what we know already; its answer, whatever it says."""
        query = dns.message.make_query(owner, rdtype, flags=0)
        query.authority.append(authority)
        query.use_tsig(self._tsig)
        return await self._exchange(query, *dns.rcode.Rcode)

    async def _send(self, update: dns.update.UpdateMessage, epoch: int) -> None:
        try:
            await self._exchange(update)
        except Conflict:
            if (held := await self.fence()) != epoch:
                raise Fenced(f"the zone's epoch is {held}, ours is {epoch}") from None
            raise

    async def bring(self, plan: Plan, epoch: int, seen: Observation | None = None) -> Published:
        """Make what `plan` finds to do in the zone, and see it there, until nothing is left to do.

        `seen` is the zone as it was last known, without which it is observed. The fence must have been taken with
        `epoch`. What a conflict tells is that `seen` is old, or wrong: then it is followed, or observed anew.
        """
        if seen is None:
            seen = await self.observe()
        made: list[Change] = []
        foreign: list[Change] = []
        failure: PublishError | None = None
        for _ in range(ATTEMPTS):
            if seen.epoch != str(epoch):
                raise Fenced(f"the zone's epoch is {seen.epoch}, ours is {epoch}")
            changes = await plan(seen.zone)
            if not changes:
                return Published(seen, tuple(made), tuple(foreign))
            try:
                await self.apply(changes, epoch)
                failure = Rejected(
                    f"acknowledged but not kept: {changes[0].owner} {changes[0].rdtype}; "
                    "look for a CNAME there, and at what the primary grants the TSIG key"
                )
            except Conflict as conflict:
                failure = conflict
            before = seen
            seen, happened = await self.follow(before)
            if isinstance(failure, Conflict) and not happened:
                seen = await self.observe()
                happened = diff(seen.zone, before.zone)
            ours = {change.key: change.after for change in changes}
            for change in happened:
                is_ours = change.key in ours and ours[change.key] == change.after
                (made if is_ours else foreign).append(change)
        assert failure is not None
        raise failure

    async def notify(self) -> None:
        """Tell the nameservers, if they are to be told, that the zone has changed (RFC 1996); nobody's answer is awaited.

        Signed, so that they need not know our address. The primary is told as well where it is one of them.
        """
        message = dns.message.make_query(self._apex, "SOA", flags=dns.flags.AA)
        message.set_opcode(dns.opcode.NOTIFY)
        message.use_tsig(self._tsig)
        wire, loop = message.to_wire(), asyncio.get_running_loop()
        for to in self._config.nameservers if self._config.notify else ():
            # What cannot be sent is left to the primary's own NOTIFY.
            with suppress(OSError):
                async with asyncio.timeout(self._config.timeout):
                    transport, _ = await loop.create_datagram_endpoint(
                        asyncio.DatagramProtocol, remote_addr=(to.address, to.port)
                    )
                transport.sendto(wire)
                transport.close()

    async def verify(
        self, keys: Iterable[Key], wanted: Mapping[Key, RRset], draw: Draw | None = None
    ) -> tuple[Mismatch, ...]:
        """Ask every authoritative server for each key: equal and signed, or absent, as `wanted` says.

        One that answers from a `draw` shows other records for the keys of it, signed as well; one that answers from another
        draw is told by the marker's key. One that answers from none shows the zone's.
        A signature counts if it holds now by the keys that the same server shows; `poolsvc doctor` follows these up.
        The answer is in the order of servers, then keys; a server that falls silent comes first, once.
        """
        asked = tuple(key for key in keys if draw is None or key != (draw.marker, "TXT"))
        found = await asyncio.gather(
            *(self._verify_at(nameserver, asked, wanted, draw) for nameserver in self._config.nameservers)
        )
        return tuple(mismatch for mismatches in found for mismatch in mismatches)

    async def rehearse(self) -> datetime:
        """Ask for each kind of change that the publisher makes, so that nothing is changed.

        Each message deletes RRsets of which its prerequisites say that they do not exist. A primary checks the
        key first, then Knot and BIND the rights; PowerDNS keeps what it denies to itself. Returns the primary's time.
        """
        trials = (
            (self._policy.domain("_trial"), ("A", "AAAA", "CAA", "TXT")),  # no server can have this name
            (self._policy.challenge("_trial"), ("TXT",)),
            (self._policy.service, ("SRV",)),
            (self._policy.fence, ("TXT",)),
        )
        return [await self._trial(*trial) for trial in trials][-1]

    async def rehearse_region(self, region: str) -> None:
        """Ask for a change of a region's SRV, so that nothing is changed. Raises PublishError."""
        await self._trial(self._policy.service_at(region), ("SRV",))

    async def _trial(self, owner: str, rdtypes: tuple[str, ...]) -> datetime:
        update = self._update()
        for rdtype in rdtypes:
            update.absent(owner, rdtype)
        for rdtype in rdtypes:
            update.delete(owner, rdtype)
        try:
            answer = await self._exchange(update, *UNMET)
        except Rejected as error:
            raise Rejected(f"{owner} {', '.join(rdtypes)}: {error}") from None
        assert answer.tsig is not None
        return datetime.fromtimestamp(answer.tsig[0].time_signed, UTC)

    async def behind(self, serial: int) -> tuple[Nameserver, ...]:
        """The authoritative servers that do not say that they have come to `serial`.

        That is a reason to ask them, and no fault: a server that signs by itself has serials of its own. Only what it
        shows counts.
        """
        nameservers = self._config.nameservers
        found = await asyncio.gather(*(self._is_behind(one, serial) for one in nameservers))
        return tuple(one for one, is_behind in zip(nameservers, found, strict=True) if is_behind)

    async def _is_behind(self, nameserver: Nameserver, serial: int) -> bool:
        try:
            soa = _answered(await self._question(nameserver, (self._policy.apex, "SOA")))
        except Unreachable:
            return True
        return soa is None or dns.serial.Serial(soa[0].serial) < dns.serial.Serial(serial)

    def _source(self) -> Source:
        policy, to = self._policy, self._config
        return Source(
            address=to.address,
            port=to.port,
            zone=policy.apex,
            tsig_name=to.tsig_name,
            tsig_secret=to.tsig_secret,
            tsig_algorithm=to.tsig_algorithm,
            owners=policy.owners,
            names=tuple(policy.services),
            types=MANAGED_TYPES,
            timeout=to.timeout,
        )

    def _observation(self, found: Whole) -> Observation:
        zone = {key: rrset for key, rrset in found.records.items() if managed(*key, self._policy)}
        fence = found.records.get((self._policy.fence, "TXT"))
        return Observation(found.soa.serial, zone, found.soa.minimum, fence)

    def _later(self, seen: Observation, since: Since) -> tuple[Observation, tuple[Change, ...]]:
        """What was seen, gone on by what happened since. NotIncremental when the two do not fit."""
        fence = self._policy.fence, "TXT"
        before = ChainMap({} if seen.fence is None else {fence: seen.fence}, seen.zone)
        after: dict[Key, RRset] = {}

        def become(record: Record, texts: frozenset[str]) -> None:
            after[record.owner, record.rdtype] = RRset(record.ttl, texts)

        def held(record: Record) -> frozenset[str]:
            key = record.owner, record.rdtype
            rrset = after.get(key) or before.get(key)
            return frozenset() if rrset is None else rrset.rdatas

        for step in since.steps:
            for record in filter(self._is_followed, step.deleted):
                if record.text not in (texts := held(record)):
                    raise NotIncremental(f"{record.owner} {record.rdtype} was not known to be there")
                become(record, texts - {record.text})
            for record in filter(self._is_followed, step.added):
                become(record, held(record) | {record.text})
        changes = tuple(
            Change(*key, before.get(key), rrset if rrset.rdatas else None)
            for key, rrset in after.items()
            if before.get(key) != (rrset if rrset.rdatas else None)
        )
        zone = seen.zone
        if ours := tuple(change for change in changes if change.key != fence):
            zone = dict(zone)
            make(zone, ours)
        epoch = next((change.after for change in changes if change.key == fence), seen.fence)
        return Observation(since.soa.serial, zone, since.soa.minimum, epoch), ours

    def _is_followed(self, record: Record) -> bool:
        is_fence = record.owner == self._policy.fence and record.rdtype == "TXT"
        return is_fence or managed(record.owner, record.rdtype, self._policy)

    async def fence(self) -> int | None:
        """The epoch that the zone's fence holds."""
        query = dns.message.make_query(self._policy.fence, "TXT", flags=0)
        query.use_tsig(self._tsig)
        rrset = _answered(await self._exchange(query, dns.rcode.NXDOMAIN))
        if rrset is None:
            return None
        text = _fence_text(rrset)
        if not text.isdecimal():
            raise Rejected(f"{self._policy.fence} TXT must hold one number and holds {text}")
        return int(text)

    def _update(self) -> dns.update.UpdateMessage:
        return dns.update.UpdateMessage(self._apex, keyring=self._tsig)

    async def _exchange(self, message: dns.message.Message, *fine: dns.rcode.Rcode) -> dns.message.Message:
        """One signed message to the primary and its signed answer; rcodes but NOERROR and `fine` raise.

        After one SERVFAIL it is asked again: PowerDNS says so when it writes something else in the same moment.
        """
        for _ in range(SERVFAIL_TRIES):
            answer = await self._answer(message)
            if answer.rcode() != dns.rcode.SERVFAIL:
                break
        if answer.rcode() not in {dns.rcode.NOERROR, *fine}:
            raise refusal(answer.rcode())
        return answer

    async def _answer(self, message: dns.message.Message) -> dns.message.Message:
        to = self._config
        with primary_errors():
            async with asyncio.timeout(to.timeout):
                reader, writer = await asyncio.open_connection(to.address, to.port)
                try:
                    writer.write(message.to_wire(prepend_length=True))
                    octets = await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
                finally:
                    writer.close()
            return _signed(message, octets)

    async def _verify_at(
        self, nameserver: Nameserver, keys: tuple[Key, ...], wanted: Mapping[Key, RRset], draw: Draw | None
    ) -> list[Mismatch]:
        found: list[Mismatch] = []
        waiting, drawn = iter(keys), frozenset[Key]()

        async def ask_in_turn() -> None:
            for key in waiting:
                answer = await self._question(nameserver, key)
                if (fault := _fault(answer, wanted.get(key), dnskeys, is_drawn=key in drawn)) is not None:
                    found.append(Mismatch(nameserver, key, *fault))

        try:
            dnskeys = self._dnskeys(await self._question(nameserver, (self._policy.apex, "DNSKEY")))
            if draw is not None:
                shown = _text(await self._question(nameserver, (draw.marker, "TXT")))
                drawn = frozenset() if shown in (None, NO_DRAW) else draw.keys
                if drawn and shown not in draw.tokens:
                    found.append(
                        Mismatch(nameserver, (draw.marker, "TXT"), "answers from another draw", _BEHIND)
                    )
            async with asyncio.TaskGroup() as group:
                for _ in range(VERIFY_CONCURRENCY):
                    group.create_task(ask_in_turn())
        except* Unreachable as silence:
            found.append(Mismatch(nameserver, None, str(silence.exceptions[0]), _SILENT))
        return sorted(found, key=lambda mismatch: mismatch.key or ())

    def _dnskeys(self, answer: dns.message.Message) -> dns.rrset.RRset | None:
        """The zone's keys as a server shows them, which sign each other; None if they do not."""
        keys = _answered(answer)
        if keys is None or len(keys) > _MAX_KEYS or _signature_fault(answer, keys, keys) is not None:
            return None
        return keys

    async def _question(self, to: Nameserver, key: Key) -> dns.message.Message:
        query = dns.message.make_query(*key, want_dnssec=True, payload=VERIFY_PAYLOAD, flags=0)
        timeout = self._config.timeout / VERIFY_TRIES
        failure = Unreachable("not asked")
        for _ in range(VERIFY_TRIES):
            try:
                with primary_errors():
                    answer, _ = await dns.asyncquery.udp_with_fallback(
                        query, to.address, timeout, to.port, ignore_unexpected=True, ignore_errors=True
                    )
                    return answer
            except Unreachable as unreachable:
                failure = unreachable
        raise failure


def _signed(message: dns.message.Message, octets: bytes) -> dns.message.Message:
    """The answer to a signed message, once its signature is checked."""
    bare = dns.message.from_wire(octets, keyring=False)
    if not bare.had_tsig:
        match bare.rcode():
            case dns.rcode.NOERROR:
                raise Rejected("the primary's answer carries no TSIG signature")
            case dns.rcode.REFUSED:  # PowerDNS to a wrong key; others name the fault in a TSIG (RFC 8945)
                raise refusal(dns.rcode.NOTAUTH)
            case rcode:
                raise refusal(rcode)
    answer = dns.message.from_wire(octets, keyring=message.keyring, request_mac=message.mac)
    if not message.is_response(answer):
        raise dns.query.BadResponse
    return answer


def _chunks(changes: Iterable[Change]) -> Iterator[list[Change]]:
    """The changes in their order, in groups that one message holds."""
    chunk: list[Change] = []
    records = octets = 0
    for change in changes:
        texts = [text for rrset in (change.before, change.after) if rrset for text in rrset.rdatas]
        more = sum(len(change.owner) + len(text) for text in texts)
        if chunk and (records + len(texts) > CHUNK_RECORDS or octets + more > CHUNK_OCTETS):
            yield chunk
            chunk, records, octets = [], 0, 0
        chunk.append(change)
        records += len(texts)
        octets += more
    if chunk:
        yield chunk


def _add_change(update: dns.update.UpdateMessage, change: Change) -> None:
    """The change with its prerequisite; deletes name the type, since primaries may deny ANY."""
    if change.before is None:
        update.absent(change.owner, change.rdtype)
    else:
        update.present(change.owner, *_rdatas(change.rdtype, change.before))
    if change.after is None:
        update.delete(change.owner, change.rdtype)
    else:
        update.replace(change.owner, change.after.ttl, *_rdatas(change.rdtype, change.after))


def _rdatas(rdtype: str, rrset: RRset) -> list[dns.rdata.Rdata]:
    # Without an origin: with one, dnspython makes names relative and then appends the zone to them.
    return [dns.rdata.from_text("IN", rdtype, text) for text in sorted(rrset.rdatas)]


def _rrset(rdataset: dns.rdataset.Rdataset) -> RRset:
    return RRset.of(
        rdataset.ttl, dns.rdatatype.to_text(rdataset.rdtype), [rdata.to_text() for rdata in rdataset]
    )


def _text(answer: dns.message.Message) -> str | None:
    """The TXT that was asked for."""
    rrset = _answered(answer)
    return None if rrset is None else _fence_text(rrset)


def _fence_text(rdataset: dns.rdataset.Rdataset) -> str:
    return " ".join(sorted(rdata.to_text().strip('"') for rdata in rdataset))


def _answered(answer: dns.message.Message) -> dns.rrset.RRset | None:
    """The RRset that was asked for."""
    asked = answer.question[0]
    return answer.get_rrset(answer.answer, asked.name, _IN, asked.rdtype)


_Fault = tuple[str, str]
"""What is wrong with an answer, and what to do."""

_SILENT = "see whether it runs and is reachable from here, or take it out of dns.nameservers"
_BEHIND = "see whether it gets answer sets: the log of `poolsvc dns edge` there"
_LATE = "see whether it gets NOTIFY and transfers from the primary"
_UNSIGNED = "see why the primary does not sign anew: its log, its keys, its clock"


def _fault(
    answer: dns.message.Message,
    expected: RRset | None,
    dnskeys: dns.rrset.RRset | None,
    *,
    is_drawn: bool = False,
) -> _Fault | None:
    """What is wrong with an authoritative server's answer, None when nothing is."""
    if answer.rcode() not in {dns.rcode.NOERROR, dns.rcode.NXDOMAIN}:
        return f"answers {dns.rcode.to_text(answer.rcode())}", "let it serve the zone; its log says more"
    if not answer.flags & dns.flags.AA:
        return "is not authoritative", "let it serve the zone, or take it out of dns.nameservers"
    shown = _answered(answer)
    if expected is None:
        return None if shown is None else ("still shows the records", _LATE)
    if shown is None:
        return "does not show the records", _LATE
    if not is_drawn and _rrset(shown).rdatas != expected.rdatas:
        return "shows other records", _LATE
    return _signature_fault(answer, shown, dnskeys)


def _signature_fault(
    answer: dns.message.Message, shown: dns.rrset.RRset, dnskeys: dns.rrset.RRset | None
) -> _Fault | None:
    """Whether one of the signatures over what is shown holds now, by the zone's keys; what is wrong otherwise."""
    signatures = answer.get_rrset(answer.answer, shown.name, _IN, dns.rdatatype.RRSIG, shown.rdtype)
    if signatures is None:
        return "shows the records without a signature", "turn signing on at the primary"
    if dnskeys is None:
        return "shows no DNSKEY that signs itself", _UNSIGNED
    if len(signatures) > _MAX_SIGNATURES:
        return f"shows more than {_MAX_SIGNATURES} signatures over the records", _UNSIGNED
    try:
        dns.dnssec.validate(shown, signatures, {dnskeys.name: dnskeys})
    except (dns.exception.ValidationFailure, dns.exception.UnsupportedAlgorithm):
        now = time.time()
        if (end := max(signature.expiration for signature in signatures)) < now:
            return f"shows a signature that ended on {_day(end)}", _UNSIGNED
        if (begin := min(signature.inception for signature in signatures)) > now:
            return f"shows a signature that begins on {_day(begin)}", _UNSIGNED
        return "shows a signature that does not hold by the zone's keys", _UNSIGNED
    return None


def _day(moment: int) -> str:
    return f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%d %H:%M} UTC"
