"""What befalls an agent: it goes on with what it has, says what is wrong and what to do, and mends itself."""

import asyncio
import base64
import contextlib
import json
import os
import re
import secrets
import socket
import ssl
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from structlog.testing import capture_logs

from lab.disks import SmallDisk
from lab.processes import free_port
from lab.programs import alice
from lab.stand_in import StandIn, http, saying
from member_agent import local
from member_agent.config import AgentSettings
from member_agent.daemon import Agent
from member_agent.errors import AgentError, ExitStatus
from member_agent.install import CertificateStore, InstalledPair
from member_agent.member import is_worrying, patience, token_is_old
from member_agent.state import Listening, StateDirectory, read_agent_key
from nts_core import https
from nts_core.client import ClientError, establish
from nts_core.control import PROOF_PATH, proof_statement
from nts_core.cookies import Keyring

DOMAIN = "alice.servers.pool.example"
HOST = "127.0.0.1"
DAY = timedelta(days=1)
SPARE = "127.0.0.2"


def fingerprint(chain):
    return x509.load_pem_x509_certificate(chain.encode()).fingerprint(hashes.SHA256()).hex()


async def until(condition, what):
    """Poll what may be a coroutine function until it is true."""
    try:
        async with asyncio.timeout(20):
            while True:
                found = condition()
                if await found if asyncio.iscoroutine(found) else found:
                    return
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(what) from None


class Host:
    """A state directory of alice's with an agent that may run on it."""

    def __init__(self, state, stand_in, authority, ke_port):
        self.state, self.stand_in, self.authority = StateDirectory(state), stand_in, authority
        self.ke_port, self.ntp_port = ke_port, free_port()
        self.member = self.state.member(DOMAIN)
        self.me = alice(state, stand_in.url)
        self.store = CertificateStore(self.member.certificates, DOMAIN)

    def chain(self, order, **validity):
        return self.authority.chain_for(self.store.pending(order), **validity)

    def has_served(self, **validity):
        """As an agent leaves it that was stopped."""
        self.store.stage(1, self.chain(1, **validity), now=datetime.now(UTC))
        self.store.adopt()
        ports = (self.stand_in.wanted[name] for name in ("ke_port", "http_port"))
        self.member.save_listening(Listening((HOST,), *ports))

    @contextlib.asynccontextmanager
    async def running(self, **more):
        settings = AgentSettings(ntp_port=self.ntp_port, local_stratum=10, clock_source="kernel", **more)
        agent = asyncio.create_task(Agent(self.state, settings).run())
        try:
            yield agent
        finally:
            agent.cancel()
            await asyncio.gather(agent, return_exceptions=True)
            # As the end of its process would do.
            os.close(self.state._lock)

    async def says(self):
        """What `pool-agent status` has of the agent."""
        status = await asyncio.to_thread(local.ask, self.state.path, "status")
        return next(iter(status["servers"]), {}) if status else {}

    async def serves(self, trust):
        try:
            await establish(DOMAIN, HOST, self.ke_port, trust, timeout=5)
        except ClientError:
            return False
        return True


@pytest.fixture
async def stand_in():
    ke_port = free_port(HOST, SPARE)
    async with StandIn(
        ke_port=ke_port,
        http_port=free_port(HOST, SPARE),
        addresses=[{"address": HOST, "proved": True, "call": False}],
    ) as stand_in:
        yield stand_in


@pytest.fixture
def host_on(tmp_path, stand_in, authority):
    """A host whose state is on a small disk, and the disk."""

    @contextlib.contextmanager
    def on_disk():
        with SmallDisk(tmp_path / "disk") as disk:
            yield Host(disk.path / "state", stand_in, authority, stand_in.wanted["ke_port"]), disk

    return on_disk


@pytest.fixture
def host(tmp_path, stand_in, authority):
    return Host(tmp_path / "state", stand_in, authority, stand_in.wanted["ke_port"])


def wanted(chain, order=2):
    return {"certificate": {"order": order, "chain": chain, "fingerprint": fingerprint(chain)}}


