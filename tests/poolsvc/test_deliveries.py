"""Deliveries: sent once each, retried, limited, joined, and every one with an end that says why."""

import asyncio
import re
import ssl
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import delete, func, select, update

from lab.certificates import Authority
from lab.processes import free_port
from lab.smtp import MailServer
from poolsvc import deliveries, members, teams
from poolsvc.config import MailSettings
from poolsvc.db import Database
from poolsvc.deliveries import MAIL_WAITS
from poolsvc.derived import Purpose, RegistryKey
from poolsvc.models import (
    Delivery,
    DeliveryStatus,
    Invitation,
    MemberRole,
    Membership,
    SentMail,
    SignIn,
    SignInKind,
    User,
)
from poolsvc.notices import NoticeKind, announce, write_to
from poolsvc.worker import Health, Worker

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
KEY = RegistryKey(bytes(32))
S = DeliveryStatus


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
async def mail_server(authority):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    pair = authority.issue("127.0.0.1")
    context.load_cert_chain(pair.cert, pair.key)
    async with MailServer(tls=context) as server:
        yield server


class People:
    """A member with an owner, and workers that send its mail."""

    def __init__(self, registry, authority):
        self.registry, self.database, self.authority = registry, registry.database, authority
        self.health = Health()

    async def start(self):
        async with self.database.transaction("test") as session:
            owner = await members.create_user(session, NOW, email="owner@example.org")
            self.member = (await members.create(session, "Member", NOW, owner=owner)).id
            self.owner = owner.id
        return self

    async def add(self, email, *, mail=True):
        async with self.database.transaction("test") as session:
            user = await members.create_user(session, NOW, email=email)
            role = MemberRole.TECHNICIAN
            session.add(
                Membership(member_id=self.member, user_id=user.id, role=role, created_at=NOW, mail=mail)
            )
            return user.id

    def worker(self, port=None, database=None, **options):
        settings = self.registry.settings
        if port is not None:
            mail = MailSettings(
                smtp=f"127.0.0.1:{port}",
                sender="pool@registry.example.net",
                ca_file=self.authority.root,
                **options,
            )
            settings = settings.model_copy(update={"mail": mail})
        return Worker(database or self.database, settings, [], self.health, KEY)

    async def tell(self, count=1, now=NOW, kind=NoticeKind.ADMITTED, **data):
        async with self.database.transaction("test") as session:
            for number in range(count):
                data["server"] = f"server{number}"
                await announce(session, kind, member_id=self.member, now=now, **data)

    async def write(self, kind, to, now=NOW, **data):
        async with self.database.transaction("test") as session:
            await write_to(session, kind, to, now, **data)

    async def deliveries(self):
        async with self.database.transaction() as session:
            return list(await session.scalars(select(Delivery).order_by(Delivery.id)))

    async def statuses(self):
        return [row.status for row in await self.deliveries()]

    async def change(self, statement):
        async with self.database.transaction("test") as session:
            await session.execute(statement)


@pytest.fixture
async def people(registry, authority):
    return await People(registry, authority).start()


async def test_a_notice_is_mailed_to_each_person_once(people, mail_server):
    await people.add("second@example.org")
    await people.add("third@example.org", mail=False)
    await people.tell()
    worker = people.worker(mail_server.port)
    await worker._mail(NOW)
    await worker._mail(NOW + HOUR)
    assert [received.recipients for received in mail_server.received] == [
        ["owner@example.org"],
        ["second@example.org"],
    ]
    sent, also, third = await people.deliveries()
    assert (sent.status, sent.attempts, sent.done_at, sent.due_at, sent.error) == (S.SENT, 1, NOW, None, None)
    assert also.status is S.SENT
    assert (third.status, third.error) == (S.SUPPRESSED, "mails are turned off for this member")


async def test_without_a_mail_server_every_delivery_says_so(people):
    await people.tell()
    await people.worker()._mail(NOW)
    (row,) = await people.deliveries()
    assert (row.status, row.error) == (S.SUPPRESSED, "no mail server is configured")


async def test_a_greylisted_mail_comes_again_with_the_same_message_id(people, mail_server):
    mail_server.to_messages.append("451 greylisted <somebody@example.org>, come again")
    await people.tell()
    worker = people.worker(mail_server.port)
    await worker._mail(NOW)
    (row,) = await people.deliveries()
    assert (row.status, row.attempts, row.due_at) == (S.PENDING, 1, NOW + MINUTE)
    assert "451 greylisted (address), come again" in row.error.replace("<(address)>", "(address)")
    assert people.health.mail == "the mail server answered 451"
    await worker._mail(NOW + MINUTE - timedelta(seconds=1))
    assert mail_server.received == []
    await worker._mail(NOW + MINUTE)
    assert await people.statuses() == [S.SENT]
    assert people.health.mail is None
    assert mail_server.received[0].message["Message-ID"] == f"<notice-{row.id}-1@registry.example.net>"


