"""`poolsvc init` as an operator runs it, and a real Knot with the configuration that it writes."""

import asyncio
import os
import re
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lab.processes import Process, free_port, require
from lab.programs import poolsvc, script
from nts_core import acme
from poolsvc import files, setup
from poolsvc.cli import ExitStatus, app
from poolsvc.config import load_settings
from poolsvc.delegation import parent_records
from poolsvc.edge import EdgeSettings, Source
from poolsvc.publication import primary_config, zone_policy
from poolsvc.publisher import Publisher

POOL = "pool.example"
URL = "https://registry.example.net"
SOME = ("ns2.example.net=2001:db8::53", "ns2.example.net=192.0.2.53:5353", "ns3.example.net=192.0.2.54")
NAMES = {
    *("poolsvc.toml", "tsig.secret", "acme-account.pem", "poolsvc.service"),
    *("knot-pool.conf", "knot-tsig.conf", "knot-secondary.conf", "knot-edge.conf", "edge.toml"),
    *("bind-pool.conf", "bind-tsig.conf", "bind-options.conf", "bind-secondary.conf", "nsd-secondary.conf"),
    *("pdns-pool.conf", "pdns-pool.lua", "pdns-pool.sh", "pdns-tsig.sh", "pool.zone"),
}

EMBEDDED_NAMES = {
    *("poolsvc.toml", "transfer.secret", "edge.secret", "acme-account.pem", "poolsvc.service"),
    *("edge.toml", "poolsvc-edge.service"),
    *(
        "knot-secondary.conf",
        "knot-edge.conf",
        "bind-secondary.conf",
        "bind-options.conf",
        "nsd-secondary.conf",
    ),
}


@pytest.fixture(autouse=True)
def _no_settings_of_the_machine(monkeypatch):
    for name in [name for name in os.environ if name.startswith("POOLSVC_")]:
        monkeypatch.delenv(name)


def refused(done, status, *words):
    assert done.exit_code == status, done.output
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    for word in words:
        assert word in done.stderr


def test_everything_is_written_for_the_owner_alone_and_can_be_used(init, tmp_path):
    done = init("--contact=mailto:op@example.net", "--nameserver=ns2.example.net=2001:db8::53")
    assert done.exit_code == ExitStatus.OK, done.output
    directory = tmp_path / "new"
    assert {path.name for path in directory.iterdir()} == NAMES
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o600}
    assert directory.stat().st_mode & 0o777 == 0o700
    settings = load_settings(directory / "poolsvc.toml")
    assert (settings.pool, settings.public_url, settings.ca.caa_identity) == (POOL, URL, "letsencrypt.org")
    assert settings.dns.nameservers[1] == "[2001:db8::53]:53"
    assert settings.dns.primary == settings.dns.nameservers[0]
    assert settings.ca.contact == ("mailto:op@example.net",)
    assert not [*files.faults(settings), *files.exposed(settings, directory / "poolsvc.toml")]
    acme.load_account_key(settings.ca.account_key_file)


