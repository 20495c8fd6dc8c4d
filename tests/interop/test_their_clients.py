"""The clients of the matrix and our server."""

from contextlib import ExitStack

import pytest
from cryptography.hazmat.primitives import hashes

from lab.interop import Event, Family, Role, cells
from lab.peers import CHRONY, ChronydClient, Namespace, NtpdRsClient, NtpsecClient
from lab.processes import wait_until
from lab.relay import Relay, host_socket
from nts_core.packet import FieldType, Packet

NAME = "ntp.example"
RELAY = "127.77.99.1"
# All of them begin at once; chronyd waits 16 s after a failed key establishment, NTPsec longer.
DEADLINE = 60.0
LOSS = 0.25


def of_event(*events):
    """The cells of some events."""
    return [
        pytest.param(cell, id=str(cell), marks=[pytest.mark.long] if cell.is_long else [])
        for cell in cells(Role.CLIENT)
        if cell.event in events
    ]


def many(cell):
    """More answers than a client has cookies, or some where that would take half a minute."""
    return 4 if cell.peer.family is Family.NTPSEC and not cell.is_long else 10


def offer(cell):
    """Our server prefers the AEAD of the cell; every server has to have 15 (RFC 8915 section 5.1)."""
    return f"--aead={cell.aead},15" if cell.aead != 15 else "--aead=15"


class Pair:
    """Our server, a client of the matrix, the relay between them."""

    def __init__(self, aead, server, client, relay):
        self.aead = aead
        self.server = server
        self.client = client
        self.relay = relay

    def wait_for_answers(self, count):
        """Authenticated answers by our server since it started."""
        wait_until(lambda: self.server.count("ntp", "nts-time") >= count, f"{count} answers", DEADLINE)

    def wait_until_served(self):
        """Until the client uses our server and has all its cookies."""
        wait_until(
            lambda: self.client.is_served() and self.client.cookies() == 8, "the client is served", DEADLINE
        )
        (cookie,) = Packet.decode(self.relay.last_request).of_type(FieldType.COOKIE)
        # The second octet of our cookies is the session's AEAD.
        assert cookie.value[1] == self.aead


@pytest.fixture
def stack():
    with ExitStack() as entered:
        yield entered


@pytest.fixture
def meet(tmp_path, authority, issue, our_server, stack):
    """Starts our server, and then the client of a cell."""

    def meet(cell, loss=0.0):
        if not (cell.package.is_required or cell.package.is_there()):
            pytest.skip(f"{cell.package} has left the archive; see lab/newer_peers.py")
        server = stack.enter_context(our_server(tmp_path / "server", issue(), offer(cell)))
        address, listening, ke_port = RELAY, host_socket, server.ke_port
        if cell.peer.family is Family.NTPSEC:
            namespace = stack.enter_context(Namespace(tmp_path / "namespace"))
            address, listening, ke_port = "127.0.0.1", namespace.socket, 4460
        relay = Relay(
            address,
            ke=(ke_port, (server.address, server.ke_port)),
            ntp=(server.ntp_port, (server.address, server.ntp_port)),
            loss=loss,
            listening=listening,
        )
        stack.enter_context(relay)
        directory = tmp_path / "client"
        match cell.peer.family:
            case Family.CHRONY:
                # A server that is down must not cost it all cookies: eight last for as many seconds.
                poll = 0 if cell.event in {Event.RESTART, Event.LOST_KEYS, Event.ROTATION} else -2
                client = ChronydClient(
                    directory, authority.root, relay.address, relay.ke_port, package=cell.package, poll=poll
                )
            case Family.NTPD_RS:
                client = NtpdRsClient(
                    directory,
                    authority.root,
                    NAME,
                    relay.ke_port,
                    address=relay.address,
                    package=cell.package,
                )
            case Family.NTPSEC:
                client = NtpsecClient(directory, authority.root, namespace, aead=cell.aead)
        return Pair(cell.aead, server, stack.enter_context(client), relay)

    return meet


