"""How members and people stand with the pool: approval, blocks, closing and staff."""

import asyncio
from datetime import UTC, datetime

import pytest
from sqlalchemy import select, update

from nts_core.control import ServerState
from poolsvc import members, servers, sign_in, standing, teams, transfers
from poolsvc.errors import LastOwner, LimitReached, NotFound, WrongState
from poolsvc.models import (
    Event,
    HoldKind,
    Invitation,
    Member,
    MemberKind,
    MemberRole,
    MemberStatus,
    Notice,
    Server,
    StaffRole,
    Transfer,
    User,
)

S = ServerState
REASON = {"reason": "sends wrong time"}
OPERATOR = StaffRole.OPERATOR


@pytest.fixture
async def pool(registry):
    """A member with an owner, and an operator."""
    registry.member_id = await registry.member("Club")
    registry.owner = await registry.person(registry.member_id, email="owner@example.org")
    registry.operator = await registry.person(staff=OPERATOR)
    registry.path = f"/v1/members/{registry.member_id}"
    return registry


async def member(registry):
    async with registry.database.transaction() as session:
        return await members.get(session, registry.member_id)


async def set_status(registry, status):
    async with registry.database.transaction() as session:
        await session.execute(update(Member).where(Member.id == registry.member_id).values(status=status))


async def notices(registry):
    async with registry.database.transaction() as session:
        found = select(Notice.kind).where(Notice.member_id == registry.member_id).order_by(Notice.id)
        return [kind for kind in await session.scalars(found) if kind.startswith("member-")]


async def states(registry):
    async with registry.database.transaction() as session:
        return {row.name: row.state for row in await session.scalars(select(Server))}


async def test_a_member_that_waits_is_approved_once(call, pool):
    await set_status(pool, MemberStatus.PENDING)
    body = {"name": "alice", "addresses": ["198.18.0.1"]}
    assert (await call(pool.owner.token, "POST", "/v1/servers", json=body)).json()["code"] == "member-blocked"
    for _ in range(2):
        answer = await call(pool.operator.token, "PUT", pool.path + "/approval")
        assert (answer.status_code, answer.json()["status"]) == (200, "active")
    assert await notices(pool) == ["member-approved"]
    assert (await call(pool.owner.token, "POST", "/v1/servers", json=body)).status_code == 201


async def test_a_block_holds_every_server_and_its_end_lifts_its_own_holds_only(call, pool):
    for last, state in enumerate((S.ACTIVE, S.CERTIFIED, S.REGISTERED, S.LEAVING, S.ACTIVE), start=1):
        await pool.server(f"s{last}", f"198.18.0.{last}", state=state, member=pool.member_id)
    await pool.server("other", "198.18.0.99", state=S.ACTIVE)
    async with pool.database.transaction() as session:
        held = await servers.find(session, "s5")
        await servers.set_hold(
            session, held, HoldKind.OPERATOR, reason="too slow", actor="test", now=pool.now
        )
    before = await states(pool)
    answer = await call(pool.operator.token, "PUT", pool.path + "/block", json=REASON)
    assert (answer.status_code, answer.json()["status_reason"]) == (200, REASON["reason"])
    assert await states(pool) == before | {"s1": S.SUSPENDED}
    async with pool.database.transaction() as session:
        held = {name: [hold.reason for hold in (await servers.find(session, name)).holds] for name in before}
    block = ["its member is blocked"]
    assert held == {"s1": block, "s2": block, "s3": block, "s4": [], "s5": ["too slow"], "other": []}

    answer = await call(pool.operator.token, "DELETE", pool.path + "/block")
    assert (answer.json()["status"], answer.json()["status_reason"]) == ("active", None)
    assert await states(pool) == before
    assert await notices(pool) == ["member-blocked", "member-unblocked"]
    async with pool.database.transaction() as session:
        changes = await session.scalars(select(Event).where(Event.kind.in_(("hold-set", "holds-lifted"))))
        actors = {(event.kind, event.actor) for event in changes if event.server_id == 1}
    assert actors == {(kind, f"user {pool.operator.id}") for kind in ("hold-set", "holds-lifted")}


