"""What the registry's tests share: both database engines, settings, servers in a state, and a CA."""

import asyncio
import contextlib
import itertools
import shlex
import shutil
import socketserver
import subprocess
import tempfile
import threading
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import dns.flags
import dns.message
import dns.query
import dns.rcode
import dns.rdatatype
import dns.rrset
import dns.tsig
import dns.update
import httpx
import pytest
import structlog
from alembic import command
from alembic.config import Config
from sqlalchemy import func, select
from typer.testing import CliRunner

import migrations
from lab.ca_front import CaFront
from lab.knot import Knot
from lab.nameservers import Primary
from lab.pebble import Pebble
from lab.postgres import Postgres
from lab.primaries import PRIMARIES, SECONDARIES
from lab.processes import Process, free_port, require, wait_until
from lab.zones import wanted
from member_agent.challenges import Responder
from nts_core.acme import AcmeAccount, AcmeConfig, OrderState
from nts_core.control import ACME_PATH, MonitorStatus, ServerState
from nts_core.tls import new_key_and_csr
from poolsvc import auth, issuance, members, monitors, servers
from poolsvc.app import create_app
from poolsvc.cli import app as poolsvc_app
from poolsvc.cli import configure_logging
from poolsvc.config import CaSettings, DnsSettings, PolicySettings, PortSettings, Settings
from poolsvc.db import Database
from poolsvc.delegation import NoReply, parent_records
from poolsvc.derived import Purpose, RegistryKey
from poolsvc.models import (
    Address,
    CaAccount,
    Delivery,
    HoldKind,
    MemberRole,
    Membership,
    MonitorView,
    Notice,
    OrderStatus,
    TokenKind,
    ViewRole,
)
from poolsvc.primary import Nameserver, PrimaryConfig
from poolsvc.publisher import Publisher
from poolsvc.servers import EventKind
from poolsvc.zone import CaaIssuer, ServerRecords, ZonePolicy, diff

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
NAME = "alice.servers.pool.example"
CAA_IDENTITY = "ca.example"
KEY = RegistryKey(bytes(32))


@pytest.fixture(scope="session", autouse=True)
def _plain_logs():
    """As `poolsvc serve` writes them; structlog's own default draws every traceback with its variables."""
    configure_logging()
    yield
    structlog.reset_defaults()


def alembic_config(url: str) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    config.attributes["url"] = url
    return config


@pytest.fixture(scope="session")
def alembic():
    """The function that makes Alembic's configuration for a database."""
    return alembic_config


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    with Postgres(tmp_path_factory.mktemp("postgres")) as running:
        yield running


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory):
    """A migrated database; every test gets a copy."""
    path = tmp_path_factory.mktemp("template") / "registry.db"
    command.upgrade(alembic_config(f"sqlite+aiosqlite:///{path}"), "head")
    return path


@pytest.fixture(scope="session")
def postgresql_template(cluster):
    """A migrated database; every test gets a copy."""
    url = cluster.create_database()
    command.upgrade(alembic_config(url), "head")
    return url


@pytest.fixture
def sqlite_url(sqlite_template, tmp_path):
    path = tmp_path / "registry.db"
    shutil.copy(sqlite_template, path)
    return f"sqlite+aiosqlite:///{path}"


@pytest.fixture
def postgresql_url(cluster, postgresql_template):
    url = cluster.create_database(template=postgresql_template)
    yield url
    cluster.drop_database(url)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request):
    """A migrated database of each engine in turn."""
    return request.getfixturevalue(f"{request.param}_url")


@pytest.fixture
async def database(database_url):
    database = Database(database_url)
    yield database
    await database.close()


@pytest.fixture
async def postgresql(postgresql_url):
    """For what only many processes at one PostgreSQL can do to each other."""
    database = Database(postgresql_url)
    yield database
    await database.close()


