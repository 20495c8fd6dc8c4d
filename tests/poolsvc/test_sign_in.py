"""Signing up and in by links in mails: what the answers tell, and what a link is good for."""

import asyncio
import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import func, select, update

from poolsvc import auth, members, sign_in
from poolsvc.app import create_app
from poolsvc.config import SignUp, TermsSettings, load_settings
from poolsvc.derived import Purpose, RegistryKey
from poolsvc.errors import SignInInvalid, Unauthenticated
from poolsvc.models import (
    Acceptance,
    Delivery,
    DeliveryStatus,
    Invitation,
    Member,
    MemberRole,
    Membership,
    MemberStatus,
    Notice,
    SignIn,
    StaffRole,
    Token,
    TokenKind,
    User,
)
from poolsvc.notices import Letter, NoticeKind

MANUAL = Path(__file__).parents[2] / "docs/members.md"
KEY = RegistryKey(bytes(32))
TERMS = (
    TermsSettings(document="ca", version="1.4", title="Subscriber agreement", url="https://ca.example/sa"),
    TermsSettings(document="public", version="1", title="Certificates are public", url="https://x.example/"),
)
ACCEPT = [{"document": "ca", "version": "1.4"}, {"document": "public", "version": "1"}]
ANN = "ann@example.org"
WISH = {"email": ANN, "name": "Ann", "member": {"name": "Ann's clocks"}, "accept": ACCEPT}


def now():
    return datetime.now(UTC)


@pytest.fixture
def mode():
    return SignUp.OPEN


@pytest.fixture
def settings(settings, mode):
    return settings.model_copy(update={"sign_up": mode, "terms": TERMS})


by_mode = pytest.mark.parametrize("mode", SignUp)
open_or_approved = pytest.mark.parametrize("mode", [SignUp.OPEN, SignUp.APPROVAL])


def shape(answer):
    """All of an answer but what is another one each time."""
    headers = {name: value for name, value in answer.headers.items() if name not in {"date", "x-request-id"}}
    return answer.status_code, headers, answer.content


@by_mode
async def test_asking_for_a_link_is_answered_alike_for_every_address(client, people, mode):
    await people.make()
    await people.make("blocked@example.org")
    async with people.database.transaction() as session:
        await session.execute(
            update(User).where(User.email == "blocked@example.org").values(blocked_at=now())
        )
    async with client() as http:
        answers = [
            await http.post("/v1/sign-in", json={"email": email})
            for email in (ANN, ANN.upper(), "nobody@example.org", "blocked@example.org")
        ]
        many = [await http.post("/v1/sign-in", json={"email": ANN}) for _ in range(8)]
    assert answers[0].status_code == 202
    assert len({str(shape(answer)) for answer in (*answers, *many)}) == 1
    # A row for each, whether or not there is anybody to mail to.
    rows = [row.email for row in await people.all(SignIn)]
    assert rows[:4] == [ANN, ANN, "nobody@example.org", "blocked@example.org"]
    assert rows.count(ANN) == sign_in.LINKS_PER_ADDRESS
    nobody = [mail.letter for mail in await people.mails() if mail.to == "nobody@example.org"]
    assert nobody == ([] if mode is SignUp.INVITATION else [Letter.NO_ACCOUNT])


@open_or_approved
async def test_signing_up_is_answered_alike_for_every_address_and_a_known_one_is_told(client, people):
    user = await people.make()
    async with client() as http:
        known = await http.post("/v1/sign-up", json=WISH)
        unknown = await http.post("/v1/sign-up", json={**WISH, "email": "new@example.org"})
    assert known.status_code == 202
    assert shape(known) == shape(unknown)
    assert [(mail.letter, mail.to) for mail in await people.mails()] == [
        (Letter.HAS_ACCOUNT, user.id),
        (Letter.SIGN_UP, "new@example.org"),
    ]
    assert await people.count(User) == 1
    assert await people.count(Member) == 0


