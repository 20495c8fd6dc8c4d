"""The zone's only writer: RFC 2136 updates under TSIG to a primary, fenced and compare-and-set.

Three rules make it safe beside a stale leader or a hand on the primary. Every update carries the leader's
epoch and the old value of every RRset it touches as prerequisites (RFC 2136 section 2.4), so that the
primary itself refuses what is out of date. NOERROR is never taken as done, because primaries acknowledge
updates that they ignore (an address beside a CNAME, for one): what counts is the zone seen again. And
`verify` asks the authoritative servers, which is what clients see.
"""

import asyncio
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import dns.asyncquery
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.query
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdataset
import dns.rdatatype
import dns.serial
import dns.tsig
import dns.update
import dns.xfr
import dns.zone

from poolsvc.zone import Change, Key, RRset, Zone, ZonePolicy, diff, managed

CHUNK_RECORDS = 400  # old and new records of one message, which primaries sign in a fraction of a second
CHUNK_OCTETS = 40_000  # of their text; a message holds 64 KiB
TRANSFER_BUFFER = 64 * 1024 * 1024  # octets that may wait to be parsed, some 250,000 records
ATTEMPTS = 5  # rounds of observe and apply before a moving zone is reported
VERIFY_CONCURRENCY = 16  # questions in flight to one authoritative server
VERIFY_PAYLOAD = 1232
VERIFY_TRIES = 2
_UNMET = frozenset(
    {dns.rcode.NXRRSET, dns.rcode.YXRRSET, dns.rcode.NXDOMAIN, dns.rcode.YXDOMAIN}
)  # prerequisites


class PublishError(Exception):
    """The zone is not as wanted; `code` is stable, the text is for the operator and holds no secret."""

    code = "publish"


class Fenced(PublishError):
    """Another leader with another epoch writes the zone; this one must stop."""

    code = "fenced"


class Conflict(PublishError):
    """The zone was not as observed; observe again."""

    code = "conflict"


class Rejected(PublishError):
    """The primary will not do this however often it is asked: key, clock, rights or content."""

    code = "rejected"


class Unreachable(PublishError):
    """No usable answer in time; asking later may help."""

    code = "unreachable"


@dataclass(frozen=True, slots=True)
class Nameserver:
    """An authoritative server as clients reach it."""

    address: str
    port: int = 53

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PrimaryConfig:
    """Where updates go and which servers must then show them; `tsig_secret` is base64.

    `timeout` bounds the exchange of one question and one answer, `transfer_timeout` a whole AXFR (seconds).
    """

    address: str
    port: int
    tsig_name: str
    tsig_secret: str = field(repr=False)
    tsig_algorithm: str = "hmac-sha256"
    nameservers: tuple[Nameserver, ...]
    timeout: float = 5.0
    transfer_timeout: float = 120.0


@dataclass(frozen=True, slots=True)
class Observation:
    """The managed part of the zone on the primary; `epoch` is the fence's text, None without a fence."""

    serial: int
    zone: Zone
    soa_minimum: int
    epoch: str | None


@dataclass(frozen=True, slots=True)
class Published:
    """The primary holds what was wanted at `serial`, and `changes` is what that took.

    `soa_minimum` (seconds) is how long resolvers may still deny the new names (RFC 8198).
    """

    serial: int
    changes: tuple[Change, ...]
    soa_minimum: int


@dataclass(frozen=True, slots=True)
class Mismatch:
    """What an authoritative server shows is not wanted; `key` is None when it does not answer at all."""

    nameserver: Nameserver
    key: Key | None
    reason: str


