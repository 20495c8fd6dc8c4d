"""The agent's conversation with its registry: JSON documents over HTTPS, each with a deadline."""

import base64
import contextlib
import ipaddress
import re
import ssl
from dataclasses import dataclass
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import TypeAdapter, ValidationError

from member_agent.errors import AgentError, ExitStatus
from member_agent.sockets import is_local
from nts_core.control import (
    AgentReport,
    Assignment,
    CheckAnswer,
    Finding,
    JoinAnswer,
    JoinRequest,
    ProofAnswer,
    ProofRequest,
    RejoinChallenge,
    RejoinQuestion,
    RejoinRequest,
    ServerStatus,
    join_statement,
    rejoin_statement,
)
from nts_core.errors import printable
from nts_core.https import Answer, Client, TooLong

_log = structlog.get_logger()
_TIMEOUT = 10.0
# A look from outside takes up to 20 s.
_CHECK_TIMEOUT = 40.0
# An assignment holds a certificate chain and a few names; more is not ours.
_MAX_ANSWER = 256 * 1024
_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,200}")
_NONCE = re.compile(r"[A-Za-z0-9._=-]{1,200}")
# Fields that a registry sends and we do not know: so many are named, by so many characters.
_MAX_UNFORESEEN, _MAX_NAME = 16, 64
_T = TypeVar("_T")
_adapters: dict[Any, TypeAdapter[Any]] = {}


@dataclass(frozen=True, slots=True)
class _Window:
    id: int
    starts_at: datetime
    ends_at: datetime
    cancelled_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class _Windows:
    """The maintenance of a server, the newest first."""

    items: tuple[_Window, ...]


