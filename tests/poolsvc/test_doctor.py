"""`poolsvc doctor` on a whole pool: nothing to say when all is well, and each fault found by its own check."""

import asyncio
import json
import socket
import socketserver
import threading
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from types import SimpleNamespace

import pytest
import uvicorn
from sqlalchemy import make_url, text

from lab.certificates import Authority
from lab.knot import Knot
from lab.nts_server import NtsServer
from lab.pool import POOL, LabPool
from lab.processes import Process, free_port, wait_until
from lab.programs import run
from lab.unbound import Unbound
from nts_core.kernel import KernelClock
from nts_core.packet import Leap
from nts_core.resolve import TrustAnchors
from nts_core.verdict import Verdict
from poolsvc import doctor
from poolsvc.cli import ExitStatus
from poolsvc.config import AuthoritySettings, load_settings
from poolsvc.db import Database
from poolsvc.delegation import parent_records
from poolsvc.doctor import monitors, zone
from poolsvc.doctor.host import judge_certificate, judge_clock
from poolsvc.doctor.report import Examination, Finding, worst
from poolsvc.primary import Nameserver

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


class Site:
    """A pool with its parent zone, and a resolver that knows both."""

    def __init__(self, pool: LabPool, parent: Knot, resolver: Unbound) -> None:
        self.pool, self.parent, self.resolver = pool, parent, resolver
        self.settings = load_settings(pool.config)

    @cached_property
    def sound(self):
        """The results without a fault."""
        return examined(self.examination())

    def examination(self, **sections) -> Examination:
        """With other settings: `examination(dns={...}, listen=(...))`."""
        update = {
            name: getattr(self.settings, name).model_copy(update=value) if isinstance(value, dict) else value
            for name, value in sections.items()
        }
        return Examination(
            self.settings.model_copy(update=update),
            self.pool.config,
            datetime.now(UTC),
            Nameserver(self.resolver.address, self.resolver.port),
            TrustAnchors.parse(self.parent.trust_anchor()),
        )


@contextmanager
def parent_of(pool, directory, *, ds):
    """The zone above the pool with this DS, and a resolver that validates from it."""
    delegation = ["pool NS ns1.pool", f"ns1.pool A {pool.primary.address}", *ds.splitlines()]
    with (
        Knot(directory / "parent", zone="example", records=delegation) as parent,
        Unbound(directory / "resolver", [parent, pool.primary]) as resolver,
    ):
        yield parent, resolver


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    directory = tmp_path_factory.mktemp("site")
    with (
        LabPool(directory / "pool", addresses=1, knot=True) as pool,
        parent_of(pool, directory, ds=pool.primary.ds()) as (parent, resolver),
    ):
        site = Site(pool, parent, resolver)
        wait_until(lambda: examined(site.examination())["caa"].found.startswith("any CA"), "the first CAA")
        yield site


def examined(examination):
    return {result.name: result for result in asyncio.run(doctor.examine(examination))}


def faulty(site, **sections):
    """The checks that do not end as they do without the fault."""
    before, after = site.sound, examined(site.examination(**sections))
    return {name: after[name] for name in after if after[name].verdict is not before[name].verdict}


def failed(result, *words):
    assert result.verdict is Verdict.FAIL, result
    assert result.remedy
    for word in words:
        assert word in f"{result.found} {result.remedy}", result


def test_a_pool_in_order(site):
    """The lab's zone leaves its apex open, its addresses are private, and the machine's clock is not ours to judge."""
    results = examined(site.examination())
    assert [*results] == [check.name for check in doctor.CHECKS]
    expected = dict.fromkeys(results, Verdict.OK) | {"caa": Verdict.WARN, "ca": results["ca"].verdict}
    expected["mail"] = Verdict.WARN  # the laboratory sends none
    expected["public-url"] = Verdict.WARN
    expected["references"] = Verdict.WARN
    assert "are not checked" in results["references"].found
    assert "private addresses" in results["public-url"].found
    expected["ca-socket"] = Verdict.SKIPPED
    del results["clock"], expected["clock"]
    assert {name: result.verdict for name, result in results.items()} == expected, results
    assert results["ca"].verdict is not Verdict.FAIL
    assert "our registry answers" in results["listen"].found


