"""What the registry dials: which addresses it may, all that it says over HTTP, and by TLS alone to one address.

1. An address is dialled when it is global unicast and not the pool's own (`Guard`).
2. A name is resolved once. All its addresses are checked, and one of those is dialled: what the name resolves
   to later (DNS rebinding) does not matter.
3. One forbidden address refuses the name, whatever else it has. No public service has such an address; to
   dial the others would let its owner try out again and again what the registry can be led to.
4. No redirect is followed, no proxy or password of the environment is used, nothing is unpacked. One deadline
   is for everything, from the name to the last octet.

What the operator's settings name (CA, primary, nameservers) is dialled as they say, not by these rules.
"""

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from http import HTTPStatus
from ipaddress import ip_address

import httpx

from nts_core.errors import printable
from poolsvc.config import Settings, split_endpoint
from poolsvc.errors import AddressRefused, InvalidAddress, PoolError
from poolsvc.names import check_address

# No honest service has more; each is a connection that may have to be tried.
MAX_ADDRESSES = 16
_PORTS = {"http": 80, "https": 443}
_MAX_PORT = 65535
_NOT_REACHED = "check the address, that the service runs, and that no firewall keeps the registry out"
# A lookup cannot be cancelled: names that never resolve must not take the threads of other work.
_LOOKUPS = ThreadPoolExecutor(8, thread_name_prefix="lookup")

# The addresses of a host, for a port. Raises OSError.
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


class FetchError(PoolError):
    """What was asked for did not come. The text is printable and bounded, whatever the peer said."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    code = "no-http-answer"

    def __init__(self, detail: str, *, remedy: str = _NOT_REACHED) -> None:
        super().__init__(printable(detail), remedy=remedy)


class TooLong(FetchError):
    """An answer with status 200 that was longer than it may be."""


class NotDialled(httpx.ConnectError):
    """The guard has refused; for clients of httpx it is one more way in which a connection fails."""

    def __init__(self, detail: str, remedy: str, request: httpx.Request) -> None:
        super().__init__(detail, request=request)
        self.remedy = remedy


class Guard:
    """Which addresses the registry dials.

    None in `refused_prefixes`, whose networks do not want it. Never the pool's own: those of its nameservers, and those on which the registry itself listens, on any port.
    With `allow_private_addresses`, where all may share loopback, the pool's own are only their exact endpoints.
    """

    def __init__(self, settings: Settings) -> None:
        self._allow_private = settings.allow_private_addresses
        plain = settings.web_tls.http_listen if settings.web_tls.acme else ()
        own = (settings.dns.primary, *settings.dns.nameservers, *settings.listen, *plain)
        self._refused = settings.policy.refused_prefixes
        self._own = frozenset((ip_address(host), port) for host, port in map(split_endpoint, own))

    def check(self, text: str, *ports: int) -> None:
        """Refuse an address for these ports. Raises InvalidAddress, which says why."""
        address = check_address(text, allow_private=self._allow_private)
        if any(address in network for network in self._refused):
            raise AddressRefused(
                f"{text} is in a network that takes no part in this pool",
                remedy="give an address of another network, or ask the pool's operator",
                field="addresses",
            )
        for own, own_port in self._own:
            if own == address and (own_port in ports or not self._allow_private):
                raise InvalidAddress(
                    f"{text} is an address of the pool's own registry or nameservers",
                    remedy="give an address that the pool itself does not use",
                    field="addresses",
                )


async def system_addresses(host: str, port: int) -> Sequence[str]:
    """What this system's resolver says."""
    found = await asyncio.get_running_loop().run_in_executor(
        _LOOKUPS, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    )
    return [str(entry[4][0]) for entry in found]


@cache
def _unverified(protocol: str, least: ssl.TLSVersion) -> ssl.SSLContext:
    """For those who have no certificate that anybody could verify, or show that they have an address."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = least
    context.set_alpn_protocols([protocol])
    return context


@cache
def _system_trust() -> ssl.SSLContext:
    """The system's roots; reading them takes longer than a handshake."""
    return ssl.create_default_context()


