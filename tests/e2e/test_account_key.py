"""The account's key is in one process: not in the worker's files, environment or memory, and gone with the worker."""

import base64
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lab.pool import LabPool
from lab.processes import wait_until
from nts_core.acme import load_account_key

KEY = "acme-account.pem"
WATCHED = """\
import sys

def note(event, arguments):
    if event == "open" and "acme-account" in str(arguments[0]):
        print("OPENED", arguments[0], file=sys.stderr, flush=True)

sys.addaudithook(note)
from poolsvc.cli import main
main()
"""


@pytest.fixture
def watched(tmp_path):
    """A program that is `poolsvc`, and tells when it opens the account's key itself."""
    program = tmp_path / "watched.py"
    program.write_text(WATCHED)
    return program


def children(pid):
    found = [task.read_text().split() for task in Path(f"/proc/{pid}/task").glob("*/children")]
    pids = [int(child) for some in found for child in some]
    return [child for child in pids if b"poolsvc.acme_process" in Path(f"/proc/{child}/cmdline").read_bytes()]


def has_ended(pid) -> bool:
    """Nobody may be there to bury it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def is_in_memory(pid, secrets) -> bool:
    with Path(f"/proc/{pid}/mem").open("rb") as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            begin, end, rights = re.match(r"([0-9a-f]+)-([0-9a-f]+) (....)", line).groups()
            if not rights.startswith("rw"):
                continue
            try:
                memory.seek(int(begin, 16))
                octets = memory.read(int(end, 16) - int(begin, 16))
            except (OSError, OverflowError):  # of the kernel's own
                continue
            if any(secret in octets for secret in secrets):
                return True
    return False


@pytest.mark.timeout(240)
def test_the_key_is_in_one_process_only(tmp_path, watched):
    with LabPool(
        tmp_path / "pool", addresses=1, opening_size=1, program=[sys.executable, str(watched), "serve"]
    ) as pool:
        member = pool.add("alice").start()
        pool.wait_for_state(member, "active", 60)
        worker = pool.registry.pid
        (child,) = children(worker)
        number = load_account_key(pool.directory / KEY).private_numbers().private_value.to_bytes(32)
        text = (pool.directory / KEY).read_text().splitlines()[1].encode()
        secrets = (number, number[::-1], text, base64.b64decode(text)[-16:])
        assert is_in_memory(child, secrets), "this test finds the key where it is"
        assert not is_in_memory(worker, secrets)
        for pid, holds in ((worker, False), (child, True)):
            files = [str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()]
            assert any(KEY in file for file in files) == holds
        for pid in (worker, child):
            environment = (
                Path(f"/proc/{pid}/environ").read_bytes() + Path(f"/proc/{pid}/cmdline").read_bytes()
            )
            assert not any(secret in environment for secret in secrets)
        assert "OPENED" not in pool.registry.output()
        check = [sys.executable, str(watched), "config", "check", "--config", str(pool.config)]
        done = subprocess.run(check, capture_output=True, text=True, check=True)
        assert "OPENED" in done.stderr, "this test sees who opens the key"

        pool.registry.signal(signal.SIGKILL)
        pool.registry.wait()
        wait_until(lambda: has_ended(child), "the end of the account's process")