@pytest.fixture
def settings(tmp_path):
    return Settings(
        pool="pool.example",
        allow_private_addresses=True,
        key_file=tmp_path / "registry.key",
        journal_file=tmp_path / "removals.journal",
        listen=("127.0.0.1:8443",),
        ports=PortSettings(http=8080, ke=4460),
        dns=DnsSettings(
            primary="127.0.0.1:53",
            tsig_name="publisher.pool.example",
            tsig_secret_file=tmp_path / "tsig.secret",
            nameservers=("127.0.0.1:53",),
        ),
        ca=CaSettings(
            directory_url="https://ca.example/dir",
            caa_identity=CAA_IDENTITY,
            account_key_file=tmp_path / "account.pem",
        ),
        policy=PolicySettings(proof_deadline=2, exchange_spacing=0, tick=0.02, step_retry=10),
    )


@pytest.fixture
def tuned(settings):
    """Settings with other policy values: `tuned(opening_size=1)`; sections by name: `tuned(ports={...})`."""

    def change(**values):
        sections = {name: values.pop(name) for name in ("ports", "ca", "dns") if name in values}
        update = {name: getattr(settings, name).model_copy(update=new) for name, new in sections.items()}
        update["policy"] = settings.policy.model_copy(update=values)
        return settings.model_copy(update=update)

    return change


class Person(NamedTuple):
    """Somebody with an account, and the token of a session of theirs."""

    id: int
    token: str


class Registry:
    """Servers of one test, brought to a state by the ways that the registry itself has."""

    now = NOW

    def __init__(self, database: Database, settings: Settings) -> None:
        self.database, self.settings = database, settings

    async def member(self, name: str = "Member") -> int:
        async with self.database.transaction("test") as session:
            owner = await members.create_user(session, NOW)
            return (await members.create(session, name, NOW, owner=owner)).id

    async def owner_token(
        self, member: int, role: MemberRole = MemberRole.OWNER, kind: TokenKind = TokenKind.API, **options
    ) -> str:
        """A token of a person with that role in the member; options are those of `auth.issue`."""
        async with self.database.transaction("test") as session:
            user = await members.create_user(session, NOW)
            session.add(Membership(member_id=member, user_id=user.id, role=role, created_at=NOW))
            _, token = await auth.issue(session, kind, now=NOW, user_id=user.id, **options)
            return token

    async def person(self, member=None, role=MemberRole.OWNER, *, confirmed_at=NOW, **options) -> Person:
        """A new person, of a member if one is given; options are those of `members.create_user`."""
        async with self.database.transaction("test") as session:
            user = await members.create_user(session, NOW, **options)
            user.confirmed_at = confirmed_at
            if member is not None:
                session.add(Membership(member_id=member, user_id=user.id, role=role, created_at=NOW))
            _, token = await auth.issue(session, TokenKind.SESSION, now=NOW, user_id=user.id)
            return Person(user.id, token)

    async def monitor(self, name="frankfurt", member=None, status=MonitorStatus.ACTIVE):
        """A monitor in a status, and its token."""
        async with self.database.transaction("test") as session:
            row, token = await monitors.register(session, self.settings, name, member, self.now)
            row.status, row.sound, row.seen_at = status, True, self.now
            return row.id, token

    async def look(self, monitor_id, server_id, role=ViewRole.ACTIVE):
        """Let a monitor look at all addresses of a server from now on; the addresses' ids, which are its targets."""
        async with self.database.transaction("test") as session:
            found = await session.scalars(
                select(Address.id).where(Address.server_id == server_id).order_by(Address.id)
            )
            ids = list(found)
            for row in ids:
                session.add(
                    MonitorView(
                        address_id=row,
                        monitor_id=monitor_id,
                        role=role,
                        role_since=self.now,
                        due_at=self.now,
                        full_probes=0,
                    )
                )
            return ids

    async def server(
        self, name="alice", *addresses, state=ServerState.REGISTERED, member=None, agentless=False
    ) -> int:
        """The id of a new server; `addresses` are proved in all states but REGISTERED."""
        member = member or await self.member(f"member of {name}")
        async with self.database.transaction("test") as session:
            made = await servers.register(
                session,
                self.settings,
                member,
                name,
                addresses or ("198.18.0.1",),
                self.now,
                actor="test",
                agentless=agentless,
            )
        async with self.change(made.id) as (session, server):
            await _bring(session, server, state)
        return made.id

    @asynccontextmanager
    async def change(self, server_id: int):
        """One transaction: the session and the server in it."""
        async with self.database.transaction("test") as session:
            yield session, await servers.get(session, server_id)

    async def open_account(self, uri="https://ca.example/acct/1") -> None:
        """As if the worker had found the registry's account at the CA of the settings."""
        async with self.database.transaction("test") as session:
            row = await session.scalar(select(CaAccount).where(CaAccount.ca == self.settings.ca.name))
            if row is None:
                session.add(CaAccount(ca=self.settings.ca.name, uri=uri))
            else:
                row.uri = uri

    async def get(self, server_id: int):
        async with self.change(server_id) as (_, server):
            return server


