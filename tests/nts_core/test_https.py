"""How the agent asks its registry: one request, whatever answers it."""

import asyncio
import contextlib
import ssl

import pytest

from lab.certificates import Authority
from nts_core.https import Answer, Client, TooLong

HOST = "127.0.0.1"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
LIMIT = 1000


class Server:
    """Says `answers` one after the other, a request each; `requests` are what came, by connection."""

    def __init__(self, answers, tls=None):
        self.answers = list(answers)
        self.requests = []
        self.peers = []
        self._tls = tls
        self._serving = set()

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, HOST, 0, ssl=self._tls)
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"http{'s' if self._tls else ''}://{HOST}:{port}"
        return self

    async def __aexit__(self, *_):
        self._server.close()
        await self._server.wait_closed()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    async def _serve(self, reader, writer):
        self._serving.add(asyncio.current_task())
        try:
            await self._talk(reader, writer)
        finally:
            writer.transport.abort()

    async def _talk(self, reader, writer):
        mine = []
        self.requests.append(mine)
        self.peers.append(writer.get_extra_info("peername")[0])
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while self.answers:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                mine.append(head + await reader.readexactly(length))
                answer = self.answers.pop(0)
                writer.write(answer or b"")
                await writer.drain()
                if answer is None or b"close" in answer:
                    return


def ask(client, path="/x", **options):
    options = {"headers": {"A": "b"}, "timeout": 5.0} | options
    return client.request("POST", path, body=b"{}", **options)


@contextlib.asynccontextmanager
async def asked(answers, tls=None, trust=None):
    async with Server(answers, tls) as server:
        client = Client(server.url, trust or ssl.create_default_context(), max_answer=LIMIT)
        try:
            yield server, client
        finally:
            client.close()


async def test_requests_that_follow_each_other_share_a_connection():
    async with asked([OK, OK, b"HTTP/1.1 404 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", OK]) as (
        server,
        client,
    ):
        assert await ask(client) == await ask(client) == Answer(200, b"hi")
        assert (await ask(client)).status == 404
        assert await ask(client) == Answer(200, b"hi"), "after a connection that the server ends, a new one"
        assert [len(each) for each in server.requests] == [3, 1]
    assert server.requests[0][0].startswith(b"POST /x HTTP/1.1\r\nHost: 127.0.0.1:")
    assert server.requests[0][0].endswith(b"\r\n\r\n{}")


async def test_a_request_leaves_from_the_address_that_is_named():
    async with asked([OK, OK]) as (server, client):
        await ask(client)
        await ask(client, source="127.0.0.2")
        assert server.peers == [HOST, "127.0.0.2"]


async def test_what_is_asked_for_lies_under_the_address():
    async with Server([OK]) as server:
        client = Client(server.url + "/registry", ssl.create_default_context(), max_answer=LIMIT)
        await ask(client)
        client.close()
    assert server.requests[0][0].startswith(b"POST /registry/x ")


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\n\r\nuntil the end, close",
        b"HTTP/1.1 100 Continue\r\n\r\n" + OK,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
    ],
)
async def test_answers_in_every_form(answer):
    async with asked([answer]) as (_, client):
        assert (await ask(client)).status == 200


@pytest.mark.parametrize(
    "answer",
    [
        None,
        b"\0\1\2 close",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nclose",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nclose",
        b"HTTP/1.1 200 OK\r\nX: " + bytes(40_000) + b"close",
    ],
)
async def test_what_is_no_answer_is_an_error_of_the_connection(answer):
    async with asked([answer, OK]) as (_, client):
        with pytest.raises(OSError):
            await ask(client)
        assert await ask(client) == Answer(200, b"hi"), "and leaves nothing behind"


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n" + bytes(99_999),
        b"HTTP/1.1 200 OK\r\n\r\n" + bytes(LIMIT + 1) + b"close",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 9000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1;" + b"x" * 300 + b"\r\na\r\n" * 1,
    ],
)
async def test_too_much_is_cut_off(answer):
    async with asked([answer]) as (_, client):
        with pytest.raises(OSError) as refused:
            await ask(client, timeout=2.0)
        assert isinstance(refused.value, TooLong | TimeoutError | ConnectionError)


async def test_a_server_that_says_nothing_gets_the_deadline():
    async with asked([b"", OK]) as (_, client):
        with pytest.raises(TimeoutError):
            await ask(client, timeout=0.2)


async def test_nobody_there():
    async with Server([]) as server:
        pass
    with pytest.raises(OSError):
        await ask(Client(server.url, ssl.create_default_context(), max_answer=LIMIT))


async def test_the_certificate_is_checked(tmp_path):
    authority = Authority(tmp_path)
    pair = authority.issue(HOST)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(pair.cert, pair.key)
    async with asked([OK], tls, ssl.create_default_context(cafile=authority.root)) as (_, client):
        assert await ask(client) == Answer(200, b"hi")
    async with asked([OK], tls) as (server, client):
        with pytest.raises(ssl.SSLCertVerificationError):
            await ask(client)
        assert server.requests == []