async def test_people_of_a_blocked_member_read_and_leave(call, pool):
    await pool.server("alice", state=S.ACTIVE, member=pool.member_id)
    await call(pool.operator.token, "PUT", pool.path + "/block", json=REASON)
    for path in (pool.path, pool.path + "/users", pool.path + "/events", "/v1/servers/alice", "/v1/servers"):
        assert (await call(pool.owner.token, "GET", path)).status_code == 200
    for method, path, body in (
        ("PATCH", pool.path, {"name": "New"}),
        ("POST", pool.path + "/invitations", {"email": "x@example.org"}),
        ("POST", "/v1/servers", {"name": "bob", "addresses": ["198.18.0.2"]}),
        ("POST", "/v1/servers/alice/transfer", {"to": "0" * 16}),
    ):
        answer = await call(pool.owner.token, method, path, json=body)
        assert (answer.status_code, answer.json()["code"]) == (403, "member-blocked"), path
    assert (await call(pool.owner.token, "DELETE", "/v1/servers/alice")).status_code == 202


async def test_blocking_again_changes_the_reason_and_the_same_one_nothing(call, pool):
    for reason in ("one", "one", "two"):
        await call(pool.operator.token, "PUT", pool.path + "/block", json={"reason": reason})
    assert (await member(pool)).status_reason == "two"
    assert await notices(pool) == ["member-blocked"] * 2


@pytest.mark.parametrize("body", [None, {}, {"reason": ""}, {"reason": "x" * 301}, {"reason": "a\x00b"}])
async def test_a_block_has_a_reason(call, pool, body):
    for path in (pool.path, f"/v1/users/{pool.owner.id}"):
        answer = await call(pool.operator.token, "PUT", path + "/block", json=body)
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid-document")
    assert (await member(pool)).status is MemberStatus.ACTIVE


WRONG = [
    (MemberStatus.PENDING, "PUT", "/block"),
    (MemberStatus.PENDING, "DELETE", "/block"),
    (MemberStatus.CLOSED, "PUT", "/block"),
    (MemberStatus.CLOSED, "DELETE", "/block"),
    (MemberStatus.CLOSED, "PUT", "/approval"),
    (MemberStatus.BLOCKED, "PUT", "/approval"),
    (MemberStatus.CLOSED, "PATCH", ""),
]


@pytest.mark.parametrize(("status", "method", "what"), WRONG)
async def test_what_a_members_status_does_not_allow(call, pool, status, method, what):
    await set_status(pool, status)
    answer = await call(pool.operator.token, method, pool.path + what, json=REASON if what else {})
    assert (answer.status_code, answer.json()["code"]) == (409, "wrong-state")
    assert (await member(pool)).status is status


async def test_a_member_with_servers_is_closed_only_together_with_them(call, pool):
    await pool.server("alice", state=S.ACTIVE, member=pool.member_id)
    await pool.server("gone", "198.18.0.2", state=S.REMOVED, member=pool.member_id)
    answer = await call(pool.owner.token, "DELETE", pool.path)
    assert (answer.status_code, answer.json()["code"]) == (409, "wrong-state")
    assert "remove_servers=true" in answer.json()["remedy"]
    for _ in range(2):
        answer = await call(pool.owner.token, "DELETE", pool.path + "?remove_servers=true")
        assert (answer.status_code, answer.json()["status"]) == (200, "closed")
    assert answer.json()["status_reason"] == "closed by its owner"
    assert await states(pool) == {"alice": S.LEAVING, "gone": S.REMOVED}
    # Its people follow the removal to its end, and do nothing else.
    assert (await call(pool.owner.token, "GET", "/v1/servers/alice")).json()["receipt"]
    assert (await call(pool.owner.token, "PATCH", pool.path, json={"public": True})).status_code == 403


async def test_a_closed_member_gives_its_name_back_and_ends_what_it_began(call, pool):
    other = await pool.member("Other")
    alice = await pool.server("alice", state=S.ACTIVE, member=pool.member_id)
    bob = await pool.server("bob", "198.18.0.2", state=S.ACTIVE, member=other)
    async with pool.database.transaction() as session:
        opaque = {row.id: row.opaque_id for row in await session.scalars(select(Member))}
        for server, to in ((alice, other), (bob, pool.member_id)):
            await transfers.offer(session, pool.settings, server, opaque[to], pool.now)
        await teams.invite(
            session,
            pool.settings,
            "x@example.org",
            pool.now,
            by=pool.owner.id,
            member_id=pool.member_id,
            role=MemberRole.OWNER,
        )
        await standing.close(session, pool.member_id, pool.now, actor="test", by="owner", remove_servers=True)
    async with pool.database.transaction() as session:
        offers = list(await session.scalars(select(Transfer)))
        invitation = await session.scalar(select(Invitation))
        closed = await members.get(session, pool.member_id)
    assert [row.declined_at for row in offers] == [pool.now] * 2
    assert (invitation.revoked_at, invitation.email) == (pool.now, None)
    assert (closed.name, closed.public) == (f"closed {closed.opaque_id}", False)
    answer = await call(pool.operator.token, "POST", "/v1/members", json={"name": "Club"})
    assert answer.status_code == 201