async def _bring(session, server, state):
    async def step(kind):
        await servers.apply(session, server, kind, actor="test", reason="", now=NOW)

    path = list(ServerState)[: list(ServerState).index(state) + 1]
    if ServerState.VERIFIED in path:
        await step(EventKind.ADDRESS_PROVED)
        server.burnt_at = server.named_at = NOW
        for row in server.addresses:
            row.proved_at = NOW
    if ServerState.CERTIFIED in path:
        await step(EventKind.CERTIFICATE_SEEN)
    if ServerState.ACTIVE in path:
        await step(EventKind.NTS_CONFIRMED)
        for row in server.addresses:
            row.score = 12.0
    if state is ServerState.SUSPENDED:
        await servers.set_hold(session, server, HoldKind.OPERATOR, reason="test", actor="test", now=NOW)
    if ServerState.LEAVING in path:
        await servers.leave(session, server, actor="test", reason="test", now=NOW)
    if ServerState.REMOVED in path:
        await step(EventKind.CLOSED)


@pytest.fixture
def registry(database, settings):
    return Registry(database, settings)


@pytest.fixture
def registry_of():
    """For tests with a database or settings of their own: `registry_of(database, settings)`."""
    return Registry


@pytest.fixture
def knot(tmp_path):
    with Knot(tmp_path / "knot") as running:
        yield running


@pytest.fixture
def published_by(knot, tuned, tmp_path):
    """`published_by(**policy)`: settings whose zone is on that Knot, alone."""
    (tmp_path / "tsig.secret").write_text(knot.tsig_secret)
    endpoint = f"{knot.address}:{knot.port}"

    def change(**values):
        dns = {"primary": endpoint, "nameservers": (endpoint,), "tsig_name": knot.tsig_name, "srv_ttl": 3600}
        return tuned(dns=dns | values.pop("dns", {}), **{"opening_size": 2, **values})

    return change


# Every kind of primary and of secondary is in one of these; all pairs are in the long tests.
SHORT_PAIRS = {("knot", "bind"), ("bind", "nsd"), ("powerdns", "knot"), ("embedded", "nsd")}
PAIRS = [
    pytest.param(pair, id="+".join(pair), marks=() if pair in SHORT_PAIRS else pytest.mark.long)
    for pair in itertools.product(PRIMARIES, SECONDARIES)
]
CNAME = "cname.servers.pool.example."


@pytest.fixture(scope="module", params=PAIRS)
def pair(request, tmp_path_factory):
    """A primary with a secondary, as `poolsvc init` configures them."""
    primary, secondary = request.param
    directory = tmp_path_factory.mktemp("pair")
    first = PRIMARIES[primary](directory / "primary", records=[f"{CNAME} CNAME ns1"])
    second = SECONDARIES[secondary](directory / "secondary", first)
    with first, second:
        yield first


