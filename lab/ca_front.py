"""What a real CA does and Pebble does not: a front before it that looks at CAA, limits rates, lets an account revoke by
its authorizations, and fails as it is told.

It speaks HTTPS with Pebble's own front certificate and passes requests on with the Host by which it was called, so that
all URLs are its own. What Pebble answers it keeps in mind: whose order, for which name, by which challenge. Signatures
are Pebble's to check; the front acts on what a request claims.
"""

import asyncio
import base64
import json
import math
import ssl
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from enum import StrEnum
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import Encoding

from lab.caa import Issuer, refusal
from lab.pebble import Pebble
from lab.processes import free_port
from lab.threads import InThread
from lab.web import WebServer, http

_DEADLINE = 10.0
_DRIP = 0.05  # seconds between two octets
_LATER = 120  # what faults say in Retry-After, in seconds
_ERROR = "urn:ietf:params:acme:error:"


class Resource(StrEnum):
    """Where a request goes: the first part of its path at Pebble."""

    DIRECTORY = "dir"
    NEW_NONCE = "nonce-plz"
    NEW_ACCOUNT = "sign-me-up"
    NEW_ORDER = "order-plz"
    ORDER = "my-order"
    AUTHORIZATION = "authZ"
    CHALLENGE = "chalZ"
    FINALIZE = "finalize-order"
    CERTIFICATE = "certZ"
    REVOCATION = "revoke-cert"


class Fault(StrEnum):
    """How a resource fails while it is told to."""

    DOWN = "the connection is closed without an answer"
    SLOW_HEAD = "a header that comes octet by octet and never ends"
    SLOW_BODY = "a body that comes octet by octet, longer than anybody can wait"
    ENDLESS = "a body without an end"
    LIMITED = "429 with Retry-After in seconds"
    LIMITED_UNTIL = "429 with Retry-After as a date"
    UNAVAILABLE = "503 in plain text with Retry-After"
    BROKEN = "500 with a problem document"
    BAD_JSON = "200 with half of a JSON document"
    HTML = "200 with a web page"
    FORBIDDEN = "403 with a web page, as a proxy before the CA gives it"
    UNDECIDED = "an order stays pending, and a finalized one in process"
    OTHER_KEY = "a chain for the right name and another key"
    OTHER_NAME = "a chain for the right key and another name"
    LOST = "the request is done, and its answer never comes"


@dataclass(frozen=True, slots=True)
class Limit:
    """A bucket of so many, which gets one back every `refill` seconds."""

    size: int
    refill: float


@dataclass(frozen=True, slots=True)
class Limits:
    """Let's Encrypt's of 2026; a registered domain is taken to have two labels."""

    domain: Limit = Limit(50, 12_120)  # new certificates
    name: Limit = Limit(5, 122_400)  # certificates of the same names
    orders: Limit = Limit(300, 36)  # of one account
    failures: Limit = Limit(5, 720)  # validations of one account and name


class _Buckets:
    """Many buckets of one limit, by the time at which each would be full again."""

    def __init__(self, limit: Limit) -> None:
        self._limit = limit
        self._full_at: defaultdict[object, float] = defaultdict(lambda: -math.inf)

    def wait(self, key: object, now: float) -> float:
        """Seconds until there is one to take."""
        return max(0.0, self._full_at[key] - now - (self._limit.size - 1) * self._limit.refill)

    def take(self, key: object, now: float) -> None:
        self._full_at[key] = max(self._full_at[key], now) + self._limit.refill


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def url(self) -> str:
        return f"https://{self.headers['host']}{self.path}"

    @property
    def resource(self) -> Resource | None:
        first = urlsplit(self.path).path.split("/")[1]
        return Resource(first) if first in set(Resource) else None

    def signed(self, part: str) -> dict[str, Any]:
        """One part of the JWS, `protected` or `payload`; empty for a POST-as-GET."""
        if self.method != "POST":
            return {}
        text: str = json.loads(self.body)[part]
        found: dict[str, Any] = json.loads(_decoded(text) or b"{}")
        return found

    @property
    def has_payload(self) -> bool:
        return self.method == "POST" and bool(json.loads(self.body)["payload"])


