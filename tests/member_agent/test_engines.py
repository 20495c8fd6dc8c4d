"""Time daemons of volunteers, told to serve by us: the real ones, through the life of a certificate."""

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from lab.disks import SmallDisk
from lab.mortal_engine import document_of
from lab.peers import CHRONY, CHRONY_SID, CHRONY_TRIXIE, NTPD_RS_SID, NTPD_RS_TRIXIE
from lab.volunteer import ChronyVolunteer, NtpdRsVolunteer, Pairs
from member_agent import self_measurement
from member_agent.clock import clock_of
from member_agent.config import AgentSettings, EngineSettings
from member_agent.engines import EngineError, Service
from member_agent.engines.choice import engine_of as engine_of_settings
from member_agent.engines.detect import detect
from member_agent.engines.external import ExternalEngine, Hands
from member_agent.engines.layout import Kind
from member_agent.engines.succession import Succession
from member_agent.host import Host
from member_agent.host import Served as ServedHere
from member_agent.install import bundle
from member_agent.state import StateDirectory
from nts_core.client import ClientError, establish, measure
from nts_core.control import CheckStatus
from nts_core.tls import Pin

ALICE, BOB = "alice.servers.pool.example", "bob.servers.other.example"


@pytest.fixture
def pairs(tmp_path):
    return Pairs(tmp_path / "authority")


@pytest.fixture(
    params=[
        pytest.param((ChronyVolunteer, CHRONY), id="chrony-4.3"),
        pytest.param((NtpdRsVolunteer, NTPD_RS_TRIXIE), id="ntpd-rs-1.4"),
        pytest.param((ChronyVolunteer, CHRONY_TRIXIE), id="chrony-4.6", marks=pytest.mark.long),
        pytest.param((ChronyVolunteer, CHRONY_SID), id="chrony-4.9", marks=pytest.mark.long),
        pytest.param((NtpdRsVolunteer, NTPD_RS_SID), id="ntpd-rs-1.9", marks=pytest.mark.long),
    ]
)
def host(request, tmp_path):
    make, package = request.param
    if not (package.is_required or package.is_there()):
        pytest.skip(f"{package} has left the archive; see lab/newer_peers.py")
    with make(tmp_path / "host", package) as host:
        yield host


@pytest.fixture
def chrony(tmp_path):
    with ChronyVolunteer(tmp_path / "host") as host:
        yield host


def engine_of(host, **more):
    return ExternalEngine(host.kind, EngineSettings(**host.settings(**more)), host.directory)


def service(host, *pairs_by_name):
    return Service(dict(pairs_by_name), (host.ke,), (host.ntp,))


async def ask(host, name, pair):
    """One authenticated exchange with a server that has to show this certificate."""
    established = await establish(name, host.ke.address, host.ke.port, Pin(pair.fingerprint))
    assert established.ntp_port == host.ntp.port
    return await measure(established, 1)


async def test_through_the_life_of_a_certificate(host, pairs):
    before = host.tree()
    engine = engine_of(host)
    first, second = pairs.issue(ALICE), pairs.issue(ALICE)
    await engine.apply(service(host, (ALICE, first)))
    assert (await ask(host, ALICE, first)).best is not None
    assert host.told == ["restart"]

    await engine.apply(service(host, (ALICE, first)))
    assert host.told == ["restart"], "nothing to change, and yet it was restarted"

    client = await establish(ALICE, host.ke.address, host.ke.port, Pin(first.fingerprint))
    await engine.apply(service(host, (ALICE, second)))
    await ask(host, ALICE, second)
    await measure(client, 1)  # the cookies of before are good still
    with pytest.raises(ClientError):
        await ask(host, ALICE, first)
    assert host.told == ["restart"] * 2
    keys = [path for path in (host.directory / "etc").rglob("*") if b"PRIVATE KEY" in read(path)]
    assert len(keys) == 1
    assert keys[0].stat().st_mode & 0o777 == 0o640
    whole = host.config / "pool-agent.toml"
    assert not whole.exists() or whole.stat().st_mode & 0o777 == 0o640, "the user's part may hold secrets"
    assert not [path for path in host.tree() if path.endswith((".new", ".old", "change.json"))]

    await engine.remove()
    assert host.tree() == before
    assert not (host.directory / "state-of-daemon").exists()
    assert host.process.running()
    with pytest.raises(ClientError):
        await ask(host, ALICE, second)


def read(path):
    return path.read_bytes() if path.is_file() else b""


