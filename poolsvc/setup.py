"""Day one: settings, keys, and the primary's configuration for a new pool.

Everything is rendered from checked answers, and written only where nothing of it is yet.
"""

import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from string import Template
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from nts_core.acme import new_account_key
from nts_core.shell import parse_host_port, sync
from poolsvc.config import DomainName, HttpsUrl, HttpUrl, check_origin, check_room, join_endpoint
from poolsvc.errors import PoolError
from poolsvc.names import DOMAIN
from poolsvc.primary import new_secret
from poolsvc.regions import REGIONS
from poolsvc.sandbox import SANDBOX
from poolsvc.zone import CLOSED

SETTINGS = "poolsvc.toml"
TRANSFER_SECRET, EDGE_SECRET = "transfer.secret", "edge.secret"
TSIG_SECRET = "tsig.secret"  # noqa: S105 - a file's name
ACCOUNT_KEY = "acme-account.pem"
KNOT_TSIG, BIND_TSIG, POWERDNS_TSIG = "knot-tsig.conf", "bind-tsig.conf", "pdns-tsig.sh"
TSIG_ALGORITHM = "hmac-sha256"
EDGE_UNIT = "poolsvc-edge.service"
KNOT_STORAGE = "/var/lib/knot"  # Debian's
MAX_NAMESERVERS = 16
DNS_PORT = 53

# What these CAs are called in CAA records.
_IDENTITIES = {
    "acme-v02.api.letsencrypt.org": "letsencrypt.org",
    "acme-staging-v02.api.letsencrypt.org": "letsencrypt.org",
}
_MAILTO = re.compile(r"mailto:[A-Za-z0-9.!#$&'*+/=?^_`{|}~-]+@[A-Za-z0-9.-]+\.[A-Za-z0-9-]+")
_PLAIN_PATH = re.compile(r"[A-Za-z0-9._/+-]+")
_PRIVATE = 0o600
_REGIONS_A_LINE = 6


class InvalidAnswer(PoolError):
    """`field` is the option that was wrong."""

    code = "invalid-answer"


class WouldOverwrite(PoolError):
    """A file is in the way of one that would be written."""

    code = "would-overwrite"


class NotWritten(PoolError):
    """The directory or a file cannot be made."""

    code = "not-written"


def _plain(text: str) -> str:
    if not text.isascii() or not text.isprintable() or re.search(r"[\s\"<>\\^`{|}]", text):
        raise ValueError("write it without spaces, quotes and characters that a URL does not have")
    urlsplit(text).port  # noqa: B018 - raises ValueError for a port that is none
    return text


def _mailto(text: str) -> str:
    if len(text) > 300 or _MAILTO.fullmatch(text) is None:
        raise ValueError("write it as mailto:NAME@DOMAIN")
    return text


@dataclass(frozen=True, slots=True)
class NamedServer:
    """An authoritative server: the name for the NS record, and one address."""

    name: str
    address: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "NamedServer":
        """NAME=ADDRESS or NAME=ADDRESS:PORT. Raises ValueError."""
        name, _, endpoint = text.partition("=")
        name = name.rstrip(".").lower()
        try:
            address, port = parse_host_port(endpoint, DNS_PORT)
            address = str(ip_address(address))
        except ValueError:
            raise ValueError("write it as NAME=ADDRESS, such as ns1.pool.example=192.0.2.53") from None
        if not DOMAIN.fullmatch(name):
            raise ValueError(f"{name!r} is not the whole name of a host, such as ns1.pool.example")
        return cls(name, address, port)

    @property
    def endpoint(self) -> str:
        return join_endpoint(self.address, self.port)

    @property
    def at(self) -> str:
        """As Knot and NSD write it."""
        return f"{self.address}@{self.port}"


