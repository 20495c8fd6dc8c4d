"""The interop matrix: which peer, in which role, with which AEAD, through which event; and docs/interop.md from it.

The tests of tests/interop/ are made from `cells`, the table from the same cells: what is not tested is not in it.

    python -m lab.interop    writes the page
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from lab.peers import (
    CHRONY,
    CHRONY_SID,
    CHRONY_TRIXIE,
    NTPD_RS_SID,
    NTPD_RS_TRIXIE,
    NTPSEC,
    Package,
)

PAGE = Path(__file__).parent.parent / "docs" / "interop.md"
AEADS = (15, 16, 17, 30)


class Role(StrEnum):
    """What the peer is."""

    SERVER = "server"
    CLIENT = "client"


class Event(StrEnum):
    """What happens to the server, or between the two, while the client has cookies."""

    NONE = "plain"
    RESTART = "restart"
    LOST_KEYS = "lost-keys"
    ROTATION = "rotation"
    CERTIFICATE = "certificate"
    LOSS = "loss"


class Family(StrEnum):
    """Whose program it is."""

    CHRONY = "chrony"
    NTPSEC = "NTPsec"
    NTPD_RS = "ntpd-rs"
    OURS = "Truechimer"


@dataclass(frozen=True, slots=True)
class Peer:
    """One program; `package` is None for our own. `usual` is the AEAD whose events run in `make test`."""

    family: Family
    package: Package | None
    release: str
    aeads: tuple[int, ...]
    roles: tuple[Role, ...] = (Role.SERVER, Role.CLIENT)
    usual: int | None = None

    def __str__(self) -> str:
        return str(self.package) if self.package else self.family


PEERS = (
    Peer(Family.CHRONY, CHRONY, "Debian 12", (15,)),
    Peer(Family.CHRONY, CHRONY_TRIXIE, "Debian 13", (15, 30), usual=15),
    Peer(Family.CHRONY, CHRONY_SID, "Debian sid", (15, 30)),
    Peer(Family.NTPSEC, NTPSEC, "Debian 12", (15, 16, 17), usual=15),
    Peer(Family.NTPD_RS, NTPD_RS_TRIXIE, "Debian 13", (15, 17), usual=15),
    Peer(Family.NTPD_RS, NTPD_RS_SID, "Debian sid", (15, 17)),
    Peer(Family.OURS, None, "this tree", AEADS, roles=(Role.SERVER,), usual=15),
)


# Programs that poll slowly, in events that others prove too.
_SLOW = frozenset(
    {
        (Family.NTPSEC, Role.CLIENT, Event.RESTART),
        (Family.NTPSEC, Role.CLIENT, Event.LOST_KEYS),
        (Family.NTPSEC, Role.CLIENT, Event.CERTIFICATE),
        (Family.NTPD_RS, Role.CLIENT, Event.RESTART),
    }
)


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination that is proven."""

    peer: Peer
    role: Role
    aead: int
    event: Event

    @property
    def package(self) -> Package:
        assert self.peer.package is not None, "our own program has no package"
        return self.peer.package

    @property
    def is_long(self) -> bool:
        """Whether only `make test-long` proves it."""
        if self.event is Event.NONE:
            return False
        return self.aead != self.peer.usual or (self.peer.family, self.role, self.event) in _SLOW

    def __str__(self) -> str:
        return f"{str(self.peer).replace(' ', '-')}-{self.role}-aead{self.aead}-{self.event}"


def cells(role: Role) -> Iterator[Cell]:
    """All cells in which the peer has that role."""
    for peer in PEERS:
        if role in peer.roles:
            for aead in peer.aeads:
                for event in Event:
                    yield Cell(peer, role, aead, event)


def refusals() -> Iterator[Cell]:
    """Algorithms that a server does not have: our client, offering nothing else, gets no keys."""
    for peer in PEERS:
        for aead in AEADS:
            if aead not in peer.aeads:
                yield Cell(peer, Role.SERVER, aead, Event.NONE)


