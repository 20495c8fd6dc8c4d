"""Our client against a server that breaks the rules in one named way at a time (`lab.saboteur`).

The tables of the saboteur say what has to come of each; what is asserted here is that it does, that nothing hostile
is kept, that the next honest answer is used, and that plain NTP is never asked.
"""

import asyncio
import contextlib
import secrets
import socket
import time
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from hypothesis import assume, given
from hypothesis import strategies as st

from lab.certificates import Authority
from lab.programs import run
from lab.saboteur import KE_SABOTAGES, NAME, NTP_SABOTAGES, STALL, TRUTH, Fate, Saboteur
from nts_core.aead import KEY_LENGTH, SUPPORTED, SessionKeys
from nts_core.association import MAX_REQUEST, Association
from nts_core.cli import ExitStatus
from nts_core.client import ClientError, Failure, establish, exchange, measure
from nts_core.cookies import MAX_COOKIES, Keyring
from nts_core.errors import KeError, KissOfDeath, NotAuthentic, WireError
from nts_core.ke import KeClient, KeResult, KeServer, KeTerms, NtpEndpoint, NtpService
from nts_core.packet import MAX_DATAGRAM, ClockState, Leap, Packet
from nts_core.server import NtpServer
from nts_core.tls import Trust

# For what has to come by itself, however slow this machine is now; less than the saboteur's own patience.
PATIENCE = STALL / 2
# For what only the client's deadline ends; long enough that a hint comes before it.
SHORT = 0.5
# A lie is an hour off: whatever is nearer to the truth is the truth.
NEAR = 60 * 1_000_000_000
# RFC 8915 section 4: these end before the client may ask for anything.
BEFORE_THE_REQUEST = {
    "reset-before-tls",
    "silence-before-tls",
    "not-tls",
    "drop-before-tls",
    "close-within-the-handshake",
    "tls-1-2-only",
    "no-alpn",
    "other-alpn",
    "wrong-name",
    "expired",
    "not-yet-valid",
    "self-signed",
    "other-ca",
}


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def roots(authority):
    return x509.load_pem_x509_certificates(authority.root.read_bytes())


@pytest.fixture
def trust(roots):
    return Trust.of(roots, datetime.now(UTC))


@pytest.fixture(scope="module")
def running(authority):
    with Saboteur(authority) as saboteur:
        yield saboteur


@pytest.fixture
def saboteur(running):
    running.reset()
    yield running
    running.reset()


async def established(saboteur, trust, timeout=PATIENCE):
    return await establish(NAME, saboteur.address, saboteur.ke_port, trust, timeout=timeout)


async def exchanged(association, saboteur, timeout=PATIENCE):
    return await exchange(association, saboteur.address, saboteur.ntp_port, timeout=timeout)


def is_true(sample):
    return abs(sample.offset - TRUTH) < NEAR and sample.stratum == 2


async def settled(saboteur):
    """In another thread, as asyncio closes a client's socket only when its loop turns."""
    return await asyncio.to_thread(saboteur.settle)


def cookies_held(association):
    return list(association.jar)


def made_for(saboteur, association_keys, cookies):
    """Whether the keyring made all these cookies for this session."""
    return all(saboteur.keyring.open(cookie) == association_keys for cookie in cookies)


async def serves_honestly(saboteur, trust):
    """What went before has left nothing behind: the next key establishment and exchange are good."""
    saboteur.reset()
    found = await established(saboteur, trust)
    assert is_true(await exchanged(Association(found.result, secrets.token_bytes), saboteur))


# Key establishment

REFUSED = {name: entry for name, entry in KE_SABOTAGES.items() if entry.failure is not None}
ACCEPTED = {name: entry for name, entry in KE_SABOTAGES.items() if entry.failure is None}


@pytest.mark.parametrize("sabotage", REFUSED.values(), ids=REFUSED)
async def test_key_establishment_that_fails(saboteur, trust, sabotage):
    saboteur.ke = sabotage
    with pytest.raises(ClientError) as caught:
        await established(saboteur, trust, SHORT if sabotage.waits else PATIENCE)
    error, counted = caught.value, await settled(saboteur)
    assert error.code == sabotage.failure
    assert sabotage.says in error.message
    assert error.remedy
    assert counted.connections == 1
    assert counted.ke_requests == (0 if sabotage.name in BEFORE_THE_REQUEST else counted.ke_requests)
    assert (counted.nts_requests, counted.plain_requests, counted.outlasted) == (0, 0, 0)
    await serves_honestly(saboteur, trust)