class Answers(BaseModel):
    """What the operator said; each value is fit for the settings and for the primary's configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pool: DomainName
    nameservers: tuple[NamedServer, ...] = Field(min_length=1, max_length=MAX_NAMESERVERS)
    public_url: Annotated[HttpUrl, AfterValidator(_plain)]
    ca: Annotated[HttpsUrl, AfterValidator(_plain)]
    caa_identity: DomainName
    contact: tuple[Annotated[str, AfterValidator(_mailto)], ...] = ()
    own_primary: bool = False  # in place of the embedded server

    @field_validator("pool")
    @classmethod
    def _fits(cls, pool: str) -> str:
        check_room(pool)
        return pool

    @field_validator("public_url")
    @classmethod
    def _elsewhere(cls, url: str, info: ValidationInfo) -> str:
        if "pool" in info.data:
            check_origin(url, info.data["pool"])
        if url.startswith("http://") and not _is_loopback(urlsplit(url).hostname or ""):
            raise ValueError("agents accept plain http on loopback only")
        return url

    @property
    def tsig_name(self) -> str:
        return f"publisher.{self.pool}"

    @property
    def transfer_name(self) -> str:
        """The key of the secondaries: it may read the zone, and change nothing."""
        return f"transfer.{self.pool}"

    @property
    def edge_name(self) -> str:
        """The key of edges, which sign by themselves."""
        return f"edge.{self.pool}"

    @property
    def primary(self) -> NamedServer:
        return self.nameservers[0]

    @property
    def secondaries(self) -> dict[str, list[NamedServer]]:
        """By name, each with all its addresses."""
        found: dict[str, list[NamedServer]] = {}
        for server in self.nameservers:
            if server.name != self.primary.name:
                found.setdefault(server.name, []).append(server)
        return found

    def nameserver_addresses(self) -> dict[str, list[str]]:
        """By name, in the order in which they were given."""
        found: dict[str, list[str]] = {}
        for server in self.nameservers:
            found.setdefault(server.name, []).append(server.address)
        return found


_OPTIONS = {
    "pool": ("POOL", "give the pool's domain, such as pool.example"),
    "nameservers": ("--nameserver", f"give 1 to {MAX_NAMESERVERS} of them"),
    "public_url": (
        "--public-url",
        "give an address under another domain, such as https://registry.example.net",
    ),
    "ca": ("--ca", "give the URL of the CA's ACME directory"),
    "caa_identity": (
        "--caa-identity",
        "give the CA's name in CAA records; its directory lists it in caaIdentities",
    ),
    "contact": ("--contact", "give a mail address that somebody reads"),
}


def check_answers(
    *,
    pool: str,
    nameservers: Iterable[str],
    public_url: str,
    ca: str,
    caa_identity: str | None,
    contact: Iterable[str],
    own_primary: bool = False,
) -> Answers:
    """The answers, once all of them are usable. Raises InvalidAnswer for the first that is not.

    Without nameservers there is one on this host, which is enough for a trial.
    """
    try:
        servers = tuple(NamedServer.parse(text) for text in nameservers)
    except ValueError as error:
        raise _invalid("nameservers", str(error)) from None
    own = NamedServer(f"ns1.{pool.rstrip('.').lower()}", "127.0.0.1", DNS_PORT)
    try:
        return Answers(
            pool=pool,
            nameservers=servers or (own,),
            public_url=public_url,
            ca=ca,
            caa_identity=caa_identity or _identity(ca),
            contact=tuple(contact),
            own_primary=own_primary,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise _invalid(str(first["loc"][0]), first["msg"].removeprefix("Value error, ")) from None


def _invalid(answer: str, message: str) -> InvalidAnswer:
    option, remedy = _OPTIONS[answer]
    return InvalidAnswer(f"{option}: {message}", remedy=remedy, field=option)


def _identity(ca: str) -> str:
    """The name in CAA records of a CA that we know, else nothing, which is no domain."""
    return next((name for host, name in _IDENTITIES.items() if ca.startswith(f"https://{host}/")), "")


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def render(answers: Answers, *, directory: Path, program: Path) -> dict[str, bytes]:
    """The files by name, with new keys. `program` is the `poolsvc` that the service starts.

    Raises InvalidAnswer for a directory whose path would not be read back from the service's unit.
    """
    if not _PLAIN_PATH.fullmatch(str(directory)):
        raise InvalidAnswer(
            f"--directory: {str(directory)!r} has characters that a systemd unit reads in another way",
            remedy="give a path of letters, digits and . _ - +",
            field="--directory",
        )
    values = {
        "pool": answers.pool,
        "public_url": _toml(answers.public_url),
        "dns": _dns_section(answers),
        "credential": Template(_CREDENTIAL).substitute(directory=directory) if answers.own_primary else "",
        "capabilities": "" if answers.own_primary else "CAP_NET_BIND_SERVICE",
        "ca": _toml(answers.ca),
        "caa_identity": answers.caa_identity,
        "contact": _toml(answers.contact),
        "account_key": ACCOUNT_KEY,
        "settings": SETTINGS,
        "directory": directory,
        "program": program,
        "storage": KNOT_STORAGE,
    }
    secret, transfer_secret, edge_secret = (new_secret() for _ in range(3))
    files = nameserver_files(answers, secret, transfer_secret, edge_secret)
    if answers.own_primary:
        files[TSIG_SECRET] = f"{secret}\n".encode()
    else:
        files = {name: files[name] for name in _SECONDARIES}
        files[TRANSFER_SECRET] = f"{transfer_secret}\n".encode()
        files[EDGE_SECRET] = f"{edge_secret}\n".encode()
    return {
        **files,
        "poolsvc.service": Template(_SERVICE).substitute(values, sandbox=SANDBOX).encode(),
        **(
            {}
            if answers.own_primary
            else {EDGE_UNIT: Template(_EDGE_SERVICE).substitute(values, sandbox=SANDBOX).encode()}
        ),
        ACCOUNT_KEY: new_account_key(),
        SETTINGS: Template(_SETTINGS).substitute(values).encode(),  # the last one: with it the pool is set up
    }


def _dns_section(answers: Answers) -> str:
    """The settings of the server that has the zone."""
    nameservers = _toml([server.endpoint for server in answers.nameservers])
    if answers.own_primary:
        return Template(_DNS).substitute(
            primary=_toml(answers.primary.endpoint),
            nameservers=nameservers,
            tsig_name=answers.tsig_name,
            tsig_secret=TSIG_SECRET,
            tsig_algorithm=TSIG_ALGORITHM,
        )
    port = answers.primary.port
    everywhere = [f"0.0.0.0:{port}", f"[::]:{port}"]
    is_trial = _is_loopback(answers.primary.address)
    text = Template(_EMBEDDED).substitute(
        nameservers=nameservers,
        listen=_toml([answers.primary.endpoint] if is_trial else everywhere),
        names="".join(
            f"\n[[dns.embedded.nameservers]]\nname = {_toml(name)}\naddresses = {_toml(addresses)}\n"
            for name, addresses in answers.nameserver_addresses().items()
        ),
    )
    secondaries = (server for found in answers.secondaries.values() for server in found)
    return text + "".join(
        f"\n[[dns.embedded.secondaries]]\naddress = {_toml(server.endpoint)}\ntsig_name = {_toml(answers.transfer_name)}\n"
        f'tsig_secret_file = "{TRANSFER_SECRET}"\n'
        for server in secondaries
    )


def _region_owners(pool: str) -> Iterator[str]:
    """Above the SRV of every region, some owners a line."""
    regions = sorted(REGIONS)
    for start in range(0, len(regions), _REGIONS_A_LINE):
        yield ", ".join(f"_tcp.{region}.{pool}." for region in regions[start : start + _REGIONS_A_LINE])


def nameserver_files(
    answers: Answers, secret: str, transfer_secret: str, edge_secret: str
) -> dict[str, bytes]:
    """For each kind of primary and of secondary its configuration, with the publisher's key and the secondaries'.

    Edges, which get the zone unsigned, have a key of their own.
    """
    transfer, by_name = answers.transfer_name, answers.secondaries
    secondaries = [server for found in by_name.values() for server in found]
    # Knot notifies only one address of a remote, which is right for the addresses of one server.
    remotes = "".join(
        f"  - id: {name}\n    address: {json.dumps([server.at for server in found])}\n    key: {transfer}\n"
        for name, found in by_name.items()
    )
    values = {
        "pool": answers.pool,
        "tsig_name": answers.tsig_name,
        "transfer_name": transfer,
        "transfer_secret": transfer_secret,
        "edge_name": answers.edge_name,
        "edge_secret": edge_secret,
        "algorithm": TSIG_ALGORITHM,
        "sets_file": f"{KNOT_STORAGE}/{answers.pool}-sets.conf",
        "primary_endpoint": answers.primary.endpoint,
        "knot_tsig": KNOT_TSIG,
        "bind_tsig": BIND_TSIG,
        "powerdns_tsig": POWERDNS_TSIG,
        "primary": answers.primary.at,
        "primary_address": answers.primary.address,
        "primary_port": answers.primary.port,
        "knot_remotes": f"remote:\n{remotes}" if remotes else "",
        "knot_regions": "".join(
            f"    update-owner-name: [{owners}]\n" for owners in _region_owners(answers.pool)
        ),
        "knot_notify": f"    notify: [{', '.join(by_name)}]\n" if by_name else "",
        "bind_secondaries": "".join(
            f' {server.address} port {server.port} key "{transfer}";' for server in secondaries
        ),
        "powerdns_secondaries": shlex.join(server.endpoint for server in secondaries),
        "zone_records": "".join(f"{owner:24} {rest}\n" for owner, rest in zone_records(answers)),
    }
    return {
        **{name: Template(text).substitute(values).encode() for name, text in _NAMESERVERS.items()},
        **tsig_files(answers.tsig_name, TSIG_ALGORITHM, secret),
    }


def tsig_files(name: str, algorithm: str, secret: str) -> dict[str, bytes]:
    """The key as Knot, BIND and PowerDNS take it."""
    values = {"name": name, "algorithm": algorithm, "secret": secret}
    return {
        KNOT_TSIG: Template(_KNOT_KEY).substitute(values).encode(),
        BIND_TSIG: Template(_BIND_KEY).substitute(values).encode(),
        POWERDNS_TSIG: Template(_POWERDNS_KEY).substitute(values).encode(),
    }


def zone_records(answers: Answers) -> list[tuple[str, str]]:
    """The zone to begin with: owner relative to the pool or absolute, and the rest of the line."""
    inside = f".{answers.pool}"
    first = answers.primary.name
    # A secondary that missed a notification asks within a minute.
    records = [("@", f"3600 SOA {first}. hostmaster.{answers.pool}. 1 60 30 604800 60")]
    records += [("@", f"3600 NS {name}.") for name in answers.nameserver_addresses()]
    records.append(("@", f"3600 CAA {CLOSED}"))
    records += [
        (
            server.name.removesuffix(inside),
            f"3600 {'AAAA' if ':' in server.address else 'A'} {server.address}",
        )
        for server in answers.nameservers
        if server.name.endswith(inside)
    ]
    return records


def knot_commands(answers: Answers) -> list[str]:
    """Begins the zone on a running Knot that has the configuration."""
    pool = answers.pool
    sets = [
        shlex.join(["knotc", "zone-set", pool, owner, *rest.split()]) for owner, rest in zone_records(answers)
    ]
    return [f"knotc zone-begin {pool}", *sets, f"knotc zone-commit {pool}"]


def write(directory: Path, files: Mapping[str, bytes]) -> None:
    """Make all the files, each with mode 0600, or none; the directory is made with 0700.

    Raises WouldOverwrite when one is there, NotWritten when one cannot be made.
    """
    placed: list[Path] = []
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _refuse_existing(directory, files)
        stage = Path(tempfile.mkdtemp(dir=directory, prefix=".init-"))
        try:
            for name, content in files.items():
                with os.fdopen(
                    os.open(stage / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _PRIVATE), "wb"
                ) as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            for name in files:
                os.link(stage / name, directory / name)  # unlike a rename, never over a file
                placed.append(directory / name)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
        sync(directory)
    except OSError as error:
        for path in placed:
            with suppress(OSError):
                path.unlink()
        if isinstance(error, FileExistsError):
            _refuse_existing(directory, files)
        raise NotWritten(
            f"{directory}: {error.strerror or error}",
            remedy="give a directory that this user may write to",
            field="--directory",
        ) from None


def _refuse_existing(directory: Path, files: Iterable[str]) -> None:
    for name in files:
        if os.path.lexists(directory / name):
            raise WouldOverwrite(
                f"{directory / name} exists",
                remedy="give another --directory; or move the files of a pool that you do not want any more away",
                field="--directory",
            )


def _toml(value: object) -> str:
    """Strings and lists of strings in TOML, which writes them as JSON does."""
    return json.dumps(value)


_SETTINGS = """\
# The registry of $pool. docs/operators.md explains each setting; `poolsvc config show` prints all that hold.
# Relative paths are relative to this file.

