"""Becoming a member: from a join token to a membership on the disk, and to addresses that are proved."""

import asyncio
import contextlib
import re
import time
from pathlib import Path

from member_agent import local
from member_agent.config import AgentSettings
from member_agent.daemon import Agent
from member_agent.errors import AgentError
from member_agent.registry import Registry, RegistryError
from member_agent.state import Membership, StateDirectory, agent_key_pem, token_digest
from nts_core.control import ServerStatus

# Seconds between looks at whether the addresses are proved.
_LOOK = 0.5
_SERVER = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_POOL = re.compile(r"([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?[.])+[a-z0-9-]{2,63}")


async def join(url: str, token: str, state: StateDirectory, ca: Path | None, agent: str) -> Membership:
    """Become a member with a join token. An agent that runs here finds the new membership; a copy of `ca` is kept.

    The same token gives the same membership again, also after a crash. One for a server that this host
    already is replaces the key and the API token, and keeps the certificates. Raises AgentError.
    """
    state.check_rights()
    if (known := state.joined_by(token)) is not None:
        state.joined(token)
        return known
    registry = Registry(url, token, ca)
    key = state.joining_key(token)
    answer = await registry.join(key, agent)
    if not _SERVER.fullmatch(answer.server) or not _POOL.fullmatch(answer.pool):
        raise RegistryError("the registry's names are not host names", "ask the pool's operator")
    if answer.domain != f"{answer.server}.servers.{answer.pool}":
        # Otherwise a registry could have this host answer challenges for any name that leads here.
        raise RegistryError("the registry's name for this server is not under its pool", "ask the operator")
    _check_owner(state, answer.domain, registry.url)
    directory = state.member(answer.domain)
    membership = Membership(
        registry=registry.url,
        pool=answer.pool,
        server=answer.server,
        domain=answer.domain,
        token=answer.token,
        token_at=int(time.time()),
        key=agent_key_pem(key).decode(),
        joined_by=token_digest(token),
        ca=None if ca is None else str(directory.save_roots(ca)),
    )
    directory.save_membership(membership)
    state.joined(token)
    return membership


def _check_owner(state: StateDirectory, domain: str, url: str) -> None:
    """A registry that calls a server of ours by the name that another one gave it would get that one's key and challenges."""
    known = state.members().get(domain)
    if known is not None and known.membership().registry != url:
        raise RegistryError(
            f"this host already is {domain}, by another registry, {known.membership().registry}",
            "nothing was changed; ask the operators of both. If the registry has moved, leave the pool here first, or edit"
            f" {known.path}/membership.json",
        )


async def prove(
    membership: Membership, state: StateDirectory, settings: AgentSettings, seconds: float
) -> ServerStatus:
    """Prove the addresses at once, by the agent that runs here, or by one that runs meanwhile.

    How it stands when all are proved, when one was refused, or after so many seconds. Raises AgentError.
    """
    registry = _registry(membership)
    if local.ask(state.path, "wake") is not None:
        return await _proved(registry, membership, seconds)
    running = asyncio.create_task(Agent(state, settings).run())
    looking = asyncio.create_task(_proved(registry, membership, seconds))
    try:
        await asyncio.wait({running, looking}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            # By a signal, as otherwise it would have raised.
            running.result()
            return await registry.status(membership.server)
        return await looking
    finally:
        for task in (running, looking):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, AgentError):
                await task


async def look(membership: Membership) -> ServerStatus | None:
    """How it stands, if the registry says so now."""
    async with _registry(membership) as registry:
        try:
            return await registry.status(membership.server)
        except RegistryError:
            return None


def _registry(membership: Membership) -> Registry:
    return Registry(membership.registry, membership.token, Path(membership.ca) if membership.ca else None)


async def _proved(registry: Registry, membership: Membership, seconds: float) -> ServerStatus:
    end = time.monotonic() + seconds
    async with registry:
        while True:
            seen = await registry.status(membership.server)
            is_settled = all(address.proved_at or address.proof_error for address in seen.addresses)
            if is_settled or time.monotonic() > end:
                return seen
            await asyncio.sleep(_LOOK)