async def test_the_references_of_the_registrys_own_monitor(site, tmp_path):
    authority = Authority(tmp_path / "authority")
    hosts = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
    servers = [NtsServer(authority.issue(host), host) for host in hosts]
    places = []
    for server in servers:
        await server.start()
        places.append(f"ntp:{server.host}:{server.ntp_port}")

    async def look():
        return await monitors.references(site.examination(monitor={"references": tuple(places)}))

    found = await look()
    assert (found.verdict, found.found) == (
        Verdict.OK,
        "3 of 3 agree with this host's clock, by IPv4",
    )
    for server in servers[:2]:
        server.offset = 30_000_000
    found = await look()
    assert found.verdict is Verdict.FAIL
    assert "1 of 3 references" in found.found
    for server in servers:
        await server.stop()


def test_the_command_prints_all_and_ends_with_the_right_status(site):
    options = [
        f"--config={site.pool.config}",
        f"--resolver={site.resolver.address}:{site.resolver.port}",
        f"--trust-anchor={site.pool.directory / 'parent-anchor'}",
    ]
    (site.pool.directory / "parent-anchor").write_text(site.parent.trust_anchor())
    done = run("poolsvc", "doctor", *options, "--json")
    checks = done.document["checks"]
    assert [check["name"] for check in checks] == [check.name for check in doctor.CHECKS]
    failing = [check["name"] for check in checks if check["verdict"] == "fail"]
    assert set(failing) <= {"clock"}
    assert done.document["healthy"] is (not failing)
    assert done.status == (ExitStatus.DOCTOR if failing else ExitStatus.OK)
    shown = run("poolsvc", "doctor", *options)
    assert shown.status == done.status
    for check in checks:
        assert check["found"].split(";")[0].split(",")[0] in shown.stdout
    assert site.pool.primary.tsig_secret not in shown.stdout + done.stdout


def test_an_examination_changes_nothing(site):
    before = examined(site.examination())["transfer"].found
    assert examined(site.examination())["transfer"].found == before


def test_a_file_of_networks_that_is_missing(site, tmp_path):
    found = faulty(site, geo={"database": (tmp_path / "networks.mmdb",)})
    assert [*found] == ["files"]
    failed(found["files"], "geo.database: networks.mmdb", "renaming")


def test_a_name_that_leaves_little_room():
    settings = SimpleNamespace(pool=f"{'a' * 55}.example")
    found = asyncio.run(zone.answer_size(SimpleNamespace(settings=settings)))
    assert found.verdict is Verdict.WARN
    assert "holds 7 servers" in found.found
    assert found.remedy


def test_settings_that_cannot_be_read(tmp_path):
    done = run("poolsvc", "doctor", f"--config={tmp_path / 'none.toml'}", "--resolver=127.0.0.1:1", "--json")
    assert done.status == ExitStatus.DOCTOR
    first, *rest = done.document["checks"]
    assert (first["name"], first["verdict"]) == ("settings", "fail")
    assert {check["verdict"] for check in rest} == {"skipped"}
    assert len(rest) == len(doctor.CHECKS)


@pytest.mark.parametrize(
    "option", ["--resolver=a:b:c", "--trust-anchor=/nowhere", "--trust-anchor=/dev/null"]
)
def test_a_wrong_option_is_a_wrong_command_line(site, option):
    done = run("poolsvc", "doctor", f"--config={site.pool.config}", option)
    assert done.status == ExitStatus.USAGE
    assert option.partition("=")[0] in done.stderr


def test_another_tsig_secret(site, tmp_path):
    secret = tmp_path / "tsig.secret"
    secret.touch(0o600)
    secret.write_text("c2VjcmV0LW9mLXRoZS1wdWJsaXNoZXI=")
    found = faulty(site, dns={"tsig_secret_file": secret})
    assert {*found} == {"transfer", "update"}
    for result in found.values():
        failed(result, "the secrets differ")