async def test_a_refused_mail_ends_at_once_with_the_servers_words_and_is_no_alarm(people, mail_server):
    mail_server.to_recipients.append("550 no such mailbox")
    await people.tell()
    await people.worker(mail_server.port)._mail(NOW)
    (row,) = await people.deliveries()
    assert (row.status, row.error, row.due_at) == (S.FAILED, "550 no such mailbox", None)
    assert people.health.mail is None


async def test_a_server_that_stays_away_is_tried_for_three_days_and_then_the_mail_has_failed(people):
    await people.tell()
    worker, now = people.worker(free_port()), NOW
    for wait in MAIL_WAITS:
        await worker._mail(now)
        (row,) = await people.deliveries()
        assert (row.status, row.due_at) == (S.PENDING, now + wait)
        now += wait
    assert 2 * DAY < now - NOW < 3 * DAY + HOUR
    await worker._mail(now)
    (row,) = await people.deliveries()
    assert (row.status, row.due_at, row.attempts) == (S.FAILED, None, len(MAIL_WAITS) + 1)
    assert "cannot be used" in row.error


async def test_more_than_three_at_once_are_one_mail_and_each_is_sent(people, mail_server):
    await people.tell(3)
    worker = people.worker(mail_server.port)
    await worker._mail(NOW)
    assert len(mail_server.received) == 3
    await people.tell(5)
    await worker._mail(NOW)
    assert len(mail_server.received) == 4
    message = mail_server.received[3].message
    assert message["Subject"] == "[pool.example] 5 notices"
    assert all(f"server{number} is admitted" in message.get_content() for number in range(5))
    assert len(message.get_all("X-Truechimer-Notice")) == 5
    assert set(await people.statuses()) == {S.SENT}


async def test_over_the_hourly_limit_mails_wait_and_come_as_one(people, mail_server):
    worker = people.worker(mail_server.port, mails_per_hour_and_recipient=3)
    await people.tell(3)
    await worker._mail(NOW)
    for minute in range(1, 6):
        await people.tell(now=NOW + minute * MINUTE)
        await worker._mail(NOW + minute * MINUTE)
    assert len(mail_server.received) == 3
    waiting = [row for row in await people.deliveries() if row.status is S.PENDING]
    assert [row.due_at for row in waiting] == [NOW + HOUR] * 5
    assert all("3 mails to one recipient within an hour" in row.error for row in waiting)
    assert all(row.attempts == 0 for row in waiting), "waiting is no attempt"
    await worker._mail(NOW + HOUR)
    assert len(mail_server.received) == 4
    assert set(await people.statuses()) == {S.SENT}


async def test_the_limit_of_one_recipient_holds_up_nobody_else(people, mail_server):
    worker = people.worker(mail_server.port, mails_per_hour_and_recipient=1)
    await people.tell(2)
    await people.add("second@example.org")
    await worker._mail(NOW)
    await people.tell(kind=NoticeKind.RECOVERED)
    await worker._mail(NOW)
    assert [received.recipients[0] for received in mail_server.received] == [
        "owner@example.org",
        "second@example.org",
    ]


async def test_the_limit_of_all_keeps_room_for_links(people, mail_server):
    worker = people.worker(mail_server.port, mails_per_minute=5)
    for number in range(5):
        await people.add(f"user{number}@example.org")
    await people.tell()
    await worker._mail(NOW)
    assert len(mail_server.received) == 4
    await sign_in(people)
    await worker._mail(NOW)
    assert len(mail_server.received) == 5
    assert "sign in" in mail_server.received[4].message["Subject"]
    assert [row.due_at for row in await people.deliveries() if row.status is S.PENDING] == [NOW + MINUTE] * 2
    await worker._mail(NOW + MINUTE)
    assert set(await people.statuses()) == {S.SENT}


async def test_what_the_limits_count_is_forgotten_after_an_hour_and_holds_no_address(people, mail_server):
    await people.tell()
    worker = people.worker(mail_server.port)
    await worker._mail(NOW)
    async with people.database.transaction() as session:
        (row,) = list(await session.scalars(select(SentMail)))
    assert "owner" not in row.recipient
    await people.tell(now=NOW + HOUR)
    await worker._mail(NOW + HOUR)
    async with people.database.transaction() as session:
        assert await session.scalar(select(func.count()).select_from(SentMail)) == 1


