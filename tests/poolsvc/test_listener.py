"""How connections end that take without giving: real sockets, short deadlines, and others are served meanwhile."""

import asyncio
import contextlib
import dataclasses
import resource
import socket
import ssl
import time
from ipaddress import ip_address

import pytest
import structlog
import uvicorn

from lab.certificates import Authority
from poolsvc.listener import Limits, Listeners, Server, Service

QUICK = Limits(handshake=0.3, head=0.3, body=0.3, answer=0.5, idle=1, closing=0.3)
NEVER = Limits(handshake=60, head=60, body=60, answer=60, idle=60, closing=60)
GET = b"GET / HTTP/1.1\r\nHost: registry\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: registry\r\nContent-Length: 10\r\n\r\n"


async def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "not in time"
        await asyncio.sleep(0.01)
    return found


class Echo:
    """Answers with the length of the body; /slow waits for `release`, /large and /parts fill any buffer."""

    def __init__(self):
        self.release = asyncio.Event()
        self.waiting = 0

    async def __call__(self, scope, receive, send):
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
        if scope["path"] == "/slow":
            self.waiting += 1
            await self.release.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-echo", b"yes")]})
        if scope["path"] == "/parts":
            for _ in range(200):
                await send({"type": "http.response.body", "body": bytes(100_000), "more_body": True})
        last = bytes(20_000_000) if scope["path"] == "/large" else str(len(body)).encode()
        await send({"type": "http.response.body", "body": last})


def configured(app, **options):
    return uvicorn.Config(
        app, http="h11", ws="none", lifespan="off", log_config=None, log_level="error", **options
    )


@pytest.fixture
async def serve():
    """`serve(limits, tls=CONTEXT, ...)`: listeners on 127.0.0.1, their address, and the application."""
    running, faults = [], []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: faults.append(context))

    def start(limits, *, tls=None, trusted_proxies=()):
        app = Echo()
        config = configured(app)
        listeners = Listeners(
            config, limits=limits, tls=tls and (lambda: tls), trusted_proxies=trusted_proxies
        )
        sock = socket.create_server(("127.0.0.1", 0))
        address = sock.getsockname()
        listeners.listen(sock)
        running.append((listeners, app))
        return listeners, address, app

    yield start
    for listeners, app in running:
        app.release.set()
        listeners.close()
        await listeners.end_connections()
        await until(lambda listeners=listeners: not listeners.connections)
        await until(lambda listeners=listeners: not listeners.state.tasks)
    assert faults == []


async def connect(address, source="127.0.0.1", tls=None):
    return await asyncio.open_connection(
        *address, local_addr=(source, 0), ssl=tls, server_hostname="registry.example" if tls else None
    )


async def answer(reader) -> bytes:
    """The status line, after the whole answer was read."""
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
    if b"transfer-encoding: chunked" in head.lower():
        await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), 10)
    return head.split(b"\r\n")[0]


async def asks(address, source, tls=None):
    """Whether a new client at another address is served."""
    reader, writer = await connect(address, source, tls)
    writer.write(GET)
    status = await answer(reader)
    await drop(writer)
    return status.startswith(b"HTTP/1.1 200")


async def drop(writer):
    writer.transport.abort()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def ended(reader):
    """The peer has ended the connection, in order or not."""
    with contextlib.suppress(ConnectionError):
        await asyncio.wait_for(reader.read(), 10)


async def drip(reader, writer, octets):
    """One octet after another until the peer has had enough."""
    sent, gone = 0, asyncio.ensure_future(ended(reader))
    while not gone.done():
        with contextlib.suppress(ConnectionError):
            writer.write(octets[sent % len(octets) :][:1])
            await writer.drain()
        sent += 1
        await asyncio.wait({gone}, timeout=0.02)
    await drop(writer)


async def refused(address, source):
    """A connection that gets a reset, when it is made or after."""
    with contextlib.suppress(ConnectionError):
        reader, writer = await connect(address, source)
        await ended(reader)
        await drop(writer)


