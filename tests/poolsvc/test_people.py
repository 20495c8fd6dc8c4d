"""One's own account: sessions, tokens of programs, all that is kept of a person, and the end of an account."""

import asyncio
import json
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select

from nts_core.control import ServerState
from poolsvc import auth, members, sign_in
from poolsvc.models import (
    Acceptance,
    Base,
    Delivery,
    DeliveryStatus,
    Event,
    Identity,
    Invitation,
    Member,
    MemberRole,
    Membership,
    MemberStatus,
    Scope,
    SignIn,
    StaffRole,
    Token,
    TokenKind,
    User,
)
from poolsvc.notices import NoticeKind, announce

ANN, BEN = "ann@example.org", "ben@example.org"


def now():
    return datetime.now(UTC)


async def api_token(people, user, **options):
    async with people.database.transaction() as session:
        row, text = await auth.issue(session, TokenKind.API, now=now(), user_id=user.id, **options)
        return row.id, text


async def join(people, user, member, role=MemberRole.OWNER):
    async with people.database.transaction() as session:
        session.add(Membership(member_id=member, user_id=user.id, role=role, created_at=now()))


async def test_a_name_is_changed_and_never_to_an_address(client, people):
    token = await people.session(await people.make())
    async with client(token) as http:
        answer = await http.patch("/v1/me", json={"name": "  Ann   B. "})
        assert (answer.status_code, answer.json()["name"]) == (202, "Ann B.")
        for bad in (ANN, "a\x00b", "x" * 101):
            refused = await http.patch("/v1/me", json={"name": bad})
            assert (refused.status_code, refused.json()["field"]) == (422, "name")
        assert (await http.patch("/v1/me", json={"name": ""})).json()["name"] == ""


class TestSessions:
    async def test_they_are_listed_and_ended_singly_and_all_others_at_once(self, client, people):
        user, other = await people.make(), await people.make(BEN)
        mine, second, third = [await people.session(user) for _ in range(3)]
        foreign = await people.session(other)
        async with client(mine) as http:
            shown = (await http.get("/v1/me/sessions")).json()["items"]
            assert [entry["current"] for entry in shown] == [False, False, True]
            assert shown[2]["last_used_at"] is not None
            assert (await http.delete(f"/v1/me/sessions/{shown[0]['id']}")).status_code == 204
            assert (await http.delete(f"/v1/me/sessions/{shown[0]['id']}")).status_code == 404
            assert await self.good(client, second)
            assert not await self.good(client, third)
            assert (await http.delete("/v1/me/sessions")).status_code == 204
        assert [await self.good(client, token) for token in (mine, second, foreign)] == [True, False, True]

    async def good(self, client, token):
        async with client(token) as http:
            return (await http.get("/v1/me")).status_code == 200

    async def test_those_of_others_are_not_there(self, client, people):
        user, other = await people.make(), await people.make(BEN)
        foreign = await people.session(other)
        (row,) = await people.all(Token)
        async with client(await people.session(user)) as http:
            assert (await http.delete(f"/v1/me/sessions/{row.id}")).status_code == 404
            assert (await http.delete(f"/v1/me/tokens/{row.id}")).status_code == 404
        assert await self.good(client, foreign)

    async def test_signing_out_ends_the_token_in_use(self, client, people):
        user = await people.make()
        mine, other = await people.session(user), await people.session(user)
        async with client(mine) as http:
            assert (await http.delete("/v1/me/session")).status_code == 204
        assert [await self.good(client, token) for token in (mine, other)] == [False, True]


