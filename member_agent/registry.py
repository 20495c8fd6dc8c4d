"""The agent's conversation with its registry: JSON documents over HTTPS, each with a deadline."""

import base64
import contextlib
import ipaddress
import re
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import TypeAdapter, ValidationError

from member_agent.errors import AgentError, ExitStatus
from member_agent.sockets import is_local
from nts_core.control import (
    AgentReport,
    Assignment,
    JoinAnswer,
    JoinRequest,
    ProofAnswer,
    ProofRequest,
    RejoinChallenge,
    RejoinQuestion,
    RejoinRequest,
    join_statement,
    rejoin_statement,
)

_TIMEOUT = 10.0
# An assignment holds a certificate chain and a few names; more is not ours.
_MAX_ANSWER = 256 * 1024
_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,200}")
_NONCE = re.compile(r"[A-Za-z0-9._=-]{1,200}")
_T = TypeVar("_T")


class RegistryError(AgentError):
    """The registry is out of reach or refuses. `code` is its stable code, None when it did not answer."""

    def __init__(self, message: str, remedy: str, code: str | None = None) -> None:
        super().__init__(message, remedy, ExitStatus.REGISTRY)
        self.code = code

    @property
    def is_final(self) -> bool:
        """Whether asking again cannot help."""
        return self.code in {"removed", "unauthenticated", "token-expired", "token-used", "forbidden"}


def check_url(url: str) -> str:
    """The registry's address without a slash at its end. Plain HTTP is for loopback only: tokens travel."""
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        is_loopback = parts.hostname == "localhost" or _is_loopback(parts.hostname or "")
        is_safe = parts.scheme == "https" or (parts.scheme == "http" and is_loopback)
        if (
            parts.hostname
            and is_safe
            and parts.port != 0
            and url.isascii()
            and url.isprintable()
            and " " not in url
        ):
            return url.rstrip("/")
    raise AgentError(
        f"{url} is not an https:// address", "use the address that the registration shows", ExitStatus.USAGE
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Registry:
    """A registry, asked with one token. `ca` replaces the system's roots."""

    def __init__(self, url: str, token: str, ca: Path | None = None) -> None:
        self._url = check_url(url)
        if not _TOKEN.fullmatch(token):
            # Not shown: what was meant as a token is a secret, whatever is wrong with it.
            raise AgentError("the token has characters that no token has", "copy it whole", ExitStatus.USAGE)
        self._token = token
        self._kept: httpx.AsyncClient | None = None
        try:
            # Once: a later call must not depend on files, or on descriptors to read them.
            self._tls = httpx.create_ssl_context(verify=str(ca) if ca else True)
        except (OSError, ValueError) as error:
            raise AgentError(f"--ca {ca}: {error}", "give a PEM file", ExitStatus.CONFIGURATION) from None

    async def __aenter__(self) -> Self:
        """Keep the connection between reports that follow each other within seconds."""
        self._kept = self._client(None)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._kept is not None:
            await self._kept.aclose()
            self._kept = None

    async def join(self, key: Ed25519PrivateKey, agent: str) -> JoinAnswer:
        public = base64.b64encode(key.public_key().public_bytes_raw()).decode()
        statement = join_statement(token=self._token, public_key=public)
        signature = base64.b64encode(key.sign(statement)).decode()
        return await self._post("/v1/agent/join", JoinRequest(public, agent, signature), JoinAnswer)

    async def rejoin(self, key: Ed25519PrivateKey, *, pool: str, server: str) -> str:
        """A new token by the key that joined, when the old one is good no more; used from now on."""
        challenge = await self._post("/v1/agent/rejoin-challenge", RejoinQuestion(server), RejoinChallenge)
        if not _NONCE.fullmatch(challenge.nonce):
            raise RegistryError("the registry's challenge is not one", "ask the pool's operator")
        statement = rejoin_statement(pool=pool, server=server, nonce=challenge.nonce)
        signature = base64.b64encode(key.sign(statement)).decode()
        request = RejoinRequest(server, challenge.nonce, signature)
        answer = await self._post("/v1/agent/rejoin", request, JoinAnswer)
        if not _TOKEN.fullmatch(answer.token) or (answer.pool, answer.server) != (pool, server):
            raise RegistryError("the registry's answer is for another server", "ask the pool's operator")
        self._token = answer.token
        return answer.token

    async def sync(self, report: AgentReport) -> Assignment:
        """Report, and learn what the registry wants."""
        return await self._post("/v1/agent/sync", report, Assignment)

    async def request_proof(self, address: str) -> str:
        """The nonce to sign for an address; the call leaves from the address itself where the host has it."""
        answer = await self._post("/v1/agent/proof", ProofRequest(address), ProofAnswer, source=address)
        if not _TOKEN.fullmatch(answer.nonce):
            raise RegistryError("the registry's nonce is not one", "ask the pool's operator")
        return answer.nonce

    def _client(self, local: str | None) -> httpx.AsyncClient:
        transport = httpx.AsyncHTTPTransport(verify=self._tls, local_address=local)
        return httpx.AsyncClient(transport=transport, timeout=_TIMEOUT, trust_env=False)

    async def _post(self, path: str, document: object, kind: type[_T], source: str | None = None) -> _T:
        local = source if source is not None and is_local(source) else None
        try:
            async with contextlib.AsyncExitStack() as stack:
                client = self._kept if local is None else None
                if client is None:
                    client = await stack.enter_async_context(self._client(local))
                request = client.stream(
                    "POST",
                    self._url + path,
                    content=TypeAdapter(type(document)).dump_json(document),
                    headers={
                        "Authorization": f"Bearer {self._token}",
                        "Content-Type": "application/json",
                    },
                )
                response = await stack.enter_async_context(request)
                body = await _read(response)
        except (httpx.HTTPError, OSError) as error:
            raise RegistryError(
                f"the registry {self._url} does not answer: {str(error) or type(error).__name__}",
                "check the registry's address, its certificate (--ca) and the network; a running agent tries"
                " again by itself",
            ) from None
        if response.status_code >= httpx.codes.BAD_REQUEST:
            raise _refusal(response.status_code, body)
        try:
            return TypeAdapter(kind).validate_json(body)
        except ValidationError:
            raise RegistryError(
                "the registry's answer is not understood",
                "update pool-agent, or check the registry's address",
            ) from None


async def _read(response: httpx.Response) -> bytes:
    body = bytearray()
    async for piece in response.aiter_bytes():
        body += piece
        if len(body) > _MAX_ANSWER:
            raise RegistryError("the registry's answer is too long", "check the registry's address")
    return bytes(body)


def _refusal(status: int, body: bytes) -> RegistryError:
    """A problem document (RFC 9457) as an error; anything else by its status."""
    try:
        problem = TypeAdapter(dict[str, Any]).validate_json(body)
    except ValidationError:
        problem = {}
    detail = str(problem.get("detail") or f"HTTP status {status}")[:500]
    remedy = str(problem.get("remedy") or "try again later, or ask the pool's operator")[:500]
    code = problem.get("code")
    return RegistryError(f"the registry refuses: {detail}", remedy, str(code) if code else None)
