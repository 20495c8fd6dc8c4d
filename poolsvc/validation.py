"""How a CA is shown that a server's name may have a certificate: who answers, by which challenge, and what CAA allows.

    http-01       the agent, on the HTTP port of every address
    tls-alpn-01   the agent, on the TLS port of every address
    redirect      the registry, over HTTP: the member's own web server sends the CA there
    dns-01        the registry, in DNS, where the pool's policy and the member or its agent want it

This is what an agent says of its host; the last one a member can also choose. An order keeps the one by which it was
placed. Of the first three the registry takes its own look at every published address, before it tells the CA to.
"""

import asyncio
import hashlib
from functools import cache
from http import HTTPStatus

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from nts_core.acme import Challenge
from nts_core.certificates import ChainError, check_challenge_certificate
from nts_core.control import ACME_ALPN, ACME_PATH, HttpChallenge, TlsChallenge, Validation
from poolsvc import servers
from poolsvc.config import Settings
from poolsvc.models import Order, OrderStatus, Server
from poolsvc.outbound import Answer, FetchError, Outbound, http_origin

_CHALLENGES = {
    Validation.HTTP_01: Challenge.HTTP_01,
    Validation.TLS_ALPN_01: Challenge.TLS_ALPN_01,
    Validation.REDIRECT: Challenge.HTTP_01,
    Validation.DNS_01: Challenge.HTTP_01,  # where the policy does not let it; the agent then sends no request
}
# An order whose challenge the CA looks at, or is about to.
PROVING = (OrderStatus.PENDING, OrderStatus.ANSWERED)
REDIRECTS = frozenset(
    {
        HTTPStatus.MOVED_PERMANENTLY,
        HTTPStatus.FOUND,
        HTTPStatus.SEE_OTHER,
        HTTPStatus.TEMPORARY_REDIRECT,
        HTTPStatus.PERMANENT_REDIRECT,
    }
)
_KEY_AUTHORIZATION_LIMIT = 512


def said(text: str) -> Validation:
    """What an agent says, of whatever version."""
    try:
        return Validation(text)
    except ValueError:
        return Validation.HTTP_01


def is_in_dns(settings: Settings, server: Server) -> bool:
    """Whether the registry answers in DNS for the server's orders."""
    return settings.policy.dns_01 and (server.dns_01 or server.validation is Validation.DNS_01)


def challenge_for(settings: Settings, server: Server) -> Challenge:
    """By which challenge an order is placed now."""
    return Challenge.DNS_01 if is_in_dns(settings, server) else _CHALLENGES[server.validation]


def allowed(settings: Settings, server: Server) -> tuple[Challenge, ...]:
    """What its CAA lets its name be validated by."""
    return methods(server.validation, in_dns=is_in_dns(settings, server))


@cache
def methods(by: Validation, *, in_dns: bool) -> tuple[Challenge, ...]:
    """What CAA lets a name be validated by: no more than it takes, and HTTP-01, which a host can always go back to."""
    needed = {Challenge.HTTP_01, _CHALLENGES[by], *([Challenge.DNS_01] if in_dns else [])}
    return tuple(challenge for challenge in Challenge if challenge in needed)


def http_challenges(order: Order | None) -> tuple[HttpChallenge, ...]:
    """What the agent has to serve over HTTP."""
    if order is None or order.token is None or order.key_authorization is None:
        return ()
    if order.validation is not Validation.HTTP_01:
        return ()
    return (HttpChallenge(order.token, order.key_authorization),)


def tls_challenges(order: Order | None) -> tuple[TlsChallenge, ...]:
    """What the agent has to serve by TLS."""
    if order is None or order.key_authorization is None or order.validation is not Validation.TLS_ALPN_01:
        return ()
    return (TlsChallenge(_digest(order.key_authorization)),)


def _digest(key_authorization: str) -> str:
    return hashlib.sha256(key_authorization.encode()).hexdigest()


def is_served(order: Order, serving: tuple[str, ...]) -> bool:
    """Whether the challenge is among those that an agent says it answers."""
    names = {challenge.token for challenge in http_challenges(order)}
    names |= {challenge.digest for challenge in tls_challenges(order)}
    return not names.isdisjoint(serving)


async def answer_to(session: AsyncSession, token: str) -> str | None:
    """The key authorization for a CA that a member's web server has sent here; None for every other token."""
    return await session.scalar(
        select(Order.key_authorization).where(
            Order.status.in_(PROVING), Order.validation == Validation.REDIRECT, Order.token == token
        )
    )


async def look(settings: Settings, order: Order, server: Server) -> None:
    """Raises FetchError unless every published address answers the challenge as the CA will want it."""
    addresses = servers.published_addresses(server)
    if not addresses:
        raise FetchError("no address is published")
    by_tls = order.validation is Validation.TLS_ALPN_01
    # All at once: silent ones would otherwise hold up the orders of others, each by a deadline.
    looks = ((_by_tls if by_tls else _by_http)(settings, order, server, address) for address in addresses)
    for failure in await asyncio.gather(*looks, return_exceptions=True):
        if failure is not None:
            raise failure


async def _by_http(settings: Settings, order: Order, server: Server, address: str) -> None:
    answer = await Outbound(settings).get(
        f"{http_origin(address, settings.ports.http)}{ACME_PATH}{order.token}",
        host=settings.domain_of(server.name),
        deadline=settings.policy.proof_deadline,
        limit=_KEY_AUTHORIZATION_LIMIT,
    )
    if order.validation is Validation.REDIRECT and answer.status in REDIRECTS:
        # There the registry itself answers: nothing is left to be looked at.
        check_redirect(settings, f"{ACME_PATH}{order.token}", answer)
        return
    if answer.require_ok().decode("ascii", "replace").strip() != order.key_authorization:
        raise FetchError(f"{address} answers the challenge with something else")


def check_redirect(settings: Settings, path: str, answer: Answer) -> None:
    """Raises FetchError unless a member's web server sends the CA here."""
    target = f"{settings.public_url}{path}"
    if answer.status not in REDIRECTS or answer.location != target:
        raise FetchError(
            f"HTTP status {answer.status} does not lead the CA to {target} but to {answer.location or 'nowhere'}",
            remedy=f"redirect {ACME_PATH} to {settings.public_url}{ACME_PATH}, with what follows it",
        )


async def _by_tls(settings: Settings, order: Order, server: Server, address: str) -> None:
    assert order.key_authorization is not None
    domain = settings.domain_of(server.name)
    answer = await Outbound(settings).tls(
        address, settings.ports.tls, name=domain, protocol=ACME_ALPN, deadline=settings.policy.proof_deadline
    )
    try:
        check_challenge_certificate(answer.certificate, domain, _digest(order.key_authorization))
    except ChainError as error:
        raise FetchError(f"{address}: {error}") from None
