"""An account at a CA (RFC 8555), HTTP-01, TLS-ALPN-01 and DNS-01: the one module that imports acme and josepy.

A pure adapter without a database: each call names its resource by URL, so that a process may die
between any two calls and another goes on. The caller journals what is returned and does the polling.

Whoever opens the account holds its key. In the registry only `poolsvc.acme_process` does so while it runs;
everything else there calls it through `poolsvc.acme_client`. An agent has an account by its own choice alone.
"""

import asyncio
import base64
import datetime as dt
import fcntl
import hashlib
import io
import json
import math
import os
import re
import ssl
import stat
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from enum import IntEnum, StrEnum
from functools import partial, wraps
from pathlib import Path
from typing import Any, BinaryIO, Concatenate, ParamSpec, Self, TypeVar, cast
from urllib.parse import urlsplit

import requests
import urllib3
from acme import client, errors, messages
from acme.jws import JWS
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from josepy.errors import Error as JoseError
from josepy.jwa import ES256, HS256
from josepy.jwk import JWKEC, JWKOct
from requests.adapters import HTTPAdapter
from urllib3.util.ssl_ import create_urllib3_context

from nts_core.certificates import (
    ChainError,
    CsrError,
    check_csr,
    csr_key_sha256,
    key_sha256,
    load_chain,
)
from nts_core.errors import printable
from nts_core.shell import sync

NONCE_RETRIES = 8  # of one request whose nonce is refused; the stock client makes one
LONGEST_WAIT = dt.timedelta(days=7).total_seconds()
MAX_ANSWER = 256 * 1024  # octets of one body, decoded; a chain has a few thousand
# Between looks at a certificate's renewal information (RFC 9773 section 4.3.2), whatever the CA says.
RENEWAL_LOOKS = (60.0, dt.timedelta(days=1).total_seconds())
RENEWAL_LOOK = dt.timedelta(hours=6).total_seconds()  # when it says nothing
# Names that Let's Encrypt gave to profiles.
TLS_SERVER = "tlsserver"
SHORT_LIVED = "shortlived"

# Refusals that no repetition of the same request can turn, when they come with a 4xx status.
_PERMANENT = {
    "badCSR",
    "badPublicKey",
    "badRevocationReason",
    "badSignatureAlgorithm",
    "externalAccountRequired",
    "invalidContact",
    "invalidProfile",
    "rejectedIdentifier",
    "unsupportedContact",
    "unsupportedIdentifier",
}
# Refusals that may be meant for a wish in an order that the CA does not owe us; their use differs between CAs.
_NO_REPLACEMENT = {"alreadyReplaced", "malformed", "unauthorized"}
_NO_PROFILE = {"invalidProfile", "malformed", "unauthorized"}
_SECRET_LIMIT = 65_536
_POLL = dt.timedelta(seconds=0.02)
_MAX_POLL = dt.timedelta(seconds=30)
_ENDED = {"deactivated", "expired", "revoked"}
_P = ParamSpec("_P")
_T = TypeVar("_T")
_A = TypeVar("_A", bound="AcmeAccount")


class AcmeError(Exception):
    """A CA that is away or refuses.

    `code` is the last part of the ACME problem type, or "unreachable" (no answer), "rate-limited" (429 or
    rateLimited), "server-error" (5xx, serverInternal, or an answer that is not ACME), "account-key",
    "no-challenge" (none of the kind that is wanted), "refused" (by the process that holds the key). `retry_after` is in
    seconds, `status` the HTTP status. `permanent`: the same request will never be accepted. CAs use codes differently,
    so show `detail`, the CA's own words.
    """

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        retry_after: float | None = None,
        permanent: bool = False,
        status: int | None = None,
    ) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail
        self.retry_after = retry_after
        self.permanent = permanent
        self.status = status

    @property
    def is_refusal(self) -> bool:
        """Whether the CA understood and said no, in contrast to being away, busy or broken."""
        return self.status is not None and 400 <= self.status < 500 and self.code != "rate-limited"


@dataclass(frozen=True, slots=True)
class AcmeConfig:
    """One CA and our account there. `contact` holds URLs (mailto:), `timeout` seconds for each call, repetitions included.

    `binding_key_id` and the key in `binding_key_file` bind the account to one that we have at the CA already.
    `profile` is asked for where the CA has one of that name.
    """

    directory_url: str
    account_key_file: Path
    binding_key_id: str | None = None
    binding_key_file: Path | None = None
    contact: tuple[str, ...] = ()
    ca_file: Path | None = None
    user_agent: str = "truechimer"
    profile: str = TLS_SERVER
    timeout: int = 30


