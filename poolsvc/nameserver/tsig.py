"""Signed messages (TSIG, RFC 8945): who sent one, and the signature of what is sent back. dnspython does the rest."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import dns.exception
import dns.message
import dns.name
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.tsig
from dns.rdtypes.ANY.TSIG import TSIG

_FUDGE = 300
_sign: Any = dns.tsig.sign  # without types in the library
_HEAD = struct.Struct("!HHIH")
_ERRORS: Mapping[type[Exception], dns.rcode.Rcode] = {
    dns.message.UnknownTSIGKey: dns.rcode.BADKEY,
    dns.tsig.BadKey: dns.rcode.BADKEY,
    dns.tsig.BadAlgorithm: dns.rcode.BADKEY,
    dns.tsig.BadSignature: dns.rcode.BADSIG,
    dns.tsig.BadTime: dns.rcode.BADTIME,
}

Keys = Mapping[dns.name.Name, dns.tsig.Key]


class Unproved(Exception):
    """A signed message that is not of who it says; `reply` tells why (RFC 8945 section 5.2)."""

    def __init__(self, reply: bytes, reason: str) -> None:
        super().__init__(reason)
        self.reply = reply


@dataclass(slots=True)
class Signer:
    """Signs the messages of one reply, each with what was said before."""

    key: dns.tsig.Key
    request_mac: bytes
    identifier: int
    _context: Any = field(default=None)

    def sign(self, message: bytes, now: int, *, is_one_of_many: bool = False) -> bytes:
        data = _data(self.key.algorithm, now, self.identifier)
        signed, context = _sign(message, self.key, data, now, self.request_mac, self._context, is_one_of_many)
        self._context = context if is_one_of_many else None
        return _with(message, self.key.name, signed)


def read(wire: bytes, keys: Keys, now: int) -> tuple[dns.message.Message, Signer | None]:
    """A message, and who signs the reply if it was signed. Raises Unproved, dns.exception.DNSException."""
    try:
        message = dns.message.from_wire(wire, keyring=dict(keys), one_rr_per_rrset=True)
    except tuple(_ERRORS) as error:
        raise Unproved(_refusal(wire, type(error), keys, now), type(error).__name__) from None
    if not message.had_tsig:
        return message, None
    assert isinstance(message.keyring, dns.tsig.Key)
    assert message.mac is not None
    return message, Signer(message.keyring, message.mac, message.id)


def _refusal(wire: bytes, error: type[Exception], keys: Keys, now: int) -> bytes:
    """NOTAUTH with the TSIG error; signed where the key is known and only the time is wrong."""
    message = dns.message.from_wire(wire, keyring=lambda _message, _name: False, one_rr_per_rrset=True)
    assert message.tsig is not None
    sent = message.tsig[0]
    reply = dns.message.make_response(message)
    reply.set_rcode(dns.rcode.NOTAUTH)
    octets = reply.to_wire()
    is_late = error is dns.tsig.BadTime
    other = now.to_bytes(6, "big") if is_late else b""
    data = _data(sent.algorithm, sent.time_signed, sent.original_id, error=_ERRORS[error], other=other)
    if is_late:
        data, _ = _sign(octets, keys[message.tsig.name], data, sent.time_signed, sent.mac)
    return _with(octets, message.tsig.name, data)


def _data(
    algorithm: dns.name.Name,
    time: int,
    identifier: int,
    *,
    error: int = dns.rcode.NOERROR,
    other: bytes = b"",
) -> Any:
    """A TSIG record's data, not signed yet."""
    make: Any = TSIG
    return make(
        dns.rdataclass.ANY, dns.rdatatype.TSIG, algorithm, time, _FUDGE, b"", identifier, error, other
    )


def _with(message: bytes, owner: dns.name.Name, data: Any) -> bytes:
    """The message with a TSIG record at its end."""
    name, octets = owner.to_wire(), data.to_wire()
    assert name is not None
    assert octets is not None
    count = int.from_bytes(message[10:12], "big") + 1
    head = _HEAD.pack(dns.rdatatype.TSIG, dns.rdataclass.ANY, 0, len(octets))
    return b"".join((message[:10], count.to_bytes(2, "big"), message[12:], name, head, octets))