@pytest.mark.parametrize("cell", of_event(Event.NONE))
def test_plain(cell, meet):
    pair = meet(cell)
    pair.wait_for_answers(3)
    pair.wait_until_served()
    assert pair.server.count("ke", "ok") == 1
    if cell.peer.family is Family.CHRONY:
        check_chronyd(cell, pair)


def check_chronyd(cell, pair):
    """Chronyd tells more of itself than the others."""
    (authdata,) = pair.client.report("authdata")
    (source,) = pair.client.report("sources")
    (ntpdata,) = pair.client.report("ntpdata")
    name, mode, _, algorithm, _key_length, _, _, naks, cookies, _cookie_length = authdata
    assert (name, mode, algorithm) == (RELAY, "NTS", str(cell.aead))
    assert naks == "0"
    assert cookies in {"7", "8"}, "one may be on its way"
    assert source[3] == "2"
    assert abs(float(source[7])) < 0.05
    assert ntpdata[2] == str(pair.server.ntp_port), "record 7 was not followed"


def test_chronyd_over_ipv6(tmp_path, authority, issue, our_server):
    with (
        our_server(tmp_path / "server", issue(), address="::1") as server,
        ChronydClient(tmp_path / "client", authority.root, "::1", server.ke_port, package=CHRONY) as chronyd,
    ):
        wait_until(lambda: chronyd.is_served() and chronyd.cookies() == 8, "chronyd is served", DEADLINE)


@pytest.mark.parametrize("cell", of_event(Event.RESTART))
def test_restart(cell, meet):
    pair = meet(cell)
    pair.wait_until_served()
    pair.server.stop()
    pair.server.start()
    pair.wait_for_answers(many(cell))
    pair.wait_until_served()
    assert pair.server.count("ke", "ok") == 0
    assert pair.server.count("ntp", "ntsn") == 0


@pytest.mark.parametrize("cell", of_event(Event.LOST_KEYS))
def test_lost_keys(cell, meet):
    """The client runs key establishment again, in its own time."""
    pair = meet(cell)
    pair.wait_until_served()
    pair.server.stop()
    pair.server.forget_keys()
    pair.server.start()
    wait_until(lambda: pair.server.count("ke", "ok") >= 1, "the client comes for new cookies", DEADLINE)
    assert pair.server.count("ntp", "ntsn") >= 1
    pair.wait_for_answers(3)
    pair.wait_until_served()


@pytest.mark.parametrize("cell", of_event(Event.ROTATION))
def test_rotation(cell, meet):
    pair = meet(cell)
    pair.wait_until_served()
    pair.server.rotate_keys()
    pair.wait_for_answers(many(cell))
    pair.wait_until_served()
    assert pair.server.count("ke", "ok") == 0
    assert pair.server.count("ntp", "ntsn") == 0


@pytest.mark.parametrize("cell", of_event(Event.CERTIFICATE))
def test_certificate(cell, meet, issue, our_client):
    """Cookies stay good; a client that starts anew gets them under the new certificate."""
    pair = meet(cell)
    pair.wait_until_served()
    us = our_client(cell.aead, pair.server.address, pair.server.ke_port, pair.server.ntp_port)
    old = us.establish().chain[0].fingerprint(hashes.SHA256())
    issue()
    pair.server.take_certificate()
    assert us.establish().chain[0].fingerprint(hashes.SHA256()) != old
    established = pair.server.count("ke", "ok")
    pair.wait_for_answers(pair.server.count("ntp", "nts-time") + 2)
    assert pair.server.count("ke", "ok") == established
    pair.client.stop()
    pair.client.start()
    pair.wait_until_served()
    assert pair.server.count("ke", "ok") == established + 1


@pytest.mark.parametrize("cell", of_event(Event.LOSS))
def test_loss(cell, meet):
    pair = meet(cell, LOSS)
    wait_until(lambda: pair.relay.lost >= 3, "packets were lost", DEADLINE)
    pair.wait_for_answers(4)
    pair.relay.loss = 0.0
    pair.wait_until_served()