async def test_the_old_certificate_is_in_use_until_the_new_one_is_served(host, stand_in, trust):
    """Its port is another program's."""
    host.has_served()
    old, new = host.store.current(), host.chain(2)
    free = stand_in.wanted["ke_port"]
    async with host.running():
        await until(lambda: host.serves(trust), "it serves the old one")
        with socket.create_server((HOST, 0)) as taken:
            stand_in.wanted |= {"ke_port": taken.getsockname()[1], **wanted(new)}
            await until(lambda: any(report["problem"] for report in stand_in.reports), "it says why not")
            assert host.store.current() == old
            assert host.store.next().fingerprint == fingerprint(new)
            assert await host.serves(trust)
            assert (await host.says())["fingerprint"] == old.fingerprint
            assert {report["installed"] for report in stand_in.reports} <= {None, old.fingerprint}
        stand_in.wanted["ke_port"] = free
        await until(lambda: stand_in.reports[-1]["installed"] == fingerprint(new), "the new one is served")
        assert host.store.current().fingerprint == fingerprint(new)
        assert (host.store.next(), await host.serves(trust)) == (None, True)


async def test_what_was_staged_is_served_though_the_registry_is_away(host, stand_in, trust):
    """By a start after a crash between the two. One that has ended is left alone."""
    host.has_served()
    new = host.store.stage(2, host.chain(2), now=datetime.now(UTC))
    stand_in.close()

    async def is_used():
        return (await host.says()).get("fingerprint") == new.fingerprint

    async with host.running():
        await until(is_used, "the new one is in use")
        assert (host.store.current(), await host.serves(trust)) == (new, True)
    ended = datetime.now(UTC) - DAY
    chain = host.chain(3, not_before=ended - 9 * DAY, not_after=ended)
    assert host.store.stage(3, chain, now=ended - DAY) == host.store.next()
    async with host.running():
        await until(is_used, "the old one is in use")
        assert (host.store.current(), await host.serves(trust)) == (new, True)


async def test_a_first_certificate_is_not_in_use_before_the_hook_lets_it(host, stand_in, tmp_path):
    new, fault = host.chain(2), tmp_path / "fault"
    fault.touch()
    stand_in.wanted |= wanted(new)
    async with host.running(hooks={"before": ["sh", "-c", f"test ! -e {fault}"]}):
        await until(lambda: len(stand_in.reports) > 3 and stand_in.reports[-1]["problem"], "the hook fails")
        assert {report["installed"] for report in stand_in.reports} == {None}
        assert host.store.current() is None
        fault.unlink()
        await until(lambda: stand_in.reports[-1]["installed"] == fingerprint(new), "it is served")


async def test_the_old_pair_is_kept_until_the_new_one_was_seen_from_outside(host, stand_in):
    host.has_served()
    new = host.chain(2)
    stand_in.wanted |= wanted(new)
    kept = host.member.certificates / "generations"
    old = host.store.current().fingerprint

    async def reports(more=3):
        count = len(stand_in.reports) + more
        await until(lambda: len(stand_in.reports) >= count, "it goes on")

    with capture_logs() as logs:
        async with host.running():
            await reports(1)
            await until(lambda: stand_in.reports[-1]["installed"] == fingerprint(new), "new")
            for seen in (old, "garbage", "00" * 32, "", "\ud7ff" * 1000):
                stand_in.wanted["seen"] = seen
                await reports()
                assert len(list(kept.iterdir())) == 2
            assert (await host.says())["seen_from_outside"] is False
            stand_in.wanted["seen"] = fingerprint(new)
            await until(lambda: len(list(kept.iterdir())) == 1, "the old one is of no use any more")
            assert host.store.current().fingerprint == fingerprint(new)
            assert (await host.says())["seen_from_outside"] is True
    said = [line["seen"] for line in logs if line["event"] == "another_certificate_seen"]
    assert said == ["garbage"], "once, and not of what is kept"


async def test_the_hook_before_is_run_once_for_a_certificate_and_holds_it_up_while_it_fails(
    host, stand_in, tmp_path
):
    host.has_served()
    old, new, notes, fault = host.store.current(), host.chain(2), tmp_path / "notes", tmp_path / "fault"
    fault.touch()
    script = f'echo "$POOL_HOOK_CHAIN" >> {notes}; test ! -e {fault}'
    stand_in.wanted |= wanted(new)
    async with host.running(hooks={"before": ["sh", "-c", script]}):
        await until(lambda: stand_in.reports and stand_in.reports[-1]["problem"], "the hook fails")
        assert "hook" in stand_in.reports[-1]["problem"]
        assert host.store.current() == old
        fault.unlink()
        await until(lambda: stand_in.reports[-1]["installed"] == fingerprint(new), "the new one is served")
        said = notes.read_text()
        assert set(said.split()) == {str(old.chain_path)}
        count = len(stand_in.reports) + 3
        await until(lambda: len(stand_in.reports) >= count, "it goes on")
        assert notes.read_text() == said


