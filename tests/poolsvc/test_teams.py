"""The people of members: roles, the last owner, and invitations that are good once."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import func, select, update

from poolsvc import auth, standing, teams
from poolsvc.derived import Purpose, RegistryKey
from poolsvc.errors import LastOwner, LimitReached, OfferOver, TooManyRequests, WrongState
from poolsvc.models import (
    Delivery,
    DeliveryStatus,
    Invitation,
    Member,
    MemberRole,
    Membership,
    MemberStatus,
    Notice,
    StaffRole,
    Token,
    TokenKind,
)

OWNER, TECHNICIAN = MemberRole.OWNER, MemberRole.TECHNICIAN
EMAIL = "new@example.org"


async def roles(registry, member):
    async with registry.database.transaction() as session:
        found = select(Membership).where(Membership.member_id == member).order_by(Membership.id)
        return {row.user_id: row.role for row in await session.scalars(found)}


async def told(registry, kind):
    """Whom notices of a kind went to."""
    async with registry.database.transaction() as session:
        found = select(Delivery.user_id).join(Notice).where(Notice.kind == kind).order_by(Delivery.id)
        return list(await session.scalars(found))


@pytest.fixture
async def team(registry):
    """A member with two owners, besides the one that it was made with, and a technician."""
    registry.member_id = await registry.member()
    (registry.founder,) = await roles(registry, registry.member_id)
    registry.first = await registry.person(registry.member_id, OWNER, email="first@example.org")
    registry.second = await registry.person(registry.member_id, OWNER, email="second@example.org")
    registry.third = await registry.person(registry.member_id, TECHNICIAN, email="third@example.org")
    async with registry.database.transaction() as session:
        await teams.remove(session, registry.member_id, registry.founder, registry.now)
    return registry


async def invite(registry, now=None, email=EMAIL, settings=None, **options):
    async with registry.database.transaction() as session:
        options = {"member_id": registry.member_id, "role": TECHNICIAN, "by": registry.first.id} | options
        return await teams.invite(
            session, settings or registry.settings, email, now or registry.now, **options
        )


async def accept(registry, invitation, user, now=None):
    async with registry.database.transaction() as session:
        return await teams.accept(session, registry.settings, invitation.id, user.id, now or registry.now)


async def fetch(registry, row):
    async with registry.database.transaction() as session:
        return await session.get_one(type(row), row.id)


async def test_people_are_listed_with_addresses_for_those_who_manage_them(call, team):
    path = f"/v1/members/{team.member_id}/users"

    async def emails(token):
        return [entry["email"] for entry in (await call(token, "GET", path)).json()["items"]]

    all_of_them = ["first@example.org", "second@example.org", "third@example.org"]
    assert await emails(team.first.token) == all_of_them
    assert await emails((await team.person(staff=StaffRole.OPERATOR)).token) == all_of_them
    assert await emails(team.third.token) == [None, None, "third@example.org"]
    assert await emails((await team.person(staff=StaffRole.SUPPORT)).token) == [None] * 3


async def test_an_owner_changes_roles_and_everybody_their_own_mails(call, team):
    path = f"/v1/members/{team.member_id}/users/{{}}".format
    answer = await call(team.first.token, "PATCH", path(team.third.id), json={"role": "owner"})
    assert (answer.status_code, answer.json()["role"]) == (200, "owner")
    answer = await call(team.third.token, "PATCH", path(team.third.id), json={"mail": False})
    assert (answer.status_code, answer.json()["mail"]) == (200, False)
    answer = await call(team.first.token, "PATCH", path(team.third.id), json={"mail": True})
    assert (answer.status_code, answer.json()["field"]) == (403, "mail")
    answer = await call(team.first.token, "PATCH", path(10_000), json={"role": "owner"})
    assert answer.status_code == 404


async def test_a_technician_manages_nobody_not_even_itself(call, team):
    path = f"/v1/members/{team.member_id}/users/{{}}".format
    for method, user, body in (
        ("PATCH", team.third, {"role": "owner"}),
        ("PATCH", team.third, {"role": "owner", "mail": True}),
        ("PATCH", team.first, {"mail": False}),
        ("DELETE", team.first, None),
    ):
        answer = await call(team.third.token, method, path(user.id), json=body)
        assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
    assert set((await roles(team, team.member_id)).values()) == {OWNER, TECHNICIAN}


async def test_who_is_removed_loses_the_member_at_once_with_tokens_and_invitations(call, team):
    async with team.database.transaction() as session:
        user = {"user_id": team.second.id, "now": team.now}
        _, broad = await auth.issue(session, TokenKind.API, **user)
        limited, narrow = await auth.issue(session, TokenKind.API, member_id=team.member_id, **user)
    pending = await invite(team, datetime.now(UTC), by=team.second.id)
    path = f"/v1/members/{team.member_id}"
    for token in (broad, narrow, team.second.token):
        assert (await call(token, "GET", path)).status_code == 200
    answer = await call(team.first.token, "DELETE", f"{path}/users/{team.second.id}")
    assert answer.status_code == 204
    for token in (broad, team.second.token):
        assert (await call(token, "GET", path)).json()["code"] == "forbidden"
    assert (await call(narrow, "GET", path)).json()["code"] == "unauthenticated"
    assert (await fetch(team, limited)).revoked_at is not None
    assert (await fetch(team, pending)).email is None
    with pytest.raises(OfferOver, match="revoked"):
        await accept(team, pending, await team.person())
    # The founder's leaving was told as well; who goes is told, too.
    last = (await told(team, "user-left"))[-3:]
    assert last == [team.first.id, team.second.id, team.third.id]


async def test_everybody_may_leave_but_the_last_owner(call, team):
    path = f"/v1/members/{team.member_id}/users/{{}}".format
    for leaver in (team.third, team.second):
        assert (await call(leaver.token, "DELETE", path(leaver.id))).status_code == 204
    for method, body in (("DELETE", None), ("PATCH", {"role": "technician"})):
        answer = await call(team.first.token, method, path(team.first.id), json=body)
        assert (answer.status_code, answer.json()["code"]) == (409, "last-owner")
        assert answer.json()["remedy"]
    operator = await team.person(staff=StaffRole.OPERATOR)
    assert (await call(operator.token, "DELETE", path(team.first.id))).status_code == 409
    assert await roles(team, team.member_id) == {team.first.id: OWNER}


async def test_an_owner_who_cannot_act_does_not_count(team):
    async with team.database.transaction() as session:
        await standing.block_user(session, team.second.id, "a test", now=team.now, by=None)
    async with team.database.transaction() as session:
        with pytest.raises(LastOwner):
            await teams.remove(session, team.member_id, team.first.id, team.now)
        await teams.remove(session, team.member_id, team.second.id, team.now)


async def test_the_last_owner_may_leave_a_closed_member(team):
    async with team.database.transaction() as session:
        await standing.close(
            session, team.member_id, team.now, actor="test", by="owner", remove_servers=False
        )
        for person in (team.first, team.second):
            await teams.remove(session, team.member_id, person.id, team.now)
    assert await roles(team, team.member_id) == {team.third.id: TECHNICIAN}


@pytest.mark.parametrize("way", ["leave", "demote"])
async def test_two_owners_that_go_at_once_leave_one(postgresql, settings, registry_of, way):
    registry = registry_of(postgresql, settings)
    member = await registry.member()
    (founder,) = await roles(registry, member)
    other = (await registry.person(member)).id
    both_began = asyncio.Barrier(2)

    async def go(user):
        async with postgresql.transaction() as session:
            await session.scalar(select(Member.id))
            await both_began.wait()
            if way == "leave":
                await teams.remove(session, member, user, registry.now)
            else:
                await teams.change_role(session, member, user, TECHNICIAN, registry.now)

    async with asyncio.timeout(20):
        outcomes = await asyncio.gather(go(founder), go(other), return_exceptions=True)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["LastOwner", "NoneType"]
    assert list((await roles(registry, member)).values()).count(OWNER) == 1


async def test_an_invitation_is_mailed_and_lets_its_bearer_in_whatever_their_address(call, team):
    path = f"/v1/members/{team.member_id}/invitations"
    answer = await call(team.first.token, "POST", path, json={"email": " New@Example.org"})
    assert answer.status_code == 201
    view = answer.json()
    life = datetime.fromisoformat(view["expires_at"]) - datetime.fromisoformat(view["created_at"])
    assert (view["email"], view["role"], life) == (EMAIL, "technician", timedelta(days=7))
    async with team.database.transaction() as session:
        mail = await session.scalar(select(Delivery).join(Notice).where(Notice.kind == "invitation"))
        assert (mail.email, mail.status) == (EMAIL, DeliveryStatus.PENDING)
        assert (await session.get_one(Notice, mail.notice_id)).data == {"invitation": view["id"]}
    token = RegistryKey(bytes(32)).token(Purpose.INVITATION, view["id"])
    assert token not in answer.text
    bearer = await team.person(email="another@example.org")
    answer = await call(bearer.token, "POST", "/v1/invitations/accept", json={"token": token})
    assert (answer.status_code, answer.json()) == (200, {"member": team.member_id, "role": "technician"})
    assert (await call(bearer.token, "GET", f"/v1/members/{team.member_id}")).status_code == 200
    assert bearer.id in await told(team, "user-joined")
    (listed,) = (await call(team.first.token, "GET", path)).json()["items"]
    assert (listed["email"], listed["accepted_at"] is None) == (None, False)
    # Once is once, for everybody.
    for person in (bearer, await team.person()):
        answer = await call(person.token, "POST", "/v1/invitations/accept", json={"token": token})
        assert (answer.status_code, answer.json()["code"]) == (410, "offer-over")


async def test_an_invitation_does_not_tell_who_has_an_account(call, team):
    path = f"/v1/members/{team.member_id}/invitations"
    answers = [
        (await call(team.first.token, "POST", path, json={"email": address})).json()
        for address in ("third@example.org", "nobody@example.org")
    ]
    different = {name for name in answers[0] if answers[0][name] != answers[1][name]}
    assert different == {"id", "email", "created_at", "expires_at"}


@pytest.mark.parametrize("token", ["", "1", "1.", "x.y", "1.AAAA", "é" * 10, "9" * 150])
async def test_what_is_no_invitation_opens_nothing(call, team, token):
    await invite(team, datetime.now(UTC))
    answer = await call(team.third.token, "POST", "/v1/invitations/accept", json={"token": token})
    assert (answer.status_code, answer.json()["code"]) == (404, "not-found")


async def test_a_token_of_another_purpose_is_no_invitation(call, team):
    made = await invite(team, datetime.now(UTC))
    token = RegistryKey(bytes(32)).token(Purpose.SIGN_IN, made.id)
    person = await team.person()
    answer = await call(person.token, "POST", "/v1/invitations/accept", json={"token": token})
    assert answer.status_code == 404


async def test_an_invitation_ends_at_its_time_or_when_it_is_revoked(team):
    made, other = await invite(team), await invite(team)
    person = await team.person()
    with pytest.raises(OfferOver, match="expired"):
        await accept(team, made, person, made.expires_at)
    async with team.database.transaction() as session:
        await teams.revoke_invitation(session, team.member_id, other.id, team.now)
        with pytest.raises(OfferOver, match="revoked"):
            await teams.revoke_invitation(session, team.member_id, other.id, team.now)
    with pytest.raises(OfferOver, match="revoked"):
        await accept(team, other, person)
    await accept(team, made, person, made.expires_at - timedelta(seconds=1))


async def test_the_address_of_an_expired_invitation_is_forgotten_and_no_other(team):
    made = await invite(team)
    for moment, kept in ((made.expires_at - timedelta(seconds=1), EMAIL), (made.expires_at, None)):
        async with team.database.transaction() as session:
            await teams.forget_expired(session, moment)
        assert (await fetch(team, made)).email == kept


async def test_an_invitation_of_another_member_cannot_be_revoked(call, team):
    made = await invite(team, datetime.now(UTC))
    stranger_member = await team.member("Other")
    stranger = await team.person(stranger_member)
    path = f"/v1/members/{stranger_member}/invitations/{made.id}"
    assert (await call(stranger.token, "DELETE", path)).status_code == 404
    operator = await team.person(staff=StaffRole.OPERATOR)
    assert (await call(operator.token, "DELETE", f"/v1/invitations/{made.id}")).status_code == 404
    assert (await fetch(team, made)).revoked_at is None


async def test_open_invitations_and_those_of_a_day_are_limited(team, tuned):
    settings = tuned(pending_invitations=2, invitations_per_day=3)
    for _ in range(2):
        made = await invite(team, settings=settings)
    with pytest.raises(TooManyRequests, match="2 invitations"):
        await invite(team, settings=settings)
    async with team.database.transaction() as session:
        await teams.end_invitations(session, team.now, member_id=team.member_id)
    await invite(team, settings=settings)
    with pytest.raises(TooManyRequests, match="within a day"):
        await invite(team, settings=settings)
    await invite(team, team.now + timedelta(days=1), settings=settings)
    assert (await fetch(team, made)).revoked_at == team.now


async def test_many_invitations_at_once_keep_the_limit(postgresql, registry_of, tuned):
    registry = registry_of(postgresql, tuned(pending_invitations=2))
    registry.member_id = await registry.member()
    registry.first = await registry.person(registry.member_id)
    async with asyncio.timeout(20):
        outcomes = await asyncio.gather(*(invite(registry) for _ in range(5)), return_exceptions=True)
    assert sum(isinstance(outcome, Invitation) for outcome in outcomes) == 2
    assert sum(isinstance(outcome, TooManyRequests) for outcome in outcomes) == 3


async def test_two_who_bring_one_invitation_at_once(postgresql, settings, registry_of):
    registry = registry_of(postgresql, settings)
    registry.member_id = await registry.member()
    registry.first = await registry.person(registry.member_id)
    made = await invite(registry)
    people = [await registry.person() for _ in range(3)]
    async with asyncio.timeout(20):
        outcomes = await asyncio.gather(
            *(accept(registry, made, person) for person in people), return_exceptions=True
        )
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Membership", "OfferOver", "OfferOver"]
    assert len(await roles(registry, registry.member_id)) == 3


async def test_an_invitation_that_is_accepted_and_revoked_at_once_is_one_of_both(
    postgresql, settings, registry_of
):
    registry = registry_of(postgresql, settings)
    registry.member_id = await registry.member()
    registry.first = await registry.person(registry.member_id)

    async def revoke(made):
        async with postgresql.transaction() as session:
            await teams.revoke_invitation(session, registry.member_id, made.id, registry.now)

    for _ in range(8):
        made, person = await invite(registry), await registry.person()
        async with asyncio.timeout(20):
            await asyncio.gather(accept(registry, made, person), revoke(made), return_exceptions=True)
        row = await fetch(registry, made)
        assert (row.accepted_at is None) != (row.revoked_at is None)
        assert (person.id in await roles(registry, registry.member_id)) is (row.accepted_at is not None)


async def test_who_acts_for_the_member_already_does_not_use_an_invitation_up(team):
    made = await invite(team)
    with pytest.raises(WrongState, match="already"):
        await accept(team, made, team.third)
    await accept(team, made, await team.person())


async def test_a_member_has_so_many_people(team, tuned):
    made = await invite(team)
    team.settings = tuned(people_per_member=3)
    with pytest.raises(LimitReached):
        await accept(team, made, await team.person())
    assert (await fetch(team, made)).accepted_at is None


@pytest.mark.parametrize("status", [MemberStatus.PENDING, MemberStatus.BLOCKED, MemberStatus.CLOSED])
async def test_nobody_comes_to_a_member_that_is_not_active(team, status):
    made = await invite(team)
    async with team.database.transaction() as session:
        await session.execute(update(Member).values(status=status))
    with pytest.raises(WrongState):
        await accept(team, made, await team.person())
    with pytest.raises(WrongState):
        await invite(team)


async def test_an_invitation_to_the_pool_is_for_who_has_no_account(call, team):
    operator = await team.person(staff=StaffRole.OPERATOR)
    answer = await call(operator.token, "POST", "/v1/invitations", json={"email": EMAIL})
    assert (answer.status_code, answer.json()["role"]) == (201, None)
    token = RegistryKey(bytes(32)).token(Purpose.INVITATION, answer.json()["id"])
    person = await team.person()
    answer = await call(person.token, "POST", "/v1/invitations/accept", json={"token": token})
    assert (answer.status_code, answer.json()["code"]) == (409, "wrong-state")
    (listed,) = (await call(operator.token, "GET", "/v1/invitations")).json()["items"]
    assert listed["accepted_at"] is None


BAD = [{"email": "nobody"}, {"email": "a@b\x00.example"}, {"email": 7}, {"email": "a" * 300}, {}, [], None]
BAD += [{"email": EMAIL, "role": "king"}, {"email": EMAIL, "extra": 1}]


@pytest.mark.parametrize("body", BAD)
async def test_invitations_that_are_refused(call, team, body):
    path = f"/v1/members/{team.member_id}/invitations"
    answer = await call(team.first.token, "POST", path, json=body)
    assert answer.status_code == 422
    async with team.database.transaction() as session:
        assert await session.scalar(select(func.count(Invitation.id))) == 0
        assert await session.scalar(select(func.count(Token.id))) == 3
