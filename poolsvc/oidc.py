"""Providers of OpenID Connect: the way there, and whom they know when somebody comes back.

The authorization code flow with PKCE, state and nonce. What a provider says is believed when it is signed with a key
that its issuer publishes now, names that issuer and us, and belongs to this detour. Its documents are fetched as
`poolsvc.outbound` fetches everything, and kept for an hour.
"""

import asyncio
import ssl
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import quote_plus

from authlib.oauth2.auth import ClientAuth
from authlib.oauth2.rfc6749.parameters import prepare_grant_uri, prepare_token_request
from authlib.oauth2.rfc7636 import create_s256_code_challenge
from authlib.oidc.core import CodeIDToken
from joserfc import jwt
from joserfc.errors import InvalidKeyIdError, JoseError
from joserfc.jwk import JWKRegistry, Key, KeySet
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nts_core.errors import printable
from poolsvc.config import HttpsUrl, OidcSettings, Settings
from poolsvc.derived import Purpose, RegistryKey
from poolsvc.errors import ProviderFailed, SignInInvalid
from poolsvc.outbound import Answer, FetchError, Outbound

# With a shared secret, or none, whoever knows the client's secret could sign.
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
_SCOPE = "openid email profile"
_KEPT = timedelta(hours=1)
_RETRY = timedelta(seconds=10)  # after a failure, and before keys are fetched again for one that is unknown
_DEADLINE = 10.0
_LIMIT = 256 * 1024
_LEEWAY = 60  # seconds between the provider's clock and ours
_MAX_TEXT = 255
_FORM = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json"}


@dataclass(frozen=True, slots=True)
class Detour:
    """What is said to a provider, derived from a row. `binding` stays with who began, and is said at the end.

    Without it, somebody could begin as themselves and let another person's browser finish.
    """

    state: str
    nonce: str
    verifier: str
    binding: str

    @classmethod
    def of(cls, key: RegistryKey, identifier: int) -> "Detour":
        def text(purpose: Purpose) -> str:
            return urlsafe_b64encode(key.secret(purpose, identifier)).decode().rstrip("=")

        return cls(
            key.token(Purpose.OIDC_STATE, identifier),
            text(Purpose.OIDC_NONCE),
            text(Purpose.OIDC_VERIFIER),
            text(Purpose.OIDC_BINDING),
        )


@dataclass(frozen=True, slots=True)
class Claims:
    """Whom a provider knows. `email` only if the provider has verified it."""

    issuer: str
    subject: str
    email: str | None


