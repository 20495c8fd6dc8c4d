"""Regions that an operator switches on and off, by the API and the command line, on a real Knot."""

import asyncio
import json
from datetime import timedelta

import pytest
from sqlalchemy import select, update
from typer.testing import CliRunner

from lab import mmdb
from nts_core.control import ServerState
from poolsvc import regional, setup
from poolsvc.app import create_app
from poolsvc.cli import ExitStatus
from poolsvc.cli import app as poolsvc_app
from poolsvc.config import GeoSettings
from poolsvc.derived import RegistryKey
from poolsvc.drawing import young_factor
from poolsvc.errors import InvalidRegion, WrongState
from poolsvc.models import Event, Member, Region, Server, StaffRole, ZoneChange
from poolsvc.regional import Atlas

NETWORKS = {
    "198.18.0.0/24": {"asn": "AS64500", "country_code": "DE"},
    "198.18.1.0/24": {"asn": "AS64501", "country_code": "FR"},
}


@pytest.fixture
def tuned_settings(published_by, tmp_path):
    mmdb.write(tmp_path / "geo.mmdb", NETWORKS)
    settings = published_by(region_size=4)
    return settings.model_copy(update={"geo": GeoSettings(database=(tmp_path / "geo.mmdb",))})


@pytest.fixture
async def pool(database, tuned_settings, registry_of):
    """Eight members with a server each: five in Germany, two in France, one that no file knows."""
    pool = registry_of(database, tuned_settings)
    for number, address in enumerate(
        [f"198.18.0.{each}" for each in range(1, 6)] + ["198.18.1.1", "198.18.1.2", "203.0.113.1"]
    ):
        await pool.server(f"s{number}", address, state=ServerState.ACTIVE)
    async with database.transaction() as session:
        await session.execute(update(Server).values(listed_at=pool.now))
    return pool


async def looked(pool):
    async with pool.database.transaction() as session:
        return await Atlas(pool.settings).look(session)


async def test_what_regions_there_are_and_how_they_come_out(pool):
    """Eight servers make four places of a set with as many members; two in France are filled from Europe."""
    found = await looked(pool)
    sizes = {label: (one.standing.servers, one.standing.members) for label, one in found.items()}
    assert sizes == {"": (8, 8), "de": (5, 5), "europe": (7, 7), "fr": (2, 2)}
    assert all(one.on_since is None for one in found.values())
    assert found["fr"].standing.filled_from[0] == "europe"


@pytest.fixture
def places(monkeypatch):
    """Four places in an answer, so that five members are enough of them."""
    monkeypatch.setattr(regional, "targets_that_fit", lambda _: 4)


async def test_a_region_is_switched_on_once_it_has_the_servers(places, pool):
    atlas = Atlas(pool.settings)
    async with pool.database.transaction("test") as session:
        with pytest.raises(WrongState, match="fr has 2 servers of 2 members in DNS, and needs 4"):
            await atlas.switch_on(session, "fr", pool.now)
        for unknown in ("", "xx", "DE", "de.", "europe.pool"):
            with pytest.raises(InvalidRegion):
                await atlas.switch_on(session, unknown, pool.now)
        assert (await atlas.switch_on(session, "de", pool.now)).on_since == pool.now
        await session.flush()
        again = await atlas.switch_on(session, "de", pool.now + timedelta(days=1))
        assert again.on_since == pool.now
        assert await regional.switched_on(session) == {"de"}


async def test_a_region_that_has_shrunk_stays_on_and_is_filled(places, pool):
    async with pool.database.transaction("test") as session:
        session.add(Region(label="de", on_since=pool.now))
        await session.execute(update(Server).where(Server.name.in_(("s0", "s1"))).values(listed_at=None))
    found = await looked(pool)
    assert (found["de"].on_since, found["de"].standing.servers) == (pool.now, 3)
    assert found["de"].standing.filled_from == ("europe",)
    async with pool.database.transaction("test") as session:
        assert (await Atlas(pool.settings).switch_on(session, "de", pool.now)).standing.is_thin


