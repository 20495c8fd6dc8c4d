"""Lives of members while the embedded DNS server is killed again and again, and a watcher resolves all the time."""

import os
import random
import signal
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import dns.message
import dns.query
import dns.rcode
import pytest

from lab.pool import POOL, LabPool
from lab.processes import wait_until
from lab.watcher import Watcher

DEADLINE = 120.0
SERVICE = f"_ntske._tcp.{POOL}."


def dns_process(pool):
    """The registry's child that serves the zone; None between two of them."""
    for task in Path(f"/proc/{pool.registry.pid}/task").iterdir():
        for pid in (task / "children").read_text().split():
            with suppress(OSError):
                if b"poolsvc.embedded_dns" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return int(pid)
    return None


@contextmanager
def killing(pool, kills):
    """Kills the DNS server so many times while the body runs, and the rest of them after it; the number so far."""
    done, ending = [0], threading.Event()

    def run():
        while done[0] < kills and not ending.is_set():
            ending.wait(random.uniform(0.2, 2.5))
            if (pid := dns_process(pool)) is not None:
                os.kill(pid, signal.SIGKILL)
                done[0] += 1

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield done
    finally:
        ending.set()
        thread.join()


def join(pool, watcher, name):
    """A member that is ACTIVE; until it has a certificate that was seen, the SRV must not have it."""
    member = pool.add(name).start()
    pool.wait_for_state(member, "certified", DEADLINE)
    watcher.allow([f"{member.domain}."])
    pool.wait_for_state(member, "active", DEADLINE)
    return member


def is_withdrawn(member):
    """Whether every nameserver was seen without its SRV entry."""
    receipt = member.view()["receipt"]
    return receipt is not None and receipt["srv_withdrawn_at"] is not None


def exists(server, name):
    query = dns.message.make_query(f"{name}.", "A")
    answer = dns.query.udp(query, server.address, timeout=5, port=server.port)
    return answer.rcode() == dns.rcode.NOERROR


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("kills", "lives"), [(2, 1), pytest.param(200, 40, marks=pytest.mark.long)])
def test_no_life_and_no_answer_goes_wrong_when_the_dns_server_is_killed(tmp_path, kills, lives):
    with (
        LabPool(tmp_path / "pool", addresses=100, opening_size=1) as pool,
        Watcher(SERVICE, {"server": pool.primary, "resolver": pool.unbound}, ttl=3) as watcher,
    ):
        stays = join(pool, watcher, "stays")
        with killing(pool, kills) as done:
            left = 0
            while left < lives or done[0] < kills:
                member = join(pool, watcher, f"m{left}")
                pool.member.call("DELETE", f"/v1/servers/{member.name}")
                wait_until(
                    lambda member=member: is_withdrawn(member), f"{member.name} out of the SRV", DEADLINE
                )
                watcher.settled([f"{stays.domain}."])
                pool.wait_for_state(member, "removed", DEADLINE)
                member.process.stop()
                left += 1
        wait_until(lambda: dns_process(pool) is not None, "the last server")
        wait_until(lambda: exists(pool.primary, stays.domain), "the zone is served")
        assert not any(exists(pool.primary, member.domain) for member in pool.members[1:])
        assert pool.poolsvc("zone", "check").status == 0
        assert min(watcher.answers.values()) > 10
    assert watcher.faults == []
    assert done[0] >= kills
