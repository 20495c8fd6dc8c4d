"""Target of TLS: octets that are no TLS, before, within and after a handshake (RFC 8915 section 3).

An input begins with two octets: what happens, and in pieces of how many octets the rest is fed (0: all at once).
"""

import datetime as dt
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from fuzz.target import OracleError, Plan, Target, hold, pieces
from lab.certificates import Authority
from nts_core.errors import CertificateError, TlsError
from nts_core.tls import ServerCredentials, ServerKey, TlsChannel, Trust, client_channel

_NAME = "ntp.example"
_AT_CLIENT = 1  # whether the client is the one to suffer, else the server
# The next two bits: how many rounds of true octets go to and fro beforehand; two establish both ends.
_ALTERS = 8  # the rest changes what the peer says next (octet by octet), else it comes instead
_SAID = b"a request"
# More than any flight is long: where an end stops reading does not matter.
_LONGEST = 2048


@cache
def _credentials() -> tuple[ServerCredentials, Trust]:
    with tempfile.TemporaryDirectory() as directory:
        authority = Authority(Path(directory))
        pair = authority.issue(_NAME)
        chain = x509.load_pem_x509_certificates(pair.cert.read_bytes())
        key = load_pem_private_key(pair.key.read_bytes(), None)
        assert isinstance(key, ServerKey)
        roots = x509.load_pem_x509_certificates(authority.root.read_bytes())
    return ServerCredentials(chain, key), Trust.of(roots, dt.datetime.now(dt.UTC))


def _tls(data: bytes) -> str:
    plan = Plan(data)
    how, length, octets = plan.octet(), plan.octet(), plan.rest()
    credentials, trust = _credentials()
    client, server = client_channel(_NAME, trust), credentials.channel()
    sufferer, peer = (client, server) if how & _AT_CLIENT else (server, client)
    client.receive(b"")
    for _ in range(how >> 1 & 3):
        server.receive(client.to_send())
        client.receive(server.to_send())
    was_established = sufferer.established
    if was_established and peer.established:
        peer.send(_SAID)
    is_true = False
    if how & _ALTERS:
        flight = peer.to_send()
        masks = octets.ljust(len(flight), b"\0")
        octets = bytes(a ^ b for a, b in zip(flight, masks, strict=False)) + masks[len(flight) :]
        is_true = octets == flight
    return _suffer(sufferer, pieces(octets, length), is_true=is_true)


def _suffer(channel: TlsChannel, said: Iterator[bytes], *, is_true: bool) -> str:
    """What becomes of an end that is told `said`, which is what its peer said if `is_true`."""
    plaintext, was_established = b"", channel.established
    try:
        for piece in said:
            plaintext += channel.receive(piece)
    except CertificateError:
        raise OracleError("who signed the handshake has the certificate") from None
    except TlsError:
        hold(not plaintext or was_established, "nothing is read of a session that is not established")
        hold(not is_true, "what was not altered is accepted")
        _finish(channel)
        return "broken-late" if was_established else "broken"
    hold(not plaintext or was_established, "nothing is read of a session that is not established")
    hold(plaintext in {b"", _SAID}, "nothing is read but what the peer said")
    _finish(channel)
    if plaintext:
        return "read"
    return "established" if channel.established else "waiting"


def _finish(channel: TlsChannel) -> None:
    """What a shell does with a session that is over."""
    channel.close()
    channel.to_send()


TARGETS = (
    Target(
        "tls",
        "Only TlsError; nothing is read but what the peer said; a session that broke can be closed.",
        _tls,
        frozenset({"broken", "broken-late", "waiting", "established", "read"}),
        longest=_LONGEST,
    ),
)
