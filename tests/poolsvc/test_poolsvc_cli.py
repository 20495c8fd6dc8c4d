"""`poolsvc` as an operator runs it: exit statuses, remedies, and no secret on the screen."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import tomllib
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from sqlalchemy import select
from typer.testing import CliRunner

from lab import mmdb
from lab.processes import Process, free_port, wait_until
from lab.programs import Finished, run, script
from poolsvc import auth, members, servers, sign_in
from poolsvc.cli import ExitStatus, app
from poolsvc.config import load_settings
from poolsvc.db import Database
from poolsvc.derived import RegistryKey
from poolsvc.errors import SignInInvalid, Unauthenticated
from poolsvc.models import Event, Order, OrderStatus, StaffRole, User

CONFIG = """\
pool = "pool.example"
database = "{database}"
listen = ["127.0.0.1:{port}"]
public_url = "http://127.0.0.1:{port}"
{more}
[dns]
primary = "127.0.0.1:{dns}"
tsig_name = "publisher.pool.example"
tsig_secret_file = "tsig.secret"
nameservers = ["127.0.0.1:{dns}"]

[ca]
directory_url = "https://127.0.0.1:{ca}/dir"
caa_identity = "ca.example"
account_key_file = "account.pem"
"""
SECRET = "correct-horse"


@pytest.fixture(autouse=True)
def _no_settings_of_the_machine(monkeypatch):
    for name in [name for name in os.environ if name.startswith("POOLSVC_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def config(tmp_path):
    """Writes a settings file: `config(database_url, more lines)`."""

    def write(database="sqlite+aiosqlite:///registry.db", more=""):
        path = tmp_path / "poolsvc.toml"
        ports = {name: free_port() for name in ("port", "dns", "ca")}
        path.write_text(CONFIG.format(database=database, more=more, **ports))
        (tmp_path / "tsig.secret").write_text("c2VjcmV0LW9mLXRoZS1wdWJsaXNoZXI=")
        return path

    return write


def poolsvc(*arguments):
    """Run a command to its end; `serve` in a process of its own, because it sets the logging up."""
    if arguments[0] == "serve":
        return run("poolsvc", *map(str, arguments))
    done = CliRunner().invoke(app, [*map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return Finished(done.exit_code, done.stdout, done.stderr)


def failed(done, status, remedy):
    """A failure is one sentence and its remedy on standard error, and never a traceback."""
    assert done.status == status, done.stderr
    assert done.stderr.startswith("error: ")
    assert remedy in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_database(request, tmp_path):
    if request.param == "sqlite":
        yield f"sqlite+aiosqlite:///{tmp_path / 'registry.db'}"
        return
    cluster = request.getfixturevalue("cluster")
    url = cluster.create_database()
    yield url
    cluster.drop_database(url)


def test_migrate_then_operator_create_gives_a_token_that_works(config, empty_database):
    path = config(empty_database)
    failed(poolsvc("serve", "--config", path), ExitStatus.DATABASE, "run `poolsvc migrate --config FILE`")
    failed(
        poolsvc("operator", "create", "--config", path),
        ExitStatus.DATABASE,
        "run `poolsvc migrate --config FILE`",
    )
    assert poolsvc("migrate", "--config", path).status == ExitStatus.OK
    assert poolsvc("migrate", "--config", path).status == ExitStatus.OK
    made = poolsvc("operator", "create", "--config", path)
    assert made.status == ExitStatus.OK

    async def authenticated():
        database = Database(empty_database)
        try:
            async with database.transaction() as session:
                return await auth.authenticate(session, made.stdout.strip(), datetime.now(UTC))
        finally:
            await database.close()

    assert asyncio.run(authenticated()).staff is StaffRole.OPERATOR


def in_transaction(url, work):
    """What `work(session)` gives, in an event loop of its own."""

    async def run():
        database = Database(url)
        try:
            async with database.transaction() as session:
                return await work(session)
        finally:
            await database.close()

    return asyncio.run(run())


def test_an_operator_whose_mail_does_not_come_signs_in_from_the_console(config, empty_database):
    path = config(empty_database)
    poolsvc("migrate", "--config", path)
    command = ("operator", "sign-in", "--config", path, "--email")
    failed(poolsvc(*command, "op@example.org"), ExitStatus.USAGE, "poolsvc operator create --email")
    failed(poolsvc(*command, "nonsense"), ExitStatus.USAGE, "NAME@DOMAIN")
    poolsvc("operator", "create", "--config", path, "--email", "op@example.org")
    made = poolsvc(*command, "OP@example.org")
    assert made.status == ExitStatus.OK
    settings = load_settings(path)
    key = RegistryKey.load(settings.key_file)

    async def opened(session):
        return await sign_in.confirm(session, settings, key, made.stdout.strip(), datetime.now(UTC))

    user, _ = in_transaction(empty_database, opened)
    assert (user.email, user.staff) == ("op@example.org", StaffRole.OPERATOR)
    with pytest.raises(SignInInvalid):
        in_transaction(empty_database, opened)


def test_an_account_that_there_is_becomes_an_operators_from_the_console(config, empty_database):
    """After a restore nobody is staff, and the operator's account is there."""
    path = config(empty_database)
    poolsvc("migrate", "--config", path)

    async def make(session):
        await members.create_user(session, datetime.now(UTC), email="op@example.org", name="Op")

    in_transaction(empty_database, make)
    failed(
        poolsvc("operator", "sign-in", "--config", path, "--email", "op@example.org"),
        ExitStatus.USAGE,
        "operator create",
    )
    made = poolsvc("operator", "create", "--config", path, "--email", " OP@example.org", "--name", "Other")
    assert made.status == ExitStatus.OK

    async def found(session):
        bearer = await auth.authenticate(session, made.stdout.strip(), datetime.now(UTC))
        change = await session.scalar(
            select(Event).where(Event.user_id == 1).order_by(Event.id.desc()).limit(1)
        )
        return bearer, await session.get_one(User, 1), change

    bearer, user, change = in_transaction(empty_database, found)
    assert (bearer.user_id, bearer.staff) == (1, StaffRole.OPERATOR)
    assert (user.email, user.name) == ("op@example.org", "Op")
    assert (change.actor, change.after["staff"]) == ("console", "operator")
    again = poolsvc("operator", "sign-in", "--config", path, "--email", "op@example.org")
    assert again.status == ExitStatus.OK