async def test_many_silent_connections_of_one_address_do_not_close_the_service(serve):
    """Most get no slot, and the others get an end."""
    listeners, address, _ = serve(QUICK)
    silent = [socket.create_connection(address, 10, ("127.0.0.2", 0)) for _ in range(500)]
    assert await asks(address, "127.0.0.3")
    await until(lambda: listeners.counters["too-many-of-address"] == 500 - QUICK.per_address)
    await until(lambda: listeners.counters["head-timeout"] == QUICK.per_address)
    await until(lambda: not listeners.connections)
    assert await asks(address, "127.0.0.2"), "its slots are free again"
    for sock in silent:
        sock.close()


async def test_an_answer_does_not_wait_for_the_peers_acknowledgement(serve):
    """Head and body go as two packets; asyncio leaves Nagle's rule to hold the second one back for 40 ms."""
    listeners, address, _ = serve(Limits())
    reader, writer = await connect(address)
    writer.write(GET)
    await answer(reader)
    (peer,) = listeners._peers
    assert peer.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    await drop(writer)


@pytest.mark.parametrize("first", [b"", GET], ids=["first", "second"])
async def test_a_head_that_drips_ends_at_its_deadline(serve, first):
    listeners, address, _ = serve(QUICK)
    reader, writer = await connect(address)
    if first:
        writer.write(first)
        await answer(reader)
    await drip(reader, writer, GET[:-2] + b"X: " + b"x" * 10_000)
    assert listeners.counters == {"head-timeout": 1}
    assert await asks(address, "127.0.0.1")


async def test_a_body_that_drips_ends_at_its_deadline(serve):
    listeners, address, _ = serve(QUICK)
    reader, writer = await connect(address)
    writer.write(POST.replace(b"10", b"10000"))
    await drip(reader, writer, b"x")
    assert listeners.counters == {"body-timeout": 1}
    assert await asks(address, "127.0.0.1")


async def test_an_idle_connection_is_closed_in_order(serve):
    listeners, address, _ = serve(QUICK)
    reader, writer = await connect(address)
    writer.write(GET)
    await answer(reader)
    assert await asyncio.wait_for(reader.read(), 10) == b""
    assert sum(listeners.counters.values()) == 0
    await drop(writer)


async def test_requests_in_a_row_have_a_deadline_each(serve):
    """Together they take longer than one may."""
    listeners, address, _ = serve(QUICK)
    reader, writer = await connect(address)
    end = time.monotonic() + 2 * QUICK.head
    while time.monotonic() < end:
        writer.write(POST + b"0123456789")
        assert (await answer(reader)).startswith(b"HTTP/1.1 200")
    assert sum(listeners.counters.values()) == 0
    await drop(writer)


async def test_who_does_not_read_the_answer_is_ended(serve):
    listeners, address, _ = serve(QUICK)
    _, writer = await connect(address)
    writer.write(GET.replace(b"/ ", b"/parts "))
    await until(lambda: listeners.counters["answer-timeout"] == 1)
    await until(lambda: not listeners.connections)
    await drop(writer)


async def test_who_keeps_a_closed_connection_open_is_ended(serve):
    """An answer of 20 MB was handed over, the connection is to close, and the peer reads nothing."""
    listeners, address, _ = serve(dataclasses.replace(NEVER, closing=0.3))
    _, writer = await connect(address)
    writer.write(GET.replace(b"/ ", b"/large ").replace(b"Host", b"Connection: close\r\nHost"))
    await until(lambda: listeners.counters["closing-timeout"] == 1)
    await until(lambda: not listeners.connections)
    await drop(writer)


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def server_tls(authority):
    pair = authority.issue("registry.example")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.cert, pair.key)
    return context


@pytest.fixture
def client_tls(authority):
    return ssl.create_default_context(cafile=str(authority.root))