def test_a_tsig_key_that_the_primary_does_not_know(site):
    found = faulty(site, dns={"tsig_name": "other.pool.example"})
    assert {*found} == {"transfer", "update"}
    failed(found["update"], "does not know the TSIG key", "_trial.servers.pool.example. A")


def test_no_tsig_secret(site, tmp_path):
    found = faulty(site, dns={"tsig_secret_file": tmp_path / "none"})
    assert {*found} == {"files", "transfer", "update"}
    failed(found["files"], "dns.tsig_secret_file")
    assert found["update"].verdict is Verdict.SKIPPED


def test_a_primary_that_is_down(site):
    found = faulty(site, dns={"primary": f"127.0.0.1:{free_port()}"})
    assert {*found} == {"primary", "transfer", "update"}
    failed(found["primary"], "does not answer over UDP")
    failed(found["update"], "check primary")


def with_second(site, address, port):
    return {"nameservers": (*site.settings.dns.nameservers, f"{address}:{port}")}


def test_a_nameserver_that_is_down(site):
    found = faulty(site, dns=with_second(site, "127.0.0.1", port := free_port()))
    assert {*found} == {"nameservers", "signatures"}
    failed(found["nameservers"], f"127.0.0.1:{port} does not answer")


def test_a_nameserver_that_does_not_have_the_zone(site):
    """The parent's server answers with a referral, as lame servers do."""
    found = faulty(site, dns=with_second(site, site.parent.address, site.parent.port))
    assert {*found} == {"nameservers", "signatures"}
    failed(found["nameservers"], f"{site.parent.port} is not authoritative")


def test_a_nameserver_of_another_serial_and_another_key(site, tmp_path):
    with Knot(tmp_path / "second") as second:
        found = faulty(site, dns=with_second(site, second.address, second.port))
    assert {*found} == {"nameservers"}
    assert found["nameservers"].verdict is Verdict.WARN
    assert "serials differ" in found["nameservers"].found


def test_nameservers_that_nobody_can_reach(site):
    failed(faulty(site, allow_private_addresses=False)["nameservers"], "127.0.0.1: not public")


class _Garbage(socketserver.BaseRequestHandler):
    def handle(self):
        octets, udp = self.request
        udp.sendto(octets[:2] + b"\xff" * 300, self.client_address)


def test_a_nameserver_that_sends_garbage(site):
    with socketserver.UDPServer(("127.0.0.1", 0), _Garbage) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = faulty(site, dns=with_second(site, *server.server_address))
        server.shutdown()
    assert {*found} == {"nameservers", "signatures"}
    failed(found["nameservers"], "does not answer")


@pytest.fixture(scope="module")
def unsigned(tmp_path_factory):
    """A server of the pool's zone, unsigned and with a long negative TTL."""
    directory, port = tmp_path_factory.mktemp("unsigned"), free_port()
    (directory / "zone").write_text(
        f"$ORIGIN {POOL}.\n$TTL 7200\n@ SOA ns1 h 1 3600 600 604800 3600\n@ NS ns1\nns1 A 127.0.0.1\n"
        'servers CAA 0 issue "ca.example"\n'
    )
    (directory / "knot.conf").write_text(
        f"server:\n  listen: 127.0.0.1@{port}\n  rundir: {directory}\n"
        f"zone:\n  - domain: {POOL}\n    storage: {directory}\n    file: zone\n"
    )
    server = Nameserver("127.0.0.1", port)

    process = Process("knotd", ["knotd", "-c", "knot.conf"], directory)
    with process.start(lambda: f"[{POOL}.] loaded" in process.output()):
        yield server