def test_who_is_blocked_becomes_no_operator(config, empty_database):
    path = config(empty_database)
    poolsvc("migrate", "--config", path)

    async def make(session):
        user = await members.create_user(session, datetime.now(UTC), email="op@example.org")
        user.blocked_at = datetime.now(UTC)

    in_transaction(empty_database, make)
    refused = poolsvc("operator", "create", "--config", path, "--email", "op@example.org")
    failed(refused, ExitStatus.USAGE, "unblock them")
    assert in_transaction(empty_database, lambda session: session.get_one(User, 1)).staff is None


def test_ending_all_sessions_makes_links_void_too_and_leaves_programs_alone(config, empty_database):
    path = config(empty_database)
    poolsvc("migrate", "--config", path)
    program = poolsvc("operator", "create", "--config", path, "--email", "op@example.org").stdout.strip()
    link = poolsvc("operator", "sign-in", "--config", path, "--email", "op@example.org").stdout.strip()
    settings = load_settings(path)
    before = settings.key_file.read_bytes()
    now = datetime.now(UTC)

    async def begin(session):
        return await sign_in.open_session(session, await session.get_one(User, 1), now)

    person = in_transaction(empty_database, begin)
    done = poolsvc("key", "sessions", "--config", path)
    assert done.status == ExitStatus.OK
    assert done.stdout.startswith("1 sessions are ended")
    assert settings.key_file.read_bytes() != before
    assert settings.key_file.stat().st_mode & 0o777 == 0o600
    key = RegistryKey.load(settings.key_file)
    with pytest.raises(SignInInvalid):
        in_transaction(empty_database, lambda session: sign_in.confirm(session, settings, key, link, now))
    with pytest.raises(Unauthenticated, match="revoked"):
        in_transaction(empty_database, lambda session: auth.authenticate(session, person, now))
    assert (
        in_transaction(empty_database, lambda session: auth.authenticate(session, program, now)).user_id == 1
    )