def test_what_ends_before_the_request_is_in_the_table():
    assert set(KE_SABOTAGES) > BEFORE_THE_REQUEST


@pytest.mark.parametrize("sabotage", ACCEPTED.values(), ids=ACCEPTED)
async def test_key_establishment_that_holds(saboteur, trust, sabotage):
    saboteur.ke = sabotage
    found = await established(saboteur, trust)
    assert 1 <= len(found.result.cookies) <= sabotage.kept
    assert all(1 <= len(cookie) <= 256 for cookie in found.result.cookies)
    if sabotage.useful:
        measurement = await measure(found, 1)
        assert [is_true(sample) for sample in measurement.samples] == [True]
    else:
        association = Association(found.result, secrets.token_bytes)
        with pytest.raises(KissOfDeath) as caught:
            await exchanged(association, saboteur, SHORT)
        assert (caught.value.code, caught.value.authentic) == ("NTSN", False)
    counted = await settled(saboteur)
    assert (counted.ke_requests, counted.plain_requests) == (1, 0)
    assert counted.nts_requests


async def test_only_the_date_is_wrong_with_expired_certificates(saboteur, roots):
    """The certificates of the table are refused for nothing else: at another time they are good."""
    now = datetime.now(UTC)
    for name, at in (("expired", now - timedelta(hours=2)), ("not-yet-valid", now + timedelta(hours=2))):
        saboteur.reset()
        saboteur.ke = KE_SABOTAGES[name]
        assert len((await established(saboteur, Trust.of(roots, at))).result.cookies) == MAX_COOKIES


@pytest.mark.parametrize(
    ("name", "count"),
    [("exactly-64-kib", 8), ("more-than-eight-cookies", 8), ("one-zero-length-cookie", 7), ("one-cookie", 1)],
)
async def test_how_many_cookies_are_kept(saboteur, trust, name, count):
    saboteur.ke = KE_SABOTAGES[name]
    found = await established(saboteur, trust)
    assert len(found.result.cookies) == count
    assert made_for(saboteur, found.result.keys, found.result.cookies)


async def test_requests_with_cookies_of_any_length_are_well_formed(saboteur, trust):
    saboteur.ke = KE_SABOTAGES["cookies-of-different-lengths"]
    found = await established(saboteur, trust)
    association = Association(found.result, secrets.token_bytes)
    for cookie in found.result.cookies:
        request = association.poll()
        assert len(request) <= MAX_REQUEST
        assert Packet.decode(request).fields[1].value.rstrip(b"\0") == cookie.rstrip(b"\0")


# NTP


async def prepared(saboteur, trust, sabotage, algorithm=SUPPORTED[0]):
    """An association that has had one true answer, and whose next request meets the sabotage."""
    saboteur.algorithm = algorithm
    found = await established(saboteur, trust)
    association = Association(found.result, secrets.token_bytes)
    assert is_true(await exchanged(association, saboteur))
    saboteur.ntp = sabotage
    return association, found.result.keys


def of_fate(*fates):
    chosen = {name: entry for name, entry in NTP_SABOTAGES.items() if entry.fate in fates}
    return pytest.mark.parametrize("sabotage", chosen.values(), ids=chosen)


@of_fate(Fate.IGNORED, Fate.HINT)
async def test_lies_alone_change_nothing(saboteur, trust, sabotage):
    """The deadline ends it, no cookie came, and the request is still open for its true answer."""
    association, _keys = await prepared(saboteur, trust, sabotage)
    before = cookies_held(association)
    error = ClientError if sabotage.fate is Fate.IGNORED else KissOfDeath
    with pytest.raises(error) as caught:
        await exchanged(association, saboteur, SHORT if sabotage.fate is Fate.HINT else SHORT / 2)
    if isinstance(caught.value, ClientError):
        assert caught.value.code == Failure.NTP
        assert "no authentic answer" in caught.value.message
    else:
        assert (caught.value.code, caught.value.authentic) == (sabotage.kiss, False)
    assert cookies_held(association) == before[1:]
    now = time.time_ns()
    assert is_true(association.receive(saboteur.last_truth, sent=now, received=now))
    counted = await settled(saboteur)
    assert (counted.nts_requests, counted.plain_requests) == (2, 0)


