"""ntpd-rs: a whole configuration beside the user's, theirs and then ours, chosen by a drop-in of its unit.

It includes no other files, and reads certificates once. So after a change of the user's own file `pool-agent` has to
write that configuration anew, which it does whenever it starts. The keys of cookies are kept in a directory of their own
that nobody else may enter, as ntpd-rs demands, unless the user has said how to keep them.
"""

import tomllib
from pathlib import Path
from typing import Any

from member_agent.engines import EngineError
from member_agent.engines.layout import (
    DROP_IN,
    Kind,
    Layout,
    Offer,
    OwnFile,
    Places,
    TimeDaemon,
    covers,
    one_domain,
    one_port,
    required_text,
    without_covered,
)
from member_agent.errors import AgentError
from member_agent.sockets import Endpoint, parse_endpoint

_NTP_PORT = 123


def _lay_out(places: Places, offer: Offer) -> Layout:
    domain = one_domain(offer, Kind.NTPD_RS)
    file = places.config / "ntp.toml"
    text = required_text(file)
    user = _parse(text, file)
    ntp_port = one_port(offer.ntp, "NTP", Kind.NTPD_RS)
    pair = OwnFile(places.own / f"{domain}.pem", pair_of=domain)
    lines: list[str] = []
    listeners = _listeners(user, "server", file)
    # Of a draft it is not known where it would have to listen beside that.
    is_open = offer.is_draft and any(listener.port == ntp_port for listener in listeners)
    for endpoint in [] if is_open else _unserved(listeners, offer.ntp):
        lines += ["[[server]]", f'listen = "{endpoint}"']
    taken = _listeners(user, "nts-ke-server", file)
    for endpoint in without_covered(offer.ke):
        if any(covers(other, endpoint) or covers(endpoint, other) for other in taken):
            raise EngineError(
                f"ntpd-rs is an NTS server on {endpoint} already",
                f"remove [[nts-ke-server]] from {file}, or register this host without an agent",
            )
        lines += [
            "[[nts-ke-server]]",
            f'listen = "{endpoint}"',
            f'certificate-chain-path = "{pair.path}"',
            f'private-key-path = "{pair.path}"',
            *([] if ntp_port == _NTP_PORT else [f"ntp-port = {ntp_port}"]),
        ]
    state = None
    if "keyset" not in user:
        state = places.state
        lines += ["[keyset]", f'key-storage-path = "{state / "keys"}"']
    # The user's part may hold secrets, such as tokens of pools.
    whole = OwnFile(places.config / "pool-agent.toml", (*text.splitlines(), "", *lines), is_private=True)
    _parse(whole.text, file)
    drop_in = OwnFile(
        places.units / f"{DAEMON.unit}.d" / DROP_IN,
        (
            "[Service]",
            "ExecStart=",
            f"ExecStart=/usr/bin/ntp-daemon -c {whole.path}",
            # Debian 13's unit has no right to port 123.
            "AmbientCapabilities=CAP_NET_BIND_SERVICE",
        ),
    )
    return Layout((pair, whole, drop_in), state)


def _parse(text: str, file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except ValueError as error:
        raise EngineError(
            f"{file} cannot be extended: {error}",
            "write [[server]] and [[nts-ke-server]] as tables of their own, and check the file with `ntp-ctl validate`",
        ) from None


def _listeners(user: dict[str, Any], table: str, file: Path) -> list[Endpoint]:
    entries = user.get(table, [])
    try:
        return [parse_endpoint(str(entry["listen"]), table) for entry in entries]
    except (AgentError, TypeError, KeyError):
        raise EngineError(
            f"{file}: [[{table}]] is not understood", "give each one `listen`, an address and a port"
        ) from None


def _unserved(listeners: list[Endpoint], wanted: tuple[Endpoint, ...]) -> list[Endpoint]:
    """Where nobody listens yet; EngineError where ntpd-rs could not listen beside what it has."""
    missing = [
        endpoint
        for endpoint in without_covered(wanted)
        if not any(covers(listener, endpoint) for listener in listeners)
    ]
    for endpoint in missing:
        for listener in listeners:
            if covers(endpoint, listener):
                raise EngineError(
                    f"ntpd-rs serves {listener} only; the pool needs {endpoint}",
                    f'make the line of that [[server]] `listen = "{endpoint}"`',
                )
    return missing


DAEMON = TimeDaemon(
    kind=Kind.NTPD_RS,
    unit="ntpd-rs.service",
    program="ntp-daemon",
    process="ntp-daemon",
    user="ntpd-rs",
    config=Path("/etc/ntpd-rs"),
    version=r"\bntp-daemon ([0-9]+)[.]([0-9]+)",
    oldest=(1, 0),
    lay_out=_lay_out,
)
