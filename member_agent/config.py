"""The agent's settings: flags before environment (POOL_AGENT_*) before STATE/agent.toml before defaults."""

from pathlib import Path
from typing import Any

from pydantic import Field, IPvAnyAddress
from pydantic_settings import SettingsConfigDict

from member_agent.errors import AgentError, ExitStatus
from nts_core.ke import DEFAULT_NTP_PORT
from nts_core.shell import ProgramSettings, SettingsError

CONFIG_FILE = "agent.toml"
# Thirty years: enough to test whatever a clock may do.
MAX_CLOCK_OFFSET = 1e9


class AgentSettings(ProgramSettings):
    """What a member may choose; everything else the registry assigns or the host knows."""

    model_config = SettingsConfigDict(env_prefix="POOL_AGENT_")

    listen: tuple[IPvAnyAddress, ...] = Field(
        (), description="addresses to listen on; by default the server's own, or all when they are not local"
    )
    ntp_port: int = Field(DEFAULT_NTP_PORT, ge=1, le=65535)
    local_stratum: int | None = Field(None, ge=1, le=15, description="vouch for this host's clock")
    clock_offset: float = Field(
        0.0,
        ge=-MAX_CLOCK_OFFSET,
        le=MAX_CLOCK_OFFSET,
        allow_inf_nan=False,
        description="test option: seconds added to the time served",
    )
    metrics: str | None = Field(None, description="ADDR:PORT of the Prometheus listener")


def load_settings(state: Path, flags: dict[str, Any]) -> AgentSettings:
    """The effective settings. Raises AgentError that names the field."""
    try:
        return AgentSettings.load(state / CONFIG_FILE, **flags)
    except SettingsError as error:
        raise AgentError(
            str(error),
            f"correct the option, the POOL_AGENT_ variable, or {state / CONFIG_FILE}",
            ExitStatus.CONFIGURATION,
        ) from None