@dataclass(frozen=True, slots=True)
class Terms:
    """What a CA says of itself in its directory (RFC 8555 section 7.1.1); nothing where it does not say."""

    terms_of_service: str | None
    caa_identities: tuple[str, ...]
    profiles: tuple[str, ...]
    account_binding: bool


async def read_terms(config: AcmeConfig) -> Terms:
    """Ask the CA for its directory and a nonce, without an account. Raises AcmeError."""
    return await asyncio.to_thread(_read_terms, config)


async def roll_account_key(config: AcmeConfig) -> str:
    """Give the account a new key (RFC 8555 section 7.3.5) and put it into the file; the account's URI.

    The new key is on disk, beside the file and named `.new`, before the CA hears of it. A call that died goes
    on where it was: the CA says which of the two keys it knows. Raises AcmeError; one of the files then holds
    the account's key.
    """
    return await asyncio.to_thread(_roll_account_key, config)


@dataclass(frozen=True, slots=True)
class AccountFacts:
    """What the CA has of our account; many keep no contact, or do not show it."""

    uri: str
    contact: tuple[str, ...]
    terms: Terms


async def read_account(config: AcmeConfig) -> AccountFacts:
    """Ask the CA for the account of the key in the file, which must exist. Raises AcmeError."""
    return await asyncio.to_thread(_account_facts, config, None)


async def change_contact(config: AcmeConfig, contact: tuple[str, ...]) -> AccountFacts:
    """Give the account other contact URLs (RFC 8555 section 7.3.2). Raises AcmeError."""
    return await asyncio.to_thread(_account_facts, config, {"contact": list(contact)})


@dataclass(frozen=True, slots=True)
class RenewalInfo:
    """When the CA would have a certificate renewed (RFC 9773 section 4.2), and after how many seconds to ask again."""

    start: dt.datetime
    end: dt.datetime
    explanation_url: str | None
    retry_after: float


class Challenge(StrEnum):
    """How a CA looks whether somebody controls a name (RFC 8555 section 8, RFC 8737)."""

    HTTP_01 = "http-01"
    TLS_ALPN_01 = "tls-alpn-01"
    DNS_01 = "dns-01"


@dataclass(frozen=True, slots=True)
class PendingOrder:
    """An order as created. Without a token the authorization is valid already: go on to `finalize`.

    `key_authorization` is what has to be served by HTTP-01, and by its digest by TLS-ALPN-01; `txt` is what the TXT
    record of `_acme-challenge` has to hold by DNS-01 (section 8.4); the other one is empty. `profile` and `replaces` are what the CA has
    accepted of them.
    """

    url: str
    authorization_url: str
    challenge_url: str | None
    token: str | None
    key_authorization: str | None
    txt: str | None
    expires: dt.datetime | None
    profile: str | None
    replaces: str | None


class OrderFailed(Exception):
    """The order cannot become a certificate any more."""


def poll_wait(attempts: int) -> dt.timedelta:
    """How soon the CA is asked again about what it is working on; Pebble and Boulder take about a second."""
    return min(_POLL * (1 << min(attempts, 10)), _MAX_POLL)


class RevocationReason(IntEnum):
    """Those of RFC 5280 section 5.3.1 that we give."""

    KEY_COMPROMISE = 1
    CESSATION_OF_OPERATION = 5


class OrderState(StrEnum):
    """RFC 8555 section 7.1.6."""

    PENDING = "pending"
    READY = "ready"
    PROCESSING = "processing"
    VALID = "valid"
    INVALID = "invalid"


@dataclass(frozen=True, slots=True)
class OrderStatus:
    """`error_detail` can stand beside "pending": some CAs keep a failed challenge open."""

    status: OrderState
    error_detail: str | None
    retry_after: float | None


CALLS: dict[str, Callable[..., Any]] = {}
"""What can be asked of an account: its methods with a CA behind them, as they run, by name."""