def test_without_a_primary_of_ones_own_the_registry_serves_the_zone(init, tmp_path):
    """All that is left to do is what the answer of `init` says."""
    directory, listen = tmp_path / "new", f"127.0.0.1:{free_port()}"
    done = init("--nameserver=ns2.example.net=2001:db8::53", embedded=True)
    assert done.exit_code == ExitStatus.OK, done.output
    config = directory / "poolsvc.toml"
    assert {path.name for path in directory.iterdir()} == EMBEDDED_NAMES
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o600}
    settings = load_settings(config)
    assert settings.dns.embedded is not None
    assert [each.address for each in settings.dns.embedded.secondaries] == ["[2001:db8::53]:53"]
    assert not [*files.faults(settings), *files.exposed(settings, config)]
    secret = (directory / "transfer.secret").read_text().strip()
    for name in ("knot-secondary.conf", "bind-secondary.conf", "nsd-secondary.conf"):
        assert secret in (directory / name).read_text()
    edge = (directory / "knot-edge.conf").read_text()
    assert secret not in edge, "who gets the zone unsigned has another key"
    assert (directory / "edge.secret").read_text().strip() in edge
    at_edge = EdgeSettings.read(directory / "edge.toml")
    assert at_edge.tsig_secret_file == directory / "edge.secret"
    assert f"config-file: {at_edge.sets_file}" in edge
    assert f"ttl: {settings.dns.srv_ttl}" in edge
    Source(at_edge)
    (directory / "sets.conf").touch()
    (directory / "here.conf").write_text(edge.replace(str(at_edge.sets_file), str(directory / "sets.conf")))
    checked = subprocess.run(
        [require("knotc"), "-c", "here.conf", "conf-check"],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr
    assert "AmbientCapabilities=CAP_NET_BIND_SERVICE" in (directory / "poolsvc.service").read_text()
    assert poolsvc(config, "migrate").status == 0
    environment = {"POOLSVC_LISTEN": f'["{listen}"]', "POOLSVC_PUBLIC_URL": "http://127.0.0.1"}
    serve = Process(
        "poolsvc", [script("poolsvc"), "serve", "--config", str(config)], directory, env=environment
    )
    with serve:
        serve.start(lambda: "IN DS" in poolsvc(config, "parent-records").stdout)
        lines = poolsvc(config, "parent-records").stdout.splitlines()
    assert {f"{POOL}. 3600 IN NS ns1.{POOL}.", f"{POOL}. 3600 IN NS ns2.example.net."} <= set(lines)
    assert any(re.fullmatch(rf"{POOL}\. 3600 IN DS \d+ 13 2 [0-9a-f]{{64}}", line) for line in lines), lines
    assert f'{POOL}. 3600 IN CAA 0 issue ";"' in lines
    assert {path.stat().st_mode & 0o777 for path in (directory / "dns").iterdir()} == {0o600}


def test_the_operator_of_the_first_day_can_sign_in(init, tmp_path):
    """Without an address nobody could."""
    (line,) = [line.strip() for line in init().stdout.splitlines() if "operator create" in line]
    assert line == f"poolsvc operator create --config {tmp_path / 'new' / 'poolsvc.toml'} --email EMAIL"


def test_the_parents_lines_are_printed_and_no_secret(init, tmp_path):
    done = init("--nameserver=ns2.example.net=2001:db8::53")
    lines = [line.strip() for line in done.stdout.splitlines()]
    for line in (
        f"{POOL}. 3600 IN NS ns1.{POOL}.",
        f"{POOL}. 3600 IN NS ns2.example.net.",
        f"ns1.{POOL}. 3600 IN A 127.0.0.1",
        f'{POOL}. 3600 IN CAA 0 issue ";"',
    ):
        assert line in lines
    assert not any("ns2.example.net. 3600 IN AAAA" in line for line in lines), "glue for another's name"
    assert (tmp_path / "new" / "tsig.secret").read_text().strip() not in done.stdout


def test_two_pools_have_different_keys(init, tmp_path):
    for name in ("a", "b"):
        assert init(directory=tmp_path / name).exit_code == ExitStatus.OK
    for name in ("tsig.secret", "acme-account.pem"):
        assert (tmp_path / "a" / name).read_bytes() != (tmp_path / "b" / name).read_bytes()


def test_the_key_is_the_same_for_all_primaries_and_the_registry(init, tmp_path):
    init()
    secret = (tmp_path / "new" / "tsig.secret").read_text().strip()
    with_key = {"knot-tsig.conf", "bind-tsig.conf", "pdns-tsig.sh"}
    for name in with_key:
        assert secret in (tmp_path / "new" / name).read_text()
    for name in NAMES - {"tsig.secret", *with_key}:
        assert secret not in (tmp_path / "new" / name).read_text()


def test_a_secondary_gets_a_key_that_changes_nothing(init, tmp_path):
    init("--nameserver=ns2.example.net=2001:db8::53")
    (secret,) = re.findall(r'secret "(\S+)"', (tmp_path / "new" / "bind-secondary.conf").read_text())
    assert secret != (tmp_path / "new" / "tsig.secret").read_text().strip()
    for name in (
        "knot-secondary.conf",
        "nsd-secondary.conf",
        "knot-pool.conf",
        "bind-pool.conf",
        "pdns-pool.sh",
    ):
        assert secret in (tmp_path / "new" / name).read_text()


@pytest.mark.parametrize("nameservers", [(), SOME], ids=["alone", "many"])
def test_all_servers_read_what_init_wrote(init, tmp_path, nameservers):
    """Secondaries with IPv6, with several addresses, and none at all."""
    directory = tmp_path / "new"
    done = init(*(f"--nameserver={server}" for server in nameservers))
    assert done.exit_code == ExitStatus.OK, done.output
    for name in ("bind-pool.conf", "bind-options.conf"):
        text = (directory / name).read_text()
        for place in ("/etc/bind", "/var/lib/bind", "/var/cache/bind"):
            text = text.replace(place, str(directory))
        (directory / name).write_text(text)
    for command in (
        ("knotc", "-c", "knot-pool.conf", "conf-check"),
        ("knotc", "-c", "knot-secondary.conf", "conf-check"),
        ("named-checkconf", "bind-pool.conf"),
        ("named-checkconf", "bind-options.conf"),
        ("named-checkconf", "bind-secondary.conf"),
        ("named-checkzone", POOL, "pool.zone"),
        ("nsd-checkconf", "nsd-secondary.conf"),
        ("sh", "-n", "pdns-pool.sh"),
    ):
        program, *arguments = command
        read = subprocess.run(
            [require(program), *arguments],
            cwd=directory,
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
        )
        assert read.returncode == 0, (command, read.stdout, read.stderr)
    for server in ("2001:db8::53", "192.0.2.54") if nameservers else ():
        for name in ("knot-pool.conf", "bind-pool.conf", "pdns-pool.sh"):
            assert server in (directory / name).read_text()


@pytest.mark.parametrize("name", sorted(NAMES))
@pytest.mark.parametrize("kind", ["file", "link to nothing", "directory"])
def test_nothing_is_overwritten(init, tmp_path, name, kind):
    directory = tmp_path / "new"
    directory.mkdir()
    (directory / "other").write_text("not ours")
    match kind:
        case "file":
            (directory / name).write_text("mine")
        case "directory":
            (directory / name).mkdir()
        case _:
            (directory / name).symlink_to(tmp_path / "nowhere")
    refused(init(), ExitStatus.CONFIGURATION, str(directory / name), "--directory")
    assert {path.name for path in directory.iterdir()} == {name, "other"}
    assert kind != "file" or (directory / name).read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


def test_a_file_that_appears_meanwhile_takes_the_others_back(tmp_path, monkeypatch):
    """Another `init` in the same moment: one of the two wins, whole."""
    answers = setup.check_answers(
        pool=POOL,
        nameservers=(),
        public_url=URL,
        ca="https://ca.example/",
        caa_identity="ca.example",
        contact=(),
    )
    contents = setup.render(answers, directory=tmp_path / "new", program=Path("/usr/bin/poolsvc"))
    real = setup.tempfile.mkdtemp

    def late(**options):
        (tmp_path / "new" / "poolsvc.toml").write_text("the other's")
        return real(**options)

    monkeypatch.setattr(setup.tempfile, "mkdtemp", late)
    with pytest.raises(setup.WouldOverwrite, match=r"poolsvc\.toml"):
        setup.write(tmp_path / "new", contents)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["poolsvc.toml"]


def test_a_directory_that_cannot_be_made_is_named(init, tmp_path):
    (tmp_path / "file").write_text("")
    refused(init(directory=tmp_path / "file" / "new"), ExitStatus.CONFIGURATION, str(tmp_path / "file"))


@pytest.mark.parametrize(
    ("option", "remedy"),
    [
        ("--public-url=https://pool.example", "another domain"),
        ("--public-url=https://registry.POOL.example./", "another domain"),
        ("--public-url=https://a.servers.pool.example:8443", "another domain"),
        ("--public-url=http://registry.example.net", "another domain"),
        ("--public-url=ftp://registry.example.net", "another domain"),
        ('--public-url=https://registry.example.net/"', "another domain"),
        ("--public-url=https://[", "another domain"),
        ("--public-url=https://registry.example.net:port", "another domain"),
        ("--public-url=https://registry.example.net/\n", "another domain"),
        ("--ca=http://ca.example/dir", "directory"),
        ("--ca=https://", "directory"),
        ("--ca=https://ca.example/dir", "caaIdentities"),
        ("--caa-identity=ca example", "caaIdentities"),
        ('--caa-identity=ca.example"', "caaIdentities"),
        ("--contact=op@example.net", "mail"),
        ("--contact=mailto:op", "mail"),
        ("--contact=mailto:op@example.net\nFrom: x", "mail"),
        ("--contact=mailto:" + "o" * 400 + "@example.net", "mail"),
        ("--nameserver=ns1.pool.example", "1 to 16"),
        ("--nameserver=192.0.2.53", "1 to 16"),
        ("--nameserver=ns1.pool.example=ns1", "1 to 16"),
        ("--nameserver=ns1.pool.example=192.0.2.53:0", "1 to 16"),
        ("--nameserver=ns1.pool.example=192.0.2.53:99999", "1 to 16"),
        ("--nameserver=ns1=192.0.2.53", "1 to 16"),
        ("--nameserver=ns1.pool.example;rm=192.0.2.53", "1 to 16"),
        ("--directory=/tmp/a b", "letters"),
        ("--directory=/tmp/a%d", "letters"),
        ("--directory=/tmp/a\nExecStart=/bin/sh", "letters"),
    ],
)
def test_a_wrong_answer_names_its_option(init, tmp_path, option, remedy):
    refused(init(option), ExitStatus.USAGE, option.partition("=")[0], remedy)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "pool",
    ["", "pool", "pool..example", "pool-.example", "pool.example;", "pööl.example", f"{'a.' * 100}example"],
)
def test_a_pool_that_is_no_domain_is_refused(init, tmp_path, pool):
    refused(init(pool=pool), ExitStatus.USAGE, "POOL", "pool.example")
    assert not list(tmp_path.iterdir())