@of_fate(Fate.IGNORED, Fate.HINT)
@pytest.mark.parametrize("algorithm", SUPPORTED, ids=lambda algorithm: str(int(algorithm)))
async def test_the_true_answer_after_lies_is_taken(saboteur, trust, algorithm, sabotage):
    association, keys = await prepared(saboteur, trust, sabotage, algorithm)
    assert keys.aead == algorithm
    saboteur.truth_follows = True
    assert is_true(await exchanged(association, saboteur))
    held = cookies_held(association)
    assert len(held) == MAX_COOKIES
    assert made_for(saboteur, keys, held)
    # Nor is anything left that would spoil what comes after.
    saboteur.ntp = None
    assert is_true(await exchanged(association, saboteur))
    counted = await settled(saboteur)
    assert (counted.nts_requests, counted.plain_requests) == (3, 0)


@of_fate(Fate.KISS)
async def test_an_authentic_kiss_ends_it_at_once(saboteur, trust, sabotage):
    association, keys = await prepared(saboteur, trust, sabotage)
    with pytest.raises(KissOfDeath) as caught:
        await exchanged(association, saboteur)
    assert (caught.value.code, caught.value.authentic) == (sabotage.kiss, True)
    assert made_for(saboteur, keys, cookies_held(association))
    counted = await settled(saboteur)
    assert (counted.nts_requests, counted.plain_requests) == (2, 0)


# How many cookies are held after one went out: what came back beyond the eighth, or not at all.
HELD = {"no-cookies-back": 7, "zero-length-cookies-back": 7, "oversized-cookies-back": 7}


@of_fate(Fate.TAKEN)
async def test_the_true_answer_in_odd_clothes_is_taken(saboteur, trust, sabotage):
    association, keys = await prepared(saboteur, trust, sabotage)
    assert is_true(await exchanged(association, saboteur))
    held = cookies_held(association)
    assert len(held) == HELD.get(sabotage.name, MAX_COOKIES)
    if sabotage.name != "swapped-cookies-back":
        assert made_for(saboteur, keys, held)
    saboteur.ntp = None
    assert is_true(await exchanged(association, saboteur))


async def test_an_answer_counts_once(saboteur, trust):
    association, _keys = await prepared(saboteur, trust, None)
    held = cookies_held(association)
    with pytest.raises(NotAuthentic):
        association.receive(saboteur.last_truth, sent=0, received=0)
    assert cookies_held(association) == held


async def test_another_clients_cookie_gets_no_time(saboteur, trust):
    """It was sealed, so it was kept; when its turn comes there is NTSN, a hint, and the cookies after it are good."""
    association, _keys = await prepared(saboteur, trust, NTP_SABOTAGES["swapped-cookies-back"])
    assert is_true(await exchanged(association, saboteur))
    saboteur.ntp = None
    for _ in range(MAX_COOKIES - 1):
        assert is_true(await exchanged(association, saboteur))
    with pytest.raises(KissOfDeath) as caught:
        await exchanged(association, saboteur, SHORT)
    assert not caught.value.authentic
    assert is_true(await exchanged(association, saboteur))


# Measurements


@pytest.mark.parametrize("name", ["plain-ntp", "flood-of-garbage"])
async def test_a_measurement_ends_without_a_sample(saboteur, trust, name):
    found = await established(saboteur, trust)
    saboteur.ntp = NTP_SABOTAGES[name]
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(ClientError) as caught:
            await measure(found, 1)
    assert caught.value.code == Failure.NTP
    assert (await settled(saboteur)).plain_requests == 0


async def test_a_measurement_among_lies(saboteur, trust):
    found = await established(saboteur, trust)
    saboteur.ntp, saboteur.truth_follows = NTP_SABOTAGES["flood-of-garbage"], True
    measurement = await measure(found, 4)
    assert all(is_true(sample) for sample in measurement.samples)
    assert len(measurement.samples) == 4


