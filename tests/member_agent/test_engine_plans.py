"""What will be written for each daemon, and what in the user's configuration is in the way."""

import re

import pytest
from pydantic import ValidationError

from lab.peers import CHRONY, NTPSEC, library_environment
from member_agent.config import EngineSettings
from member_agent.engines import EngineError
from member_agent.engines.detect import detect
from member_agent.engines.external import ExternalEngine
from member_agent.engines.layout import MARK, Kind, Offer
from member_agent.sockets import Endpoint, parse_endpoint

ALICE, BOB = "alice.servers.pool.example", "bob.servers.other.example"
KE, NTP = Endpoint("192.0.2.1", 4460), Endpoint("192.0.2.1", 123)
# As Debian 12 and 13 ship them, without comments.
CHRONY_CONF = """\
confdir {etc}/chrony/conf.d
pool 2.debian.pool.ntp.org iburst
sourcedir /run/chrony-dhcp
keyfile /etc/chrony/chrony.keys
driftfile /var/lib/chrony/chrony.drift
ntsdumpdir /var/lib/chrony
logdir /var/log/chrony
maxupdateskew 100.0
rtcsync
makestep 1 3
leapsectz right/UTC
"""
NTP_CONF = """\
driftfile /var/lib/ntpsec/ntp.drift
leapfile /usr/share/zoneinfo/leap-seconds.list
# nts cert CERT_FILE
tos maxclock 11
tos minclock 4 minsane 3
server time.example nts
pool 0.debian.pool.ntp.org iburst
restrict default kod nomodify nopeer noquery limited
restrict 127.0.0.1
restrict ::1
"""
NTP_TOML = """\
[observability]
log-level = "info"
observation-path = "/var/run/ntpd-rs/observe"

[[source]]
mode = "pool"
address = "ntpd-rs.pool.ntp.org"
count = 4

[synchronization]
single-step-panic-threshold = 1800
"""


class Desk:
    """The configuration of each daemon in a directory, and plans for it."""

    def __init__(self, directory):
        self.etc = directory / "etc"
        self.write("chrony/chrony.conf", CHRONY_CONF.format(etc=self.etc))
        self.write("chrony/conf.d/README", "")
        self.write("ntpsec/ntp.conf", NTP_CONF)
        self.write("ntpd-rs/ntp.toml", NTP_TOML)

    def write(self, name, text):
        path = self.etc / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def add(self, name, *lines):
        self.write(name, (self.etc / name).read_text() + "\n".join(lines) + "\n")

    def plan(self, kind, *domains, ke=(KE,), ntp=(NTP,)):
        """The lines of each file that would be written, by its name below /etc; without those of the mark."""
        settings = EngineSettings(kind=kind, config_dir=self.etc / kind, unit_dir=self.etc / "systemd")
        engine = ExternalEngine(Kind(kind), settings, self.etc)
        changes = engine.plan(Offer(domains or (ALICE,), ke, ntp))
        assert all(each.lines[0] == MARK for each in changes if len(each.lines) > 1)
        return {
            str(each.path.relative_to(self.etc)): [
                line.replace(str(self.etc), "/etc") for line in each.lines if line != MARK
            ]
            for each in changes
        }


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path)


def test_of_debians_chrony_exactly_what_is_needed(desk):
    assert desk.plan("chrony", ALICE, BOB) == {
        f"chrony/pool-agent/{ALICE}.pem": [f"the key and the certificate of {ALICE}"],
        f"chrony/pool-agent/{BOB}.pem": [f"the key and the certificate of {BOB}"],
        "chrony/conf.d/pool-agent.conf": [
            f"ntsservercert /etc/chrony/pool-agent/{ALICE}.pem",
            f"ntsserverkey /etc/chrony/pool-agent/{ALICE}.pem",
            f"ntsservercert /etc/chrony/pool-agent/{BOB}.pem",
            f"ntsserverkey /etc/chrony/pool-agent/{BOB}.pem",
            "allow",
            "dumpdir /run/chrony",
        ],
        "chrony/pool-agent/options": ['DAEMON_OPTS="-r"'],
        "systemd/chrony.service.d/pool-agent.conf": [
            "[Service]",
            "EnvironmentFile=/etc/chrony/pool-agent/options",
        ],
    }


def test_of_a_chrony_that_serves_already_no_line_twice(desk):
    desk.write("default/chrony", '# theirs\nDAEMON_OPTS="-F 1 -r"  # kept\n')
    desk.add("chrony/chrony.conf", "Allow 0/0", "dumpdir /run/chrony", "port 123", "ntsport 4460")
    assert list(desk.plan("chrony").values())[1:] == [
        [
            f"ntsservercert /etc/chrony/pool-agent/{ALICE}.pem",
            f"ntsserverkey /etc/chrony/pool-agent/{ALICE}.pem",
        ]
    ]