async def test_a_link_opens_a_session_once(client, people):
    user = await people.make(name="Ann")
    async with client() as http:
        await http.post("/v1/sign-in", json={"email": ANN})
        (mail,) = await people.mails()
        assert (mail.kind, mail.letter, mail.to) == (NoticeKind.SIGN_IN, Letter.SIGN_IN, user.id)
        first = await http.post("/v1/sign-in/confirm", json={"token": mail.token})
        again = await http.post("/v1/sign-in/confirm", json={"token": mail.token})
    assert first.status_code == 200
    assert first.json()["account"]["email"] == ANN
    ends = datetime.fromisoformat(first.json()["expires_at"])
    assert timedelta(days=13) < ends - now() <= sign_in.SESSION_LIFE
    assert (again.status_code, again.json()["code"]) == (401, "sign-in-invalid")
    async with client(first.json()["token"]) as http:
        assert (await http.get("/v1/me")).json()["id"] == user.id
    (found,) = await people.all(User)
    assert found.confirmed_at is not None


async def test_a_link_asked_for_again_leaves_the_one_before_good(client, people):
    """Otherwise a stranger who asks for links locks the owner of the address out."""
    await people.make()
    async with client() as http:
        for _ in range(2):
            await http.post("/v1/sign-in", json={"email": ANN})
        first, _ = await people.mails()
        answer = await http.post("/v1/sign-in/confirm", json={"token": first.token})
    assert answer.status_code == 200


async def test_of_many_who_open_a_link_at_once_one_gets_a_session(client, people):
    await people.make()
    async with client() as http:
        await http.post("/v1/sign-in", json={"email": ANN})
        (mail,) = await people.mails()
        answers = await asyncio.gather(
            *(http.post("/v1/sign-in/confirm", json={"token": mail.token}) for _ in range(8))
        )
    assert sorted(answer.status_code for answer in answers) == [200] + 7 * [401]
    assert len(await people.all(Token, Token.kind == TokenKind.SESSION)) == 1


async def test_of_many_who_open_the_link_of_a_new_account_one_makes_it(client, people):
    async with client() as http:
        for number in range(4):
            await http.post("/v1/sign-up", json={**WISH, "member": {"name": f"Member {number}"}})
        links = [mail.token for mail in await people.mails()]
        answers = await asyncio.gather(
            *(http.post("/v1/sign-in/confirm", json={"token": link}) for link in links)
        )
    # Whoever comes later is let in to the account, or told to look again.
    assert {answer.status_code for answer in answers} <= {200, 409}
    assert [answer.status_code for answer in answers].count(200) >= 1
    assert (await people.count(User), await people.count(Member)) == (1, 1)


@pytest.mark.parametrize("case", ["expired", "other key", "unknown", "forged", "for an unknown address"])
async def test_links_that_prove_nothing_are_refused_alike(client, people, case):
    await people.make()
    async with client() as http:
        email = "nobody@example.org" if case == "for an unknown address" else ANN
        await http.post("/v1/sign-in", json={"email": email})
        (mail,) = await people.mails()
        token = mail.token
        if case == "expired":
            await people.age(SignIn, sign_in.LIFE)
        elif case == "other key":
            token = RegistryKey(b"\x01" * 32).token(Purpose.SIGN_IN, 1)
        elif case == "unknown":
            token = KEY.token(Purpose.SIGN_IN, 10**9)
        elif case == "forged":
            token = token[:-2] + ("AA" if token[-2:] != "AA" else "BB")
        answer = await http.post("/v1/sign-in/confirm", json={"token": token})
    assert (answer.status_code, answer.json()["code"]) == (401, "sign-in-invalid")
    assert answer.json()["detail"] == "the link is not valid, was used, or is too old"
    assert answer.json()["remedy"]


async def test_a_link_sent_to_an_address_that_the_account_has_no_more_is_worth_nothing(client, people):
    user = await people.make()
    async with client() as http:
        await http.post("/v1/sign-in", json={"email": ANN})
        (mail,) = await people.mails()
        async with people.database.transaction() as session:
            (await session.get_one(User, user.id)).email = "other@example.org"
        answer = await http.post("/v1/sign-in/confirm", json={"token": mail.token})
    assert answer.status_code == 401


