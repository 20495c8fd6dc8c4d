"""What a member takes along: all that is kept about it, nothing of others, and no secret."""

import json

import pytest
from sqlalchemy import select

from nts_core.control import ServerState
from poolsvc import maintenance, notices, servers, teams, transfers
from poolsvc.models import Address, Member, MemberRole, Order, OrderStatus, StaffRole, Webhook
from poolsvc.notices import NoticeKind

SECRETS = ("s3cret-nonce", "s3cret-token", "s3cret-authorization")


@pytest.fixture
async def club(registry):
    """A member of which there is something in every list."""
    registry.club, other = await registry.member("Club"), await registry.member("Other")
    registry.owner = await registry.person(registry.club, email="owner@example.org", name="Own Er")
    alice = await registry.server("alice", state=ServerState.ACTIVE, member=registry.club)
    await registry.server("foreign", "198.18.0.9", member=other)
    operator = await registry.person(staff=StaffRole.OPERATOR)
    async with registry.database.transaction(f"user {operator.id}") as session:
        server = await servers.get(session, alice)
        server.weight = 7
        address = await session.scalar(select(Address).where(Address.server_id == alice))
        address.nonce = SECRETS[0]
        session.add(
            Order(
                server_id=alice,
                status=OrderStatus.ISSUED,
                created_at=registry.now,
                token=SECRETS[1],
                key_authorization=SECRETS[2],
                serial="0abc",
            )
        )
        session.add(Webhook(member_id=registry.club, url="https://example.org/", created_at=registry.now))
        await notices.announce(session, NoticeKind.ADMITTED, member_id=registry.club, now=registry.now)
        to = (await session.get_one(Member, other)).opaque_id
        await transfers.offer(session, registry.settings, alice, to, registry.now)
        await teams.invite(
            session,
            registry.settings,
            "new@example.org",
            registry.now,
            by=registry.owner.id,
            member_id=registry.club,
        )
        await maintenance.add(
            session,
            server,
            starts_at=None,
            ends_at=registry.now.replace(hour=18),
            reason="new disk",
            actor="test",
            now=registry.now,
        )
    registry.operator = operator
    return registry


async def test_the_export_has_all_that_is_kept_and_no_secret(club, call):
    answer = await call(club.owner.token, "GET", f"/v1/members/{club.club}/export")
    assert answer.status_code == 200, answer.text
    document = answer.json()
    assert document["member"]["name"] == "Club"
    assert club.owner.id in {row["user_id"] for row in document["people"]}
    assert [(row["name"], row["weight"]) for row in document["servers"]] == [("alice", 7)]
    assert [row["address"] for row in document["addresses"]] == ["198.18.0.1"]
    assert [row["serial"] for row in document["certificates"]] == ["0abc"]
    assert [row["reason"] for row in document["maintenance"]] == ["new disk"]
    assert [row["kind"] for row in document["holds"]] == ["maintenance"]
    assert [row["email"] for row in document["invitations"]] == ["new@example.org"]
    assert [row["server"] for row in document["transfers"]] == ["alice"]
    assert [row["url"] for row in document["webhooks"]] == ["https://example.org/"]
    assert "admitted" in {row["kind"] for row in document["notices"]}
    assert {"server-changed", "webhook-created"} & {row["kind"] for row in document["events"]}
    for hidden in (*SECRETS, "foreign", "198.18.0.9", "Other", "owner@example.org", "Own Er", '"sha256"'):
        assert hidden not in json.dumps(document), hidden


async def test_which_of_the_staff_it_was_is_for_the_staff(club, call):
    path = f"/v1/members/{club.club}/export"
    for token, shown in ((club.owner.token, "operator"), (club.operator.token, f"user {club.operator.id}")):
        document = (await call(token, "GET", path)).json()
        assert shown in {row["actor"] for row in document["events"]}


async def test_technicians_and_support_take_nothing_along(club, call, registry):
    technician = await registry.person(club.club, MemberRole.TECHNICIAN)
    support = await registry.person(staff=StaffRole.SUPPORT)
    for person in (technician, support):
        answer = await call(person.token, "GET", f"/v1/members/{club.club}/export")
        assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
    answer = await call(club.operator.token, "GET", "/v1/members/999999/export")
    assert answer.status_code == 404
