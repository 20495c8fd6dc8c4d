"""A registry that was lost and restored from a backup: agents come back by themselves, who left does not."""

import dns.message
import dns.query
import pytest

from lab.pool import POOL, LabPool
from lab.postgres import Postgres
from lab.processes import wait_until
from poolsvc import journal

NAMES = ("alice", "bob", "carol")


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.long)])
def databases(request, tmp_path):
    """Two empty databases of one engine: the one that is lost, and the one that is restored into."""
    if request.param == "sqlite":
        yield [f"sqlite+aiosqlite:///{tmp_path}/{name}.db" for name in ("lost", "new")]
        return
    with Postgres(tmp_path / "postgres") as cluster:
        yield [cluster.create_database() for _ in range(2)]


def targets(pool):
    query = dns.message.make_query(f"_ntske._tcp.{POOL}.", "SRV")
    answer = dns.query.udp(query, pool.primary.address, port=pool.primary.port, timeout=5)
    return {str(record.target).split(".")[0] for rrset in answer.answer for record in rrset}


def test_a_restored_registry_brings_agents_back_and_nobody_who_left(databases, tmp_path):
    lost, new = databases
    with LabPool(tmp_path / "pool", database=lost, opening_size=2) as pool:
        members = [pool.add(name).start() for name in NAMES]
        for member in members:
            pool.wait_for_state(member, "active")
        wait_until(lambda: targets(pool) == set(NAMES), "all three in DNS", 20)
        pool.poolsvc("backup", str(tmp_path / "pool.backup"))
        pool.operator.call("DELETE", "/v1/servers/bob")
        pool.wait_for_state(members[1], "removed")
        assert targets(pool) == {"alice", "carol"}
        file = pool.directory / "removals.journal"
        wait_until(
            lambda: file.exists() and "bob" in {entry.name for entry in journal.read(file)}, "bob noted", 20
        )
        old = pool.member

        restored = pool.restore(tmp_path / "pool.backup", new)
        assert "taken out again: bob" in restored.stdout
        assert old.request("GET", "/v1/servers/alice").status_code == 401
        seen = {name: pool.operator.server(name)["agent"]["seen_at"] for name in ("alice", "carol")}
        for name, before in seen.items():
            wait_until(
                lambda name=name, before=before: pool.operator.server(name)["agent"]["seen_at"] > before,
                f"the agent of {name}",
                30,
            )
        wait_until(lambda: pool.operator.call("GET", "/v1/pool")["alarms"], "the alarm", 30)
        (alarm,) = pool.operator.call("GET", "/v1/pool")["alarms"]
        assert alarm.startswith("DNS: frozen")
        assert targets(pool) == {"alice", "carol"}

        thawed = pool.poolsvc("thaw", "--yes")
        assert not [
            line for line in thawed.stdout.splitlines() if "bob" in line and not line.endswith("nothing")
        ]
        wait_until(lambda: pool.operator.call("GET", "/v1/pool")["alarms"] == [], "no alarm", 30)
        receipt = pool.wait_for_state(members[1], "removed")["receipt"]
        assert None not in (receipt["name_broken_at"], receipt["certificate_revoked_at"])
        assert targets(pool) == {"alice", "carol"}
        wait_until(lambda: not members[1].process.running(), "the end of the agent that was told to go", 30)
        assert members[0].process.running()
        assert members[2].process.running()