def _call(
    work: Callable[Concatenate["AcmeAccount", _P], _T],
) -> Callable[Concatenate["AcmeAccount", _P], Coroutine[Any, Any, _T]]:
    """Make a blocking method one of CALLS, and let the account decide where it runs."""
    CALLS[work.__name__] = work

    @wraps(work)
    async def call(self: "AcmeAccount", /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return await self._perform(work, *args, **kwargs)

    return call


class AcmeAccount:
    """An account at one CA, made by `open` and ended by `close`; every call raises AcmeError."""

    def __init__(
        self,
        network: "_Network",
        directory: Mapping[str, Any],
        uri: str,
        config: AcmeConfig,
        key_file: BinaryIO,
    ) -> None:
        self.uri = uri
        self._thread = ThreadPoolExecutor(1, "acme")
        self._network = network
        self._directory = directory
        self._config = config
        self._key_file = key_file

    @classmethod
    async def open(cls, config: AcmeConfig) -> Self:
        """Load or create the account key (P-256, 0600), then create the account or find it by the key.

        The key cannot be changed as long as the account is open.
        """
        thread = ThreadPoolExecutor(1, "acme")
        opening = thread.submit(_open, cls, config)
        thread.shutdown(wait=False)
        try:
            return await asyncio.wrap_future(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_abandon)
            raise

    async def _perform(
        self, work: Callable[Concatenate[Any, _P], _T], /, *args: _P.args, **kwargs: _P.kwargs
    ) -> _T:
        """Run a call in the account's own thread, which is its lock also when the waiting task is cancelled."""
        try:
            future = self._thread.submit(partial(work, self, *args, **kwargs))
        except RuntimeError as error:
            raise AcmeError("unreachable", "the account was closed") from error
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise AcmeError("unreachable", "the account was closed") from None

    @property
    def lost(self) -> bool:
        """Whether the CA has said that it knows no such account: open it again (a CA that lost its data)."""
        return self._network.lost

    def close(self) -> None:
        """Give the thread and the connections back; a call under way ends by its own deadline."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._network.session.close()
        self._key_file.close()

    @_call
    def read_directory(self) -> Terms:
        """Read the CA's directory again, in which addresses and profiles change."""
        self._directory = _read_directory(self._network, self._config)
        return _terms_of(self._directory)

    @_call
    def order(
        self,
        csr_pem: str,
        domain: str,
        *,
        challenge: Challenge = Challenge.HTTP_01,
        short_lived: bool = False,
        replaces: str | None = None,
    ) -> PendingOrder:
        """Create an order for `domain` after `check_csr` (CsrError); a CA may return an order it has open.

        `short_lived` prefers the profile of that name. `replaces` is the identifier of the certificate before
        (`certificate_id`). A CA that refuses one of these wishes, or breaks over `replaces`, is asked again without it.
        """
        check_csr(csr_pem, domain)
        self._check_key(csr_pem)
        request = _order_of(domain)
        if (profile := self._choose_profile(short_lived=short_lived)) is not None:
            request["profile"] = profile
        if replaces is not None and self._renewal_info_url is not None:  # RFC 9773 section 5
            request["replaces"] = replaces
        return self._place(request, challenge)

    @_call
    def authorize(self, domain: str, challenge: Challenge) -> PendingOrder:
        """Create an order for `domain` that nobody finalizes: who proves control of a name may revoke (section 7.6)."""
        return self._place(_order_of(domain), challenge)

    def _place(self, request: dict[str, Any], kind: Challenge) -> PendingOrder:
        response = self._create(request)
        order = _object(response)
        url, authorization_url = _location(response), _authorization_url(order)
        authorization, _ = self._fetch(authorization_url)
        status = authorization.get("status")
        expires, accepted = _instant(order.get("expires")), (request.get("profile"), request.get("replaces"))
        if status == "valid":
            return PendingOrder(url, authorization_url, None, None, None, None, expires, *accepted)
        challenge = next((one for one in _challenges(authorization) if one.get("type") == kind), None)
        if challenge is None:
            raise AcmeError("no-challenge", f"the CA offers no {kind} challenge", permanent=True)
        if status != "pending":
            raise AcmeError("unauthorized", f"a new order with an authorization that is {status}")
        token = _text(challenge, "token")
        key_authorization = f"{token}.{self._network.thumbprint}"
        is_by_dns = kind is Challenge.DNS_01
        return PendingOrder(
            url,
            authorization_url,
            _text(challenge, "url"),
            token,
            None if is_by_dns else key_authorization,
            _base64url(hashlib.sha256(key_authorization.encode()).digest()) if is_by_dns else None,
            expires,
            *accepted,
        )

    def _choose_profile(self, *, short_lived: bool) -> str | None:
        """The first wish that the CA has; without any, the CA's own choice."""
        wishes = [*([SHORT_LIVED] if short_lived else []), self._config.profile]
        offered = _terms_of(self._directory).profiles
        return next((wish for wish in wishes if wish in offered), None)

    def _create(self, request: dict[str, Any]) -> requests.Response:
        """POST a new order, and take out of it what the CA refuses and does not owe us."""
        while True:
            try:
                return self._network.call(self._directory["newOrder"], request)
            except AcmeError as error:
                if (wish := _refused_wish(request, error)) is None:
                    raise
                del request[wish]

    @property
    def _renewal_info_url(self) -> str | None:
        url = self._directory.get("renewalInfo")
        return url if isinstance(url, str) else None

    @_call
    def renewal_info(self, certificate_id: str) -> RenewalInfo | None:
        """When the CA would have a certificate renewed, asked unsigned; None of a CA that does not say it."""
        if self._renewal_info_url is None:
            return None
        with _translated(), _within(self._config.timeout):
            response = self._network.get(f"{self._renewal_info_url.rstrip('/')}/{certificate_id}")
        answer = _object(response)
        window = answer.get("suggestedWindow")
        start, end = (
            _instant(window.get(name)) if isinstance(window, dict) else None for name in ("start", "end")
        )
        if start is None or end is None or end <= start:
            raise AcmeError("server-error", "the CA's renewal information has no usable window")
        why, (least, most) = answer.get("explanationURL"), RENEWAL_LOOKS
        wait = _retry_after(response)
        return RenewalInfo(
            start,
            end,
            printable(why) if isinstance(why, str) else None,
            RENEWAL_LOOK if wait is None else min(max(wait, least), most),
        )

    @_call
    def answer(self, challenge_url: str) -> None:
        """Tell the CA that the challenge can be validated; nothing happens when it was told before."""
        try:
            self._network.call(challenge_url, {})
        except AcmeError as error:
            if not error.is_refusal or self._fetch(challenge_url)[0].get("status") == "pending":
                raise

    @_call
    def poll(self, order_url: str) -> OrderStatus:
        """The order now. It counts as invalid when its authorization can no longer become valid."""
        order, wait = self._fetch(order_url)
        state, detail = _order_state(order), _problem_text(order.get("error"))
        if state not in {OrderState.PENDING, OrderState.INVALID}:
            return OrderStatus(state, detail, wait)
        try:
            authorization, authorization_wait = self._fetch(_authorization_url(order))
        except AcmeError as error:
            if state is OrderState.INVALID and error.is_refusal:  # CAs delete authorizations of the past
                return OrderStatus(state, detail, wait)
            raise
        status = authorization.get("status")
        why = next(
            filter(None, (_problem_text(one.get("error")) for one in _challenges(authorization))), None
        )
        if status not in {"pending", "valid"}:
            state, detail = OrderState.INVALID, why or detail or f"the authorization is {status}"
        return OrderStatus(state, why or detail, wait or authorization_wait)

    @_call
    def finalize(self, order_url: str, csr_pem: str) -> None:
        """Send the CSR; nothing happens when the CA has it already (processing or valid)."""
        self._check_key(csr_pem)
        order, _ = self._fetch(order_url)
        if _order_state(order) not in {OrderState.PROCESSING, OrderState.VALID}:
            csr = x509.load_pem_x509_csr(csr_pem.encode())
            self._network.call(_text(order, "finalize"), {"csr": _base64url(csr.public_bytes(Encoding.DER))})

    @_call
    def download(self, order_url: str) -> str:
        """The chain of a valid order in PEM, leaf first, and nothing but certificates."""
        order, wait = self._fetch(order_url)
        if "certificate" not in order:
            raise AcmeError("orderNotReady", f"the order is {order.get('status')}", retry_after=wait)
        response = self._network.call(_text(order, "certificate"), None)
        try:
            chain = load_chain(response.text)
        except ChainError as error:
            raise AcmeError("server-error", str(error), status=response.status_code) from error
        return "".join(certificate.public_bytes(Encoding.PEM).decode() for certificate in chain)

    @_call
    def deactivate_authorization(self, url: str) -> None:
        """End an authorization (section 7.5.2); one that is over or gone is success as well.

        Of nothing else: the same request to the account's own URL would end the account (section 7.3.6).
        """
        try:
            found, _ = self._fetch(url)
        except AcmeError as error:
            if error.status in {404, 410}:
                return
            raise
        if not {"identifier", "challenges"} <= found.keys():
            raise AcmeError("refused", f"{printable(url)} is no authorization", permanent=True)
        if found.get("status") in {"pending", "valid"}:
            self._network.call(url, {"status": "deactivated"})

    @_call
    def revoke(self, cert_pem: str, reason: RevocationReason) -> None:
        """Revoke the first certificate; revoked before is success as well."""
        leaf = load_chain(cert_pem)[0].public_bytes(Encoding.DER)
        try:
            self._network.call(
                self._directory["revokeCert"], {"certificate": _base64url(leaf), "reason": reason}
            )
        except AcmeError as error:
            if error.code != "alreadyRevoked":
                raise

    def _check_key(self, csr_pem: str) -> None:
        if csr_key_sha256(csr_pem) == self._network.key_sha256:
            raise CsrError("the key is that of the account at the CA")

    def _fetch(self, url: str) -> tuple[dict[str, Any], float | None]:
        """POST-as-GET (section 6.3): the object and its Retry-After in seconds."""
        response = self._network.call(url, None)
        return _object(response), _retry_after(response)


# Of the call that this thread makes, by the monotonic clock.
_deadline: ContextVar[float] = ContextVar("deadline", default=math.inf)


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """All that is read from the CA meanwhile is there in so many seconds, or the call fails."""
    token = _deadline.set(time.monotonic() + seconds)
    try:
        yield
    finally:
        _deadline.reset(token)


class _TimedSocket(ssl.SSLSocket):
    """Ends each read by the call's deadline: requests' own timeout begins anew with every octet of a slow CA."""

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        left = _deadline.get() - time.monotonic()
        if left <= 0:
            raise TimeoutError("the answer took too long")
        self.settimeout(min(left, self.gettimeout() or left))
        return super().recv_into(buffer, nbytes, flags)


def _timed() -> ssl.SSLContext:
    context = create_urllib3_context()
    context.sslsocket_class = _TimedSocket
    return context


class _Bounded(HTTPAdapter):
    """HTTPS in which no answer is longer than MAX_ANSWER, nor takes longer than the call may."""

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, ssl_context=_timed(), **options)

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        return super().proxy_manager_for(proxy, ssl_context=_timed(), **options)

    def send(self, request: requests.PreparedRequest, *args: Any, **options: Any) -> requests.Response:
        response = super().send(request, *args, **options)
        try:
            body = response.raw.read(MAX_ANSWER + 1, decode_content=True)
        except urllib3.exceptions.HTTPError as error:
            raise requests.ConnectionError(error, request=request) from error
        if len(body) > MAX_ANSWER:
            response.close()
            raise AcmeError(
                "server-error",
                f"an answer of more than {MAX_ANSWER} octets from {request.url}",
                status=response.status_code,
            )
        response.raw = io.BytesIO(body)
        return response


