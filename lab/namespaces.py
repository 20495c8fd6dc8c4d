"""Work in a network namespace of its own, in a thread of this process: sockets and programs that it makes are there."""

import ctypes
import os
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_NEW_NETWORK = 0x40000000  # CLONE_NEWNET of sched.h
_T = TypeVar("_T")


def in_namespace(work: Callable[[], _T], addresses: Iterable[str] = ()) -> _T:
    """What `work` returns or raises, run where loopback has these addresses too and there is no other network.

    The namespace ends with the last program and socket in it. Takes root.
    """

    def run() -> _T:
        _leave_network()
        commands = ["link set lo up", *(f"addr add {address} dev lo" for address in addresses)]
        subprocess.run(["ip", "-batch", "-"], input="\n".join(commands), text=True, check=True)
        return work()

    with ThreadPoolExecutor(1, "a namespace") as one:
        return one.submit(run).result()


def _leave_network() -> None:
    """The calling thread alone leaves it; the others of the process stay."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_NETWORK) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
