"""The socket by which commands reach an agent: who may ask, and that nobody can keep it from answering."""

import asyncio
import contextlib
import os
import socket
import stat
from pathlib import Path

import pytest

from member_agent import local

STATUS = {"servers": [], "text": "ä"}


@pytest.fixture
async def place(tmp_path):
    """Deeper than a socket's address is long."""
    directory = tmp_path / ("d" * 100) / ("e" * 100)
    directory.mkdir(parents=True)
    async with local.answering(directory, {"status": lambda: STATUS, "large": lambda: {"x": "y" * 500_000}}):
        yield directory


async def ask(place, question="status"):
    return await asyncio.to_thread(local.ask, place, question)


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


async def connect(place):
    descriptor = os.open(place, os.O_PATH)
    try:
        return await asyncio.open_unix_connection(f"/proc/self/fd/{descriptor}/agent.sock")
    finally:
        os.close(descriptor)


async def test_a_question_is_answered_for_the_owner_alone(place):
    assert await ask(place) == STATUS
    found = (place / "agent.sock").stat()
    assert stat.S_ISSOCK(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o600
    made = place / "later"
    made.touch()
    assert stat.S_IMODE(made.stat().st_mode) & 0o044, "other files get the rights that they always got"


async def test_large_answers_arrive_whole(place):
    assert await ask(place, "large") == {"x": "y" * 500_000}


async def test_many_ask_at_once(place):
    assert await asyncio.gather(*(ask(place) for _ in range(16))) == [STATUS] * 16


async def test_those_who_say_nothing_hold_up_nobody(place):
    before = descriptors()
    idle = [await connect(place) for _ in range(300)]
    assert await ask(place) == STATUS
    # Of both ends of each: what was too much is closed on the other side.
    assert descriptors() <= before + 300 + 20
    for _, writer in idle:
        writer.close()
    assert await ask(place) == STATUS


@pytest.mark.parametrize(
    "octets",
    [
        b"",
        b"\n",
        b"stop\n",
        b"status",
        b"\xff\xfe\n",
        b"x" * 64 + b"\n",
        b"x" * 1_000_000,
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
async def test_what_is_no_question_gets_no_answer(place, octets):
    reader, writer = await connect(place)
    writer.write(octets)
    with contextlib.suppress(ConnectionError):
        writer.write_eof()
        async with asyncio.timeout(10):
            assert await reader.read() == b""
    writer.close()
    assert await ask(place) == STATUS


async def test_nobody_there_is_none(tmp_path):
    assert await ask(tmp_path / "nowhere") is None
    assert await ask(tmp_path) is None
    async with local.answering(tmp_path, {}):
        assert await ask(tmp_path) is None, "an agent that does not know the question"
    assert await ask(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


async def test_what_a_killed_agent_has_left_is_in_nobodys_way(tmp_path):
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "agent.sock"))
    assert await ask(tmp_path) is None
    async with local.answering(tmp_path, {"status": lambda: STATUS}):
        assert await ask(tmp_path) == STATUS


async def test_where_there_can_be_no_socket_all_else_goes_on(tmp_path, capsys):
    (tmp_path / "agent.sock").mkdir()
    async with local.answering(tmp_path, {"status": lambda: STATUS}):
        assert await ask(tmp_path) is None
    assert "commands_not_answered" in capsys.readouterr().out
