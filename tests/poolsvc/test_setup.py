"""`poolsvc init` as an operator runs it, and a real Knot with the configuration that it writes."""

import asyncio
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from poolsvc import acme, files, setup
from poolsvc.cli import ExitStatus, app
from poolsvc.config import load_settings
from poolsvc.delegation import parent_records
from poolsvc.publication import primary_config, zone_policy
from poolsvc.publisher import Publisher

POOL = "pool.example"
URL = "https://registry.example.net"
NAMES = {
    *("poolsvc.toml", "tsig.secret", "acme-account.pem", "poolsvc.service"),
    *("knot-pool.conf", "knot-tsig.conf", "bind-pool.conf", "bind-tsig.conf", "bind-pool.zone"),
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


def test_the_key_is_the_same_for_knot_bind_and_the_registry(init, tmp_path):
    init()
    secret = (tmp_path / "new" / "tsig.secret").read_text().strip()
    for name in ("knot-tsig.conf", "bind-tsig.conf"):
        assert secret in (tmp_path / "new" / name).read_text()
    for name in NAMES - {"tsig.secret", "knot-tsig.conf", "bind-tsig.conf"}:
        assert secret not in (tmp_path / "new" / name).read_text()


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
