"""Work in a network namespace of its own, in a thread of this process: sockets and programs that it makes are there."""

import ctypes
import os
import subprocess
import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

_NEW_NETWORK = 0x40000000  # CLONE_NEWNET of sched.h
_T = TypeVar("_T")


def in_namespace(work: Callable[[], _T], addresses: Iterable[str] = ()) -> _T:
    """What `work` returns or raises, run where loopback has these addresses too and there is no other network.

    The namespace ends with the last program and socket in it. Takes root.
    """
    results: list[_T] = []
    faults: list[BaseException] = []

    def run() -> None:
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            # A thread's own: no other thread of this process leaves its namespace.
            if libc.unshare(_NEW_NETWORK) != 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))  # noqa: TRY301
            commands = ["link set lo up", *(f"addr add {address} dev lo" for address in addresses)]
            subprocess.run(["ip", "-batch", "-"], input="\n".join(commands), text=True, check=True)
            results.append(work())
        except BaseException as fault:  # noqa: BLE001 - raised again by the caller
            faults.append(fault)

    thread = threading.Thread(target=run, name="a namespace")
    thread.start()
    thread.join()
    if faults:
        raise faults[0]
    return results[0]
