"""What a volunteer asks by hand: which server is meant, when, and what is wrong here."""

import asyncio
import json
import re
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
import structlog
from typer.testing import CliRunner

from lab.processes import free_port
from lab.programs import alice
from lab.stand_in import StandIn, http, saying
from member_agent import checks, cli
from member_agent.clock import clock_of
from member_agent.config import AgentSettings
from member_agent.engines import Service
from member_agent.engines.builtin import BuiltinEngine
from member_agent.errors import ExitStatus
from member_agent.install import CertificateStore, load_pair
from member_agent.sockets import Endpoint
from member_agent.state import Listening, StateDirectory
from nts_core.control import CheckStatus

ALICE, BOB = "alice.servers.pool.example", "bob.servers.other.example"
DAY = timedelta(days=1)
SEEN = {
    "name": "alice",
    "domain": ALICE,
    "state": "active",
    "state_since": "2026-01-01T00:00:00Z",
    "in_dns": True,
    "share": 0.5,
    "why": "",
    "addresses": [],
}


class Host:
    """A state directory with alice, her registry, and the commands."""

    def __init__(self, state, registry):
        self.path, self.registry = state, registry
        self.me = alice(state, registry.url)
        self.asked = []
        registry.heed = self._heed

    async def _heed(self, path, said):
        self.asked.append((path, said))

    def has_bob(self, server="bob"):
        bob = replace(self.me, pool="other.example", server=server, domain=f"{server}.servers.other.example")
        StateDirectory(self.path).member(bob.domain).save_membership(bob)

    async def __call__(self, command, *arguments, answer=""):
        words = [command, "--state", str(self.path), *arguments]
        done = await asyncio.to_thread(CliRunner().invoke, cli.app, words, input=answer)
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done


@pytest.fixture
async def host(tmp_path):
    async with StandIn() as registry:
        for name in ("alice", "bob"):
            registry.answers[f"/v1/servers/{name}"] = SEEN
        yield Host(tmp_path / "state", registry)
    # The commands log to where their output went, which is closed.
    structlog.reset_defaults()


@pytest.mark.parametrize(
    ("text", "ahead"),
    [
        ("90m", timedelta(minutes=90)),
        ("999999d", 999_999 * DAY),
    ],
)
async def test_a_duration_counts_from_now(host, text, ahead):
    before = datetime.now(UTC)
    done = await host("pause", "--until", text, "--reason", "new disk")
    assert done.exit_code == 0, done.output
    ((path, body),) = host.asked
    assert path == "/v1/servers/alice/maintenance"
    assert body["reason"] == "new disk"
    ends = datetime.fromisoformat(body["ends_at"])
    assert before + ahead <= ends <= datetime.now(UTC) + ahead


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2999-12-01T18:00:00Z", "2999-12-01T18:00:00+00:00"),
        ("2999-12-01T18:00:00+02:00", "2999-12-01T16:00:00+00:00"),
    ],
)
async def test_a_moment_is_that_of_its_zone(host, text, moment):
    done = await host("pause", "--until", text)
    assert done.exit_code == 0, done.output
    assert host.asked[0][1]["ends_at"] == moment


async def test_a_moment_without_a_zone_is_this_hosts(host):
    done = await host("pause", "--until", "2999-12-01T18:00:00")
    assert done.exit_code == 0, done.output
    told = datetime.fromisoformat(host.asked[0][1]["ends_at"])
    assert told == datetime(2999, 12, 1, 18).astimezone(UTC)


@pytest.mark.parametrize(
    "text",
    ["", "0m", "-1h", "1.5h", "1w", "9999999d", "2020-01-01", "0001-01-01", "\uff11h"],
)
async def test_what_is_no_time_to_come_is_refused_before_anybody_is_asked(host, text):
    done = await host("pause", f"--until={text}")
    assert done.exit_code == ExitStatus.USAGE
    assert f"--until {text}: " in done.stderr
    assert host.asked == []


@pytest.mark.parametrize("name", [BOB, "bob", "BOB", f"{BOB}."])
async def test_one_of_several_servers_is_named(host, name):
    host.has_bob()
    done = await host("renew", "--server", name)
    assert done.exit_code == ExitStatus.REGISTRY, "a registry that answers something else"
    assert [path for path, _ in host.asked] == ["/v1/servers/bob/renewal"]


@pytest.mark.parametrize(
    ("label", "arguments", "words"),
    [
        ("bob", [], "this host is several servers"),
        ("bob", ["--server", "carol"], "is not one server of this host"),
        ("alice", ["--server", "alice"], "is several servers of this host"),
    ],
)
async def test_a_server_that_is_not_clear_is_refused_with_the_choice(host, label, arguments, words):
    host.has_bob(label)
    done = await host("renew", *arguments)
    assert done.exit_code == ExitStatus.USAGE
    assert words in done.stderr
    assert ALICE in done.stderr
    assert f"{label}.servers.other.example" in done.stderr
    assert host.asked == []


