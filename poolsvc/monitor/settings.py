"""The settings of a monitor: flags before environment (POOL_MONITOR_*) before the TOML file before defaults."""

from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from nts_core.shell import ProgramSettings, SettingsError
from poolsvc.config import ConfigError, EndpointText, ReferenceText
from poolsvc.monitor.soundness import (
    MAX_REFERENCES,
    MIN_REFERENCES,
    Reference,
    check_independent,
    parse_reference,
)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _registry(url: str) -> str:
    parts = urlsplit(url)
    is_safe = parts.scheme == "https" or (parts.scheme == "http" and _is_loopback(parts.hostname or ""))
    is_plain = url.isascii() and url.isprintable() and " " not in url
    if not parts.hostname or not is_safe or not is_plain or "@" in parts.netloc or parts.query:
        raise ValueError("write it as https://HOST")
    return url.rstrip("/")


class MonitorSettings(ProgramSettings):
    """What whoever runs a monitor chooses; whom it probes, and when, the registry says."""

    model_config = SettingsConfigDict(env_prefix="POOL_MONITOR_")

    registry: Annotated[str, AfterValidator(_registry)] = Field(
        description="the registry's address, https://HOST"
    )
    token_file: Path = Field(description="a file with the monitor's token, for this program's user alone")
    references: tuple[ReferenceText, ...] = Field(
        min_length=MIN_REFERENCES,
        max_length=MAX_REFERENCES,
        description="servers of different operators that this host's clock is compared with, each nts:HOST[:PORT] or"
        " ntp:HOST[:PORT]; none of the pool's",
    )
    families: tuple[Literal["ipv4", "ipv6"], ...] = Field(
        ("ipv4", "ipv6"), min_length=1, description="in which it probes"
    )
    ca_file: Path | None = Field(None, description="roots (PEM) for the registry instead of the system's")
    roots_file: Path | None = Field(
        None, description="roots (PEM) for servers and references instead of the system's"
    )
    check_interval: float = Field(
        45,
        ge=0.1,
        le=300,
        description="seconds between two looks at the references; results wait for the next one",
    )
    report_interval: float = Field(10, ge=0.1, le=300, description="seconds between two reports")
    probes_at_once: int = Field(
        1000, ge=1, le=10_000, description="probes at a time; what is more is left out"
    )
    jitter: float = Field(
        5, ge=0, le=60, description="seconds by which a probe begins later than told, at most"
    )
    lateness: float = Field(
        30, gt=0, le=600, description="seconds after which a probe that did not begin is left out"
    )
    metrics: EndpointText | None = Field(None, description="ADDRESS:PORT of the Prometheus listener")
    allow_private_addresses: bool = Field(
        False, description="for laboratories: whether servers may have private addresses"
    )

    @field_validator("families")
    @classmethod
    def _each_once(cls, families: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(families))

    @model_validator(mode="after")
    def _are_independent(self) -> Self:
        try:
            check_independent(self.parsed_references)
        except ValueError as error:
            raise ValueError(f"references: {error}") from None
        return self

    @property
    def parsed_references(self) -> tuple[Reference, ...]:
        return tuple(map(parse_reference, self.references))

    @property
    def versions(self) -> frozenset[int]:
        """The families by their numbers."""
        return frozenset(4 if family == "ipv4" else 6 for family in self.families)


_FILES = ("token_file", "ca_file", "roots_file")


def load_settings(file: Path, **flags: Any) -> MonitorSettings:
    """The settings that hold; paths are relative to the file. Raises ConfigError that names the setting."""
    if not file.is_file():
        raise ConfigError(f"{file}: there is no such settings file")
    try:
        settings = MonitorSettings.load(file, **flags)
    except SettingsError as error:
        raise ConfigError(str(error)) from None
    base = file.resolve().parent
    values = {name: getattr(settings, name) for name in _FILES}
    return settings.model_copy(
        update={name: base / path for name, path in values.items() if path is not None}
    )