def test_a_lost_key_of_a_certificate_is_a_command(config, empty_database):
    """What comes of it at the CA is `test_issuance`'s."""
    path = config(empty_database)
    poolsvc("migrate", "--config", path)
    now, settings = datetime.now(UTC), load_settings(path)

    async def certify(session):
        user, _ = await members.create_operator(session, now)
        member = await members.create(session, "Club", now, owner=user)
        server = await servers.register(session, settings, member.id, "alice", ["1.1.1.2"], now, actor="test")
        values = {"created_at": now, "chain": "PEM", "not_after": now + timedelta(days=1)}
        values["url"] = "https://ca.example/order/1"
        session.add(Order(server_id=server.id, status=OrderStatus.ISSUED, **values))

    async def lost(session):
        return await session.scalar(select(Order.compromised_at))

    in_transaction(empty_database, certify)
    failed(poolsvc("key", "certificate", "bob", "--config", path), ExitStatus.USAGE, "no server named")
    done = poolsvc("key", "certificate", "alice", "--config", path)
    assert done.status == ExitStatus.OK
    assert done.stdout.startswith("`poolsvc serve` revokes the certificates of alice")
    assert in_transaction(empty_database, lost) >= now
    failed(poolsvc("key", "certificate", "alice", "--config", path), ExitStatus.USAGE, "revoked already")


def test_serve_answers_over_http_and_ends_at_sigterm(config, tmp_path):
    """Its CA and its DNS server are away: both are alarms, and the API works."""
    path = config()
    assert poolsvc("migrate", "--config", path).status == ExitStatus.OK
    url = next(line for line in path.read_text().splitlines() if line.startswith("public_url")).split('"')[1]
    process = Process("poolsvc", [script("poolsvc"), "serve", "--config", str(path)], tmp_path)

    def alarmed():
        try:
            answer = httpx.get(f"{url}/v1/pool", trust_env=False, timeout=5)
        except httpx.TransportError:
            return False
        return any(alarm.startswith("CA: ") for alarm in answer.json()["alarms"])

    with process.start(alarmed):
        answer = httpx.get(f"{url}/v1/pool", trust_env=False)
        assert "server" not in answer.headers
        process.signal(15)
        assert process.wait() in {0, -15}
    assert "Traceback" not in process.output()
    for line in process.output().splitlines():
        json.loads(line)


def test_serve_on_a_taken_port_names_the_setting(config):
    path = config()
    assert poolsvc("migrate", "--config", path).status == ExitStatus.OK
    endpoint = path.read_text().split('listen = ["')[1].split('"')[0]
    with socket.create_server(("127.0.0.1", int(endpoint.rpartition(":")[2]))):
        done = poolsvc("serve", "--config", path)
    failed(done, ExitStatus.CONFIGURATION, f"listen {endpoint}")


def test_serve_with_unreadable_roots_names_the_setting(config, tmp_path):
    path = config(more='roots_file = "roots.pem"')
    assert poolsvc("migrate", "--config", path).status == ExitStatus.OK
    failed(poolsvc("serve", "--config", path), ExitStatus.CONFIGURATION, "PEM certificates")
    (tmp_path / "roots.pem").write_text("garbage")
    failed(poolsvc("serve", "--config", path), ExitStatus.CONFIGURATION, "PEM certificates")


@pytest.mark.parametrize(
    "command",
    [
        ["serve"],
        ["migrate"],
        ["operator", "create"],
        ["config", "show"],
        ["config", "check"],
        ["parent-records"],
        ["key", "tsig"],
        ["key", "acme-account"],
    ],
    ids=" ".join,
)
def test_every_command_names_a_wrong_setting(config, command):
    failed(
        poolsvc(*command, "--config", config(more="policy = 7")),
        ExitStatus.CONFIGURATION,
        "correct the setting",
    )