class TestTokens:
    async def test_one_is_shown_once_and_does_what_its_scopes_say(self, client, people):
        user = await people.make()
        async with client(await people.session(user)) as http:
            made = await http.post("/v1/me/tokens", json={"label": "cron", "scopes": ["read"]})
            assert made.status_code == 201
            view = made.json()
            text = view.pop("token")
            assert (await http.get("/v1/me/tokens")).json()["items"] == [view]
        assert text.startswith(f"tc_api_{view['hint']}")
        days = (datetime.fromisoformat(view["expires_at"]) - now()).total_seconds() / 86400
        assert 89.9 < days < 90.1
        async with client(text) as http:
            assert (await http.get("/v1/me")).status_code == 200
            assert (await http.patch("/v1/me", json={"name": "B"})).status_code == 403
        async with client(await people.session(user)) as http:
            shown = (await http.get("/v1/me/tokens")).json()["items"]
            assert shown[0]["last_used_at"] is not None
            assert (await http.delete(f"/v1/me/tokens/{view['id']}")).status_code == 204
            assert (await http.get("/v1/me/tokens")).json()["items"] == []
        async with client(text) as http:
            assert (await http.get("/v1/me")).status_code == 401

    @pytest.mark.parametrize(
        ("body", "field"),
        [
            ({"scopes": []}, "scopes"),
            ({"scopes": ["all"]}, "scopes.0"),
            ({"label": ""}, "label"),
            ({"label": "a\x00"}, "label"),
            ({"label": " "}, "label"),
            ({"label": "x" * 101}, "label"),
            ({"label": "\u202e"}, "label"),
            ({"expires_at": "2020-01-01T00:00:00Z"}, "expires_at"),
            ({"expires_at": "9999-01-01T00:00:00Z"}, "expires_at"),
            ({"expires_at": "2026-01-01T00:00:00"}, "expires_at"),
            ({"expires_at": "soon"}, "expires_at"),
        ],
    )
    async def test_what_is_not_one_is_refused(self, client, people, body, field):
        async with client(await people.session(await people.make())) as http:
            answer = await http.post("/v1/me/tokens", json={"label": "x", "scopes": ["read"], **body})
        assert (answer.status_code, answer.json()["field"]) == (422, field)
        assert answer.json()["code"] == "invalid-document"
        assert "name" not in answer.json()["remedy"]

    async def test_its_label_is_what_its_owner_calls_it(self, client, people):
        async with client(await people.session(await people.make())) as http:
            for label, shown in (("x" * 100, "x" * 100), ("  backup@host   7 ", "backup@host 7")):
                made = await http.post("/v1/me/tokens", json={"label": label, "scopes": ["read"]})
                assert (made.status_code, made.json()["label"]) == (201, shown)

    async def test_one_lives_a_year_at_most(self, client, people):
        async with client(await people.session(await people.make())) as http:
            for days, status in ((364, 201), (366, 422)):
                end = (now() + timedelta(days=days)).isoformat()
                body = {"label": "x", "scopes": ["read"], "expires_at": end}
                assert (await http.post("/v1/me/tokens", json=body)).status_code == status

    async def test_one_made_by_another_has_no_more_scopes_and_no_longer_life(self, client, people):
        user = await people.make()
        end = now() + timedelta(days=3)
        _, maker = await api_token(people, user, scopes={Scope.ACCOUNT, Scope.READ}, expires_at=end)
        async with client(maker) as http:
            refused = await http.post("/v1/me/tokens", json={"label": "x", "scopes": ["read", "pool"]})
            assert (refused.status_code, refused.json()["field"]) == (403, "scopes")
            made = (await http.post("/v1/me/tokens", json={"label": "x", "scopes": ["read"]})).json()
        assert datetime.fromisoformat(made["expires_at"]) == end

    async def test_one_for_a_member_stays_with_it(self, client, people, registry):
        user = await people.make()
        mine, other, foreign = [await registry.member(name) for name in ("A", "B", "C")]
        for member in (mine, other):
            await join(people, user, member)
        await api_token(people, user, label="whole")
        _, limited = await api_token(people, user, member_id=mine, label="limited")
        body = {"label": "x", "scopes": ["read"]}
        bodies = {
            "/v1/me": {},
            "/v1/invitations/accept": {"token": "x"},
            "/v1/members": {"name": "D"},
        }
        async with client(limited) as http:
            shown = (await http.get("/v1/me")).json()
            assert [row["member"] for row in shown["memberships"]] == [mine]
            assert (shown["id"], shown["email"], shown["staff"]) == (user.id, None, None)
            for member, status in ((mine, 201), (other, 403), (None, 403), (foreign, 403)):
                answer = await http.post("/v1/me/tokens", json={**body, "member": member})
                assert answer.status_code == status
            assert {entry["label"] for entry in (await http.get("/v1/me/tokens")).json()["items"]} == {
                "limited",
                "x",
            }
            # What is not about the member alone is not its business.
            for method, path in (
                ("GET", "/v1/me/export"),
                ("GET", "/v1/me/sessions"),
                ("GET", "/v1/me/identities"),
                ("DELETE", "/v1/me/sessions"),
                ("GET", "/v1/me/events"),
                ("PATCH", "/v1/me"),
                ("POST", "/v1/invitations/accept"),
                ("POST", "/v1/members"),
            ):
                refused = await http.request(method, path, json=bodies.get(path))
                assert (refused.status_code, refused.json()["code"]) == (403, "forbidden"), path
            whole = await people.all(Token, Token.label == "whole")
            assert (await http.delete(f"/v1/me/tokens/{whole[0].id}")).status_code == 404
        async with client(await people.session(user)) as http:
            assert (await http.post("/v1/me/tokens", json={**body, "member": foreign})).status_code == 403
            shown = (await http.get("/v1/me")).json()
            assert (len(shown["memberships"]), shown["email"]) == (2, user.email)

    async def test_there_are_fifty_at_most_even_when_many_are_made_at_once(self, client, people):
        user = await people.make()
        for _ in range(48):
            await api_token(people, user)
        body = {"label": "x", "scopes": ["read"]}
        async with client(await people.session(user)) as http:
            answers = await asyncio.gather(*(http.post("/v1/me/tokens", json=body) for _ in range(6)))
        assert sorted(answer.status_code for answer in answers) == [201, 201, 409, 409, 409, 409]
        assert {answer.json()["code"] for answer in answers if answer.is_error} == {"limit-reached"}


