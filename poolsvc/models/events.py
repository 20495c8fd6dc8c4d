"""What happened, what was answered, and who leads."""

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, ForeignKey, LargeBinary, String
from sqlalchemy.orm import Mapped, mapped_column

from poolsvc.db import Base, UtcDateTime


class Event(Base):
    """One change, with who made it and what it changed from and to. The database refuses to alter one.

    `member_id`, `server_id` and `user_id` say whose it is, and so who may read it. Texts hold ids, never names
    or addresses of people.
    """

    __tablename__ = "audit_events"

    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime] = mapped_column(UtcDateTime)
    actor: Mapped[str] = mapped_column(String(100))
    kind: Mapped[str] = mapped_column(String(60))
    subject: Mapped[str] = mapped_column(String(60))  # what changed, such as "address 12"
    member_id: Mapped[int | None] = mapped_column(ForeignKey("members.id"), index=True)
    server_id: Mapped[int | None] = mapped_column(ForeignKey("servers.id"), index=True)
    user_id: Mapped[int | None] = mapped_column(ForeignKey("users.id"), index=True)
    before: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    after: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    reason: Mapped[str] = mapped_column(String(300), default="")


class IdempotencyKey(Base):
    """The answer to a request that may come again; sealed with what only its sender knows."""

    __tablename__ = "idempotency_keys"

    key_sha256: Mapped[str] = mapped_column(String(64), primary_key=True)  # of the token and the key
    request_sha256: Mapped[str] = mapped_column(String(64))
    status: Mapped[int] = mapped_column()
    sealed: Mapped[bytes] = mapped_column(LargeBinary)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)


class Lease(Base):
    """A task that one process at a time may do; `epoch` rises with every new holder."""

    __tablename__ = "leases"

    name: Mapped[str] = mapped_column(String(50), primary_key=True)
    holder: Mapped[str] = mapped_column(String(100))
    epoch: Mapped[int] = mapped_column(default=0)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime)


class WorkerReport(Base):
    """What one worker process last said of itself and of the pool's own parts."""

    __tablename__ = "workers"

    holder: Mapped[str] = mapped_column(String(100), primary_key=True)
    seen_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)
    alarms: Mapped[list[str]] = mapped_column(JSON)