@pytest.mark.parametrize(
    ("command", "database"),
    [
        (["serve"], f"postgresql+psycopg://registry:{SECRET}@127.0.0.1:1/registry"),
        (["migrate"], f"postgresql+psycopg://registry:{SECRET}@127.0.0.1:1/registry"),
        (["migrate"], "sqlite+aiosqlite:////nowhere/at/all/registry.db"),
        (["operator", "create"], "sqlite+aiosqlite:////nowhere/at/all/registry.db"),
        (["operator", "create"], f"postgresql+psycopg://registry:{SECRET}@127.0.0.1:1/registry"),
    ],
)
def test_a_database_that_cannot_be_used_is_told_without_its_password(config, command, database):
    done = poolsvc(*command, "--config", config(database))
    assert done.status in {ExitStatus.DATABASE, ExitStatus.CONFIGURATION}, done.stderr
    assert done.stderr.startswith("error: ")
    assert "database" in done.stderr
    assert "Traceback" not in done.stderr
    assert SECRET not in done.stderr


def test_config_show_prints_the_effective_settings_and_no_secret(config, monkeypatch, tmp_path):
    monkeypatch.setenv("POOLSVC_POLICY__OPENING_SIZE", "9")
    done = poolsvc(
        "config", "show", "--config", config(f"postgresql+psycopg://registry:{SECRET}@db.example/registry")
    )
    assert done.status == ExitStatus.OK, done.stderr
    shown = json.loads(done.stdout)
    assert (shown["pool"], shown["policy"]["opening_size"]) == ("pool.example", 9)
    assert shown["dns"]["tsig_secret_file"] == str(tmp_path / "tsig.secret")
    assert "db.example" in shown["database"]
    assert SECRET not in done.stdout
    assert "c2VjcmV0" not in done.stdout


def test_config_check_is_content_with_what_serve_can_use(config):
    done = poolsvc("config", "check", "--config", config())
    assert (done.status, done.stdout) == (ExitStatus.OK, "ok\n"), done.stderr


@pytest.mark.parametrize(
    ("more", "setting"),
    [
        ('roots_file = "none.pem"', "roots_file"),
        ('tls_certificate = "none.pem"\ntls_key = "none.key"', "tls_certificate, tls_key"),
        ('tls_certificate = "tsig.secret"\ntls_key = "tsig.secret"', "tls_certificate, tls_key"),
    ],
)
def test_config_check_names_the_setting_of_a_file(config, more, setting):
    failed(poolsvc("config", "check", "--config", config(more=more)), ExitStatus.CONFIGURATION, "PEM")
    assert setting in poolsvc("config", "check", "--config", config(more=more)).stderr


def test_config_check_names_a_file_of_networks_that_serve_can_do_without(config, tmp_path):
    path = config(more='geo = { database = "networks.mmdb" }')
    (tmp_path / "networks.mmdb").write_text("damaged")
    failed(
        poolsvc("config", "check", "--config", path), ExitStatus.CONFIGURATION, "geo.database: networks.mmdb"
    )
    (tmp_path / "networks.mmdb").unlink()
    failed(poolsvc("config", "check", "--config", path), ExitStatus.CONFIGURATION, ".mmdb")
    mmdb.write(tmp_path / "networks.mmdb", {"192.0.2.0/24": {"asn": "AS1"}})
    assert poolsvc("config", "check", "--config", path).stdout == "ok\n"
    (tmp_path / "networks.mmdb").unlink()
    failed(poolsvc("serve", "--config", path), ExitStatus.DATABASE, "migrate")


def test_config_check_tells_of_a_name_that_leaves_little_room(config):
    path = config()
    path.write_text(path.read_text().replace("pool.example", f"{'a' * 55}.example"))
    done = poolsvc("config", "check", "--config", path)
    assert (done.status, done.stdout.splitlines()[-1]) == (ExitStatus.OK, "ok")
    assert "holds 7 servers" in done.stdout


def test_config_check_names_an_account_key_that_is_none(config, tmp_path):
    path = config()
    (tmp_path / "account.pem").write_text("garbage")
    failed(poolsvc("config", "check", "--config", path), ExitStatus.CONFIGURATION, "ca.account_key_file")


def test_help_and_usage():
    done = poolsvc("--help")
    assert done.status == ExitStatus.OK
    for command in ("init", "doctor", "migrate", "serve", "operator", "config", "key"):
        assert command in done.stdout
    assert poolsvc("serve").status == ExitStatus.USAGE
    assert poolsvc("unknown").status == ExitStatus.USAGE