async def test_a_region_without_any_server_is_told_too(pool):
    async with pool.database.transaction("test") as session:
        session.add(Region(label="jp", on_since=pool.now))
    found = (await looked(pool))["jp"].standing
    assert (found.servers, found.filled_from) == (0, ("asia", ""))


async def test_without_files_the_remedy_is_to_name_some(pool):
    settings = pool.settings.model_copy(update={"geo": GeoSettings()})
    async with pool.database.transaction("test") as session:
        with pytest.raises(WrongState) as refused:
            await Atlas(settings).switch_on(session, "de", pool.now)
    assert "geo.database" in refused.value.remedy


async def test_by_the_api(places, pool, client):
    app = create_app(pool.settings, pool.database, None, RegistryKey(bytes(32)))
    operator = await pool.person(staff=StaffRole.OPERATOR)
    async with client(operator.token, app=app) as http, client(app=app) as anybody:
        first = (await anybody.get("/v1/regions")).json()
        assert [(one["region"], one["servers"], one["on_since"]) for one in first] == [
            ("world", 8, None),
            ("de", 5, None),
            ("europe", 7, None),
            ("fr", 2, None),
        ]
        assert first[1]["pool"] == "de.pool.example"
        assert first[3]["filled_from"] == ["europe"]
        refused = await http.put("/v1/regions/fr")
        assert (refused.status_code, refused.json()["code"]) == (409, "wrong-state")
        assert (await http.put("/v1/regions/xx")).json()["code"] == "invalid-region"
        on = await http.put("/v1/regions/de")
        assert on.status_code == 200, on.text
        assert (on.json()["region"], on.json()["wanted"]) == ("de", 4)
        assert on.json()["on_since"] is not None
        assert (await http.put("/v1/regions/de")).json()["on_since"] == on.json()["on_since"]
        shown = {one["region"]: one["on_since"] for one in (await anybody.get("/v1/regions")).json()}
        assert shown["de"] is not None
        for _ in range(2):
            assert (await http.delete("/v1/regions/de")).status_code == 204
        shown = {one["region"]: one["on_since"] for one in (await anybody.get("/v1/regions")).json()}
        assert shown["de"] is None
    async with pool.database.transaction() as session:
        kinds = await session.scalars(
            select(Event.kind).where(Event.kind.startswith("region-")).order_by(Event.id)
        )
        assert list(kinds) == ["region-created", "region-deleted"]


@pytest.fixture
def older(monkeypatch):
    """The primary's configuration of a version that knew no regions; to be asked for before the primary."""
    monkeypatch.setattr(setup, "REGIONS", frozenset())


async def test_a_region_that_the_primary_would_not_take_is_not_switched_on(older, places, pool, client):
    """Or not one change more would be published."""
    app = create_app(pool.settings, pool.database, None, RegistryKey(bytes(32)))
    operator = await pool.person(staff=StaffRole.OPERATOR)
    async with client(operator.token, app=app) as http:
        refused = await http.put("/v1/regions/de")
    assert (refused.status_code, refused.json()["code"]) == (409, "wrong-state")
    assert "_ntske._tcp.de.pool.example" in refused.json()["detail"]
    async with pool.database.transaction() as session:
        assert await regional.switched_on(session) == frozenset()


async def test_young_accounts_have_their_part_of_a_share(places, pool):
    """Two of eight are of new accounts: 4/8 of the places, but no more than a fifth of the weight once others suffice."""
    async with pool.database.transaction() as session:
        old = pool.now - timedelta(days=400)
        young = await session.scalars(select(Server.member_id).where(Server.name.in_(("s0", "s1", "s2"))))
        recent = list(young)
        await session.execute(update(Member).values(created_at=old))
    async with pool.database.transaction() as session:
        alike = await regional.odds_of(session, pool.settings)
        assert alike.young == 1.0
        await session.execute(
            update(Member).where(Member.id.in_(recent)).values(created_at=regional.datetime.now(regional.UTC))
        )
        odds = await regional.odds_of(session, pool.settings)
        found = (await Atlas(pool.settings).look(session))[""].standing
    assert odds.young == pytest.approx(
        young_factor([(n, 1, n < 3) for n in range(8)], regional.rules_of(pool.settings))
    )
    assert (found.young_wanted, found.young_given) == (pytest.approx(3 / 8), pytest.approx(0.2))