pool = "$pool"

# Where agents and members reach the registry. It must be https, and not under $pool.
public_url = $public_url

# Where it listens. Either a reverse proxy before it has the certificate, or the two files below do.
listen = ["127.0.0.1:8080"]
# trusted_proxies = ["127.0.0.1"]
# tls_certificate = "tls.pem"
# tls_key = "tls.key"

# Who gets an account: everybody ("open"), everybody whom an operator approves ("approval"), or who is invited
# ("invitation").
sign_up = "approval"

# SQLite is right for one process; several share a PostgreSQL: "postgresql+psycopg://USER@HOST/NAME".
database = "sqlite+aiosqlite:///registry.db"

$dns
[ca]
# The registry accepts the terms of service of this CA in your name: read them.
directory_url = $ca
caa_identity = "$caa_identity"
account_key_file = "$account_key"
contact = $contact
# Which certificates to ask for; without it tlsserver, where the CA has such.
# profile = "shortlived"
# Others for when this one is away, each with directory_url, caa_identity and account_key_file of its own:
# [[ca.fallback]]
# A staging CA, where first orders are tried, likewise:
# [ca.rehearsal]

# Time servers of different operators, none of the pool's: the registry's own monitor probes nothing while most of them do
# not agree with this host's clock within 10 ms. Without any, its clock and network are not checked.
# [monitor]
# references = ["nts:TIME.ONE.EXAMPLE", "nts:TIME.TWO.EXAMPLE", "ntp:TIME.THREE.EXAMPLE"]

