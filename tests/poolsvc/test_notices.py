"""Notices: who is told what, and that nothing is dropped in silence."""

from sqlalchemy import select

from poolsvc import members
from poolsvc.models import Channel, Delivery, DeliveryStatus, MemberRole, Membership, User, Webhook
from poolsvc.notices import NoticeKind, announce, write_to


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
