"""What servers of one agent share: ports that they want together, and that none takes from another what it has."""

import socket
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from lab.processes import free_port
from member_agent.clock import clock_of
from member_agent.config import AgentSettings
from member_agent.engines import EngineError
from member_agent.engines.builtin import BuiltinEngine
from member_agent.engines.serving import Protocol
from member_agent.engines.succession import Succession
from member_agent.errors import AgentError
from member_agent.host import Host, Served
from member_agent.install import InstalledPair, load_pair
from member_agent.sockets import Endpoint
from nts_core.client import ClientError, establish

ALICE, BOB = "alice.servers.pool.example", "bob.servers.other.example"
ONE, TWO = "127.0.0.1", "127.0.0.2"
# Of documentation: no host of tests has it.
FAR, FAR6 = "192.0.2.1", "2001:db8::1"


@asynccontextmanager
async def _host(state, **settings):
    told = AgentSettings(local_stratum=10, clock_source="kernel", **settings)
    clock = clock_of(told)
    engine = BuiltinEngine(clock, told, None)
    host = Host(told, clock, engine, Succession(state, told.engine, engine.name))
    try:
        yield host
    finally:
        await host.close()


@pytest.fixture
async def host(tmp_path):
    async with _host(tmp_path) as host:
        yield host


@pytest.fixture
def served(authority):
    def make(name, ke, ntp, *, pair=None):
        issued = authority.issue(name)
        return Served(pair or load_pair(issued.cert, issued.key), tuple(ke), tuple(ntp))

    return make


@contextmanager
def occupied(endpoint, kind=socket.SOCK_STREAM):
    with socket.socket(endpoint.family, kind) as sock:
        sock.bind(tuple(endpoint))
        if kind is socket.SOCK_STREAM:
            sock.listen()
        yield


async def shows(name, endpoint, trust):
    try:
        await establish(name, *endpoint, trust, timeout=5)
    except ClientError:
        return False
    return True


async def test_two_pools_with_ports_of_their_own(host, served, trust):
    http = [Endpoint(ONE, free_port()) for _ in range(2)]
    ke, ntp = ([Endpoint(ONE, free_port()) for _ in range(2)] for _ in range(2))
    for name, number in ((ALICE, 0), (BOB, 1)):
        await host.answer(host.http, name, [http[number]])
        await host.serve(name, served(name, [ke[number]], [ntp[number]]))
    assert set(host.http.endpoints) == set(http)
    # Both names at both places: who asks says whom it means.
    assert [await shows(name, place, trust) for name in (ALICE, BOB) for place in ke] == [True] * 4
    await host.forget(ALICE, has_served=True)
    assert host.http.endpoints == (http[1],)
    assert host.engine.endpoints(Protocol.NTP) == [ntp[1]]
    assert await shows(BOB, ke[1], trust)
    assert not await shows(ALICE, ke[1], trust)


async def test_a_port_that_one_server_cannot_have_is_not_anothers_matter(host):
    wanted, taken = Endpoint(ONE, free_port()), Endpoint(ONE, free_port())
    with occupied(taken):
        with pytest.raises(AgentError, match="Address already in use"):
            await host.answer(host.http, ALICE, [taken])
        await host.answer(host.http, BOB, [wanted])
        assert host.http.endpoints == (wanted,)
        with pytest.raises(AgentError):
            await host.answer(host.http, BOB, [wanted, taken])
        assert host.http.endpoints == (wanted,), "what was there is there"
    await host.answer(host.http, ALICE, [taken])
    assert set(host.http.endpoints) == {wanted, taken}


async def test_an_address_that_is_not_ours_is_translated_for_good(host):
    assert host.addresses([ONE]) == (ONE,)
    assert host.addresses([ONE, FAR, FAR6]) == ("0.0.0.0", "::")
    # Or two kinds of sockets would be in each other's way.
    assert host.addresses([TWO]) == ("0.0.0.0",)
    assert host.addresses([]) == ()


async def test_settings_say_where_whatever_is_registered(tmp_path):
    async with _host(tmp_path, listen=[TWO]) as host:
        assert host.addresses([ONE, FAR]) == (TWO,)


async def test_a_translated_address_of_another_pool_comes_to_all_at_the_next_report(host):
    """First in the way of each other, then one wildcard for both."""
    port = free_port()
    await host.answer(host.http, ALICE, [Endpoint(each, port) for each in host.addresses([ONE])])
    bobs = host.addresses([FAR])
    with pytest.raises(AgentError):
        await host.answer(host.http, BOB, [Endpoint(each, port) for each in bobs])
    assert host.http.endpoints == (Endpoint(ONE, port),)
    for name, registered in ((ALICE, [ONE]), (BOB, [FAR])):
        await host.answer(host.http, name, [Endpoint(each, port) for each in host.addresses(registered)])
    assert host.http.endpoints == (Endpoint("0.0.0.0", port),)


async def test_an_address_added_later_and_one_that_is_taken(host, served, trust):
    ke, ntp = free_port(ONE, TWO), free_port(ONE, TWO)
    first = served(ALICE, [Endpoint(ONE, ke)], [Endpoint(ONE, ntp)])
    both = served(ALICE, [Endpoint(ONE, ke), Endpoint(TWO, ke)], [Endpoint(ONE, ntp), Endpoint(TWO, ntp)])
    await host.serve(ALICE, first)
    with occupied(Endpoint(TWO, ntp), socket.SOCK_DGRAM):
        with pytest.raises(EngineError, match=f"{TWO}:{ntp}"):
            await host.serve(ALICE, both)
        assert host.engine.endpoints(Protocol.KE) == list(first.ke)
        assert host.engine.endpoints(Protocol.NTP) == list(first.ntp)
        assert await shows(ALICE, (ONE, ke), trust)
        assert not await shows(ALICE, (TWO, ke), trust), "nothing is half there"
    await host.serve(ALICE, both)
    assert await shows(ALICE, (TWO, ke), trust)


async def test_a_pair_that_cannot_be_used_leaves_what_was(host, served, trust):
    ke, ntp = Endpoint(ONE, free_port()), Endpoint(ONE, free_port())
    await host.serve(ALICE, served(ALICE, [ke], [ntp]))
    now = datetime.now(UTC)
    gone = InstalledPair(Path("/nonexistent/chain"), Path("/nonexistent/key"), "", now, now)
    for name in (ALICE, BOB):
        with pytest.raises(EngineError):
            await host.serve(name, served(name, [ke], [ntp], pair=gone))
    assert await shows(ALICE, ke, trust)
    await host.serve(BOB, served(BOB, [ke], [ntp]))
    assert await shows(BOB, ke, trust)


async def test_proofs_over_tls_make_room_for_the_engine(host, served, trust):
    """And come back where it serves no more."""
    ke, ntp = Endpoint(ONE, free_port()), Endpoint(ONE, free_port())
    await host.answer(host.proofs, ALICE, [ke])
    assert host.proofs.endpoints == (ke,)
    await host.serve(ALICE, served(ALICE, [ke], [ntp]))
    assert host.proofs.endpoints == ()
    assert await shows(ALICE, ke, trust)
    await host.answer(host.proofs, ALICE, [ke])
    assert host.proofs.endpoints == ()
    await host.forget(ALICE, has_served=True)
    assert (host.proofs.endpoints, host.engine.endpoints(Protocol.KE)) == ((), [])
