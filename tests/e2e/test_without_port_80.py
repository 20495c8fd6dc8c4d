"""Members whose port 80 belongs to somebody else: validated by TLS-ALPN-01 or by a redirect, proved over TLS."""

import asyncio
import threading

import pytest

from lab.pool import LabPool
from lab.processes import LabError, Process
from lab.programs import run
from lab.web import WebServer as LabServer
from lab.web import http
from member_agent import web_servers
from member_agent.web_servers import WebServer

pytestmark = pytest.mark.timeout(150)


class SomebodyElse:
    """The web server that holds the HTTP port of a member, in a thread of its own."""

    def __init__(self, address, port, answer):
        self._loop = asyncio.new_event_loop()
        self.server = LabServer(answer, address=address, port=port)
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self):
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self.server.__aenter__(), self._loop).result(10)
        return self.server

    def __exit__(self, *_):
        asyncio.run_coroutine_threadsafe(self.server.__aexit__(None, None, None), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


def answering_by(pool, validation):
    """A member, not started yet, whose settings say so."""
    member = pool.add("alice")
    assert member.join(member.register()).status == 0
    (member.state / "agent.toml").write_text(f'[acme]\nvalidation = "{validation}"\n')
    return member


async def not_found(reader, writer):
    _ = reader
    writer.write(http("404 Not Found"))
    await writer.drain()


def test_a_member_answers_the_ca_on_port_443(tmp_path):
    with LabPool(tmp_path, opening_size=1) as pool:
        member = answering_by(pool, "tls-alpn-01")
        with SomebodyElse(member.address, pool.http_port, not_found) as server:
            member.process.start()
            view = pool.wait_for_state(member, "active", 60)
            assert server.connections == 0
        assert view["agent"]["validation"] == "tls-alpn-01"
        assert pool.query(member).document["authenticated"] is True


def test_a_member_whose_caddy_sends_the_ca_to_the_registry(tmp_path):
    """By the block that `pool-agent web-server caddy` prints, but for the port."""
    with LabPool(tmp_path / "pool", opening_size=1) as pool:
        member = answering_by(pool, "redirect")
        printed = run("pool-agent", "web-server", "caddy", "--state", str(member.state)).stdout
        assert f"http://{member.domain}:80 {{" in printed
        block = web_servers.block(WebServer.CADDY, member.domain, pool.url, pool.http_port)
        assert block.replace(f":{pool.http_port} {{", ":80 {") == printed
        options = f"{{\n\tadmin off\n\tauto_https off\n\tdefault_bind {member.address}\n}}\n"
        (tmp_path / "Caddyfile").write_text(options + block)
        argv = ["caddy", "run", "--adapter", "caddyfile", "--config", "Caddyfile"]
        with Process("caddy", argv, tmp_path, env={"HOME": str(tmp_path)}).start():
            member.process.start()
            pool.wait_for_state(member, "active", 60)
        assert pool.query(member).document["authenticated"] is True


@pytest.mark.long
def test_a_member_whose_port_80_is_taken_is_told(tmp_path):
    """By itself nothing changes the way that it is validated: the member decides."""
    with LabPool(tmp_path, opening_size=1) as pool:
        member = pool.add("alice")
        assert member.join(member.register()).status == 0

        with SomebodyElse(member.address, pool.http_port, not_found):
            member.process.start()
            with pytest.raises(LabError, match="registered"):
                pool.wait_for_state(member, "verified", 5)
            problem = member.view()["agent"]["problem"]
        assert f"cannot listen on {member.address}:{pool.http_port}" in problem
        assert "another program listens there" in problem
        assert "acme.validation" in problem
        # As soon as the port is free the agent goes on by itself.
        pool.wait_for_state(member, "active", 60)
