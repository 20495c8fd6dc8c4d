"""The API's own certificate: from a real CA and from files, renewed under open connections."""

import asyncio
import contextlib
import socket
import ssl
import time
from datetime import UTC, datetime, timedelta

import httpx
import pytest
import structlog
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from lab.certificates import Authority
from nts_core.certificates import chain_facts
from nts_core.control import ACME_PATH
from poolsvc.app import create_app
from poolsvc.db import Database
from poolsvc.derived import RegistryKey
from poolsvc.serving import create_server
from poolsvc.web_tls import CertificateFiles, PlainHttp, WebCertificate
from poolsvc.worker import Health

HOST = "registry.servers.pool.example"
GET = f"GET /healthz HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()


async def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not (found := await condition()):
        assert time.monotonic() < end, "not in time"
        await asyncio.sleep(0.02)
    return found


def bound():
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    return sock


class Running:
    """A whole registry in this process, with the ports of its API and of plain HTTP."""

    def __init__(self, settings, app, api, plain):
        self.app, self.health = app, app.state.metrics.health
        self.file = settings.web_tls.directory / f"{HOST}.pem"
        self.api, self.plain = api.getsockname()[1], plain.getsockname()[1]
        self.server = create_server(settings, app, [api], [plain])

    async def connect(self, roots=None):
        """A TLS connection; roots are PEM text, and without them any certificate will do."""
        context = ssl.create_default_context(cadata=roots)
        if roots is None:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return Connection(
            *await asyncio.open_connection("127.0.0.1", self.api, ssl=context, server_hostname=HOST)
        )

    async def serial(self):
        """The serial of what a new connection is shown; None while nobody listens."""
        with contextlib.suppress(ConnectionRefusedError):
            connection = await self.connect()
            await connection.close()
            return connection.serial
        return None

    async def http(self, path, **options):
        async with httpx.AsyncClient(trust_env=False) as client:
            return await client.get(f"http://127.0.0.1:{self.plain}{path}", **options)


class Connection:
    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer
        octets = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        self.serial = f"{x509.load_der_x509_certificate(octets).serial_number:x}"

    async def ask(self):
        self.writer.write(GET)
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 10)
        await self.reader.readexactly(len(b'{"status":"alive"}'))
        return head.startswith(b"HTTP/1.1 200")

    async def close(self):
        self.writer.transport.abort()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


@pytest.fixture
def ports():
    api, plain = bound(), bound()
    yield api, plain
    for sock in (api, plain):
        sock.close()


@pytest.fixture
async def start(sqlite_url, tuned, ports, tmp_path):
    """`start(pebble)`: a registry that gets its certificate there."""
    async with contextlib.AsyncExitStack() as stack:

        async def run(pebble, **policy):
            settings = tuned(
                ca={
                    "directory_url": pebble.directory_url,
                    "ca_file": pebble.ca_file,
                    "account_key_file": tmp_path / "account.pem",
                },
                **{"step_retry": 0.1, "retry": (0.5,), **policy},
            )
            web_tls = settings.web_tls.model_copy(update={"acme": True, "directory": tmp_path / "web-tls"})
            settings = settings.model_copy(update={"web_tls": web_tls, "public_url": f"https://{HOST}"})
            app = create_app(settings, Database(sqlite_url), [], RegistryKey(bytes(32)))
            running = Running(settings, app, *ports)
            task = asyncio.create_task(running.server.serve())
            stack.push_async_callback(end, running, task)
            return running

        yield run


async def end(running, task):
    running.server.should_exit = True
    await asyncio.wait_for(task, 20)


def pebble_for(lab, ports, **options):
    return lab.pebble(http_port=ports[1].getsockname()[1], **options)


async def test_the_registry_gets_its_certificate_from_the_pools_ca(lab, ports, start):
    pebble = pebble_for(lab, ports)
    running = await start(pebble)
    assert await running.serial() is None, "nothing is shown before there is a certificate"
    await until(running.serial)
    connection = await running.connect(pebble.issuer_roots())
    assert await connection.ask()
    await connection.close()
    facts = chain_facts(running.file.read_text())
    assert facts.serial == connection.serial
    assert running.health.web_certificate_ends_at == facts.not_after
    assert running.file.stat().st_mode & 0o777 == 0o600
    assert running.file.parent.stat().st_mode & 0o777 == 0o700
    assert not running.health.work
    await until(lambda: asyncio.sleep(0, not running.health.cas))
    assert "There are now 1 accounts" in pebble.process.output()
    assert "There are now 2 accounts" not in pebble.process.output(), (
        "one for the members' orders and for this"
    )