_NAMES = {15: "AES-SIV-CMAC-256", 16: "AES-SIV-CMAC-384", 17: "AES-SIV-CMAC-512", 30: "AES-128-GCM-SIV"}
_ROLES = {Role.SERVER: "Our client asks", Role.CLIENT: "Our server answers"}
_HEAD = """\
# Interoperability

Written by `make docs`; a test compares. Each mark is a test of tests/interop/ with the real programs: **test** runs in
`make test`, **long** in `make test-long`. Nothing is marked that is not tested; **refused** is a test that a server
without the AEAD gives us no keys. The programs are Debian's, unpacked and not installed; those of newer releases are
pinned in lab/newer-peers.toml. Those of sid are left out, and their tests skipped, once sid has moved on from the pin.
Our server answers by native packets in `make test` where they are built, and by both in `make test-long`.
"""
_EVENTS = """\
## The events

| event | what happens | what must hold |
|---|---|---|
| plain | key establishment, more exchanges than there are cookies | authentic time, eight cookies, the AEAD that was wanted |
| restart | the server stops and starts, its keys kept on disk | the client goes on with its cookies, no key establishment |
| lost-keys | the server starts without its keys | the client gets no time by old cookies, then new ones by key establishment |
| rotation | the server seals with a new key | old cookies are taken, new ones have another key |
| certificate | the server gets another certificate and key | cookies stay good, the next key establishment sees the new one |
| loss | a relay loses a quarter of the packets, each way | time is still got, and the jar fills again |
"""
_GAPS = """\
## What is not there, and why

- chrony has AEAD 30 from 4.4 on, with nettle 3.9 or newer; Debian 12 has 4.3 and nettle 3.8. It has neither 16 nor 17.
- NTPsec has 15, 16 and 17. As a client it offers exactly the one that it is configured with, so each is a test of its
  own; it serves on no other ports than 123 and, for key establishment, 4460, and runs in a network namespace here. As a
  client it takes NAME:PORT.
- ntpd-rs has 15 and 17 (it offers 17 first).
- An AEAD is chosen by what our side offers or accepts: `pool-client query --aead`, `pool-agent serve --aead`.

## What was seen

- ntpd-rs as a server without a source of its own serves leap 3. Our client then says *unsynchronised*, and that its
  answers were authentic, which is what is tested.
- ntpd-rs as a client ends when it may not steer the clock. Here the kernel tells it that it could.
- NTPsec answers a cookie that it cannot open with silence, the others with NTSN. As clients, chrony takes NTSN as a
  hint; NTPsec and ntpd-rs use up their cookies and then run key establishment again.
- A server that gives no keys is asked again by ntpd-rs every second, for ever, and by chronyd ever more seldom.
- chrony and ntpd-rs read a certificate only when they start; NTPsec and our server read it anew on SIGHUP.
"""


def table() -> str:
    """The page docs/interop.md."""
    parts = [_HEAD]
    for role in Role:
        refused = list(refusals()) if role is Role.SERVER else []
        parts += [f"\n## {_ROLES[role]}\n", *_rows(list(cells(role)), refused)]
    return "\n".join([*parts, "", _EVENTS, _GAPS]).rstrip() + "\n"


def _rows(found: Sequence[Cell], refused: Sequence[Cell]) -> Iterator[str]:
    yield f"| peer | from | AEAD | {' | '.join(Event)} |"
    yield f"|---|---|---|{'---|' * len(Event)}"
    for peer in dict.fromkeys(cell.peer for cell in found):
        for aead in AEADS:
            marks = {
                cell.event: "long" if cell.is_long else "test"
                for cell in found
                if (cell.peer, cell.aead) == (peer, aead)
            }
            marks |= {cell.event: "refused" for cell in refused if (cell.peer, cell.aead) == (peer, aead)}
            if marks:
                row = " | ".join(marks.get(event, "") for event in Event)
                yield f"| {peer} | {peer.release} | {aead} {_NAMES[aead]} | {row} |"


if __name__ == "__main__":
    PAGE.write_text(table())