async def test_samples_are_not_lost_with_the_last_cookie(saboteur, trust):
    """A server that gives one cookie and none back leaves us with one sample, which is as true as any."""
    saboteur.ke, saboteur.ntp = KE_SABOTAGES["one-cookie"], NTP_SABOTAGES["no-cookies-back"]
    measurement = await measure(await established(saboteur, trust), 4)
    assert [is_true(sample) for sample in measurement.samples] == [True]


async def test_a_hint_costs_one_exchange(saboteur, trust):
    """Anybody may forge NTSN, so that it must not cost more than a lost packet (RFC 8915 section 5.7)."""
    saboteur.ke = KE_SABOTAGES["one-swapped-cookie"]
    measurement = await measure(await established(saboteur, trust), 4)
    assert [is_true(sample) for sample in measurement.samples] == [True] * 4
    assert (await settled(saboteur)).nts_requests == 5


async def test_other_work_goes_on_while_garbage_waits(saboteur, trust):
    """The loop turns between two datagrams: else garbage that comes faster than it can be checked stops deadlines."""
    association = Association((await established(saboteur, trust)).result, secrets.token_bytes)
    count = 100
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((saboteur.address, 0))
        server.setblocking(False)
        waiting = asyncio.create_task(
            exchange(association, saboteur.address, server.getsockname()[1], timeout=PATIENCE)
        )
        # After one turn it has asked and waits.
        await asyncio.sleep(0)
        request, peer = server.recvfrom(MAX_DATAGRAM)
        for _ in range(count):
            server.sendto(b"garbage", peer)
        server.sendto(saboteur.honest_reply(request), peer)
        turns = 0
        while not waiting.done():
            turns += 1
            await asyncio.sleep(0)
    assert is_true(await waiting)
    assert turns >= count


# The program

PROGRAM = {
    "drop-before-tls": (ExitStatus.NOT_ESTABLISHED, Failure.TLS),
    "stall-before-the-answer": (ExitStatus.NOT_ESTABLISHED, Failure.TLS),
    "no-alpn": (ExitStatus.NOT_ESTABLISHED, Failure.TLS),
    "wrong-name": (ExitStatus.NOT_ESTABLISHED, Failure.CERTIFICATE),
    "error-0": (ExitStatus.NOT_ESTABLISHED, Failure.KE),
    "endless-records": (ExitStatus.NOT_ESTABLISHED, Failure.KE),
    "swapped-cookies": (ExitStatus.NO_TIME, Failure.KISS),
    "bit-flip": (ExitStatus.NO_TIME, Failure.NTP),
    "flood-of-garbage": (ExitStatus.NO_TIME, Failure.NTP),
    "authentic-kiss-of-control-characters": (ExitStatus.NO_TIME, Failure.KISS),
}


def asked_by_program(saboteur, authority):
    done = run(
        "pool-client",
        "query",
        f"{NAME}:{saboteur.ke_port}",
        f"--address={saboteur.address}",
        f"--ca={authority.root}",
        "--samples=1",
        "--json",
        deadline=2 * PATIENCE,
    )
    assert "Traceback" not in done.stderr
    assert len(done.stdout.splitlines()) == 1
    return done


@pytest.mark.parametrize(("name", "ending"), PROGRAM.items(), ids=PROGRAM)
def test_the_program_fails(saboteur, authority, name, ending):
    saboteur.ke, saboteur.ntp = KE_SABOTAGES.get(name), NTP_SABOTAGES.get(name)
    done = asked_by_program(saboteur, authority)
    assert (done.status, done.document["error"]["code"]) == ending
    assert done.document["authenticated"] is False
    assert done.document["offset_ns"] is None
    counted = saboteur.settle()
    assert (counted.plain_requests, counted.outlasted) == (0, 0)


@pytest.mark.parametrize("name", ["exactly-64-kib", "bit-flip", "forged-ntsn", "flood-of-garbage"])
def test_the_program_succeeds_all_the_same(saboteur, authority, name):
    saboteur.ke, saboteur.ntp = KE_SABOTAGES.get(name), NTP_SABOTAGES.get(name)
    saboteur.truth_follows = True
    done = asked_by_program(saboteur, authority)
    assert (done.status, done.document["authenticated"]) == (ExitStatus.OK, True)
    assert abs(done.document["offset_ns"] - TRUTH) < NEAR
    assert saboteur.settle().plain_requests == 0


# Properties

