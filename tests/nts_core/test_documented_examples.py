"""The examples of docs/clients.md run as they stand, against a pool of our own."""

import asyncio
import contextlib
import io
import re
import textwrap
from pathlib import Path

import pytest
from cryptography import x509

from lab.certificates import Authority
from lab.nts_server import NtsServer
from nts_core import pool, resolve, source
from nts_core.denial import Witnesses
from tests.nts_core.test_pool import Book, domain

MANUAL = Path(__file__).parents[2] / "docs/clients.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", MANUAL.read_text(), re.MULTILINE | re.DOTALL)


def compiled(example):
    """The example as one function, whether it waits for anything or not."""
    body = textwrap.indent(example, "    ")
    namespace = {}
    exec(compile(f"async def example():\n{body}\n    return locals()\n", str(MANUAL), "exec"), namespace)
    return namespace["example"]


@pytest.fixture
async def world(tmp_path, monkeypatch):
    """pool.example and time.example.net as the system would find them."""
    authority = Authority(tmp_path / "ca")
    book, servers = Book(), []
    for letter in "abcd":
        server = NtsServer(authority.issue(domain(letter), "time.example.net"), f"127.{ord(letter)}.0.1")
        await server.start()
        servers.append(server)
        book.add(letter, server)

    async def addresses(_name, **_):
        return [servers[0].host]

    def load_roots(_file):
        return x509.load_pem_x509_certificates(authority.root.read_bytes())

    monkeypatch.setattr("nts_core.client.load_roots", load_roots)
    monkeypatch.setattr(pool, "load_roots", load_roots)
    monkeypatch.setattr(pool, "system_resolvers", lambda: ["192.0.2.53"])
    monkeypatch.setattr(resolve.Resolver, "lookup", lambda _, *question: book.lookup(*question))
    monkeypatch.setattr(Witnesses, "deny", lambda _, name: book.deny(name))
    monkeypatch.setattr(source, "system_addresses", addresses)
    monkeypatch.setattr("nts_core.source.Source.__init__", at_port(servers[0]))
    yield tmp_path
    for server in servers:
        await server.stop()


def at_port(server):
    """Port 4460 of the one server is another one here."""
    real = source.Source.__init__

    def init(self, name, port, *arguments, **options):
        real(self, name, server.ke_port if port == 4460 else port, *arguments, **options)

    return init


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
async def test_an_example_runs(example, world):
    here = example.replace("/var/lib/example", str(world / "state"))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if "await" in here or "async" in here:
            endless = "source.samples()" in here
            with contextlib.suppress(TimeoutError) if endless else contextlib.nullcontext():
                async with asyncio.timeout(2 if endless else 20):
                    found = await compiled(here)()
                    assert "now" not in found or found["now"].tzinfo is not None
        else:
            await asyncio.to_thread(exec, compile(here, str(MANUAL), "exec"), {})
    assert printed.getvalue() or "now" in here
