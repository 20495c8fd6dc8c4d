"""Members without our agent: an ACME client of their own orders and renews, CAA names its account.

The registry then has no key, no order and no authorization. What it knows of the certificate is what probes see.
"""

from datetime import datetime
from urllib.parse import urlsplit

from poolsvc.config import Settings
from poolsvc.errors import InvalidDocument, WrongState
from poolsvc.models import Server
from poolsvc.zone import CAA_WORD

_MAX_URI = 500


def require(server: Server) -> None:
    """Raise WrongState for a server that has an agent for these things."""
    if not server.agentless:
        raise WrongState(
            f"{server.name} was registered with an agent, which does this",
            remedy='to use an ACME client of your own, register a server with {"agentless": true}',
        )


def set_account(settings: Settings, server: Server, uri: str) -> None:
    """Let this account of a CA of the pool, and no other, order for the server. Raises InvalidDocument."""
    wanted, hosts = urlsplit(uri), [ca.name for ca in settings.ca.all]
    plain = CAA_WORD.fullmatch(uri) is not None and len(uri) <= _MAX_URI
    is_bare = wanted.path.strip("/") and not (wanted.query or wanted.fragment or "@" in wanted.netloc)
    if not (plain and is_bare and wanted.scheme == "https" and wanted.netloc in hosts):
        raise InvalidDocument(
            f"not the URI of an account at https://{' or https://'.join(hosts)}",
            remedy="give the account URL that your ACME client shows, such as `certbot show_account`",
            field="account_uri",
        )
    if uri != server.own_account_uri:
        server.own_account_uri = uri
        # Every nameserver has to show the new CAA before anybody may order.
        server.named_at = server.order_due_at = None


def may_order_at(server: Server) -> datetime | None:
    """When the member's client may order; None while the name or its CAA is on the way into DNS."""
    if not server.agentless or server.own_account_uri is None or server.named_at is None:
        return None
    return server.order_due_at or server.named_at