def test_an_unsigned_zone(site, unsigned):
    endpoint = f"{unsigned.address}:{unsigned.port}"
    found = faulty(site, dns={"nameservers": (endpoint,)})
    failed(found["signatures"], "shows no DNSKEY")
    failed(found["ds"], "no DS is of a key of the zone", "parent-records")
    failed(found["caa"], 'issue "ca.example"', "by hand")
    assert found["negative-ttl"].verdict is Verdict.WARN
    assert "3600 s" in found["negative-ttl"].found
    assert asyncio.run(parent_records(POOL, unsigned)).ds == ()


def test_signatures_that_end(site):
    at = site.examination()
    late = examined(replace(at, now=at.now + timedelta(days=400)))
    failed(late["signatures"], "is valid now")
    failed(late["chain"], "not valid at the present time")
    soon = examined(replace(at, now=at.now + timedelta(days=12)))["signatures"]
    assert soon.verdict is Verdict.WARN


def test_a_ds_of_another_key(site, tmp_path):
    with (
        Knot(tmp_path / "other") as other,
        parent_of(site.pool, tmp_path, ds=other.ds()) as (parent, resolver),
    ):
        results = examined(Site(site.pool, parent, resolver).examination())
    failed(results["ds"], "no DS is of a key of the zone")
    failed(results["chain"], "DS or anchor")
    assert results["delegation"].verdict is Verdict.OK


def test_a_ds_too_many(site, tmp_path):
    with (
        Knot(tmp_path / "other") as other,
        parent_of(site.pool, tmp_path, ds=other.ds() + site.pool.primary.ds()) as (parent, resolver),
    ):
        results = examined(Site(site.pool, parent, resolver).examination())
    assert results["ds"].verdict is Verdict.WARN
    assert results["chain"].verdict is Verdict.OK


def test_a_delegation_without_ds(site, tmp_path):
    with parent_of(site.pool, tmp_path, ds="") as (parent, resolver):
        results = examined(Site(site.pool, parent, resolver).examination())
    failed(results["ds"], "has no DS", "parent-records")
    failed(results["chain"], "no signed delegation")


def test_no_delegation_at_all(site, tmp_path):
    """A resolver that knows the parent, which knows nothing of the pool."""
    with (
        Knot(tmp_path / "parent", zone="example") as parent,
        Unbound(tmp_path / "resolver", [parent]) as resolver,
    ):
        results = examined(Site(site.pool, parent, resolver).examination())
    failed(results["delegation"], "no NS", "NXDOMAIN")
    failed(results["ds"], "has no DS")


def test_other_nameservers_at_the_parent(site, tmp_path):
    with Knot(tmp_path / "zone", records=["@ NS ns2", "ns2 A 127.0.0.1"]) as other:
        found = faulty(site, dns={"nameservers": (f"{other.address}:{other.port}",)})
    failed(found["delegation"], "ns2.pool.example.")


def test_without_a_resolver_the_parent_is_not_asked(site):
    results = examined(replace(site.examination(), resolver=None))
    for name in ("delegation", "ds", "chain"):
        assert results[name].verdict is Verdict.SKIPPED


def test_without_a_trust_anchor_the_resolver_is_believed(site, tmp_path):
    assert examined(replace(site.examination(), anchors=None))["chain"].verdict is Verdict.OK
    with (
        Knot(tmp_path / "other") as other,
        parent_of(site.pool, tmp_path, ds=other.ds()) as (_, resolver),
    ):
        at = replace(site.examination(), anchors=None, resolver=Nameserver(resolver.address, resolver.port))
        failed(examined(at)["chain"], "SERVFAIL")


def test_a_resolver_that_is_down(site):
    results = examined(replace(site.examination(), resolver=Nameserver("127.0.0.1", free_port())))
    for name in ("delegation", "ds", "chain"):
        failed(results[name], "answer")


def test_a_ca_that_is_down(site):
    found = faulty(site, ca={"directory_url": f"https://127.0.0.1:{free_port()}/dir"})
    assert {*found} == {"ca"}
    failed(found["ca"], "ca.directory_url")


