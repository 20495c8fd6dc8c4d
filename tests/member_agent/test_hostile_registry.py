"""An agent owes its registry nothing: names, ports and times that make no sense change nothing and end nothing."""

import asyncio
import json

import pytest

from lab.processes import free_port
from member_agent import daemon
from member_agent.config import AgentSettings
from member_agent.errors import AgentError, ExitStatus
from member_agent.state import Membership, StateDirectory

ASSIGNMENT = {
    "pool": "pool.example",
    "server": "alice",
    "domain": "alice.servers.pool.example",
    "state": "registered",
    "addresses": [],
    "http_port": 8080,
    "ke_port": 4460,
    "poll_after": 0.05,
}


class Registry:
    """A registry on loopback that answers every call with the same document."""

    def __init__(self, document):
        self.document = document
        self.calls = 0

    async def __aenter__(self):
        self.port = free_port()
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", self.port)
        return self

    async def __aexit__(self, *_):
        self._server.close()

    async def _answer(self, reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        self.calls += 1
        body = json.dumps(self.document).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body)
        await writer.drain()
        writer.close()


def member(tmp_path, registry):
    state = StateDirectory(tmp_path)
    url = f"http://127.0.0.1:{registry.port}"
    state.save_membership(
        Membership(url, "pool.example", "alice", "alice.servers.pool.example", "tc_agent_x")
    )
    return daemon.Member(state, AgentSettings())


@pytest.mark.parametrize(
    "nonsense",
    [
        {"http_port": 70000},
        {"ke_port": 0},
        {"addresses": [{"address": "a\0b", "proved": False, "call": True}]},
        {"addresses": [{"address": "localhost", "proved": False, "call": True}]},
        {"domain": "www.bank.example"},
        {"poll_after": -1.0, "http_port": -1},
    ],
)
async def test_an_assignment_without_sense_changes_nothing_and_ends_nothing(tmp_path, nonsense):
    async with Registry({**ASSIGNMENT, **nonsense}) as registry:
        running = asyncio.create_task(member(tmp_path, registry).run())
        async with asyncio.timeout(10):
            while registry.calls < 1:
                await asyncio.wait({running}, timeout=0.05)
        await asyncio.wait({running}, timeout=0.5)
        assert not running.done(), running.result()
        assert registry.calls < 8, "the agent spins"
        running.cancel()
        await asyncio.wait({running})


@pytest.mark.parametrize(
    ("server", "pool", "domain"),
    [
        ("alice", "pool.example", "www.bank.example"),
        ("alice", "\x1b[2Jevil", "alice.servers.\x1b[2Jevil"),
        ("a.b", "pool.example", "a.b.servers.pool.example"),
    ],
)
async def test_a_name_that_is_not_under_the_pool_is_not_joined(tmp_path, server, pool, domain):
    """Or the registry could have this host answer challenges for any name that leads here."""
    answer = {"token": "tc_agent_x", "pool": pool, "server": server, "domain": domain}
    async with Registry(answer) as registry:
        state = StateDirectory(tmp_path)
        with pytest.raises(AgentError) as refused:
            await daemon.join(f"http://127.0.0.1:{registry.port}", "tc_join_x", state, None, "test")
    assert refused.value.status is ExitStatus.REGISTRY
    assert state.membership() is None