async def test_a_blocked_person_does_not_get_in(client, people):
    user = await people.make()
    async with client() as http:
        await http.post("/v1/sign-in", json={"email": ANN})
        async with people.database.transaction() as session:
            (await session.get_one(User, user.id)).blocked_at = now()
        (mail,) = await people.mails()
        answer = await http.post("/v1/sign-in/confirm", json={"token": mail.token})
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")
    assert await people.count(Token) == 0


# httpx refuses to send what no text is.
JSON = {"Content-Type": "application/json"}
HOSTILE = [
    "",
    "x",
    "@",
    "a@b@c.example",
    "a" * 300 + "@example.org",
    "nul\x00@example.org",
    "line\n@example.org",
    "a@\u202eexample.org",
    "\ud800@example.org",
    None,
    7,
    ["a@example.org"],
    {"email": "a@example.org"},
    True,
]


@pytest.mark.parametrize("email", HOSTILE)
async def test_what_is_no_address_is_refused_and_leaves_nothing(client, people, email):
    async with client() as http:
        for path, body in (("/v1/sign-in", {}), ("/v1/sign-up", WISH)):
            answer = await http.post(path, content=json.dumps({**body, "email": email}), headers=JSON)
            assert answer.status_code == 422, answer.text
            assert answer.json()["field"] in {"email", None}
    assert await people.count(SignIn) == 0


@pytest.mark.parametrize(
    "token", ["", "1", "1.", ".", "-1.x", "\x00", "1.\ud800", "9" * 400, None, 7, ["1.x"], {}]
)
async def test_what_is_no_token_is_refused(client, token):
    async with client() as http:
        answer = await http.post("/v1/sign-in/confirm", content=json.dumps({"token": token}), headers=JSON)
    assert answer.status_code in {401, 422}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"name": "me@example.org"}, "name"),
        ({"name": "nul\x00"}, "name"),
        ({"name": "x" * 150}, "name"),
        ({"member": {"name": " "}}, "member.name"),
        ({"member": {"name": "a\x00b"}}, "member.name"),
        ({"member": None}, "member"),
        ({"accept": [*ACCEPT, {"document": "\x00", "version": "1"}]}, "accept.2.document"),
        ({"accept": [*ACCEPT, {"document": "other", "version": "1"}]}, "accept"),
        ({"accept": 17 * ACCEPT[:1]}, "accept"),
        ({"accept": []}, "accept"),
        ({"accept": ACCEPT[:1]}, "accept"),
        ({"accept": [{"document": "ca", "version": "1.3"}, ACCEPT[1]]}, "accept"),
    ],
)
async def test_a_wish_that_could_not_come_true_is_refused_at_once(client, people, change, field):
    await people.make()
    async with client() as http:
        known = await http.post("/v1/sign-up", json={**WISH, **change})
        unknown = await http.post("/v1/sign-up", json={**WISH, **change, "email": "new@example.org"})
    assert (known.status_code, known.json()["field"]) == (422, field), known.text
    assert shape(known) == shape(unknown)
    if field == "accept" and len(change["accept"]) < 3:
        assert "ca 1.4, public 1" in known.json()["remedy"]
    assert await people.count(SignIn) == 0


@open_or_approved
async def test_an_account_comes_into_being_with_its_link(client, people, mode):
    async with client() as http:
        shown = (await http.get("/v1/sign-up")).json()
        assert (shown["sign_up"], [entry["document"] for entry in shown["terms"]]) == (mode, ["ca", "public"])
        await http.post("/v1/sign-up", json=WISH)
        assert (await people.count(User), await people.count(Member)) == (0, 0)
        (mail,) = await people.mails()
        answer = await http.post("/v1/sign-in/confirm", json={"token": mail.token})
    account = answer.json()["account"]
    assert (account["email"], account["name"]) == (ANN, "Ann")
    assert all(entry["accepted_at"] for entry in account["terms"])
    (member,) = await people.all(Member)
    assert account["memberships"] == [{"member": member.id, "role": "owner"}]
    waits = mode is SignUp.APPROVAL
    assert member.status is (MemberStatus.PENDING if waits else MemberStatus.ACTIVE)
    async with client(answer.json()["token"]) as http:
        registered = await http.post("/v1/servers", json={"name": "alice", "addresses": ["198.18.0.1"]})
    assert registered.status_code == (403 if waits else 201)


