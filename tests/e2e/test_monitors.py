"""Five monitors and eight servers, each on a host of its own: what they see, and what comes of it in DNS."""

import json
import os
from contextlib import ExitStack

import dns.message
import dns.query
import pytest

from lab.internet import Fault, Internet
from lab.namespaces import in_namespace
from lab.peers import CHRONY as CHRONY_PACKAGE
from lab.peers import NO_CLOCK, library_environment
from lab.pool import LabPool
from lab.processes import Process, wait_until
from lab.programs import run, script
from lab.volunteer import ChronyVolunteer, NtpsecVolunteer
from member_agent.sockets import Endpoint

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="networks of one's own take root"),
    pytest.mark.timeout(1800),
]

NAME, REGISTRY, REGISTRY_6 = "registry.test", "10.0.0.1", "2001:db8::1"
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
_ORPHAN = "tos orphan 10 orphanwait 1 minsane 1 minclock 1\nlimit average 1000\n"
# A reference whose clock is this host's.
_REFERENCE = """\
local stratum 3
allow all
port 123
cmdport 0
bindcmdaddress /
pidfile {directory}/pid
"""
_MONITOR = """\
registry = "{url}"
token_file = "token"
references = {references}
ca_file = "{root}"
roots_file = "{roots}"
check_interval = 0.5
report_interval = 0.2
jitter = 0.1
allow_private_addresses = true
"""
# Hours pass in minutes; what was seen stays fresh for as long as ever.
_HASTE = {
    "PROBE_SPACING": "0.4",
    "EXCHANGE_SPACING": "0.05",
    "MONITOR_POLL": "0.3",
    "REVIEW_INTERVAL": "3",
}
_S = 1_000_000_000


class World:
    """The pool, the hosts of its servers, of its monitors and of what these compare their clocks with."""

    def __init__(self, directory):
        self.directory = directory
        self.stack = ExitStack()
        self.members, self.daemons, self.hosts = {}, {}, {}

    def __enter__(self):
        with ExitStack() as stack:
            self.net = stack.enter_context(Internet(self.directory, {NAME: (REGISTRY, REGISTRY_6)}))
            self.pool = LabPool(
                self.directory / "pool",
                registry_address=REGISTRY,
                registry_name=NAME,
                more_addresses=[f"[{REGISTRY_6}]"],
                opening_size=3,
            )
            self.pool.primary.address = REGISTRY
            self.pool.ke_port, self.pool.ntp_port = 4460, 123
            self.pool.registry.env |= {f"POOLSVC_POLICY__{name}": value for name, value in _HASTE.items()}
            stack.enter_context(self.pool)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_):
        self.stack.close()

    def server(self, name, kind):
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
        options += ["--ca", str(self.pool.registry_root)]
        joined = run("pool-agent", "join", self.pool.public_url, *options, inside=host.inside())
        assert joined.status == 0, joined
        member.process.start()
        self.members[name] = member

    def reference(self, name):
        """A chronyd that everybody may ask."""
        host = self.hosts[name] = self.net.host(name)
        directory = self.directory / name
        directory.mkdir()
        config = directory / "chrony.conf"
        config.write_text(_REFERENCE.format(directory=directory))
        argv = [*NO_CLOCK, *host.inside(), *CHRONY_PACKAGE.command("usr/sbin/chronyd")]
        argv += ["-x", "-d", "-u", "root", "-f", str(config)]
        self.stack.enter_context(Process(name, argv, directory, env=library_environment()).start())

    def monitor(self, name):
        """One of the pool's own, approved, on a host of its own."""
        host = self.hosts[name] = self.net.host(name)
        directory = self.directory / name
        directory.mkdir()
        made = self.pool.operator.call("POST", "/v1/monitors", {"name": name})
        token = directory / "token"
        token.touch(mode=0o600)
        token.write_text(made["token"])
        references = [f"ntp:{self.hosts[each].address}" for each in REFERENCES]
        references += [f"ntp:[{self.hosts[each].ipv6_address}]" for each in REFERENCES]
        (directory / "monitor.toml").write_text(
            _MONITOR.format(
                url=self.pool.public_url,
                references=json.dumps(references),
                root=self.pool.registry_root,
                roots=self.pool.roots,
            )
        )
        for status in ("testing", "active"):
            self.pool.operator.call("PATCH", f"/v1/monitors/{name}", {"status": status, "reason": "a test"})
        argv = [*host.inside(), script("poolsvc"), "monitor", "--config", str(directory / "monitor.toml")]
        self.stack.enter_context(Process(name, argv, directory).start())

    def view(self, name):
        return self.pool.operator.server(name)

    def of_pool(self):
        return self.pool.api().call("GET", "/v1/pool")

    def of_monitor(self, name):
        return self.pool.operator.call("GET", f"/v1/monitors/{name}")

    def score(self, name):
        """By all monitors; of its worst address."""
        return min(one["score"] or 0 for one in self.view(name)["addresses"])

    def _seen(self, name):
        """By monitor what it sees of a server's IPv4 address."""
        address = next(one for one in self.view(name)["addresses"] if ":" not in one["address"])
        return {one["monitor"]: one for one in address["monitors"] if one["at"]}

    def sights(self, name):
        """Those of monitors that have a say."""
        return {monitor: seen for monitor, seen in self._seen(name).items() if seen["counts"]}

    def sight(self, name, monitor):
        """That of one monitor, whether it has a say or not."""
        return self._seen(name)[monitor]

    def active(self):
        return {name for name in self.members if self.view(name)["state"] == "active"}

    def addresses(self, name, kind):
        """Of a server, as the resolver has them."""
        query = dns.message.make_query(f"{name}.servers.pool.example", kind)
        answer = dns.query.udp(query, self.pool.unbound.address, timeout=5, port=self.pool.unbound.port)
        return [rdata.to_text() for rrset in answer.answer for rdata in rrset]

    def targets(self):
        """Who is in the SRV, as a validating resolver has it."""
        found = self.pool.client("--count", "8")
        return {source["name"].partition(".")[0] for source in found.document["sources"]}