class RegistryError(AgentError):
    """The registry is out of reach or refuses. `code` is its stable code, None when it did not answer; `retry_after` the
    seconds for which it does not want to be asked again.
    """

    def __init__(
        self, message: str, remedy: str, code: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message, remedy, ExitStatus.REGISTRY)
        self.code = code
        self.retry_after = retry_after

    @property
    def is_final(self) -> bool:
        """Whether asking again cannot help: the server is out, or the registry does not know us any more."""
        return self.has_left or self.code in {"unauthenticated", "token-expired", "token-used", "forbidden"}

    @property
    def has_left(self) -> bool:
        """Whether the server has left its pool."""
        return self.code == "removed"


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
        self.url = check_url(url)
        if not _TOKEN.fullmatch(token):
            # Not shown: what was meant as a token is a secret, whatever is wrong with it.
            raise AgentError("the token has characters that no token has", "copy it whole", ExitStatus.USAGE)
        self._token = token
        try:
            # Once: a later call must not depend on files, or on descriptors to read them.
            tls = ssl.create_default_context(cafile=str(ca) if ca else None)
        except (OSError, ValueError) as error:
            raise AgentError(f"--ca {ca}: {error}", "give a PEM file", ExitStatus.CONFIGURATION) from None
        self._unforeseen: set[str] = set()
        self._client = Client(self.url, tls, max_answer=_MAX_ANSWER)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._client.close()

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

    async def request_proof(self, address: str, by: str) -> str:
        """The nonce to sign for an address, answered by "http" or "tls".

        The call leaves from the address itself where the host has it.
        """
        answer = await self._post("/v1/agent/proof", ProofRequest(address, by), ProofAnswer, source=address)
        if not _TOKEN.fullmatch(answer.nonce):
            raise RegistryError("the registry's nonce is not one", "ask the pool's operator")
        return answer.nonce

    async def status(self, server: str) -> ServerStatus:
        """How it stands with our server."""
        return await self._call("GET", f"/v1/servers/{server}", None, ServerStatus)

    async def renew(self, server: str) -> ServerStatus:
        """Have a certificate ordered now."""
        return await self._call("POST", f"/v1/servers/{server}/renewal", {}, ServerStatus)

    async def check(self, server: str) -> tuple[Finding, ...]:
        """What our server looks like from outside."""
        path = f"/v1/servers/{server}/check"
        return (await self._call("POST", path, {}, CheckAnswer, timeout=_CHECK_TIMEOUT)).findings

    async def pause(self, server: str, until: datetime, reason: str) -> None:
        """Announce maintenance that begins now."""
        body = {"ends_at": until.isoformat(), "reason": reason}
        await self._call("POST", f"/v1/servers/{server}/maintenance", body, dict[str, Any])

    async def resume(self, server: str, now: datetime) -> int:
        """End all maintenance that is under way; how many windows that were."""
        path = f"/v1/servers/{server}/maintenance"
        page = await self._call("GET", path, None, _Windows)
        open_now = [
            window
            for window in page.items
            if window.cancelled_at is None and window.starts_at <= now < window.ends_at
        ]
        for window in open_now:
            await self._call("DELETE", f"{path}/{window.id}", None, dict[str, Any])
        return len(open_now)

    async def leave(self, server: str, at: datetime, reason: str) -> ServerStatus:
        """Leave the pool: out of its answers now, and for good at that time."""
        body = {"at": at.isoformat(), "reason": reason}
        return await self._call("POST", f"/v1/servers/{server}/leaving", body, ServerStatus)

    async def stay(self, server: str) -> ServerStatus:
        """Take `leave` back."""
        return await self._call("DELETE", f"/v1/servers/{server}/leaving", None, ServerStatus)

    async def _post(self, path: str, document: object, kind: type[_T], source: str | None = None) -> _T:
        """Between registry and agent everything is foreseen: a field that is not has no effect, and is logged."""
        return await self._call("POST", path, document, kind, source=source, is_closed=True)

    async def _call(
        self,
        method: str,
        path: str,
        document: object,
        kind: type[_T],
        *,
        source: str | None = None,
        timeout: float = _TIMEOUT,
        is_closed: bool = False,
    ) -> _T:
        local = source if source is not None and is_local(source) else None
        try:
            answer = await self._client.request(
                method,
                path,
                body=None if document is None else _adapter(type(document)).dump_json(document),
                headers={"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"},
                timeout=timeout,
                source=local,
            )
        except TooLong:
            raise RegistryError("the registry's answer is too long", "check the registry's address") from None
        except OSError as error:
            raise RegistryError(
                f"the registry {self.url} does not answer: {str(error) or type(error).__name__}",
                "check the registry's address, its certificate (--ca) and the network; a running agent tries"
                " again by itself",
            ) from None
        if answer.status >= HTTPStatus.BAD_REQUEST:
            raise _refusal(answer)
        try:
            if is_closed:
                return self._read_closed(answer.body, kind)
            understood: _T = _adapter(kind).validate_json(answer.body)
        except ValidationError:
            raise RegistryError(
                "the registry's answer is not understood",
                "update pool-agent, or check the registry's address",
            ) from None
        return understood

    def _read_closed(self, body: bytes, kind: type[_T]) -> _T:
        """Raises ValidationError. A newer registry may know fields that we do not: they are passed over, and named."""
        adapter = _adapter(kind)
        try:
            understood: _T = adapter.validate_json(body, extra="forbid")
        except ValidationError as error:
            understood = adapter.validate_json(body)
            self._name_unforeseen(error)
        return understood

    def _name_unforeseen(self, error: ValidationError) -> None:
        if len(self._unforeseen) >= _MAX_UNFORESEEN:
            return
        for fault in error.errors(include_url=False, include_context=False, include_input=False):
            name = printable(".".join(part for part in fault["loc"] if isinstance(part, str)))[:_MAX_NAME]
            if len(self._unforeseen) < _MAX_UNFORESEEN and name not in self._unforeseen:
                self._unforeseen.add(name)
                _log.warning(
                    "field_not_foreseen",
                    registry=self.url,
                    field=name,
                    remedy="it has no effect; update pool-agent",
                )


def _adapter(kind: Any) -> TypeAdapter[Any]:
    """What reads and writes one kind of document. It takes milliseconds to make, so it is kept."""
    if kind not in _adapters:
        _adapters[kind] = TypeAdapter(kind)
    return _adapters[kind]


def _refusal(answer: Answer) -> RegistryError:
    """A problem document (RFC 9457) as an error; anything else by its status."""
    try:
        problem = _adapter(dict[str, Any]).validate_json(answer.body)
    except ValidationError:
        problem = {}
    detail = str(problem.get("detail") or f"HTTP status {answer.status}")[:500]
    remedy = str(problem.get("remedy") or "try again later, or ask the pool's operator")[:500]
    code = problem.get("code")
    return RegistryError(
        f"the registry refuses: {detail}", remedy, str(code) if code else None, answer.retry_after
    )
