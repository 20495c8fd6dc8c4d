"""NTPsec: a file in ntp.d, and SIGHUP for each certificate; a restart for the first one only.

Debian's AppArmor profile lets ntpd read two files for a certificate and its key, cert-chain.pem and key.pem beside
ntp.conf. The second holds both: ntpd looks for a new certificate every hour by itself, and must not find one whose key
comes a moment later.
"""

import ipaddress
import re
from collections.abc import Iterator
from pathlib import Path

from member_agent.engines import EngineError
from member_agent.engines.layout import (
    DROP_IN,
    Kind,
    Layout,
    Offer,
    OwnFile,
    Places,
    TimeDaemon,
    one_domain,
    one_port,
    own_text,
    required_text,
)
from nts_core.ke import DEFAULT_NTP_PORT, KE_PORT

_MAX_FILES, _MAX_DEPTH = 200, 5  # ntpd's own depth
_SERVER_WORDS = {"enable", "disable", "cert", "key"}
_REFUSALS = {"ignore", "noserve", "notrust"}
_DHCP = Path("/run/ntpsec/ntp.conf.dhcp")
_IGNORES_DHCP = re.compile(r"""^\s*IGNORE_DHCP=["']?yes["']?\s*(#.*)?$""", re.MULTILINE)


def _read(file: Path, own: Path, count: list[Path], depth: int = 0) -> Iterator[list[str]]:
    """The lines of a file, or of a directory's *.conf, as words; without ours."""
    count.append(file)
    if len(count) > _MAX_FILES or depth > _MAX_DEPTH:
        raise EngineError(f"{file}: NTPsec's files include too many others", "include fewer")
    if file.is_dir():
        for path in sorted(file.glob("*.conf")):
            if path != own:
                yield from _read(path, own, count, depth)
        return
    text = required_text(file) if depth == 0 and file.name == "ntp.conf" else own_text(file) or ""
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if len(words) > 1 and words[0].lower() == "includefile":
            yield from _read(file.parent / words[1].strip('"'), own, count, depth + 1)
        elif words:
            yield words


def _lay_out(places: Places, offer: Offer) -> Layout:
    domain = one_domain(offer, Kind.NTPSEC)
    for endpoints, what, port in ((offer.ke, "NTS-KE", KE_PORT), (offer.ntp, "NTP", DEFAULT_NTP_PORT)):
        if one_port(endpoints, what, Kind.NTPSEC) != port:
            raise EngineError(
                f"NTPsec serves {what} on port {port} only", "use another engine for other ports"
            )
    own = places.config / "ntp.d" / DROP_IN
    count: list[Path] = []
    lines = [
        *_read(places.config / "ntp.conf", own, count),
        *_read(places.config / "ntp.d", own, count),
    ]
    for words in lines:
        _check(words)
    defaults = places.config.parent / "default" / "ntpsec"
    if _DHCP.exists() and not _IGNORES_DHCP.search(own_text(defaults) or ""):
        raise EngineError(
            f"ntpd runs with {_DHCP} and so reads nothing in {own.parent}",
            f'write IGNORE_DHCP="yes" to {defaults} and restart ntpsec',
        )
    pair = OwnFile(places.config / "key.pem", pair_of=domain)
    drop_in = OwnFile(own, ("nts enable", f"nts cert {pair.path}", f"nts key {pair.path}"))
    return Layout((pair, drop_in), pairs_reload=True)


def _check(words: list[str]) -> None:
    """EngineError for a line that makes ntpd serve NTS otherwise, or nobody."""
    name = words[0].lower()
    if name == "nts" and _SERVER_WORDS & {word.lower() for word in words[1:]}:
        raise EngineError(
            f"NTPsec is told of an NTS server already: `{' '.join(words)}`",
            "remove that line, or register this host without an agent",
        )
    if name == "restrict" and "default" in words[1:] and _REFUSALS & {word.lower() for word in words}:
        raise EngineError(
            f"NTPsec serves nobody: `{' '.join(words)}`",
            "remove ignore, noserve and notrust from that line: a pool server is for everybody",
        )
    is_deaf = name in ("interface", "nic") and bool({"ignore", "drop"} & {word.lower() for word in words})
    if is_deaf and not _is_harmless(words[-1]):
        raise EngineError(
            f"NTPsec does not listen everywhere: `{' '.join(words)}`",
            "remove that line, or use another engine",
        )


def _is_harmless(what: str) -> bool:
    """Whether nobody outside misses what is not listened to: wildcard sockets, loopback."""
    try:
        return ipaddress.ip_address(what.partition("/")[0]).is_loopback
    except ValueError:
        return what.lower() in ("wildcard", "lo")


DAEMON = TimeDaemon(
    kind=Kind.NTPSEC,
    unit="ntpsec.service",
    program="ntpd",
    process="ntpd",
    user="ntpsec",
    config=Path("/etc/ntpsec"),
    version=r"\bntpsec-([0-9]+)[.]([0-9]+)",
    oldest=(1, 2),  # the first with the port and the protocol of RFC 8915
    lay_out=_lay_out,
)