@dataclass(slots=True)
class _Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def document(self) -> dict[str, Any]:
        """The JSON object; empty when it is none."""
        if "json" not in self.headers.get("content-type", ""):
            return {}
        found: dict[str, Any] = json.loads(self.body)
        return found

    def octets(self, *, is_head: bool) -> bytes:
        head = f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}\r\nConnection: close\r\n"
        head += f"Content-Length: {len(self.body)}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        return f"{head}\r\n".encode() + (b"" if is_head else self.body)


@dataclass(slots=True)
class _Order:
    url: str
    account: str
    names: frozenset[str]
    authorizations: tuple[str, ...]
    is_reusing: bool  # a valid authorization of an earlier order
    replaces: bool
    document: dict[str, Any]  # as it was told last
    is_counted: bool = False


@dataclass(slots=True)
class _Authorization:
    account: str
    name: str
    method: str | None = None  # by which control was proved, once CAA has let it
    refused: dict[str, Any] | None = None  # the problem for which it did not
    is_valid: bool = False


class CaFront(InThread):
    """A CA at `directory_url` with a CAA identity; a context manager that runs in a thread of its own.

    `resolver` answers its CAA queries. `faults` says which resources fail now and how, and may be changed at any time;
    `broken_for` holds serials of which a revocation fails; while `forgetful`, no account's authorizations are known at one.
    While `reusing`, an account gets an open order of its own again in place of another one for the same names. `asked`
    counts requests, `refusals` holds what its CAA lookups and limits refused. With `dates` its own refusals give
    Retry-After as a date. `clock` is in seconds.
    """

    def __init__(
        self,
        pebble: Pebble,
        *,
        identity: str,
        resolver: tuple[str, int],
        limits: Limits | None = None,
        dates: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__("the CA's front")
        self._pebble, self._identity, self._resolver = pebble, identity, resolver
        self._port = free_port()
        self.directory_url = f"https://127.0.0.1:{self._port}/{Resource.DIRECTORY}"
        self.ca_file = pebble.ca_file
        self.faults: dict[Resource, Fault] = {}
        self.broken_for: set[str] = set()
        self.forgetful = self.reusing = False
        self.asked: Counter[Resource] = Counter()
        self.refusals: list[str] = []
        self._dates, self._clock = dates, clock
        limits = limits or Limits()
        self._domains, self._names = _Buckets(limits.domain), _Buckets(limits.name)
        self._accounts, self._failures = _Buckets(limits.orders), _Buckets(limits.failures)
        self._issued: set[frozenset[str]] = set()
        self._orders: dict[str, _Order] = {}  # by their own URLs and those to finalize them
        self._authorizations: dict[str, _Authorization] = {}
        self._challenges: dict[str, tuple[str, dict[str, Any]]] = {}  # with their authorizations
        self._csr: x509.CertificateSigningRequest | None = None
        self._revoked: set[str] = set()  # serials of what Pebble would not revoke

    def certificate_status(self, serial: str) -> str:
        """Either Valid or Revoked for a serial in hex."""
        return "Revoked" if serial in self._revoked else self._pebble.certificate_status(serial)

    @property
    def orders(self) -> int:
        """How many the CA has made."""
        return len({order.url for order in self._orders.values()})

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(self._pebble.directory / "front.pem", self._pebble.directory / "front.key")
        trust = ssl.create_default_context(cafile=str(self.ca_file))
        async with (
            httpx.AsyncClient(verify=trust, timeout=_DEADLINE, trust_env=False) as self._client,
            WebServer(self._serve, port=self._port, tls=tls) as self._web,
        ):
            yield

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await _read(self._web.heads[-1], reader)
        resource = request.resource
        if resource is not None:
            self.asked[resource] += 1
        fault = None if resource is None else self.faults.get(resource)
        if fault in _TALES:
            await _TALES[fault](writer)
        elif fault in _ANSWERS:
            writer.write(_ANSWERS[fault]())
        else:
            answer = await self._refuse(request) or await self._pass_on(request)
            if fault is Fault.LOST:
                await _close(writer)
                return
            self._spoil(answer, fault)
            writer.write(answer.octets(is_head=request.method == "HEAD"))
        await writer.drain()

    async def _pass_on(self, request: _Request) -> _Answer:
        kept = {name: request.headers[name] for name in ("host", "content-type") if name in request.headers}
        base = f"https://{urlsplit(self._pebble.directory_url).netloc}"
        try:
            got = await self._client.request(
                request.method, base + request.path, headers=kept, content=request.body
            )
        except httpx.TransportError:
            return _Answer(HTTPStatus.BAD_GATEWAY, {"content-type": "text/plain"}, b"bad gateway")
        wanted = ("content-type", "location", "link", "replay-nonce", "retry-after")
        answer = _Answer(
            got.status_code, {name: got.headers[name] for name in wanted if name in got.headers}, got.content
        )
        if got.is_success:
            self._learn(request, answer)
        elif (
            request.resource is Resource.REVOCATION and answer.document.get("type") == f"{_ERROR}unauthorized"
        ):
            return await self._revoke(request) or answer
        return answer

    async def _revoke(self, request: _Request) -> _Answer | None:
        """What another account ordered, for one with authorizations for all names in it (RFC 8555 section 7.6).

        Pebble has checked the signature and found the certificate by now, and leaves this to be done.
        """
        leaf = _leaf(request)
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        held = {
            one.name
            for one in self._authorizations.values()
            if one.is_valid and not self.forgetful and one.account == request.signed("protected").get("kid")
        }
        if not held.issuperset(names.get_values_for_type(x509.DNSName)):
            return None
        serial = f"{leaf.serial_number:x}"
        if serial in self._revoked:
            return await self._problem("alreadyRevoked", "it was revoked before", HTTPStatus.BAD_REQUEST)
        self._revoked.add(serial)
        return await self._answer(HTTPStatus.OK, {})

    def _learn(self, request: _Request, answer: _Answer) -> None:
        """Keep what an answer of Pebble's says, and put into it what the front knows better."""
        document = answer.document
        match request.resource:
            case Resource.DIRECTORY:
                document.setdefault("meta", {})["caaIdentities"] = [self._identity]
            case Resource.NEW_ORDER:
                self._note_order(request, answer.headers["location"], document)
            case Resource.AUTHORIZATION:
                self._note_authorization(request, document)
            case Resource.ORDER:
                order = self._orders.get(request.url)
                for url in order.authorizations if order is not None else ():
                    # An order of which one has been ended is told to be so.
                    self._authorizations[url].is_valid = document["status"] in ("ready", "valid")
                    if (refused := self._authorizations[url].refused) is not None:
                        document |= {"status": "invalid", "error": refused}
                if order is not None:
                    order.document = document
            case Resource.FINALIZE:
                self._note_issue(request, document)
        if document:
            answer.body = json.dumps(document).encode()

    def _note_order(self, request: _Request, url: str, document: Mapping[str, Any]) -> None:
        account = request.signed("protected")["kid"]
        names = frozenset(one["value"] for one in document["identifiers"])
        order = _Order(
            url,
            account,
            names,
            tuple(document["authorizations"]),
            is_reusing=any(one in self._authorizations for one in document["authorizations"]),
            replaces="replaces" in request.signed("payload"),
            document=dict(document),
        )
        self._orders |= {url: order, document["finalize"]: order}
        for one, name in zip(document["authorizations"], sorted(names), strict=False):
            self._authorizations.setdefault(one, _Authorization(account, name))
        if not order.replaces and names not in self._issued:
            self._accounts.take(account, self._clock())

    def _note_authorization(self, request: _Request, document: dict[str, Any]) -> None:
        found = self._authorizations.get(request.url)
        if found is None:
            return
        found.name = document["identifier"]["value"]
        found.is_valid = document["status"] == "valid"
        for challenge in document["challenges"]:
            self._challenges[challenge["url"]] = request.url, dict(challenge)
        if found.refused is not None:
            document["status"] = "invalid"
            for challenge in document["challenges"]:
                challenge |= {"status": "invalid", "error": found.refused}
        elif document["status"] == "invalid":
            found.refused = next((one["error"] for one in document["challenges"] if "error" in one), {})
            self._failures.take((found.account, found.name), self._clock())

    def _note_issue(self, request: _Request, document: dict[str, Any]) -> None:
        self._csr = x509.load_der_x509_csr(_decoded(request.signed("payload")["csr"]))
        order = self._orders.get(request.url)
        if order is None:
            return
        order.document = document
        if order.is_counted:
            return
        order.is_counted, now = True, self._clock()
        if not order.replaces:
            self._names.take(order.names, now)
            if order.names not in self._issued:
                for domain in _domains(order.names):
                    self._domains.take(domain, now)
        self._issued.add(order.names)

    async def _refuse(self, request: _Request) -> _Answer | None:
        """What a CA that obeys CAA and its limits answers in Pebble's place."""
        match request.resource:
            case Resource.NEW_ORDER:
                return await self._give_again(request) or await self._refuse_by_limits(request)
            case Resource.CHALLENGE if request.has_payload and request.url in self._challenges:
                url, challenge = self._challenges[request.url]
                found, method = self._authorizations[url], challenge["type"]
                why = None if found.method else await self._forbidden(found.name, found.account, method)
                if why is None:
                    found.method = method
                    return None
                found.refused = {"type": f"{_ERROR}caa", "detail": why, "status": HTTPStatus.FORBIDDEN}
                self.refusals.append(why)
                self._failures.take((found.account, found.name), self._clock())
                challenge |= {"status": "invalid", "error": found.refused}
                answer = await self._answer(HTTPStatus.OK, challenge)
                answer.headers["link"] = f'<{url}>;rel="up"'
                return answer
            case Resource.FINALIZE:
                return await self._refuse_reuse(request)
            case Resource.REVOCATION if f"{_leaf(request).serial_number:x}" in self.broken_for:
                return await self._problem(
                    "serverInternal", "the CA is broken", HTTPStatus.INTERNAL_SERVER_ERROR
                )
        return None

    async def _give_again(self, request: _Request) -> _Answer | None:
        """As Boulder: the order that is open already, but none that is to replace a certificate for which one is open."""
        if not self.reusing:
            return None
        payload, account = request.signed("payload"), request.signed("protected")["kid"]
        names = frozenset(one["value"] for one in payload["identifiers"])
        for order in self._orders.values():
            is_open = order.document["status"] in ("pending", "ready")
            if not is_open or (order.account, order.names) != (account, names):
                continue
            if order.replaces and "replaces" in payload:
                return await self._problem("alreadyReplaced", "it has been replaced", HTTPStatus.CONFLICT)
            answer = await self._answer(HTTPStatus.CREATED, order.document)
            answer.headers["location"] = order.url
            return answer
        return None

    async def _refuse_reuse(self, request: _Request) -> _Answer | None:
        """An authorization of an earlier order says nothing of CAA as it is now."""
        order = self._orders.get(request.url)
        if order is None or not order.is_reusing:
            return None
        for url in order.authorizations:
            found = self._authorizations[url]
            why = await self._forbidden(found.name, order.account, found.method)
            if why is not None:
                return await self._problem("caa", f"Error finalizing order :: {why}", HTTPStatus.FORBIDDEN)
        return None

    async def _forbidden(self, name: str, account: str, method: str | None) -> str | None:
        return await refusal(self._resolver, name, Issuer(self._identity, account, method))

    async def _refuse_by_limits(self, request: _Request) -> _Answer | None:
        payload, account, now = request.signed("payload"), request.signed("protected")["kid"], self._clock()
        names = frozenset(one["value"] for one in payload["identifiers"])
        waits = {f"failed authorizations for {n}": self._failures.wait((account, n), now) for n in names}
        if "replaces" not in payload:
            waits["certificates already issued for this exact set of names"] = self._names.wait(names, now)
            if names not in self._issued:
                waits["new orders from this account"] = self._accounts.wait(account, now)
                waits |= {
                    f"certificates already issued for {d}": self._domains.wait(d, now)
                    for d in _domains(names)
                }
        what = max(waits, key=lambda each: waits[each])
        if not (wait := waits[what]):
            return None
        until = datetime.fromtimestamp(math.ceil(now + wait), UTC)
        detail = f"too many {what}, retry after {until:%Y-%m-%d %H:%M:%S} UTC"
        answer = await self._problem("rateLimited", detail, HTTPStatus.TOO_MANY_REQUESTS)
        answer.headers["retry-after"] = _date(until) if self._dates else str(math.ceil(wait))
        return answer

    async def _problem(self, code: str, detail: str, status: HTTPStatus) -> _Answer:
        self.refusals.append(detail)
        answer = await self._answer(status, {"type": _ERROR + code, "detail": detail, "status": status})
        answer.headers["content-type"] = "application/problem+json"
        return answer

    async def _answer(self, status: HTTPStatus, document: Mapping[str, Any]) -> _Answer:
        """An answer of the front's own, with one of Pebble's nonces."""
        fresh = await self._pass_on(_Request("HEAD", f"/{Resource.NEW_NONCE}", {}, b""))
        headers = {"content-type": "application/json", "replay-nonce": fresh.headers["replay-nonce"]}
        return _Answer(status, headers, json.dumps(document).encode())

    def _spoil(self, answer: _Answer, fault: Fault | None) -> None:
        """Faults that need Pebble's own answer."""
        document = answer.document
        if fault is Fault.UNDECIDED and "authorizations" in document:
            document["status"] = "processing" if document["status"] == "valid" else "pending"
            document.pop("certificate", None)
            answer.body = json.dumps(document).encode()
        elif fault in (Fault.OTHER_KEY, Fault.OTHER_NAME) and answer.status == HTTPStatus.OK:
            assert self._csr is not None, "an order was finalized before"
            answer.body = _chain(self._csr, fault).encode()


def _leaf(request: _Request) -> x509.Certificate:
    """What a revocation is asked for."""
    return x509.load_der_x509_certificate(_decoded(request.signed("payload")["certificate"]))


def _chain(csr: x509.CertificateSigningRequest, fault: Fault) -> str:
    """A certificate by nobody in particular for what was asked, but for one thing."""
    key = ec.generate_private_key(ec.SECP256R1())
    asked, names = csr.public_key(), csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert isinstance(asked, EllipticCurvePublicKey)
    if fault is Fault.OTHER_NAME:
        names = x509.SubjectAlternativeName([x509.DNSName("mallory.example")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a CA gone astray")]))
        .public_key(asked if fault is Fault.OTHER_NAME else key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=6))
        .add_extension(names, critical=True)
        .sign(key, hashes.SHA256())
    )
    return made.public_bytes(Encoding.PEM).decode()


async def _read(head: str, reader: asyncio.StreamReader) -> _Request:
    """A request whose head has come, with its body."""
    first, *lines = head.split("\r\n")
    method, path, _ = first.split(" ")
    fields = (line.partition(":") for line in lines if line)
    headers = {name.lower(): value.strip() for name, _, value in fields}
    return _Request(method, path, headers, await reader.readexactly(int(headers.get("content-length", "0"))))


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def _drip_head(writer: asyncio.StreamWriter) -> None:
    await _drip(writer, b"HTTP/1.1 200 OK\r\nX-Slow: ")


async def _drip_body(writer: asyncio.StreamWriter) -> None:
    await _drip(writer, b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")


async def _drip(writer: asyncio.StreamWriter, beginning: bytes) -> None:
    writer.write(beginning)
    while not writer.is_closing():
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(_DRIP)


async def _pour(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
    while not writer.is_closing():
        writer.write(b" " * 65_536)
        await writer.drain()
        # Or this would never hear that the client has gone.
        await asyncio.sleep(0)


_TALES = {
    Fault.DOWN: _close,
    Fault.SLOW_HEAD: _drip_head,
    Fault.SLOW_BODY: _drip_body,
    Fault.ENDLESS: _pour,
}


def _problem(code: str, detail: str) -> bytes:
    return json.dumps({"type": _ERROR + code, "detail": detail}).encode()


def _limited(retry_after: str) -> bytes:
    body = _problem("rateLimited", "too many requests of this kind")
    return http("429 Too Many Requests", body, f"Retry-After: {retry_after}\r\n")


_ANSWERS: dict[Fault, Callable[[], bytes]] = {
    Fault.LIMITED: lambda: _limited(str(_LATER)),
    Fault.LIMITED_UNTIL: lambda: _limited(_date(datetime.now(UTC) + timedelta(seconds=_LATER))),
    Fault.UNAVAILABLE: lambda: http(
        "503 Service Unavailable",
        b"the CA is under maintenance",
        f"Content-Type: text/plain\r\nRetry-After: {_LATER}\r\n",
    ),
    Fault.BROKEN: lambda: http("500 Internal Server Error", _problem("serverInternal", "the CA is broken")),
    Fault.FORBIDDEN: lambda: http(
        "403 Forbidden", b"<html>blocked by the firewall</html>", "Content-Type: text/html\r\n"
    ),
    Fault.BAD_JSON: lambda: http("200 OK", b'{"status": "val', "Content-Type: application/json\r\n"),
    Fault.HTML: lambda: http("200 OK", b"<html>Welcome to the hotel</html>", "Content-Type: text/html\r\n"),
}


def _domains(names: frozenset[str]) -> set[str]:
    return {".".join(name.split(".")[-2:]) for name in names}


def _date(moment: datetime) -> str:
    return format_datetime(moment, usegmt=True)


def _decoded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