@pytest.mark.parametrize("section", ["fallback", "rehearsal"])
def test_another_ca_that_is_down(site, section):
    url = f"https://127.0.0.1:{free_port()}/dir"
    other = site.settings.ca.model_copy(update={"directory_url": url})
    found = faulty(site, ca={section: (other,) if section == "fallback" else other})
    assert {*found} == {"ca"}
    failed(found["ca"], url, site.settings.ca.name)


def test_a_ca_that_is_not_trusted(site):
    failed(faulty(site, ca={"ca_file": site.pool.registry_root})["ca"], "ca.ca_file")


def test_a_ca_without_the_profile(site):
    failed(faulty(site, ca={"profile": "unheard-of"})["ca"], "unheard-of")


META = {
    "caaIdentities": ["ca.example", "ca.example.net"],
    "termsOfService": "https://ca.example/terms",
    "profiles": {"shortlived": "six days"},
}


@pytest.fixture(scope="module")
def directory_server(tmp_path_factory):
    """A CA's directory that says more of itself than Pebble's does; `meta` can be changed."""
    authority = Authority(tmp_path_factory.mktemp("ca"))
    pair = authority.issue("127.0.0.1", file="ca")
    port = free_port()
    url = f"https://127.0.0.1:{port}"
    served = {
        "meta": dict(META),
        **{name: f"{url}/{name}" for name in ("newNonce", "newAccount", "newOrder", "revokeCert")},
    }

    async def application(scope, receive, send):
        assert scope["type"] == "http"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"replay-nonce", b"bm9uY2U")]})
        await send({"type": "http.response.body", "body": json.dumps(served).encode()})

    config = uvicorn.Config(
        application,
        host="127.0.0.1",
        port=port,
        lifespan="off",
        log_level="error",
        ssl_certfile=pair.cert,
        ssl_keyfile=pair.key,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started, "the directory")
    yield {"directory_url": f"{url}/dir", "ca_file": authority.root}, served
    server.should_exit = True
    thread.join(10)


def test_a_ca_of_another_name_in_caa(site, directory_server):
    where, _ = directory_server
    result = examined(site.examination(ca={**where, "caa_identity": "ca.example.org"}))["ca"]
    failed(result, "ca.example.org", "ca.example, ca.example.net")
    right = examined(
        site.examination(ca={**where, "caa_identity": "ca.example.net", "profile": "shortlived"})
    )["ca"]
    assert right.verdict is Verdict.OK
    assert "https://ca.example/terms" in right.found


@pytest.mark.parametrize(
    "meta",
    [
        None,
        [],
        "x",
        {"caaIdentities": "x", "profiles": 7, "termsOfService": {}},
        {"caaIdentities": [None, {}]},
    ],
)
def test_a_directory_of_wrong_types_breaks_nothing(site, directory_server, monkeypatch, meta):
    where, served = directory_server
    monkeypatch.setitem(served, "meta", meta)
    result = examined(site.examination(ca=where))["ca"]
    assert result.verdict in {Verdict.WARN, Verdict.FAIL}
    assert "report this" not in result.remedy


def test_a_directory_that_lacks_an_address(site, directory_server, monkeypatch):
    where, served = directory_server
    monkeypatch.setitem(served, "newOrder", 7)
    failed(examined(site.examination(ca=where))["ca"], "newOrder")


def test_a_ca_that_binds_accounts(site, directory_server, monkeypatch):
    where, served = directory_server
    monkeypatch.setitem(served, "meta", {"externalAccountRequired": True})
    failed(examined(site.examination(ca=where))["ca"], "ca.binding_key_id")


def test_a_taken_port(site):
    with socket.create_server(("127.0.0.1", 0)) as other:
        endpoint = f"127.0.0.1:{other.getsockname()[1]}"
        found = faulty(site, listen=(endpoint,))
    assert {*found} == {"listen"}
    failed(found["listen"], endpoint, "another program")


def test_an_address_that_is_not_of_this_host(site):
    failed(faulty(site, listen=("192.0.2.1:8080",))["listen"], "192.0.2.1:8080")