def in_world(directory, story):
    def told():
        with World(directory) as world:
            story(world)

    in_namespace(told, [f"{REGISTRY}/32", f"{REGISTRY_6}/128"])


REFERENCES = ["ref1", "ref2", "ref3"]
FEW = ("anna", "cora", "fritz", WITHOUT_IPV6)


def begin(world, servers, monitors):
    """Admitted by the registry's own monitor alone, which is bootstrap; then by the quorum of all."""
    for name in REFERENCES:
        world.reference(name)
    for name in servers:
        world.server(name, SERVERS[name])
    for member in world.members.values():
        world.pool.wait_for_state(member, "active", 120)
    assert world.of_pool()["quorum"] == "bootstrap"
    for number in range(1, monitors + 1):
        world.monitor(f"mon{number}")
    wait_until(lambda: all(len(world.sights(name)) >= monitors for name in servers), "who has a say", 180)
    wait_until(lambda: world.of_pool()["quorum"] == "3", "the quorum", 120)
    wait_until(lambda: world.targets() == world.active() == set(servers), "the first answer", 120)
    (only,) = world.view(WITHOUT_IPV6)["addresses"]
    assert only["address"] == world.hosts[WITHOUT_IPV6].address, "a family without an address has no score"


def reaches_nobody(world, monitor):
    """What one monitor cannot reach keeps its place; then it reaches them again."""
    far = [Fault(world.hosts[monitor], world.hosts[name], 100) for name in world.members]
    world.net.break_down(*far)
    wait_until(
        lambda: sum(world.sight(name, monitor)["score"] < 8 for name in world.members) >= 2,
        "silence for one",
        240,
    )
    assert world.active() == world.targets() == set(world.members)
    assert min(map(world.score, world.members)) > 10
    world.net.mend(*far)


def is_wrong(world, name):
    """A clock that is two seconds off is out for all, and is right again."""
    own = "".join(
        f"server {world.hosts[each].address} iburst minpoll 0 maxpoll 1 offset 2.0\n" for each in REFERENCES
    )
    world.daemons[name].change(own)
    wait_until(lambda: world.view(name)["state"] == "suspended", "the wrong clock's hold", 240)
    assert "offset" in world.view(name)["why"]
    wait_until(lambda: world.targets() == set(world.members) - {name}, "the answer without it", 60)
    world.daemons[name].change("")


def are_all_back(world):
    wait_until(lambda: world.active() == set(world.members), "everybody", 300)
    wait_until(lambda: world.targets() == set(world.members), "the answer", 60)
    assert world.of_pool()["alarms"] == []


def test_a_quorum_admits_and_a_wrong_clock_loses_its_place_and_comes_back(tmp_path):
    def story(world):
        begin(world, FEW, 2)
        is_wrong(world, "cora")
        are_all_back(world)

    in_world(tmp_path, story)


@pytest.mark.long
def test_states_and_answers_are_as_they_should_be_at_each_moment(tmp_path):
    def story(world):
        begin(world, SERVERS, 5)
        net, hosts = world.net, world.hosts
        wait_until(lambda: min(map(world.score, SERVERS)) > 15, "whole shares", 240)

        # Beside the one that reaches nobody, one loses packets and another has a long way.
        lossy = [Fault(hosts["mon2"], hosts[name], 20, udp_port=123) for name in SERVERS]
        net.break_down(*lossy)
        for name in ("anna", "emil"):
            net.delay(hosts["mon3"], hosts[name], 123, 0.2)
        reaches_nobody(world, "mon1")
        wait_until(lambda: (world.sight("anna", "mon3")["delay_ns"] or 0) > 0.3 * _S, "the long way", 240)
        net.mend(*lossy)

        # A monitor that does not know the time says nothing.
        blind = [Fault(hosts["mon4"], hosts[name], 100) for name in REFERENCES]
        net.break_down(*blind)
        wait_until(lambda: world.of_monitor("mon4")["sound"] is False, "one that is not sound", 60)
        assert "0 of 6 references agree" in world.of_monitor("mon4")["sound_detail"]
        assert "mon4" not in world.sights("anna")
        net.mend(*blind)
        wait_until(lambda: world.of_monitor("mon4")["sound"], "sound again", 60)

        is_wrong(world, "gerd")

        # IPv6 of one server is away everywhere: that address goes alone.
        gone = Fault(None, hosts["bert"], 100, ipv6_only=True)
        net.break_down(gone)
        wait_until(lambda: not world.addresses("bert", "AAAA"), "the address alone", 240)
        assert "bert" in world.active()
        assert world.addresses("bert", "A") == [hosts["bert"].address]
        net.mend(gone)

        # Most of the packets of most monitors to one server get lost.
        loss = [Fault(hosts[f"mon{number}"], hosts["dora"], 90, udp_port=123) for number in range(1, 6)]
        net.break_down(*loss)
        wait_until(lambda: world.view("dora")["state"] == "suspended", "loss for the majority", 240)
        wait_until(lambda: "dora" not in world.targets(), "the answer without it", 60)
        net.mend(*loss)
        are_all_back(world)

    in_world(tmp_path, story)
