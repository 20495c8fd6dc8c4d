"""The kernel's view of its clock, and its receive times, from this host's own kernel."""

import socket
import time

import pytest

from nts_core.kernel import SO_TIMESTAMPNS, TIMESPEC, read_kernel, receive_time
from nts_core.packet import Leap
from nts_core.source import SystemClock


def test_this_hosts_kernel_answers():
    found = read_kernel()
    assert found.synchronised == (found.leap is not Leap.UNSYNCHRONISED)
    assert found.max_error_ns >= 0


def test_a_source_goes_by_the_same_answer():
    assert SystemClock().is_good() == read_kernel().synchronised


def test_a_datagram_comes_with_its_time():
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        receiver.settimeout(5)
        receiver.bind(("127.0.0.1", 0))
        receiver.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        before = time.time_ns()
        sender.sendto(b"x", receiver.getsockname())
        _, ancillary, _, _ = receiver.recvmsg(1, 64)
        after = time.time_ns()
    assert before <= receive_time(ancillary) <= after


@pytest.mark.parametrize(
    "ancillary",
    [
        [],
        [(socket.SOL_SOCKET, SO_TIMESTAMPNS, b"")],
        [(socket.SOL_SOCKET, SO_TIMESTAMPNS, bytes(TIMESPEC.size - 1))],
        [(socket.SOL_SOCKET, SO_TIMESTAMPNS + 1, bytes(TIMESPEC.size))],
        [(socket.IPPROTO_IP, SO_TIMESTAMPNS, bytes(TIMESPEC.size))],
    ],
)
def test_a_datagram_without_a_time(ancillary):
    assert receive_time(ancillary) is None


def test_the_time_is_found_among_other_messages():
    said = (socket.SOL_SOCKET, SO_TIMESTAMPNS, TIMESPEC.pack(1_800_000_000, 7))
    other = (socket.IPPROTO_IP, 8, bytes(12))
    assert receive_time([other, said]) == 1_800_000_000_000_000_007
