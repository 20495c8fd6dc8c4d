"""chrony: a file of its own in a `sourcedir`, which `chronyc reload sources` makes chronyd read.

A source whose line is the same as before keeps what chronyd has measured and its cookies. chronyd reads the file as its
own user.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from nts_core.asking import Unanswered, ask_chronyc
from nts_core.errors import printable
from nts_core.feeding import Kind, Member, TimeDaemon, Verdict, member_of
from nts_core.ke import KE_PORT
from nts_core.roster import Fault

# Of `chronyc -c sources`: a server, in this state, of this name, with this register of answers.
_MODE, _STATE, _NAME, _REACH = 0, 1, 2, 5
# Of `chronyc -c authdata`: attempts at key establishment since one was good; cookies.
_AUTH_NAME, _AUTH_ATTEMPTS, _AUTH_COOKIES = 0, 6, 8
_SERVER, _COLUMNS = "^", 10
_GOOD = {"*", "+", "-"}
_REFUSAL = re.compile(r"5[0-9][0-9] ")


def lines(member: Member, options: Sequence[str]) -> list[str]:
    """One source."""
    port = [] if member.port == KE_PORT else [f"ntsport {member.port}"]
    return [" ".join([f"server {member.name} nts iburst", *port, *options])]


def members(text: str) -> tuple[Member, ...]:
    """Whom our lines name."""
    found = []
    for line in text.splitlines():
        words = line.split()
        if words[:1] == ["server"] and len(words) > 2:
            port = words[words.index("ntsport") + 1 :][:1] if "ntsport" in words else []
            found.append(member_of(":".join([words[1], *port])))
    return tuple(each for each in found if each is not None)


async def ask(_directory: Path) -> Mapping[str, Verdict]:
    """What chronyd says of its sources, by their names in its configuration. Raises Unanswered."""
    # -a: also of those whose address is not known.
    return verdicts(await ask_chronyc("sources -a", "authdata -a", names=True))


def verdicts(report: str) -> dict[str, Verdict]:
    """From `chronyc -c -N -m "sources -a" "authdata -a"`. Raises Unanswered for what is none."""
    rows = [row.split(",") for row in report.splitlines()]
    refusal = next((row[0] for row in rows if _REFUSAL.match(row[0])), None)
    if refusal is not None:
        # chronyc's own words, such as "506 Cannot talk to daemon" and "501 Not authorised".
        raise Unanswered(f"chronyd: {' '.join(printable(refusal, 80).split())}")
    sources = [row for row in rows if len(row) == _COLUMNS and row[_MODE] == _SERVER]
    keys = {row[_AUTH_NAME].lower(): row for row in rows if len(row) == _COLUMNS and row[1] == "NTS"}
    return {
        row[_NAME].lower(): _verdict(row[_STATE], row[_REACH], keys.get(row[_NAME].lower()))
        for row in sources
    }


def _verdict(state: str, reach: str, keys: list[str] | None) -> Verdict:
    if state in _GOOD:
        return Verdict(is_good=True)
    match state:
        case "x":
            return Verdict(fault=Fault.FALSETICKER, reason="chronyd calls it a falseticker")
        case "~":
            return Verdict(fault=Fault.UNFIT, reason="its time varies too much for chronyd")
        case "?" if reach == "0" and keys is not None and keys[_AUTH_COOKIES] == "0":
            has_tried = keys[_AUTH_ATTEMPTS] != "0"
            reason = "chronyd got no keys from it" if has_tried else "chronyd does not find its address"
            return Verdict(fault=Fault.UNREACHABLE, reason=reason)
        case "?" if reach == "0":
            return Verdict(fault=Fault.UNREACHABLE, reason="it has not answered chronyd eight times")
        case "?":
            return Verdict(fault=Fault.UNFIT, reason="chronyd cannot use its answers")
        case _:
            return Verdict()


DAEMON = TimeDaemon(
    kind=Kind.CHRONY,
    program="chronyd",
    directory=Path("/etc/chrony/sources.d"),
    file=lambda pool: f"truechimer-{pool}.sources",
    lines=lines,
    members=members,
    tell=("chronyc", "reload", "sources"),
    spacing=0.0,
    ask=ask,
    missing=None,
    remedy="its configuration needs the line `sourcedir {directory}`, and its user has to be able to read that",
)