class SignedZone:
    """The zone on a primary with secondaries, empty at first but for what the operator put there, and its publisher."""

    policy = ZonePolicy(
        pool="pool.example",
        srv_ttl=1,
        address_ttl=1,
        ke_port=4460,
        caa=(CaaIssuer("ca.example", "https://ca.example/acct/1"),),
    )

    def __init__(self, primary: Primary) -> None:
        self.primary, self.servers = primary, (primary, *primary.secondaries)
        self.config = PrimaryConfig(
            address=primary.address,
            port=primary.port,
            tsig_name=primary.tsig_name,
            tsig_secret=primary.tsig_secret,
            nameservers=tuple(Nameserver(server.address, server.port) for server in self.servers),
            timeout=5.0,
        )
        self.publisher = self.publisher_with()
        self.epoch = 0

    def publisher_with(self, **options) -> Publisher:
        """One with other settings."""
        return Publisher(self.policy, replace(self.config, **options))

    async def begin(self):
        """As a new leader, in an empty zone."""
        self.epoch = (await self.publisher.fence() or 0) + 1
        await self.publisher.take_fence(self.epoch)
        await self.publish({})
        return self

    def pool(self, *names, **options):
        """What the zone holds of an open pool with servers of these names; options are those of each."""
        servers = [
            ServerRecords(
                name,
                number,
                (f"198.18.{number // 256}.{number % 256}", f"2001:db8::{number:x}"),
                True,
                **options,
            )
            for number, name in enumerate(names, start=1)
        ]
        return wanted(servers, self.policy, is_open=True, draw=0)

    async def publish(self, zone, publisher=None):
        """Bring the zone to this; the changes that it took."""

        async def plan(seen):
            return diff(zone, seen)

        return (await (publisher or self.publisher).bring(plan, self.epoch)).changes

    async def seen(self):
        return (await self.publisher.observe()).zone

    async def shown(self, zone, *gone):
        """Wait until every server shows this, signed, and nothing at the keys `gone`."""
        end = time.monotonic() + 10
        while mismatches := await self.publisher.verify([*zone, *gone], zone):
            assert time.monotonic() < end, mismatches
            await asyncio.sleep(0.02)

    def by_hand(self, change, **key):
        """An update that the publisher knows nothing of; its rcode."""
        key = {
            "name": self.primary.tsig_name,
            "secret": self.primary.tsig_secret,
            "algorithm": "hmac-sha256",
        } | key
        keyring = dns.tsig.Key(**key) if key["name"] else None
        update = dns.update.UpdateMessage(self.policy.apex, keyring=keyring)
        change(update)
        return dns.query.tcp(update, self.primary.address, timeout=5, port=self.primary.port).rcode()


@pytest.fixture
async def zone(pair):
    return await SignedZone(pair).begin()


@pytest.fixture
def signed_zone():
    """For tests with a primary of their own: `await signed_zone(PRIMARY).begin()`."""
    return SignedZone


class Udp(socketserver.BaseRequestHandler):
    def handle(self):
        octets, sock = self.request
        sock.sendto(answer_dns(octets), self.client_address)


class Tcp(socketserver.StreamRequestHandler):
    timeout = 5

    def handle(self):
        while length := self.rfile.read(2):
            answer = answer_dns(self.rfile.read(int.from_bytes(length)))
            self.wfile.write(len(answer).to_bytes(2) + answer)