async def test_the_share_follows_the_best_address(pool):
    """A score from 10 to 15 is a part of the weight; each tenth of it is a change for DNS."""
    async with pool.database.transaction() as session:
        await session.execute(ZoneChange.__table__.delete())
    async with pool.change(1) as (session, server):
        before = regional.chance(
            await regional.odds_of(session, pool.settings), server, pool.now, pool.settings, pool.now
        )
        server.addresses[0].score = 20.0
        await session.flush()
        odds = await regional.odds_of(session, pool.settings)
        after = regional.chance(odds, server, pool.now, pool.settings, pool.now)
        assert after >= before
        assert list(await session.scalars(select(ZoneChange.server_id))) == [1]
        server.addresses[0].score = 19.5
        await session.flush()
        assert len(list(await session.scalars(select(ZoneChange.server_id)))) == 1


CONFIG = """\
pool = "pool.example"
database = "{database}"
allow_private_addresses = true
[dns]
primary = "{dns}"
tsig_name = "{tsig_name}"
tsig_secret_file = "tsig.secret"
nameservers = ["{dns}"]
[ca]
directory_url = "https://ca.example/dir"
caa_identity = "ca.example"
account_key_file = "account.pem"
[geo]
database = "geo.mmdb"
[policy]
region_size = 4
"""


async def test_by_the_command_line(places, pool, knot, database_url, tmp_path):
    path = tmp_path / "poolsvc.toml"
    here = f"{knot.address}:{knot.port}"
    path.write_text(CONFIG.format(database=database_url, dns=here, tsig_name=knot.tsig_name))

    async def run(*arguments):
        done = await asyncio.to_thread(
            CliRunner().invoke, poolsvc_app, ["regions", *arguments, "--config", str(path)]
        )
        assert done.exception is None or isinstance(done.exception, SystemExit)
        return done

    table = (await run("list")).stdout.splitlines()
    assert [line.split()[:4] for line in table[1:5]] == [
        ["world", "on", "8", "8"],
        ["de", "off", "5", "5"],
        ["europe", "off", "7", "7"],
        ["fr", "off", "2", "2"],
    ]
    refused = await run("on", "fr")
    assert refused.exit_code == ExitStatus.USAGE
    assert "fr has 2 servers of 2 members in DNS, and needs 4" in refused.stderr
    for _ in range(2):
        assert (await run("on", "de")).stdout == "de is on: clients may be given the pool de.pool.example\n"
    found = {one["region"]: one for one in json.loads((await run("list", "--json")).stdout)}
    assert found["de"]["on_since"] is not None
    assert (await run("off", "de")).stdout == "de is off\n"
    knot.stop()
    unreachable = await run("on", "de")
    assert unreachable.exit_code == ExitStatus.PEER
    assert "the primary would not take the SRV of de" in unreachable.stderr


async def test_in_how_few_hands_the_pool_is(places, pool, client):
    """Of eight equal servers five share a network; no member is named to everybody."""
    app = create_app(pool.settings, pool.database, None, RegistryKey(bytes(32)))
    async with pool.database.transaction() as session:
        session.add(Region(label="de", on_since=pool.now))
    async with client(app=app) as anybody:
        world, germany = (await anybody.get("/v1/pool/independence")).json()
    assert (world["region"], world["servers"], world["members"]) == ("world", 8, 8)
    assert (world["largest_network"], world["largest_network_share"]) == (64500, 5 / 8)
    assert (world["largest_country"], world["largest_operator_share"]) == ("de", 1 / 8)
    assert world["answers"]["operators"] == 1.0
    assert world["answers"]["networks"] < 1.0
    assert (world["hostile_to_add"], world["hostile_members"]) == (13, 5)
    assert (germany["region"], germany["largest_network_share"]) == ("de", 1.0)
