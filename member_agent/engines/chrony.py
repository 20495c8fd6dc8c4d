"""chrony: a file in a directory that its configuration includes, and a restart for each certificate.

chronyd reads certificates once. It keeps the keys of cookies in `ntsdumpdir`, and what it has measured in `dumpdir`,
which it reads again with -r: an option of its command line, so its unit gets the file of options once more, with it.
Debian's AppArmor profile lets chronyd read all below /etc/chrony, and write to /var/lib/chrony and /run/chrony.
"""

import ipaddress
import re
import shlex
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
    one_port,
    own_text,
    required_text,
)
from member_agent.sockets import Endpoint
from nts_core.ke import DEFAULT_NTP_PORT, KE_PORT

_MAX_FILES, _MAX_DEPTH = 200, 10
_COMMENTS = ("#", "%", "!", ";")
_EVERYBODY = {"", "all", "0/0", "::/0", "0.0.0.0/0"}
_USER_OPTIONS = re.compile(r"^\s*DAEMON_OPTS=(.*)$", re.MULTILINE)


class _Configuration:
    """The directives of the user's files, in chronyd's order."""

    def __init__(self, places: Places) -> None:
        self._own = places.config / "conf.d" / DROP_IN
        self._files = 0
        self.included: list[Path] = []
        self.directives = list(self._read(places.config / "chrony.conf", 0))

    def _read(self, file: Path, depth: int) -> Iterator[tuple[str, str]]:
        self._files += 1
        if self._files > _MAX_FILES or depth > _MAX_DEPTH:
            raise EngineError(f"{file}: chrony's files include too many others", "include fewer")
        text = required_text(file) if depth == 0 else own_text(file) or ""
        for line in text.splitlines():
            words = line.split()
            if not words or words[0].startswith(_COMMENTS):
                continue
            name, rest = words[0].lower(), words[1:]
            if name == "confdir":
                self.included += map(Path, rest)
                found = {path.name: path for place in reversed(rest) for path in Path(place).glob("*.conf")}
                for _, path in sorted(found.items()):
                    if path != self._own:
                        yield from self._read(path, depth + 1)
            elif name == "include" and rest:
                pattern = Path(rest[0])
                for path in sorted(pattern.parent.glob(pattern.name)):
                    yield from self._read(path, depth + 1)
            else:
                yield name, " ".join(rest)

    def values(self, *names: str) -> list[str]:
        return [value for name, value in self.directives if name in names]


def _lay_out(places: Places, offer: Offer) -> Layout:
    user = _Configuration(places)
    directory = places.config / "conf.d"
    if directory not in user.included:
        raise EngineError(
            f"{places.config / 'chrony.conf'} does not include {directory}",
            f"add the line `confdir {directory}` to it",
        )
    if user.values("ntsservercert", "ntsserverkey"):
        raise EngineError(
            "chrony is an NTS server already, with a certificate of its own",
            "remove its lines ntsservercert and ntsserverkey, or register this host without an agent",
        )
    ke_port, ntp_port = one_port(offer.ke, "NTS-KE", Kind.CHRONY), one_port(offer.ntp, "NTP", Kind.CHRONY)
    lines: list[str] = []
    lines += _port_line(user, "port", ntp_port, DEFAULT_NTP_PORT)
    lines += _port_line(user, "ntsport", ke_port, KE_PORT)
    if not offer.is_draft:
        _check_addresses(user, (*offer.ke, *offer.ntp))
    pairs = tuple(OwnFile(places.own / f"{domain}.pem", pair_of=domain) for domain in offer.domains)
    for pair in pairs:
        lines += [f"ntsservercert {pair.path}", f"ntsserverkey {pair.path}"]
    if any(value in _EVERYBODY for value in user.values("deny")):
        raise EngineError("chrony denies everybody", "remove its line `deny`: a pool server is for everybody")
    if not any(value in _EVERYBODY for value in user.values("allow")):
        lines.append("allow")
    if not user.values("ntsdumpdir"):
        lines.append("ntsdumpdir /var/lib/chrony")
    if not user.values("dumpdir"):
        lines.append("dumpdir /run/chrony")
    return Layout((*pairs, OwnFile(directory / DROP_IN, tuple(lines)), *_options(places)))


def _port_line(user: _Configuration, name: str, wanted: int, default: int) -> list[str]:
    told = user.values(name)
    if not told:
        return [] if wanted == default else [f"{name} {wanted}"]
    if told[-1] != str(wanted):
        only_client = " and so serves nobody" if (name, told[-1]) == ("port", "0") else ""
        raise EngineError(
            f"chrony's configuration says `{name} {told[-1]}`{only_client}; the pool needs {wanted}",
            f"remove that line, or make it `{name} {wanted}`",
        )
    return []


def _check_addresses(user: _Configuration, wanted: tuple[Endpoint, ...]) -> None:
    """It listens everywhere, or on one address of each family."""
    for text in user.values("bindaddress"):
        try:
            bound = ipaddress.ip_address(text)
        except ValueError:
            continue
        for endpoint in wanted:
            address = ipaddress.ip_address(endpoint.address)
            if not bound.is_unspecified and bound.version == address.version and bound != address:
                raise EngineError(
                    f"chrony listens on {bound} only; the pool needs {address}",
                    f"remove its line `bindaddress {text}`",
                )


def _options(places: Places) -> tuple[OwnFile, ...]:
    """The options of Debian's unit with -r, and what makes the unit read them after the user's."""
    file = places.config.parent / "default" / "chrony"
    found = _USER_OPTIONS.findall(own_text(file) or "")
    try:
        words = shlex.split(" ".join(shlex.split(found[-1], comments=True))) if found else []
    except ValueError:
        raise EngineError(f"{file}: DAEMON_OPTS is not understood", "correct its quotes") from None
    if "-r" in words:
        return ()
    options = OwnFile(places.own / "options", (f'DAEMON_OPTS="{" ".join([*words, "-r"])}"',))
    unit = OwnFile(
        places.units / f"{DAEMON.unit}.d" / DROP_IN, ("[Service]", f"EnvironmentFile={options.path}")
    )
    return options, unit


DAEMON = TimeDaemon(
    kind=Kind.CHRONY,
    unit="chrony.service",
    program="chronyd",
    process="chronyd",
    user="_chrony",
    config=Path("/etc/chrony"),
    version=r"\bversion ([0-9]+)[.]([0-9]+)",
    oldest=(4, 1),  # several pairs; 4.0 is the first with NTS
    lay_out=_lay_out,
)
