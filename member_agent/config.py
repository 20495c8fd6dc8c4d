"""The agent's settings: flags before environment (POOL_AGENT_*) before STATE/agent.toml before defaults."""

import json
import os
from enum import StrEnum
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
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
from nts_core.control import ProofWay, Validation
from nts_core.cookies import DAY, HISTORY, Schedule
from nts_core.errors import WireError
from nts_core.ke import DEFAULT_NTP_PORT, KeTerms, NtpEndpoint, host_of
from nts_core.ratelimit import AccessList
from nts_core.shell import ProgramSettings, SettingsError, check_contact, check_https, parse_host_port

CONFIG_FILE = "agent.toml"
# Thirty years: enough to test whatever a clock may do.
MAX_CLOCK_OFFSET = 1e9
MAX_WORKERS = 64
# `engines.requests.longest` of it is within TimeoutStartSec= of pool-agent-engine.service.
MAX_ENGINE_DEADLINE = 90.0


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


class Proof(StrEnum):
    """How the registry is shown that an address is this host's."""

    AUTO = "auto"
    HTTP = ProofWay.HTTP
    TLS = ProofWay.TLS


class AcmeMode(StrEnum):
    """Whose account at the CA orders."""

    REGISTRY = "registry"
    OWN_ACCOUNT = "own-account"