# Files in MaxMind's format, for DNS to tell clients in which network and country each server is.
# [geo]
# database = ["GeoLite2-ASN.mmdb", "GeoLite2-Country.mmdb"]

[policy]
# Servers that must work before clients are told of any.
opening_size = 4

# What people accept before they register a server. Give the address of the agreement itself, and another version when
# it changes: then everybody is asked again.
[[terms]]
document = "ca-subscriber-agreement"
version = "1"
title = "The subscriber agreement of $caa_identity, the CA of the pool"
url = "https://$caa_identity/"

[[terms]]
document = "public-certificates"
version = "1"
title = "Each certificate, and with it the server's name, is published for ever (Certificate Transparency)"
url = "https://certificate.transparency.dev/"
"""

_DNS = """\
[dns]
# The server that takes updates, and all that clients may ask; each must show a change before it counts.
primary = $primary
nameservers = $nameservers
tsig_name = "$tsig_name"
tsig_secret_file = "$tsig_secret"
tsig_algorithm = "$tsig_algorithm"
"""

_EMBEDDED = """\
[dns]
# All that clients may ask; each must show a change before it counts.
nameservers = $nameservers

[dns.embedded]
# The zone is served from here: docs/embedded-dns.md. Its keys are made in `dns` at the first start.
listen = $listen
$names"""

_CREDENTIAL = """\
LoadCredential=tsig.secret:$directory/tsig.secret
Environment=POOLSVC_DNS__TSIG_SECRET_FILE=%d/tsig.secret
"""

_KNOT_KEY = """\
key:
  - id: $name
    algorithm: $algorithm
    secret: $secret
