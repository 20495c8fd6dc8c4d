"""`poolsvc monitor`: a vantage point. Rendering only."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from nts_core.client import ClientError
from nts_core.exposition import expose
from nts_core.shell import configure_logging, raise_descriptor_limit
from poolsvc.cli.common import ExitStatus, fail
from poolsvc.config import ConfigError, EndpointText, split_endpoint
from poolsvc.monitor import program, unit
from poolsvc.monitor.settings import MonitorSettings, load_settings
from poolsvc.monitor.soundness import Reading
from poolsvc.monitor.uplink import Uplink, read_token

_REMEDY = "correct the setting; docs/monitors.md explains each"


def run(
    config: Annotated[
        Path, typer.Option("--config", metavar="FILE", help="the monitor's settings file (TOML)")
    ],
    metrics: Annotated[
        str | None, typer.Option(metavar="ADDRESS:PORT", help="serve Prometheus metrics there")
    ] = None,
    *,
    check: Annotated[
        bool, typer.Option("--check", help="compare this host's clock with the references, and end")
    ] = False,
    show: Annotated[
        bool,
        typer.Option("--show", help="print the effective settings, and end; secrets are only named by file"),
    ] = False,
    print_unit: Annotated[bool, typer.Option("--unit", help="print a systemd unit for it, and end")] = False,
) -> None:
    """Probe servers from here for a registry, until SIGTERM."""
    try:
        settings = load_settings(config, metrics=metrics)
        if show:
            typer.echo(json.dumps(settings.model_dump(mode="json"), indent=2))
        elif print_unit:
            typer.echo(unit.render(config.absolute(), Path(sys.executable).with_name("poolsvc")), nl=False)
        elif check:
            _check(settings)
        else:
            _run(settings)
    except ConfigError as error:
        fail(ExitStatus.CONFIGURATION, str(error), _REMEDY)
    except ClientError as error:
        fail(ExitStatus.CONFIGURATION, error.message, error.remedy)


def _run(settings: MonitorSettings) -> None:
    configure_logging()
    raise_descriptor_limit()
    asyncio.run(program.run(settings, Uplink(settings, read_token(settings)), _expose))


def _expose(endpoint: EndpointText, monitor: program.Monitor) -> None:
    try:
        expose(*split_endpoint(endpoint), monitor.families)
    except OSError as error:
        raise ConfigError(f"metrics {endpoint}: {error.strerror}; choose another port") from None


def _check(settings: MonitorSettings) -> None:
    readings, found = asyncio.run(program.check(settings))
    for reading in readings:
        typer.echo(_line(reading))
    families = " and ".join(name for name, is_good in (("IPv4", found.ipv4), ("IPv6", found.ipv6)) if is_good)
    if not found.is_sound:
        fail(
            ExitStatus.DOCTOR,
            f"not sound: {found.detail}",
            "let a time daemon keep this host's clock, let UDP and TCP out to the references, or name others",
        )
    typer.echo(f"sound, by {families}: {found.agreeing} of {found.references} references agree")


def _line(reading: Reading) -> str:
    fault = reading.fault
    seen = "" if reading.sample is None else f"{-reading.sample.offset / 1e6:+.3f} ms"
    return f"{'ok' if fault is None else 'fail':5} {reading.reference:40} IPv{reading.version}  {seen:>12}  {fault or ''}".rstrip()
