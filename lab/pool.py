"""A whole pool on loopback: CA, signed zone, validating resolver, registry, and members with their agents.

Every member has an address of its own in 127.77.0.0/16, each in another /24, as members on the Internet would.
"""

import json
import ssl
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import httpx

from lab.ca_front import CaFront
from lab.certificates import Authority
from lab.embedded import RegistryDns
from lab.knot import Knot
from lab.pebble import SIX_DAYS, Pebble
from lab.processes import LabError, Process, free_port, wait_until
from lab.programs import NO_DAEMON, Finished, poolsvc, run, script
from lab.unbound import Unbound
from member_agent.sockets import is_local

POOL = "pool.example"
CAA_IDENTITY = "ca.pool.test"
_TTL = 2
_API_DEADLINE = 10.0
HAS_IPV6 = is_local("::1")

# Intervals that let a life of months pass in seconds; everything else is as in a real pool.
_CONFIG = """\
pool = "{pool}"
database = "{database}"
listen = {listen}
public_url = "{url}"
tls_certificate = "{tls.cert}"
tls_key = "{tls.key}"
allow_private_addresses = true
roots_file = "{roots}"

[ports]
http = {http_port}
tls = {tls_port}
ke = {ke_port}

{dns}srv_ttl = {ttl}
address_ttl = {ttl}

[ca]
directory_url = "{directory_url}"
caa_identity = "{caa}"
account_key_file = "acme-account.pem"
ca_file = "{ca_file}"

[ca.limits]
certificates = {{ count = 1000, hours = 1 }}
{rehearsal}
[policy]
dns_01 = true
opening_size = {opening_size}
max_stratum = 15
probe_interval = 0.5
exchange_spacing = 0.02
agent_interval = 0.5
reconcile_interval = 2
tick = 0.1
step_retry = 0.5
leaving_margin = {leaving_margin:g}
retry = [1, 2, 4]
# Here all agents, and all who look on, are one address.
requests_per_second_and_address = 1000
requests_per_second_and_token = 1000
request_burst = 1000
servers_per_member = 1000
unproved_servers_per_member = 1000
"""
_KNOT = """\
[dns]
primary = "{knot.address}:{knot.port}"
tsig_name = "{knot.tsig_name}"
tsig_secret_file = "tsig.secret"
nameservers = ["{knot.address}:{knot.port}"]
"""
_REHEARSAL = """
[ca.rehearsal]
directory_url = "{ca.directory_url}"
caa_identity = "staging.pool.test"
account_key_file = "acme-staging.pem"
ca_file = "{ca.ca_file}"
"""


def member_address(index: int) -> str:
    """The address of the member number `index`, from 1."""
    return f"127.77.{index}.1"


class Api:
    """The registry's API with one token; `root` is the file of the root that its certificate comes from.

    Calls leave from the address `source`, if one is given.
    """

    def __init__(self, url: str, root: Path, token: str | None = None, *, source: str | None = None) -> None:
        self._url = url
        self._tls = ssl.create_default_context(cafile=str(root))
        self._source = source
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}

    def request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> httpx.Response:
        transport = httpx.HTTPTransport(verify=self._tls, local_address=self._source, trust_env=False)
        with httpx.Client(transport=transport, timeout=_API_DEADLINE, headers=self._headers) as client:
            return client.request(method, self._url + path, json=body, headers=dict(headers))

    def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> dict[str, Any]:
        """The answer's document; LabError when the API refuses."""
        response = self.request(method, path, body, headers=headers)
        if response.is_error:
            raise LabError(f"{method} {path}: {response.status_code} {response.text}")
        document: dict[str, Any] = response.json()
        return document

    def server(self, name: str) -> dict[str, Any]:
        return self.call("GET", f"/v1/servers/{name}")


class Member:
    """One server of the pool with its agent."""

    def __init__(self, pool: "LabPool", name: str, addresses: Sequence[str], *options: str) -> None:
        self.pool = pool
        self.name = name
        self.addresses = tuple(addresses)
        self.state = pool.directory / f"agent-{name}"
        argv = [script("pool-agent"), "run", NO_DAEMON, "--state", str(self.state), "--local-stratum", "10"]
        argv += ["--ntp-port", str(pool.ntp_port), *options]
        self.process = Process(f"agent-{name}", argv, pool.directory)

    @property
    def address(self) -> str:
        return self.addresses[0]

    @property
    def domain(self) -> str:
        return f"{self.name}.servers.{POOL}"

    def register(self) -> str:
        """Register the server; the join token."""
        body = {"name": self.name, "addresses": list(self.addresses)}
        created = self.pool.member.call("POST", "/v1/servers", body)
        return str(created["join"]["join_token"])

    def join(self, token: str) -> Finished:
        return self.pool.join(token, self.state)

    def start(self) -> Self:
        """Register, join and run; what comes then is the registry's doing."""
        joined = self.join(self.register())
        if joined.status:
            raise LabError(f"{self.name} could not join: {joined.stderr}")
        self.process.start()
        return self

    def view(self) -> dict[str, Any]:
        """The server as its member sees it in the registry."""
        return self.pool.member.server(self.name)