async def test_leaving_is_asked_for(host):
    done = await host("leave", answer="n\n")
    assert done.exit_code == ExitStatus.USAGE
    assert "nothing was changed" in done.output
    assert host.asked == []
    host.registry.answers["/v1/servers/alice/leaving"] = SEEN
    done = await host("leave", answer="y\n")
    assert done.exit_code == 0, done.output
    ahead = datetime.fromisoformat(host.asked[0][1]["at"]) - datetime.now(UTC)
    assert timedelta(hours=3) < ahead < timedelta(hours=3, minutes=2), "as soon as the registry takes it"


async def test_resuming_ends_what_is_under_way_and_nothing_else(host):
    now = datetime.now(UTC)

    def window(number, begin, end, cancelled=None):
        begin, end = ((now + days * DAY).isoformat() for days in (begin, end))
        return {"id": number, "starts_at": begin, "ends_at": end, "cancelled_at": cancelled}

    windows = [window(1, -3, -2), window(2, -1, 1), window(3, 1, 2), window(4, -1, 1, now.isoformat())]
    host.registry.answers["/v1/servers/alice/maintenance"] = {"items": windows}
    done = await host("resume")
    assert done.exit_code == 0, done.output
    assert [path.rpartition("/")[2] for path, _ in host.asked] == ["maintenance", "2"]