def test_a_free_port(site):
    assert "free" in examined(site.examination(listen=(f"127.0.0.1:{free_port()}",)))["listen"].found


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("tls"))


def test_a_certificate_that_has_ended(site, authority):
    pair = authority.issue("127.0.0.1", file="old", not_before=NOW - timedelta(days=90), not_after=NOW)
    found = faulty(site, tls_certificate=pair.cert, tls_key=pair.key)
    assert {*found} == {"certificate"}
    failed(found["certificate"], "ended on 2026-03-01 12:00 UTC")


def test_a_certificate_for_another_name(site, authority):
    pair = authority.issue("registry.example.net", "*.example.net", file="other")
    options = {"tls_certificate": pair.cert, "tls_key": pair.key}
    failed(faulty(site, **options)["certificate"], "127.0.0.1")
    named = examined(site.examination(**options, public_url="https://any.example.net:1"))["certificate"]
    assert named.verdict is Verdict.OK
    failed(
        examined(site.examination(**options, public_url="https://a.b.example.net"))["certificate"],
        "a.b.example.net",
    )


def test_a_key_of_another_certificate(site, authority):
    one, other = (authority.issue("127.0.0.1", file=name) for name in ("one", "two"))
    failed(faulty(site, tls_certificate=one.cert, tls_key=other.key)["files"], "tls_certificate, tls_key")


@pytest.mark.parametrize(
    ("begins", "ends", "verdict"),
    [
        (-1, 89, Verdict.OK),
        (-80, 10, Verdict.WARN),
        (-90, 0, Verdict.FAIL),
        (1, 91, Verdict.FAIL),
        (-4, 2, Verdict.OK),
    ],
)
def test_how_long_a_certificate_is_good(begins, ends, verdict):
    finding = judge_certificate(NOW + timedelta(days=begins), NOW + timedelta(days=ends), NOW, "renew")
    assert finding.verdict is verdict


def test_a_public_url_that_nobody_can_find(site):
    failed(faulty(site, public_url="https://registry.invalid")["public-url"], "registry.invalid")


def test_a_public_url_that_members_cannot_reach(site):
    found = examined(site.examination(allow_private_addresses=False))["public-url"]
    assert (found.verdict, found.found) == (Verdict.WARN, "members cannot reach 127.0.0.1")


@pytest.mark.parametrize(
    ("kernel", "verdict"),
    [
        (KernelClock(synchronised=True, leap=Leap.NONE, max_error_ns=5_000_000), Verdict.OK),
        (KernelClock(synchronised=True, leap=Leap.NONE, max_error_ns=900_000_000), Verdict.WARN),
        (KernelClock(synchronised=False, leap=Leap.UNSYNCHRONISED, max_error_ns=0), Verdict.FAIL),
    ],
)
def test_the_clock(kernel, verdict):
    assert judge_clock(kernel).verdict is verdict


def test_a_secret_that_others_can_read(site, tmp_path):
    secret = tmp_path / "tsig.secret"
    secret.write_text(site.pool.primary.tsig_secret)
    secret.chmod(0o644)
    found = faulty(site, dns={"tsig_secret_file": secret})
    assert {*found} == {"secrets"}
    failed(found["secrets"], "dns.tsig_secret_file", "0644", f"chmod 600 {secret}")


@pytest.mark.parametrize("section", ["fallback", "rehearsal"])
def test_the_account_key_of_another_ca(site, tmp_path, section):
    """Not there, seen by others, and not a key: as the first CA's is looked at."""
    key = tmp_path / "other.pem"
    other = AuthoritySettings(
        directory_url="https://other.example/dir", caa_identity="other.example", account_key_file=key
    )
    ca = {section: (other,) if section == "fallback" else other}
    missing = examined(site.examination(ca=ca))["files"]
    assert (missing.verdict, missing.found) == (
        Verdict.WARN,
        "there is no ca.account_key_file for other.example",
    )
    key.write_text("no key")
    key.chmod(0o640)
    found = examined(site.examination(ca=ca))
    failed(found["secrets"], "ca.account_key_file", "0640", f"chmod 600 {key}")
    key.chmod(0o600)
    failed(examined(site.examination(ca=ca))["files"], "ca.account_key_file", str(key))
    key.unlink()
    with_socket = other.model_copy(update={"socket": tmp_path / "acme.sock"})
    ca = {section: (with_socket,) if section == "fallback" else with_socket}
    found = examined(site.examination(ca=ca))
    assert found["files"].verdict is Verdict.OK, "another user's to look after"
    failed(found["ca-socket"], str(tmp_path / "acme.sock"), "poolsvc acme serve")