class Publisher:
    """Reads, changes and verifies one pool's zone; it keeps no state between calls."""

    def __init__(self, policy: ZonePolicy, config: PrimaryConfig) -> None:
        self._policy = policy
        self._config = config
        self._apex = dns.name.from_text(policy.apex)
        self._tsig = dns.tsig.Key(config.tsig_name, config.tsig_secret, config.tsig_algorithm)

    async def observe(self) -> Observation:
        """The zone by AXFR."""
        with _primary_errors():
            async with asyncio.timeout(self._config.transfer_timeout):
                zone = await self._transfer()
                return await asyncio.to_thread(self._observation, zone)

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
            try:
                await self._exchange(update)
            except Conflict:
                if (held := await self.fence()) != epoch:
                    raise Fenced(f"the zone's epoch is {held}, ours is {epoch}") from None
                raise
            messages += 1
        return messages

    async def publish(self, wanted: Mapping[Key, RRset], epoch: int) -> Published:
        """Bring the zone to `wanted` and see it there; the fence must have been taken with `epoch`."""
        seen = first = await self.observe()
        failure: PublishError | None = None
        for _ in range(ATTEMPTS):
            if seen.epoch != str(epoch):
                raise Fenced(f"the zone's epoch is {seen.epoch}, ours is {epoch}")
            changes = diff(wanted, seen.zone)
            if not changes:
                return Published(seen.serial, diff(wanted, first.zone), seen.soa_minimum)
            try:
                await self.apply(changes, epoch)
                failure = Rejected(f"acknowledged but not kept: {changes[0].owner} {changes[0].rdtype}")
            except Conflict as conflict:
                failure = conflict
            seen = await self.observe()
        assert failure is not None
        raise failure

    async def verify(self, keys: Iterable[Key], wanted: Mapping[Key, RRset]) -> tuple[Mismatch, ...]:
        """Ask every authoritative server for each key: equal and signed, or absent, as `wanted` says.

        The answer is in the order of servers, then keys; a server that falls silent comes first, once.
        """
        asked = tuple(keys)
        found = await asyncio.gather(
            *(self._verify_at(nameserver, asked, wanted) for nameserver in self._config.nameservers)
        )
        return tuple(mismatch for mismatches in found for mismatch in mismatches)

    async def rehearse(self) -> datetime:
        """Ask for each kind of change that the publisher makes, so that nothing is changed.

        Each message deletes RRsets of which its prerequisites say that they do not exist. A primary checks the
        key first; Knot checks the rights before the prerequisites, BIND after them. Returns the primary's time.
        """
        trials = (
            (self._policy.domain("_trial"), ("A", "AAAA", "CAA")),  # no server can have this name
            (self._policy.challenge("_trial"), ("TXT",)),
            (self._policy.service, ("SRV",)),
            (self._policy.fence, ("TXT",)),
        )
        return [await self._trial(*trial) for trial in trials][-1]

    async def _trial(self, owner: str, rdtypes: tuple[str, ...]) -> datetime:
        update = self._update()
        for rdtype in rdtypes:
            update.absent(owner, rdtype)
        for rdtype in rdtypes:
            update.delete(owner, rdtype)
        try:
            answer = await self._exchange(update, *_UNMET)
        except Rejected as error:
            raise Rejected(f"{owner} {', '.join(rdtypes)}: {error}") from None
        assert answer.tsig is not None
        return datetime.fromtimestamp(answer.tsig[0].time_signed, UTC)

    async def serial(self) -> int:
        """The zone's serial on the primary."""
        query = dns.message.make_query(self._apex, "SOA", flags=0)
        query.use_tsig(self._tsig)
        soa = _answered(await self._exchange(query))
        if soa is None:
            raise Unreachable("the primary does not show the zone's SOA")
        serial: int = soa[0].serial
        return serial

    async def behind(self, serial: int) -> tuple[Mismatch, ...]:
        """The authoritative servers that have not come to `serial` yet, or do not say so."""
        found = await asyncio.gather(*(self._behind(server, serial) for server in self._config.nameservers))
        return tuple(mismatch for mismatch in found if mismatch is not None)

    async def _behind(self, nameserver: Nameserver, serial: int) -> Mismatch | None:
        try:
            soa = _answered(await self._question(nameserver, (self._policy.apex, "SOA")))
        except Unreachable as silence:
            return Mismatch(nameserver, None, str(silence))
        if soa is None:
            return Mismatch(nameserver, None, "does not show the zone's SOA")
        if dns.serial.Serial(soa[0].serial) < dns.serial.Serial(serial):
            return Mismatch(nameserver, None, f"has the serial {soa[0].serial} instead of {serial}")
        return None

    async def _transfer(self) -> dns.zone.Zone:
        """The whole zone by a signed transfer (RFC 5936); parsed in threads, as that takes seconds."""
        to = self._config
        zone = dns.zone.Zone(self._apex, relativize=False)
        query, _ = dns.xfr.make_query(zone, serial=None, keyring=self._tsig)
        async with asyncio.timeout(to.timeout):
            # The stream goes on reading while a message is parsed: primaries give up on one that stalls
            # (Knot after half a second).
            reader, writer = await asyncio.open_connection(to.address, to.port, limit=TRANSFER_BUFFER)
        try:
            writer.write(query.to_wire(prepend_length=True))
            done, signing = False, None
            with dns.xfr.Inbound(zone) as inbound:
                while not done:
                    async with asyncio.timeout(to.timeout):
                        size = int.from_bytes(await reader.readexactly(2), "big")
                        octets = await reader.readexactly(size)
                    message = await asyncio.to_thread(_transferred, query, octets, signing)
                    done = await asyncio.to_thread(inbound.process_message, message)
                    signing = message.tsig_ctx
        finally:
            writer.close()
        return zone

    def _observation(self, zone: dns.zone.Zone) -> Observation:
        found: Zone = {}
        for name, rdataset in zone.iterate_rdatasets():
            owner, rdtype = name.to_text().lower(), dns.rdatatype.to_text(rdataset.rdtype)
            if managed(owner, rdtype, self._policy):
                found[owner, rdtype] = _rrset(rdataset)
        soa = zone.get_soa()
        fence = zone.get_rdataset(self._policy.fence, "TXT")
        return Observation(soa.serial, found, soa.minimum, None if fence is None else _fence_text(fence))

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
        """One signed message to the primary and its signed answer; rcodes but NOERROR and `fine` raise."""
        with _primary_errors():
            to = self._config
            answer = await dns.asyncquery.tcp(message, to.address, to.timeout, to.port)
        if answer.rcode() not in {dns.rcode.NOERROR, *fine}:
            raise _refusal(answer.rcode())
        if not answer.had_tsig:
            raise Rejected("the primary's answer carries no TSIG signature")
        return answer

    async def _verify_at(
        self, nameserver: Nameserver, keys: tuple[Key, ...], wanted: Mapping[Key, RRset]
    ) -> list[Mismatch]:
        found: list[Mismatch] = []
        waiting = iter(keys)

        async def ask_in_turn() -> None:
            for key in waiting:
                answer = await self._question(nameserver, key)
                if (reason := _fault(answer, wanted.get(key))) is not None:
                    found.append(Mismatch(nameserver, key, reason))

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(VERIFY_CONCURRENCY):
                    group.create_task(ask_in_turn())
        except* Unreachable as silence:
            found.append(Mismatch(nameserver, None, str(silence.exceptions[0])))
        return sorted(found, key=lambda mismatch: mismatch.key or ())

    async def _question(self, to: Nameserver, key: Key) -> dns.message.Message:
        query = dns.message.make_query(*key, want_dnssec=True, payload=VERIFY_PAYLOAD, flags=0)
        timeout = self._config.timeout / VERIFY_TRIES
        failure = Unreachable("not asked")
        for _ in range(VERIFY_TRIES):
            try:
                with _primary_errors():
                    answer, _ = await dns.asyncquery.udp_with_fallback(
                        query, to.address, timeout, to.port, ignore_unexpected=True, ignore_errors=True
                    )
                    return answer
            except Unreachable as unreachable:
                failure = unreachable
        raise failure


