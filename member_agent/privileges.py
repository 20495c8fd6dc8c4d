"""Becoming another user at the start, for hosts on which nothing else sees to that (systemd does).

All but one of root's rights go before anything is heard from the network: ports below 1024 may still be bound, since
addresses are added while the agent runs. No child has even that.
"""

import grp
import os
import pwd
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from member_agent.errors import AgentError, ExitStatus
from nts_core.kernel import keep_capabilities, keep_only_low_ports

# More files and directories than any agent makes: a directory that holds them is none of its own.
_MOST_FILES = 10_000


@dataclass(frozen=True, slots=True)
class _Identity:
    """Whom to become."""

    user: str
    uid: int
    gid: int
    groups: tuple[int, ...]

    @property
    def is_ours(self) -> bool:
        return os.getresuid() == (self.uid,) * 3 and os.getresgid() == (self.gid,) * 3


def become(user: str | None, group: str | None, state: Path | None) -> None:
    """Be `user` from now on, without a way back; nothing without one. `state` is his afterwards. Raises AgentError.

    To be called while the process has one thread.
    """
    if user is None:
        return
    identity = _find(user, group)
    if identity.is_ours:
        return
    if os.geteuid():
        raise AgentError(
            f"user: only root can become {user}",
            "start pool-agent as root, or as that user, or leave the setting out",
            ExitStatus.CONFIGURATION,
        )
    try:
        if state is not None:
            _give(state, identity)
        keep_capabilities()
        os.setgroups(identity.groups)
        os.setresgid(*(identity.gid,) * 3)
        os.setresuid(*(identity.uid,) * 3)
        keep_only_low_ports()
    except OSError as error:
        raise AgentError(
            f"user: cannot become {user}: {error}",
            "check what this host lets root do here, or leave the setting out",
            ExitStatus.CONFIGURATION,
        ) from None
    _check(identity, state)


def become_owner(state: Path) -> None:
    """Be the owner of a state directory from now on, if root gave it to somebody: what is written is the agent's then.

    As `become`.
    """
    try:
        uid = state.stat().st_uid
        name = pwd.getpwuid(uid).pw_name
    except (OSError, KeyError):
        return
    if uid and not os.geteuid():
        become(name, None, None)


def _find(user: str, group: str | None) -> _Identity:
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise AgentError(
            f"user: this host has no user {user}", "make it, or name another one", ExitStatus.CONFIGURATION
        ) from None
    if not entry.pw_uid:
        raise AgentError(f"user: {user} is root", "name a user of the agent's own", ExitStatus.CONFIGURATION)
    try:
        gid = entry.pw_gid if group is None else grp.getgrnam(group).gr_gid
    except KeyError:
        raise AgentError(
            f"group: this host has no group {group}", "make it, or leave it out", ExitStatus.CONFIGURATION
        ) from None
    return _Identity(user, entry.pw_uid, gid, tuple(os.getgrouplist(user, gid)))


def _give(state: Path, identity: _Identity) -> None:
    """Make what root has made here the user's. Links are not followed, and files with two names are left alone: who may
    write here could have put another's file in their place.
    """
    for descriptor in _own_files(state):
        give(descriptor, identity.uid, identity.gid)


def give(descriptor: int, uid: int, gid: int) -> None:
    """Make what root has made another's; nothing unless we are root."""
    found = os.fstat(descriptor)
    is_single = stat.S_ISDIR(found.st_mode) or (stat.S_ISREG(found.st_mode) and found.st_nlink == 1)
    # Where nothing can be written, what is right already need not be.
    is_other = (uid, gid) not in {(-1, -1), (found.st_uid, found.st_gid)}
    if not os.geteuid() and not found.st_uid and is_single and is_other:
        os.fchown(descriptor, uid, gid)


def _own_files(state: Path) -> Iterator[int]:
    count = 0
    for _, directories, files, place in os.fwalk(state, follow_symlinks=False):
        yield place
        count += len(directories) + len(files)
        if count > _MOST_FILES:
            raise AgentError(
                f"{state} holds more than {_MOST_FILES} files",
                "give a --state of the agent's own",
                ExitStatus.STATE,
            )
        for name in files:
            try:
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                descriptor = os.open(name, flags, dir_fd=place)
            except OSError:
                continue  # a link, or gone meanwhile
            try:
                yield descriptor
            finally:
                os.close(descriptor)


def _check(identity: _Identity, state: Path | None) -> None:
    """That nothing of root is left, and that the state can be used. Raises AgentError."""
    is_whole = identity.is_ours and set(os.getgroups()) == set(identity.groups)
    try:
        os.setresuid(0, 0, 0)
    except PermissionError:
        pass
    else:
        is_whole = False
    if not is_whole:
        raise AgentError(
            f"user: this process did not become {identity.user} for good",
            "report this; meanwhile leave the setting out",
            ExitStatus.CONFIGURATION,
        )
    if state is not None and not os.access(state, os.R_OK | os.W_OK | os.X_OK):
        raise AgentError(
            f"{state} cannot be used by {identity.user}",
            "let that user into all directories above it, and give it this one",
            ExitStatus.STATE,
        )
