"""Our client and the servers of the matrix, our own among them."""

import json
import subprocess
from contextlib import ExitStack

import pytest
from cryptography.hazmat.primitives import hashes

from lab.interop import Event, Family, Role, cells, refusals
from lab.peers import ChronydServer, Namespace, NtpdRsServer, NtpsecServer
from lab.processes import free_port, wait_until
from lab.programs import RUN_DEADLINE, script
from lab.relay import Relay, host_socket
from nts_core.client import ClientError
from nts_core.errors import KissOfDeath

NAME = "ntp.example"
RELAY = "127.77.99.1"
# More than a client has cookies: the last ones were sealed after the first had been used.
MANY = 10
LOSS = 0.25


def of_event(*events):
    """The cells of some events."""
    return [
        pytest.param(cell, id=str(cell), marks=[pytest.mark.long] if cell.is_long else [])
        for cell in cells(Role.SERVER)
        if cell.event in events
    ]


@pytest.fixture
def stack():
    with ExitStack() as entered:
        yield entered


@pytest.fixture
def serve(tmp_path, issue, our_server, stack):
    """Starts the server of a cell."""

    def serve(cell, address="127.0.0.1"):
        if cell.peer.package is not None and not (cell.package.is_required or cell.package.is_there()):
            pytest.skip(f"{cell.package} has left the archive; see lab/newer_peers.py")
        directory, pair = tmp_path / "server", issue()
        match cell.peer.family:
            case Family.CHRONY:
                hurried = {"rotation_s": 3} if cell.event is Event.ROTATION else {}
                server = ChronydServer(directory, pair, package=cell.package, address=address, **hurried)
            case Family.NTPD_RS:
                hurried = {"rotation_s": 1} if cell.event is Event.ROTATION else {}
                server = NtpdRsServer(directory, pair, package=cell.package, address=address, **hurried)
            case Family.NTPSEC:
                server = NtpsecServer(directory, pair, stack.enter_context(Namespace(tmp_path / "namespace")))
            case Family.OURS:
                server = our_server(directory, pair, "--aead=30,15,16,17", address=address)
        return stack.enter_context(server)

    return serve


@pytest.fixture
def reach(serve, our_client, stack):
    """Starts the server of a cell, and gives it with our client and the relay between them."""

    def reach(cell, loss=0.0):
        server = serve(cell)
        sending = server.namespace.socket if cell.peer.family is Family.NTPSEC else host_socket
        relay = Relay(
            RELAY,
            ke=(free_port(RELAY), (server.address, server.ke_port)),
            ntp=(free_port(RELAY), (server.address, server.ntp_port)),
            loss=loss,
            sending=sending,
        )
        stack.enter_context(relay)
        return server, our_client(cell.aead, relay.address, relay.ke_port, relay.ntp_port), relay

    return reach


def ask(cell, server, authority, address="127.0.0.1"):
    """`pool-client query`, in the server's network."""
    inside = server.namespace.inside() if isinstance(server, NtpsecServer) else ()
    done = subprocess.run(
        [
            *inside,
            script("pool-client"),
            "query",
            f"{NAME}:{server.ke_port}",
            f"--address={address}",
            f"--ca={authority.root}",
            f"--samples={MANY}",
            f"--aead={cell.aead}",
            "--json",
        ],
        capture_output=True,
        text=True,
        timeout=RUN_DEADLINE,
        check=False,
    )
    return done.returncode, json.loads(done.stdout)


def check_answer(cell, server, status, document, address="127.0.0.1"):
    assert document["authenticated"] is True, document
    assert (document["aead"], document["cookies"]) == (cell.aead, 8)
    assert (document["ntp_address"], document["ntp_port"]) == (address, server.ntp_port)
    assert abs(document["offset_ns"]) < 50_000_000
    if cell.peer.family is Family.NTPD_RS:
        # It has no source of its own, and says so.
        assert (status, document["error"]["code"], document["leap"]) == (5, "unsynchronised", 3)
    else:
        assert (status, document["error"], document["leap"]) == (0, None, 0)
    assert document["stratum"] == (2 if cell.peer.family is Family.OURS else 10)


@pytest.mark.parametrize("cell", of_event(Event.NONE))
def test_plain(cell, serve, authority):
    server = serve(cell)
    status, document = ask(cell, server, authority)
    check_answer(cell, server, status, document)


@pytest.mark.parametrize("cell", [cell for cell in of_event(Event.NONE) if "aead15" in cell.id])
def test_plain_over_ipv6(cell, serve, authority):
    server = serve(cell, "::1")
    status, document = ask(cell, server, authority, address="::1")
    check_answer(cell, server, status, document, "::1")


@pytest.mark.parametrize("cell", list(refusals()), ids=str)
def test_refused(cell, serve, authority):
    """NTPsec answers the AEAD that it likes, though it was not offered, and is refused by us."""
    status, document = ask(cell, serve(cell), authority)
    assert (status, document["authenticated"], document["error"]["code"]) == (4, False, "ke"), document


@pytest.mark.parametrize("cell", of_event(Event.RESTART))
def test_restart(cell, reach):
    server, client, _ = reach(cell)
    client.establish()
    client.exchange()
    server.stop()
    server.start()
    for _ in range(MANY):
        assert client.exchange().cookies == 1


@pytest.mark.parametrize("cell", of_event(Event.LOST_KEYS))
def test_lost_keys(cell, reach):
    server, client, _ = reach(cell)
    client.establish()
    client.exchange()
    server.stop()
    server.forget_keys()
    server.start()
    with pytest.raises((KissOfDeath, ClientError)) as refused:
        client.exchange(0.3)
    if cell.peer.family is Family.NTPSEC:
        assert refused.value.code == "ntp", "silence"
    else:
        assert (refused.value.code, refused.value.authentic) == ("NTSN", False)
    client.establish()
    assert client.exchange().cookies == 1


@pytest.mark.parametrize("cell", of_event(Event.ROTATION))
def test_rotation(cell, reach):
    server, client, _ = reach(cell)
    first = client.establish()
    client.exchange()
    server.rotate_keys()
    # The old cookies are good for as many exchanges as there are, and each brings one of the new key.
    for _ in range(MANY):
        assert client.exchange().cookies == 1
    # In the cookies of all these servers the first four octets name the key.
    assert key_id(client.association.jar.take()) != key_id(first.result.cookies[0])


def key_id(cookie):
    return cookie[:4]


@pytest.mark.parametrize("cell", of_event(Event.CERTIFICATE))
def test_certificate(cell, reach, issue):
    server, client, _ = reach(cell)
    first = client.establish()
    old = client.association
    issue()
    server.take_certificate()
    second = client.establish()
    assert first.chain[0].fingerprint(hashes.SHA256()) != second.chain[0].fingerprint(hashes.SHA256())
    assert client.exchange().cookies == 1
    client.association = old
    assert client.exchange().cookies == 1


@pytest.mark.parametrize("cell", of_event(Event.LOSS))
def test_loss(cell, reach):
    _, client, relay = reach(cell, LOSS)
    client.establish()
    answered = 0

    def try_once():
        nonlocal answered
        try:
            client.exchange(0.2)
        except ClientError:
            return False
        answered += 1
        return True

    wait_until(lambda: try_once() and relay.lost >= 6 and answered >= 6, "time through a lossy path", 60)
    relay.loss = 0.0
    assert try_once()
    # The answer brought all that were missing.
    assert len(client.association.jar) == 8