"""

_BIND_KEY = """\
key "$name" {
    algorithm $algorithm;
    secret "$secret";
};
"""

_POWERDNS_KEY = """\
#!/bin/sh
# As root at the primary. Options go to pdnsutil, such as --config-dir=DIRECTORY.
pdnsutil "$$@" import-tsig-key $name $algorithm $secret
"""

# Knot matches a whole message against one acl rule, so everything that the publisher writes stands in one.
_KNOT = """\
# For knot.conf: include: knot-pool.conf
include: $knot_tsig
key:
  - id: $transfer_name
    algorithm: $algorithm
    secret: $transfer_secret
${knot_remotes}acl:
  - id: $pool-transfer
    key: [$tsig_name, $transfer_name]
    action: transfer
  - id: $pool-update
    key: $tsig_name
    action: update
    update-type: [A, AAAA, CAA, TXT, SRV]
    update-owner: name
    update-owner-match: sub-or-equal
    update-owner-name: [servers.$pool., _tcp.$pool., _fence.$pool.]
    # The SRV of regions: Knot 3.2 has no pattern for these.
${knot_regions}policy:
  - id: $pool-policy
    algorithm: ecdsap256sha256
    single-type-signing: on
    rrsig-refresh: 7d
# Answers with an SRV have the addresses of its targets too: at most 1,232 octets for a question of 60. Whoever is over
# the limit is told to come by TCP.
mod-rrl:
  - id: $pool-limit
    rate-limit: 200
    slip: 1