async def test_members_are_listed_by_status_and_name_each_to_its_own_people(call, pool):
    await pool.member("Clubhouse")
    await set_status(pool, MemberStatus.BLOCKED)

    async def names(person, **params):
        answer = await call(person.token, "GET", "/v1/members", params=params)
        return [entry["name"] for entry in answer.json()["items"]]

    assert await names(pool.operator) == ["Club", "Clubhouse"]
    assert await names(await pool.person(staff=StaffRole.SUPPORT), q="clubH") == ["Clubhouse"]
    assert await names(pool.operator, status="blocked") == await names(pool.owner) == ["Club"]
    assert await names(pool.owner, status="active") == await names(pool.operator, q="lub") == []
    assert await names(await pool.person()) == []


async def test_an_owner_changes_the_member_and_only_an_operator_its_limit(call, pool):
    change = {"name": " Time  Club ", "kind": "organisation", "public": True}
    answer = await call(pool.owner.token, "PATCH", pool.path, json=change)
    assert {name: answer.json()[name] for name in change} == change | {"name": "Time Club"}
    answer = await call(pool.owner.token, "PATCH", pool.path, json={"max_servers": 100})
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
    for limit in (0, None):
        answer = await call(pool.operator.token, "PATCH", pool.path, json={"max_servers": limit})
        assert answer.json()["max_servers"] == limit
        body = {"name": f"s{limit}".lower(), "addresses": ["198.18.0.1"]}
        answer = await call(pool.owner.token, "POST", "/v1/servers", json=body)
        assert answer.status_code == (409 if limit == 0 else 201), answer.text
    unchanged = await call(pool.owner.token, "PATCH", pool.path, json={"name": None})
    assert unchanged.json()["name"] == "Time Club"


@pytest.mark.parametrize("name", ["", "a@b", "x" * 101, "nul\x00", "Taken"])
async def test_names_that_a_member_cannot_take(call, pool, name):
    await pool.member("Taken")
    answer = await call(pool.owner.token, "PATCH", pool.path, json={"name": name})
    assert answer.status_code in {409, 422}
    assert answer.json()["field"] == "name"
    assert (await member(pool)).name == "Club"


async def test_a_confirmed_person_founds_members_that_wait_for_approval(call, pool, tuned):
    answer = await call(pool.owner.token, "POST", "/v1/members", json={"name": "Second"})
    assert answer.status_code == 201
    assert (answer.json()["status"], answer.json()["token"]) == ("pending", None)
    async with pool.database.transaction() as session:
        mine = {row.member_id: row.role for row in await team_of(session, pool.owner.id)}
    assert mine[answer.json()["id"]] is MemberRole.OWNER
    with_address = {"name": "Third", "email": "x@example.org"}
    answer = await call(pool.owner.token, "POST", "/v1/members", json=with_address)
    assert (answer.status_code, answer.json()["field"]) == (422, "email")
    unconfirmed = await pool.person(confirmed_at=None)
    answer = await call(unconfirmed.token, "POST", "/v1/members", json={"name": "Third"})
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")


async def team_of(session, user):
    found = select(User).where(User.id == user)
    row = await session.scalar(found)
    await session.refresh(row, ["memberships"])
    return row.memberships


async def test_one_person_founds_so_many_members_also_at_once(postgresql, registry_of, tuned):
    registry = registry_of(postgresql, tuned(members_per_person=2))
    person = await registry.person()

    async def found(number):
        async with postgresql.transaction() as session:
            return await members.found(
                session, registry.settings, person.id, f"M{number}", MemberKind.PERSON, registry.now
            )

    async with asyncio.timeout(20):
        outcomes = await asyncio.gather(*map(found, range(4)), return_exceptions=True)
    assert sorted(type(outcome) is Member for outcome in outcomes) == [False, False, True, True]
    assert {type(outcome) for outcome in outcomes} == {Member, LimitReached}