async def never(_writer):
    await asyncio.sleep(60)


async def drips(writer):
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    while True:
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.05)


async def floods(writer):
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 200000000\r\n\r\n")
    for _ in range(200_000_000 // 65_536):
        writer.write(bytes(65_536))
        await writer.drain()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        pytest.param(never, "does not answer", id="never", marks=pytest.mark.long),
        pytest.param(drips, "does not answer", id="drips", marks=pytest.mark.long),
        pytest.param(floods, "too long", id="200 MB"),
        pytest.param(saying(b"\x16\x03\x03 nonsense\r\n\r\n"), "does not answer", id="garbage"),
        pytest.param(saying(http("200 OK", b"<html>")), "not understood", id="web page"),
        pytest.param(saying(http("200 OK", b"[" * 5000)), "not understood", id="deep JSON"),
        pytest.param(saying(http("302 Found", b"", "Location: /x")), "not understood", id="elsewhere"),
        pytest.param(saying(http("403 Forbidden", b"<html>")), "HTTP status 403", id="a proxy's refusal"),
        pytest.param(saying(http("429 No", b"{}", "Retry-After: 1")), "HTTP status 429", id="rate limit"),
    ],
)
async def test_a_registry_of_no_use_ends_no_service(host, stand_in, trust, fault, words):
    """At the start, which is worse than later: nothing is known but what the disk holds."""
    host.has_served()
    async with host.running() as agent:
        async with stand_in.failing(fault):

            async def is_said():
                return words in ((await host.says()).get("contact_error") or "")

            await until(is_said, "the status says what is wrong with the registry")
            await until(lambda: host.serves(trust), "it serves what there is")
        await until(lambda: stand_in.reports, "it goes on by itself")

        async def is_over():
            said = await host.says()
            return said["contact_error"] is None and said["contact_at"] is not None

        await until(is_over, "the status forgets the fault")
        assert not agent.done()


async def test_a_registry_that_is_gone_or_has_no_name_ends_no_service(host, stand_in, trust):
    host.has_served()
    stand_in.close()
    async with host.running():
        await until(lambda: host.serves(trust), "it serves what there is")
        await stand_in.open()
        await until(lambda: stand_in.reports, "it goes on by itself")
    host.me = alice(host.state.path, "https://no-such-registry.invalid")
    async with host.running():
        await until(lambda: host.serves(trust), "it serves what there is")

        async def is_said():
            return "no-such-registry.invalid does not answer" in (
                (await host.says()).get("contact_error") or ""
            )

        await until(is_said, "the status says that the name leads nowhere")


async def test_how_long_a_registry_does_not_want_to_be_asked(stand_in):
    client = https.Client(stand_in.url, ssl.create_default_context(), max_answer=1000)
    for field, seconds in [
        ("90", 90.0),
        ("Wed, 21 Oct 2026 07:28:00 GMT", None),
        ("-1", None),
        ("1" * 99, None),
    ]:
        async with stand_in.failing(saying(http("503 No", b"{}", f"Retry-After: {field}"))):
            answer = await client.request("POST", "/x", headers={}, timeout=5)
        assert (answer.status, answer.retry_after) == (503, seconds)


def test_the_patience_with_a_registry_grows_to_a_minute():
    longest = [patience(failures, None, 0.0) for failures in (1, 2, 3, 7, 8, 100_000)]
    assert longest == [1, 2, 4, 60, 60, 60]
    assert patience(7, None, 1.0) == 30, "not all agents at once"
    assert patience(1, 1800, 0.5) == 1800
    assert [patience(1, None, chance, is_refused=True) for chance in (0, 1)] == [3600, 1800]
    assert patience(1, 1e12, 0.5) == patience(1, float("nan"), 0.5) == 3600, "within bounds of ours"


def test_a_token_is_renewed_by_its_age_whatever_the_clock_does():
    now, day = 1_800_000_000, 86_400
    assert [token_is_old(now, now + days * day) for days in (0, 29, 31, 4000)] == [False, False, True, True]
    assert not token_is_old(now, now - 3600), "a clock that was set back a little"
    assert token_is_old(now, now - 4000 * day), "the clock was years ahead when we joined"


