"""How drawn answer sets reach who answers: many SRV RRsets for one owner name, of which each question gets one.

They are no zone state, since they are drawn anew each TTL: they go to the embedded server beside the zone, as parts of a draw
in updates under the publisher's key and the leader's fence, and from there to the edges (`poolsvc.edge`). Other primaries
have no place for them, and answer with the zone's own RRset.

Which draw a nameserver answers from it says itself: the TXT of the marker is the draw's token, or `NO_DRAW`.
"""

import asyncio
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import dns.name
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.rrset

from poolsvc.nameserver import records
from poolsvc.nameserver.sets import NO_DRAW, Head, Malformed, encode
from poolsvc.primary import PublishError, Unreachable
from poolsvc.publisher import Draw, Publisher
from poolsvc.zone import SRV_PRIORITY_AND_WEIGHT, Key, ZonePolicy

AnswerSets = Mapping[str, Sequence[Sequence[str]]]
"""By owner name (absolute, lower-case) the sets, each of one to eight names of servers."""

_TYPE = dns.rdatatype.RdataType.make(records.SETS)
_MESSAGE = 32_000  # octets of sets; some 250 sets of eight, which the server signs before it answers
_WITHIN = 60.0  # seconds for a whole draw

_Record = tuple[str, bytes]
"""Owner and data."""


class NoSink(PublishError):
    """The primary has no place for answer sets; it is not the embedded server, or an older one."""

    code = "no-sink"


def marker(policy: ZonePolicy) -> str:
    """The owner of the TXT that tells from which draw a nameserver answers."""
    return f"_draw.{policy.apex}"


def draw_of(policy: ZonePolicy, owners: Iterable[str], tokens: Iterable[str]) -> Draw:
    """What `Publisher.verify` has to know: the owners that were drawn for, and the draws that count."""
    return Draw(marker(policy), frozenset(tokens), frozenset((owner, "SRV") for owner in owners))


async def in_place(publisher: Publisher, keys: Iterable[Key]) -> Draw:
    """The draw that the primary answers from, for some keys of the zone; one of no token without it. Raises PublishError."""
    try:
        token = await Sink(publisher).token()
    except NoSink:
        token = NO_DRAW
    owners = (owner for owner, rdtype in keys if rdtype == "SRV")
    return draw_of(publisher.policy, owners, {token} - {NO_DRAW})


class Sink:
    """The embedded server as the place for answer sets, here or on another host; it keeps no state between calls."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher

    async def publish(self, sets: AnswerSets, draw: int, epoch: int) -> str:
        """Put a draw in place of the one before, all of it at once; its token.

        The fence must have been taken with `epoch`. The same draw again changes nothing. Without sets each owner answers
        with the zone's RRset. Every server that is named must have an address in the zone, else Conflict, and the draw
        before stays. Raises PublishError, of it NoSink where there is no place for it.
        """
        policy = self._publisher.policy
        parts = await asyncio.to_thread(lambda: list(_parts(sets, policy)))
        digest = hashlib.sha256(b"".join(data for part in parts for _, data in part)).hexdigest()
        token = f"{draw}-{digest[:16]}"
        try:
            async with asyncio.timeout(_WITHIN):
                if await self.token() != token:
                    await self._put(parts, token, epoch)
        except TimeoutError:
            raise Unreachable(f"the answer sets were not taken within {_WITHIN:g} s") from None
        return token

    async def token(self) -> str:
        """Of the draw that is in place, `NO_DRAW` without one. Raises PublishError, of it NoSink."""
        policy = self._publisher.policy
        known = dns.rrset.from_rdata(policy.apex, 0, _rdata(Head(0, 1, NO_DRAW).encode()))
        answer = await self._publisher.ask(policy.apex, _TYPE.name, known)
        for rrset in answer.answer:
            if rrset.rdtype == _TYPE:
                try:
                    return Head.decode(records.canonical(rrset[0])).draw
                except Malformed as error:
                    raise NoSink(f"the primary answers no draw: {error}") from None
        raise NoSink("the primary takes no answer sets: only the embedded server does")

    async def _put(self, parts: Sequence[Sequence[_Record]], token: str, epoch: int) -> None:
        policy = self._publisher.policy
        here = marker(policy)
        # In the zone too, so that NSEC knows the name, and secondaries that answer from the zone alone say so.
        no_draw = dns.rdata.from_text(dns.rdataclass.IN, dns.rdatatype.TXT, f'"{NO_DRAW}"')
        await self._publisher.hand([(here, 0, no_draw)], epoch)
        for index, part in enumerate(parts):
            head = here, 0, _rdata(Head(index, len(parts), token).encode())
            found = ((owner, policy.srv_ttl, _rdata(data)) for owner, data in part)
            await self._publisher.hand((head, *found), epoch)


def _parts(sets: AnswerSets, policy: ZonePolicy) -> Iterator[list[_Record]]:
    """The records of each message, one without any when there are no sets."""
    part, octets = list[_Record](), 0
    for record in _records(sets, policy):
        if part and octets + len(record[1]) > _MESSAGE:
            yield part
            part, octets = [], 0
        part.append(record)
        octets += len(record[0]) + len(record[1])
    yield part


def _records(sets: AnswerSets, policy: ZonePolicy) -> Iterator[_Record]:
    apex = records.to_wire(dns.name.from_text(policy.apex))
    begins = b"".join(
        int(word).to_bytes(2, "big") for word in f"{SRV_PRIORITY_AND_WEIGHT} {policy.ke_port}".split()
    )
    above = records.to_wire(dns.name.from_text(policy.servers))
    for owner, some in sets.items():
        rdatas = [
            [begins + bytes((len(name),)) + name.encode() + above for name in names]
            for names in some
            if names
        ]
        for data in encode(apex, rdatas):
            yield owner, data


def _rdata(data: bytes) -> dns.rdata.Rdata:
    return dns.rdata.GenericRdata(dns.rdataclass.IN, _TYPE, data)