async def test_a_certificate_that_the_daemon_cannot_use_is_taken_back(host, pairs):
    engine = engine_of(host, deadline=1.5)
    good = pairs.issue(ALICE)
    await engine.apply(service(host, (ALICE, good)))
    before = host.tree()
    with pytest.raises(EngineError) as failure:
        await engine.apply(service(host, (ALICE, pairs.useless(ALICE))))
    assert "what was there before is back" in failure.value.message
    assert any(
        words in failure.value.message
        for words in ("Could not set credentials", "failed to parse private key")
    ), failure.value.message
    assert host.tree() == before
    await ask(host, ALICE, good)
    told = list(host.told)
    await engine.apply(service(host, (ALICE, good)))
    assert host.told == told


async def test_a_first_certificate_that_cannot_be_used_leaves_nothing(host, pairs):
    before = host.tree()
    with pytest.raises(EngineError):
        await engine_of(host, deadline=1).apply(service(host, (ALICE, pairs.useless(ALICE))))
    assert host.tree() == before
    assert not (host.directory / "state-of-daemon").exists()
    assert host.process.running()


async def test_a_pair_that_does_not_match_is_never_written(chrony, pairs):
    good, other = pairs.issue(ALICE), pairs.issue(ALICE)
    engine = engine_of(chrony)
    await engine.apply(service(chrony, (ALICE, good)))
    before, told = chrony.tree(), list(chrony.told)
    mixed = replace(other, key_path=good.key_path)
    with pytest.raises(EngineError, match="do not match"):
        await engine.apply(service(chrony, (ALICE, mixed)))
    with pytest.raises(EngineError, match=f"not for {ALICE}"):
        await engine.apply(service(chrony, (ALICE, pairs.issue(BOB))))
    good.chain_path.write_bytes(b"garbage")
    with pytest.raises(EngineError, match="not a PEM certificate chain"):
        await engine.apply(service(chrony, (ALICE, good)))
    assert (chrony.tree(), chrony.told) == (before, told)


async def test_a_daemon_that_does_not_come_back(host, pairs):
    engine = engine_of(host, deadline=2)
    first, second = pairs.issue(ALICE), pairs.issue(ALICE)
    await engine.apply(service(host, (ALICE, first)))
    host.is_broken = True
    with pytest.raises(EngineError, match=r"ends with 1.*what was there before does not work either"):
        await engine.apply(service(host, (ALICE, second)))
    assert not host.process.running()
    host.is_broken = False
    # Nothing differs from what was last seen working, and yet it has to be told.
    await engine.apply(service(host, (ALICE, first)))
    await ask(host, ALICE, first)


async def test_a_daemon_that_is_gone_does_not_stop_the_farewell(host, pairs):
    before = host.tree()
    engine = engine_of(host)
    await engine.apply(service(host, (ALICE, pairs.issue(ALICE))))
    host.is_broken = True
    with pytest.raises(EngineError, match="nothing of ours is there any more"):
        await engine.remove()
    assert host.tree() == before
    await engine.remove()


async def test_chrony_serves_two_names_and_forgets_one(chrony, pairs):
    engine = engine_of(chrony)
    alice, bob = pairs.issue(ALICE), pairs.issue(BOB)
    await engine.apply(service(chrony, (ALICE, alice)))
    await engine.apply(service(chrony, (ALICE, alice), (BOB, bob)))
    await ask(chrony, ALICE, alice)
    await ask(chrony, BOB, bob)
    await engine.apply(service(chrony, (BOB, bob)))
    await ask(chrony, BOB, bob)
    assert [path for path in chrony.tree() if path.endswith(".pem")] == [f"chrony/pool-agent/{BOB}.pem"]


async def test_ntpd_rs_refuses_a_second_name(tmp_path, pairs):
    with NtpdRsVolunteer(tmp_path / "host") as host:
        before = host.tree()
        with pytest.raises(EngineError, match="one certificate") as refusal:
            await engine_of(host).apply(service(host, (ALICE, pairs.issue(ALICE)), (BOB, pairs.issue(BOB))))
        assert "chrony or the builtin engine" in refusal.value.remedy
        assert (host.tree(), host.told) == (before, [])


async def test_chrony_reads_back_what_it_has_measured(chrony, pairs):
    await engine_of(chrony).apply(service(chrony, (ALICE, pairs.issue(ALICE))))
    assert chrony.options() == ["-F", "0", "-r"]


@pytest.fixture
def disk(tmp_path):
    """Where /etc of the host is."""
    with SmallDisk(tmp_path / "disk") as disk:
        (tmp_path / "host").mkdir()
        (tmp_path / "host" / "etc").symlink_to(disk.path)
        yield disk


