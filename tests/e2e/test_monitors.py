"""Five monitors and eight servers, each on a host of its own: what they see, and what comes of it in DNS."""

import json
import os
from contextlib import ExitStack

import pytest

from lab.internet import Internet
from lab.namespaces import in_namespace
from lab.pool import LabPool
from lab.processes import wait_until
from lab.programs import run
from lab.volunteer import ChronyVolunteer, NtpsecVolunteer
from member_agent.sockets import Endpoint

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="networks of one's own take root"),
    pytest.mark.timeout(600),
]

REGISTRY = "10.0.0.1"
OWN, CHRONY, NTPSEC = "own", "chrony", "ntpsec"
SERVERS = {
    "anna": OWN,
    "bert": OWN,
    "cora": CHRONY,
    "dora": CHRONY,
    "emil": NTPSEC,
    "fritz": OWN,
    "gerd": CHRONY,
    "hans": OWN,
}
WITHOUT_IPV6 = "hans"
_ORPHAN = "tos orphan 10 orphanwait 1 minsane 1 minclock 1\n"


class World:
    """The pool, the hosts of its servers and of its monitors."""

    def __init__(self, directory):
        self.directory = directory
        self.stack = ExitStack()
        self.members, self.daemons, self.hosts = {}, {}, {}

    def __enter__(self):
        with ExitStack() as stack:
            self.net = stack.enter_context(Internet(self.directory))
            self.pool = LabPool(self.directory / "pool", registry_address=REGISTRY, opening_size=4)
            self.pool.primary.address = REGISTRY
            self.pool.ke_port, self.pool.ntp_port = 4460, 123
            self.pool.registry.env["POOLSVC_POLICY__REQUIRE_SOURCE_ADDRESS"] = "false"
            stack.enter_context(self.pool)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_):
        self.stack.close()

    def add(self, name, kind):
        """A server with its agent, on a host of its own."""
        host = self.hosts[name] = self.net.host(name)
        addresses = [host.address] if name == WITHOUT_IPV6 else [host.address, host.ipv6_address]
        member = self.pool.add(name, addresses=addresses)
        member.state.mkdir(mode=0o700)
        member.process.argv = [*host.inside(), *member.process.argv]
        home = self.directory / "homes" / name
        places = Endpoint("::", 4460), Endpoint("::", 123)
        if kind == CHRONY:
            self.daemons[name] = ChronyVolunteer(home, places=places, host=host)
        elif kind == NTPSEC:
            self.daemons[name] = NtpsecVolunteer(home, host, _ORPHAN)
        settings = "ntp_port = 123\nlocal_stratum = 10\n"
        if name in self.daemons:
            daemon = self.stack.enter_context(self.daemons[name])
            table = "".join(f"{key} = {json.dumps(value)}\n" for key, value in daemon.settings().items())
            settings += f"[engine]\n{table}"
        (member.state / "agent.toml").write_text(settings)
        options = ["--token", member.register(), "--state", str(member.state), "--wait", "0", "--yes"]
        joined = run("pool-agent", "join", self.pool.url, *options, "--ca", str(self.pool.registry_root))
        assert joined.status == 0, joined
        member.process.start()
        self.members[name] = member
        return member


def in_world(directory, story):
    def told():
        with World(directory) as world:
            story(world)

    in_namespace(told, [f"{REGISTRY}/32"])


def test_states_and_answers_are_as_they_should_be_at_each_moment(tmp_path):
    def story(world):
        for name, kind in SERVERS.items():
            world.add(name, kind)
        for member in world.members.values():
            world.pool.wait_for_state(member, "active", 60)
        wait_until(lambda: all(member.view()["in_dns"] for member in world.members.values()), "the SRV")

    in_world(tmp_path, story)