zone:
  - domain: $pool
    acl: [$pool-transfer, $pool-update]
${knot_notify}    module: mod-rrl/$pool-limit
    dnssec-signing: on
    dnssec-policy: $pool-policy
    # The journal is the zone: with a zone file a restart would throw the updates away.
    zonefile-sync: -1
    journal-content: all
    zonefile-load: none
"""

_KNOT_SECONDARY = """\
# A secondary with Knot. For its knot.conf: include: knot-secondary.conf
key:
  - id: $transfer_name
    algorithm: $algorithm
    secret: $transfer_secret
remote:
  - id: $pool-primary
    address: "$primary"
    key: $transfer_name
acl:
  - id: $pool-notify
    key: $transfer_name
    action: notify
mod-rrl:
  - id: $pool-limit
    rate-limit: 200
    slip: 1
zone:
  - domain: $pool
    master: $pool-primary
    acl: $pool-notify
    module: mod-rrl/$pool-limit
    zonefile-sync: -1
    journal-content: all
    zonefile-load: none
"""

_KNOT_EDGE = """\
# An edge with Knot: it takes the zone from the embedded server, which tells its secondary with `signs = true` nothing of
# signatures, signs it with the key that `poolsvc dns keys copy-to-knot` brings, and answers. For its knot.conf:
# include: knot-edge.conf. All edges have the same key, and roll it only together. knotd needs the file of mod-geoip to
# start, if empty; `poolsvc dns edge --config edge.toml` keeps it, as poolsvc-edge.service starts it.
key:
  - id: $edge_name
    algorithm: $algorithm
    secret: $edge_secret
remote:
  - id: $pool-primary
    address: "$primary"
    key: $edge_name
acl:
  - id: $pool-notify
    key: $edge_name
    action: notify
policy:
  - id: $pool-edge
    manual: on
    algorithm: ecdsap256sha256
    single-type-signing: on
    rrsig-lifetime: 14d
    rrsig-refresh: 7d
# Which of many signed SRV RRsets an answer has, at random; the TTL is dns.srv_ttl of the registry.
mod-geoip:
  - id: $pool-sets
    config-file: $sets_file
    ttl: 60
    mode: weighted
mod-rrl:
  - id: $pool-limit
    rate-limit: 200
    slip: 1
zone:
  - domain: $pool
    master: $pool-primary
    acl: $pool-notify
    module: [mod-rrl/$pool-limit, mod-geoip/$pool-sets]
    dnssec-signing: on
    dnssec-policy: $pool-edge
    zonefile-sync: -1
    journal-content: all
    zonefile-load: none
