"""What a volunteer does with a host that runs chronyd: join, look, pause, renew, leave, by the commands alone."""

import json
import re

import pytest

from lab.pool import LabPool
from lab.processes import wait_until
from lab.programs import run
from lab.volunteer import ChronyVolunteer
from member_agent.errors import ExitStatus
from member_agent.sockets import Endpoint

pytestmark = pytest.mark.timeout(180)


def toml(table):
    return "[engine]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in table.items())


@pytest.fixture
def pool(tmp_path):
    with LabPool(tmp_path / "pool", opening_size=1) as pool:
        yield pool


@pytest.fixture
def host(pool, tmp_path):
    """A host with chronyd, at the address of the first member; and that member."""
    member = pool.add("alice")
    places = Endpoint(member.address, pool.ke_port), Endpoint(member.address, pool.ntp_port)
    with ChronyVolunteer(tmp_path / "host", places=places) as chrony:
        member.state.mkdir(mode=0o700)
        hook = f'after = ["sh", "-c", "echo $POOL_HOOK_DOMAIN $POOL_HOOK_CHAIN >> {tmp_path}/hooked"]'
        settings = (
            f"ntp_port = {pool.ntp_port}\nlocal_stratum = 10\n{toml(chrony.settings())}\n[hooks]\n{hook}\n"
        )
        (member.state / "agent.toml").write_text(settings)
        yield chrony, member


def agent(member, *arguments, status=ExitStatus.OK):
    done = run("pool-agent", arguments[0], "--state", str(member.state), *arguments[1:])
    assert done.status == status, done
    return done


def test_a_host_with_chronyd_is_a_member_by_commands_alone(pool, host, tmp_path):
    chrony, member = host
    before = chrony.tree()
    options = ["--token", member.register(), "--ca", str(pool.registry_root), "--wait", "0"]

    # Nothing is changed before the volunteer has seen what that would be, and agreed.
    asked = agent(member, "join", pool.url, *options, status=ExitStatus.USAGE)
    assert f"{chrony.config}/conf.d/pool-agent.conf" in asked.stdout
    assert "ntsservercert" in asked.stdout
    assert "--yes" in asked.stderr
    assert list((member.state).glob("members/*")) == []
    joined = agent(member, "join", pool.url, *options, "--yes")
    assert f"joined the pool pool.example as {member.domain}" in joined.stdout
    assert chrony.tree() == before

    stopped = agent(member, "check", status=ExitStatus.CHECK)
    assert "no agent runs" in stopped.stdout
    member.process.start()
    pool.wait_for_state(member, "active")
    assert pool.query(member).document["authenticated"] is True
    wait_until(lambda: member.view()["in_dns"], "the SRV record")
    status = agent(member, "status", "--json").document
    assert (status["running"], status["engine"]) == (True, "chrony")
    (server,) = status["servers"]
    assert (server["registry_says"]["state"], server["registry_says"]["share"]) == ("active", 1.0)
    assert server["agent_says"]["problem"] is None
    spoken = agent(member, "status").stdout
    assert f"server     {member.domain}" in spoken
    assert "in DNS, named in 100.0% of the pool's answers" in spoken

    found = json.loads(agent(member, "check", "--json", status=ExitStatus.OK).stdout)
    assert {finding["status"] for finding in found} <= {"ok", "skipped"}
    assert {"agent", "clock", "certificate here", "ke", "nts-long"} <= {finding["check"] for finding in found}

    agent(member, "pause", "--until", "2h", "--reason", "new disk")
    wait_until(lambda: not member.view()["in_dns"], "out of DNS")
    assert "hold       maintenance" in agent(member, "status").stdout
    assert "comes back" in agent(member, "resume").stdout
    wait_until(lambda: member.view()["in_dns"], "in DNS again")
    assert "was not paused" in agent(member, "resume").stdout

    first = member.view()["certificates"][-1]["fingerprint"]
    agent(member, "renew")
    wait_until(
        lambda: member.view()["certificates"][-1]["fingerprint"] not in {first, None}, "another certificate"
    )
    second = member.view()["certificates"][-1]["fingerprint"]
    wait_until(
        lambda: (
            agent(member, "status", "--json").document["servers"][0]["agent_says"]["fingerprint"] == second
        ),
        "chronyd has it",
    )
    assert pool.query(member).document["authenticated"] is True
    assert agent(member, "renew", status=ExitStatus.REGISTRY).stderr
    hooked = [line.split() for line in (tmp_path / "hooked").read_text().splitlines()]
    assert [domain for domain, _ in hooked] == [member.domain] * 2, "once for each certificate"
    assert hooked[0][1] != hooked[1][1]

    agent(member, "leave", "--yes")
    wait_until(lambda: not member.view()["in_dns"], "out of DNS")
    assert "leave --cancel" in agent(member, "status").stdout
    agent(member, "leave", "--cancel")
    wait_until(lambda: member.view()["in_dns"], "in DNS again")
    pool.member.call("DELETE", "/v1/servers/alice")
    assert member.process.wait() == ExitStatus.REMOVED
    assert chrony.tree() == before
    assert list((member.state / "members").iterdir()) == []
    agent(member, "status", status=ExitStatus.STATE)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pause", "--until", "tomorrow"], "--until tomorrow: not a time"),
        (["pause", "--until", "2020-01-01T00:00:00Z"], "that is over"),
        (["pause", "--until", "2h", "--server", "bob"], "--server bob is not one server of this host"),
        (["leave", "--at", "0d", "--yes"], "--at 0d: not a time"),
    ],
)
def test_what_cannot_be_meant_is_said_with_its_remedy(pool, arguments, words):
    member = pool.add("alice")
    assert member.join(member.register()).status == 0
    done = agent(member, *arguments, status=ExitStatus.USAGE)
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 2


def test_joining_proves_the_addresses_and_says_how_it_goes_on(pool):
    member = pool.add("alice")
    token = member.register()
    options = ["--token", token, "--ca", str(pool.registry_root), "--engine", "builtin"]
    done = agent(member, "join", pool.url, *options)
    assert f"address    {member.address}: proved" in done.stdout
    assert re.search(r"in DNS about [-0-9]+ [0-9:]+ UTC, in about [0-9]+ min, if nothing fails", done.stdout)
    assert member.view()["addresses"][0]["proved_at"]

    # A token that is old by now is replaced, and of no use to whoever has it.
    (file,) = member.state.glob("members/*/membership.json")
    old = json.loads(file.read_text())
    file.write_text(json.dumps({**old, "token_at": 0}))
    member.process.start()
    pool.wait_for_state(member, "active")
    assert json.loads(file.read_text())["token"] != old["token"]
    assert pool.api(old["token"]).request("GET", "/v1/servers/alice").status_code == 401