class GuardedTransport(httpx.AsyncHTTPTransport):
    """For any client of httpx: the connection goes to an address that was checked.

    TLS and the Host header keep the name. No connection is kept: two names may have one address.
    Raises NotDialled, and what httpx raises.
    """

    def __init__(
        self, guard: Guard, *, resolve: Resolve = system_addresses, verify: ssl.SSLContext | None = None
    ) -> None:
        super().__init__(
            verify=verify or _system_trust(),
            trust_env=False,
            limits=httpx.Limits(max_keepalive_connections=0),
        )
        self._guard = guard
        self._resolve = resolve

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        host = request.url.raw_host.decode("ascii")
        addresses = await self._addresses(host, request)
        # One address that swallows everything must leave time for the next one.
        timeouts = dict(request.extensions.get("timeout", {}))
        if timeouts.get("connect") is not None:
            timeouts["connect"] /= len(addresses)
        extensions = {**request.extensions, "sni_hostname": host, "timeout": timeouts}
        failure: httpx.TransportError | None = None
        for address in addresses:
            pinned = httpx.Request(
                request.method,
                request.url.copy_with(host=address),
                headers=request.headers,
                stream=request.stream,
                extensions=extensions,
            )
            try:
                return await super().handle_async_request(pinned)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failure = error
        assert failure is not None
        raise failure

    async def _addresses(self, host: str, request: httpx.Request) -> Sequence[str]:
        """All addresses of the host, each of which may be dialled."""
        if request.url.scheme not in _PORTS:
            raise httpx.UnsupportedProtocol("the URL does not begin with http:// or https://")
        port = request.url.port or _PORTS[request.url.scheme]
        if port > _MAX_PORT:
            raise httpx.UnsupportedProtocol(f"there is no port {port}")
        found = [host] if _is_literal(host) else await self._lookup(host, port, request)
        try:
            for address in found:
                self._guard.check(address, port)
        except InvalidAddress as error:
            # What a name of somebody's inner network resolves to is not for whoever asks.
            detail = error.detail if found == [host] else f"{host} has an address that is not dialled"
            raise NotDialled(f"not dialled: {detail}", error.remedy, request) from None
        return found

    async def _lookup(self, host: str, port: int, request: httpx.Request) -> Sequence[str]:
        try:
            found = list(dict.fromkeys(await self._resolve(host, port)))
        except (OSError, UnicodeError):
            found = []
        if not 1 <= len(found) <= MAX_ADDRESSES:
            raise NotDialled(
                f"{host} has {len(found) or 'no'} addresses",
                f"let the name have 1 to {MAX_ADDRESSES} addresses in public DNS",
                request,
            )
        return found