async def sign_in(people, to="owner@example.org", **change):
    async with people.database.transaction("test") as session:
        row = SignIn(kind=SignInKind.LINK, email=to, created_at=NOW, expires_at=NOW + 15 * MINUTE, **change)
        session.add(row)
        await session.flush()
        await write_to(session, NoticeKind.SIGN_IN, to, NOW, sign_in=row.id)
        return row.id


async def test_a_link_has_its_secret_only_in_the_mail(people, mail_server):
    identifier = await sign_in(people, "new@example.org")
    await people.worker(mail_server.port)._mail(NOW)
    (received,) = mail_server.received
    token = KEY.token(Purpose.SIGN_IN, identifier)
    assert f"/sign-in#{token}" in received.message.get_content()
    assert received.recipients == ["new@example.org"]
    (row,) = await people.deliveries()
    assert (row.status, row.email) == (S.SENT, None), "the address of a stranger is not kept"


@pytest.mark.parametrize("answer", ["451 later: {token}", "550 never: {token}"])
async def test_a_server_that_repeats_a_link_puts_it_in_no_error(people, mail_server, answer, capsys):
    identifier = await sign_in(people)
    token = KEY.token(Purpose.SIGN_IN, identifier)
    mail_server.to_messages.append(answer.format(token=token))
    await people.worker(mail_server.port)._mail(NOW)
    (row,) = await people.deliveries()
    assert row.error == f"the mail server answered {answer[:3]}"
    shown = capsys.readouterr()
    assert token not in f"{people.health.mail}{shown.out}{shown.err}"


async def test_links_are_never_joined(people, mail_server):
    for _ in range(5):
        await sign_in(people)
    await people.worker(mail_server.port)._mail(NOW)
    assert len(mail_server.received) == 5


@pytest.mark.parametrize("change", [{"used_at": NOW}, {"expires_at": NOW}])
async def test_a_link_that_has_ended_is_not_sent(people, mail_server, change):
    await sign_in(people)
    await people.change(update(SignIn).values(**change))
    await people.worker(mail_server.port)._mail(NOW)
    (row,) = await people.deliveries()
    assert (row.status, row.email) == (S.SUPPRESSED, None)
    assert row.error == "the link had ended before it could be sent"
    assert mail_server.received == []


async def test_an_invitation_says_to_what_it_is(people, mail_server):
    async with people.database.transaction("test") as session:
        row = Invitation(
            member_id=people.member,
            email="new@example.org",
            role=MemberRole.TECHNICIAN,
            invited_by=people.owner,
            created_at=NOW,
            expires_at=NOW + DAY,
        )
        session.add(row)
        await session.flush()
        identifier = row.id
        for _ in range(2):
            await write_to(session, NoticeKind.INVITATION, "new@example.org", NOW, invitation=identifier)
    worker = people.worker(mail_server.port)
    await worker._mail(NOW)
    content = mail_server.received[0].message.get_content()
    for part in ("Member: Member", "role: technician", f"#{KEY.token(Purpose.INVITATION, identifier)}"):
        assert part in content
    await people.change(update(Invitation).values(revoked_at=NOW))
    await people.write(NoticeKind.INVITATION, "new@example.org", invitation=identifier)
    await worker._mail(NOW)
    assert (await people.statuses())[-1] is S.SUPPRESSED


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"erased_at": NOW, "email": None}, "the account was erased"),
        ({"email": None}, "the account has no mail address"),
    ],
)
async def test_what_has_changed_since_the_notice_counts(people, mail_server, values, reason):
    await people.tell()
    await people.change(update(User).where(User.id == people.owner).values(**values))
    await people.worker(mail_server.port)._mail(NOW)
    (row,) = await people.deliveries()
    assert (row.status, row.error) == (S.SUPPRESSED, reason)
    assert mail_server.received == []


async def test_mails_turned_off_meanwhile_are_not_sent(people, mail_server):
    await people.tell()
    await people.tell(kind=NoticeKind.REMOVED)
    await people.change(update(Membership).values(mail=False))
    await people.worker(mail_server.port)._mail(NOW)
    assert await people.statuses() == [S.SUPPRESSED, S.SENT], "a removal is always told"