async def test_a_member_name_that_was_taken_meanwhile_makes_no_half_account(client, people):
    async with client() as http:
        for email in (ANN, "ben@example.org"):
            await http.post("/v1/sign-up", json={**WISH, "email": email})
        first, second = await people.mails()
        await http.post("/v1/sign-in/confirm", json={"token": first.token})
        answer = await http.post("/v1/sign-in/confirm", json={"token": second.token})
        taken = await http.post("/v1/sign-up", json={**WISH, "email": "cat@example.org"})
    assert (answer.status_code, answer.json()["code"]) == (409, "name-taken")
    assert (taken.status_code, taken.json()["field"]) == (409, "member.name")
    assert (await people.count(User), await people.count(Member)) == (1, 1)


class TestInvitations:
    @pytest.fixture
    def mode(self):
        return SignUp.INVITATION

    @pytest.fixture
    async def invite(self, people):
        async def invite(member=None, role=None, life=timedelta(days=1)):
            host = await people.make(None)
            async with people.database.transaction() as session:
                row = Invitation(
                    email="guest@example.org",
                    invited_by=host.id,
                    member_id=member,
                    role=role,
                    created_at=now(),
                    expires_at=now() + life,
                )
                session.add(row)
                await session.flush()
                return row.id

        return invite

    async def test_without_one_nobody_signs_up(self, client, people):
        async with client() as http:
            answer = await http.post("/v1/sign-up", json=WISH)
        assert (answer.status_code, answer.json()["code"]) == (403, "invitation-needed")
        assert await people.count(SignIn) == 0

    async def test_one_to_the_pool_makes_an_active_member_once(self, client, people, invite):
        token = KEY.token(Purpose.INVITATION, await invite())
        async with client() as http:
            for number in range(2):
                wish = {
                    **WISH,
                    "invitation": token,
                    "email": f"{number}@example.org",
                    "member": {"name": f"No. {number}"},
                }
                assert (await http.post("/v1/sign-up", json=wish)).status_code == 202
            first, second = await people.mails()
            made = await http.post("/v1/sign-in/confirm", json={"token": first.token})
            refused = await http.post("/v1/sign-in/confirm", json={"token": second.token})
        assert made.status_code == 200
        assert (refused.status_code, refused.json()["code"]) == (403, "invitation-needed")
        (member,) = await people.all(Member)
        assert member.status is MemberStatus.ACTIVE
        (invitation,) = await people.all(Invitation)
        assert invitation.accepted_at is not None
        assert invitation.email is None

    async def test_one_to_a_member_joins_it_and_its_people_are_told(self, client, people, invite, registry):
        member = await registry.member("Club")
        token = KEY.token(Purpose.INVITATION, await invite(member, MemberRole.TECHNICIAN))
        wish = {**WISH, "invitation": token}
        async with client() as http:
            assert (await http.post("/v1/sign-up", json=wish)).json()["field"] == "member"
            assert (await http.post("/v1/sign-up", json={**wish, "member": None})).status_code == 202
            link = (await people.mails())[0].token
            answer = await http.post("/v1/sign-in/confirm", json={"token": link})
        assert answer.json()["account"]["memberships"] == [{"member": member, "role": "technician"}]
        assert [mail.kind for mail in await people.mails()].count(NoticeKind.USER_JOINED) == 2
        assert await people.count(Member) == 1

    @pytest.mark.parametrize("case", ["expired", "forged", "revoked", "other purpose"])
    async def test_one_that_is_over_is_none(self, client, people, invite, case):
        life = timedelta(days=-1) if case == "expired" else timedelta(days=1)
        identifier = await invite(life=life)
        token = KEY.token(Purpose.INVITATION, identifier)
        if case == "forged":
            token = RegistryKey(b"\x01" * 32).token(Purpose.INVITATION, identifier)
        elif case == "other purpose":
            token = KEY.token(Purpose.SIGN_IN, identifier)
        elif case == "revoked":
            async with people.database.transaction() as session:
                (await session.get_one(Invitation, identifier)).revoked_at = now()
        async with client() as http:
            answer = await http.post("/v1/sign-up", json={**WISH, "invitation": token})
        assert (answer.status_code, answer.json()["code"]) == (403, "invitation-needed")