async def test_a_renewed_certificate_is_shown_while_an_old_connection_goes_on(lab, ports, start):
    """Each time the CA validates anew, since no authorization outlives its order."""
    pebble = pebble_for(lab, ports, validity=4, authz_reuse=100)
    running = await start(pebble)
    await until(running.serial)
    old = await running.connect()

    async def renewed():
        assert await old.ask()
        return await running.serial() != old.serial

    await until(renewed)
    assert await old.ask()
    await old.close()
    assert pebble.process.output().count("set VALID by completed challenge") >= 2
    assert running.file.stat().st_mode & 0o777 == 0o600


async def test_while_the_ca_is_away_plain_http_works_and_the_operator_is_told(lab, ports, start):
    pebble = pebble_for(lab, ports)
    pebble.stop()
    with structlog.testing.capture_logs() as logs:
        running = await start(pebble)
        await until(lambda: asyncio.sleep(0, running.health.work.get("web_certificate")))
        assert (await running.http("/")).status_code == 301
        assert await running.serial() is None
        pebble.start()
        await until(running.serial)
    assert not running.health.work.get("web_certificate")
    failed = [entry for entry in logs if entry["event"] == "web_certificate_failed"]
    assert failed
    assert not failed[0]["shown"]


async def test_a_kept_certificate_is_shown_at_once(lab, ports, start, tmp_path):
    """The CA is away for good."""
    pebble = pebble_for(lab, ports)
    pebble.stop()
    pair = Authority(tmp_path / "authority").issue(HOST)
    directory = tmp_path / "web-tls"
    directory.mkdir()
    (directory / f"{HOST}.pem").write_text(pair.key.read_text() + pair.cert.read_text())
    running = await start(pebble)
    assert await until(running.serial) == chain_facts(pair.cert.read_text()).serial


@pytest.mark.parametrize("kept", ["garbage", "expired", "without key"])
async def test_a_kept_certificate_that_is_no_good_is_ordered_anew(lab, ports, start, tmp_path, kept):
    now = datetime.now(UTC)
    pair = Authority(tmp_path / "authority").issue(
        HOST, not_after=now - timedelta(hours=1) if kept == "expired" else None
    )
    directory = tmp_path / "web-tls"
    directory.mkdir()
    text = {
        "garbage": "\x00garbage",
        "expired": pair.key.read_text() + pair.cert.read_text(),
        "without key": pair.cert.read_text(),
    }[kept]
    (directory / f"{HOST}.pem").write_text(text)
    running = await start(pebble_for(lab, ports))
    assert await until(running.serial) != chain_facts(pair.cert.read_text()).serial


async def test_an_order_that_the_ca_refuses_is_made_again_and_leaves_no_challenge(lab, start):
    """The CA looks at a port where somebody else answers."""
    with structlog.testing.capture_logs() as logs:
        running = await start(lab.pebble(), retry=(0.05,))

        async def refused_twice():
            return [entry for entry in logs if entry["event"] == "web_certificate_failed"][1:]

        (failed, *_) = await until(refused_twice)
    assert "unauthorized" in failed["detail"] or "connection" in failed["detail"].lower(), failed
    assert running.health.work["web_certificate"]
    acme = running.server._duties[0].__self__
    await until(lambda: asyncio.sleep(0, not acme.challenges))


async def ask_plain(method, url, headers=None):
    app = PlainHttp({"token": "token.thumbprint"}, "https://registry.example:8443/base")
    transport = httpx.ASGITransport(app, client=("127.0.0.1", 40_000))
    async with httpx.AsyncClient(transport=transport, base_url="http://registry.example") as http:
        return await http.request(method, url, headers=headers)