class _Network(client.ClientNetwork):
    """Signed requests: failures are AcmeError, and a refused nonce is tried again more than once.

    Nothing is signed for another host than those of the CA's own directory.
    """

    kid: str | None = None
    lost = False
    new_nonce_url = ""
    thumbprint = ""
    key_sha256 = ""
    origins: frozenset[str] = frozenset()

    def call(self, url: str, payload: Mapping[str, Any] | None) -> requests.Response:
        """POST `payload`, or POST-as-GET (section 6.3) without one."""
        if _origin(url) not in self.origins:
            raise AcmeError("server-error", f"{printable(url)} is not an address of this CA")
        data = b"" if payload is None else json.dumps(payload).encode()
        headers = {"Content-Type": self.JOSE_CONTENT_TYPE}
        with _translated(), _within(self._default_timeout):
            for attempt in range(NONCE_RETRIES + 1):
                nonce = cast("bytes", self._get_nonce(url, self.new_nonce_url))  # annotated str, is bytes
                signed = JWS.sign(data, key=self.key, alg=ES256, nonce=nonce, url=url, kid=self.kid)
                response = self._send_request("POST", url, data=signed.json_dumps(), headers=headers)
                if self.REPLAY_NONCE_HEADER in response.headers:  # refusals bring one as well
                    self._add_nonce(response)
                if response.ok:
                    return response
                error = _refusal(response)
                self.lost = self.lost or error.code == "accountDoesNotExist"
                if error.code != "badNonce" or attempt == NONCE_RETRIES:
                    raise error
        raise AssertionError  # the last attempt returned or raised

    @classmethod
    def _check_response(
        cls, response: requests.Response, content_type: str | None = None
    ) -> requests.Response:
        """For directory and nonces; the stock check loses Retry-After and the text of non-JSON answers."""
        del content_type  # checked by whoever reads the body
        if response.ok:
            return response
        raise _refusal(response)