async def test_strangers_use_up_the_mails_to_strangers_only(tuned, registry, database, people):
    settings = tuned(links_per_hour=3).model_copy(update={"sign_up": SignUp.OPEN, "terms": ()})
    await people.make()
    async with database.transaction() as session:
        for number in range(9):
            await sign_in.request_link(session, settings, f"{number}@example.org", now())
        await sign_in.request_link(session, settings, ANN, now())
    rows = [row.email for row in await people.all(SignIn)]
    assert rows == ["0@example.org", "1@example.org", "2@example.org", ANN]


async def test_the_limits_end_with_their_hour_and_addresses_are_forgotten(database, settings, people):
    start = now()
    async with database.transaction() as session:
        for _ in range(9):
            await sign_in.request_link(session, settings, ANN, start)
        await sign_in.expire(session, start + timedelta(minutes=59))
        assert len(list(await session.scalars(select(SignIn)))) == sign_in.LINKS_PER_ADDRESS
        await sign_in.request_link(session, settings, ANN, start + timedelta(minutes=61))
        await sign_in.expire(session, start + timedelta(minutes=62))
        assert len(list(await session.scalars(select(SignIn)))) == 1


async def test_sessions_end_after_two_weeks_and_are_forgotten_later(database, people):
    user = await people.make()
    start = now()
    async with database.transaction() as session:
        token = await sign_in.open_session(session, user, start)
        end = start + sign_in.SESSION_LIFE
        await auth.authenticate(session, token, end - timedelta(seconds=1))
        await sign_in.expire(session, end + timedelta(days=29))
        with pytest.raises(Unauthenticated, match="expired"):
            await auth.authenticate(session, token, end)
        await sign_in.expire(session, end + timedelta(days=31))
        with pytest.raises(Unauthenticated, match="not valid"):
            await auth.authenticate(session, token, end)


async def test_the_oldest_session_makes_room(database, people):
    user = await people.make()
    start = now()
    async with database.transaction() as session:
        tokens = [await sign_in.open_session(session, user, start) for _ in range(sign_in.MAX_SESSIONS + 1)]
        with pytest.raises(Unauthenticated, match="revoked"):
            await auth.authenticate(session, tokens[0], start)
        for token in tokens[1:]:
            await auth.authenticate(session, token, start)