def test_the_alarm_comes_well_before_the_end(tmp_path):
    begin = datetime(2026, 3, 1, tzinfo=UTC)
    for days in (6, 90):
        pair = InstalledPair(tmp_path, tmp_path, "", begin, begin + days * DAY)
        # The registry renews with a third left, or half of a short life; a fifth is time enough to look.
        assert [is_worrying(pair, begin + part * days * DAY) for part in (0, 0.7, 0.79, 0.81, 1, 2)] == [
            False,
            False,
            False,
            True,
            True,
            True,
        ]
        assert not is_worrying(pair, begin - DAY), "a clock that was set back"


async def test_a_certificate_that_ends_soon_is_said(host, stand_in, trust, capsys):
    now = datetime.now(UTC)
    host.has_served(not_before=now - 9 * DAY, not_after=now + DAY)
    stand_in.close()
    async with host.running():
        await until(lambda: host.serves(trust), "it serves")
        assert "was not renewed; see `pool-agent check`" in (await host.says())["problem"]
    assert capsys.readouterr().out.count("certificate_ends_soon") == 1


@contextlib.contextmanager
def occupied(port, host=HOST):
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen()
        yield


async def reported(stand_in, *words):
    """Wait for a report whose problem has these words; none: for one without a problem."""
    seen = len(stand_in.reports)

    def is_there():
        problems = [report["problem"] for report in stand_in.reports[seen:]]
        return any(all(word in (problem or "") for word in words) for problem in problems if words) or (
            not words and None in problems
        )

    await until(is_there, f"a report with {words}: {stand_in.reports[-1:]}")


async def test_a_taken_port_of_the_challenges_does_not_end_the_service(host, stand_in, trust):
    """Nothing of it is needed to serve; but nothing is said to be answered that is not."""
    host.has_served()
    token = "t" * 43
    stand_in.wanted["challenges"] = [{"token": token, "key_authorization": f"{token}.{'k' * 43}"}]
    with occupied(stand_in.wanted["http_port"]):
        async with host.running():
            await reported(stand_in, "another program listens there", "acme.validation")
            await until(lambda: host.serves(trust), "it serves what there is")
            assert "another program" in (await host.says())["problem"]
            assert not any(report["serving"] for report in stand_in.reports)
    async with host.running():
        await reported(stand_in)
        # The first report is made before it is known what to answer.
        await until(lambda: stand_in.reports[-1]["serving"] == [token], "the challenge is answered")
        await until(lambda: host.serves(trust), "it serves")


async def test_a_port_that_comes_free_is_taken_by_itself(host, stand_in, trust):
    host.has_served()
    with contextlib.ExitStack() as other:
        other.enter_context(occupied(host.ke_port))
        async with host.running() as agent:
            await reported(stand_in, "another program listens there", str(host.ke_port))
            assert not agent.done()
            other.close()
            await until(lambda: host.serves(trust), "it serves")
            await reported(stand_in)


def refusing(code, status="403 Forbidden"):
    body = {"code": code, "detail": "no such agent", "remedy": "join again"}
    return saying(http(status, json.dumps(body).encode()))


@pytest.mark.parametrize(
    ("code", "status"), [("unauthenticated", "401 Unauthorized"), ("forbidden", "403 No")]
)
async def test_a_registry_that_does_not_know_us_any_more_ends_no_service(host, stand_in, trust, code, status):
    """It was restored from a wrong copy, and the operator will see that."""
    host.has_served()
    async with host.running() as agent:
        async with stand_in.failing(refusing(code, status)):

            async def is_said():
                said = await host.says()
                return said.get("contact_refused") and said["contact_error"].endswith(
                    "no such agent; join again"
                )

            await until(is_said, "the status says that we are refused")
            await until(lambda: host.serves(trust), "it serves what there is")
            calls = len(stand_in.calls)
            await asyncio.sleep(0.5)
            assert len(stand_in.calls) == calls, "it asks rarely"
            await asyncio.to_thread(local.ask, host.state.path, "wake")
            await until(lambda: len(stand_in.calls) > calls, "and at once if it is told to")
        await asyncio.to_thread(local.ask, host.state.path, "wake")
        await until(lambda: stand_in.reports, "it goes on by itself")

        async def is_over():
            said = await host.says()
            return (said["contact_refused"], said["contact_error"]) == (False, None)

        await until(is_over, "the status forgets it")
        assert not agent.done()


