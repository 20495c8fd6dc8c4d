"""The registry's settings: environment (POOLSVC_*) before the TOML file before defaults; one frozen object."""

import ipaddress
import re
from datetime import timedelta
from enum import StrEnum
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

import dns.exception
import dns.name
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    IPvAnyAddress,
    IPvAnyNetwork,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import SettingsConfigDict

from nts_core.children import environment_without
from nts_core.shell import ProgramSettings, SettingsError, check_contact, check_https
from nts_core.srv import ANSWER_OCTETS, MIN_TARGETS, targets_that_fit
from poolsvc.budget import MOST, Limit, Limits
from poolsvc.monitor.soundness import (
    MAX_REFERENCES,
    MIN_REFERENCES,
    Reference,
    check_independent,
    parse_reference,
)
from poolsvc.names import DOMAIN
from poolsvc.verdicts import SCORERS

_PREFIX = "POOLSVC_"
_SQLITE = "sqlite+aiosqlite:///"
AUTO_PROFILE = "auto"
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")


class ConfigError(Exception):
    """A settings file or variable that cannot be used; the text names the setting."""


def _endpoint(text: str) -> str:
    host, _, port = text.rpartition(":")
    is_port = re.fullmatch(r"[0-9]{1,5}", port) is not None and int(port) < 65536
    is_bracketed = host.startswith("[") and host.endswith("]")
    if not is_port or is_bracketed != (":" in host):
        raise ValueError("write it as ADDRESS:PORT, and IPv6 as [ADDRESS]:PORT")
    ipaddress.ip_address(host[1:-1] if is_bracketed else host)
    return text