@contextmanager
def _translated() -> Iterator[None]:
    """Failures below HTTP and answers that are not ACME become AcmeError."""
    try:
        yield
    except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema) as error:
        raise AcmeError("server-error", f"not a usable address: {error}") from error
    except OSError as error:  # requests' exceptions, and a CA file that cannot be read
        raise AcmeError("unreachable", printable(_reason(error))) from error
    except (errors.Error, JoseError) as error:
        raise AcmeError("server-error", printable(str(error))) from error


_AROUND = re.compile(r"^HTTPS?Connection(Pool)?\([^)]*\): ")


def _reason(error: OSError) -> str:
    """What went wrong, without the names of the libraries' parts around it."""
    first = error.args[0] if error.args else None
    candidates = (getattr(first, "reason", None), first, error)
    inner = next(candidate for candidate in candidates if isinstance(candidate, Exception))
    if inner.args and isinstance(inner.args[-1], OSError):
        inner = inner.args[-1]  # as in ProtocolError("Connection aborted.", ConnectionResetError(...))
    text = (inner.strerror if isinstance(inner, OSError) else None) or str(inner)
    return _AROUND.sub("", text) or type(error).__name__


def _connect(
    config: AcmeConfig, private: ec.EllipticCurvePrivateKey | None
) -> tuple[_Network, dict[str, Any]]:
    """The CA's directory, and a network that signs with the key."""
    key = None if private is None else JWKEC(key=private)
    # requests takes a CA bundle's path where the acme package promises a bool.
    verify = cast("bool", str(config.ca_file)) if config.ca_file else True
    network = _Network(
        key=key, alg=ES256, verify_ssl=verify, user_agent=config.user_agent, timeout=config.timeout
    )
    if private is not None and key is not None:
        network.thumbprint = _base64url(key.thumbprint())
        network.key_sha256 = key_sha256(private.public_key())
    network.session.mount("https://", _Bounded())
    return network, _read_directory(network, config)


