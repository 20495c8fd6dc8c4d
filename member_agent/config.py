"""The agent's settings: flags before environment (POOL_AGENT_*) before STATE/agent.toml before defaults."""

from pathlib import Path
from typing import Any

from pydantic import Field, IPvAnyAddress, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from member_agent.errors import AgentError, ExitStatus
from nts_core.ke import DEFAULT_NTP_PORT

CONFIG_FILE = "agent.toml"


class AgentSettings(BaseSettings):
    """What a member may choose; everything else the registry assigns or the host knows."""

    model_config = SettingsConfigDict(env_prefix="POOL_AGENT_", extra="forbid", frozen=True)

    listen: tuple[IPvAnyAddress, ...] = Field(
        (), description="addresses to listen on; by default the server's own, or all when they are not local"
    )
    ntp_port: int = Field(DEFAULT_NTP_PORT, ge=1, le=65535)
    local_stratum: int | None = Field(None, ge=1, le=15, description="vouch for this host's clock")
    clock_offset: float = Field(
        0.0, ge=-1e9, le=1e9, description="test option: seconds added to the time served"
    )
    metrics: str | None = Field(None, description="ADDR:PORT of the Prometheus listener")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the signature is pydantic's
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the signature is pydantic's
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


def load_settings(state: Path, flags: dict[str, Any]) -> AgentSettings:
    """The effective settings. Raises AgentError that names the field."""

    class FileSettings(AgentSettings):
        model_config = SettingsConfigDict(toml_file=state / CONFIG_FILE)

    try:
        return FileSettings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        raise AgentError(
            f"setting {'.'.join(str(part) for part in first['loc'])}: {first['msg']}",
            f"correct the option, the POOL_AGENT_ variable, or {state / CONFIG_FILE}",
            ExitStatus.CONFIGURATION,
        ) from None
    except ValueError as error:
        raise AgentError(
            f"{state / CONFIG_FILE}: {error}", "write it as TOML", ExitStatus.CONFIGURATION
        ) from None