class TestAddress:
    """Another mail address for an account."""

    async def change(self, client, token, email):
        async with client(token) as http:
            return await http.patch("/v1/me", json={"email": email})

    async def test_it_is_taken_by_the_link_and_the_old_one_is_told(self, client, people, registry):
        user = await people.make()
        colleague = await people.make("colleague@example.org")
        async with people.database.transaction() as session:
            member = await members.create(session, "Club", now(), owner=await session.get_one(User, user.id))
            session.add(
                Membership(member_id=member.id, user_id=colleague.id, role=MemberRole.OWNER, created_at=now())
            )
        token = await people.session(user)
        answer = await self.change(client, token, "New@Example.org")
        assert (answer.status_code, answer.json()["email"]) == (202, ANN)
        (mail,) = await people.mails()
        assert (mail.letter, mail.to) == (Letter.NEW_ADDRESS, "new@example.org")
        async with client(token) as http:
            done = await http.post("/v1/me/email", json={"token": mail.token})
            again = await http.post("/v1/me/email", json={"token": mail.token})
        assert done.json()["email"] == "new@example.org"
        assert again.status_code == 401
        told = [(mail.to, mail.what) for mail in (await people.mails())[1:]]
        assert told == [(ANN, "address"), (user.id, "address"), (colleague.id, "address")]

    async def test_whoever_is_signed_in_is_told_that_no_more_mails_go_to_an_address(self, client, people):
        token = await people.session(await people.make())
        for _ in range(sign_in.LINKS_PER_ADDRESS):
            assert (await self.change(client, token, "new@example.org")).status_code == 202
        refused = await self.change(client, token, "new@example.org")
        assert (refused.status_code, refused.json()["field"]) == (429, "email")
        assert len(await people.mails()) == sign_in.LINKS_PER_ADDRESS

    async def test_its_link_signs_nobody_in(self, client, people):
        """A mistyped address is somebody else's, who must not get the account."""
        user, other = await people.make(), await people.make("other@example.org")
        await self.change(client, await people.session(user), "typo@example.org")
        (mail,) = await people.mails()
        async with client() as http:
            assert (await http.post("/v1/sign-in/confirm", json={"token": mail.token})).status_code == 401
        async with client(await people.session(other)) as http:
            assert (await http.post("/v1/me/email", json={"token": mail.token})).status_code == 401
        assert [row.email for row in await people.all(User)] == [ANN, "other@example.org"]

    async def test_one_that_has_an_account_is_answered_alike_and_never_given(self, client, people):
        user, other = await people.make(), await people.make("other@example.org")
        token = await people.session(user)
        taken = await self.change(client, token, "other@example.org")
        free = await self.change(client, token, "free@example.org")
        assert shape(taken) == shape(free)
        first, second = await people.mails()
        assert (first.letter, first.to) == (Letter.HAS_ACCOUNT, other.id)
        async with client(token) as http:
            assert (await http.post("/v1/me/email", json={"token": first.token})).status_code == 401
            # Meanwhile somebody else gets an account with the free one.
            await people.make("free@example.org")
            assert (await http.post("/v1/me/email", json={"token": second.token})).status_code == 401

    async def test_a_programs_token_cannot_ask_for_one(self, client, people):
        user = await people.make()
        async with people.database.transaction() as session:
            _, token = await auth.issue(session, TokenKind.API, now=now(), user_id=user.id)
        answer = await self.change(client, token, "thief@example.org")
        assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
        assert await people.mails() == []


async def test_a_server_is_registered_by_who_accepted_the_current_terms(client, registry, settings, database):
    member = await registry.member()
    token = await registry.owner_token(member)
    body = {"name": "alice", "addresses": ["198.18.0.1"]}
    async with client(token) as http:
        refused = await http.post("/v1/servers", json=body)
        assert (refused.status_code, refused.json()["code"]) == (403, "terms-not-accepted")
        assert "Subscriber agreement (1.4)" in refused.json()["detail"]
        assert "POST /v1/me/terms" in refused.json()["remedy"]
        wrong = await http.post("/v1/me/terms", json={"accept": ACCEPT[:1]})
        assert (wrong.status_code, wrong.json()["field"]) == (422, "accept")
        accepted = await http.post("/v1/me/terms", json={"accept": ACCEPT})
        assert all(entry["accepted_at"] for entry in accepted.json())
        again = await http.post("/v1/me/terms", json={"accept": ACCEPT})
        assert again.json() == accepted.json()
        assert (await http.post("/v1/servers", json=body)).status_code == 201
    # A new version is accepted anew.
    newer = (TERMS[0].model_copy(update={"version": "2"}), TERMS[1])
    renewed = create_app(settings.model_copy(update={"terms": newer}), database, [], KEY)
    async with client(token, app=renewed) as http:
        state = (await http.get("/v1/me")).json()["terms"]
        assert [entry["accepted_at"] is None for entry in state] == [True, False]
        refused = await http.post("/v1/servers", json={"name": "bob", "addresses": ["198.18.0.2"]})
        assert refused.json()["code"] == "terms-not-accepted"
    async with database.transaction() as session:
        assert await session.scalar(select(func.count()).select_from(Acceptance)) == 2


@pytest.fixture
def first_terms(init, tmp_path):
    """The terms that `init` writes."""
    assert init(directory=tmp_path / "pool").exit_code == 0
    found = load_settings(tmp_path / "pool" / "poolsvc.toml").terms
    assert len(found) == 2
    return found