@pytest.mark.parametrize("hello", [b"", b"\x16\x03\x01\x02\x00", GET], ids=["silent", "half", "no TLS"])
async def test_a_handshake_that_never_ends_is_ended(serve, server_tls, client_tls, hello):
    listeners, address, _ = serve(QUICK, tls=server_tls)
    peers = [await connect(address, "127.0.0.2") for _ in range(20)]
    for _, writer in peers:
        writer.write(hello)
    assert await asks(address, "127.0.0.3", client_tls)
    await asyncio.gather(*(ended(reader) for reader, _ in peers))
    await until(lambda: listeners.counters["handshake-failed"] == 20)
    await until(lambda: not listeners.connections)
    for _, writer in peers:
        await drop(writer)


async def test_silence_after_the_handshake_is_ended_too(serve, server_tls, client_tls):
    listeners, address, _ = serve(QUICK, tls=server_tls)
    reader, writer = await connect(address, tls=client_tls)
    await ended(reader)
    assert listeners.counters["head-timeout"] == 1
    await drop(writer)


@pytest.mark.parametrize("is_tls", [False, True], ids=["plain", "TLS"])
async def test_when_all_is_taken_the_peer_waited_for_longest_makes_room(
    serve, server_tls, client_tls, is_tls
):
    limits = dataclasses.replace(NEVER, connections=4)
    listeners, address, _ = serve(limits, tls=server_tls if is_tls else None)
    silent = []
    for number in range(2, 6):
        silent.append(await connect(address, f"127.0.0.{number}"))
        await until(lambda: listeners.connections == len(silent))
    assert await asks(address, "127.0.0.9", client_tls if is_tls else None)
    await ended(silent[0][0])
    assert listeners.counters["evicted"] == 1
    await until(lambda: listeners.connections == 3)
    for _, writer in silent:
        await drop(writer)


async def test_when_all_is_taken_a_second_connection_of_an_address_ends_nobody(serve):
    limits = dataclasses.replace(NEVER, connections=4)
    listeners, address, _ = serve(limits)
    peers = [await connect(address, f"127.0.0.{number}") for number in range(2, 6)]
    await until(lambda: listeners.connections == 4)
    await refused(address, "127.0.0.5")
    assert listeners.counters == {"too-many-of-address": 1}
    for _, each in peers:
        await drop(each)


async def test_a_request_under_way_is_never_the_one_to_go(serve):
    limits = dataclasses.replace(NEVER, connections=2)
    listeners, address, app = serve(limits)
    busy = [await connect(address, f"127.0.0.{number}") for number in (2, 3)]
    for _, writer in busy:
        writer.write(GET.replace(b"/ ", b"/slow "))
    await until(lambda: app.waiting == 2)
    await refused(address, "127.0.0.4")
    assert listeners.counters == {"too-many-connections": 1}
    app.release.set()
    for each, _ in busy:
        assert (await answer(each)).startswith(b"HTTP/1.1 200")
    for _, each in busy:
        await drop(each)


async def test_a_trusted_proxy_has_no_cap_of_its_own(serve):
    listeners, address, _ = serve(NEVER, trusted_proxies=[ip_address("127.0.0.2")])
    peers = [await connect(address, "127.0.0.2") for _ in range(NEVER.per_address + 20)]
    await until(lambda: listeners.connections == len(peers))
    assert not listeners.counters
    for _, writer in peers:
        await drop(writer)


@pytest.mark.parametrize(
    "octets",
    [
        b"BAD\r\n\r\n",
        b"\x00" * 100,
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000,
        b"POST / HTTP/1.1\r\nHost: r\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        GET + b"BAD\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: r\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: r\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\nBAD",
    ],
)
async def test_garbage_ends_the_connection_and_nothing_else(serve, octets, caplog):
    """The fixture fails when the event loop had to be told of an exception."""
    listeners, address, _ = serve(QUICK)
    reader, writer = await connect(address)
    with contextlib.suppress(ConnectionError):
        writer.write(octets)
        await writer.drain()
    await ended(reader)
    await drop(writer)
    await until(lambda: not listeners.connections)
    assert caplog.records == []
    assert await asks(address, "127.0.0.1")


