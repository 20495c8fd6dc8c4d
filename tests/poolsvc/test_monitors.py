"""Monitors: registered, approved, paused and ended, by API and console; who they are and where they call from."""

import json
from datetime import UTC, datetime

import pytest
from sqlalchemy import select, update
from typer.testing import CliRunner

from nts_core.control import MonitorStatus, ServerState
from poolsvc import auth, monitors, standing
from poolsvc.cli import app as poolsvc_app
from poolsvc.errors import LimitReached, NameTaken, PoolError, Unauthenticated, WrongState
from poolsvc.gate import MAX_BODY, MAX_REPORT
from poolsvc.geo import NOWHERE, Place
from poolsvc.models import INNER, Address, Event, MemberRole, Monitor, StaffRole, TokenKind

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
M = MonitorStatus
REASON = {"reason": "a test"}


async def become(registry, name, status):
    async with registry.database.transaction("user 1") as session:
        await monitors.set_status(session, await monitors.find(session, name, lock=True), status, "r", NOW)


async def status(registry, name):
    async with registry.database.transaction() as session:
        return (await monitors.find(session, name)).status


@pytest.mark.parametrize("before", M)
@pytest.mark.parametrize("after", M)
async def test_a_status_changes_along_the_table_only(registry, before, after):
    await registry.monitor(status=before)
    if after is before or after in monitors.TRANSITIONS[before]:
        await become(registry, "frankfurt", after)
        assert await status(registry, "frankfurt") is after
    else:
        with pytest.raises(WrongState):
            await become(registry, "frankfurt", after)


async def test_each_change_is_in_the_log_with_its_reason(registry):
    await registry.monitor(status=M.TESTING)
    await become(registry, "frankfurt", M.ACTIVE)
    async with registry.database.transaction() as session:
        event = await session.scalar(
            select(Event).where(Event.kind == "monitor-changed").order_by(Event.id.desc()).limit(1)
        )
        assert event.actor == "user 1"
        assert (event.before["status"], event.after["status"], event.after["status_reason"]) == (
            "testing",
            "active",
            "r",
        )


async def test_the_registrys_own_rests_only_beside_another_one_and_never_ends(registry):
    async with registry.database.transaction() as session:
        await monitors.inner(session)
    with pytest.raises(WrongState, match="the last active one"):
        await become(registry, INNER, M.PAUSED)
    with pytest.raises(WrongState, match="does not end"):
        await become(registry, INNER, M.ENDED)
    member = await registry.member()
    await registry.monitor("theirs", member)
    with pytest.raises(WrongState):
        await become(registry, INNER, M.PAUSED)
    await registry.monitor("ours")
    await become(registry, INNER, M.PAUSED)
    with pytest.raises(WrongState, match="the last active one"):
        await become(registry, "ours", M.ENDED)


async def test_an_ended_monitors_token_is_worth_nothing_and_a_new_one_replaces_the_old(registry):
    monitor, token = await registry.monitor(status=M.TESTING)
    async with registry.database.transaction() as session:
        row = await session.get_one(Monitor, monitor)
        newer = await monitors.renew_token(session, row, NOW)
        with pytest.raises(Unauthenticated):
            await auth.authenticate(session, token, NOW)
        assert (await auth.authenticate(session, newer, NOW)).monitor_id == monitor
    await become(registry, "frankfurt", M.ENDED)
    async with registry.database.transaction() as session:
        with pytest.raises(Unauthenticated):
            await auth.authenticate(session, newer, NOW)
        with pytest.raises(WrongState):
            await monitors.renew_token(session, await monitors.find(session, "frankfurt"), NOW)


@pytest.mark.parametrize("name", ["", "a b", "x" * 37, "ümlaut", "a.b", INNER, "frankfurt", "FRANKFURT"])
async def test_a_name_is_a_label_of_its_own(registry, name):
    await registry.monitor()
    async with registry.database.transaction() as session:
        await monitors.inner(session)
        with pytest.raises(PoolError) as caught:
            await monitors.register(session, registry.settings, name, None, NOW)
        assert caught.value.field == "name"
        assert isinstance(caught.value, NameTaken) == (name.lower() in (INNER, "frankfurt"))


