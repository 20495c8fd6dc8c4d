"""An agent owes its registry nothing: names, ports and times that make no sense change nothing and end nothing."""

import asyncio
import json

import pytest

from lab.programs import alice, run
from lab.stand_in import StandIn, http, saying
from member_agent.config import AgentSettings
from member_agent.daemon import Agent
from member_agent.errors import AgentError, ExitStatus
from member_agent.joining import join
from member_agent.state import StateDirectory


def agent(tmp_path, registry):
    alice(tmp_path, registry.url)
    return Agent(StateDirectory(tmp_path), AgentSettings())


@pytest.mark.parametrize(
    "nonsense",
    [
        {"http_port": 70000},
        {"ke_port": 0},
        {"tls_port": 65536},
        {"addresses": [{"address": "a\0b", "proved": False, "call": True}]},
        {"addresses": [{"address": "localhost", "proved": False, "call": True}]},
        {"domain": "www.bank.example"},
        {"addresses": [{"address": "fe80::1%\n\x1b[31mx", "proved": False, "call": True}]},
        {"addresses": [{"address": f"192.0.2.{n}", "proved": False, "call": True} for n in range(17)]},
        {"challenges": [{"token": "a" * 43, "key_authorization": f"{'a' * 43}.{'b' * 43}"}] * 9},
        {"certificate": {"order": 1, "chain": "no chain", "fingerprint": "0" * 64}, "poll_after": 1},
        {"poll_after": -1.0, "http_port": -1},
        {"csr_for": -5},
        {"csr_for": 10**300},
        {"certificate": {"order": 0, "chain": "no chain", "fingerprint": "0" * 64}},
    ],
)
async def test_an_assignment_without_sense_changes_nothing_and_ends_nothing(tmp_path, nonsense):
    async with StandIn(**nonsense) as registry:
        running = asyncio.create_task(agent(tmp_path, registry).run())
        async with asyncio.timeout(10):
            while not registry.calls:
                await asyncio.wait({running}, timeout=0.05)
        await asyncio.wait({running}, timeout=0.5)
        assert not running.done(), running.result()
        assert len(registry.calls) < 8, "the agent spins"
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
    async with StandIn() as registry:
        registry.answers["/v1/agent/join"] = answer
        state = StateDirectory(tmp_path)
        with pytest.raises(AgentError) as refused:
            await join(registry.url, "tc_join_x", state, None, "test")
    assert refused.value.status is ExitStatus.REGISTRY
    assert state.members() == {}


async def test_another_registry_cannot_take_a_server_over(tmp_path):
    """It would get that server's challenges, and so a certificate for its name."""
    known = alice(tmp_path, "https://registry.example")
    async with StandIn() as registry:
        state = StateDirectory(tmp_path)
        with pytest.raises(AgentError, match=r"by another registry, https://registry\.example"):
            await join(registry.url, "tc_join_y", state, None, "test")
    assert state.members()[known.domain].membership() == known


async def test_what_a_registry_says_cannot_command_a_terminal(tmp_path):
    refusal = json.dumps({"detail": "\x1b[2Jgone\nerror: all is well", "remedy": "\x07\u202eread"})
    async with StandIn() as registry, registry.failing(saying(http("403 Forbidden", refusal.encode()))):
        alice(tmp_path, registry.url)
        done = await asyncio.to_thread(run, "pool-agent", "renew", "--state", str(tmp_path))
    assert done.status == ExitStatus.REGISTRY
    assert len(done.stderr.splitlines()) == 2
    assert all(line.isprintable() for line in done.stderr.splitlines()), done.stderr
    assert "gone error: all is well" in done.stderr
