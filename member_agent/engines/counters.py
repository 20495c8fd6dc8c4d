"""What a driven time daemon has counted of NTS-KE and NTP, for the metrics: each in its own way, and none of them all.

chronyd is asked by `chronyc serverstats`, which it answers to root and its own user alone; ntpd by mode 6, as of its
clock; ntpd-rs by the socket that its configuration names. They count from their own start. Every answer has a bound,
a deadline and a grammar; where there is none, there are no counts.
"""

import tomllib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field

from member_agent.config import AgentSettings
from member_agent.engines import EngineError
from member_agent.engines.external import DAEMONS, places_of
from member_agent.engines.layout import Kind, own_text
from member_agent.tracking import ask_ntpd, chronyc_options, parse_source
from nts_core.asking import Unanswered, ask_chronyc, ask_ntpd_rs

# Columns of `chronyc -c serverstats` up to the last that we read; newer versions have more.
_RECEIVED, _DROPPED, _KE_ACCEPTED, _KE_DROPPED, _AUTHENTICATED = 0, 1, 5, 6, 7
# ntpd's variables by our outcomes. It refuses a question with one that it does not know.
_NTPD_NTP = {"malformed": "ss_badformat", "denied": "ss_restricted", "rate-limited": "ss_limited"}
_NTPD_NTS = {"nts-time": "nts_server_send", "nts-refused": "nts_server_recv_bad"}
_NTPD_KE = {"ok": "nts_ke_serves_good", "failed": "nts_ke_serves_bad"}
_NTPD_SEALED = "nts_cookie_make"


@dataclass(frozen=True, slots=True)
class DaemonCounts:
    """By outcome; what a daemon does not count is not there."""

    ke: Mapping[str, int] = field(default_factory=dict)
    ntp: Mapping[str, int] = field(default_factory=dict)
    sealed: int | None = None


async def read_counts(kind: Kind, settings: AgentSettings) -> DaemonCounts:
    """What it has counted; nothing from one that does not say."""
    try:
        match kind:
            case Kind.CHRONY:
                where = chronyc_options(parse_source(settings.clock_source).chronyd)
                return _of_chronyd(await ask_chronyc("serverstats", where=where))
            case Kind.NTPSEC:
                return await _of_ntpd(settings)
            case Kind.NTPD_RS:
                return await _of_ntpd_rs(settings)
    except (Unanswered, EngineError, OSError, ValueError):
        # A ValidationError is a ValueError, and so is a number that is none.
        return DaemonCounts()


def _of_chronyd(report: str) -> DaemonCounts:
    """Without what it answered with a NAK: that is among `other`. ValueError for what is no report."""
    fields = report.split("\n", maxsplit=1)[0].split(",")
    if len(fields) <= _AUTHENTICATED:
        raise ValueError(report[:60])
    received, dropped, authenticated = (
        _count(fields[column]) for column in (_RECEIVED, _DROPPED, _AUTHENTICATED)
    )
    return DaemonCounts(
        ke={"accepted": _count(fields[_KE_ACCEPTED]), "rate-limited": _count(fields[_KE_DROPPED])},
        ntp={
            "nts-time": authenticated,
            "rate-limited": dropped,
            "other": max(0, received - dropped - authenticated),
        },
    )


async def _of_ntpd(settings: AgentSettings) -> DaemonCounts:
    place = parse_source(settings.clock_source).ntpd
    system = await ask_ntpd(place, *_NTPD_NTP.values())
    try:
        nts = await ask_ntpd(place, *_NTPD_NTS.values(), *_NTPD_KE.values(), _NTPD_SEALED)
    except Unanswered:
        nts = {}
    known = {name: _count(value) for name, value in {**system, **nts}.items()}
    ke, ntp = (
        {outcome: known[name] for outcome, name in names.items() if name in known}
        for names in (_NTPD_KE, {**_NTPD_NTS, **_NTPD_NTP})
    )
    return DaemonCounts(ke, ntp, known.get(_NTPD_SEALED))


class _Observability(BaseModel):
    path: Path | None = Field(None, alias="observation-path")


class _Configured(BaseModel):
    """What we look for in the user's configuration."""

    observability: _Observability = _Observability()


class _Stats(BaseModel):
    """Of one [[server]]; those of NTS are among the others."""

    accepted_packets: Annotated[int, Field(ge=0)]
    denied_packets: Annotated[int, Field(ge=0)]
    ignored_packets: Annotated[int, Field(ge=0)]
    rate_limited_packets: Annotated[int, Field(ge=0)]
    nts_accepted_packets: Annotated[int, Field(ge=0)]
    nts_nak_packets: Annotated[int, Field(ge=0)]


class _Listener(BaseModel):
    stats: _Stats


class _Observed(BaseModel):
    servers: list[_Listener]


async def _of_ntpd_rs(settings: AgentSettings) -> DaemonCounts:
    daemon = DAEMONS[Kind.NTPD_RS]
    file = places_of(daemon, settings.engine.of(daemon.kind)).config / "ntp.toml"
    told = _Configured.model_validate(tomllib.loads(own_text(file) or ""))
    if told.observability.path is None:
        return DaemonCounts()
    observed = _Observed.model_validate_json(await ask_ntpd_rs(told.observability.path))
    ntp: Counter[str] = Counter()
    for listener in observed.servers:
        stats = listener.stats
        ntp["time"] += max(0, stats.accepted_packets - stats.nts_accepted_packets)
        ntp["nts-time"] += stats.nts_accepted_packets
        ntp["ntsn"] += stats.nts_nak_packets
        ntp["denied"] += stats.denied_packets
        ntp["rate-limited"] += stats.rate_limited_packets
        ntp["ignored"] += stats.ignored_packets
    return DaemonCounts(ntp=ntp)


def _count(text: str) -> int:
    """ValueError for what is no count."""
    text = text.strip()
    if not (text.isascii() and text.isdecimal() and len(text) <= 20):
        raise ValueError(text[:40])
    return int(text)