"""

_EDGE = """\
# What `poolsvc dns edge` on the host of an edge needs to know; docs/dns-servers.md. Relative paths are relative to this file.
pool = "$pool"
# The embedded server, and the key by which knotd gets the zone from it.
source = "$primary_endpoint"
tsig_name = "$edge_name"
tsig_secret_file = "edge.secret"
tsig_algorithm = "$algorithm"
# As in knot-edge.conf, and where knotd answers.
sets_file = "$sets_file"
knot_config = "/etc/knot/knot.conf"
knotd = "127.0.0.1:53"
# metrics = "127.0.0.1:9466"
"""

_BIND = """\
// For named.conf.local: include "/etc/bind/bind-pool.conf";
include "/etc/bind/$bind_tsig";
key "$transfer_name" {
    algorithm $algorithm;
    secret "$transfer_secret";
};
zone "$pool" {
    type primary;
    file "/var/lib/bind/$pool.zone";
    dnssec-policy default;
    // With yes, updates are acknowledged long before they are signed.
    inline-signing no;
    allow-transfer { key "$tsig_name"; key "$transfer_name"; };
    notify explicit;
    notify-delay 0;
    also-notify {$bind_secondaries };
    update-policy {
        // TXT for each server and for _acme-challenge below it: BIND has no narrower rule for such names.
        grant "$tsig_name" subdomain servers.$pool. A AAAA CAA TXT;
        grant "$tsig_name" name _ntske._tcp.$pool. SRV;
        // Of regions, such as _ntske._tcp.de. BIND has no narrower rule for such names either.
        grant "$tsig_name" wildcard *.$pool. SRV;
        grant "$tsig_name" name _fence.$pool. TXT;
    };
};
"""

_BIND_OPTIONS = """\
// In place of named.conf.options, on a host that serves nothing but zones of its own; for primary and secondary.
options {
    directory "/var/cache/bind";
    listen-on-v6 { any; };
    recursion no;
    // It resolves nothing, and would ask the root servers for their keys.
    dnssec-validation no;
    minimal-responses yes;
    allow-transfer { none; };
    // Whoever is over the limit is told to come by TCP.
    rate-limit { responses-per-second 200; slip 1; };
};
logging {
    // Otherwise one line for each record of each update.
    category update { null; };
};
"""

_BIND_SECONDARY = """\
// A secondary with BIND. For its named.conf.local: include "/etc/bind/bind-secondary.conf";
key "$transfer_name" {
    algorithm $algorithm;
    secret "$transfer_secret";
};
zone "$pool" {
    type secondary;
    file "$pool.zone";
    primaries { $primary_address port $primary_port key "$transfer_name"; };
    allow-notify { key "$transfer_name"; };
    allow-transfer { none; };
    notify no;
    // The SOA says how often it asks by itself; five minutes would be the least.
    min-refresh-time 1;
    min-retry-time 1;
};
"""

_NSD_SECONDARY = """\
# A secondary with NSD, for /etc/nsd/nsd.conf.d.
server:
    minimal-responses: yes
    # A change is shown at once, not after a second.
    xfrd-reload-timeout: 0
key:
    name: "$transfer_name"
    algorithm: $algorithm
    secret: "$transfer_secret"
zone:
    name: "$pool"
    zonefile: "$pool.zone"
    allow-notify: $primary_address "$transfer_name"
    request-xfr: $primary "$transfer_name"
"""

_POWERDNS = """\
# For /etc/powerdns/pdns.d, on a primary with a database in SQLite.
launch=gsqlite3
gsqlite3-database=/var/lib/powerdns/pdns.sqlite3
gsqlite3-dnssec=yes
gsqlite3-pragma-foreign-keys=yes
primary=yes
dnsupdate=yes
lua-dnsupdate-policy-script=/etc/powerdns/pdns-pool.lua
# Keys say who may update and transfer; without these two lines everybody on this host may.
allow-dnsupdate-from=
allow-axfr-ips=
# Only the servers of ALSO-NOTIFY: for the names of the NS it would ask a resolver, and an update waits for that.
only-notify=
"""

_POWERDNS_POLICY = """\
-- What the publisher's key may change. It holds for all zones of this server: others that take updates need lines too.
local pool, key = newDN("$pool"), newDN("$tsig_name")
local servers, fence = newDN("servers.$pool"), newDN("_fence.$pool")
local kinds = { [pdns.A] = true, [pdns.AAAA] = true, [pdns.CAA] = true, [pdns.TXT] = true }

-- The SRV of the pool, and of each of its regions: one label between.
local function isService(name)
    local above = newDN(name:toString())
    for _, label in ipairs({ "_ntske", "_tcp" }) do
        local rest = newDN(above:toString())
        if not rest:chopOff() or newDN(label .. "." .. rest:toString()) ~= above then
            return false
        end
        above = rest
    end
    return above == pool or (above:chopOff() and above == pool)
end