async def fault_of(work):
    try:
        await work
    except EngineError as error:
        return error.message
    return None


@pytest.mark.parametrize("make", [ChronyVolunteer, NtpdRsVolunteer])
async def test_a_full_disk_changes_nothing(disk, make, tmp_path, pairs):
    with make(tmp_path / "host") as host:
        engine = engine_of(host)
        old = None
        for new in (pairs.issue(ALICE), pairs.issue(ALICE)):
            for pages in itertools.count():
                disk.leave(pages)
                before = host.tree()
                fault = await fault_of(engine.apply(service(host, (ALICE, new))))
                if fault is None:
                    break
                assert "No space left" in fault
                assert host.tree() == before
                assert host.process.running()
                if old is not None:
                    await is_served(host, old)
            assert pages > 1
            await ask(host, ALICE, new)
            old = new


async def test_a_directory_that_cannot_be_written_to_changes_nothing(disk, tmp_path, pairs):
    with ChronyVolunteer(tmp_path / "host") as host:
        # What root uses: the agent would not even try, and ask root.
        hands = Hands(host.kind, EngineSettings(**host.settings()))
        old, new = pairs.issue(ALICE), pairs.issue(ALICE)
        await hands.apply(bundles(old), (host.ke,), (host.ntp,))
        before = host.tree()
        disk.make_readonly()
        with pytest.raises(EngineError, match="Read-only file system") as refusal:
            await hands.apply(bundles(new), (host.ke,), (host.ntp,))
        assert str(host.config) in refusal.value.remedy
        with pytest.raises(EngineError, match="Read-only file system"):
            await hands.remove()
        assert (host.tree(), host.told) == (before, ["restart"])
        await ask(host, ALICE, old)


def bundles(pair):
    return {ALICE: bundle(pair.chain_path.read_bytes(), pair.key_path.read_bytes(), ALICE)}


async def test_two_that_change_it_take_turns(chrony, pairs):
    first, second = pairs.issue(ALICE), pairs.issue(ALICE)
    await asyncio.gather(
        engine_of(chrony).apply(service(chrony, (ALICE, first))),
        engine_of(chrony).apply(service(chrony, (ALICE, second))),
    )
    assert chrony.told == ["restart"] * 2
    await is_served(chrony, first, second)


def test_a_daemon_that_runs_is_found(chrony):
    program = Path(*CHRONY.command("usr/sbin/chronyd"))
    found = detect(EngineSettings(**chrony.settings()), path=str(program.parent))
    assert (found[0].kind, found[0].is_running, found[0].config) == (Kind.CHRONY, True, chrony.config)


async def test_a_damaged_memory_is_said_and_nothing_is_touched(chrony, pairs):
    engine = engine_of(chrony)
    await engine.apply(service(chrony, (ALICE, pairs.issue(ALICE))))
    (chrony.config / "pool-agent/served.json").write_text("{")
    before = chrony.tree()
    for work in (engine.apply(service(chrony, (ALICE, pairs.issue(ALICE)))), engine.remove()):
        with pytest.raises(EngineError, match=r"served\.json is damaged"):
            await work
    assert (chrony.tree(), chrony.told) == (before, ["restart"])


async def test_rights_do_not_depend_on_the_umask(host, pairs):
    """A unit of root's has 077, with which the daemon could not reach its pair."""
    before = os.umask(0o077)
    try:
        await engine_of(host).apply(service(host, (ALICE, pairs.issue(ALICE))))
    finally:
        os.umask(before)
    own = host.config / "pool-agent"
    assert own.stat().st_mode & 0o777 == 0o750
    assert (host.units / f"{host.unit}.d").stat().st_mode & 0o777 == 0o755
    assert (own / f"{ALICE}.pem").stat().st_mode & 0o777 == 0o640


async def test_a_user_that_there_is_not(chrony, pairs):
    before = chrony.tree()
    with pytest.raises(EngineError, match="no user nobody-here") as failure:
        await engine_of(chrony, user="nobody-here").apply(service(chrony, (ALICE, pairs.issue(ALICE))))
    assert "engine.user" in failure.value.remedy
    assert chrony.tree() == before


