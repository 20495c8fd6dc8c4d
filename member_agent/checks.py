"""What an agent can look at from its own host; the other half of `pool-agent check` is the registry's look from outside."""

import asyncio
import socket
from datetime import UTC, datetime
from typing import Any

from member_agent.clock import Clock, clock_of
from member_agent.config import AgentSettings
from member_agent.errors import AgentError
from member_agent.install import CertificateStore, InstallError
from member_agent.member import is_worrying, last_served
from member_agent.self_measurement import measure
from member_agent.state import MemberDirectory, Membership
from nts_core import ntptime
from nts_core.control import CheckStatus, Finding
from nts_core.packet import Leap

_RESOLVE_DEADLINE = 10.0
_JOIN_ANEW = (
    "it is asked again each hour, and at SIGHUP; if it stays so, join with a new token, or leave --local"
)
# Design: more than that and monitors take points off.
_MAX_DISTANCE_NS = 1_500_000_000


def _finding(check: str, detail: str, remedy: str = "") -> Finding:
    """Failed if there is a remedy."""
    return Finding("", check, CheckStatus.FAILED if remedy else CheckStatus.OK, detail, remedy)


async def describe_clock(settings: AgentSettings) -> str:
    """The clock in words, asked now. Raises AgentError."""
    clock = clock_of(settings)
    await clock.refresh()
    return clock.describe()


async def look_here(
    me: Membership, directory: MemberDirectory, settings: AgentSettings, running: dict[str, Any] | None
) -> list[Finding]:
    """The agent, the clock, the certificate, what is served with it and the name, as this host sees them. `running` is what
    the agent says.
    """
    clock = clock_of(settings)
    await clock.refresh()
    return [
        _agent(me, running),
        *_clock(clock),
        await asyncio.to_thread(_certificate, me, directory),
        *await _itself(me, directory, settings),
        await _name(me.domain),
    ]


def _agent(me: Membership, running: dict[str, Any] | None) -> Finding:
    if running is None:
        return _finding(
            "agent", "no agent runs on this state directory", "start it: systemctl start pool-agent"
        )
    said = next((each for each in running["servers"] if each["domain"] == me.domain), None)
    if said is None:
        return _finding("agent", "the agent does not follow this server", "pool-agent logs says why")
    if said["contact_error"]:
        remedy = "check this host's network and DNS, then the registry's page"
        return _finding("agent", said["contact_error"], _JOIN_ANEW if said["contact_refused"] else remedy)
    if said["problem"]:
        return _finding("agent", said["problem"], "the text names what to change; pool-agent logs has more")
    return _finding("agent", f"runs, engine {running['engine']}, in step with the registry")


def _clock(clock: Clock) -> list[Finding]:
    said = clock.said_at(clock.now_ns())
    if said.leap is Leap.UNSYNCHRONISED:
        return [
            _finding(
                "clock",
                clock.describe(),
                "run chronyd or ntpd with sources that answer; a daemon that the agent cannot ask needs local_stratum",
            )
        ]
    distance = (ntptime.short_ns(said.root_delay) // 2) + ntptime.short_ns(said.root_dispersion)
    far = distance > _MAX_DISTANCE_NS
    remedy = "choose nearer or better sources: monitors take points off over 1.5 s" if far else ""
    findings = [_finding("clock", clock.describe(), remedy)]
    if clock.is_smeared:
        findings.append(_finding("leap seconds", "the source smears them", "use sources that do not smear"))
    if clock.offset_ns:
        findings.append(_finding("clock offset", "a test option changes the time", "remove clock_offset"))
    return findings


def _certificate(me: Membership, directory: MemberDirectory) -> Finding:
    try:
        pair = CertificateStore(directory.certificates, me.domain).current()
    except (InstallError, OSError) as error:
        return _finding("certificate here", str(error), "check the state directory's owner, rights and space")
    if pair is None:
        return Finding("", "certificate here", CheckStatus.SKIPPED, "none yet: it is ordered when it is time")
    now = datetime.now(UTC)
    if not pair.not_before <= now < pair.not_after:
        detail = f"it is valid from {pair.not_before} to {pair.not_after}"
        return _finding("certificate here", detail, "check this host's clock, then pool-agent renew")
    if is_worrying(pair, now):
        return _finding(
            "certificate here",
            f"it ends {pair.not_after:%Y-%m-%d %H:%M} UTC",
            "pool-agent status says what holds it up",
        )
    return _finding("certificate here", f"it ends {pair.not_after:%Y-%m-%d %H:%M} UTC")


async def _itself(me: Membership, directory: MemberDirectory, settings: AgentSettings) -> list[Finding]:
    try:
        served = await asyncio.to_thread(last_served, directory, settings)
    except (AgentError, InstallError, OSError) as error:
        return [Finding("", "served here", CheckStatus.SKIPPED, str(error))]
    if served is None:
        return [Finding("", "served here", CheckStatus.SKIPPED, "nothing yet: it takes a certificate")]
    return await measure(me.domain, served)


async def _name(domain: str) -> Finding:
    try:
        async with asyncio.timeout(_RESOLVE_DEADLINE):
            found = await asyncio.get_running_loop().getaddrinfo(domain, None, type=socket.SOCK_DGRAM)
    except (OSError, TimeoutError) as error:
        return Finding(
            "", "name", CheckStatus.SKIPPED, f"{domain}: {error or 'no answer'}; it is published once proved"
        )
    return _finding("name", f"{domain} leads to {', '.join(sorted({str(each[4][0]) for each in found}))}")