def test_chrony_is_told_of_other_ports_and_of_everybody(desk):
    desk.write("chrony/conf.d/local.conf", "! theirs\nallow 192.0.2.0/24\nntsdumpdir /var/lib/chrony\n")
    plan = desk.plan("chrony", ke=(Endpoint("::", 4461),), ntp=(Endpoint("::", 1123),))
    assert plan["chrony/conf.d/pool-agent.conf"] == [
        "port 1123",
        "ntsport 4461",
        f"ntsservercert /etc/chrony/pool-agent/{ALICE}.pem",
        f"ntsserverkey /etc/chrony/pool-agent/{ALICE}.pem",
        "allow",
        "dumpdir /run/chrony",
    ]


def test_of_debians_ntpsec_exactly_what_is_needed(desk):
    assert desk.plan("ntpsec") == {
        "ntpsec/key.pem": [f"the key and the certificate of {ALICE}"],
        "ntpsec/ntp.d/pool-agent.conf": [
            "nts enable",
            "nts cert /etc/ntpsec/key.pem",
            "nts key /etc/ntpsec/key.pem",
        ],
    }


def test_of_debians_ntpd_rs_theirs_and_then_ours(desk):
    both = (Endpoint("0.0.0.0", 4460), Endpoint("::", 4460))
    plan = desk.plan("ntpd-rs", ke=both, ntp=(Endpoint("0.0.0.0", 123), Endpoint("::", 123)))
    assert plan["ntpd-rs/pool-agent.toml"] == [
        *NTP_TOML.splitlines(),
        "",
        "[[server]]",
        'listen = "[::]:123"',
        "[[nts-ke-server]]",
        'listen = "[::]:4460"',
        f'certificate-chain-path = "/etc/ntpd-rs/pool-agent/{ALICE}.pem"',
        f'private-key-path = "/etc/ntpd-rs/pool-agent/{ALICE}.pem"',
        "[keyset]",
        'key-storage-path = "/var/lib/pool-agent-ntpd-rs/keys"',
    ]
    assert plan["systemd/ntpd-rs.service.d/pool-agent.conf"] == [
        "[Service]",
        "ExecStart=",
        "ExecStart=/usr/bin/ntp-daemon -c /etc/ntpd-rs/pool-agent.toml",
        "AmbientCapabilities=CAP_NET_BIND_SERVICE",
    ]


def test_of_an_ntpd_rs_that_serves_already_no_listener_twice(desk):
    desk.add("ntpd-rs/ntp.toml", "[[server]]", 'listen = "[::]:123"', "[keyset]", "stale-key-count = 9")
    text = "\n".join(desk.plan("ntpd-rs")["ntpd-rs/pool-agent.toml"])
    assert text.count("[[server]]") == text.count("[keyset]") == 1
    assert "ntp-port" not in text


IN_THE_WAY = [
    ("chrony", "chrony/chrony.conf", "port 0", "serves nobody", "remove that line"),
    ("chrony", "chrony/chrony.conf", "port 1123", "the pool needs 123", "make it `port 123`"),
    ("chrony", "chrony/conf.d/own.conf", "ntsport 4461", "needs 4460", "make it `ntsport 4460`"),
    ("chrony", "chrony/conf.d/own.conf", "NTSServerCert /x", "certificate of its own", "ntsservercert"),
    ("chrony", "chrony/chrony.conf", "deny all", "denies everybody", "deny"),
    ("chrony", "chrony/chrony.conf", "bindaddress 192.0.2.9", "listens on 192.0.2.9 only", "bindaddress"),
    ("chrony", "default/chrony", 'DAEMON_OPTS="-F 1', "not understood", "quotes"),
    ("ntpsec", "ntpsec/ntp.conf", "nts enable", "NTS server already", "remove that line"),
    ("ntpsec", "ntpsec/ntp.d/own.conf", "nts key /x cert /y", "NTS server already", "remove that line"),
    ("ntpsec", "ntpsec/ntp.conf", "restrict -4 default ignore", "serves nobody", "remove ignore"),
    ("ntpsec", "ntpsec/ntp.conf", "interface ignore all", "does not listen", "remove that line"),
    ("ntpd-rs", "ntpd-rs/ntp.toml", "garbage", "cannot be extended", "ntp-ctl validate"),
    (
        "ntpd-rs",
        "ntpd-rs/ntp.toml",
        '[[nts-ke-server]]\nlisten = "[::]:4460"',
        "NTS server on 192.0.2.1:4460 already",
        "remove",
    ),
    ("ntpd-rs", "ntpd-rs/ntp.toml", "[[server]]\nlisten = 5", "not understood", "listen"),
]


@pytest.mark.parametrize(("kind", "file", "line", "problem", "remedy"), IN_THE_WAY)
def test_what_is_in_the_way_is_said_with_the_remedy(desk, kind, file, line, problem, remedy):
    if (desk.etc / file).exists():
        desk.add(file, line)
    else:
        desk.write(file, line + "\n")
    with pytest.raises(EngineError, match=re.escape(problem)) as found:
        desk.plan(kind)
    assert remedy in found.value.remedy


