"""The audit log: nothing changes without an event, and no event says more than it should or is ever altered."""

from base64 import b64encode

import pytest
from sqlalchemy import delete, inspect, select, text, update
from sqlalchemy.exc import DBAPIError

from nts_core.control import ServerState
from poolsvc import auth, members
from poolsvc.db import act_as
from poolsvc.models import Address, Event, Member, Server, TokenKind, User, audit

EMAIL, NAME = "alice@example.org", "Alice Liddell"


async def log(registry, subject):
    async with registry.database.transaction() as session:
        found = select(Event).where(Event.subject == subject).order_by(Event.id)
        return list(await session.scalars(found))


async def test_a_change_is_noted_with_who_before_and_after(registry):
    server = await registry.server("alice", state=ServerState.ACTIVE)
    async with registry.database.transaction() as session:
        act_as(session, "user 7")
        row = await session.get_one(Server, server)
        row.weight, row.public = 5, True
    last = (await log(registry, f"server {server}"))[-1]
    assert (last.kind, last.actor, last.server_id) == ("server-changed", "user 7", server)
    assert (last.before, last.after) == ({"public": False, "weight": 1}, {"public": True, "weight": 5})


async def test_what_is_made_and_what_is_deleted_is_noted_whole(registry):
    server = await registry.server("alice", "198.18.0.1", "198.18.0.2")
    async with registry.database.transaction("user 7") as session:
        row = await session.scalar(select(Address).where(Address.address == "198.18.0.2"))
        identifier = row.id
        await session.delete(row)
    made, gone = await log(registry, f"address {identifier}")
    assert (made.kind, made.after, made.before) == ("address-created", {"address": "198.18.0.2"}, None)
    assert (gone.kind, gone.actor, gone.after) == ("address-deleted", "user 7", None)
    assert gone.before == {"address": "198.18.0.2", "proved_at": None}
    assert made.server_id == gone.server_id == server


async def test_a_change_that_is_rolled_back_or_changes_nothing_is_not_noted(registry):
    server = await registry.server("alice")
    before = await log(registry, f"server {server}")

    async def interrupted():
        async with registry.database.transaction() as session:
            (await session.get_one(Server, server)).weight = 9
            await session.flush()
            raise InterruptedError

    with pytest.raises(InterruptedError):
        await interrupted()
    async with registry.database.transaction() as session:
        (await session.get_one(Server, server)).weight = 1
    assert [entry.id for entry in await log(registry, f"server {server}")] == [entry.id for entry in before]


async def test_the_log_holds_ids_and_no_names_addresses_or_secrets(registry):
    async with registry.database.transaction("console") as session:
        user = await members.create_user(session, registry.now, email=EMAIL, name=NAME)
        _, secret = await auth.issue(session, TokenKind.API, now=registry.now, user_id=user.id)
        await members.create(session, NAME, registry.now, owner=user)
    async with registry.database.transaction("console") as session:
        row = await session.get_one(User, user.id)
        row.email, row.name = "other@example.org", "Other"
        (await session.scalar(select(Member))).name = "Another"
    async with registry.database.transaction() as session:
        events = list(await session.scalars(select(Event)))
    texts = "\n".join(str([entry.before, entry.after, entry.reason, entry.actor]) for entry in events)
    for word in (EMAIL, NAME, "other@", "Another", secret, secret[-20:], auth.hash_secret(secret)):
        assert word not in texts
    (changed,) = [entry for entry in events if entry.kind == "user-changed"]
    assert changed.before == changed.after == {"email": "(not kept)", "name": "(not kept)"}
    assert changed.user_id == user.id


def test_every_column_that_is_noted_exists():
    for model, rule in audit._AUDITED.items():
        columns = {column.key for column in inspect(model).column_attrs}
        assert rule.shown | rule.hidden <= columns, model.__name__


async def test_that_an_agent_has_joined_with_a_token_is_noted(registry, client):
    server = await registry.server("alice", state=ServerState.REGISTERED)
    async with registry.database.transaction() as session:
        token, secret = await auth.issue(session, TokenKind.JOIN, now=registry.now, server_id=server)
    async with client(secret) as http:
        answer = await http.post("/v1/agent/join", json={"public_key": b64encode(bytes(range(32))).decode()})
    assert answer.status_code == 200
    _, used = await log(registry, f"token {token.id}")
    assert (used.kind, used.actor, used.server_id) == ("token-changed", f"join {server}", server)
    assert (used.before, list(used.after)) == ({"used_at": None}, ["used_at"])


@pytest.mark.parametrize(
    "statement",
    [
        update(Event).values(actor="nobody"),
        delete(Event),
        text("DELETE FROM audit_events WHERE id = 1"),
        text("UPDATE audit_events SET reason = 'x' WHERE id = 1"),
    ],
)
async def test_the_database_refuses_to_alter_the_log(registry, statement):
    await registry.server("alice")
    with pytest.raises(DBAPIError, match="append-only"):
        async with registry.database.transaction() as session:
            await session.execute(statement)
