"""The agent's answers over TLS: each protocol and name, and nobody holds them up."""

import asyncio
import base64
import contextlib
import os
import ssl
import time

import pytest
from cryptography import x509

from member_agent.challenges import ChallengeError
from member_agent.tls_answers import AlpnResponder, Outcome, ProofResponder
from nts_core.control import PROOF_ALPN, TlsChallenge

NAME, OTHER = "alice.servers.pool.example", "alice.servers.other.example"
DIGEST, SECOND = "0123456789abcdef" * 4, "f" * 64
NONCE, SIGNATURE = "nonce-1", base64.b64encode(bytes(64))


@pytest.fixture
async def alpn():
    async with AlpnResponder(deadline=30) as responder:
        await responder.listen(("127.0.0.1", 0))
        responder.replace(NAME, (TlsChallenge(DIGEST),))
        yield responder


@pytest.fixture
async def proofs():
    async with ProofResponder(deadline=30) as responder:
        await responder.listen(("127.0.0.1", 0))
        responder.replace(NAME, {NONCE: SIGNATURE})
        yield responder


@contextlib.asynccontextmanager
async def connected(responder, alpn, name=NAME):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if alpn is not None:
        context.set_alpn_protocols([alpn])
    async with asyncio.timeout(10):
        reader, writer = await asyncio.open_connection(
            *responder.endpoints[0], ssl=context, server_hostname=name
        )
        try:
            yield reader, writer
        finally:
            writer.transport.abort()


async def leaf(responder, name=NAME):
    """The certificate that a CA sees, which closes then."""
    async with connected(responder, "acme-tls/1", name) as (reader, writer):
        der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        assert writer.get_extra_info("ssl_object").selected_alpn_protocol() == "acme-tls/1"
        assert await reader.read() == b""
    return x509.load_der_x509_certificate(der)


def identifier(certificate):
    (extension,) = (e for e in certificate.extensions if e.oid.dotted_string == "1.3.6.1.5.5.7.1.31")
    assert extension.critical
    return extension.value.value


async def counted(responder, outcome, count=1):
    end = time.monotonic() + 10
    while responder.counters[outcome] < count:
        assert time.monotonic() < end, responder.counters
        await asyncio.sleep(0.01)


async def test_the_challenges_certificate_is_that_of_rfc_8737(alpn):
    certificate = await leaf(alpn)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [name.value for name in names] == [NAME]
    assert identifier(certificate) == b"\x04\x20" + bytes.fromhex(DIGEST)
    certificate.verify_directly_issued_by(certificate)
    await counted(alpn, Outcome.SERVED)


async def test_the_last_challenge_counts_and_none_is_left_when_it_is_over(alpn):
    before = await leaf(alpn)
    alpn.replace(NAME, (TlsChallenge(DIGEST),))
    assert await leaf(alpn) == before, "the same challenge, the same certificate"
    alpn.replace(NAME, (TlsChallenge(DIGEST), TlsChallenge(SECOND)))
    assert identifier(await leaf(alpn)) == b"\x04\x20" + bytes.fromhex(SECOND)
    alpn.replace(NAME, ())
    with pytest.raises(ssl.SSLError):
        await leaf(alpn)


async def test_two_pools_have_their_challenges_at_a_time(alpn):
    alpn.replace(OTHER, (TlsChallenge(SECOND),))
    assert identifier(await leaf(alpn)) == b"\x04\x20" + bytes.fromhex(DIGEST)
    assert identifier(await leaf(alpn, OTHER)) == b"\x04\x20" + bytes.fromhex(SECOND)


@pytest.mark.parametrize(
    ("protocol", "name"),
    [("ntske/1", NAME), (None, NAME), ("acme-tls/1", "bob.servers.pool.example"), ("acme-tls/1", None)],
)
async def test_other_protocols_and_names_get_no_certificate(alpn, protocol, name):
    if protocol is None:
        # Without ALPN the handshake goes through, and nothing is said.
        async with connected(alpn, None) as (reader, _):
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                assert await reader.read() == b""
    else:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            async with connected(alpn, protocol, name or "127.0.0.1"):
                pass
    await counted(alpn, Outcome.TLS_FAILED)


@pytest.mark.parametrize("digest", ["", "0" * 63, "0" * 65, "F" * 64, "g" * 64, "0" * 64 + "\n"])
def test_a_digest_of_another_form_is_refused_and_changes_nothing(digest):
    responder = AlpnResponder()
    responder.replace(NAME, (TlsChallenge(DIGEST),))
    with pytest.raises(ChallengeError, match="SHA-256"):
        responder.replace(NAME, (TlsChallenge(SECOND), TlsChallenge(digest)))
    assert responder._digests == {NAME: DIGEST}


async def ask(responder, line, name=NAME):
    async with connected(responder, PROOF_ALPN, name) as (reader, writer):
        writer.write(line)
        return await reader.read()


async def test_a_nonce_gets_its_signature(proofs):
    assert await ask(proofs, NONCE.encode() + b"\n") == SIGNATURE + b"\n"
    await counted(proofs, Outcome.SERVED)


async def test_a_nonce_in_pieces(proofs):
    async with connected(proofs, PROOF_ALPN) as (reader, writer):
        for octet in NONCE.encode() + b"\n":
            writer.write(bytes((octet,)))
            await writer.drain()
        assert await reader.read() == SIGNATURE + b"\n"


@pytest.mark.parametrize("line", [b"nonce-2\n", b"\n", b"\xff\xfe\n", NONCE.encode() + b" \n"])
async def test_a_nonce_that_was_never_asked_for_gets_nothing(proofs, line):
    assert await ask(proofs, line) == b"\n"
    await counted(proofs, Outcome.UNKNOWN)


async def test_a_line_without_end_is_cut(proofs):
    assert await ask(proofs, b"n" * 201) == b""
    await counted(proofs, Outcome.TOO_LONG)


async def test_a_name_that_is_not_ours_proves_nothing(proofs):
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await ask(proofs, NONCE.encode() + b"\n", OTHER)
    proofs.forget(NAME)
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await ask(proofs, NONCE.encode() + b"\n")


@pytest.mark.parametrize("make", [AlpnResponder, ProofResponder])
async def test_garbage_is_an_outcome(make):
    async with make(deadline=30) as responder:
        await responder.listen(("127.0.0.1", 0))
        for octets in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(5000), b"\x16\x03\x01" + bytes(300)):
            reader, writer = await asyncio.open_connection(*responder.endpoints[0])
            writer.write(octets)
            writer.write_eof()
            async with asyncio.timeout(10):
                with contextlib.suppress(ConnectionError):
                    await reader.read()
            writer.transport.abort()
        await counted(responder, Outcome.TLS_FAILED, 3)


async def test_idle_connections_make_room_for_a_validation(alpn):
    """More than the limit, none of which says anything."""
    small = AlpnResponder(limit=5, deadline=60)
    async with small:
        await small.listen(("127.0.0.1", 0))
        small.replace(NAME, (TlsChallenge(DIGEST),))
        idle = [await asyncio.open_connection(*small.endpoints[0]) for _ in range(20)]
        assert identifier(await leaf(small))
        await counted(small, Outcome.EVICTED, 16)
        for _, writer in idle:
            writer.transport.abort()


async def test_a_peer_that_says_nothing_is_ended_by_the_deadline():
    async with ProofResponder(deadline=0.2) as responder:
        await responder.listen(("127.0.0.1", 0))
        responder.replace(NAME, {})
        async with connected(responder, PROOF_ALPN) as (reader, _):
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                assert await reader.read() == b""
        await counted(responder, Outcome.TIMEOUT)