function updatepolicy(update)
    local name, kind = update:getQName(), update:getQType()
    if update:getZoneName() ~= pool or update:getTsigName() ~= key then
        return false
    end
    return (name:isPartOf(servers) and kinds[kind] == true)
        or (kind == pdns.SRV and isService(name))
        or (name == fence and kind == pdns.TXT)
end
"""

_POWERDNS_ZONE = """\
#!/bin/sh
# As root at the primary, once: begins the zone. Options go to pdnsutil, such as --config-dir=DIRECTORY.
set -eu
cd "$$(dirname "$$0")"
sh $powerdns_tsig "$$@"
pdnsutil "$$@" import-tsig-key $transfer_name $algorithm $transfer_secret
pdnsutil "$$@" load-zone $pool pool.zone
pdnsutil "$$@" secure-zone $pool
pdnsutil "$$@" set-kind $pool primary
pdnsutil "$$@" set-meta $pool ALLOW-DNSUPDATE-FROM 0.0.0.0/0 ::/0
pdnsutil "$$@" set-meta $pool TSIG-ALLOW-DNSUPDATE $tsig_name
# The first one also signs the notifications.
pdnsutil "$$@" set-meta $pool TSIG-ALLOW-AXFR $transfer_name $tsig_name
pdnsutil "$$@" set-meta $pool ALSO-NOTIFY $powerdns_secondaries
pdnsutil "$$@" set-meta $pool NOTIFY-DNSUPDATE 1
# The serial must grow with each update, and each week with the signatures. No other pair of settings does both.
pdnsutil "$$@" set-meta $pool SOA-EDIT-DNSUPDATE INCREASE
pdnsutil "$$@" set-meta $pool SOA-EDIT INCREMENT-WEEKS
pdnsutil "$$@" rectify-zone $pool
"""

_ZONE = """\
; What the zone begins with: on BIND /var/lib/bind/$pool.zone, on PowerDNS loaded by pdns-pool.sh.
$$ORIGIN $pool.
$zone_records"""

_SERVICE = """\
# For /etc/systemd/system. The user owns $directory and what is in it.
[Unit]
Description=Truechimer registry of $pool
After=network-online.target time-sync.target
Wants=network-online.target

[Service]
User=poolsvc
ExecStart=$program serve --config $directory/$settings
${credential}WorkingDirectory=$directory
ReadWritePaths=$directory
Restart=on-failure
RestartSec=5
# A wrong command line or setting does not get better by itself.
RestartPreventExitStatus=2 3
LimitNOFILE=65536
UMask=0077
AmbientCapabilities=$capabilities
CapabilityBoundingSet=$capabilities
ProtectHome=read-only
${sandbox}
[Install]
WantedBy=multi-user.target
"""

_EDGE_SERVICE = """\
# For /etc/systemd/system of an edge, beside Knot's own. edge.toml and edge.secret are in /etc/knot, and the user knot may
# read them.
[Unit]
Description=Answer sets of $pool for Knot DNS
After=network-online.target
Wants=network-online.target

[Service]
User=knot
ExecStart=$program dns edge --config /etc/knot/edge.toml
ReadWritePaths=$storage
Restart=on-failure
RestartSec=5
RestartPreventExitStatus=2 3
UMask=0077
CapabilityBoundingSet=
ProtectHome=read-only
${sandbox}
[Install]
WantedBy=multi-user.target
"""

# What the embedded server's secondaries and edges need.
_SECONDARIES = (
    *("knot-secondary.conf", "knot-edge.conf", "edge.toml"),
    *("bind-secondary.conf", "bind-options.conf", "nsd-secondary.conf"),
)
_NAMESERVERS = {
    "knot-pool.conf": _KNOT,
    "knot-secondary.conf": _KNOT_SECONDARY,
    "knot-edge.conf": _KNOT_EDGE,
    "edge.toml": _EDGE,
    "bind-pool.conf": _BIND,
    "bind-options.conf": _BIND_OPTIONS,
    "bind-secondary.conf": _BIND_SECONDARY,
    "nsd-secondary.conf": _NSD_SECONDARY,
    "pdns-pool.conf": _POWERDNS,
    "pdns-pool.lua": _POWERDNS_POLICY,
    "pdns-pool.sh": _POWERDNS_ZONE,
    "pool.zone": _ZONE,
}
