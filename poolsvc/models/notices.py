"""What members are told, to whom it goes, and what came of that."""

from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import JSON, ForeignKey, String, Text
from sqlalchemy.orm import Mapped, mapped_column, relationship

from poolsvc.db import RANDOM_KEY, Base, UtcDateTime, random_key, text_enum
from poolsvc.models.accounts import User


class Channel(StrEnum):
    MAIL = "mail"
    WEBHOOK = "webhook"


class DeliveryStatus(StrEnum):
    PENDING = "pending"
    SENT = "sent"
    FAILED = "failed"  # given up; `error` says why
    SUPPRESSED = "suppressed"  # not sent on purpose; `error` says why


class Webhook(Base):
    """An address that gets signed notices, once it has echoed a challenge.

    Its secret is derived from the registry's key, its id and `generation`. The secret before is used beside it for
    a day after `rotated_at`.
    """

    __tablename__ = "webhooks"

    id: Mapped[int] = random_key()
    member_id: Mapped[int] = mapped_column(ForeignKey("members.id"), index=True)
    url: Mapped[str] = mapped_column(String(500))
    generation: Mapped[int] = mapped_column(default=1)
    rotated_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    challenge_due_at: Mapped[datetime | None] = mapped_column(UtcDateTime, index=True)
    enabled_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    disabled_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    deleted_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    failures: Mapped[int] = mapped_column(default=0)  # in a row
    failing_since: Mapped[datetime | None] = mapped_column(UtcDateTime)
    error: Mapped[str | None] = mapped_column(String(300))


class Notice(Base):
    """One thing worth telling; its text is made from `data` when it is shown or sent."""

    __tablename__ = "notices"

    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)
    kind: Mapped[str] = mapped_column(String(50))
    member_id: Mapped[int | None] = mapped_column(ForeignKey("members.id"), index=True)
    server_id: Mapped[int | None] = mapped_column(ForeignKey("servers.id"), index=True)
    data: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)

    deliveries: Mapped[list["Delivery"]] = relationship(lazy="raise", back_populates="notice")


class Delivery(Base):
    """One notice on its way to one recipient."""

    __tablename__ = "deliveries"

    id: Mapped[int] = mapped_column(primary_key=True)
    notice_id: Mapped[int] = mapped_column(ForeignKey("notices.id"), index=True)
    channel: Mapped[Channel] = mapped_column(text_enum(Channel, "channel"))
    user_id: Mapped[int | None] = mapped_column(ForeignKey("users.id"), index=True)
    webhook_id: Mapped[int | None] = mapped_column(RANDOM_KEY, ForeignKey("webhooks.id"), index=True)
    email: Mapped[str | None] = mapped_column(String(254))  # of nobody with an account; emptied at the end
    status: Mapped[DeliveryStatus] = mapped_column(text_enum(DeliveryStatus, "status"))
    due_at: Mapped[datetime | None] = mapped_column(UtcDateTime, index=True)
    attempts: Mapped[int] = mapped_column(default=0)
    error: Mapped[str | None] = mapped_column(Text)
    done_at: Mapped[datetime | None] = mapped_column(UtcDateTime)

    notice: Mapped[Notice] = relationship(lazy="raise", back_populates="deliveries")
    user: Mapped[User | None] = relationship(lazy="raise")
    webhook: Mapped[Webhook | None] = relationship(lazy="raise")


class SentMail(Base):
    """One mail of the last hour: what the limits count. Its recipient is a keyed hash of the address."""

    __tablename__ = "sent_mails"

    id: Mapped[int] = mapped_column(primary_key=True)
    recipient: Mapped[str] = mapped_column(String(64), index=True)
    at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)