class _Metadata(BaseModel):
    """What we need of OpenID Connect Discovery 1.0 section 3."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    issuer: str
    authorization_endpoint: HttpsUrl
    token_endpoint: HttpsUrl
    jwks_uri: HttpsUrl
    userinfo_endpoint: HttpsUrl | None = None
    token_endpoint_auth_methods_supported: tuple[str, ...] = ("client_secret_basic",)
    authorization_response_iss_parameter_supported: bool = False


class _Tokens(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, hide_input_in_errors=True)

    id_token: str = Field(repr=False)
    access_token: str = Field("", repr=False)


class _JsonKeys(BaseModel):
    model_config = ConfigDict(extra="ignore")

    keys: list[dict[str, Any]]


class Provider:
    """One provider, with what it publishes. Raises OSError when the files of its settings cannot be read."""

    def __init__(self, entry: OidcSettings, settings: Settings) -> None:
        self._entry = entry
        self._secret = entry.client_secret_file.read_text().strip()
        verify = None if entry.ca_file is None else ssl.create_default_context(cafile=str(entry.ca_file))
        self._outbound = Outbound(settings, verify=verify)
        self._redirect_uri = f"{settings.public_url}/sign-in/oidc"
        self._known: tuple[_Metadata, KeySet] | None = None
        self._fetched_at: datetime | None = None
        self._failed: tuple[datetime, ProviderFailed] | None = None
        self._fetching = asyncio.Lock()

    @property
    def name(self) -> str:
        return self._entry.name

    @property
    def issuer(self) -> str:
        return self._entry.issuer

    async def authorization_url(self, detour: Detour, now: datetime) -> str:
        """Where the person goes. Raises ProviderFailed."""
        metadata, _ = await self._published(now)
        url: str = prepare_grant_uri(
            metadata.authorization_endpoint,
            self._entry.client_id,
            "code",
            self._redirect_uri,
            _SCOPE,
            detour.state,
            nonce=detour.nonce,
            code_challenge=create_s256_code_challenge(detour.verifier),
            code_challenge_method="S256",
        )
        return url

    async def identify(self, detour: Detour, code: str, iss: str | None, now: datetime) -> Claims:
        """Who came back with the code; `iss` is what came with it (RFC 9207). Raises ProviderFailed, SignInInvalid."""
        metadata, _ = await self._published(now)
        if (
            iss is not None or metadata.authorization_response_iss_parameter_supported
        ) and iss != self.issuer:
            raise SignInInvalid("the answer is not from the provider that was asked", remedy="begin again")
        tokens = await self._exchange_code(metadata, detour, code)
        claims = await self._check(tokens, detour, now)
        subject = claims["sub"]
        if "email" not in claims and metadata.userinfo_endpoint is not None:
            claims = await self._userinfo(metadata.userinfo_endpoint, tokens, subject)
        email = claims.get("email")
        known = isinstance(email, str) and claims.get("email_verified") is True
        return Claims(self.issuer, subject, email if known else None)

    async def _exchange_code(self, metadata: _Metadata, detour: Detour, code: str) -> _Tokens:
        body = prepare_token_request(
            "authorization_code", code=code, redirect_uri=self._redirect_uri, code_verifier=detour.verifier
        )
        basic = "client_secret_basic" in metadata.token_endpoint_auth_methods_supported
        # RFC 6749 section 2.3.1: what goes into Basic is form-encoded first.
        encode = quote_plus if basic else str
        method = "client_secret_basic" if basic else "client_secret_post"
        client = ClientAuth(encode(self._entry.client_id), encode(self._secret), method)
        url, headers, body = client.prepare("POST", metadata.token_endpoint, dict(_FORM), body)
        answer = await self._post(url, body.encode(), headers)
        if answer.status in {400, 401} and b'"invalid_grant"' in answer.body:
            raise SignInInvalid("the provider does not know the code any more", remedy="begin again")
        if answer.status != 200:
            raise self._failure(f"its token endpoint answers with HTTP status {answer.status}")
        try:
            return _Tokens.model_validate_json(answer.body)
        except ValidationError:
            raise self._failure("its token endpoint does not give an id_token") from None

    async def _check(self, tokens: _Tokens, detour: Detour, now: datetime) -> dict[str, Any]:
        """The claims of the id_token (OpenID Connect Core 1.0 section 3.1.3.7)."""
        try:
            token = await self._verified(tokens.id_token, now)
            claims = CodeIDToken(
                token.claims,
                token.header,
                {
                    "iss": {"essential": True, "value": self.issuer},
                    "aud": {"essential": True, "value": self._entry.client_id},
                },
                {
                    "nonce": detour.nonce,
                    "client_id": self._entry.client_id,
                    "access_token": tokens.access_token,
                },
            )
            claims.validate(int(now.timestamp()), _LEEWAY)
        except (JoseError, ValueError, TypeError, KeyError) as error:
            raise self._failure(f"its id_token is not valid: {str(error) or type(error).__name__}") from None
        subject = claims["sub"]
        if not (isinstance(subject, str) and 1 <= len(subject) <= _MAX_TEXT and subject.isprintable()):
            raise self._failure("its id_token names nobody")
        return dict(claims)

    async def _verified(self, text: str, now: datetime) -> jwt.Token:
        _, keys = await self._published(now)
        try:
            return jwt.decode(text, keys, ALGORITHMS)
        except InvalidKeyIdError:
            # Providers change their keys; a stranger's kid must not make us ask again and again.
            _, keys = await self._published(now, newer_than=now - _RETRY)
            return jwt.decode(text, keys, ALGORITHMS)

    async def _userinfo(self, url: str, tokens: _Tokens, subject: str) -> dict[str, Any]:
        answer = await self._post(url, b"", {"Authorization": f"Bearer {tokens.access_token}"})
        try:
            claims = _Userinfo.model_validate_json(answer.body)
        except ValidationError:
            raise self._failure(f"its userinfo endpoint gives no claims (status {answer.status})") from None
        if claims.sub != subject:
            raise self._failure("its userinfo endpoint speaks of somebody else")
        return claims.model_dump()

    async def _published(
        self, now: datetime, *, newer_than: datetime | None = None
    ) -> tuple[_Metadata, KeySet]:
        """What the provider publishes, at most an hour old. Raises ProviderFailed."""
        limit = newer_than or now - _KEPT
        async with self._fetching:
            if self._known is not None and self._fetched_at is not None and self._fetched_at > limit:
                return self._known
            if self._failed is not None and self._failed[0] > now - _RETRY:
                raise self._failed[1]
            try:
                self._known = await self._fetch()
            except ProviderFailed as failure:
                self._failed = now, failure
                raise
            self._fetched_at, self._failed = now, None
            return self._known

    async def _fetch(self) -> tuple[_Metadata, KeySet]:
        place = f"{self.issuer.rstrip('/')}/.well-known/openid-configuration"
        try:
            metadata = _Metadata.model_validate_json(await self._get(place))
            found = _JsonKeys.model_validate_json(await self._get(metadata.jwks_uri))
        except ValidationError as error:
            fault = error.errors()[0]
            raise self._failure(
                f"{'.'.join(map(str, fault['loc']))} of its documents: {fault['msg']}"
            ) from None
        if metadata.issuer != self.issuer:
            raise self._failure("its discovery document names another issuer")
        return metadata, KeySet([key for entry in found.keys if (key := _key_of(entry)) is not None])

    async def _get(self, url: str) -> bytes:
        try:
            return (await self._outbound.get(url, deadline=_DEADLINE, limit=_LIMIT)).require_ok()
        except FetchError as error:
            raise self._failure(error.detail) from None

    async def _post(self, url: str, content: bytes, headers: Mapping[str, str]) -> Answer:
        try:
            return await self._outbound.post(
                url, content=content, headers=headers, deadline=_DEADLINE, limit=_LIMIT
            )
        except FetchError as error:
            raise self._failure(error.detail) from None

    def _failure(self, what: str) -> ProviderFailed:
        return ProviderFailed(
            f"{self.name}: {printable(what)}", remedy="sign in by mail, or tell the pool's operator"
        )


class _Userinfo(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, hide_input_in_errors=True)

    sub: str
    email: str | None = None
    email_verified: Any = None


def _key_of(entry: Mapping[str, Any]) -> Key | None:
    """A key for signatures; None for one that is for something else, or that we do not know."""
    if entry.get("kty") not in ("RSA", "EC", "OKP") or entry.get("use", "sig") != "sig":
        return None
    try:
        return JWKRegistry.import_key(dict(entry))
    except (JoseError, ValueError, TypeError, KeyError):
        return None