class LabPool:
    """Everything but the members, started in order; a context manager that ends all it started."""

    def __init__(
        self,
        directory: Path,
        *,
        database: str | None = None,
        authz_reuse: int | None = None,
        nonce_reject: int = 5,
        addresses: int = 6,
        registry_address: str = "127.0.0.1",
        registry_name: str | None = None,
        more_addresses: Sequence[str] = (),
        opening_size: int = 4,
        validity: int = SIX_DAYS,
        leaving_margin: float = 1,
        fronted: bool = False,
        staged: bool = False,
        closed: bool = False,
        knot: bool = False,
        program: Sequence[str] | None = None,
    ) -> None:
        """`program` is run instead of `poolsvc serve`, with --config and the settings.

        `fronted` puts before Pebble what obeys CAA as a real CA does: `ca` is where everybody orders.
        `staged` adds a CA at which orders are rehearsed, `staging`. `closed`: the CA finds port 80 of every member
        closed. `knot` is the primary instead of the server that the registry embeds. Members know the registry by
        `registry_name`, if one is given, at its address and at `more_addresses`.
        """
        self.directory = directory.resolve()
        self.directory.mkdir(parents=True, exist_ok=True)
        everywhere = [member_address(index) for index in range(1, addresses + 1)]
        ports = (free_port(*everywhere) for _ in range(4))
        self.http_port, self.tls_port, self.ke_port, self.ntp_port = ports
        port = free_port()
        self._listen = [f"{address}:{port}" for address in (registry_address, *more_addresses)]
        self.url = f"https://{self._listen[0]}"
        self.public_url = f"https://{registry_name}:{port}" if registry_name else self.url
        authority = Authority(self.directory / "tls")
        host = registry_address.strip("[]")
        names = {"127.0.0.1", "::1", "localhost", host, registry_name or "localhost"}
        self._tls = authority.issue(*names, file="registry")
        self.registry_root = authority.root
        self.primary: Knot | RegistryDns
        if knot:
            self.primary = Knot(self.directory / "knot", zone=POOL, ttl=_TTL, soa_minimum=_TTL)
        else:
            self.primary = RegistryDns(self.directory, zone=POOL, ttl=_TTL, soa_minimum=_TTL)
        self.unbound = Unbound(self.directory / "unbound", [self.primary])
        self.staging: Pebble | None = None
        if staged:
            self.staging = Pebble(
                self.directory / "staging",
                resolver=f"{self.unbound.address}:{self.unbound.port}",
                http_port=self.http_port,
                tls_port=self.tls_port,
            )
        self.pebble = Pebble(
            self.directory / "pebble",
            resolver=f"{self.unbound.address}:{self.unbound.port}",
            http_port=free_port(*everywhere) if closed else self.http_port,
            tls_port=self.tls_port,
            authz_reuse=authz_reuse,
            nonce_reject=nonce_reject,
            validity=validity,
        )
        resolver = self.unbound.address, self.unbound.port
        self._front = CaFront(self.pebble, identity=CAA_IDENTITY, resolver=resolver) if fronted else None
        self.ca: Pebble | CaFront = self._front or self.pebble
        self.config = self.directory / "poolsvc.toml"
        self.roots = self.directory / "roots.pem"
        self.trust_anchor = self.directory / "trust-anchor"
        self._opening_size, self._leaving_margin = opening_size, leaving_margin
        self._database = database or "sqlite+aiosqlite:///registry.db"
        serve = program or [script("poolsvc"), "serve"]
        self.registry = Process("poolsvc", [*serve, "--config", str(self.config)], self.directory)
        self.members: list[Member] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.callback(self._stop_members)
            if isinstance(self.primary, Knot):
                stack.enter_context(self.primary)
            stack.enter_context(self.pebble)
            if self.staging is not None:
                stack.enter_context(self.staging)
            if self._front is not None:
                stack.enter_context(self._front)
            self.write_files()
            self._prepare_registry()
            stack.callback(self.registry.stop)
            self.start_registry()
            self.trust_anchor.write_text(self.primary.trust_anchor())
            stack.enter_context(self.unbound)
            # Members end first, then everything in the reverse of its order.
            stack.callback(self._stop_members)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _stop_members(self) -> None:
        for member in self.members:
            member.process.stop()

    def write_files(self) -> None:
        """The settings and the trust of this run; again after the CA was restarted with a new root."""
        self.roots.write_text(self.pebble.issuer_roots())
        if isinstance(self.primary, RegistryDns):
            section = self.primary.section()
        else:
            section = _KNOT.format(knot=self.primary)
            secret = self.directory / "tsig.secret"
            secret.touch(mode=0o600)
            secret.write_text(self.primary.tsig_secret)
        self.config.write_text(
            _CONFIG.format(
                pool=POOL,
                database=self._database,
                listen=json.dumps(self._listen),
                url=self.public_url,
                tls=self._tls,
                roots=self.roots,
                http_port=self.http_port,
                tls_port=self.tls_port,
                ke_port=self.ke_port,
                dns=section,
                ttl=_TTL,
                directory_url=self.ca.directory_url,
                caa=CAA_IDENTITY,
                ca_file=self.ca.ca_file,
                leaving_margin=self._leaving_margin,
                opening_size=self._opening_size,
                rehearsal="" if self.staging is None else _REHEARSAL.format(ca=self.staging),
            )
        )

    def _prepare_registry(self) -> None:
        self.poolsvc("migrate")
        self._operator_token = self.poolsvc("operator", "create").stdout.strip()

    def poolsvc(self, *arguments: str) -> Finished:
        """A command of the registry's with its settings; LabError when it fails."""
        done = poolsvc(self.config, *arguments)
        if done.status:
            raise LabError(f"poolsvc {' '.join(arguments)}: {done.stderr}")
        return done

    def restore(self, backup: Path, database: str) -> Finished:
        """Go on in another, empty database with what a backup and the journal hold; what the command said.

        Every token from before is useless: the operator has a new one, and looks at servers for their member.
        """
        self.registry.stop()
        self._database = database
        self.write_files()
        self.poolsvc("migrate")
        done = self.poolsvc("restore", str(backup))
        self._operator_token = self.poolsvc("operator", "create").stdout.strip()
        self.start_registry()
        self.member = self.operator
        return done

    def join(self, token: str, state: Path) -> Finished:
        """`pool-agent join` with a token, into a state directory; `run` proves the addresses."""
        options = ["--token", token, "--state", str(state), "--ca", str(self.registry_root), "--wait", "0"]
        return run("pool-agent", "join", self.public_url, *options)

    def start_registry(self) -> None:
        public = self.api()

        def answers() -> bool:
            try:
                return public.request("GET", "/v1/pool").is_success
            except httpx.TransportError:
                return False

        self.registry.start(answers)
        if isinstance(self.primary, RegistryDns):
            self.primary.start()
        self.operator = self.api(self._operator_token)
        if not hasattr(self, "member"):
            created = self.operator.call("POST", "/v1/members", {"name": "Laboratory member"})
            self.member_token = str(created["token"])
            self.member = self.api(self.member_token)

    def api(self, token: str | None = None, *, source: str | None = None) -> Api:
        return Api(self.url, self.registry_root, token, source=source)

    def add(self, name: str, *options: str, addresses: Sequence[str] = ()) -> Member:
        """A member at the next free address unless told where, not started yet."""
        member = Member(self, name, addresses or [member_address(len(self.members) + 1)], *options)
        self.members.append(member)
        return member

    def client(self, *arguments: str) -> Finished:
        """`pool-client sources` for this pool through the validating resolver."""
        return run(
            "pool-client",
            "sources",
            POOL,
            f"--resolver={self.unbound.address}:{self.unbound.port}",
            f"--trust-anchor={self.trust_anchor}",
            f"--ca={self.roots}",
            "--json",
            *arguments,
        )

    def query(self, member: Member) -> Finished:
        """`pool-client query` of one member by its name, at its first address."""
        return run(
            "pool-client",
            "query",
            f"{member.domain}:{self.ke_port}",
            f"--address={member.address}",
            f"--ca={self.roots}",
            "--samples=1",
            "--json",
        )

    def wait_for_state(self, member: Member, state: str, deadline: float = 40.0) -> dict[str, Any]:
        """The server's view once it is in that state; LabError with its own explanation otherwise."""
        view: dict[str, Any] = {}

        def reached() -> bool:
            view.clear()
            view.update(member.view())
            return bool(view["state"] == state)

        try:
            wait_until(reached, f"{member.name} {state}", deadline)
        except LabError as error:
            raise LabError(f"{error}; it is {view.get('state')}: {view.get('why')}") from None
        return view