async def test_status_without_a_registry_or_its_roots(host):
    """Each server for itself: what is wrong with one is said, and the others are shown."""
    host.has_bob()
    lost = replace(host.me, ca=str(host.path / "gone.pem"))
    StateDirectory(host.path).member(ALICE).save_membership(lost)
    done = await host("status", "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["running"] is False
    first, second = document["servers"]
    assert "gone.pem" in first["registry_error"]
    assert second["registry_says"]["state"] == "active"
    spoken = (await host("status")).stdout
    assert "not running: pool-agent run" in spoken
    assert "in DNS, named in 50.0% of the pool's answers" in spoken
    async with host.registry.failing(saying(http("503 No", b""))):
        assert "HTTP status 503" in (await host("status")).stdout


async def test_a_check_without_a_registry_tells_what_is_to_be_seen_here(host):
    host.registry.close()
    done = await host("check", "--json")
    assert done.exit_code == ExitStatus.CHECK, "no agent runs"
    found = {finding["check"]: finding for finding in json.loads(done.stdout)}
    assert found["from outside"]["status"] == "skipped"
    assert found["agent"]["remedy"] == "start it: systemctl start pool-agent"


def running(**said):
    known = {"domain": ALICE, "contact_error": None, "contact_refused": False, "problem": None}
    return {"engine": "builtin", "servers": [{**known, **said}]}


async def found_here(path, agent, **settings):
    directory = StateDirectory(path).members()[ALICE]
    told = AgentSettings(clock_source="kernel", **settings)
    found = await checks.look_here(directory.membership(), directory, told, agent)
    for finding in found:
        assert (finding.status is CheckStatus.FAILED) == bool(finding.remedy), "a fault has its remedy"
    return {finding.check: finding for finding in found}


@pytest.mark.parametrize(
    ("agent", "words"),
    [
        (None, "no agent runs"),
        (running(domain=BOB), "does not follow this server"),
        (running(contact_error="the registry does not answer"), "the registry does not answer"),
        (running(problem="port 80 is taken"), "port 80 is taken"),
    ],
)
async def test_what_the_agent_says_is_a_finding(tmp_path, agent, words):
    alice(tmp_path)
    found = (await found_here(tmp_path, agent, local_stratum=10))["agent"]
    assert (found.status, words in found.detail) == (CheckStatus.FAILED, True)


async def test_an_agent_that_is_refused_is_not_sent_to_look_at_its_network(tmp_path):
    alice(tmp_path)
    agent = running(contact_error="the registry refuses: no such agent", contact_refused=True)
    found = (await found_here(tmp_path, agent, local_stratum=10))["agent"]
    assert (found.status, "a new token" in found.remedy) == (CheckStatus.FAILED, True)


@pytest.mark.parametrize(
    ("begin", "end", "status", "words"),
    [
        (-1, 9, CheckStatus.OK, "it ends"),
        (-9, 1, CheckStatus.FAILED, "it ends"),
        (-9, -1, CheckStatus.FAILED, "it is valid from"),
        (1, 9, CheckStatus.FAILED, "it is valid from"),
    ],
)
async def test_a_certificate_is_looked_at_with_this_hosts_clock(
    tmp_path, authority, begin, end, status, words
):
    alice(tmp_path)
    store, now = CertificateStore(tmp_path / "members" / ALICE / "certificates", ALICE), datetime.now(UTC)
    chain = authority.chain_for(store.pending(1), not_before=now + begin * DAY, not_after=now + end * DAY)
    store.stage(1, chain, now=now + (begin + end) / 2 * DAY)
    store.adopt()
    found = await found_here(tmp_path, running(), local_stratum=10)
    assert (found["certificate here"].status, words in found["certificate here"].detail) == (status, True)
    assert found["agent"].status is CheckStatus.OK
    assert found["clock"].status is CheckStatus.OK
    assert found["name"].status is CheckStatus.SKIPPED, "a name that is in no DNS"


async def test_a_clock_with_a_test_option_is_a_fault(tmp_path):
    alice(tmp_path)
    found = await found_here(tmp_path, running(), local_stratum=10, clock_offset=5)
    assert found["clock offset"].remedy == "remove clock_offset"
    assert found["certificate here"].status is CheckStatus.SKIPPED


class Serving:
    """Alice with a certificate, and an engine that serves it, or something else."""

    def __init__(self, path, authority):
        alice(path)
        self.directory = StateDirectory(path).members()[ALICE]
        self.ke, self.ntp = (Endpoint("127.0.0.1", free_port()) for _ in range(2))
        self.directory.save_listening(Listening((self.ke.address,), self.ke.port))
        store, now = CertificateStore(self.directory.certificates, ALICE), datetime.now(UTC)
        chain = authority.chain_for(store.pending(1), not_before=now - DAY, not_after=now + 9 * DAY)
        store.stage(1, chain, now=now)
        store.adopt()
        self.pair = store.current()

    @asynccontextmanager
    async def engine(self, *, pair=None, **settings):
        told = AgentSettings(**{"clock_source": "kernel", "local_stratum": 10, **settings})
        engine = BuiltinEngine(clock_of(told), told, None)
        await engine.apply(Service({ALICE: pair or self.pair}, (self.ke,), (self.ntp,)))
        try:
            yield
        finally:
            await engine.close()

    async def found(self):
        found = await checks.look_here(
            self.directory.membership(),
            self.directory,
            AgentSettings(clock_source="kernel", local_stratum=10, ntp_port=self.ntp.port),
            running(),
        )
        return {finding.check: finding for finding in found if finding.check.endswith(" here")}


@pytest.fixture
def serving(tmp_path, authority):
    return Serving(tmp_path, authority)


async def test_what_is_served_here_is_measured(serving):
    async with serving.engine():
        found = await serving.found()
        serving.directory.save_listening(Listening(("0.0.0.0",), serving.ke.port))
        everywhere = await serving.found()
    for each, address in ((found, "127.0.0.1"), (everywhere, "0.0.0.0")):
        ke, ntp = each["NTS-KE here"], each["NTP here"]
        assert (ke.status, ntp.status) == (CheckStatus.OK, CheckStatus.OK), each
        assert (ke.address, ntp.address) == (address, address)
        assert re.fullmatch(r"authenticated, offset [+-]\d[.]\d{3} ms, stratum 10", ntp.detail)


@pytest.mark.parametrize(
    ("settings", "check", "words", "remedy"),
    [
        ({"limits": {"deny": ["127.0.0.0/8"]}}, "NTS-KE here", "no connection", "limits.deny"),
        ({"ntp_server": "127.0.0.1:9"}, "NTP here", "no authentic answer", "ss -lunp"),
        ({"ntp_server": "ntp.invalid"}, "NTP here", "ntp.invalid", "ntp_server"),
        ({"local_stratum": None}, "NTP here", "not synchronised", "sources that answer"),
        ({"clock_offset": 0.5}, "NTP here", "authenticated, offset +", "clock_offset"),
    ],
)
async def test_what_is_wrong_with_the_service_is_said(serving, settings, check, words, remedy):
    async with serving.engine(**settings):
        found = await serving.found()
    fault = found[check]
    assert (fault.status, words in fault.detail, remedy in fault.remedy) == (
        CheckStatus.FAILED,
        True,
        True,
    ), fault
    assert (found["NTS-KE here"].status is CheckStatus.OK) == (check == "NTP here")


async def test_a_service_that_is_not_there_or_somebody_elses_is_said(serving, authority):
    fault = (await serving.found())["NTS-KE here"]
    assert "no connection" in fault.detail
    assert "systemctl start pool-agent" in fault.remedy
    other = authority.issue(ALICE)
    async with serving.engine(pair=load_pair(other.cert, other.key)):
        found = await serving.found()
    assert (found["NTS-KE here"].status, "NTP here" in found) == (CheckStatus.FAILED, False)
    assert "another certificate" in found["NTS-KE here"].remedy

    async def talks_something_else(reader, writer):
        writer.write(b"220 mail.example ESMTP\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(talks_something_else, *serving.ke):
        assert "ss -ltnp" in (await serving.found())["NTS-KE here"].remedy


async def test_nothing_is_measured_before_there_is_a_certificate(tmp_path):
    alice(tmp_path)
    found = await found_here(tmp_path, running(), local_stratum=10)
    assert found["served here"].status is CheckStatus.SKIPPED
