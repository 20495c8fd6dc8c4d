"""Monitors, what each last said of each address, and what is kept of that for years."""

from datetime import date, datetime

from sqlalchemy import BigInteger, Date, ForeignKey, Index, String, text
from sqlalchemy.orm import Mapped, mapped_column, relationship

from nts_core.control import MonitorStatus, Stage
from poolsvc.db import Base, UtcDateTime, text_enum
from poolsvc.models.accounts import Member
from poolsvc.vantage import ViewRole

INNER = "registry"  # the monitor inside `poolsvc serve`; samples had no other name before there were several


class Monitor(Base):
    """A vantage point that probes servers; without a member it is the pool's own."""

    __tablename__ = "monitors"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(40), unique=True)
    member_id: Mapped[int | None] = mapped_column(ForeignKey("members.id"), index=True)
    status: Mapped[MonitorStatus] = mapped_column(text_enum(MonitorStatus, "status"))
    status_reason: Mapped[str] = mapped_column(String(300), default="")
    status_since: Mapped[datetime] = mapped_column(UtcDateTime)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)

    program: Mapped[str] = mapped_column(String(100), default="")  # name and version, as it says
    seen_at: Mapped[datetime | None] = mapped_column(UtcDateTime)  # it last asked or told anything
    sound: Mapped[bool | None] = mapped_column()  # by its own check of clock and network; None before any
    sound_since: Mapped[datetime | None] = mapped_column(UtcDateTime)
    sound_detail: Mapped[str] = mapped_column(String(300), default="")
    ipv4: Mapped[bool] = mapped_column(default=True)  # families in which it reaches its references
    ipv6: Mapped[bool] = mapped_column(default=True)
    # Where it last called from, in each family, and where that is: it looks at no server beside it.
    ipv4_address: Mapped[str | None] = mapped_column(String(45))
    ipv6_address: Mapped[str | None] = mapped_column(String(45))
    network: Mapped[int | None] = mapped_column(BigInteger)  # AS number
    country: Mapped[str | None] = mapped_column(String(2))
    placed_for: Mapped[str | None] = mapped_column(String(45))  # the address of which these two are known
    sequence: Mapped[int] = mapped_column(BigInteger, default=0)  # of its last report
    taken: Mapped[int] = mapped_column(default=0)  # samples of that report
    samples: Mapped[int] = mapped_column(BigInteger, default=0)  # of all its reports

    member: Mapped[Member | None] = relationship(lazy="raise")


class MonitorView(Base):
    """What one monitor is to look at, and what it last saw there: one row for each address and monitor."""

    __tablename__ = "monitor_views"
    __table_args__ = (
        Index("ix_monitor_views_monitor_id", "monitor_id", "due_at"),
        # What is wrong in DNS, which is nearly nothing.
        Index(
            "ix_monitor_views_names",
            "address_id",
            sqlite_where=text("names IS NOT NULL"),
            postgresql_where=text("names IS NOT NULL"),
        ),
    )

    address_id: Mapped[int] = mapped_column(ForeignKey("addresses.id"), primary_key=True)
    monitor_id: Mapped[int] = mapped_column(ForeignKey("monitors.id"), primary_key=True)
    role: Mapped[ViewRole] = mapped_column(text_enum(ViewRole, "role"), default=ViewRole.CANDIDATE)
    role_since: Mapped[datetime] = mapped_column(UtcDateTime)
    role_reason: Mapped[str] = mapped_column(String(200), default="")
    due_at: Mapped[datetime | None] = mapped_column(UtcDateTime)  # when it is to look again
    at: Mapped[datetime | None] = mapped_column(UtcDateTime)  # of its last sound probe
    score: Mapped[float | None] = (
        mapped_column()
    )  # by its probes alone; None until it has admitted the address
    shadow_score: Mapped[float | None] = mapped_column()  # the same by the shadow scorer
    full_probes: Mapped[int] = mapped_column(default=0)  # in a row
    points: Mapped[int] = mapped_column(default=0)  # sound probes since it has its role
    failed: Mapped[Stage | None] = mapped_column(text_enum(Stage, "failed"))
    failed_since: Mapped[datetime | None] = mapped_column(UtcDateTime)
    silent_since: Mapped[datetime | None] = mapped_column(UtcDateTime)  # it had nothing but silence
    detail: Mapped[str] = mapped_column(String(300), default="")
    step: Mapped[float | None] = mapped_column()
    step_reason: Mapped[str] = mapped_column(String(200), default="")
    offset_ns: Mapped[int | None] = mapped_column(BigInteger)
    delay_ns: Mapped[int | None] = mapped_column(BigInteger)
    fingerprint: Mapped[str | None] = mapped_column(String(64))  # of the valid certificate that it saw
    names: Mapped[str | None] = mapped_column(String(16))  # what it saw to be wrong with the name in DNS
    mean_delay_ns: Mapped[int | None] = mapped_column(BigInteger)  # over about a day: near or far

    monitor: Mapped[Monitor] = relationship(lazy="raise")


class _Summary:
    """What one monitor's probes of one address came to in a span of time, after the samples are gone."""

    address_id: Mapped[int] = mapped_column(primary_key=True)
    monitor: Mapped[str] = mapped_column(String(40), primary_key=True)
    probes: Mapped[int] = mapped_column()
    failures: Mapped[int] = mapped_column()
    step: Mapped[float] = mapped_column()  # mean
    score: Mapped[float | None] = mapped_column()  # the last one
    offset_ns: Mapped[int | None] = mapped_column(BigInteger)  # mean
    offset_most_ns: Mapped[int | None] = mapped_column(BigInteger)  # the greatest, either way
    delay_ns: Mapped[int | None] = mapped_column(BigInteger)  # mean


class HourlySummary(_Summary, Base):
    """Of an hour."""

    __tablename__ = "hourly_summaries"

    hour: Mapped[datetime] = mapped_column(UtcDateTime, primary_key=True, index=True)


class DailySummary(_Summary, Base):
    """Of a day (UTC)."""

    __tablename__ = "daily_summaries"

    day: Mapped[date] = mapped_column(Date, primary_key=True, index=True)


class SummaryProgress(Base):
    """How far summaries of one kind are made: all before `until`, and of the span after it those below an address."""

    __tablename__ = "summary_progress"

    kind: Mapped[str] = mapped_column(String(20), primary_key=True)
    until: Mapped[datetime] = mapped_column(UtcDateTime)
    address_id: Mapped[int] = mapped_column(default=0)
