"""NTPsec: a file of its own in ntp.d, which ntpd reads beside its ntp.conf, and a restart for each change.

ntpd reads its configuration once. `ntpq :config` can add servers to one that runs, but needs a key of both sides, and a
restart forgets them. ntpd is asked by mode 6, which it answers on loopback.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from nts_core.asking import Unanswered, asking_ntpd, read_associations, read_variables
from nts_core.feeding import Kind, Member, TimeDaemon, Verdict, member_of
from nts_core.ke import KE_PORT
from nts_core.roster import Fault

_MAX_ASSOCIATIONS = 100
_VARIABLES = ("srchost", "reach", "ntscookies")


def lines(member: Member, options: Sequence[str]) -> list[str]:
    """One source."""
    place = member.name if member.port == KE_PORT else str(member)
    return [" ".join([f"server {place} nts iburst", *options])]


def members(text: str) -> tuple[Member, ...]:
    """Whom our lines name."""
    words = (line.split() for line in text.splitlines())
    found = [member_of(each[1]) for each in words if each[:1] == ["server"] and len(each) > 1]
    return tuple(each for each in found if each is not None)


async def ask(_directory: Path) -> Mapping[str, Verdict]:
    """What ntpd says of its peers, by their names in its configuration. Raises Unanswered."""
    found = {}
    async with asking_ntpd() as udp:
        associations = await read_associations(udp)
        for association, status in list(associations.items())[:_MAX_ASSOCIATIONS]:
            try:
                peer = await read_variables(udp, association, _VARIABLES)
            except Unanswered:
                # It may have gone meanwhile, and others than NTPsec have no cookies.
                continue
            if (member := member_of(peer.get("srchost", ""))) is not None:
                found[member.name] = verdict(status, peer)
    return found


def verdict(status: int, peer: Mapping[str, str]) -> Verdict:
    """From a peer's status word, which holds what the selection made of it (RFC 9327 section 3.2), and its variables."""
    match status >> 8 & 7:
        case 1:
            return Verdict(fault=Fault.FALSETICKER, reason="ntpd calls it a falseticker")
        case 0 if peer.get("reach") == "0x0" and not peer.get("ntscookies", "").isdecimal():
            return Verdict(fault=Fault.UNREACHABLE, reason="ntpd has got no keys from it")
        case 0 if peer.get("reach") == "0x0":
            return Verdict(fault=Fault.UNREACHABLE, reason="it has not answered ntpd eight times")
        case 0:
            return Verdict(fault=Fault.UNFIT, reason="ntpd cannot use its answers")
        case _:
            return Verdict(is_good=True)


DAEMON = TimeDaemon(
    kind=Kind.NTPSEC,
    program="ntpd",
    directory=Path("/etc/ntpsec/ntp.d"),
    file=lambda pool: f"truechimer-{pool}.conf",
    lines=lines,
    members=members,
    tell=("systemctl", "restart", "ntpsec.service"),
    spacing=3600.0,
    ask=ask,
    missing=None,
    remedy='it reads {directory} only beside its own ntp.conf: with DHCP, IGNORE_DHCP="yes" in /etc/default/ntpsec',
)