class Acme(BaseModel):
    """How certificates come about."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: AcmeMode = Field(
        AcmeMode.REGISTRY,
        description="who orders: registry, or own-account, an account of this host's own at a CA of the pool's",
    )
    directory_url: Annotated[str, AfterValidator(check_https)] | None = Field(
        None, description="own-account: the CA's directory; by giving it you accept the CA's terms"
    )
    ca_file: Path | None = Field(
        None, description="own-account: roots (PEM) for the CA instead of the system's"
    )
    contact: tuple[Annotated[str, AfterValidator(check_contact)], ...] = Field(
        (), max_length=8, description="own-account: how the CA reaches you, such as mailto:NAME@DOMAIN"
    )

    validation: Validation = Field(
        Validation.HTTP_01,
        description="how the CA finds this host: http-01 (port 80), tls-alpn-01 (port 443), redirect, where your own"
        " web server on port 80 sends the CA to the registry, or dns-01: not at all, as the registry answers in DNS, in"
        " pools that have that",
    )

    @model_validator(mode="after")
    def _possible_account(self) -> Self:
        if self.mode is AcmeMode.OWN_ACCOUNT:
            if self.directory_url is None:
                raise ValueError("directory_url: own-account needs the CA's; the pool's operator names it")
            if self.validation in {Validation.REDIRECT, Validation.DNS_01}:
                raise ValueError(
                    "validation: the registry has no answer to what an own account orders; use http-01 or tls-alpn-01"
                )
        return self


class Hooks(BaseModel):
    """Commands of the member's around the installation of a certificate, each a list of words."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    before: tuple[str, ...] = Field(
        (), description="run before a certificate is installed; if it fails, none is"
    )
    after: tuple[str, ...] = Field((), description="run when a certificate was installed and is served")


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
    ntp_pps: float | None = Field(
        None,
        gt=0,
        le=1e9,
        allow_inf_nan=False,
        description="cap: NTP requests a second to answer, of all clients together; none without",
    )
    ke_per_minute: float | None = Field(
        None,
        gt=0,
        le=1e9,
        allow_inf_nan=False,
        description="cap: NTS-KE connections a minute, of all clients together; none without",
    )
    above: Literal["drop", "rate"] = Field(
        "drop", description="what NTP requests above the cap get: nothing, or KoD RATE"
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

    def of_each(self, processes: int) -> "Limits":
        """The limits of each of several processes, so that they hold for all of them together.

        What an address sends always comes to the same process: only what is for all addresses has to be divided.
        """
        caps = {name: getattr(self, name) for name in ("ntp_pps", "ke_per_minute")}
        divided = {name: cap / processes for name, cap in caps.items() if cap is not None}
        return self.model_copy(update={**divided, "ke_connections": self.ke_connections // processes})


def _algorithms(value: Any) -> Any:
    """A text, or a list in TOML or JSON."""
    if isinstance(value, str) and value.startswith("["):
        value = json.loads(value)
    words = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    algorithms = parse_algorithms(words)
    KeTerms.check_preference(algorithms)
    return algorithms


def _workers(value: Any) -> Any:
    return min(len(os.sched_getaffinity(0)), MAX_WORKERS) if value == "auto" else value


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


class PacketEngine(StrEnum):
    """What answers NTS-KE and NTP in the builtin engine."""

    AUTO = "auto"
    NATIVE = "native"
    PYTHON = "python"


class EngineSettings(BaseModel):
    """Which engine serves; and of a time daemon, where it is when it is not where Debian has it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["auto", "builtin", "chrony", "ntpsec", "ntpd-rs"] = Field(
        "auto", description="the agent itself, or a time daemon of this host"
    )
    packets: PacketEngine = Field(
        PacketEngine.AUTO,
        description="what answers in the agent itself: native, the module nts_engine; python; or auto, native where the"
        " module is there",
    )
    config_dir: Path | None = Field(None, description="the daemon's directory below /etc")
    unit_dir: Path = Field(Path("/etc/systemd/system"), description="where units get drop-ins")
    state_dir: Path = Field(
        Path("/var/lib/pool-agent-ntpd-rs"), description="where ntpd-rs keeps the keys of its cookies"
    )
    user: str | None = Field(None, description="the user that the daemon runs as")
    reload: tuple[str, ...] = Field(
        (), description="a command instead of systemctl; it gets the word restart or reload"
    )
    log: Path | None = Field(None, description="a file that the daemon logs to, instead of the journal")
    deadline: float = Field(
        30.0,
        gt=0,
        le=MAX_ENGINE_DEADLINE,
        allow_inf_nan=False,
        description=f"seconds until a changed daemon has to serve, {MAX_ENGINE_DEADLINE:g} at most: systemd ends root's part,"
        " which waits several times so long",
    )

    def of(self, kind: str) -> "EngineSettings":
        """For this daemon; without what is said of another one."""
        if self.kind == kind:
            return self
        others = {"config_dir": None, "user": None, "reload": (), "log": None}
        return self.model_copy(update={"kind": kind, **others})

    def is_for_the_same(self, other: "EngineSettings") -> bool:
        """Whether both are about one daemon in one place."""
        return (self.kind, self.config_dir) == (other.kind, other.config_dir)

    @model_validator(mode="after")
    def _one_daemon(self) -> Self:
        """What says how one daemon is found would be wrong for another one."""
        given = {"config_dir": self.config_dir, "user": self.user, "reload": self.reload, "log": self.log}
        if self.kind in ("auto", "builtin") and any(given.values()):
            names = ", ".join(name for name, value in given.items() if value)
            raise ValueError(f"{names}: name the daemon in kind: chrony, ntpsec or ntpd-rs")
        for path in (self.config_dir, self.unit_dir, self.state_dir, self.log):
            if path is not None and not path.is_absolute():
                raise ValueError(f"{path}: write the whole path, from /")
        return self


class AgentSettings(ProgramSettings):
    """What a member may choose; everything else the registry assigns or the host knows."""

    model_config = SettingsConfigDict(env_prefix="POOL_AGENT_", env_nested_delimiter="__")

    listen: tuple[IPvAnyAddress, ...] = Field(
        (), description="addresses to listen on; by default the server's own, or all when they are not local"
    )
    ntp_port: int = Field(DEFAULT_NTP_PORT, ge=1, le=65535, description="UDP port of NTP")
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
    proof: Proof = Field(
        Proof.AUTO,
        description="how addresses are proved: http (the pool's HTTP port), tls (its KE port), or auto: http where"
        " port 80 is ours",
    )
    acme: Acme = Acme()
    hooks: Hooks = Hooks()
    limits: Limits = Limits()
    engine: EngineSettings = EngineSettings()
    workers: Annotated[int, BeforeValidator(_workers)] = Field(
        1,
        ge=1,
        le=MAX_WORKERS,
        description="processes that serve, or threads of native packets; auto is one for each core",
    )
    user: str | None = Field(
        None, description="who to be instead of root, whom the state directory then belongs to"
    )
    group: str | None = Field(None, description="and of which group; by default that user's own")
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

    @model_validator(mode="after")
    def _possible_processes(self) -> Self:
        if self.group is not None and self.user is None:
            raise ValueError("group: without a user nothing is changed; give user as well")
        if self.limits.ke_connections < self.workers:
            raise ValueError(
                f"workers: {self.workers} cannot share limits.ke_connections = {self.limits.ke_connections}"
            )
        return self


def load_settings(state: Path | None, flags: dict[str, Any], *, file: Path | None = None) -> AgentSettings:
    """The effective settings; without a state directory there is no file. `file` is read instead of the one there.

    Raises AgentError that names the field.
    """
    ours = state / CONFIG_FILE if state else Path(os.devnull)
    try:
        return AgentSettings.load(file or ours, **flags)
    except SettingsError as error:
        in_file = f", or {file or ours}" if state or file else ""
        raise AgentError(
            str(error),
            f"correct the option or the POOL_AGENT_ variable{in_file}",
            ExitStatus.CONFIGURATION,
        ) from None