async def test_who_has_left_the_member_gets_its_farewell_and_nothing_else(people, mail_server):
    left = await people.add("left@example.org")
    await people.tell()
    await people.tell(kind=NoticeKind.REMOVED)
    async with people.database.transaction("test") as session:
        await teams.remove(session, people.member, left, NOW)
    await people.worker(mail_server.port)._mail(NOW)
    mine = [(row.status, row.error) for row in await people.deliveries() if row.user_id == left]
    assert mine == [(S.SUPPRESSED, "they act for this member no longer")] * 2 + [(S.SENT, None)]
    assert sum(received.recipients == ["left@example.org"] for received in mail_server.received) == 1


async def test_what_was_given_up_does_not_follow_who_has_left(people, mail_server):
    left = await people.add("left@example.org")
    await people.tell()
    await people.change(update(Delivery).values(status=S.FAILED, due_at=None))
    await people.change(delete(Membership).where(Membership.user_id == left))
    async with people.database.transaction("test") as session:
        for row in await session.scalars(select(Delivery)):
            assert deliveries.send_again(row, NOW)
    await people.worker(mail_server.port)._mail(NOW)
    assert await people.statuses() == [S.SENT, S.SUPPRESSED]


async def test_an_address_that_cannot_be_one_fails_and_holds_up_nobody(people, mail_server):
    await people.add("second@example.org")
    await people.change(update(User).where(User.id == people.owner).values(email="a\r\nBcc: x@example.org"))
    await people.tell()
    await people.worker(mail_server.port)._mail(NOW)
    bad, good = await people.deliveries()
    assert (bad.status, bad.error) == (S.FAILED, "not a mail address")
    assert good.status is S.SENT


async def test_two_workers_at_once_send_nothing_twice(people, database_url, mail_server):
    for number in range(9):
        await people.add(f"user{number}@example.org")
    await people.tell()
    others = [Database(database_url) for _ in range(2)]
    workers = [people.worker(mail_server.port, database=one) for one in (people.database, *others)]
    try:
        await asyncio.gather(*(worker._mail(NOW) for worker in workers))
    finally:
        for other in others:
            await other.close()
    recipients = [received.recipients[0] for received in mail_server.received]
    assert len(recipients) == len(set(recipients)) == 10
    assert set(await people.statuses()) == {S.SENT}


async def test_who_dies_after_sending_leaves_it_to_the_next_one_under_the_same_message_id(
    people, mail_server
):
    """At least once: the lease ends, and the reader's program sees that it is the same mail."""
    await people.tell()
    first = people.worker(mail_server.port)
    ids = [row.id for row in await people.deliveries()]
    await people.change(update(Delivery).values(due_at=NOW + 2 * MINUTE))
    (letter,) = await first._post.letters(ids, NOW)
    await first._post._mailer.send(letter.message, letter.recipient)
    second = people.worker(mail_server.port)
    await second._mail(NOW + MINUTE)
    assert len(mail_server.received) == 1, "the lease is still held"
    await second._mail(NOW + 2 * MINUTE)
    one, two = [received.message["Message-ID"] for received in mail_server.received]
    assert one == two
    assert await people.statuses() == [S.SENT]


async def test_what_is_settled_meanwhile_stays_so(people, mail_server):
    await people.tell()
    worker = people.worker(mail_server.port)
    ids = [row.id for row in await people.deliveries()]
    (letter,) = await worker._post.letters(ids, NOW)
    await people.change(update(Delivery).values(status=S.SUPPRESSED, error="gone"))
    await worker._post.send(letter, NOW)
    (row,) = await people.deliveries()
    assert (row.status, row.error) == (S.SUPPRESSED, "gone")


async def test_a_failed_delivery_is_tried_again_when_somebody_asks(people, mail_server):
    mail_server.to_recipients.append("550 mailbox full")
    await people.tell()
    worker = people.worker(mail_server.port)
    await worker._mail(NOW)
    async with people.database.transaction("test") as session:
        row = await session.scalar(select(Delivery))
        assert deliveries.send_again(row, NOW + HOUR)
        assert not deliveries.send_again(row, NOW + HOUR), "it is under way"
    await worker._mail(NOW + HOUR)
    (row,) = await people.deliveries()
    assert (row.status, row.error, row.attempts) == (S.SENT, None, 1)


async def test_no_secret_of_a_link_is_in_the_database(people, mail_server):
    identifier = await sign_in(people)
    mail_server.to_messages.append("451 later")
    await people.worker(mail_server.port)._mail(NOW)
    tag = KEY.token(Purpose.SIGN_IN, identifier).partition(".")[2]
    async with people.database.transaction() as session:
        rows = (await session.execute(select(Delivery.__table__))).all()
    assert rows
    assert not re.search(re.escape(tag), repr(rows))