async def test_a_blocked_person_is_refused_and_comes_back_with_what_they_had(call, pool):
    path = f"/v1/users/{pool.owner.id}/block"
    answer = await call(pool.operator.token, "PUT", path, json=REASON)
    assert (answer.json()["blocked_reason"], answer.json()["blocked_at"] is None) == (REASON["reason"], False)
    assert (await call(pool.owner.token, "GET", "/v1/me")).json()["code"] == "unauthenticated"
    assert (await member(pool)).status is MemberStatus.ACTIVE
    for _ in range(2):
        answer = await call(pool.operator.token, "DELETE", path)
        assert (answer.json()["blocked_at"], answer.json()["blocked_reason"]) == (None, None)
    assert (await call(pool.owner.token, "GET", "/v1/me")).status_code == 200


async def test_support_reads_what_a_person_reads_and_changes_nothing(call, pool):
    support = await pool.person(staff=StaffRole.SUPPORT)
    answer = await call(support.token, "POST", f"/v1/users/{pool.owner.id}/view", json=REASON)
    assert (answer.status_code, answer.json()["scopes"]) == (201, ["read"])
    token = answer.json()["token"]
    assert (await call(token, "GET", "/v1/me")).json()["email"] == "owner@example.org"
    assert (await call(token, "GET", pool.path)).status_code == 200
    for method, path, body in (
        ("PATCH", "/v1/me", {"name": "Somebody"}),
        ("POST", "/v1/me/tokens", {"label": "more", "scopes": ["read"]}),
        ("POST", "/v1/servers", {"name": "alice", "addresses": ["198.18.0.1"]}),
        ("DELETE", "/v1/me", None),
    ):
        refusal = await call(token, method, path, json=body)
        assert (refusal.status_code, refusal.json()["code"]) == (403, "forbidden"), path
    (seen,) = (await call(pool.owner.token, "GET", "/v1/me/tokens")).json()["items"]
    assert seen["label"] == "the pool's staff: sends wrong time"
    noted = (await call(pool.owner.token, "GET", "/v1/me/events")).json()["items"]
    assert [entry["kind"] for entry in noted if entry["actor"] == "operator"] == ["token-created"]
    path = f"/v1/events?actor=user%20{support.id}"
    noted = (await call(pool.operator.token, "GET", path)).json()["items"]
    assert [entry["kind"] for entry in noted] == ["token-created"], "the pool's own log says who"
    assert (await call(pool.owner.token, "DELETE", f"/v1/me/tokens/{seen['id']}")).status_code == 204
    assert (await call(token, "GET", "/v1/me")).status_code == 401


async def test_a_view_ends_by_itself(call, pool):
    now = datetime.now(UTC)
    async with pool.database.transaction() as session:
        row, text = await standing.view_as(session, pool.owner.id, "why", now, by=pool.operator.id)
        assert row.expires_at == now + standing.VIEW_LIFE
        row.expires_at = now
    assert (await call(text, "GET", "/v1/me")).json()["code"] == "token-expired"


@pytest.mark.parametrize("change", ["dismissed", "blocked", "appointed"])
async def test_a_view_ends_with_what_it_was_given_for(call, pool, change):
    support = await pool.person(staff=StaffRole.SUPPORT)
    answer = await call(support.token, "POST", f"/v1/users/{pool.owner.id}/view", json=REASON)
    token = answer.json()["token"]
    assert (await call(token, "GET", "/v1/me")).status_code == 200
    method, path, body = {
        "dismissed": ("DELETE", f"/v1/users/{support.id}/staff", None),
        "blocked": ("PUT", f"/v1/users/{support.id}/block", REASON),
        "appointed": ("PUT", f"/v1/users/{pool.owner.id}/staff", {"role": "support"}),
    }[change]
    assert (await call(pool.operator.token, method, path, json=body)).status_code == 200
    answer = await call(token, "GET", "/v1/me")
    assert (answer.status_code, answer.json()["detail"]) == (401, "the view has ended")
    noted = (await call(pool.owner.token, "GET", "/v1/me/events")).json()["items"]
    if change == "dismissed":
        assert {entry["actor"] for entry in noted} == {"operator", "test"}