async def test_a_member_has_a_few_monitors_and_ended_ones_do_not_count(registry):
    member = await registry.member()
    for number in range(3):
        await registry.monitor(f"m{number}", member)
    with pytest.raises(LimitReached):
        await registry.monitor("m3", member)
    await become(registry, "m0", M.ENDED)
    await registry.monitor("m3", member)


async def test_the_monitors_of_a_closed_member_end(registry):
    member = await registry.member()
    await registry.monitor(member=member)
    async with registry.database.transaction() as session:
        await standing.close(session, member, NOW, actor="user 1", by="owner", remove_servers=False)
    assert await status(registry, "frankfurt") is M.ENDED


async def test_an_owner_registers_pauses_and_ends_its_own_and_an_operator_approves(registry, call):
    member, other = await registry.member("Owner"), await registry.member("Other")
    owner = await registry.owner_token(member, MemberRole.OWNER, TokenKind.SESSION)
    foreign = await registry.owner_token(other, MemberRole.OWNER, TokenKind.SESSION)
    operator = (await registry.person(staff=StaffRole.OPERATOR)).token
    made = (await call(owner, "POST", "/v1/monitors", json={"name": "paris"})).json()
    assert (made["member"], made["status"]) == (member, "pending")
    assert made["token"].startswith("tc_monitor_")
    own = (await call(operator, "POST", "/v1/monitors", json={"name": "rome"})).json()
    assert own["member"] is None

    async def change(who, wanted, name="paris"):
        answer = await call(who, "PATCH", f"/v1/monitors/{name}", json={"status": wanted, **REASON})
        return answer.status_code

    assert await change(owner, "testing") == 403
    assert await change(operator, "active") == 409
    assert [await change(operator, wanted) for wanted in ("testing", "active")] == [200, 200]
    assert [await change(foreign, "paused"), await change(owner, "paused", "rome")] == [403, 403]
    assert await change(owner, "paused") == 200
    assert await change(owner, "active") == 403
    listed = (await call(owner, "GET", "/v1/monitors")).json()["items"]
    assert [(each["name"], each["status"], "token" in each) for each in listed] == [
        ("paris", "paused", False)
    ]
    assert (await call(foreign, "GET", "/v1/monitors")).json()["items"] == []
    assert len((await call(operator, "GET", "/v1/monitors")).json()["items"]) == 2
    assert await change(owner, "ended") == 200


async def test_a_monitor_works_by_its_token_and_is_seen_where_it_calls_from(registry, client):
    monitor, token = await registry.monitor()
    server = await registry.server(state=ServerState.ACTIVE)
    (target,) = await registry.look(monitor, server)
    async with client(token, source="192.0.2.7") as http:
        work = (await http.get("/v1/monitor/work")).json()
        assert [task["target"] for task in work["tasks"]] == [target]
        sample = {"target": target, "age": 1, "result": {"address": "", "failed": "tcp", "detail": "no"}}
        report = {"sequence": 1, "sound": True, "samples": [sample], "unknown": "from a later version"}
        assert (await http.post("/v1/monitor/report", json=report)).json()["taken"] == 1
        long = await http.post("/v1/monitor/report", content=b" " * (MAX_REPORT + 1))
        assert (long.status_code, long.json()["code"]) == (413, "too-large")
        fits = await http.post("/v1/monitor/report", content=b" " * (MAX_BODY + 1))
        assert fits.status_code == 422
        for body in ({"sequence": "x"}, {"sequence": 2, "sound": True, "samples": [{}]}, [], "\ud800"):
            answer = await http.post(
                "/v1/monitor/report",
                content=json.dumps(body),
                headers={"Content-Type": "application/json"},
            )
            assert answer.status_code == 422
    async with client(token, source="2001:db8::7") as http:
        await http.get("/v1/monitor/work")
    async with registry.database.transaction() as session:
        row = await session.get_one(Monitor, monitor)
        assert (row.ipv4_address, row.ipv6_address, row.samples) == ("192.0.2.7", "2001:db8::7", 1)


async def test_nobody_else_sends_a_long_document(registry, client):
    async with client("tc_agent_x") as http:
        answer = await http.post("/v1/monitor/report", content=b" " * (MAX_BODY + 1))
        assert answer.status_code == 413