def _read_directory(network: _Network, config: AcmeConfig) -> dict[str, Any]:
    with _translated(), _within(config.timeout):
        directory = _object(network.get(config.directory_url))
    network.new_nonce_url = _text(directory, "newNonce")
    for name in ("newAccount", "newOrder", "revokeCert"):
        _text(directory, name)
    endpoints = [config.directory_url, *(url for url in directory.values() if isinstance(url, str))]
    network.origins = frozenset(map(_origin, endpoints))
    return directory


def _origin(url: str) -> str:
    """Scheme, host and port as they are written; nothing for what is no address."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return ""
    return f"{parts.scheme}://{parts.netloc}".lower()


def _open(cls: type[_A], config: AcmeConfig) -> _A:
    _finish_roll(config)  # or the old key, which the CA knows no more, would make another account
    if not secret_file(config.account_key_file).exists():
        _make_account_key(config.account_key_file)
    key_file = _held(secret_file(config.account_key_file), fcntl.LOCK_SH)
    try:
        network, directory = _connect(config, load_account_key(config.account_key_file))
        request = {"termsOfServiceAgreed": True, "contact": list(config.contact)}
        binding = _binding(config, network, directory)
        uri = _enter(network, directory, request | binding)  # 200 for a key it knows (7.3.1)
    except BaseException:
        key_file.close()
        raise
    return cls(network, directory, uri, config, key_file)


def _abandon(opening: Future[_A]) -> None:
    """Nobody waits for the account any more."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


def _held(path: Path, how: int) -> BinaryIO:
    """The account key's file, locked until it is closed: shared by open accounts, alone for another key."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise AcmeError("account-key", f"{path} cannot be used: {error}", permanent=True) from error
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise BlockingIOError  # replaced between our opening and our lock
    except OSError as error:
        file.close()
        busy = "it is being changed" if how == fcntl.LOCK_SH else "a program uses it: stop that first"
        raise AcmeError("account-key", f"{path}: {busy}") from error
    return file


def _binding(config: AcmeConfig, network: _Network, directory: Mapping[str, Any]) -> dict[str, Any]:
    """What binds a new account to one that we have at the CA (section 7.3.4); nothing without a key for it."""
    if config.binding_key_id is None or config.binding_key_file is None:
        return {}
    assert network.key is not None
    key = JWKOct(key=load_binding_key(config.binding_key_file))
    account = json.dumps(network.key.public_key().to_partial_json()).encode()
    url = _text(directory, "newAccount")
    signed = JWS.sign(account, key=key, alg=HS256, nonce=None, url=url, kid=config.binding_key_id)
    return {"externalAccountBinding": json.loads(signed.json_dumps())}


def _account_facts(config: AcmeConfig, change: Mapping[str, Any] | None) -> AccountFacts:
    _finish_roll(config)
    network, directory = _connect(config, load_account_key(config.account_key_file))
    try:
        uri = _enter(network, directory, {"onlyReturnExisting": True})
        contact = _object(network.call(uri, change)).get("contact")
    finally:
        network.session.close()
    known = contact if isinstance(contact, list) else []
    return AccountFacts(uri, tuple(printable(str(url)) for url in known), _terms_of(directory))


def _enter(network: _Network, directory: Mapping[str, Any], request: Mapping[str, Any]) -> str:
    """Sign as the account of the network's key from here on; its URI."""
    response = network.call(_text(directory, "newAccount"), request)
    status = _object(response).get("status")
    uri = _location(response)
    if status != "valid":
        raise AcmeError("unauthorized", f"the account {uri} is {status}", permanent=True)
    network.kid = uri
    return uri


def _read_terms(config: AcmeConfig) -> Terms:
    network, directory = _connect(config, None)
    try:
        with _translated(), _within(config.timeout):
            network.head(network.new_nonce_url)
    finally:
        network.session.close()
    return _terms_of(directory)