async def test_all_views_end_with_all_sessions(call, pool):
    answer = await call(pool.operator.token, "POST", f"/v1/users/{pool.owner.id}/view", json=REASON)
    async with pool.database.transaction() as session:
        await sign_in.end_all_sessions(session, datetime.now(UTC))
    assert (await call(answer.json()["token"], "GET", "/v1/me")).status_code == 401


async def test_nobody_reads_as_staff_as_who_is_blocked_or_without_a_reason(call, pool):
    support, path = await pool.person(staff=StaffRole.SUPPORT), f"/v1/users/{pool.owner.id}"
    answer = await call(support.token, "POST", f"/v1/users/{pool.operator.id}/view", json=REASON)
    assert (answer.status_code, answer.json()["detail"]) == (409, "the person is staff")
    for reason in ("", " ", "x" * 81):
        answer = await call(support.token, "POST", path + "/view", json={"reason": reason})
        assert (answer.status_code, answer.json()["field"]) == (422, "reason")
    assert (await call(support.token, "POST", "/v1/users/999999/view", json=REASON)).status_code == 404
    await call(pool.operator.token, "PUT", path + "/block", json=REASON)
    answer = await call(support.token, "POST", path + "/view", json=REASON)
    assert (answer.status_code, answer.json()["remedy"]) == (409, "unblock them first")


async def test_people_are_found_by_name_or_address(call, pool):
    await pool.person(email="zoe@example.org", name="Zoë Smith")
    await pool.person(email="smith@example.org")

    async def found(q):
        answer = await call(pool.operator.token, "GET", "/v1/users", params={"q": q})
        return [entry["email"] for entry in answer.json()["items"]]

    assert await found("ZO") == ["zoe@example.org"]
    assert await found("smith") == ["smith@example.org"]
    assert await found("%") == []


async def test_the_pool_keeps_an_operator_who_can_act(call, pool):
    own = f"/v1/users/{pool.operator.id}"
    for method, path, body, code in (
        ("DELETE", own + "/staff", None, "last-owner"),
        ("PUT", own + "/staff", {"role": "support"}, "last-owner"),
        ("PUT", own + "/block", REASON, "wrong-state"),
    ):
        answer = await call(pool.operator.token, method, path, json=body)
        assert (answer.status_code, answer.json()["code"]) == (409, code)
        assert answer.json()["remedy"]
    other = f"/v1/users/{pool.owner.id}"
    answer = await call(pool.operator.token, "PUT", other + "/staff", json={"role": "operator"})
    assert answer.json()["staff"] == "operator"
    await call(pool.operator.token, "PUT", other + "/block", json=REASON)
    # One that is blocked is none.
    assert (await call(pool.operator.token, "DELETE", own + "/staff")).status_code == 409
    await call(pool.operator.token, "DELETE", other + "/block")
    answer = await call(pool.owner.token, "DELETE", own + "/staff")
    assert (answer.status_code, answer.json()["staff"]) == (200, None)
    assert (await call(pool.operator.token, "GET", "/v1/users")).json()["code"] == "forbidden"


async def test_who_is_blocked_erased_or_unknown_becomes_no_staff(pool):
    async with pool.database.transaction() as session:
        await standing.block_user(session, pool.owner.id, "a test", now=pool.now, by=pool.operator.id)
        with pytest.raises(WrongState):
            await standing.appoint(session, pool.owner.id, OPERATOR)
        (await session.get_one(User, pool.owner.id)).erased_at = pool.now
        for unknown in (pool.owner.id, 10_000):
            for work in (
                standing.appoint(session, unknown, OPERATOR),
                standing.unblock_user(session, unknown),
            ):
                with pytest.raises(NotFound):
                    await work


async def test_two_operators_that_dismiss_each_other_at_once(postgresql, settings, registry_of):
    registry = registry_of(postgresql, settings)
    first, second = await registry.person(staff=OPERATOR), await registry.person(staff=OPERATOR)

    async def dismiss(user):
        async with postgresql.transaction() as session:
            await standing.appoint(session, user, None)

    async with asyncio.timeout(20):
        outcomes = await asyncio.gather(dismiss(first.id), dismiss(second.id), return_exceptions=True)
    assert sorted(type(outcome) for outcome in outcomes if outcome is not None) == [LastOwner]