def test_settings_with_a_password_that_others_can_read(site, tmp_path):
    settings = tmp_path / "poolsvc.toml"
    settings.touch(0o640)
    at = replace(
        site.examination(database="postgresql+psycopg://u:correct-horse@127.0.0.1:1/registry"), file=settings
    )
    failed(examined(at)["secrets"], "database", f"chmod 600 {settings}")
    at = replace(site.examination(database="postgresql+psycopg://u@127.0.0.1:1/registry"), file=settings)
    assert examined(at)["secrets"].verdict is Verdict.OK


def test_a_database_that_is_not_there(site, tmp_path):
    found = faulty(site, database=f"sqlite+aiosqlite:///{tmp_path / 'none.db'}")
    assert {*found} == {"database", "monitors"}
    failed(found["database"], "poolsvc migrate")
    assert not (tmp_path / "none.db").exists()


@pytest.mark.parametrize("engine", ["sqlite", "postgresql"])
def test_a_database_that_is_not_migrated(site, request, tmp_path, engine):
    if engine == "sqlite":
        url = f"sqlite+aiosqlite:///{tmp_path / 'empty.db'}"
        (tmp_path / "empty.db").touch(0o600)
    else:
        url = request.getfixturevalue("cluster").create_database()
    failed(faulty(site, database=url)["database"], "poolsvc migrate")


async def test_a_database_of_each_engine(site, database_url):
    results = {
        result.name: result for result in await doctor.examine(site.examination(database=database_url))
    }
    assert results["database"].verdict in {Verdict.OK, Verdict.WARN}, results["database"]


async def test_a_postgresql_that_only_reads(site, postgresql_url):
    database = Database(postgresql_url)
    name = make_url(postgresql_url).database
    async with database.transaction() as session:
        await session.execute(text(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on'))
    await database.close()
    results = {
        result.name: result for result in await doctor.examine(site.examination(database=postgresql_url))
    }
    failed(results["database"], "cannot be written")


def test_a_postgresql_that_is_down(site):
    result = faulty(site, database="postgresql+psycopg://u:correct-horse@127.0.0.1:1/registry")["database"]
    failed(result, "database")
    assert "correct-horse" not in result.found


def test_a_check_that_breaks_hides_no_other(site, monkeypatch):
    async def broken(_):
        raise RuntimeError("out of order")

    async def endless(_):
        await asyncio.Event().wait()

    checks = {check.name: check for check in doctor.CHECKS}
    changed = (
        replace(checks["clock"], run=broken),
        replace(checks["ds"], run=endless),
        checks["secrets"],
    )
    monkeypatch.setattr(doctor, "CHECKS", changed)
    monkeypatch.setattr(doctor, "DEADLINE", 0.1)
    results = examined(site.examination())
    failed(results["clock"], "RuntimeError: out of order")
    failed(results["ds"], "no end within")
    assert results["secrets"].verdict is Verdict.OK


def test_the_worst_of_several_findings():
    findings = [
        Finding(Verdict.OK, "a"),
        Finding(Verdict.FAIL, "b", "do b"),
        Finding(Verdict.WARN, "c", "do c"),
        Finding(Verdict.FAIL, "d", "do b"),
    ]
    assert worst(findings) == Finding(Verdict.FAIL, "b; d", "do b")
    assert worst(findings[:1]) == findings[0]