@pytest.mark.parametrize("secret", ["", "not base64!"])
def test_serve_names_a_tsig_secret_that_is_none(config, tmp_path, secret):
    path = config()
    assert poolsvc("migrate", "--config", path).status == ExitStatus.OK
    (tmp_path / "tsig.secret").unlink()
    if secret:
        (tmp_path / "tsig.secret").write_text(secret)
    failed(poolsvc("serve", "--config", path), ExitStatus.CONFIGURATION, "base64")


@pytest.fixture
def served(config, tmp_path):
    """Starts `serve` with more settings and waits until it is ready: the process and its URL."""
    with contextlib.ExitStack() as stack:

        def start(more=""):
            path = config(more=more)
            assert poolsvc("migrate", "--config", path).status == ExitStatus.OK
            process = Process("poolsvc", [script("poolsvc"), "serve", "--config", str(path)], tmp_path)
            url = f"http://{tomllib.loads(path.read_text())['listen'][0]}"
            stack.enter_context(process.start(lambda: asked(url) == 200))
            return process, url

        yield start


def asked(url, path="/readyz"):
    """The status of an answer; None while nobody answers."""
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url + path, trust_env=False, timeout=5).status_code


def test_serve_ends_in_order_on_sigterm(served):
    process, _ = served()
    process.signal(signal.SIGTERM)
    assert process.wait() == ExitStatus.OK
    for line in process.output().splitlines():
        json.loads(line)


def test_before_the_end_serve_is_not_ready_and_still_answers(served):
    process, url = served("stop_delay = 60")
    process.signal(signal.SIGTERM)
    wait_until(lambda: asked(url) == 503, "not ready")
    assert asked(url, "/healthz") == asked(url, "/v1/pool") == 200
    process.signal(signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM, "the second signal ends it at once"


def test_metrics_show_the_listeners_of_serve(served):
    _, url = served()
    lines = httpx.get(f"{url}/metrics", trust_env=False).text.splitlines()
    assert 'poolsvc_connections{service="api"} 1.0' in lines


def test_garbage_of_strangers_makes_no_line_in_the_log(served):
    process, url = served()
    before = process.output()
    address = ("127.0.0.1", int(url.rpartition(":")[2]))
    for octets in (
        b"BAD\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: r\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
    ):
        with socket.create_connection(address, timeout=10) as sock:
            sock.sendall(octets)
            assert sock.recv(100).startswith(b"HTTP/1.1 40")
    assert asked(url) == 200
    new = [json.loads(line)["event"] for line in process.output()[len(before) :].splitlines()]
    assert set(new) <= {"publish_failed", "ca_unreachable"}, new


def test_serve_names_a_certificate_that_is_none(config, tmp_path):
    path = config(more='tls_certificate = "api.pem"\ntls_key = "api.key"')
    assert poolsvc("migrate", "--config", path).status == ExitStatus.OK
    failed(poolsvc("serve", "--config", path), ExitStatus.CONFIGURATION, "give a PEM chain and its key")
    (tmp_path / "api.pem").write_text("garbage")
    (tmp_path / "api.key").write_text("garbage")
    failed(poolsvc("serve", "--config", path), ExitStatus.CONFIGURATION, "give a PEM chain and its key")


@pytest.fixture
def ready(config):
    """Settings with a migrated database."""
    path = config()
    assert poolsvc("migrate", "--config", path).status == ExitStatus.OK
    return path


def test_a_backup_is_restored_into_another_database_and_thawed(ready, config, tmp_path, cluster):
    assert poolsvc("operator", "create", "--config", ready).status == ExitStatus.OK
    file = tmp_path / "pool.backup"
    saved = poolsvc("backup", file, "--config", ready)
    assert (saved.status, saved.stderr) == (ExitStatus.OK, "")
    failed(poolsvc("backup", file, "--config", ready), ExitStatus.DATABASE, "give another file name")
    other = config(cluster.create_database())
    failed(
        poolsvc("restore", file, "--no-journal", "--config", other), ExitStatus.DATABASE, "poolsvc migrate"
    )
    assert poolsvc("migrate", "--config", other).status == ExitStatus.OK
    failed(poolsvc("restore", file, "--config", other), ExitStatus.USAGE, "--no-journal")
    done = poolsvc("restore", file, "--no-journal", "--config", other)
    assert done.status == ExitStatus.OK
    assert "1 tokens revoked" in done.stdout
    failed(poolsvc("restore", file, "--no-journal", "--config", other), ExitStatus.DATABASE, "a new database")
    asked = CliRunner().invoke(app, ["thaw", "--config", str(other)], input="n\n")
    assert (asked.exit_code, "publishes from now on" in asked.stdout) == (ExitStatus.OK, False)
    assert "publishes from now on" in poolsvc("thaw", "--yes", "--config", other).stdout
    assert poolsvc("thaw", "--config", other).stdout == "the registry is not frozen\n"


def test_a_database_moves_to_postgresql_and_the_old_one_is_frozen(ready, cluster):
    poolsvc("operator", "create", "--config", ready)
    url = cluster.create_database()
    moved = poolsvc("db", "move", "--to", url, "--config", ready)
    assert (moved.status, moved.stderr) == (ExitStatus.OK, "")
    failed(poolsvc("db", "move", "--to", url, "--config", ready), ExitStatus.DATABASE, "a new database")
    assert "not frozen" not in poolsvc("thaw", "--yes", "--config", ready).stdout


def test_copies_that_cannot_be_made_say_so(ready, tmp_path):
    no_place = tmp_path / "none" / "x"
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"PK\x03\x04garbage")
    for arguments, status, remedy in (
        (("backup", no_place), ExitStatus.CONFIGURATION, "rights and space"),
        (("restore", no_place, "--no-journal"), ExitStatus.CONFIGURATION, "rights and space"),
        (("restore", garbage, "--no-journal"), ExitStatus.DATABASE, "`poolsvc backup` wrote"),
        (("restore", garbage, "--journal", garbage), ExitStatus.DATABASE, "the right file"),
        (("db", "move", "--to", "mysql://x"), ExitStatus.USAGE, "new database's URL"),
        (("db", "move", "--to", "postgresql+psycopg://127.0.0.1:1/x"), ExitStatus.DATABASE, "`database`"),
    ):
        failed(poolsvc(*arguments, "--config", ready), status, remedy)