def _is_literal(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Answer:
    """The status and body of an HTTP answer, and where it redirects; the body as it was sent, packed or not."""

    status: int
    body: bytes = field(repr=False)
    location: str | None = field(default=None, repr=False)

    def require_ok(self) -> bytes:
        """The body. Raises FetchError for every status but 200."""
        if self.status != HTTPStatus.OK:
            raise FetchError(
                f"HTTP status {self.status} instead of 200",
                remedy="check that no other web server answers there, and that it does not redirect",
            )
        return self.body


@dataclass(frozen=True, slots=True)
class TlsAnswer:
    """The certificate (DER) that a server showed it has the key of, not verified; and the line that it answered."""

    certificate: bytes = field(repr=False)
    line: bytes = field(repr=False)


def http_origin(address: str, port: int) -> str:
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"


class Outbound:
    """Single requests to where people told the registry to go.

    `deadline` is seconds for all of a request; `limit` octets of the body, or the line, are read.
    """

    def __init__(
        self, settings: Settings, *, resolve: Resolve = system_addresses, verify: ssl.SSLContext | None = None
    ) -> None:
        self._guard = Guard(settings)
        self._resolve = resolve
        self._verify = verify

    def transport(self) -> GuardedTransport:
        """For a library that makes its own client: `httpx.AsyncClient(transport=..., trust_env=False)`."""
        return GuardedTransport(self._guard, resolve=self._resolve, verify=self._verify)

    async def get(self, url: str, *, host: str | None = None, deadline: float, limit: int) -> Answer:
        """GET; `host` is said instead of the URL's host. Raises FetchError."""
        headers = {} if host is None else {"Host": host}
        return await self._exchange("GET", url, None, headers, deadline, limit)

    async def post(
        self, url: str, *, content: bytes, headers: Mapping[str, str], deadline: float, limit: int
    ) -> Answer:
        """POST. Raises FetchError."""
        return await self._exchange("POST", url, content, headers, deadline, limit)

    async def tls(
        self,
        address: str,
        port: int,
        *,
        name: str,
        protocol: str,
        say: bytes = b"",
        least: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2,
        deadline: float,
        limit: int = 1,
    ) -> TlsAnswer:
        """Shake hands with the server `name` at an address by an ALPN protocol; the line that answers what is said, if any.

        Raises FetchError, also for a server without that protocol.
        """
        try:
            self._guard.check(address, port)
            async with asyncio.timeout(deadline):
                reader, writer = await asyncio.open_connection(
                    address, port, ssl=_unverified(protocol, least), server_hostname=name, limit=limit
                )
                try:
                    shaken: ssl.SSLObject = writer.get_extra_info("ssl_object")
                    certificate = shaken.getpeercert(binary_form=True)
                    if shaken.selected_alpn_protocol() != protocol or certificate is None:
                        raise FetchError(f"the server at {address} does not speak {protocol}")
                    if not say:
                        return TlsAnswer(certificate, b"")
                    writer.write(say)
                    return TlsAnswer(certificate, await reader.readuntil())
                finally:
                    writer.transport.abort()
        except InvalidAddress as error:
            raise FetchError(f"not dialled: {error.detail}", remedy=error.remedy) from None
        except TimeoutError:
            raise FetchError(f"no TLS answer within {deadline:g} s") from None
        except asyncio.LimitOverrunError:
            raise FetchError(f"an answer of more than {limit} octets") from None
        except (OSError, EOFError) as error:
            raise FetchError(f"no TLS answer: {_reason(error)}") from None

    async def _exchange(
        self,
        method: str,
        url: str,
        content: bytes | None,
        headers: Mapping[str, str],
        deadline: float,
        limit: int,
    ) -> Answer:
        try:
            if httpx.URL(url).userinfo:
                raise FetchError("the URL holds a user name or password", remedy="leave it out of the URL")
            async with (
                asyncio.timeout(deadline),
                httpx.AsyncClient(
                    transport=self.transport(), timeout=deadline, follow_redirects=False, trust_env=False
                ) as client,
                client.stream(
                    method, url, content=content, headers={"Accept-Encoding": "identity", **headers}
                ) as response,
            ):
                location = response.headers.get("Location")
                return Answer(response.status_code, await _body(response, limit), location)
        except NotDialled as error:
            raise FetchError(str(error), remedy=error.remedy) from None
        except (TimeoutError, httpx.TimeoutException):
            raise FetchError(f"no HTTP answer within {deadline:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            raise FetchError(f"no HTTP answer: {str(error) or type(error).__name__}") from None


def _reason(error: OSError | EOFError) -> str:
    """What went wrong, without the names of the libraries' parts around it."""
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.lower().replace("_", " ")
    return (isinstance(error, OSError) and error.strerror) or "the connection ended"


async def _body(response: httpx.Response, limit: int) -> bytes:
    """At most `limit` octets. Of a refusal (which is often a page) the first ones are enough."""
    body = bytearray()
    async for piece in response.aiter_raw():
        body += piece
        if len(body) > limit:
            if response.is_success:
                raise TooLong(
                    f"an answer of more than {limit} octets",
                    remedy="check that no other web server answers there",
                )
            break
    return bytes(body[:limit])