async def test_who_is_joined_anew_while_the_agent_runs_goes_on_with_the_new_key(host, stand_in, trust):
    host.has_served()
    async with host.running() as agent:
        await until(lambda: host.serves(trust), "it serves")
        async with stand_in.failing(refusing("unauthenticated", "401 Unauthorized")):

            async def is_said():
                return (await host.says()).get("contact_refused")

            await until(is_said, "the status says that we are refused")
            again = alice(host.state.path, stand_in.url, token="tc_agent_new")
            assert again.key != host.me.key
        reports = len(stand_in.reports)
        await until(lambda: len(stand_in.reports) > reports, "it reports")
        assert await host.serves(trust)
        assert not agent.done()
        assert host.member.membership() == again, "nothing was written over it"


async def test_a_field_that_was_not_foreseen_has_no_effect_and_is_logged_once(host, stand_in):
    host.has_served()
    stand_in.wanted |= {"command": "reboot", "\x1b[2J" + "x" * 500: 1}
    stand_in.wanted["addresses"] = [{"address": HOST, "proved": True, "call": False, "zone": "x"}]
    stand_in.wanted |= {f"field{number}": number for number in range(500)}
    with capture_logs() as logs:
        async with host.running():
            await until(lambda: len(stand_in.reports) > 3 and stand_in.reports[-1]["installed"], "it goes on")
    said = [line["field"] for line in logs if line["event"] == "field_not_foreseen"]
    assert len(said) == len(set(said)) == 16
    assert {"addresses.zone", "command"} <= set(said)
    assert all(name.isprintable() and len(name) <= 64 for name in said)


async def test_who_answers_no_ca_takes_no_port_and_says_so_where_nobody_does(host, stand_in, trust):
    host.has_served()
    with occupied(stand_in.wanted["http_port"]):
        stand_in.wanted |= {"in_dns": False, "csr_for": 2}
        async with host.running(acme={"validation": "dns-01"}):
            await reported(stand_in, "nobody answers the CA", "policy.dns_01")
            assert await host.serves(trust)
            assert {report["csr"] for report in stand_in.reports} == {None}, "no order that has to fail"
            stand_in.wanted["in_dns"] = True
            await until(lambda: stand_in.reports[-1]["csr"], "the registry does")
            assert stand_in.reports[-1]["problem"] is None
            assert stand_in.reports[-1]["validation"] == "dns-01"


async def test_one_address_that_is_taken_leaves_what_is_served(host, stand_in, trust):
    host.has_served()
    with occupied(host.ke_port, SPARE):
        async with host.running():
            await until(lambda: host.serves(trust), "it serves")
            both = [{"address": each, "proved": True, "call": False} for each in (HOST, SPARE)]
            stand_in.wanted["addresses"] = both
            await reported(stand_in, f"{SPARE}:{host.ke_port}", "another program listens there")
            assert await host.serves(trust)


async def test_a_full_disk_delays_and_loses_nothing(host_on, stand_in, trust, tmp_path):
    """A new token, a request, a certificate: each waits for room, and nothing is asked for or done twice."""
    hooked = tmp_path / "hooked"
    hook = ("sh", "-c", f"echo once >> {hooked}")
    with host_on() as (host, disk):
        host.has_served()
        host.me = alice(host.state.path, stand_in.url, token_at=0)
        host.state.save_keyring(Keyring.new(int(time.time()), secrets.token_bytes))
        host.state.lock()
        os.close(host.state._lock)
        disk.leave(0)
        stand_in.wanted["csr_for"] = 2
        async with host.running(hooks={"after": hook}) as agent:
            await reported(stand_in, "No space left", "check the state directory's owner, rights and space")
            await until(lambda: host.serves(trust), "it serves what there is")
            assert stand_in.calls.count("/v1/agent/rejoin") == 1, "the token is good though it is not kept"
            assert host.member.membership().token_at == 0
            assert {report["csr"] for report in stand_in.reports} == {None}
            assert hooked.read_text() == "once\n"
            disk.empty()
            await until(lambda: stand_in.reports[-1]["csr"], "the request is sent")
            csr, first = stand_in.reports[-1]["csr"]["pem"], stand_in.reports[-1]["installed"]
            assert first is not None
            assert host.member.membership().token == "tc_agent_y"

            disk.leave(0)
            chain = host.authority.chain_for(csr)
            wanted = {"order": 2, "chain": chain, "fingerprint": fingerprint(chain)}
            stand_in.wanted |= {"csr_for": None, "certificate": wanted}
            await reported(stand_in, "No space left")
            assert await host.serves(trust)
            assert stand_in.reports[-1]["installed"] == first
            disk.empty()
            await until(
                lambda: stand_in.reports[-1]["installed"] == wanted["fingerprint"], "the new one is in use"
            )
            assert stand_in.calls.count("/v1/agent/rejoin") == 1
            assert not agent.done()