@pytest.mark.parametrize("kind", Kind)
def test_a_daemon_that_is_not_there(desk, kind):
    for file in ("chrony/chrony.conf", "ntpsec/ntp.conf", "ntpd-rs/ntp.toml"):
        (desk.etc / file).unlink()
    with pytest.raises(EngineError, match="there is no "):
        desk.plan(kind)


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("chrony", "chrony/conf.d/pool-agent.conf"),
        ("chrony", "systemd/chrony.service.d/pool-agent.conf"),
        ("ntpsec", "ntpsec/key.pem"),
        ("ntpsec", "ntpsec/ntp.d/pool-agent.conf"),
        ("ntpd-rs", "ntpd-rs/pool-agent.toml"),
    ],
)
def test_a_file_of_the_user_is_not_replaced(desk, kind, file):
    path = desk.write(file, "# theirs\n")
    with pytest.raises(EngineError, match="is there already"):
        desk.plan(kind)
    path.unlink()
    path.symlink_to(desk.write("marked", f"{MARK}\n"))
    with pytest.raises(EngineError, match="is there already"):
        desk.plan(kind)


def test_files_that_include_each_other_have_an_end(desk):
    desk.add("chrony/chrony.conf", f"include {desk.etc}/chrony/chrony.conf")
    desk.add("ntpsec/ntp.conf", "includefile ntp.conf")
    for kind in ("chrony", "ntpsec"):
        with pytest.raises(EngineError, match="include too many"):
            desk.plan(kind)


def test_a_configuration_that_is_too_large_is_not_read(desk):
    desk.write("ntpd-rs/ntp.toml", "#" * 2_000_000)
    with pytest.raises(EngineError, match="too large"):
        desk.plan("ntpd-rs")


@pytest.mark.parametrize("kind", ["ntpsec", "ntpd-rs"])
def test_daemons_with_one_certificate_are_given_one_name(desk, kind):
    with pytest.raises(EngineError, match="one certificate"):
        desk.plan(kind, ALICE, BOB)


def test_ports_that_a_daemon_cannot_have(desk):
    with pytest.raises(EngineError, match="on port 4460 only"):
        desk.plan("ntpsec", ke=(Endpoint("192.0.2.1", 4461),))
    with pytest.raises(EngineError, match="one NTS-KE port, not 4460, 4461"):
        desk.plan("chrony", ke=(KE, Endpoint("192.0.2.1", 4461)))
    desk.add("ntpd-rs/ntp.toml", "[[server]]", 'listen = "192.0.2.7:123"')
    with pytest.raises(EngineError, match=r"serves 192\.0\.2\.7:123 only"):
        desk.plan("ntpd-rs", ntp=(parse_endpoint("0.0.0.0:123", "ntp"),))


def program(directory, name, text):
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.write_text(f"#!/bin/sh\necho '{text}'\n")
    path.chmod(0o755)


def test_daemons_are_told_apart_by_what_they_say(tmp_path):
    place = tmp_path / "bin"
    program(place, "chronyd", "chronyd (chrony) version 4.0 (+CMDMON +NTS)")
    program(place, "ntpd", "ntpd 4.2.8p15@1.3728-o")
    program(place, "ntp-daemon", "ntp-daemon 1.4.0")
    found = {each.kind: each for each in detect(EngineSettings(), path=str(place))}
    assert found[Kind.CHRONY].version == "4.0"
    assert "too old" in found[Kind.CHRONY].problem
    assert "is not ntpsec" in found[Kind.NTPSEC].problem
    assert "builtin" in found[Kind.NTPSEC].remedy
    assert (found[Kind.NTPD_RS].version, found[Kind.NTPD_RS].problem) == ("1.4", None)
    assert str(found[Kind.NTPD_RS].config) == "/etc/ntpd-rs"


def test_the_real_daemons_are_known(monkeypatch):
    directories = [
        package.command(path)[0].rpartition("/")[0]
        for package, path in ((CHRONY, "usr/sbin/chronyd"), (NTPSEC, "usr/sbin/ntpd"))
    ]
    monkeypatch.setattr("member_agent.engines.detect._ENVIRONMENT", {**library_environment(), "LC_ALL": "C"})
    found = detect(EngineSettings(), path=":".join(directories))
    assert {each.kind: (each.version, each.problem) for each in found} == {
        Kind.CHRONY: ("4.3", None),
        Kind.NTPSEC: ("1.2", None),
    }


def test_a_program_that_hangs_or_shouts_is_no_engine(tmp_path):
    program(tmp_path / "bin", "chronyd", "x" * 100_000)
    (found,) = detect(EngineSettings(), path=str(tmp_path / "bin"))
    assert found.problem
    assert len(found.version) < 100


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"config_dir": "/etc/chrony"}, "config_dir: name the daemon in kind"),
        ({"kind": "builtin", "reload": ["true"], "log": "/x"}, "reload, log: name the daemon"),
        ({"kind": "chrony", "config_dir": "etc/chrony"}, "write the whole path"),
        ({"kind": "openntpd"}, "kind"),
        ({"deadline": 0}, "deadline"),
    ],
)
def test_settings_that_do_not_belong_to_one_daemon(given, problem):
    with pytest.raises(ValidationError, match=problem):
        EngineSettings(**given)
