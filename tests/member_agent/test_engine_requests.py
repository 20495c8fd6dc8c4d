"""What root does for an agent that may not: the whole way by files, with NTPsec; and what root does not believe."""

import asyncio
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lab.peers import Namespace
from lab.volunteer import ChronyVolunteer, NtpsecVolunteer, Pairs
from member_agent.config import MAX_ENGINE_DEADLINE, EngineSettings, load_settings
from member_agent.engines import EngineError, Service, requests
from member_agent.engines.layout import Kind
from member_agent.errors import AgentError, ExitStatus
from member_agent.state import StateDirectory

ALICE = "alice.servers.pool.example"
ENGINE = [sys.executable, "-c", "from member_agent.engine_commands import app; app()"]


async def until(look):
    """What is seen once anything is."""
    async with asyncio.timeout(20):
        while True:
            if seen := look():
                return seen
            await asyncio.sleep(0.01)


class Agent:
    """An agent's directory beside a volunteer's daemon, and root, who is asked by it."""

    def __init__(self, host, **more):
        self.host = host
        self.state = host.directory / "pool-agent"
        self.state.mkdir(mode=0o700)
        self.inside = getattr(host, "namespace", None)
        lines = [f"{name} = {json.dumps(value)}" for name, value in host.settings(**more).items()]
        self.settings = "\n".join(["[engine]", *lines, ""])
        (self.state / "agent.toml").write_text(self.settings)
        self.pairs = Pairs(self.state / "authority")

    def service(self, *pairs_by_name):
        return Service(dict(pairs_by_name), (self.host.ke,), (self.host.ntp,))

    async def root(self, *arguments):
        """`pool-agent engine ...` as root of the daemon's network; its exit status and what it says."""
        inside = self.inside.inside() if self.inside else ()
        child = await asyncio.create_subprocess_exec(
            *inside,
            *ENGINE,
            *arguments,
            f"--state={self.state}",
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await child.communicate()
        return child.returncode, said.decode()

    async def apply(self, service):
        """Asks as the agent does, while root follows as the path unit makes it."""
        asked = asyncio.create_task(requests.ask(self.state, self.host.kind, service, deadline=20))
        await until((self.state / "engine" / "request.json").exists)
        root = await self.root("apply")
        await asked
        return root


@pytest.fixture
def ntpsec(tmp_path):
    with Namespace(tmp_path) as namespace, NtpsecVolunteer(tmp_path / "host", namespace) as host:
        yield Agent(host, deadline=15)


async def test_ntpsec_through_the_life_of_a_certificate(ntpsec):
    host = ntpsec.host
    before = host.tree()
    first, second = ntpsec.pairs.issue(ALICE), ntpsec.pairs.issue(ALICE)
    await ntpsec.apply(ntpsec.service((ALICE, first)))
    await ntpsec.apply(ntpsec.service((ALICE, first)))
    assert host.told == ["restart"]
    await ntpsec.apply(ntpsec.service((ALICE, second)))
    assert host.told == ["restart", "reload"], "a new pair needs no restart"
    key = host.config / "key.pem"
    assert (key.stat().st_mode & 0o777, key.read_bytes().count(b"-----BEGIN")) == (0o640, 3)

    working = host.tree()
    (ntpsec.state / "agent.toml").write_text(
        (ntpsec.state / "agent.toml").read_text().replace("deadline = 15", "deadline = 2")
    )
    with pytest.raises(EngineError, match="what was there before is back") as failure:
        await ntpsec.apply(ntpsec.service((ALICE, ntpsec.pairs.useless(ALICE))))
    assert "NTSs: " in failure.value.message, "the daemon's own words"
    assert host.tree() == working
    assert host.told[2:] == ["reload", "restart"]

    status, said = await ntpsec.apply(Service({}, (), ()))
    assert (status, said) == (0, "ntpsec serves nothing of ours any more\n")
    assert host.tree() == before
    assert host.process.running()


async def test_ntpsec_refuses_files_of_the_user(ntpsec):
    host = ntpsec.host
    (host.config / "key.pem").write_text("their own key\n")
    before = host.tree()
    with pytest.raises(EngineError, match=r"key\.pem is there already"):
        await ntpsec.apply(ntpsec.service((ALICE, ntpsec.pairs.issue(ALICE))))
    assert (host.tree(), host.told) == (before, [])


@pytest.fixture
def agent(tmp_path):
    """Beside a chrony that nobody starts."""
    return Agent(ChronyVolunteer(tmp_path / "host"))


def request_of(agent, **changes):
    pair = agent.pairs.issue(ALICE)
    below = {"chain": f"authority/{pair.chain_path.name}", "key": f"authority/{pair.key_path.name}"}
    document = {
        "id": "0" * 32,
        "kind": "chrony",
        "pairs": {ALICE: below},
        "ke": ["127.0.0.1:4460"],
        "ntp": ["127.0.0.1:123"],
    }
    return {**document, **changes}


def put(agent, document):
    place = agent.state / "engine"
    place.mkdir(exist_ok=True)
    text = document if isinstance(document, str) else json.dumps(document)
    (place / "request.json").write_text(text)


def test_a_request_is_understood_and_taken_away(agent):
    put(agent, request_of(agent))
    task = requests.take(agent.state)
    assert (task.kind, list(task.bundles), str(task.ke[0])) == (Kind.CHRONY, [ALICE], "127.0.0.1:4460")
    assert "PRIVATE KEY" in task.bundles[ALICE].pem
    assert "PRIVATE KEY" not in repr(task)
    assert requests.take(agent.state) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "sh"},
        {"kind": "builtin"},
        {"reload": ["/bin/sh"]},
        {"id": "../../etc"},
        {"pairs": {"../evil": {"chain": "a", "key": "b"}}},
        {"pairs": {"evil.example\nallow": {"chain": "a", "key": "b"}}},
        {"pairs": {ALICE: {"chain": "/etc/shadow", "key": "/etc/shadow"}}},
        {"pairs": {ALICE: {"chain": "../../etc/shadow", "key": "b"}}},
        {"pairs": {ALICE: {"chain": "a\0b", "key": "b"}}},
        {"pairs": {ALICE: {"chain": "missing", "key": "missing"}}},
        {"pairs": {f"{number}.example": {"chain": "a", "key": "b"} for number in range(17)}},
        {"ke": ["127.0.0.1:4460"] * 65},
        {"ke": ["127.0.0.1:0"]},
        {"ke": ["ntp.example:4460"]},
        {"ke": ['[fe80::1%"\nallow]:4460']},
        {"ntp": [123]},
        {"ntp": "127.0.0.1:123"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_root_refuses_what_was_not_foreseen(agent, changes):
    put(agent, request_of(agent, **changes))
    with pytest.raises(EngineError):
        requests.take(agent.state)
    assert requests.take(agent.state) is None, "it comes once"


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff", "{" * 10_000, '"' + "a" * 100_000 + '"'])
def test_root_refuses_garbage(agent, text):
    put(agent, text)
    with pytest.raises(EngineError):
        requests.take(agent.state)


def test_root_refuses_links_and_what_is_no_file(agent, tmp_path):
    document = request_of(agent)
    outside = tmp_path / "outside"
    outside.write_text(json.dumps(document))
    place = agent.state / "engine"
    place.mkdir()
    (place / "request.json").symlink_to(outside)
    with pytest.raises(EngineError):
        requests.take(agent.state)
    assert outside.exists()
    os.mkfifo(place / "request.json")
    with pytest.raises(EngineError):
        requests.take(agent.state)
    assert list(place.iterdir()) == []
    key = agent.state / document["pairs"][ALICE]["key"]
    key.rename(tmp_path / "key")
    key.symlink_to(tmp_path / "key")
    put(agent, document)
    with pytest.raises(EngineError):
        requests.take(agent.state)


def names_in(directory):
    return {path.name for path in directory.iterdir()}


async def test_nothing_that_stands_for_a_request_starts_root_again_and_again(agent, tmp_path):
    """systemd looks at the path alone: whatever it finds there has to go."""
    request, outside = agent.state / "engine" / "request.json", tmp_path / "outside"

    def is_a_directory(path):
        path.mkdir()
        (path / "more").write_text("of it")

    makers = [
        is_a_directory,
        lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
        os.mkfifo,
        lambda path: path.symlink_to(outside),
        lambda path: path.symlink_to(tmp_path / "nowhere"),
        lambda path: path.symlink_to(path.name),
        lambda path: path.write_bytes(b"{" * 1_000_000),
    ]
    outside.write_text("whole")
    for make in makers:
        request.parent.mkdir(exist_ok=True)
        make(request)
        with pytest.raises(EngineError, match="request is refused"):
            requests.take(agent.state)
        assert not names_in(request.parent) & {request.name}
        assert requests.take(agent.state) is None
    shutil.rmtree(request.parent)
    is_a_directory(outside.with_name("elsewhere"))
    for make in (lambda path: path.symlink_to(tmp_path / "elsewhere"), os.mkfifo):
        make(request.parent)
        status, said = await agent.root("apply")
        assert (status, "is no directory of the agent's user" in said) == (ExitStatus.ENGINE, True), said
        assert not names_in(agent.state) & {request.parent.name}
    assert requests.take(agent.state) is None
    assert (outside.read_text(), (tmp_path / "elsewhere" / "more").read_text()) == ("whole", "of it")


def test_root_answers_in_spite_of_what_is_in_the_way(agent):
    for name in (".result.json.new", "result.json"):
        (agent.state / "engine" / name / "more").mkdir(parents=True)
    requests.answer(agent.state, "0" * 32, None)
    assert json.loads((agent.state / "engine/result.json").read_text())["id"] == "0" * 32


def test_systemd_waits_for_the_longest_change(agent):
    """Or root's part would end in the middle of it. Who asks waits as long."""
    unit = (Path(__file__).parents[2] / "packaging/systemd/pool-agent-engine.service").read_text()
    (seconds,) = re.findall("^TimeoutStartSec=([0-9]+)$", unit, re.MULTILINE)
    assert requests.longest(MAX_ENGINE_DEADLINE) < int(seconds)
    (agent.state / "agent.toml").write_text(f"[engine]\ndeadline = {MAX_ENGINE_DEADLINE + 1}\n")
    with pytest.raises(AgentError, match=r"engine\.deadline: .* less than or equal to 90") as refusal:
        load_settings(agent.state, {})
    assert "agent.toml" in refusal.value.remedy


def test_root_does_not_write_where_a_link_leads(agent, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (agent.state / "engine").symlink_to(elsewhere)
    requests.answer(agent.state, "0" * 32, None)
    assert list(elsewhere.iterdir()) == []
    (agent.state / "engine").unlink()
    (agent.state / "engine").mkdir()
    (elsewhere / "victim").write_text("whole")
    (agent.state / "engine" / ".result.json.new").symlink_to(elsewhere / "victim")
    (agent.state / "engine" / "result.json").symlink_to(elsewhere / "victim")
    requests.answer(agent.state, "0" * 32, None)
    assert (elsewhere / "victim").read_text() == "whole"
    assert not (agent.state / "engine" / "result.json").is_symlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_root_believes_files_of_the_agent_and_settings_of_root_only(agent):
    document = request_of(agent)
    put(agent, document)
    key = agent.state / document["pairs"][ALICE]["key"]
    for path in (agent.state, *agent.state.rglob("*")):
        os.chown(path, 65534, 65534)
    # A key of root's, by a hard link or a directory's.
    os.chown(key, 0, 0)
    with pytest.raises(EngineError, match="not a file of the agent's user"):
        requests.take(agent.state)
    answer = json.loads((agent.state / "engine/result.json").read_text())
    assert "not a file of the agent's user" in answer["problem"]
    assert (agent.state / "engine/result.json").stat().st_uid == 65534

    with pytest.raises(EngineError, match="can be written by others than root"):
        requests.settings_for_root(agent.state)
    file = agent.state / "agent.toml"
    os.chown(file, 0, 0)
    assert requests.settings_for_root(agent.state).kind == "chrony"
    file.chmod(0o664)
    with pytest.raises(EngineError, match="can be written by others than root"):
        requests.settings_for_root(agent.state)
    file.unlink()
    assert requests.settings_for_root(agent.state).reload == ()
    file.symlink_to("/dev/null")
    with pytest.raises(EngineError, match=r"agent\.toml"):
        requests.settings_for_root(agent.state)


async def test_an_agent_whose_request_nobody_takes_says_so(agent, monkeypatch):
    monkeypatch.setattr(requests, "_TAKE_DEADLINE", 0.2)
    pair = agent.pairs.issue(ALICE)
    with pytest.raises(EngineError, match="nobody takes") as failure:
        await requests.ask(agent.state, Kind.CHRONY, agent.service((ALICE, pair)), deadline=1)
    assert "pool-agent-engine.path" in failure.value.remedy
    assert not (agent.state / "engine" / "request.json").exists()


async def test_an_agent_believes_the_answer_to_its_own_question_only(agent, monkeypatch):
    monkeypatch.setattr(requests, "_BESIDE", 0.2)
    (agent.state / "engine").mkdir()
    requests.answer(agent.state, "1" * 32, None)
    pair = agent.pairs.issue(ALICE)
    asked = asyncio.create_task(
        requests.ask(agent.state, Kind.CHRONY, agent.service((ALICE, pair)), deadline=0.05)
    )
    task = await until(lambda: requests.take(agent.state))
    assert task.bundles[ALICE].fingerprint == pair.fingerprint
    with pytest.raises(EngineError, match="root does not say"):
        await asked


async def test_root_tells_the_agent_what_was_in_the_way(agent):
    conf = agent.host.config / "chrony.conf"
    conf.write_text(conf.read_text().replace("confdir", "# confdir"))
    with pytest.raises(EngineError, match="does not include") as failure:
        await agent.apply(agent.service((ALICE, agent.pairs.issue(ALICE))))
    assert "add the line `confdir" in failure.value.remedy


async def test_root_changes_no_other_daemon_than_the_settings_name(agent):
    put(agent, request_of(agent, kind="ntpsec"))
    status, said = await agent.root("apply")
    assert status == ExitStatus.ENGINE
    assert "the settings name chrony, and the agent asks for ntpsec" in said
    answer = json.loads((agent.state / "engine/result.json").read_text())
    assert answer["id"] == "0" * 32
    assert "engine.kind" in answer["remedy"]


async def test_a_daemon_that_the_settings_named_before_is_rid_of_what_is_ours(agent):
    """That can hurt nobody, and nobody else would do it."""
    (agent.state / "agent.toml").write_text('[engine]\nkind = "builtin"\n')
    put(agent, request_of(agent, kind="ntpsec", pairs={}))
    assert await agent.root("apply") == (0, "ntpsec serves nothing of ours any more\n")


# Becomes another user once it has read our modules, which that one may not read.
_AS_NOBODY = """
import asyncio, os, sys
from pathlib import Path
from member_agent.config import EngineSettings
from member_agent.engines import EngineError, external
from member_agent.engines.succession import Succession
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    asyncio.run(Succession(Path(sys.argv[1]), EngineSettings(), "builtin").begin())
except EngineError as error:
    print(error.message, error.remedy)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_an_agent_without_rights_says_what_root_could_not_know(agent, open_path):
    """A directory of the daemon's that only settings name that are gone."""
    state = open_path / "state"
    state.mkdir()
    os.chown(state, 65534, 65534)
    last = EngineSettings(**agent.host.settings())
    (state / "applied-engine.json").write_text(last.model_dump_json())
    (state / "applied-engine.json").chmod(0o644)
    done = subprocess.run(
        [sys.executable, "-c", _AS_NOBODY, state], capture_output=True, text=True, timeout=60, check=True
    )
    assert f"chrony in {agent.host.config} still serves for the agent" in done.stdout
    assert "`pool-agent engine remove` as root" in done.stdout
    assert (state / "applied-engine.json").exists()


async def test_root_takes_everything_away_without_being_asked(agent):
    """Also from a daemon that the settings name no more; what cannot be read of that is in nobody's way."""
    for content in (EngineSettings(**agent.host.settings()).model_dump_json(), "{"):
        (agent.state / "applied-engine.json").write_text(content)
        own = agent.host.config / "pool-agent"
        own.mkdir()
        (agent.state / "agent.toml").write_text("" if content != "{" else agent.settings)
        with agent.host:
            status, said = await agent.root("remove")
        assert (status, said) == (0, "nothing of ours is in the configuration of a time daemon\n")
        assert (own.exists(), (agent.state / "applied-engine.json").exists()) == (False, False)


async def test_nothing_is_taken_away_that_a_running_agent_would_write_again(agent):
    holder = StateDirectory(agent.state)
    holder.lock()
    try:
        status, said = await agent.root("remove")
    finally:
        os.close(holder._lock)
    assert status == ExitStatus.LOCKED
    assert f"an agent runs on {agent.state}" in said
    assert "systemctl stop pool-agent" in said