@pytest.fixture
async def ann(people, registry):
    """Somebody of whom there is something in every table."""
    user = await people.make(name="Ann Other")
    member = await registry.member("Club")
    await join(people, user, member)
    async with people.database.transaction(f"user {user.id}") as session:
        host = await session.scalar(select(User.id).where(User.email.is_(None)).limit(1))
        session.add(Identity(user_id=user.id, issuer="https://i.example", subject="s-ann", created_at=now()))
        session.add(Acceptance(user_id=user.id, document="ca", version="1", at=now()))
        session.add(
            Invitation(email=ANN, invited_by=host, created_at=now(), expires_at=now() + timedelta(days=1))
        )
        await sign_in.request_link(session, registry.settings, ANN, now())
        await announce(session, NoticeKind.ADMITTED, member_id=member, now=now(), server="alice")
        await sign_in.begin_detour(session, people.key, "https://i.example", now())
    await api_token(people, user, label="cron")
    return user


async def test_the_export_has_all_that_is_kept_and_no_secret(client, people, ann):
    token = await people.session(ann)
    async with client(token) as http:
        answer = await http.get("/v1/me/export")
    assert answer.status_code == 200
    document = answer.json()
    assert document["account"]["email"] == ANN
    assert [row["member"] for row in document["memberships"]] == ["Club"]
    assert [(row["document"], row["version"]) for row in document["acceptances"]] == [("ca", "1")]
    assert [row["subject"] for row in document["identities"]] == ["s-ann"]
    assert {row["label"] for row in document["tokens"]} == {"cron", ""}
    assert [row["email"] for row in document["sign_ins"]] == [ANN]
    assert [row["email"] for row in document["invitations"]] == [ANN]
    assert {row["kind"] for row in document["deliveries"]} == {"sign-in", "admitted"}
    assert {"acceptance-created", "identity-created"} <= {row["kind"] for row in document["events"]}
    assert document["events_in_all"] == len(document["events"])
    text = json.dumps(document)
    assert "sha256" not in text
    for row in await people.all(Token):
        assert row.sha256 not in text


async def test_a_person_without_address_exports_nobody_elses(client, people, ann):
    nobody = await people.make(None)
    async with client(await people.session(nobody)) as http:
        document = (await http.get("/v1/me/export")).json()
    assert document["invitations"] == document["sign_ins"] == document["deliveries"] == []
    assert ANN not in json.dumps(document)


