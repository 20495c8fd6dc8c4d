"""The cookie keys of a state directory, for people: look, replace, and share with other hosts.

Hosts that serve one name have to open each other's cookies. They share a ratchet once (RFC 8915 section 6): from
then on each derives every next key itself, at the same second, and nothing is sent again.
"""

import os
import secrets
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from member_agent.errors import AgentError, ExitStatus
from member_agent.state import StateDirectory
from nts_core.cookies import Keyring
from nts_core.errors import WireError

# A share holds two keys: some hundred octets.
_LONGEST_SHARE = 4096


def look(state: StateDirectory) -> Keyring | None:
    """The keys of a directory that is there."""
    if not state.path.is_dir():
        raise _nothing(state)
    return state.keyring()


def _nothing(state: StateDirectory) -> AgentError:
    return AgentError(f"{state.path} holds no cookie keys", "give the agent's --state", ExitStatus.STATE)


def describe(keyring: Keyring | None) -> str:
    """What may be told of cookie keys: no secrets."""
    if keyring is None:
        return "no cookie keys yet: the first run makes them"
    schedule = keyring.schedule
    following = datetime.fromtimestamp(keyring.next_at, UTC).isoformat(timespec="seconds")
    kind = "a ratchet that hosts can share" if schedule.ratchet else "random keys of this host alone"
    return (
        f"{kind}; the next key, {keyring.fingerprint}, seals from {following}, then every {schedule.rotation} s;"
        f" retired keys open cookies for {schedule.history} s"
    )


def renew(state: StateDirectory) -> Keyring:
    """Throw all keys away, as after somebody else may have read them (RFC 8915 section 8.2)."""
    look(state)
    state.lock()
    keyring = state.keyring()
    if keyring is None:
        raise _nothing(state)
    return _saved(state, Keyring.new(_now(), secrets.token_bytes, keyring.schedule))


def share(state: StateDirectory, file: Path) -> Keyring:
    """Turn the keys into a ratchet if they are none yet, and write what another host has to adopt."""
    state.lock()
    keyring = state.keyring() or Keyring.new(_now(), secrets.token_bytes)
    if not keyring.schedule.ratchet:
        ratchet = replace(keyring.schedule, ratchet=True)
        keyring = keyring.adopt(Keyring.new(_now(), secrets.token_bytes, ratchet))
    keyring = keyring.at(_now(), secrets.token_bytes)
    # Its place is taken first, the keys are saved next: a share that is there is one that this host follows.
    descriptor = _create(file)
    try:
        with os.fdopen(descriptor, "wb") as out:
            state.save_keyring(keyring)
            out.write(keyring.share().dump())
            out.flush()
            os.fsync(descriptor)
    except OSError as error:
        file.unlink()
        raise AgentError(
            f"{file}: {error.strerror}", "make room, or name another place", ExitStatus.STATE
        ) from None
    except AgentError:
        file.unlink()
        raise
    return keyring


def _create(file: Path) -> int:
    try:
        return os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        is_there = isinstance(error, FileExistsError)
        remedy = (
            "name a file that is not there yet" if is_there else "check the directory that it is to lie in"
        )
        raise AgentError(f"{file}: {error.strerror}", remedy, ExitStatus.STATE) from None


def adopt(state: StateDirectory, file: Path) -> Keyring:
    """Follow the ratchet of another host, and go on opening the cookies of this one."""
    state.lock()
    try:
        with file.open("rb") as source:
            shared = Keyring.load(source.read(_LONGEST_SHARE))
    except (OSError, WireError) as error:
        raise AgentError(
            f"{file}: {error}", "give the file that `pool-agent cookie-keys share` wrote", ExitStatus.STATE
        ) from None
    if state.is_key_file(file) or not shared.schedule.ratchet:
        raise AgentError(
            f"{file} is no share of a ratchet",
            "give the file that `pool-agent cookie-keys share` wrote on another host",
            ExitStatus.STATE,
        )
    if shared.next_at > _now() + 2 * shared.schedule.rotation:
        raise AgentError(
            f"{file}: its keys lie in the future",
            "check the clocks of both hosts, and share again",
            ExitStatus.STATE,
        )
    own = state.keyring()
    adopted = own.adopt(shared) if own else shared
    return _saved(state, adopted.at(_now(), secrets.token_bytes))


def _saved(state: StateDirectory, keyring: Keyring) -> Keyring:
    state.save_keyring(keyring)
    return keyring


def _now() -> int:
    return int(time.time())