def _host_endpoint(text: str) -> str:
    host, _, port = text.rpartition(":")
    if host.startswith("["):
        return _endpoint(text)
    if _HOST.fullmatch(host) is None or re.fullmatch(r"[0-9]{1,5}", port) is None or int(port) >= 65536:
        raise ValueError("write it as HOST:PORT, and IPv6 as [ADDRESS]:PORT")
    return text


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _mail_address(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@[A-Za-z0-9.-]{1,189}", text):
        raise ValueError("write it as NAME@DOMAIN, in ASCII")
    return text


def _is_everywhere(endpoint: str) -> bool:
    return ipaddress.ip_address(split_endpoint(endpoint)[0]).is_unspecified


def _key_name(text: str) -> str:
    try:
        return dns.name.from_text(text).canonicalize().to_text(omit_final_dot=True)
    except dns.exception.DNSException:
        raise ValueError("write it as a domain name, such as publisher.pool.example") from None


def _listening(text: str) -> str:
    if _endpoint(text).endswith(":0"):
        raise ValueError("give a port, which is 53 for everybody to find it")
    return text


def _reference(text: str) -> str:
    parse_reference(text)
    return text


def _domain(text: str) -> str:
    name = text.rstrip(".").lower()
    if not DOMAIN.fullmatch(name):
        raise ValueError("not a domain name")
    return name


def _database(text: str) -> str:
    if not text.startswith((_SQLITE, "postgresql+psycopg://")):
        raise ValueError("write sqlite+aiosqlite:///FILE or postgresql+psycopg://USER@HOST/DATABASE")
    return text


def _http(text: str) -> str:
    if not text.startswith(("https://", "http://")) or not urlsplit(text).hostname:
        raise ValueError("write it as https://HOST")
    return text.rstrip("/")


KeyName = Annotated[str, AfterValidator(_key_name)]
ListeningEndpoint = Annotated[str, AfterValidator(_listening)]
TsigAlgorithm = Literal["hmac-sha256", "hmac-sha384", "hmac-sha512"]
HttpsUrl = Annotated[str, AfterValidator(check_https)]
HttpUrl = Annotated[str, AfterValidator(_http)]
ContactUrl = Annotated[str, AfterValidator(check_contact)]
DatabaseUrl = Annotated[str, AfterValidator(_database)]
EndpointText = Annotated[str, AfterValidator(_endpoint)]
HostEndpoint = Annotated[str, AfterValidator(_host_endpoint)]
MailAddress = Annotated[str, AfterValidator(_mail_address)]
DomainName = Annotated[str, AfterValidator(_domain)]
ReferenceText = Annotated[str, AfterValidator(_reference)]


def check_origin(url: str, pool: str) -> None:
    """Members' hosts live under the pool's domain, and would share the cookies of a registry that does too."""
    host = (urlsplit(url).hostname or "").rstrip(".")
    if host == pool or host.endswith(f".{pool}"):
        raise ValueError(f"the registry's address must not be under the pool's domain, {pool}")


def check_room(pool: str) -> None:
    """An SRV answer must hold enough servers that a client can tell who is right."""
    if (fit := targets_that_fit(pool)) < MIN_TARGETS:
        raise ValueError(
            f"the name is too long: an answer of {ANSWER_OCTETS} octets holds {max(fit, 0)} servers with it, "
            f"and {MIN_TARGETS} are needed"
        )


def bare_environment() -> dict[str, str]:
    """For a child that gets its charge from us: without the registry's settings, which may hold a password."""
    return environment_without(_PREFIX)


def join_endpoint(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_endpoint(text: EndpointText | HostEndpoint) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PortSettings(_Section):
    """Where members serve; one KE port for the whole pool (ntpd-rs knows no other than 4460)."""

    http: int = Field(80, ge=1, le=65535)
    tls: int = Field(443, ge=1, le=65535, description="where hosts answer the CA by TLS-ALPN-01")
    ke: int = Field(4460, ge=1, le=65535)


class NameserverSettings(_Section):
    """One NS of the zone, and where it is reached on port 53."""

    name: DomainName
    addresses: tuple[IPvAnyAddress, ...] = Field(min_length=1, max_length=8)


class SecondarySettings(_Section):
    """Who gets the zone from the embedded server, and is told of changes."""

    address: EndpointText
    tsig_name: KeyName
    tsig_secret_file: Path
    tsig_algorithm: TsigAlgorithm = "hmac-sha256"
    signs: bool = Field(False, description="whether it signs the zone itself, and so gets it unsigned")


class EmbeddedDnsSettings(_Section):
    """The authoritative server that comes with the registry."""

    listen: tuple[ListeningEndpoint, ...] = Field(("0.0.0.0:53", "[::]:53"), min_length=1, max_length=16)
    directory: Path = Field(Path("dns"), description="the zone and its keys")
    own_process: bool = Field(False, description="whether `poolsvc dns serve` runs it instead of `serve`")
    nameservers: tuple[NameserverSettings, ...] = Field(
        (), max_length=16, description="all NS of the zone; without any, ns1 at the addresses of `listen`"
    )
    secondaries: tuple[SecondarySettings, ...] = Field((), max_length=32)
    parents: tuple[EndpointText, ...] = Field(
        (), max_length=16, description="servers of the parent zone, asked for DS when the key changes"
    )
    ttl: int = Field(3600, ge=1, le=86400, description="of NS, SOA and the keys")
    negative_ttl: int = Field(60, ge=1, le=3600, description="for how long a name may be denied")
    ds_ttl: int = Field(86400, ge=1, le=604800, description="of the DS in the parent")
    margin: int = Field(3600, ge=0, le=604800, description="for all nameservers to have what is new, at most")
    responses_per_second: float = Field(
        20, gt=0, description="UDP answers of one kind to a network that shows no cookie"
    )
    responses_at_once: int = Field(100, ge=1)

    @model_validator(mode="after")
    def _keys_are_told_apart(self) -> Self:
        """A key says whose it is, and so what they get."""
        by_name: dict[str, SecondarySettings] = {}
        for each in self.secondaries:
            other = by_name.setdefault(each.tsig_name, each)
            if (other.signs, other.tsig_secret_file) != (each.signs, each.tsig_secret_file):
                raise ValueError(
                    f"secondaries: {each.address} and {other.address} have the key {each.tsig_name}, but not both the"
                    " same secret and `signs`; give those that sign a key of their own"
                )
        if not self.nameservers and any(_is_everywhere(endpoint) for endpoint in self.listen):
            raise ValueError(
                "nameservers: name each NS of the zone and its public addresses; only where `listen` names addresses"
                " can the zone do without"
            )
        names = [each.name for each in self.nameservers]
        if len(set(names)) < len(names):
            raise ValueError("nameservers: two entries have the same name; give all addresses in one")
        return self


# What does not follow from settings that are refused anyway.
_REFUSED = {
    "primary": "127.0.0.1:53",
    "nameservers": ["127.0.0.1:53"],
    "tsig_name": "publisher",
    "tsig_secret_file": "publisher.secret",
}


class DnsSettings(_Section):
    """The primary that takes our updates, and all authoritative servers that must agree.

    Without `primary` it is the embedded server, and what is not said of it follows from where it listens.
    """

    primary: EndpointText
    tsig_name: KeyName
    tsig_secret_file: Path
    tsig_algorithm: TsigAlgorithm = "hmac-sha256"
    nameservers: tuple[EndpointText, ...] = Field(min_length=1)
    embedded: EmbeddedDnsSettings | None = Field(None, description="excludes a primary of one's own")
    notify: bool = Field(
        False, description="whether they are told of a change by us too, beside the primary's own NOTIFY"
    )
    srv_ttl: int = Field(60, ge=1, le=86400)
    address_ttl: int = Field(300, ge=1, le=86400)

    @model_validator(mode="before")
    @classmethod
    def _follow_from_embedded(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "primary" in data:
            return data
        try:
            embedded = EmbeddedDnsSettings.model_validate(data.get("embedded") or {})
        except ValidationError:
            # Told by the field itself, whose name is the setting's.
            return {**_REFUSED, **data, "embedded": data.get("embedded") or {}}
        here = [_reachable(endpoint) for endpoint in embedded.listen]
        named = [join_endpoint(str(one), 53) for each in embedded.nameservers for one in each.addresses]
        return {
            "tsig_name": "publisher",
            "tsig_secret_file": embedded.directory / "publisher.secret",
            "nameservers": named or here,
            **data,
            "primary": here[0],
            "embedded": embedded,
        }

    @model_validator(mode="after")
    def _one_server(self) -> Self:
        if self.embedded is None:
            return self
        if self.primary != _reachable(self.embedded.listen[0]):
            raise ValueError("primary and embedded exclude each other")
        if any(each.tsig_name == self.tsig_name for each in self.embedded.secondaries):
            raise ValueError(
                f"embedded.secondaries: the key {self.tsig_name} is the publisher's; give them one of their own"
            )
        return self


def _reachable(endpoint: str) -> str:
    """Where somebody on this host reaches what listens there."""
    host, port = split_endpoint(endpoint)
    address = ipaddress.ip_address(host)
    if address.is_unspecified:
        host = "127.0.0.1" if address.version == 4 else "::1"
    return join_endpoint(host, port)


class LimitSettings(_Section):
    """A limit of a CA: so many within so many hours, one back after each share of them."""

    count: int = Field(ge=1, le=MOST)
    hours: float = Field(ge=0.01, le=8760)

    @property
    def limit(self) -> Limit:
        return Limit(self.count, timedelta(hours=self.hours))


class CaLimitSettings(_Section):
    """What the CA allows; the defaults are Let's Encrypt's."""

    certificates: LimitSettings = Field(
        LimitSettings(count=50, hours=168), description="new ones in the pool's registered domain"
    )
    same_name: LimitSettings = LimitSettings(count=5, hours=168)
    failed_validations: LimitSettings = LimitSettings(count=5, hours=1)
    orders: LimitSettings = LimitSettings(count=300, hours=3)

    @property
    def terms(self) -> Limits:
        return Limits(
            certificates=self.certificates.limit,
            orders=self.orders.limit,
            same_name=self.same_name.limit,
            failed_validations=self.failed_validations.limit,
        )


class AuthoritySettings(_Section):
    """A CA, the identity by which CAA records name it, and the registry's account there."""

    directory_url: HttpsUrl
    caa_identity: DomainName
    account_key_file: Path
    binding_key_id: str | None = Field(None, description="of the account that a CA with customers gave us")
    binding_key_file: Path | None = Field(None, description="its key, base64url as the CA gave it")
    socket: Path | None = Field(None, description="where `poolsvc acme serve` holds the account's key")
    socket_group: str | None = Field(None, description="whose users may use that socket as well")
    contact: tuple[ContactUrl, ...] = Field((), max_length=8)
    ca_file: Path | None = None
    profile: str = Field(
        AUTO_PROFILE,
        pattern=r"^[A-Za-z0-9._-]{1,64}$",
        description=f'certificate profile to ask for; "{AUTO_PROFILE}": tlsserver where the CA has it',
    )

    @property
    def name(self) -> str:
        """By what commands, orders and alarms know the CA: the host of its directory."""
        return urlsplit(self.directory_url).netloc

    @model_validator(mode="after")
    def _binding_is_whole(self) -> Self:
        if (self.binding_key_id is None) != (self.binding_key_file is None):
            raise ValueError("binding_key_id and binding_key_file go together")
        return self


class CaSettings(AuthoritySettings):
    """The CA that gets all orders, and those that get them when it is away or refuses for too long."""

    limits: CaLimitSettings = CaLimitSettings()
    fallback: tuple[AuthoritySettings, ...] = Field((), max_length=3)
    rehearsal: AuthoritySettings | None = Field(
        None, description="a staging CA, where orders are tried first"
    )

    @property
    def all(self) -> tuple[AuthoritySettings, ...]:
        """Those that issue, in the order of preference."""
        return self, *self.fallback

    @property
    def with_rehearsal(self) -> tuple[AuthoritySettings, ...]:
        """All at which there is an account of the registry's."""
        return self.all if self.rehearsal is None else (*self.all, self.rehearsal)

    @model_validator(mode="after")
    def _are_different(self) -> Self:
        for what, values in (
            ("a directory_url", [ca.name for ca in self.with_rehearsal]),
            ("an account_key_file", [ca.account_key_file for ca in self.with_rehearsal]),
            ("a socket", [ca.socket for ca in self.with_rehearsal if ca.socket is not None]),
        ):
            if len(set(values)) < len(values):
                raise ValueError(f"every CA, of fallback and rehearsal too, needs {what} of its own")
        return self


class WebTlsSettings(_Section):
    """The certificate of the registry's own web address, from the pool's CA."""

    acme: bool = False
    http_listen: tuple[EndpointText, ...] = Field(
        ("0.0.0.0:80",), min_length=1, description="where the CA asks; everybody else is sent to public_url"
    )
    directory: Path = Field(Path("web-tls"), description="where certificate and key are kept")


class SignUp(StrEnum):
    """Who gets an account."""

    OPEN = "open"
    INVITATION = "invitation"
    APPROVAL = "approval"  # everybody, but a member does nothing until an operator has approved it


class TermsSettings(_Section):
    """A document that people accept before they register a server. A new version is accepted anew."""

    document: str = Field(pattern=r"^[a-z0-9-]{1,50}$", description="a short name that stays the same")
    version: str = Field(pattern=r"^[A-Za-z0-9._-]{1,50}$")
    title: str = Field(min_length=1, max_length=200)
    url: HttpsUrl


class OidcSettings(_Section):
    """A provider of OpenID Connect at which the registry is registered as a confidential client."""

    name: str = Field(pattern=r"^[a-z0-9-]{1,40}$", description="how URLs of the API name it")
    issuer: HttpsUrl = Field(max_length=255, description="to the letter as the provider writes it")
    client_id: str = Field(min_length=1, max_length=255)
    client_secret_file: Path
    ca_file: Path | None = Field(None, description="roots (PEM) for it instead of the system's")


class MailSettings(_Section):
    """The server that takes the registry's mail, and how much of it there may be."""

    smtp: HostEndpoint
    security: Literal["none", "starttls", "tls"] = "starttls"
    username: str | None = None
    password_file: Path | None = None
    sender: MailAddress
    sender_name: str = Field("", max_length=100)
    ca_file: Path | None = Field(None, description="roots for the connection instead of the system's")
    mails_per_hour_and_recipient: int = Field(20, ge=1, description="more wait, and are joined")
    mails_per_minute: int = Field(60, ge=1, description="to all recipients together; more wait")

    @model_validator(mode="after")
    def _password_is_safe(self) -> Self:
        if (self.username is None) != (self.password_file is None):
            raise ValueError("username and password_file go together")
        is_here = _is_loopback(split_endpoint(self.smtp)[0])
        if self.security == "none" and self.username is not None and not is_here:
            raise ValueError('security "none" would send the password in the open')
        return self


class OwnMonitorSettings(_Section):
    """How the monitor inside the registry finds out whether what it sees may be the servers' doing."""

    references: tuple[ReferenceText, ...] = Field(
        (),
        max_length=MAX_REFERENCES,
        description="servers of different operators that this host's clock is compared with, each nts:HOST[:PORT] or"
        " ntp:HOST[:PORT], none of the pool's; without any, clock and network are not checked",
    )
    check_interval: float = Field(
        45,
        ge=0.1,
        le=300,
        description="seconds between two looks at the references; what probes found waits for the next one",
    )

    @field_validator("references")
    @classmethod
    def _are_enough(cls, references: tuple[str, ...]) -> tuple[str, ...]:
        if references and len(references) < MIN_REFERENCES:
            raise ValueError(
                f"name at least {MIN_REFERENCES}, so that one that is wrong is outvoted, or none"
            )
        check_independent(map(parse_reference, references))
        return references

    @property
    def parsed_references(self) -> tuple[Reference, ...]:
        return tuple(map(parse_reference, self.references))


class GeoSettings(_Section):
    """Files in MaxMind's format that tell of addresses in which network and country they are."""

    database: tuple[Path, ...] = Field(
        (), max_length=4, description="one or several; of those that know an address the first counts"
    )

    @field_validator("database", mode="before")
    @classmethod
    def _one_is_enough(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value


def _scorer(name: str) -> str:
    if name not in SCORERS:
        raise ValueError(f"there is no such scorer; there are {' and '.join(SCORERS)}")
    return name


ScorerName = Annotated[str, AfterValidator(_scorer)]


class PolicySettings(_Section):
    """What the pool asks for. Times are seconds."""

    opening_size: int = Field(4, ge=1, description="ACTIVE servers before the SRV set opens")
    region_size: int = Field(
        16,
        ge=4,
        le=1000,
        description="servers that a region needs to be switched on, and to be answered alone",
    )
    region_sets: int = Field(
        16, ge=1, le=256, description="answer sets that lie on a region's name at a time"
    )
    young_days: float = Field(30, ge=0, le=3650, description="how long a member's account is young")
    young_percent: int = Field(
        20,
        ge=1,
        le=99,
        description="of a region's weight that young accounts share, once older servers suffice",
    )
    admission_probes: int = Field(3, ge=1, description="full probes in a row that admit a server (bootstrap)")
    max_stratum: int = Field(7, ge=1, le=15, description="servers further from a reference clock score badly")
    probe_interval: float = Field(60, gt=0)
    probe_spacing: float = Field(
        60, gt=0, description="between two probes of one server, whichever monitors make them"
    )
    monitor_poll: float = Field(20, gt=0, le=300, description="how often a monitor asks for work and reports")
    monitors_per_member: int = Field(3, ge=0, description="that members may run for the pool")
    review_interval: float = Field(
        1200, gt=0, description="how often it is decided anew which monitors look at a server"
    )
    scorer: ScorerName = Field("median", description="how what several monitors say becomes one score")
    shadow_scorer: ScorerName | None = Field(
        None, description="another one, whose scores are shown beside those that count"
    )
    exchange_spacing: float = Field(2, ge=0, le=60, description="between the NTP exchanges of one probe")
    agent_interval: float = Field(60, gt=0, description="how often an idle agent reports")
    reconcile_interval: float = Field(60, gt=0, description="how often DNS is compared without a reason")
    full_pass_interval: float = Field(
        600, gt=0, description="how often all servers are compared with the zone as it was last seen"
    )
    transfer_interval: float = Field(
        86400, gt=0, description="how often the whole zone is transferred without a reason"
    )
    agent_requests_per_second: float = Field(
        100,
        gt=0,
        description="reports of all idle agents together; with many of them each reports less often",
    )
    samples_days: int = Field(15, ge=1, le=400, description="how long what probes measured is kept")
    summaries_days: int = Field(
        3660, ge=30, description="how long hourly and daily summaries of what probes measured are kept"
    )
    notices_days: int = Field(400, ge=60, description="how long notices and what became of them are kept")
    proof_deadline: float = Field(10, gt=0, le=60, description="for one connection back to an address")
    proofs_per_hour: int = Field(5, ge=1, description="connections back to an address")
    proofs_per_hour_and_prefix: int = Field(5, ge=1, description="connections back to a /24 or /48")
    checks_per_hour: int = Field(
        6, ge=1, description="of a server from outside, that its people or agent ask for"
    )
    retry: tuple[float, ...] = Field(
        (60, 600, 6000, 86400), min_length=1, description="waits after failed orders; the last one repeats"
    )
    ca_patience: float = Field(
        21600,
        gt=0,
        description="how long an order waits for a CA that is away or refuses, before another one gets it",
    )
    queue_patience: float = Field(
        2_592_000, gt=0, description="an alarm tells when the last in the queue for the CA waits for longer"
    )
    tick: float = Field(1, gt=0, description="how often the worker looks for work that is due")
    step_retry: float = Field(10, gt=0, description="wait after a step whose peer (CA, DNS) was down")
    leaving_margin: float = Field(
        60, ge=0, le=3600, description="that the name of a server that leaves lives on after its SRV's TTL"
    )
    join_token_hours: float = Field(72, gt=0)
    registration_hours: float = Field(72, gt=0, description="after which an unproved name is free again")
    requests_per_second_and_address: float = Field(20, gt=0, description="of the API, on average")
    requests_per_second_and_token: float = Field(10, gt=0)
    request_burst: int = Field(200, ge=1, description="requests at once of one address or token")
    servers_per_member: int = Field(
        20, ge=1, description="unless the operator allows a member another number"
    )
    members_per_person: int = Field(10, ge=1, description="that one person may own, when they found another")
    people_per_member: int = Field(50, ge=1)
    invitation_days: float = Field(7, gt=0, description="after which an invitation is void")
    pending_invitations: int = Field(5, ge=1, description="of one member at a time")
    invitations_per_day: int = Field(20, ge=1, description="of one member")
    transfer_days: float = Field(7, gt=0, description="after which the offer of a server is void")
    links_per_hour: int = Field(
        200, ge=1, description="mails with a link to addresses that have no account, to all of them together"
    )
    unproved_servers_per_member: int = Field(
        2, ge=1, description="a member's registrations without a proved address"
    )
    unproved_address_days: float = Field(7, gt=0, description="after which an unproved address is dropped")
    dns_01: bool = Field(
        False, description="whether members may choose that the registry answers the CA, in DNS, for a server"
    )
    revocation_patience: float = Field(
        86400,
        gt=0,
        description="how long the registry tries to revoke what the own account of a member had, who has left",
    )
    address_proof_days: float = Field(
        30, gt=0, description="after which an address that no probe has confirmed is to be proved again"
    )
    refused_prefixes: tuple[IPvAnyNetwork, ...] = Field(
        (), description="networks that opted out: no address in them is registered or dialled"
    )
    webhook_calls_per_hour: int = Field(600, ge=1, description="to one webhook; more wait")
    require_source_address: bool = Field(
        True, description="proof calls must come from the address itself; false for members behind NAT"
    )

    def step_wait(self, attempts: int) -> timedelta:
        """Before a step whose peer was down is tried again, longer each time."""
        return timedelta(seconds=self.step_retry * 2 ** min(attempts, 8))

    def order_wait(self, failures: int) -> timedelta:
        """Before another order, after so many that failed in a row."""
        return timedelta(seconds=self.retry[min(failures, len(self.retry) - 1)])


class Settings(ProgramSettings):
    """Everything `poolsvc` needs to know. Relative paths are relative to the settings file."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, env_nested_delimiter="__")

    pool: DomainName
    database: DatabaseUrl = Field("sqlite+aiosqlite:///registry.db", repr=False)
    key_file: Path = Field(Path("registry.key"), description="what links and webhook secrets derive from")
    journal_file: Path = Field(Path("removals.journal"), description="removals, outside the database")
    listen: tuple[EndpointText, ...] = Field(("127.0.0.1:8080",), min_length=1)
    public_url: HttpUrl = "http://127.0.0.1:8080"
    tls_certificate: Path | None = Field(None, description="PEM chain; without it TLS is a reverse proxy's")
    tls_key: Path | None = None
    trusted_proxies: tuple[IPvAnyAddress, ...] = Field(
        (), description="reverse proxies whose X-Forwarded-For tells where a call came from"
    )
    web_tls: WebTlsSettings = WebTlsSettings()
    metrics_allow: tuple[IPvAnyNetwork, ...] = Field(
        (IPv4Network("127.0.0.0/8"), IPv6Network("::1/128")), description="who may read /metrics"
    )
    stop_delay: float = Field(0, ge=0, le=300, description="seconds of being not ready before the end")
    allow_private_addresses: bool = False
    roots_file: Path | None = Field(None, description="roots the prober trusts instead of the system's")
    ports: PortSettings = PortSettings()
    dns: DnsSettings
    ca: CaSettings
    sign_up: SignUp = Field(SignUp.APPROVAL, description="who gets an account")
    terms: tuple[TermsSettings, ...] = Field((), max_length=16)
    oidc: tuple[OidcSettings, ...] = Field((), max_length=16)
    mail: MailSettings | None = Field(None, description="without it nobody gets mail")
    geo: GeoSettings = GeoSettings()
    monitor: OwnMonitorSettings = OwnMonitorSettings()
    policy: PolicySettings = PolicySettings()

    @model_validator(mode="before")
    @classmethod
    def _embedded_dns_is_the_default(cls, data: Any) -> Any:
        return {"dns": {}, **data} if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _no_twins(self) -> Self:
        for what, names in (
            ("terms.document", [entry.document for entry in self.terms]),
            ("oidc.name", [entry.name for entry in self.oidc]),
            ("oidc.issuer", [entry.issuer for entry in self.oidc]),
        ):
            if len(set(names)) < len(names):
                raise ValueError(f"{what}: two entries have the same")
        return self

    @field_validator("pool")
    @classmethod
    def _room(cls, pool: str) -> str:
        check_room(pool)
        return pool

    @model_validator(mode="after")
    def _both_or_neither(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together")
        return self

    @model_validator(mode="after")
    def _elsewhere(self) -> Self:
        try:
            check_origin(self.public_url, self.pool)
        except ValueError as error:
            raise ValueError(f"public_url: {error}") from None
        return self

    @model_validator(mode="after")
    def _certificate_by_acme(self) -> Self:
        if not self.web_tls.acme:
            return self
        if self.tls_certificate is not None:
            raise ValueError("web_tls.acme and tls_certificate exclude each other")
        if not self.public_url.startswith("https://") or not DOMAIN.fullmatch(self.web_host):
            raise ValueError("web_tls.acme: public_url must be https:// and a domain name")
        return self

    @model_validator(mode="after")
    def _no_token_in_the_open(self) -> Self:
        if self.tls_certificate is not None or self.web_tls.acme or self.trusted_proxies:
            return self
        for endpoint in self.listen:
            if not ipaddress.ip_address(split_endpoint(endpoint)[0]).is_loopback:
                raise ValueError(
                    f"listen {endpoint}: tokens would travel in the open; set tls_certificate and tls_key, "
                    "or web_tls.acme, or listen on loopback, or name the TLS proxy in trusted_proxies"
                )
        return self

    @property
    def web_host(self) -> str:
        """The host of `public_url`."""
        return urlsplit(self.public_url).hostname or ""

    @property
    def certificate_file(self) -> Path | None:
        """The chain that the API shows; None where it has no TLS of its own."""
        return self.web_tls.directory / f"{self.web_host}.pem" if self.web_tls.acme else self.tls_certificate

    @property
    def leaving_grace(self) -> timedelta:
        """From when its SRV is out until nobody looks for the name of a server that leaves in order."""
        return timedelta(seconds=self.dns.srv_ttl + self.policy.leaving_margin)

    @property
    def servers_domain(self) -> str:
        return f"servers.{self.pool}"

    def domain_of(self, name: str) -> str:
        """The pool associated domain name of a server."""
        return f"{name}.{self.servers_domain}"

    @property
    def database_file(self) -> Path | None:
        """The file of an SQLite database."""
        return Path(self.database.removeprefix(_SQLITE)) if self.database.startswith(_SQLITE) else None

    @property
    def join_token_life(self) -> timedelta:
        return timedelta(hours=self.policy.join_token_hours)


def load_settings(file: Path) -> Settings:
    """The settings of a TOML file and the environment. Raises ConfigError that names the setting."""
    if not file.is_file():
        raise ConfigError(f"{file}: there is no such settings file")
    try:
        return _resolve_paths(Settings.load(file), file.resolve().parent)
    except SettingsError as error:
        raise ConfigError(str(error)) from None


_CA_FILES = ("account_key_file", "binding_key_file", "socket", "ca_file")


def _resolve_paths(settings: Settings, base: Path) -> Settings:
    def absolute(section: Any, *names: str) -> dict[str, Path]:
        values = {name: getattr(section, name) for name in names}
        return {name: base / value for name, value in values.items() if value is not None}

    database = settings.database
    if settings.database_file is not None:
        database = _SQLITE + str(base / settings.database_file)
    mail, rehearsal, embedded = settings.mail, settings.ca.rehearsal, settings.dns.embedded
    return settings.model_copy(
        update={
            "database": database,
            **absolute(settings, "key_file", "journal_file", "roots_file", "tls_certificate", "tls_key"),
            "web_tls": settings.web_tls.model_copy(update=absolute(settings.web_tls, "directory")),
            "dns": settings.dns.model_copy(
                update={
                    **absolute(settings.dns, "tsig_secret_file"),
                    "embedded": embedded
                    and embedded.model_copy(
                        update={
                            **absolute(embedded, "directory"),
                            "secondaries": tuple(
                                each.model_copy(update=absolute(each, "tsig_secret_file"))
                                for each in embedded.secondaries
                            ),
                        }
                    ),
                }
            ),
            "oidc": tuple(
                entry.model_copy(update=absolute(entry, "client_secret_file", "ca_file"))
                for entry in settings.oidc
            ),
            "ca": settings.ca.model_copy(
                update={
                    **absolute(settings.ca, *_CA_FILES),
                    "fallback": tuple(
                        ca.model_copy(update=absolute(ca, *_CA_FILES)) for ca in settings.ca.fallback
                    ),
                    "rehearsal": rehearsal and rehearsal.model_copy(update=absolute(rehearsal, *_CA_FILES)),
                }
            ),
            "geo": settings.geo.model_copy(
                update={"database": tuple(base / file for file in settings.geo.database)}
            ),
            "mail": mail and mail.model_copy(update=absolute(mail, "password_file", "ca_file")),
        }
    )