async def test_an_erased_account_leaves_ids_only(client, people, ann, registry):
    _, program = await api_token(people, ann)
    token = await people.session(ann)
    other = await people.session(await people.make(BEN, name="Ben"))
    async with client(token) as http:
        assert (await http.delete("/v1/me")).status_code == 204
    for secret, status in ((token, 401), (program, 401), (other, 200)):
        async with client(secret) as http:
            assert (await http.get("/v1/me")).status_code == status
    async with people.database.transaction() as session:
        found = [await session.execute(select(table)) for table in Base.metadata.sorted_tables]
        dump = "\n".join(repr(row) for result in found for row in result.all())
    for trace in (ANN, "Ann Other", "s-ann"):
        assert trace not in dump
    assert BEN in dump
    (row,) = await people.all(User, User.id == ann.id)
    assert row.erased_at is not None
    assert len(await people.all(Acceptance)) == 1
    # A detour of somebody else goes on; what was to be mailed to Ann is not.
    assert [row.issuer for row in await people.all(SignIn)] == ["https://i.example"]
    to_ann = await people.all(Delivery, Delivery.user_id == ann.id)
    assert {row.status for row in to_ann} == {DeliveryStatus.SUPPRESSED}
    assert {row.error for row in to_ann} == {"the account was erased"}
    assert [row.status for row in await people.all(Member)] == [MemberStatus.ACTIVE]
    events = await people.all(Event, Event.user_id == ann.id, Event.kind == "user-changed")
    assert events[-1].after["email"] is None
    # The address is free again.
    await people.make(ANN)


async def test_the_last_owner_stays_while_there_are_servers(client, people, registry):
    user = await people.make()
    async with people.database.transaction() as session:
        owner = await session.get_one(User, user.id)
        member = (await members.create(session, "Ann's clocks", now(), owner=owner)).id
    server = await registry.server("alice", state=ServerState.LEAVING, member=member)
    technician = await people.make(BEN)
    await join(people, technician, member, MemberRole.TECHNICIAN)
    async with client(await people.session(user)) as http:
        refused = await http.delete("/v1/me")
        assert (refused.status_code, refused.json()["code"]) == (409, "last-owner")
        assert "Ann's clocks" in refused.json()["detail"]
        assert refused.json()["remedy"]
        assert (await http.get("/v1/me")).json()["email"] == ANN
        async with registry.change(server) as (_, row):
            row.state = ServerState.REMOVED
        assert (await http.delete("/v1/me")).status_code == 204
    (row,) = await people.all(Member)
    assert (row.status, row.name) == (MemberStatus.CLOSED, f"closed {row.opaque_id}")
    told = [mail.to for mail in await people.mails() if mail.kind == NoticeKind.USER_LEFT]
    assert told == [user.id, technician.id]


async def test_the_pool_keeps_an_operator(client, people):
    user = await people.make(staff=StaffRole.OPERATOR)
    token = await people.session(user)
    async with client(token) as http:
        refused = await http.delete("/v1/me")
        assert (refused.status_code, refused.json()["code"]) == (409, "last-owner")
        await people.make(BEN, staff=StaffRole.OPERATOR)
        assert (await http.delete("/v1/me")).status_code == 204
    assert [row.staff for row in await people.all(User)] == [None, StaffRole.OPERATOR]


async def test_of_the_last_two_owners_who_go_at_once_one_stays(client, people, registry):
    member = await registry.member("Club")
    await registry.server("alice", "198.18.0.1", member=member)
    pair = [await people.make(), await people.make(BEN)]
    async with people.database.transaction() as session:
        for row in await session.scalars(select(Membership)):
            await session.delete(row)
    for user in pair:
        await join(people, user, member)

    async def go(user):
        async with client(await people.session(user)) as http:
            return (await http.delete("/v1/me")).status_code

    assert sorted(await asyncio.gather(*map(go, pair))) == [204, 409]
    assert len(await people.all(Membership)) == 1