def documented(path):
    """The body of the example for a call in the members' manual."""
    (body,) = re.findall(rf"-d '([^']*)'\s+REGISTRY{path}\n", MANUAL.read_text())
    return json.loads(body)


async def test_the_manuals_examples_fit_a_pool_as_init_makes_it(
    first_terms, client, registry, settings, database, people
):
    settings = settings.model_copy(update={"sign_up": SignUp.APPROVAL, "terms": first_terms})
    app = create_app(settings, database, [], KEY)
    async with client(app=app) as http:
        answer = await http.post("/v1/sign-up", json=documented("/v1/sign-up"))
    assert answer.status_code == 202, answer.text
    assert await people.count(SignIn) == 1
    token = await registry.owner_token(await registry.member())
    async with client(token, app=app) as http:
        assert (await http.post("/v1/me/terms", json=documented("/v1/me/terms"))).status_code == 200


async def test_who_has_no_account_is_sent_where_no_token_is_asked_for(client, registry):
    async with client() as http:
        refused = await http.post("/v1/sign-up", json={**WISH, "accept": ACCEPT[:1]})
        assert "GET /v1/sign-up" in refused.json()["remedy"]
    async with client(await registry.owner_token(await registry.member())) as http:
        refused = await http.post("/v1/me/terms", json={"accept": ACCEPT[:1]})
        assert "GET /v1/me/terms" in refused.json()["remedy"]


async def test_the_token_of_a_new_members_owner_is_all_that_a_first_server_takes(
    first_terms, client, registry, settings, database
):
    """As documented, and there is nobody who could get a mail."""
    app = create_app(settings.model_copy(update={"terms": first_terms}), database, [], KEY)
    operator = await registry.person(staff=StaffRole.OPERATOR)
    async with client(operator.token, app=app) as http:
        token = (await http.post("/v1/members", json={"name": "Time Club"})).json()["token"]
    body = {"name": "alice", "addresses": ["198.18.0.1"]}
    async with client(token, app=app) as http:
        assert (await http.post("/v1/servers", json=body)).json()["code"] == "terms-not-accepted"
        asked = (await http.get("/v1/me/terms")).json()
        accept = [{"document": entry["document"], "version": entry["version"]} for entry in asked]
        accepted = await http.post("/v1/me/terms", json={"accept": accept})
        assert accepted.status_code == 200, accepted.text
        assert (await http.post("/v1/servers", json=body)).status_code == 201


async def test_an_operators_console_link_proves_no_address(database, settings, people):
    user = await people.make(staff=StaffRole.OPERATOR)
    async with database.transaction() as session:
        link = await sign_in.console_link(session, KEY, ANN, now())
    async with database.transaction() as session:
        found, _ = await sign_in.confirm(session, settings, KEY, link, now())
        assert (found.id, found.confirmed_at) == (user.id, None)
    async with database.transaction() as session:
        with pytest.raises(SignInInvalid):
            await sign_in.confirm(session, settings, KEY, link, now())


async def test_no_secret_of_a_link_is_in_the_database(client, people):
    await people.make()
    async with client() as http:
        await http.post("/v1/sign-in", json={"email": ANN})
    (mail,) = await people.mails()
    secret = mail.token.partition(".")[2]
    for model in (SignIn, Notice, Delivery):
        for row in await people.all(model):
            assert secret not in str(vars(row))
    assert [row.status for row in await people.all(Delivery)] == [DeliveryStatus.PENDING]


async def test_an_old_link_never_opens_a_later_attempt(database, settings, people):
    """Attempts are forgotten after an hour: a key that came again would make an old secret a new one's."""
    settings = settings.model_copy(update={"sign_up": SignUp.OPEN, "terms": ()})
    seen = set()
    for hour in range(40):
        start = now() + timedelta(hours=2 * hour)
        async with database.transaction() as session:
            await sign_in.request_link(session, settings, f"{hour}@example.org", start)
            (row,) = await session.scalars(select(SignIn))
            seen.add(row.id)
            await sign_in.expire(session, start + timedelta(hours=1, minutes=1))
            assert await session.scalar(select(SignIn)) is None
    assert len(seen) == 40