def _terms_of(directory: Mapping[str, Any]) -> Terms:
    meta = directory.get("meta")
    known: Mapping[str, Any] = meta if isinstance(meta, dict) else {}
    terms, identities, profiles = (
        known.get(name) for name in ("termsOfService", "caaIdentities", "profiles")
    )
    return Terms(
        printable(terms) if isinstance(terms, str) else None,
        tuple(printable(str(name)) for name in identities) if isinstance(identities, list) else (),
        tuple(printable(str(name)) for name in profiles) if isinstance(profiles, dict) else (),
        account_binding=known.get("externalAccountRequired") is True,
    )


def _roll_account_key(config: AcmeConfig) -> str:
    path = config.account_key_file
    if secret_file(path) != path:
        raise AcmeError(
            "account-key", f"{secret_file(path)} is systemd's and cannot be replaced", permanent=True
        )
    with _held(path, fcntl.LOCK_EX):
        return _finish_roll(config) or _begin_roll(config)


def _begin_roll(config: AcmeConfig) -> str:
    path, aside = config.account_key_file, _aside(config)
    old = load_account_key(path)
    network, directory = _connect(config, old)
    try:
        uri = _enter(network, directory, {"onlyReturnExisting": True})
        url = _text(directory, "keyChange")
        if not aside.exists():
            _make_account_key(aside)
        new = JWKEC(key=load_account_key(aside))
        inner = {"account": uri, "oldKey": JWKEC(key=old).public_key().to_json()}
        signed = JWS.sign(json.dumps(inner).encode(), key=new, alg=ES256, nonce=None, url=url)
        network.call(url, json.loads(signed.json_dumps()))
    finally:
        network.session.close()
    _replace(aside, path)
    return uri


def _aside(config: AcmeConfig) -> Path:
    """Where the new key of a roll is until the CA has it."""
    return config.account_key_file.with_name(f"{config.account_key_file.name}.new")


def _finish_roll(config: AcmeConfig) -> str | None:
    """Take the new key when a roll ended after the CA's yes and before ours; the account's URI."""
    aside = _aside(config)
    if not aside.exists():
        return None
    uri = _account_of(config, load_account_key(aside))
    if uri is not None:
        _replace(aside, config.account_key_file)
    return uri


def _replace(new: Path, path: Path) -> None:
    try:
        new.replace(path)
        sync(path.parent)
    except OSError as error:
        raise AcmeError("account-key", f"{path} cannot be replaced: {error}", permanent=True) from error


def _account_of(config: AcmeConfig, key: ec.EllipticCurvePrivateKey) -> str | None:
    """The account that the CA knows by this key."""
    network, directory = _connect(config, key)
    try:
        return _enter(network, directory, {"onlyReturnExisting": True})
    except AcmeError as error:
        if error.code != "accountDoesNotExist":
            raise
        return None
    finally:
        network.session.close()


def secret_file(path: Path) -> Path:
    """Where a secret of the settings is: systemd's credential with the file's name, or the file itself."""
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    credential = None if credentials is None else Path(credentials) / path.name
    return path if credential is None or not credential.exists() else credential


def _read_secret(path: Path) -> bytes:
    """A small file that nobody else may read. systemd guards its credentials, by access lists as well.

    Raises OSError or ValueError.
    """
    found = secret_file(path)
    with found.open("rb") as file:
        status = os.fstat(file.fileno())
        if found == path and (
            status.st_mode & (stat.S_IRWXG | stat.S_IRWXO) or status.st_uid != os.geteuid()
        ):
            mode = stat.S_IMODE(status.st_mode)
            raise ValueError(
                f"it has the mode {mode:04o} and belongs to user {status.st_uid}; it must be 0600 and ours"
            )
        return file.read(_SECRET_LIMIT)


def load_binding_key(path: Path) -> bytes:
    """The key that binds accounts, in base64url as CAs give it. Raises AcmeError "account-key"."""
    try:
        text = _read_secret(path).decode("ascii").strip().rstrip("=")
        key = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (OSError, ValueError) as error:
        raise AcmeError("account-key", f"{path} cannot be used: {error}", permanent=True) from error
    if not key:
        raise AcmeError("account-key", f"{path}: there is no key in the file", permanent=True)
    return key