CLOCK = ClockState(Leap.NONE, 2, -20, 0, 0, b"TRUE", 0)


def asked_and_answered(algorithm):
    """An association that waits, and the true answer to its request."""
    keyring = Keyring.new(0, secrets.token_bytes)
    keys = SessionKeys(algorithm, *(secrets.token_bytes(KEY_LENGTH[algorithm]) for _ in range(2)))
    cookies = keyring.seal_many(keys, secrets.token_bytes((MAX_COOKIES - 2) * 16))
    association = Association(KeResult(keys, tuple(cookies)), secrets.token_bytes)
    reply = NtpServer(keyring, secrets.token_bytes).respond(
        association.poll(), received=TRUTH, transmit_time=lambda: TRUTH, clock=CLOCK
    )
    return association, reply.octets


def changes_nothing(association, datagram):
    held = cookies_held(association)
    with pytest.raises((NotAuthentic, KissOfDeath)) as caught:
        association.receive(datagram, sent=0, received=0)
    assert isinstance(caught.value, NotAuthentic) or not caught.value.authentic
    assert cookies_held(association) == held


@pytest.mark.parametrize("algorithm", SUPPORTED)
def test_no_single_bit_of_an_answer_may_be_flipped(algorithm):
    association, answer = asked_and_answered(algorithm)
    for bit in range(8 * len(answer)):
        flipped = bytearray(answer)
        flipped[bit // 8] ^= 1 << bit % 8
        changes_nothing(association, bytes(flipped))
    assert is_true(association.receive(answer, sent=0, received=0))


@given(
    st.sampled_from(SUPPORTED),
    st.dictionaries(st.integers(0, 10_000), st.integers(1, 255), min_size=1, max_size=40),
)
def test_no_octets_of_an_answer_may_be_flipped(algorithm, masks):
    association, answer = asked_and_answered(algorithm)
    flipped = bytearray(answer)
    for place, mask in {place % len(answer): mask for place, mask in masks.items()}.items():
        flipped[place] ^= mask
    changes_nothing(association, bytes(flipped))
    assert is_true(association.receive(answer, sent=0, received=0))


@given(st.sampled_from(SUPPORTED), st.integers(0, 10_000), st.integers(0, 10_000), st.binary(max_size=64))
def test_no_octets_may_be_cut_from_an_answer_or_put_into_it(algorithm, start, end, instead):
    """But for whole extension fields at the end, which are not looked at (`fields-after-the-authenticator`)."""
    association, answer = asked_and_answered(algorithm)
    start, end = sorted((start % len(answer), end % len(answer)))
    changed = answer[:start] + instead + answer[end:]
    assume(changed != answer)
    changes_nothing(association, changed)
    assert is_true(association.receive(answer, sent=0, received=0))


def export(context, length):
    return (context * length)[:length]


def ke_answer():
    keyring = Keyring.new(0, secrets.token_bytes)
    terms = KeTerms(keyring, NtpService(NtpEndpoint("192.0.2.1", 4123)))
    server = KeServer(terms, export, secrets.token_bytes)
    answer = server.receive(KeClient(export).request()).octets
    assert len(KeClient(export).receive(answer).cookies) == MAX_COOKIES
    return answer


def test_no_prefix_of_an_answer_is_an_answer():
    answer = ke_answer()
    for length in range(len(answer)):
        assert KeClient(export).receive(answer[:length]) is None


def test_no_suffix_of_an_answer_is_an_answer():
    answer = ke_answer()
    for start in range(1, len(answer)):
        assert taken(answer[start:]) is None


def taken(octets):
    try:
        return KeClient(export).receive(octets)
    except (KeError, WireError):
        return None


@given(st.integers(0, 10_000), st.integers(0, 10_000), st.integers(1, 500))
def test_no_piece_of_an_answer_is_an_answer(start, end, size):
    """Also when it comes in pieces itself; only the whole gives its own cookies."""
    answer = ke_answer()
    start, end = sorted((start % (len(answer) + 1), end % (len(answer) + 1)))
    piece = answer[start:end]
    client = KeClient(export)
    result = None
    with contextlib.suppress(KeError, WireError):
        for at in range(0, len(piece), size):
            assert result is None
            result = client.receive(piece[at : at + size])
    assert result == (KeClient(export).receive(answer) if piece == answer else None)