async def test_what_a_daemon_logs_is_bounded_and_safe(chrony, tmp_path, pairs):
    log, tell = tmp_path / "log", tmp_path / "tell"
    log.write_text("said before\n")
    tell.write_text(
        f"{{ yes {'long ' * 50} | head -n 9999; printf '\\033[31mred\\033[0m\\001\\377\\n'; }} >> {log}; exit 3"
    )
    engine = engine_of(chrony, log=str(log), reload=["/bin/sh", str(tell)])
    with pytest.raises(EngineError, match="ends with 3") as failure:
        await engine.apply(service(chrony, (ALICE, pairs.issue(ALICE))))
    told = failure.value.message.partition("its log: ")[2]
    assert told.endswith("\nred??")
    assert 1000 < len(told) <= 2000

    tell.write_text("exit 3")
    with pytest.raises(EngineError, match="ends with 3") as failure:
        await engine.apply(service(chrony, (ALICE, pairs.issue(ALICE))))
    assert "its log" not in failure.value.message, "what was said before is not about this"


async def test_a_command_that_does_not_end_is_ended(chrony, pairs):
    engine = engine_of(chrony, reload=["/bin/sh", "-c", "sleep 60 & wait"], deadline=0.3)
    with pytest.raises(EngineError, match="does not end"):
        await engine.apply(service(chrony, (ALICE, pairs.issue(ALICE))))