def test_the_cas_limits_are_shown_and_what_it_granted_is_set(config, empty_database):
    path = config(empty_database)
    poolsvc("migrate", "--config", path)
    shown = poolsvc("acme", "budget", "--config", path)
    assert shown.status == ExitStatus.OK
    assert shown.stdout.splitlines() == [
        "certificates  50 of 50 left, 0 spent in 168 h",
        "orders        300 of 300 left, 0 spent in 3 h",
        "under way     0",
        "waiting       0",
    ]
    granted = ("--certificates", "400", "--until", "2099-06-01", "--note", "ticket 7")
    assert poolsvc("acme", "limits", "--config", path, *granted).status == ExitStatus.OK
    assert "400 of 400 left" in poolsvc("acme", "budget", "--config", path).stdout

    async def noted(session):
        return (await session.scalars(select(Event).where(Event.kind == "ca-limits-created"))).one()

    event = in_transaction(empty_database, noted)
    assert (event.actor, event.after["until"]) == ("console", "2099-06-01T00:00:00+00:00")
    failed(
        poolsvc("acme", "limits", "--config", path, "--until", "2020-01-01"),
        ExitStatus.USAGE,
        "give a time that is ahead",
    )
    assert poolsvc("acme", "limits", "--config", path).status == ExitStatus.OK
    assert "50 of 50 left" in poolsvc("acme", "budget", "--config", path).stdout


def test_a_ca_with_other_limits_is_described_in_the_settings(config, empty_database):
    path = config(empty_database, "[ca.limits]\ncertificates = {count = 9, hours = 24}\n")
    assert poolsvc("migrate", "--config", path).status == ExitStatus.OK
    shown = poolsvc("acme", "budget", "--config", path)
    assert shown.stdout.splitlines()[0] == "certificates  9 of 9 left, 0 spent in 24 h"


@pytest.mark.parametrize("value", ["{count = 0, hours = 24}", "{count = 5, hours = 0.001}", "{count = 5}"])
def test_limits_that_are_none_are_refused(config, value):
    path = config(more=f"[ca.limits]\ncertificates = {value}\n")
    failed(poolsvc("config", "check", "--config", path), ExitStatus.CONFIGURATION, "correct the setting")
