"""The measurement of a server by its own host: the part of `pool-agent check` that looks at what is served here.

Whoever serves is asked as a client would: the agent itself, or the time daemon that it drives.
"""

import asyncio

from member_agent.engines.probe import ask
from member_agent.host import Served
from member_agent.sockets import Endpoint
from nts_core.association import Sample
from nts_core.client import ClientError, Failure
from nts_core.control import CheckStatus, Finding

_KE, _NTP = "NTS-KE here", "NTP here"
# What monitors let pass at most, by the default policy. Server and client have the same clock here.
_MAX_OFFSET_NS = 25_000_000
_REFUSED = "where limits.allow or limits.deny are set, let this host's own addresses in"
# Of the failures up to cookies, and after them.
_KE_REMEDIES = {
    Failure.TCP: "start what serves: systemctl start pool-agent, or the time daemon that is the engine; pool-agent logs"
    f" says why it does not listen there; {_REFUSED}",
    Failure.TLS: f"see who listens there: ss -ltnp; {_REFUSED}",
    Failure.CERTIFICATE: "another certificate than the one that is installed is shown: start what serves again; ss -ltnp says"
    " who that is",
    Failure.KE: "pool-agent logs says why there are no cookies, or the log of the time daemon that is the engine",
}
_NTP_REMEDIES = {
    Failure.NTP: f"see who has the port: ss -lunp; let this host's firewall pass its own packets; {_REFUSED}",
    Failure.KISS: "wait a minute and look again; if it stays, limits.ntp_interval, limits.ntp_pps or limits.deny refuse this"
    " host",
    Failure.DNS: "correct ntp_server in the settings: clients are sent there",
}


async def measure(domain: str, served: Served) -> list[Finding]:
    """NTS-KE and NTP at each place where this server is served."""
    each = await asyncio.gather(*(_measure_at(domain, served.pair.fingerprint, place) for place in served.ke))
    return [finding for findings in each for finding in findings]


async def _measure_at(domain: str, fingerprint: str, place: Endpoint) -> list[Finding]:
    established = Finding(
        place.address,
        _KE,
        CheckStatus.OK,
        f"port {place.port} shows the installed certificate, gives cookies",
    )
    try:
        sample = await ask(domain, fingerprint, place)
    except ClientError as error:
        code = Failure(error.code)
        if code not in _NTP_REMEDIES:
            remedy = _KE_REMEDIES.get(code, error.remedy)
            return [Finding(place.address, _KE, CheckStatus.FAILED, error.message, remedy)]
        return [
            established,
            Finding(place.address, _NTP, CheckStatus.FAILED, error.message, _NTP_REMEDIES[code]),
        ]
    return [established, _of_sample(place.address, sample)]


def _of_sample(address: str, sample: Sample | None) -> Finding:
    clock = "see `clock`: what serves needs sources that answer"
    if sample is None:
        return Finding(address, _NTP, CheckStatus.FAILED, "it does not know the time yet", clock)
    seen = f"authenticated, offset {sample.offset / 1e6:+.3f} ms, stratum {sample.stratum}"
    if not sample.synchronised:
        return Finding(
            address, _NTP, CheckStatus.FAILED, f"{seen}, and says that it is not synchronised", clock
        )
    if abs(sample.offset) > _MAX_OFFSET_NS:
        return Finding(
            address,
            _NTP,
            CheckStatus.FAILED,
            seen,
            "it serves another time than this host has: remove clock_offset, or let the time daemon set the system's clock",
        )
    return Finding(address, _NTP, CheckStatus.OK, seen)