def _transferred(query: dns.message.Message, octets: bytes, signing: Any) -> dns.message.Message:
    """One message of a transfer; `signing` is the TSIG context after the one before, None for the first."""
    message = dns.message.from_wire(
        octets, keyring=query.keyring, request_mac=query.mac, xfr=True, tsig_ctx=signing, multi=True
    )
    if not query.is_response(message, xfr_continuation=signing is not None):
        raise dns.query.BadResponse
    return message


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


def _fence_text(rdataset: dns.rdataset.Rdataset) -> str:
    return " ".join(sorted(rdata.to_text().strip('"') for rdata in rdataset))


def _answered(answer: dns.message.Message) -> dns.rdataset.Rdataset | None:
    """The RRset that was asked for."""
    asked = answer.question[0]
    return answer.get_rrset(answer.answer, asked.name, dns.rdataclass.IN, asked.rdtype)


def _fault(answer: dns.message.Message, expected: RRset | None) -> str | None:
    """What is wrong with an authoritative server's answer, None when nothing is."""
    if answer.rcode() not in {dns.rcode.NOERROR, dns.rcode.NXDOMAIN}:
        return f"answers {dns.rcode.to_text(answer.rcode())}"
    if not answer.flags & dns.flags.AA:
        return "is not authoritative"
    shown = _answered(answer)
    if expected is None:
        return None if shown is None else "still shows the records"
    if shown is None:
        return "does not show the records"
    if _rrset(shown).rdatas != expected.rdatas:
        return "shows other records"
    if not any(rrset.covers == shown.rdtype for rrset in answer.answer):
        return "shows the records without a signature"
    return None


def _refusal(rcode: dns.rcode.Rcode) -> PublishError:
    """The error for an answer of the primary: a prerequisite that failed, a passing fault, or a refusal."""
    text = f"the primary answers {dns.rcode.to_text(rcode)}"
    if rcode in _UNMET:
        return Conflict(text)
    if rcode == dns.rcode.SERVFAIL:
        return Unreachable(text)
    return Rejected(text)


@contextmanager
def _primary_errors() -> Iterator[None]:
    """What dnspython and the system raise, in this module's words."""
    try:
        yield
    except dns.tsig.PeerBadKey:
        # Knot answers BADKEY to a known key that its acl does not allow the name or type as well.
        raise Rejected("the primary does not know the TSIG key, or does not grant it this") from None
    except dns.tsig.PeerBadSignature:
        raise Rejected("the primary refuses the TSIG signature: the secrets differ") from None
    except dns.tsig.PeerBadTime:
        raise Rejected("the primary refuses the TSIG time: one of the two clocks is wrong") from None
    except (dns.tsig.PeerError, dns.tsig.BadSignature, dns.tsig.BadTime, dns.message.UnknownTSIGKey) as error:
        raise Rejected(f"TSIG with the primary failed: {error}") from None
    except dns.xfr.TransferError as error:
        raise _refusal(error.rcode) from None
    except OSError as error:
        # Without the peer's address: alarms are public, and a primary may be hidden.
        reason = os.strerror(error.errno) if error.errno else type(error).__name__
        raise Unreachable(reason) from error
    except (EOFError, dns.exception.Timeout) as error:
        raise Unreachable(str(error) or type(error).__name__) from error
    except dns.exception.DNSException as error:
        raise Unreachable(f"not a usable answer: {error}") from error