def test_a_long_name_is_told_and_one_that_is_too_long_is_refused(init, tmp_path):
    done = init(pool=f"{'a' * 55}.example", nameserver="--nameserver=ns1.example.net=127.0.0.1:1")
    assert done.exit_code == 0
    assert "holds 7 servers" in done.stderr
    more = init(pool=f"{'a' * 60}.{'b' * 63}.{'c' * 10}", directory=tmp_path / "other")
    refused(more, ExitStatus.USAGE, "POOL", "4 are needed")


def test_too_many_nameservers_are_refused(init):
    more = [f"--nameserver=ns{number}.example=192.0.2.{number}" for number in range(1, 17)]
    refused(init(*more), ExitStatus.USAGE, "--nameserver")


def test_without_nameservers_it_is_this_host(tmp_path):
    answers = setup.check_answers(
        pool="Pool.Example.",
        nameservers=(),
        public_url=URL,
        ca="https://ca.example/",
        caa_identity="ca.example",
        contact=(),
    )
    assert answers.primary == setup.NamedServer("ns1.pool.example", "127.0.0.1", 53)


def test_knot_takes_what_init_wrote_and_lets_the_registry_publish(first_day):
    settings = load_settings(first_day.settings)
    publisher = Publisher(zone_policy(settings), primary_config(settings))

    async def use():
        before = await publisher.observe()
        await publisher.rehearse()
        assert (await publisher.observe()).serial == before.serial
        await publisher.take_fence(1)
        return await publisher.observe()

    seen = asyncio.run(use())
    assert (seen.epoch, seen.soa_minimum) == ("1", 60)


def test_parent_records_show_the_key_that_signs(first_day):
    done = CliRunner().invoke(app, ["parent-records", "--config", str(first_day.settings)])
    assert done.exit_code == ExitStatus.OK, done.output
    records = asyncio.run(parent_records(POOL, first_day.server))
    assert len(records.ds) == 1
    assert {*records.ns, *records.glue, *records.ds, records.caa} <= set(done.stdout.splitlines())
    assert records.glue == (f"ns1.{POOL}. 3600 IN A 127.0.0.1",)


def test_parent_records_of_a_silent_primary_say_so(init, tmp_path):
    init()
    done = CliRunner().invoke(app, ["parent-records", "--config", str(tmp_path / "new" / "poolsvc.toml")])
    refused(done, ExitStatus.PEER, "does not answer")
