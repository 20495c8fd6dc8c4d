"""Members whose own ACME account orders and renews, and whose CAA names it: without our agent, or by an agent's own choice.

The registry then has no key, no order and no authorization. What it knows of the certificate is what probes see.
"""

from datetime import datetime
from urllib.parse import urlsplit

from poolsvc import servers
from poolsvc.config import Settings
from poolsvc.errors import InvalidDocument, WrongState
from poolsvc.models import Server
from poolsvc.zone import CAA_WORD

_MAX_URI = 500


def is_used(server: Server) -> bool:
    """Whether the registry orders nothing for the server."""
    return server.agentless or server.own_account_uri is not None


def require_agentless(server: Server) -> None:
    """Raise WrongState for a server that has an agent for these things."""
    if not server.agentless:
        raise WrongState(
            f"{server.name} was registered with an agent, which does this",
            remedy='to use an ACME client of your own, register a server with {"agentless": true}',
        )


def choose(settings: Settings, server: Server, uri: str | None) -> None:
    """Let this account of a CA of the pool, and no other, order for the server. Raises InvalidDocument.

    None: with an agent the registry's accounts, without one nobody.
    """
    if uri == server.own_account_uri:
        return
    if (refused := refusal(settings, server, uri)) is not None:
        raise refused
    server.own_account_uri = uri
    servers.await_caa(server)


def refusal(settings: Settings, server: Server, uri: str | None) -> InvalidDocument | None:
    """Why this account cannot order for the server; None if it can. One that does stays, also when its CA is taken out of
    the settings.
    """
    if uri is None or uri == server.own_account_uri:
        return None
    wanted, hosts = urlsplit(uri), [ca.name for ca in settings.ca.all]
    plain = CAA_WORD.fullmatch(uri) is not None and len(uri) <= _MAX_URI
    is_bare = wanted.path.strip("/") and not (wanted.query or wanted.fragment or "@" in wanted.netloc)
    if plain and is_bare and wanted.scheme == "https" and wanted.netloc in hosts:
        return None
    return InvalidDocument(
        f"not the URI of an account at https://{' or https://'.join(hosts)}",
        remedy="give the account URL that your ACME client shows, such as `certbot show_account`",
        field="account_uri",
    )


def may_order_at(server: Server) -> datetime | None:
    """When the account may order; None while the name or its CAA is on the way into DNS, and for the registry's."""
    if server.own_account_uri is None or server.named_at is None:
        return None
    return server.order_due_at or server.named_at
