"""What the endpoints that send people to providers share. No transaction is open while a provider is asked."""

from datetime import datetime

from pydantic import Field

from poolsvc import sign_in
from poolsvc.api.request import Document, Line, Services
from poolsvc.errors import NotFound
from poolsvc.models import SignIn
from poolsvc.oidc import Claims, Provider


class BeginView(Document):
    url: str = Field(description="where the person goes")
    binding: str = Field(description="stays where it is asked for, and is said at the end")


class ComeBackRequest(Document):
    """What the provider adds to the address that it sends people back to, and what was kept."""

    state: Line = Field(max_length=200)
    code: Line = Field(max_length=4096)
    iss: Line | None = Field(None, max_length=255, description="if the provider says it")
    binding: Line = Field(max_length=200, description="from the answer of `begin`")


def provider_named(services: Services, name: str) -> Provider:
    """Raises NotFound."""
    if name not in services.providers:
        raise NotFound("there is no such provider", remedy="see GET /v1/oidc", field="provider")
    return services.providers[name]


async def identify(
    services: Services, body: ComeBackRequest, now: datetime, *, user_id: int | None = None
) -> tuple[SignIn, Claims]:
    """The detour that ends, and whom its provider knows. Raises SignInInvalid, ProviderFailed."""
    async with services.database.transaction("anybody") as session:
        row, detour = await sign_in.take_detour(
            session, services.key, body.state, body.binding, now, user_id=user_id
        )
    by_issuer = {provider.issuer: provider for provider in services.providers.values()}
    if row.issuer not in by_issuer:
        raise NotFound("the provider was taken out of the settings", remedy="sign in in another way")
    return row, await by_issuer[row.issuer].identify(detour, body.code, body.iss, now)