class Mortal:
    """`lab.mortal_engine`, for an agent whose state is in this directory."""

    def __init__(self, state):
        self._state = state
        state.mkdir(exist_ok=True)

    def __enter__(self):
        self._child = subprocess.Popen(
            [sys.executable, "-m", "lab.mortal_engine", str(self._state)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_):
        self._child.stdin.close()
        assert self._child.wait(10) == 0
        self._child.stdout.close()

    def end(self, at, when, host, service):
        """How a run to that moment ends; None takes everything away."""
        document = None if service is None else document_of(service)
        self._child.stdin.write(json.dumps([at, when, host.settings(), document]) + "\n")
        self._child.stdin.flush()
        return int(self._child.stdout.readline())


async def is_served(host, *pairs):
    """One of these, sooner or later: a boot does not wait until a daemon serves."""
    async with asyncio.timeout(20):
        while True:
            for pair in pairs:
                with suppress(ClientError):
                    return await ask(host, ALICE, pair)
            await asyncio.sleep(0.02)


async def end_everywhere(host, pairs, event, step):
    """Kill at every `step`th moment of an event; the next run ends where one that was not killed does."""
    engine = engine_of(host)
    old, new = service(host, (ALICE, pairs.issue(ALICE))), service(host, (ALICE, pairs.issue(ALICE)))
    start, target = {"first": (None, old), "renewal": (old, new), "leave": (old, None)}[event]

    async def reach(wanted):
        await (engine.remove() if wanted is None else engine.apply(wanted))
        return host.tree()

    await reach(start)
    wanted = await reach(target)
    # Before a change is on the disk, and after it, one of the two is there.
    may_be = [each.pairs[ALICE] for each in (start, target) if each] if event == "renewal" else []
    moments = 0
    with Mortal(host.directory / "agent") as mortal:
        for at in itertools.count(1, step):
            await reach(start)
            ended = await asyncio.to_thread(mortal.end, at, "before" if at % 2 else "after", host, target)
            if ended == 0:
                break
            assert ended == -signal.SIGKILL
            moments += 1
            host.restart()
            if may_be:
                await is_served(host, *may_be)
            if at % 4 in (0, 3) and start is not None:
                # Who is asked for the old state after that gets it.
                await reach(start)
                await is_served(host, start.pairs[ALICE])
            assert await reach(target) == wanted
            if target is not None:
                await is_served(host, target.pairs[ALICE])
            assert host.process.running()
    assert moments > 10 // step
    await reach(None)


@pytest.mark.parametrize("event", ["first", "renewal", "leave"])
async def test_killed_at_some_moments_the_next_start_ends_in_the_same_place(chrony, pairs, event):
    await end_everywhere(chrony, pairs, event, 6)


@asynccontextmanager
async def agent(state, settings):
    """What an agent with these settings has of engines, until it ends."""
    told = AgentSettings(local_stratum=10, clock_source="kernel", engine=EngineSettings(**settings))
    clock = clock_of(told)
    engine = engine_of_settings(told, StateDirectory(state), clock)
    host = Host(told, clock, engine, Succession(state, told.engine, engine.name))
    try:
        yield host
    finally:
        await host.close()


async def test_the_engine_changes_from_a_daemon_to_the_builtin_one_and_back(chrony, pairs, tmp_path):
    """On the same ports: the one before lets go of them first, and has nothing of ours left."""
    before, pair, state = chrony.tree(), pairs.issue(ALICE), tmp_path / "agent"
    served = ServedHere(pair, (chrony.ke,), (chrony.ntp,))
    for _ in range(2):
        async with agent(state, chrony.settings()) as host:
            await host.serve(ALICE, served)
            applied = chrony.tree()
            await ask(chrony, ALICE, pair)
            found = await self_measurement.measure(ALICE, served)
            assert [finding.status for finding in found] == [CheckStatus.OK] * 2, found
        assert chrony.tree() == applied, "an agent that ends leaves the daemon as it is"
        async with agent(state, {"kind": "builtin"}) as host:
            await host.resume({ALICE: served})
            assert chrony.tree() == before
            await ask(chrony, ALICE, pair)
            assert host.engine.requests == 1, "it is not chronyd who answers"
    assert (chrony.told, chrony.process.running()) == (["restart"] * 4, True)
    async with agent(state, chrony.settings()) as host:
        await host.serve(ALICE, served)
    async with agent(state, {"kind": "builtin"}) as host:
        await host.forget(ALICE, has_served=True)
        assert chrony.tree() == before, "who leaves with another engine than it served with"
    assert not (state / "applied-engine.json").exists()


async def test_a_daemon_that_does_not_come_back_from_us_is_named_and_in_nobodys_way(chrony, pairs, tmp_path):
    before, pair, state = chrony.tree(), pairs.issue(ALICE), tmp_path / "agent"
    served = ServedHere(pair, (chrony.ke,), (chrony.ntp,))
    async with agent(state, chrony.settings()) as host:
        await host.serve(ALICE, served)
    chrony.is_broken = True
    async with agent(state, {"kind": "builtin"}) as host:
        with pytest.raises(EngineError, match=r"(?s)chrony, the engine before this one: .* ends with 1"):
            await host.serve(ALICE, served)
        assert chrony.tree() == before
        await host.serve(ALICE, served)
        await ask(chrony, ALICE, pair)


async def test_a_daemon_that_is_moved_is_another_one(chrony, pairs, tmp_path):
    pair, state = pairs.issue(ALICE), tmp_path / "agent"
    served = ServedHere(pair, (chrony.ke,), (chrony.ntp,))
    async with agent(state, chrony.settings()) as host:
        await host.serve(ALICE, served)
    empty = tmp_path / "moved"
    empty.mkdir()
    async with agent(state, chrony.settings(config_dir=str(empty))) as host:
        with pytest.raises(EngineError, match=f"no {empty}"):
            await host.serve(ALICE, served)
    assert not [path for path in chrony.tree() if "pool-agent" in path]


async def change_of_daemons(tmp_path, pairs, step):
    """Kill at every `step`th moment of it; the next agent ends where one that was not killed does."""
    pair, state = pairs.issue(ALICE), tmp_path / "agent"
    with ChronyVolunteer(tmp_path / "old") as old, Mortal(state) as mortal:
        new_host = NtpdRsVolunteer(tmp_path / "new", places=(old.ke, old.ntp))
        with new_host as new:
            untouched = {host: host.tree() for host in (old, new)}
            served = ServedHere(pair, (old.ke,), (old.ntp,))
            target, moments = service(old, (ALICE, pair)), 0
            for at in itertools.count(1, step):
                async with agent(state, old.settings()) as host:
                    await host.serve(ALICE, served)
                assert new.tree() == untouched[new]
                ended = await asyncio.to_thread(mortal.end, at, "before" if at % 2 else "after", new, target)
                if ended == 0:
                    break
                assert ended == -signal.SIGKILL
                moments += 1
                async with agent(state, new.settings()) as host:
                    await host.serve(ALICE, served)
                assert old.tree() == untouched[old]
                await is_served(new, pair)
            assert moments > 10 // step
            assert old.tree() == untouched[old]
            await is_served(new, pair)


async def test_killed_at_some_moments_of_a_change_of_daemons(tmp_path, pairs):
    await change_of_daemons(tmp_path, pairs, 9)


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_killed_at_any_moment_of_a_change_of_daemons(tmp_path, pairs):
    await change_of_daemons(tmp_path, pairs, 1)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("event", ["first", "renewal", "leave"])
@pytest.mark.parametrize("make", [ChronyVolunteer, NtpdRsVolunteer])
async def test_killed_at_any_moment_the_next_start_ends_in_the_same_place(make, tmp_path, pairs, event):
    with make(tmp_path / "host") as host:
        await end_everywhere(host, pairs, event, 1)
