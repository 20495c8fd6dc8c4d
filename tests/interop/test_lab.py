"""What the matrix stands on: the page, the pinned packages, the relay, the clock that nobody sets."""

import hashlib
import platform
import re
import socket
import subprocess
import sys

import pytest

from lab import interop, newer_peers, still_clock
from lab.newer_peers import Pin, Unavailable, check_stand_ins
from lab.peers import CHRONY, CHRONY_SID, CHRONY_TRIXIE, NTPD_RS_SID, NTPD_RS_TRIXIE, NTPSEC
from lab.processes import free_port, wait_until
from lab.relay import Relay


def test_the_page_is_what_the_matrix_says():
    assert interop.PAGE.read_text() == interop.table(), "run `make docs`"


@pytest.mark.parametrize("role", interop.Role)
def test_no_two_cells_have_one_name(role):
    names = [str(cell) for cell in interop.cells(role)]
    assert len(names) == len(set(names)) > 0


@pytest.mark.parametrize(
    ("package", "program"),
    [
        (CHRONY, "usr/sbin/chronyd"),
        (CHRONY_TRIXIE, "usr/sbin/chronyd"),
        (CHRONY_SID, "usr/sbin/chronyd"),
        (NTPSEC, "usr/sbin/ntpd"),
        (NTPD_RS_TRIXIE, "usr/bin/ntp-daemon"),
        (NTPD_RS_SID, "usr/bin/ntp-daemon"),
    ],
    ids=lambda value: str(value).replace(" ", "-"),
)
def test_programs_have_the_version_that_the_page_names(package, program):
    if not (package.is_required or package.is_there()):
        pytest.skip(f"{package} has left the archive; see lab/newer_peers.py")
    told = subprocess.run(
        [*package.command(program), "--version"], capture_output=True, text=True, check=True, timeout=10
    )
    assert package.version in re.split(r"[ \-\n]", told.stdout + told.stderr)


def pin(package="chrony", version="4.6.1-3", path="pool/c.deb", content=b"octets"):
    return Pin(package, version, path, hashlib.sha256(content).hexdigest())


@pytest.fixture
def mirror(tmp_path):
    """A mirror of one file, by apt's method for files of this machine."""
    (tmp_path / "mirror" / "pool").mkdir(parents=True)
    (tmp_path / "mirror" / "pool" / "c.deb").write_bytes(b"octets")
    return f"copy://{tmp_path}/mirror"


def test_a_pinned_file_is_taken(mirror, tmp_path):
    newer_peers.download(["copy:///nowhere", mirror], pin(), tmp_path / "c.deb")
    assert (tmp_path / "c.deb").read_bytes() == b"octets"


@pytest.mark.parametrize("wanted", [pin(content=b"other octets"), pin(path="pool/gone.deb")])
def test_another_file_or_none_is_not_taken(mirror, tmp_path, wanted):
    with pytest.raises(Unavailable):
        newer_peers.download([mirror], wanted, tmp_path / "c.deb")


@pytest.mark.parametrize("version", ["4.6.1-3", "4.6.1-4", "4.6.1-3+deb13u9"])
def test_another_revision_of_a_program_may_stand_in(version):
    check_stand_ins("trixie", [pin()], [pin(version=version)])


@pytest.mark.parametrize("version", ["4.6.2-1", "1:4.9-1"])
def test_another_version_of_a_program_may_not(version):
    with pytest.raises(Unavailable, match=r"the pin says 4\.6\.1"):
        check_stand_ins("trixie", [pin()], [pin(version=version)])


def test_another_version_of_a_library_may_stand_in():
    check_stand_ins("trixie", [pin("libc6", "2.41-12")], [pin("libc6", "2.42-1")])


# Each call with arguments that the kernel refuses, should it ever look at them.
CALLS = """
import ctypes, sys
libc = ctypes.CDLL(None)
print(*(libc.syscall(int(number), 1, 1) for number in sys.argv[1:]))
"""


@pytest.mark.parametrize(("command", "answers"), [((), "-1"), ((still_clock.__file__,), "0")])
def test_calls_that_set_the_clock_do_nothing_and_succeed(command, answers):
    _, calls = still_clock._CALLS[platform.machine()]
    python = (sys.executable,) if command else ()
    done = subprocess.run(
        [*python, *command, sys.executable, "-c", CALLS, *map(str, calls)],
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
    )
    assert done.stdout.split() == [answers] * 4


@pytest.mark.parametrize(("loss", "lost"), [(0.0, 0), (1.0, 20)])
def test_a_relay_loses_the_share_that_was_asked_for(loss, lost):
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as far,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as near,
    ):
        far.bind(("127.0.0.1", 0))
        ports = free_port("127.77.99.1"), free_port("127.77.99.1")
        with Relay(
            "127.77.99.1", ke=(ports[0], far.getsockname()), ntp=(ports[1], far.getsockname()), loss=loss
        ) as relay:
            near.connect(("127.77.99.1", ports[1]))
            near.settimeout(5)
            far.settimeout(5)
            for number in range(20):
                near.send(bytes([number]))
                if not lost:
                    octets, source = far.recvfrom(16)
                    far.sendto(octets * 2, source)
                    assert near.recv(16) == bytes([number, number])
            if lost:
                wait_until(lambda: relay.lost == lost, "all are lost")
                relay.loss = 0.0
                near.send(b"last")
                assert far.recv(16) == b"last"
        assert relay.lost == lost


def fates(seed):
    relay = Relay("127.77.99.1", ke=(1, ("127.0.0.1", 1)), ntp=(1, ("127.0.0.1", 1)), loss=0.25, seed=seed)
    return [relay.passes(48) for _ in range(200)]


def test_the_fate_of_packets_comes_from_the_seed():
    assert fates(1) == fates(1) != fates(2)
    assert 25 < fates(1).count(False) < 75
