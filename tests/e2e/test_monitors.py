"""Five monitors and eight servers, each on a host of its own: what they see, and what comes of it in DNS."""

import json
import os
import time
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
    pytest.mark.timeout(600),
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
                opening_size=4,
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

    def score(self, name, ipv6=False):
        """By all monitors; of its worst address if it has several, or of its IPv6 address."""
        scores = [one["score"] for one in self.view(name)["addresses"] if (":" in one["address"]) >= ipv6]
        return min((score for score in scores if score is not None), default=None)

    def sights(self, name, ipv6=False):
        """By monitor what it sees of a server's address, if it has a say."""
        (address,) = [one for one in self.view(name)["addresses"] if (":" in one["address"]) == ipv6]
        return {one["monitor"]: one for one in address["monitors"] if one["counts"] and one["at"]}

    def sight(self, name, monitor):
        """What one monitor sees of a server's IPv4 address, whether it has a say or not."""
        address = next(one for one in self.view(name)["addresses"] if ":" not in one["address"])
        return next(one for one in address["monitors"] if one["monitor"] == monitor)

    def active(self):
        return {name for name in SERVERS if self.view(name)["state"] == "active"}

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
MONITORS = [f"mon{number}" for number in range(1, 6)]
EVERYBODY = set(SERVERS)
_LOG = open("/tmp/e2e.log", "w", buffering=1)
_T = [0]


def note(*x):
    _LOG.write(f"{time.monotonic() - _T[0]:.1f} {x}\n")


def test_states_and_answers_are_as_they_should_be_at_each_moment(tmp_path):
    def story(world):
        _T[0] = time.monotonic()
        pool, net, hosts = world.pool, world.net, world.hosts
        for name in REFERENCES:
            world.reference(name)
        for name, kind in SERVERS.items():
            world.server(name, kind)
        for member in world.members.values():
            pool.wait_for_state(member, "active", 90)
        note("active")
        assert pool.api().call("GET", "/v1/pool")["quorum"] == "bootstrap"
        for name in MONITORS:
            world.monitor(name)
        wait_until(
            lambda: all(len(world.sights(name)) >= 5 for name in SERVERS), "five who have a say on each", 90
        )
        note("six")
        wait_until(lambda: pool.api().call("GET", "/v1/pool")["quorum"] != "bootstrap", "the quorum", 90)
        note("quorum", pool.api().call("GET", "/v1/pool"))
        wait_until(lambda: min(map(world.score, SERVERS)) > 15, "full shares", 120)
        note("full", {name: world.score(name) for name in SERVERS})
        assert world.active() == world.targets() == EVERYBODY
        (only,) = world.view(WITHOUT_IPV6)["addresses"]
        assert only["address"] == hosts[WITHOUT_IPV6].address, "a family without an address has no score"

        # One monitor reaches no server, another one loses half of all packets, a third has a long way.
        far = [Fault(hosts["mon1"], hosts[name], 100) for name in SERVERS]
        lossy = [Fault(hosts["mon2"], hosts[name], 20, udp_port=123) for name in SERVERS]
        net.break_down(*far, *lossy)
        for name in ("anna", "emil"):
            net.delay(hosts["mon3"], hosts[name], 123, 0.2)
        wait_until(
            lambda: max(world.sight(name, "mon1")["score"] for name in SERVERS) < 0, "silence for one", 180
        )
        note(
            "mon1 silent",
            {
                name: (world.score(name), {m: round(v["score"], 1) for m, v in world.sights(name).items()})
                for name in SERVERS
            },
        )
        assert world.active() == world.targets() == EVERYBODY
        assert min(map(world.score, SERVERS)) > 10
        assert world.sight("anna", "mon3")["delay_ns"] > 0.3 * _S
        net.mend(*far, *lossy)

        # A monitor that does not know the time says nothing.
        blind = [Fault(hosts["mon4"], hosts[name], 100) for name in REFERENCES]
        net.break_down(*blind)
        wait_until(
            lambda: pool.operator.call("GET", "/v1/monitors/mon4")["sound"] is False, "an unsound one", 60
        )
        note("unsound", pool.operator.call("GET", "/v1/monitors/mon4")["sound_detail"])
        assert "mon4" not in world.sights("anna")
        net.mend(*blind)

        # A clock that is two seconds off, and comes back.
        right = world.daemons["gerd"]
        own = "".join(
            f"server {hosts[name].address} iburst minpoll 0 maxpoll 1 offset 2.0\n" for name in REFERENCES
        )
        right.change(own)
        wait_until(lambda: world.view("gerd")["state"] == "suspended", "the wrong clock's hold", 120)
        note("gerd out", world.view("gerd")["why"])
        wait_until(lambda: world.targets() == EVERYBODY - {"gerd"}, "the answer without it", 30)
        right.change("")
        note("gerd changed")

        # IPv6 of one server is away everywhere: that address alone.
        gone = Fault(None, hosts["bert"], 100, ipv6_only=True)
        net.break_down(gone)
        wait_until(lambda: world.score("bert", ipv6=True) < 10, "the address that fails", 120)
        note("bert v6")
        assert "bert" in world.active()
        wait_until(lambda: not world.addresses("bert", "AAAA"), "out alone", 30)
        net.mend(gone)

        # Most monitors lose most packets to one server; the others do not.
        loss = [Fault(hosts[name], hosts["dora"], 90, udp_port=123) for name in MONITORS]
        net.break_down(*loss)
        wait_until(lambda: world.view("dora")["state"] == "suspended", "loss for the majority", 120)
        note("dora out")
        wait_until(lambda: "dora" not in world.targets(), "the answer without it", 30)
        net.mend(*loss)

        # All is well again, and all are back after a while of it.
        wait_until(lambda: world.active() == EVERYBODY, "everybody", 240)
        note("all", {name: world.score(name) for name in SERVERS})
        wait_until(lambda: world.targets() == EVERYBODY, "the answer", 30)
        assert pool.api().call("GET", "/v1/pool")["alarms"] == []

    in_world(tmp_path, story)
