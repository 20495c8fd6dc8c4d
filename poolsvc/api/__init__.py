"""The JSON API, version 1. Requests and answers are documents; decisions live in the modules behind it."""

from poolsvc.api import (
    absence,
    accounts,
    acme,
    agent,
    agentless,
    challenges,
    commands,
    export,
    history,
    members,
    monitor,
    monitors,
    notices,
    pool,
    regions,
    series,
    servers,
    settings,
    sign_in,
    staff,
    teams,
    transfers,
)
from poolsvc.api.limits import Limits
from poolsvc.api.request import Services

__all__ = ["ROUTERS", "Limits", "Services"]

# Routes are tried in this order, and nobody asks as much as agents.
ROUTERS = tuple(
    part.router
    for part in (
        agent,
        monitor,
        pool,
        monitors,
        sign_in,
        accounts,
        members,
        teams,
        export,
        notices,
        servers,
        series,
        settings,
        absence,
        agentless,
        commands,
        transfers,
        staff,
        acme,
        regions,
        challenges,
        history,
    )
)