class TcpServer(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


# What is asked of CAA here: an owner's records as text, or the code of a failure.
CAA_ANSWERS: dict[str, list[str] | dns.rcode.Rcode] = {}


@pytest.fixture
def caa():
    """CAA answers of this test's DNS: `caa["servers.pool.example."] = ['0 issue ";"']`, or an Rcode."""
    yield CAA_ANSWERS
    CAA_ANSWERS.clear()


# And of TXT: an owner's texts.
TXT_ANSWERS: dict[str, list[str]] = {}


@pytest.fixture
def txt():
    """TXT answers of this test's DNS: `txt["_acme-challenge.alice.servers.pool.example."] = ["text"]`."""
    yield TXT_ANSWERS
    TXT_ANSWERS.clear()


def answer_dns(octets: bytes) -> bytes:
    """Names under servers.pool.example have the address 127.0.0.1, others do not exist."""
    query = dns.message.from_wire(octets)
    answer = dns.message.make_response(query)
    answer.flags |= dns.flags.AA
    question = query.question[0]
    known = CAA_ANSWERS.get(question.name.to_text().lower()) if question.rdtype == dns.rdatatype.CAA else None
    if isinstance(known, dns.rcode.Rcode):
        answer.set_rcode(known)
    elif known is not None:
        answer.answer.append(dns.rrset.from_text(question.name, 1, "IN", "CAA", *known))
    elif not question.name.to_text().lower().endswith(".servers.pool.example."):
        answer.set_rcode(dns.rcode.NXDOMAIN)
    elif question.rdtype == dns.rdatatype.TXT:
        for text in TXT_ANSWERS.get(question.name.to_text().lower(), ()):
            answer.answer.append(dns.rrset.from_text(question.name, 1, "IN", "TXT", f'"{text}"'))
    elif question.rdtype == dns.rdatatype.A:
        answer.answer.append(dns.rrset.from_text(question.name, 1, "IN", "A", "127.0.0.1"))
    return answer.to_wire()


@pytest.fixture(scope="session")
def resolver():
    address = ("127.0.0.1", free_port())
    with TcpServer(address, Tcp) as tcp, socketserver.ThreadingUDPServer(address, Udp) as udp:
        threads = [threading.Thread(target=server.serve_forever, args=(0.05,)) for server in (tcp, udp)]
        for thread in threads:
            thread.start()
        yield f"127.0.0.1:{address[1]}"
        for server in (tcp, udp):
            server.shutdown()
        for thread in threads:
            thread.join()


@pytest.fixture
async def responder():
    async with Responder([NAME]) as responder:
        await responder.listen(("127.0.0.1", 0))
        yield responder


@pytest.fixture
def lab(tmp_path, resolver, responder):
    """Starts a Pebble that validates on our responder's port, and gives accounts there."""
    with Lab(tmp_path, resolver, responder) as lab:
        yield lab


class Lab(contextlib.ExitStack):
    def __init__(self, directory: Path, resolver: str, responder: Responder):
        super().__init__()
        self.directory, self.resolver, self.responder = directory, resolver, responder

    @staticmethod
    async def decided(account: AcmeAccount, order_url: str):
        """What became of a challenge that was answered."""
        end = time.monotonic() + 20
        while (status := await account.poll(order_url)).status is OrderState.PENDING:
            assert time.monotonic() < end, status
            await asyncio.sleep(0.02)
        return status

    def pebble(self, name="pebble", **options) -> Pebble:
        options = {"http_port": self.responder.endpoints[0][1], **options}
        return self.enter_context(Pebble(self.directory / name, resolver=self.resolver, **options))

    def settings(
        self,
        pebble: Pebble | CaFront,
        *fallback: Pebble,
        rehearsal: Pebble | CaFront | None = None,
        **options,
    ) -> CaSettings:
        """The settings of these CAs; `options` are the first one's."""

        def section(pebble: Pebble | CaFront):
            return {
                "directory_url": pebble.directory_url,
                "caa_identity": f"{pebble.ca_file.parent.name}.example",
                "account_key_file": self.directory / "keys" / f"{pebble.ca_file.parent.name}.pem",
                "ca_file": pebble.ca_file,
            }

        if rehearsal is not None:
            options["rehearsal"] = section(rehearsal)
        return CaSettings(**section(pebble), fallback=tuple(map(section, fallback)), **options)

    def front(self, pebble: Pebble, **options) -> CaFront:
        """A CA that obeys CAA and limits, and fails as it is told."""
        address, _, port = self.resolver.rpartition(":")
        options = {"identity": CAA_IDENTITY, "resolver": (address, int(port)), **options}
        return self.enter_context(CaFront(pebble, **options))

    def config(self, ca: Pebble | CaFront, *, timeout: int = 30) -> AcmeConfig:
        return AcmeConfig(
            directory_url=ca.directory_url,
            account_key_file=self.directory / "keys" / "account.pem",
            contact=("mailto:operator@pool.example",),
            ca_file=ca.ca_file,
            user_agent="truechimer-test",
            timeout=timeout,
        )

    async def account(self, ca: Pebble | CaFront, **options) -> AcmeAccount:
        account = await AcmeAccount.open(self.config(ca, **options))
        self.callback(account.close)
        return account


@pytest.fixture
def app(database, settings):
    """The ASGI application without its lifespan, so that no worker runs."""
    return create_app(settings, database, [], KEY)


@pytest.fixture
def client(app):
    """`client(token, source=ADDRESS)`: an HTTP client of the application that calls from an address."""

    def make(token=None, *, source="192.0.2.1", app=app):
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        transport = httpx.ASGITransport(app, client=(source, 40_000))
        return httpx.AsyncClient(transport=transport, base_url="https://registry", headers=headers)

    return make


@pytest.fixture
def call(client):
    """`await call(TOKEN, METHOD, PATH, json=BODY)`: one request of somebody."""

    async def send(token, method, path, **options):
        async with client(token) as http:
            return await http.request(method, path, **options)

    return send


def _by_age(model):
    """Keys of some rows are drawn by chance."""
    columns = model.__table__.columns
    return [columns[name] for name in ("created_at", "id") if name in columns]


class People:
    """Accounts and what is mailed to them, beside the API."""

    key = KEY

    def __init__(self, database):
        self.database = database

    async def make(self, email="ann@example.org", **options):
        async with self.database.transaction("test") as session:
            return await members.create_user(session, datetime.now(UTC), email=email, **options)

    async def all(self, model, *conditions):
        async with self.database.transaction() as session:
            return list(await session.scalars(select(model).where(*conditions).order_by(*_by_age(model))))

    async def count(self, model):
        async with self.database.transaction() as session:
            return await session.scalar(select(func.count()).select_from(model))

    async def mails(self):
        """Kind, letter, recipient and the link's token of all mails, the oldest first."""
        async with self.database.transaction() as session:
            found = await session.execute(
                select(Notice, Delivery).join(Delivery).order_by(Notice.id, Delivery.id)
            )
            return [
                SimpleNamespace(
                    kind=notice.kind,
                    letter=notice.data.get("letter"),
                    what=notice.data.get("what"),
                    to=delivery.email or delivery.user_id,
                    token=KEY.token(Purpose.SIGN_IN, notice.data.get("sign_in", 0)),
                )
                for notice, delivery in found
            ]

    async def age(self, model, by):
        """Let what there is be older."""
        async with self.database.transaction() as session:
            for row in await session.scalars(select(model)):
                for name in ("created_at", "expires_at"):
                    setattr(row, name, getattr(row, name) - by)

    async def session(self, user, **options):
        async with self.database.transaction() as session:
            _, token = await auth.issue(
                session, TokenKind.SESSION, now=datetime.now(UTC), user_id=user.id, **options
            )
            return token


@pytest.fixture
def people(database):
    return People(database)


def always(account: AcmeAccount):
    """Accounts of a registry with one CA."""

    async def accounts(_name, _now):
        return account

    return accounts


class Flow:
    """The server alice at 127.0.0.1 with its orders at a real CA; our responder plays its agent."""

    def __init__(self, registry: Registry, lab: Lab, pebble: Pebble) -> None:
        self.registry, self.lab, self.pebble = registry, lab, pebble
        self.ca: Pebble | CaFront = pebble
        self.database, self.settings = registry.database, registry.settings
        self.now = datetime.now(UTC)
        self.authorities = None  # those of a test with several CAs

    async def start(self):
        self.server_id = await self.registry.server("alice", "127.0.0.1", state=ServerState.VERIFIED)
        async with self.registry.change(self.server_id) as (_, server):
            server.joined_at = self.now
        return self

    async def account(self) -> AcmeAccount:
        return await self.lab.account(self.ca)

    async def server(self):
        return await self.registry.get(self.server_id)

    async def order(self):
        """The newest order."""
        return (await self.server()).orders[-1]

    async def begin(self) -> None:
        """A new order with the agent's request."""
        async with self.registry.change(self.server_id) as (session, server):
            issuance.want(server, self.now)
            await session.flush()
            order = server.orders[-1]
            csr = new_key_and_csr(NAME)[1]
            await issuance.take_csr(session, self.settings, server, order.id, csr, self.now)

    async def serve(self) -> None:
        """The agent serves the challenge that the registry relays, and says so."""
        async with self.registry.change(self.server_id) as (_, server):
            for challenge in issuance.challenges(server):
                path, body = ACME_PATH + challenge.token, challenge.key_authorization.encode()
                self.responder.publish(NAME, path, body)
                issuance.note_serving(server, (challenge.token,), self.now)

    @property
    def responder(self) -> Responder:
        return self.lab.responder

    async def accounts(self, name, now) -> AcmeAccount:
        """The account at the one CA, opened anew, unless there are real ones."""
        return await (self.authorities.account(name, now) if self.authorities else self.account())

    async def step(self, account: AcmeAccount | None = None, *, order: int | None = None):
        """The next step of the newest order, or of another one, in what could be a new process; the order after it."""
        accounts = self.accounts if account is None else always(account)
        chosen = (await self.order()).id if order is None else order
        await issuance.advance(self.database, self.settings, accounts, chosen, self.now)
        return next(row for row in (await self.server()).orders if row.id == chosen)

    async def until(self, *statuses: OrderStatus):
        """Steps until the order has one of these states."""
        account, end = None if self.authorities else await self.account(), time.monotonic() + 20
        while (order := await self.order()).status not in statuses:
            assert time.monotonic() < end, f"still {order.status}: {order.error}"
            await self.serve()
            await self.step(account)
            await asyncio.sleep(0.02)
        return order

    async def certified(self):
        """A whole order: issued, and its authorization deactivated."""
        await self.begin()
        await self.until(OrderStatus.ISSUED)
        return await self.step()


@pytest.fixture
def engine(request):
    """SQLite, unless a test is parametrised with both: a CA's answers are the same for each."""
    return getattr(request, "param", "sqlite")


@pytest.fixture
def engine_url(request, engine):
    return request.getfixturevalue(f"{engine}_url")


@pytest.fixture
async def flow(engine_url, lab, tuned):
    """Makes a Flow whose Pebble has these options: `await flow(authz_reuse=100)`; with `front`, behind one with those."""
    database = Database(engine_url)

    async def make(*, front=None, **options):
        pebble = lab.pebble(**options)
        settings = tuned(ports={"http": lab.responder.endpoints[0][1]}, step_retry=10)
        made = Flow(Registry(database, settings), lab, pebble)
        if front is not None:
            made.ca = lab.front(pebble, **front)
        return await made.start()

    yield make
    await database.close()


@pytest.fixture
def init(tmp_path):
    """Runs `poolsvc init` for a primary that does not answer: `init("--contact=...", directory=...)`.

    `embedded` is for the server that comes with the registry, in place of one's own primary.
    """
    primary = f"--nameserver=ns1.pool.example=127.0.0.1:{free_port()}"

    def run(*options, pool="pool.example", directory=tmp_path / "new", nameserver=primary, embedded=False):
        url = "--public-url=https://registry.example.net"
        arguments = ["init", pool, f"--directory={directory}", url, nameserver, *options]
        arguments += [] if embedded else ["--own-primary"]
        done = CliRunner().invoke(poolsvc_app, arguments)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done

    return run


class FirstDay:
    """A knotd with the files that `poolsvc init` wrote and the zone that its commands begin."""

    def __init__(self, directory: Path, rundir: str, port: int) -> None:
        self.settings = directory / "poolsvc.toml"
        self.server = Nameserver("127.0.0.1", port)
        self._socket = f"{rundir}/knot.sock"
        (directory / "db").mkdir()
        (directory / "knot.conf").write_text(
            f"server:\n  listen: 127.0.0.1@{port}\n  rundir: {rundir}\n"
            f"database:\n  storage: {directory / 'db'}\n"
            "include: knot-pool.conf\n"
        )
        self.process = Process("knotd", ["knotd", "-c", "knot.conf"], directory)

    def control(self, line: str) -> int:
        """Run a knotc command as it was printed."""
        _, *words = shlex.split(line)
        command = [require("knotc"), "-s", self._socket, *words]
        return subprocess.run(command, capture_output=True, check=False, timeout=20).returncode

    def is_signed(self) -> bool:
        try:
            return bool(asyncio.run(parent_records("pool.example", self.server)).ds)
        except NoReply:
            return False


@pytest.fixture
def first_day(init, tmp_path):
    port, directory = free_port(), tmp_path / "pool"
    done = init(directory=directory, nameserver=f"--nameserver=ns1.pool.example=127.0.0.1:{port}")
    # The path of knotd's control socket may have 107 octets at most.
    with tempfile.TemporaryDirectory(prefix="knot-") as rundir:
        day = FirstDay(directory, rundir, port)
        with day.process.start(lambda: day.control("knotc status") == 0):
            for line in map(str.strip, done.stdout.splitlines()):
                if line.startswith("knotc zone-"):
                    assert day.control(line) == 0, line
            wait_until(day.is_signed, "a signed zone")
            yield day