@pytest.mark.parametrize("is_at_once", [True, False], ids=["at once", "after the answer"])
async def test_garbage_in_a_body_that_nobody_reads_is_no_exception(serve, caplog, is_at_once):
    listeners, address, _ = serve(QUICK)

    async def refuse(scope, receive, send):
        await send({"type": "http.response.start", "status": 413, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    listeners.config.loaded_app = refuse
    reader, writer = await connect(address)
    head = b"POST / HTTP/1.1\r\nHost: r\r\nTransfer-Encoding: chunked\r\n\r\n"
    writer.write(head + b"ZZ\r\n" if is_at_once else head)
    status = await answer(reader)
    assert status.startswith(b"HTTP/1.1 400" if is_at_once else b"HTTP/1.1 413")
    if not is_at_once:
        writer.write(b"ZZ\r\n")
    await ended(reader)
    await drop(writer)
    assert caplog.records == []


async def test_without_a_free_descriptor_accept_waits_and_is_logged_once(serve):
    listeners, address, _ = serve(NEVER)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    peer = socket.socket()
    with structlog.testing.capture_logs() as logs:
        resource.setrlimit(resource.RLIMIT_NOFILE, (peer.fileno() + 1, hard))
        try:
            peer.setblocking(False)
            await asyncio.get_running_loop().sock_connect(peer, address)
            await until(lambda: listeners.counters["no-descriptor"] >= 3)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await until(lambda: listeners.connections == 1)
    peer.close()
    assert [entry["event"] for entry in logs] == ["accept_paused"]
    assert await asks(address, "127.0.0.3")


def accepts(address):
    with contextlib.suppress(ConnectionError), socket.create_connection(address, 5):
        return True
    return False


class TestServer:
    @pytest.fixture
    async def server(self):
        """A server in a task, its address, its application, and the event that tells of its end."""
        app, stopping = Echo(), asyncio.Event()
        config = configured(app, timeout_graceful_shutdown=1)
        listeners = Listeners(config, limits=NEVER)
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        server = Server(config, [Service(listeners, [sock])], stopping=stopping)
        task = asyncio.create_task(server.serve())
        await until(lambda: server.started and server._tasks[0].done())
        yield server, sock.getsockname(), app, stopping, task
        server.should_exit = True
        app.release.set()
        await asyncio.wait_for(task, 20)

    async def test_at_the_end_requests_under_way_are_answered_and_nothing_else_is_waited_for(self, server):
        server, address, app, stopping, task = server
        waiting = []
        for octets in (b"", b"GET / HT", GET, POST, b"BAD\r\n\r\n", GET.replace(b"/ ", b"/slow ")):
            reader, writer = await connect(address)
            writer.write(octets)
            waiting.append((reader, writer))
        await until(lambda: app.waiting == 1)
        server.should_exit = True
        await until(stopping.is_set)
        await until(lambda: not accepts(address))
        app.release.set()
        slow, _ = waiting[-1]
        assert (await answer(slow)).startswith(b"HTTP/1.1 200")
        await asyncio.wait_for(task, 20)
        for reader, writer in waiting:
            await ended(reader)
            await drop(writer)

    async def test_a_service_that_waits_for_something_listens_only_then(self):
        app, ready = Echo(), asyncio.Event()
        config = configured(app)
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        address = sock.getsockname()
        server = Server(config, [Service(Listeners(config), [sock], ready)], stopping=asyncio.Event())
        task = asyncio.create_task(server.serve())
        await until(lambda: server.started)
        with pytest.raises(ConnectionRefusedError):
            await connect(address)
        ready.set()
        await until(server._tasks[0].done)
        assert await asks(address, "127.0.0.1")
        server.should_exit = True
        await asyncio.wait_for(task, 20)
