"""Notices: who is told what, and that nothing is dropped in silence."""

from datetime import timedelta

from sqlalchemy import func, select

from poolsvc import members
from poolsvc.models import Channel, Delivery, DeliveryStatus, MemberRole, Membership, Notice, User, Webhook
from poolsvc.notices import NoticeKind, announce, forget_old, write_to


async def deliveries(session, notice):
    found = select(Delivery).where(Delivery.notice_id == notice.id).order_by(Delivery.id)
    return list(await session.scalars(found))


async def test_all_people_and_webhooks_of_a_member_are_told_and_who_is_not_has_a_reason(registry):
    now = registry.now
    async with registry.database.transaction() as session:
        first = await members.create_user(session, now, email="first@example.org")
        second = await members.create_user(session, now, email="second@example.org")
        third = await members.create_user(session, now)
        await members.create_user(session, now, email="stranger@example.org")
        member = await members.create(session, "Member", now, owner=first)
        for user, mail in ((second, False), (third, True)):
            role = MemberRole.TECHNICIAN
            session.add(
                Membership(member_id=member.id, user_id=user.id, role=role, created_at=now, mail=mail)
            )
        for url, enabled in (("https://a.example/", now), ("https://b.example/", None)):
            session.add(Webhook(member_id=member.id, url=url, created_at=now, enabled_at=enabled))
        await session.flush()
        notice = await announce(session, NoticeKind.ADMITTED, member_id=member.id, now=now, server="alice")
        found = await deliveries(session, notice)
        forced = await announce(session, NoticeKind.REMOVED, member_id=member.id, now=now)
        always = await deliveries(session, forced)
    assert [(row.channel, row.user_id, row.status) for row in found] == [
        (Channel.MAIL, first.id, DeliveryStatus.PENDING),
        (Channel.MAIL, second.id, DeliveryStatus.SUPPRESSED),
        (Channel.MAIL, third.id, DeliveryStatus.SUPPRESSED),
        (Channel.WEBHOOK, None, DeliveryStatus.PENDING),
    ]
    assert [row.error for row in found] == [
        None,
        "mails are turned off for this member",
        "the account has no mail address",
        None,
    ]
    assert always[1].status is DeliveryStatus.PENDING


async def test_a_mail_to_somebody_without_an_account_names_the_address_only_there(registry):
    async with registry.database.transaction() as session:
        notice = await write_to(session, NoticeKind.INVITATION, "new@example.org", registry.now, invitation=1)
        (delivery,) = await deliveries(session, notice)
        assert (delivery.email, delivery.user_id, delivery.due_at) == ("new@example.org", None, registry.now)
        assert await session.scalar(select(User)) is None


async def test_notices_are_kept_for_so_long_and_go_with_their_deliveries(registry, tuned):
    settings, member = tuned(notices_days=60), await registry.member()
    async with registry.database.transaction() as session:
        for days in (0, 1, 2):
            at = registry.now + timedelta(days=days)
            await announce(session, NoticeKind.ADMITTED, member_id=member, now=at, server=f"s{days}")

    async def kept(after):
        async with registry.database.transaction() as session:
            assert not await forget_old(session, settings, registry.now + after)
            found = list(await session.scalars(select(Notice.data).order_by(Notice.id)))
            of_kept = await session.scalars(select(Delivery.id).join(Notice))
            assert len(list(await session.scalars(select(Delivery.id)))) == len(list(of_kept)) == len(found)
            return [data["server"] for data in found]

    assert await kept(timedelta(days=60) - timedelta(seconds=1)) == ["s0", "s1", "s2"]
    assert await kept(timedelta(days=60)) == ["s1", "s2"]
    assert await kept(timedelta(days=61)) == ["s2"]


async def test_of_many_old_notices_a_thousand_go_at_a_time(registry):
    async with registry.database.transaction() as session:
        session.add_all(Notice(at=registry.now, kind=NoticeKind.ADMITTED, data={}) for _ in range(1001))
    later, seen = registry.now + timedelta(days=401), []
    for _ in range(2):
        async with registry.database.transaction() as session:
            seen.append(await forget_old(session, registry.settings, later))
            seen.append(await session.scalar(select(func.count()).select_from(Notice)))
    assert seen == [True, 1, False, 0]