async def test_plain_http_answers_the_challenge_alone():
    answer = await ask_plain("GET", ACME_PATH + "token")
    assert (answer.status_code, answer.text) == (200, "token.thumbprint")
    for path in ("other", "", "token/", "token%2F", "..%2ftoken"):
        answer = await ask_plain("GET", ACME_PATH + path)
        assert (answer.status_code, answer.json()["code"]) == (404, "not-found")
    assert (await ask_plain("GET", "/x" + ACME_PATH + "token")).status_code == 301


@pytest.mark.parametrize(
    ("path", "location"),
    [
        ("/", "/"),
        ("/v1/pool?x=%20y&z", "/v1/pool?x=%20y&z"),
        ("//evil.example/", "//evil.example/"),
        ("/%0d%0aSet-Cookie:%20x", "/%0d%0aSet-Cookie:%20x"),
    ],
)
async def test_plain_http_leads_to_https(path, location):
    answer = await ask_plain("GET", httpx.URL("http://registry.example", raw_path=path.encode()))
    assert answer.status_code == 301
    assert answer.headers["location"] == "https://registry.example:8443/base" + location


@pytest.mark.parametrize(
    ("method", "headers"),
    [
        ("GET", {"Authorization": "Bearer secret"}),
        ("GET", {"Cookie": "session=secret"}),
        ("POST", {}),
        ("DELETE", {}),
    ],
)
async def test_plain_http_leads_no_secret_anywhere(method, headers):
    for path in ("/v1/pool", ACME_PATH + "token"):
        answer = await ask_plain(method, path, headers)
        assert (answer.status_code, answer.json()["code"]) == (403, "insecure-transport")
        assert "location" not in answer.headers


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path / "authority")


@pytest.fixture
def files(authority, tmp_path):
    """Where the operator's own ACME client puts its files."""
    return authority.issue(HOST, file="live")


@pytest.fixture
async def followed(files):
    certificate = WebCertificate(Health())
    watched = CertificateFiles(certificate, files.cert, files.key)
    task = asyncio.create_task(watched.follow(interval=0.01))
    yield certificate
    task.cancel()
    await asyncio.wait({task})


def serial_of(context):
    """What a client is shown in a handshake with this context."""
    client, server = ssl.MemoryBIO(), ssl.MemoryBIO()
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    ends = (trusting.wrap_bio(client, server), context.wrap_bio(server, client, server_side=True))
    for end in (*ends, *ends):
        with contextlib.suppress(ssl.SSLWantReadError):
            end.do_handshake()
    return f"{x509.load_der_x509_certificate(ends[0].getpeercert(binary_form=True)).serial_number:x}"


async def test_files_that_are_renewed_are_shown_without_a_restart(authority, files, followed):
    first = serial_of(followed.context)
    authority.issue(HOST, file="live")
    wanted = chain_facts(files.cert.read_text()).serial
    assert wanted != first
    await until(lambda: asyncio.sleep(0, serial_of(followed.context) == wanted))


@pytest.mark.parametrize("fault", ["garbage", "other key", "missing"])
async def test_files_that_do_not_fit_are_told_once_and_the_old_pair_stays(authority, files, followed, fault):
    first, good = serial_of(followed.context), files.key.read_bytes()
    with structlog.testing.capture_logs() as logs:
        match fault:
            case "garbage":
                files.cert.write_text("garbage")
            case "other key":
                files.key.write_bytes(authority.issue("other.example").key.read_bytes())
            case "missing":
                files.key.unlink()

        async def told():
            return [entry for entry in logs if entry["event"] == "web_certificate_unusable"]

        await until(told)
        assert serial_of(followed.context) == first
        seen = len(await told())
        rounds = iter(range(10))
        await until(lambda: asyncio.sleep(0.01, next(rounds, 9) == 9))
        assert len(await told()) == seen == 1
    assert good not in str(logs).encode()
    authority.issue(HOST, file="live")
    wanted = chain_facts(files.cert.read_text()).serial
    await until(lambda: asyncio.sleep(0, serial_of(followed.context) == wanted))


def test_an_encrypted_key_is_refused_without_a_question_on_the_terminal(files):
    key = load_pem_private_key(files.key.read_bytes(), None)
    files.key.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    )
    with pytest.raises(ssl.SSLError):
        CertificateFiles(WebCertificate(Health()), files.cert, files.key)
