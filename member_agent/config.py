"""The agent's settings: flags before environment (POOL_AGENT_*) before STATE/agent.toml before defaults."""

import json
import os
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    IPvAnyAddress,
    model_validator,
)
from pydantic_settings import NoDecode, SettingsConfigDict

from member_agent.errors import AgentError, ExitStatus
from nts_core.aead import SUPPORTED, AeadId, parse_algorithms
from nts_core.cookies import DAY, HISTORY, Schedule
from nts_core.errors import WireError
from nts_core.ke import DEFAULT_NTP_PORT, KeTerms, NtpEndpoint, host_of
from nts_core.ratelimit import AccessList
from nts_core.shell import ProgramSettings, SettingsError, parse_host_port

CONFIG_FILE = "agent.toml"
# Thirty years: enough to test whatever a clock may do.
MAX_CLOCK_OFFSET = 1e9


# Seconds: from a thousand requests a second to one in a good hour.
Interval = Annotated[float, Field(ge=0.001, le=4096, allow_inf_nan=False)]


def _prefix(value: Any) -> Any:
    if "%" in str(value):
        raise ValueError(f"{str(value)!r}: a prefix has no zone")
    try:
        return ip_network(value)
    except ValueError as error:
        raise ValueError(f"{error}; write one ADDRESS/LENGTH at a time") from None


Prefix = Annotated[IPv4Network | IPv6Network, BeforeValidator(_prefix)]


class Limits(BaseModel):
    """What one address, and all of them together, may take of the engine. Times are seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    allow: tuple[Prefix, ...] = Field((), description="prefixes to serve; with any, only these")
    deny: tuple[Prefix, ...] = Field((), description="prefixes not to serve; the longest prefix decides")
    deny_action: Literal["ignore", "kod"] = Field("ignore", description="whether NTP tells those denied so")
    ntp_interval: Interval | None = Field(
        None, description="rate limit: between requests of an address, on average; none without"
    )
    ntp_burst: int = Field(8, ge=1, le=1000, description="requests at once")
    ntp_leak: int = Field(
        4, ge=2, le=256, description="of what is over the limit, one in so many is answered"
    )
    ntp_kod: int = Field(0, ge=0, le=256, description="and one in so many gets KoD RATE; 0 is none")
    traffic_cap: float | None = Field(
        None,
        gt=0,
        le=1e9,
        allow_inf_nan=False,
        description="NTP requests a second to answer, of all clients together; none without",
    )
    ke_connections: int = Field(1024, ge=1, le=60_000, description="open at a time")
    ke_connections_per_address: int = Field(128, ge=1, description="of an IPv4 address or an IPv6 /64")
    ke_connections_per_48: int = Field(256, ge=1, description="of an IPv6 /48")
    ke_interval: Interval | None = Field(
        None, description="rate limit: between connections of an address, on average; none without"
    )
    ke_burst: int = Field(16, ge=1, le=1000, description="connections at once")

    @model_validator(mode="after")
    def _one_meaning(self) -> Self:
        self.access()
        return self

    def access(self) -> AccessList | None:
        """None when everybody is served."""
        return AccessList(self.allow, self.deny) if self.allow or self.deny else None


def _algorithms(value: Any) -> Any:
    """A text, or a list in TOML or JSON."""
    if isinstance(value, str) and value.startswith("["):
        value = json.loads(value)
    words = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    algorithms = parse_algorithms(words)
    KeTerms.check_preference(algorithms)
    return algorithms


def _ntp_endpoint(value: Any) -> Any:
    if value is None or isinstance(value, NtpEndpoint):
        return value
    if not isinstance(value, str):
        raise ValueError("write HOST or HOST:PORT")  # noqa: TRY004 - pydantic reports ValueErrors
    host, port = parse_host_port(value, DEFAULT_NTP_PORT)
    try:
        return NtpEndpoint(host_of(host.encode()), port)
    except WireError as error:
        raise ValueError(f"{value!r}: {error}") from None


class AgentSettings(ProgramSettings):
    """What a member may choose; everything else the registry assigns or the host knows."""

    model_config = SettingsConfigDict(env_prefix="POOL_AGENT_", env_nested_delimiter="__")

    listen: tuple[IPvAnyAddress, ...] = Field(
        (), description="addresses to listen on; by default the server's own, or all when they are not local"
    )
    ntp_port: int = Field(DEFAULT_NTP_PORT, ge=1, le=65535)
    local_stratum: int | None = Field(
        None, ge=1, le=15, description="vouch for this host's clock where no time daemon does"
    )
    clock_source: str = Field(
        "auto", description="whom to ask of the clock: auto, chronyd[:PLACE], ntpd[:PLACE] or kernel"
    )
    clock_offset: float = Field(
        0.0,
        ge=-MAX_CLOCK_OFFSET,
        le=MAX_CLOCK_OFFSET,
        allow_inf_nan=False,
        description="test option: seconds added to the time served",
    )
    metrics: str | None = Field(None, description="ADDR:PORT of the Prometheus listener")
    aead: Annotated[tuple[AeadId, ...], NoDecode, BeforeValidator(_algorithms)] = Field(
        SUPPORTED, description="AEAD algorithms, the preferred first"
    )
    ntp_server: Annotated[NtpEndpoint | None, NoDecode, BeforeValidator(_ntp_endpoint)] = Field(
        None,
        description="HOST[:PORT] where clients find NTP when that is not this host; it needs our cookie keys",
    )
    limits: Limits = Limits()
    cookie_rotation: int = Field(DAY, ge=60, description="seconds until the next cookie key seals")
    cookie_history: int = Field(HISTORY, ge=0, description="seconds for which retired keys open cookies")

    @model_validator(mode="after")
    def _possible_schedule(self) -> Self:
        try:
            Schedule(self.cookie_rotation, self.cookie_history)
        except ValueError as error:
            both = f"cookie_rotation {self.cookie_rotation} with cookie_history {self.cookie_history}"
            raise ValueError(f"{both}: {error}; shorten the history") from None
        return self


def load_settings(state: Path | None, flags: dict[str, Any]) -> AgentSettings:
    """The effective settings; without a state directory there is no file.

    Raises AgentError that names the field.
    """
    file = state / CONFIG_FILE if state else Path(os.devnull)
    try:
        return AgentSettings.load(file, **flags)
    except SettingsError as error:
        in_file = f", or {file}" if state else ""
        raise AgentError(
            str(error),
            f"correct the option or the POOL_AGENT_ variable{in_file}",
            ExitStatus.CONFIGURATION,
        ) from None