async def test_a_full_disk_at_the_first_start_is_named_and_worth_another_attempt(host_on, trust):
    unit = (Path(__file__).parents[2] / "packaging/systemd/pool-agent.service").read_text()
    (never_again,) = re.findall("^RestartPreventExitStatus=(.*)$", unit, re.MULTILINE)
    with host_on() as (host, disk):
        host.has_served()
        keys = host.state.path / "cookie-keys.json"
        host.state.lock()
        os.close(host.state._lock)
        disk.leave(0)
        for attempt in (lambda: host.state.joining_key("t"), lambda: Agent(host.state, AgentSettings())):
            with pytest.raises(AgentError, match="No space left on device") as full:
                attempt()
            assert full.value.status is ExitStatus.NO_ROOM
            assert str(full.value.status.value) not in never_again.split()
        assert full.value.message.startswith(f"no room for {keys}: ")
        assert f"df {host.state.path}" in full.value.remedy
        os.close(host.state._lock)
        disk.empty()
        async with host.running():
            await until(lambda: host.serves(trust), "it serves")


async def test_a_disk_that_cannot_be_written_to_does_not_keep_an_agent_from_starting(
    host_on, stand_in, trust
):
    with host_on() as (host, disk):
        host.has_served()
        async with host.running():
            await until(lambda: host.serves(trust), "it serves")
        disk.make_readonly()
        stand_in.wanted["csr_for"] = 2
        async with host.running():
            await reported(stand_in, "Read-only file system", "owner, rights and space")
            await until(lambda: host.serves(trust), "it serves what there is")
            assert local.ask(host.state.path, "status") is None
            with pytest.raises(AgentError, match="another pool-agent") as second:
                Agent(StateDirectory(host.state.path), AgentSettings())
            assert second.value.status is ExitStatus.LOCKED


async def test_what_a_killed_removal_left_is_removed_and_no_server(host, stand_in):
    host.has_served()
    host.member.path.rename(host.member.path.with_name(f".gone-{DOMAIN}"))
    assert host.state.members() == {}
    with pytest.raises(AgentError, match="holds no membership"):
        Agent(StateDirectory(host.state.path), AgentSettings())
    assert list((host.state.path / "members").iterdir()) == []


async def test_proofs_are_answered_after_a_restart(host, stand_in):
    """The registry comes when it has time, and calls are few an hour."""
    stand_in.wanted["addresses"] = [{"address": HOST, "proved": False, "call": True}]
    async with host.running():
        await until(lambda: ["nonce-1"] in [report["serving"] for report in stand_in.reports], "a proof")
    assert (host.member.path / "proofs.json").stat().st_mode & 0o777 == 0o600
    stand_in.wanted["addresses"] = [{"address": HOST, "proved": False, "call": False}]
    seen, calls = len(stand_in.reports), stand_in.calls.count("/v1/agent/proof")
    async with host.running():
        await until(
            lambda: ["nonce-1"] in [report["serving"] for report in stand_in.reports[seen:]],
            "the same one again",
        )
        reader, writer = await asyncio.open_connection(HOST, stand_in.wanted["http_port"])
        writer.write(f"GET {PROOF_PATH}nonce-1 HTTP/1.1\r\nHost: {DOMAIN}\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
    key = read_agent_key(host.me.key.encode()).public_key()
    statement = proof_statement(pool="pool.example", server="alice", address=HOST, nonce="nonce-1")
    key.verify(base64.b64decode(answer.rpartition(b"\r\n")[2]), statement)
    assert stand_in.calls.count("/v1/agent/proof") == calls


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"a/b": "x"}', b'{"nonce": 1}', b'{"nonce": "%s"}' % (b"x" * 201)]
)
async def test_damaged_proofs_are_none(host, content):
    (host.member.path / "proofs.json").write_bytes(content)
    assert host.member.proofs() == {}
