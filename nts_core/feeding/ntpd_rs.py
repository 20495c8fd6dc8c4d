"""ntpd-rs: a part of its ntp.toml, and a restart for each change.

It includes no other files and reads its configuration once, so a change costs what it has measured of all sources. Of
its sources it tells by the socket that the configuration names as `observation-path`. It calls nobody a falseticker, so
that is found here from what it measured, as `nts_core.select` does it. A source of which it got no keys is not there.
"""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, ValidationError

from nts_core.asking import Unanswered, ask_ntpd_rs
from nts_core.feeding import Kind, Member, TimeDaemon, Verdict, member_of
from nts_core.roster import Fault
from nts_core.select import MAX_DISTANCE, MIN_DISTANCE, Estimate, select

_FILE = "ntp.toml"
_MAX_CONFIGURATION = 1024 * 1024
_MAX_SOURCES = 256
# ntpd-rs forgets a source that has not answered so often.
_MAX_UNANSWERED = 8
_SPREAD = 3


def lines(member: Member, options: Sequence[str]) -> list[str]:
    """One source; options are lines of TOML."""
    return ["[[source]]", 'mode = "nts"', f'address = "{member}"', *options]


def members(text: str) -> tuple[Member, ...]:
    """Whom our part of the file names."""
    try:
        sources = tomllib.loads(text).get("source", [])
        found = [member_of(str(source["address"])) for source in sources]
    except (ValueError, TypeError, KeyError, AttributeError):
        return ()
    return tuple(each for each in found if each is not None)


class _Observability(BaseModel):
    path: Path | None = Field(None, alias="observation-path")


class _Configured(BaseModel):
    observability: _Observability = _Observability()


_Seconds = Annotated[float, Field(ge=-1e10, le=1e10, allow_inf_nan=False)]


class _Source(BaseModel):
    name: Annotated[str, Field(max_length=300)]
    offset: _Seconds
    uncertainty: _Seconds
    delay: _Seconds
    remote_delay: _Seconds
    remote_uncertainty: _Seconds
    unanswered_polls: Annotated[int, Field(ge=0)]

    @property
    def claim(self) -> Estimate:
        """ntpd-rs tells one standard deviation of its offset."""
        distance = self.remote_uncertainty + _SPREAD * self.uncertainty + (self.delay + self.remote_delay) / 2
        return Estimate(round(self.offset * 1e9), max(round(distance * 1e9), MIN_DISTANCE))


class _Observed(BaseModel):
    sources: Annotated[list[_Source], Field(max_length=_MAX_SOURCES)]


async def ask(directory: Path) -> Mapping[str, Verdict]:
    """What ntpd-rs says of its sources. Raises Unanswered."""
    return verdicts(await ask_ntpd_rs(_observation(directory / _FILE)))


def _observation(file: Path) -> Path:
    try:
        with file.open("rb") as opened:
            text = opened.read(_MAX_CONFIGURATION).decode()
        configured = _Configured.model_validate(tomllib.loads(text))
    except OSError as error:
        raise Unanswered(f"ntpd-rs: {file}: {error.strerror}") from None
    except ValueError:
        raise Unanswered(f"ntpd-rs: {file} is not understood") from None
    if configured.observability.path is None:
        raise Unanswered(
            f"ntpd-rs: {file} names no observation-path in [observability], so nothing is known of its sources"
        )
    return configured.observability.path


def verdicts(document: bytes) -> dict[str, Verdict]:
    """From the document of the observation socket. Raises Unanswered for what is none."""
    try:
        sources = _Observed.model_validate_json(document).sources
    except ValidationError:
        raise Unanswered("ntpd-rs: what it says of its sources is not understood") from None
    heard = [source for source in sources if source.unanswered_polls < _MAX_UNANSWERED]
    voting = [source for source in heard if source.claim.distance <= MAX_DISTANCE]
    found = select([source.claim for source in voting])
    truechimers = {voting[index].name for index in found.truechimers}
    has_majority = found.offset is not None
    return {
        member.name: _verdict(source, is_voting=source in voting, is_true=source.name in truechimers)
        if has_majority or source not in voting
        else Verdict()
        for source in sources
        if (member := member_of(source.name)) is not None
    }


def _verdict(source: _Source, *, is_voting: bool, is_true: bool) -> Verdict:
    if source.unanswered_polls >= _MAX_UNANSWERED:
        return Verdict(
            fault=Fault.UNREACHABLE,
            reason=f"it has not answered ntpd-rs {min(source.unanswered_polls, 999)} times",
        )
    if not is_voting:
        return Verdict(fault=Fault.UNFIT, reason="its time is too uncertain for ntpd-rs")
    if is_true:
        return Verdict(is_good=True)
    return Verdict(fault=Fault.FALSETICKER, reason="what ntpd-rs measured of it disagrees with the majority")


DAEMON = TimeDaemon(
    kind=Kind.NTPD_RS,
    program="ntpd-rs",
    directory=Path("/etc/ntpd-rs"),
    file=lambda _pool: _FILE,
    lines=lines,
    members=members,
    tell=("systemctl", "restart", "ntpd-rs.service"),
    spacing=3600.0,
    ask=ask,
    missing=Verdict(fault=Fault.UNREACHABLE, reason="ntpd-rs has got no keys from it, or no answer"),
    remedy="",
    is_shared=True,
)