def load_account_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The account's key, P-256, from a file of mode 0600. Raises AcmeError "account-key"."""
    try:
        key = serialization.load_pem_private_key(_read_secret(path), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise AcmeError("account-key", f"{path} cannot be used: {error}", permanent=True) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise AcmeError("account-key", f"{path} is not a P-256 key", permanent=True)
    return key


def new_account_key() -> bytes:
    """A P-256 key in PEM."""
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _make_account_key(path: Path) -> None:
    """Put a new key there; a second process that makes one loses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp gives 0600
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(new_account_key())
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileExistsError):
                os.link(name, path)  # unlike a rename, never over the key of another process
        finally:
            Path(name).unlink()
        sync(path.parent)
    except OSError as error:
        raise AcmeError("account-key", f"{path} cannot be made: {error}", permanent=True) from error


def _refusal(response: requests.Response) -> AcmeError:
    """The error of an answer with a failure status: an RFC 7807 document, or whatever a proxy sent."""
    status = response.status_code
    try:
        problem = _object(response)
    except AcmeError:
        problem = {}
    prefix, _, code = str(problem.get("type")).rpartition(":")
    if status == requests.codes.too_many_requests or code == "rateLimited":
        code = "rate-limited"
    elif prefix != messages.ERROR_PREFIX.rstrip(":") or code == "serverInternal":
        code = "server-error"
    return AcmeError(
        code,
        _problem_text(problem) or printable(f"HTTP {status}: {response.text}"),
        retry_after=_retry_after(response),
        permanent=code in _PERMANENT and 400 <= status < 500,
        status=status,
    )


def _refused_wish(order: Mapping[str, Any], error: AcmeError) -> str | None:
    """Which member of an order was perhaps refused, and can be left out."""
    if "replaces" in order and error.status == requests.codes.internal_server_error:
        # Pebble 2.10 does not find every certificate that it issued; no renewal may wait for that.
        return "replaces"
    if not error.is_refusal:
        return None
    is_conflict = error.status == requests.codes.conflict
    if "replaces" in order and (is_conflict or error.code in _NO_REPLACEMENT):
        return "replaces"
    return "profile" if "profile" in order and error.code in _NO_PROFILE else None


def _object(response: requests.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise AcmeError("server-error", f"{response.url} is not a JSON object", status=response.status_code)
    return body


def _location(response: requests.Response) -> str:
    url: str | None = response.headers.get("Location")
    if not url:
        raise AcmeError("server-error", f"no Location from {response.url}", status=response.status_code)
    return url


def _text(value: Mapping[str, Any], name: str) -> str:
    text = value.get(name)
    if not isinstance(text, str):
        raise AcmeError("server-error", f"the CA's answer has no {name}")
    return text


def _authorization_url(order: Mapping[str, Any]) -> str:
    match order.get("authorizations"):
        case [str(url)]:
            return url
    raise AcmeError("server-error", "the order does not have exactly one authorization")


def _order_state(order: Mapping[str, Any]) -> OrderState:
    status = _text(order, "status")
    if status in _ENDED:  # Pebble hands the end of an authorization on to its orders, issued ones too
        return OrderState.VALID if "certificate" in order else OrderState.INVALID
    try:
        return OrderState(status)
    except ValueError as error:
        raise AcmeError("server-error", f"unknown order status: {printable(str(error))}") from error


def _order_of(domain: str) -> dict[str, Any]:
    return {"identifiers": [{"type": "dns", "value": domain}]}


def _challenges(authorization: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Also those of types that we do not know."""
    challenges = authorization.get("challenges")
    return [one for one in challenges if isinstance(one, dict)] if isinstance(challenges, list) else []


def _problem_text(problem: object) -> str | None:
    """`code: detail` of a problem document and of its subproblems (section 6.7.1), None without any."""
    if not isinstance(problem, dict) or not problem:
        return None
    parts = [f"{str(problem.get('type', '')).rpartition(':')[2]}: {problem.get('detail', '')}"]
    subproblems = problem.get("subproblems")
    if isinstance(subproblems, list):
        parts += [str(sub.get("detail", "")) for sub in subproblems if isinstance(sub, dict)]
    return printable("; ".join(parts))


def _instant(text: object) -> dt.datetime | None:
    """An RFC 3339 time; None when the CA sends none, or another form."""
    try:
        moment = dt.datetime.fromisoformat(text) if isinstance(text, str) else None
        return moment.astimezone(dt.UTC) if moment and moment.tzinfo else None
    except (ValueError, OverflowError):
        return None


def _retry_after(response: requests.Response) -> float | None:
    return retry_after_seconds(response.headers.get("Retry-After"), now=dt.datetime.now(dt.UTC))


def retry_after_seconds(value: str | None, *, now: dt.datetime) -> float | None:
    """Seconds from a Retry-After field (RFC 9110 section 10.2.3), 0 to 7 days; None for another form.

    An HTTP-date is always UTC; the stock client reads it in the local time zone.
    """
    if value is None:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        return min(float(text[:12]), LONGEST_WAIT)
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=dt.UTC)
    return min(max((moment - now).total_seconds(), 0.0), LONGEST_WAIT)


def _base64url(octets: bytes) -> str:
    return base64.urlsafe_b64encode(octets).rstrip(b"=").decode("ascii")
