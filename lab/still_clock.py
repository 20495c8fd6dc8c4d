"""Runs a program for which every call that would set the clock succeeds and does nothing.

`still_clock.py PROGRAM ARGUMENT...`, as a file of its own in front of a command line. For peers that give up when they
may not steer the clock (ntpd-rs as a client has no option for that). The kernel is told by a seccomp filter to answer
those calls with zero in place of running them, so nothing that the program or its children do can reach the clock. It
needs no rights and gives none.
"""

import ctypes
import os
import platform
import struct
import sys

_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_SECCOMP = 22
_SECCOMP_MODE_FILTER = 2
_RET_ALLOW = 0x7FFF0000
_RET_KILL_PROCESS = 0x80000000
# "Fail with errno 0" is how a filter says success.
_RET_NOTHING_DONE = 0x00050000
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_OFFSET_OF_NUMBER, _OFFSET_OF_ARCHITECTURE = 0, 4

# linux/audit.h; then adjtimex, settimeofday, clock_settime, clock_adjtime of that architecture.
_CALLS = {
    "x86_64": (0xC000003E, (159, 164, 227, 305)),
    "aarch64": (0xC00000B7, (171, 170, 112, 266)),
}


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def _filter() -> bytes:
    """The filter as classic BPF; a call by the rules of another architecture ends the program."""
    try:
        architecture, calls = _CALLS[platform.machine()]
    except KeyError:
        raise SystemExit(
            f"still_clock: unknown machine {platform.machine()}; add its calls to _CALLS"
        ) from None
    instructions = [
        (_LOAD, 0, 0, _OFFSET_OF_ARCHITECTURE),
        (_JUMP_IF_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _RET_KILL_PROCESS),
        (_LOAD, 0, 0, _OFFSET_OF_NUMBER),
        *((_JUMP_IF_EQUAL, len(calls) - index, 0, call) for index, call in enumerate(calls)),
        (_RETURN, 0, 0, _RET_ALLOW),
        (_RETURN, 0, 0, _RET_NOTHING_DONE),
    ]
    return b"".join(struct.pack("@HBBI", *instruction) for instruction in instructions)


def _prctl(*arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(*arguments) != 0:
        raise SystemExit(f"still_clock: the kernel takes no filter: {os.strerror(ctypes.get_errno())}")


def main() -> None:
    code = _filter()
    program = _Program(len(code) // 8, code)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0)
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