class Atlas:
    """Where addresses are, as files would say."""

    def refresh(self):
        pass

    def places(self, addresses):
        known = {"192.0.2.7": Place(64500, "FR")}
        return {address: known.get(address, NOWHERE) for address in addresses}


async def test_a_monitors_place_is_found_and_forgotten_when_it_moves(registry):
    monitor, _ = await registry.monitor()

    async def seen_at(source):
        async with registry.database.transaction() as session:
            monitors.note_source(await session.get_one(Monitor, monitor), source, NOW)
        await monitors.place(registry.database, Atlas())
        async with registry.database.transaction() as session:
            row = await session.get_one(Monitor, monitor)
            return row.network, row.country

    assert await seen_at("") == (None, None)
    assert await seen_at("192.0.2.7") == (64500, "FR")
    assert await seen_at("192.0.2.8") == (None, None)


async def test_the_metrics_tell_of_monitors(registry, client):
    await registry.monitor()
    async with client(source="127.0.0.1") as http:
        text = (await http.get("/metrics")).text
    assert 'poolsvc_monitor_sound{monitor="frankfurt"} 1.0' in text
    assert 'poolsvc_monitor_samples_total{monitor="frankfurt"} 0.0' in text
    assert "poolsvc_quorum 1.0" in text
    assert "poolsvc_unknown_addresses 0.0" in text


@pytest.fixture
def console(registry, settings, tmp_path, database_url):
    """`console("list")`: what `poolsvc monitors` prints, and its status."""
    file = tmp_path / "poolsvc.toml"
    file.write_text(
        f'pool = "{settings.pool}"\ndatabase = "{database_url}"\nallow_private_addresses = true\n'
        '[dns]\nprimary = "127.0.0.1:53"\ntsig_name = "publisher.pool.example"\ntsig_secret_file = "tsig"\n'
        'nameservers = ["127.0.0.1:53"]\n[ca]\ndirectory_url = "https://ca.example/dir"\n'
        'caa_identity = "ca.example"\naccount_key_file = "account.pem"\n[policy]\nshadow_scorer = "quartile"\n'
    )

    def run(command, *words):
        result = CliRunner().invoke(poolsvc_app, ["monitors", command, "--config", str(file), *words])
        return result.exit_code, result.output

    return run


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_the_console_registers_approves_pauses_and_ends(console):
    code, token = console("add", "rome")
    assert (code, token[:11]) == (0, "tc_monitor_")
    assert "pending" in console("list")[1]
    assert console("approve", "rome")[1].split()[:2] == ["rome", "testing"]
    assert console("approve", "rome")[1].split()[:2] == ["rome", "active"]
    assert console("pause", "rome", "--reason", "r")[0] == 0
    assert console("resume", "rome", "--on-trial")[1].split()[:2] == ["rome", "testing"]
    assert console("token", "rome")[1] != token
    assert console("end", "rome", "--reason", "r")[0] == 0
    code, text = console("end", "nobody", "--reason", "r")
    assert code == 2
    assert "there is no monitor named" in text
    assert [each["name"] for each in json.loads(console("list", "--json")[1])] == [INNER]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_the_console_shows_and_lowers_the_quorum(console):
    assert console("quorum") == (0, "1 (bootstrap) have to agree; 1 with a say are heard\n")
    assert console("quorum", "2")[0] == 2
    assert console("quorum", "2", "--reason", "r")[1].startswith("2 (bootstrap) have to agree")


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_a_scorer_on_trial_says_what_it_would_change(registry, call):
    for number, (score, shadow) in enumerate(((15.0, 5.0), (9.0, 12.0), (15.0, 15.0), (15.0, None))):
        server = await registry.server(f"s{number}", f"198.18.1.{number}", state=ServerState.ACTIVE)
        async with registry.database.transaction() as session:
            changed = update(Address).where(Address.server_id == server)
            await session.execute(changed.values(score=score, shadow_score=shadow))
    async with registry.database.transaction() as session:
        found = await monitors.compare(session)
    operator = (await registry.person(staff=StaffRole.OPERATOR)).token
    assert (str(found), found.dropped, found.added) == ("would drop 1, add 1", ["s0"], ["s1"])
    answer = (await call(operator, "GET", "/v1/scorers")).json()
    assert (answer["scorer"], answer["shadow"], answer["difference"]) == ("median", None, None)
