"""The pool, its servers, and everything that belongs to one server."""

from datetime import date, datetime
from enum import StrEnum

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Date,
    ForeignKey,
    Index,
    String,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import Mapped, mapped_column, relationship

from nts_core.control import ProofWay, ServerState, Stage, StageStatus, Validation
from poolsvc.db import Base, UtcDateTime, text_enum
from poolsvc.models.accounts import Member

# States from which a server does not come back, unless it is to leave on a later day only.
ENDED_STATES = frozenset({ServerState.LEAVING, ServerState.REMOVED})


class HoldKind(StrEnum):
    """Why a server is suspended; each is lifted only by its own kind."""

    SCORE = "score"
    CERTIFICATE = "certificate"
    MAINTENANCE = "maintenance"
    OPERATOR = "operator"


class OrderStatus(StrEnum):
    """How far an order has come (`poolsvc.issuance` moves it)."""

    WANTED = "wanted"  # the agent is asked for a CSR
    REQUESTED = "requested"  # the CSR is here
    PENDING = "pending"  # the CA gave a challenge, the agent is to serve it
    ANSWERED = "answered"  # the CA was told to look
    FINALIZING = "finalizing"  # the CA has the CSR; a staging CA is to end the authorization
    ISSUED = "issued"
    FAILED = "failed"


class CommandKind(StrEnum):
    """What people and agents have done at once, and not often."""

    RENEWAL = "renewal"
    CHECK = "check"


# Those that may still become a certificate.
OPEN_ORDERS = frozenset(OrderStatus) - {OrderStatus.ISSUED, OrderStatus.FAILED}


class Pool(Base):
    """The one pool of this registry, and what must survive a restart."""

    __tablename__ = "pool"
    __table_args__ = (CheckConstraint("id = 1", name="single"),)

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    domain: Mapped[str] = mapped_column(String(253))
    opened_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    epoch: Mapped[int] = mapped_column(default=0)
    frozen_at: Mapped[datetime | None] = mapped_column(
        UtcDateTime
    )  # restored: nothing is published until confirmed
    quorum: Mapped[int] = mapped_column(
        default=1
    )  # of monitors; it rises by itself, and falls by an operator
    quorum_set_at: Mapped[datetime | None] = mapped_column(UtcDateTime)  # by an operator, last


class ZonePlan(Base):
    """A change of the zone that was stopped, and that an operator has confirmed: by its checksum, for a while."""

    __tablename__ = "zone_plans"

    id: Mapped[int] = mapped_column(primary_key=True)
    checksum: Mapped[str] = mapped_column(String(64), index=True)
    deleted: Mapped[int] = mapped_column()  # records
    replaced: Mapped[int] = mapped_column()
    withdrawn: Mapped[int] = mapped_column()  # servers that leave the SRV
    approved_at: Mapped[datetime] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime)
    made_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class Region(Base):
    """A region that an operator switched on: its name is answered as long as there is a row."""

    __tablename__ = "regions"

    id: Mapped[int] = mapped_column(primary_key=True)
    label: Mapped[str] = mapped_column(String(20), unique=True)
    on_since: Mapped[datetime] = mapped_column(UtcDateTime)


class CaLimits(Base):
    """What the CA has granted beyond its usual limits, as the operator says; None where nothing."""

    __tablename__ = "ca_limits"
    __table_args__ = (CheckConstraint("id = 1", name="single"),)

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    certificates: Mapped[int | None] = mapped_column()
    orders: Mapped[int | None] = mapped_column()
    until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    note: Mapped[str] = mapped_column(String(200), default="")


class CaRefusal(Base):
    """The last 429 to an order for a first certificate, and until when it holds the others back."""

    __tablename__ = "ca_refusals"
    __table_args__ = (CheckConstraint("id = 1", name="single"),)

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    at: Mapped[datetime] = mapped_column(UtcDateTime)
    until: Mapped[datetime] = mapped_column(UtcDateTime)
    detail: Mapped[str] = mapped_column(String(1000))


class CaAccount(Base):
    """The registry's account at one CA, which CAA names, and what that CA offers."""

    __tablename__ = "ca_accounts"

    id: Mapped[int] = mapped_column(primary_key=True)
    ca: Mapped[str] = mapped_column(String(253), unique=True)  # the host of its directory
    uri: Mapped[str] = mapped_column(Text)
    profiles: Mapped[list[str]] = mapped_column(JSON, default=list)  # that it had when it was last asked


class Server(Base):
    """One registered NTS server."""

    __tablename__ = "servers"
    __table_args__ = (
        # A name belongs to one server until it is released, which happens only if it never entered DNS.
        Index(
            "uq_servers_name_held",
            "name",
            unique=True,
            sqlite_where=text("released_at IS NULL"),
            postgresql_where=text("released_at IS NULL"),
        ),
        # Whoever held a name, the last one first.
        Index("ix_servers_name", "name", "id"),
        # What the worker asks every second, and finds next to nothing.
        Index(
            "ix_servers_unfinished",
            "state_since",
            sqlite_where=text("state = 'registered' AND burnt_at IS NULL"),
            postgresql_where=text("state = 'registered' AND burnt_at IS NULL"),
        ),
        # The queue for the CA's limits, in its order.
        Index(
            "ix_servers_queue",
            "queue_round",
            "named_at",
            "id",
            sqlite_where=text("queue_round IS NOT NULL"),
            postgresql_where=text("queue_round IS NOT NULL"),
        ),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    member_id: Mapped[int] = mapped_column(ForeignKey("members.id"), index=True)
    name: Mapped[str] = mapped_column(String(36))
    state: Mapped[ServerState] = mapped_column(text_enum(ServerState, "state"), index=True)
    state_since: Mapped[datetime] = mapped_column(UtcDateTime)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)

    weight: Mapped[int] = mapped_column(default=1)
    ipv4: Mapped[bool] = mapped_column(default=True)  # addresses of this family are published
    ipv6: Mapped[bool] = mapped_column(default=True)
    public: Mapped[bool] = mapped_column(default=False)  # may be shown to everybody
    agentless: Mapped[bool] = mapped_column(default=False)  # the member runs an ACME client of its own
    own_account_uri: Mapped[str | None] = mapped_column(
        Text
    )  # that client's account for CAA, or the agent's own
    caa_changed: Mapped[bool] = mapped_column(
        default=False
    )  # since the name was in DNS, where everybody is to see it yet
    validation: Mapped[Validation] = mapped_column(
        text_enum(Validation, "validation"), default=Validation.HTTP_01
    )  # how its host answers the CA, as its agent says
    waive_source: Mapped[bool] = mapped_column(default=False)  # proof calls may come from elsewhere (NAT)
    short_lived: Mapped[bool] = mapped_column(default=False)  # its certificates live for days, not weeks
    dns_01: Mapped[bool] = mapped_column(
        default=False
    )  # the registry answers the CA, where the policy lets it
    skeleton: Mapped[str] = mapped_column(
        String(72), index=True, default=""
    )  # equal for names that look alike

    joined_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    agent_key: Mapped[str | None] = mapped_column(String(64))  # Ed25519 public key, base64
    agent_seen_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    agent_engine: Mapped[str] = mapped_column(String(100), default="")
    agent_clock: Mapped[str] = mapped_column(String(300), default="")
    agent_problem: Mapped[str | None] = mapped_column(String(1000))
    silent_told_at: Mapped[datetime | None] = mapped_column(UtcDateTime)  # since it was last heard of
    traffic_cap: Mapped[float | None] = mapped_column()  # NTP requests a second that it will answer
    traffic: Mapped[float | None] = mapped_column()  # and how many come, as the agent says
    ke_cap: Mapped[float | None] = mapped_column()  # NTS-KE connections a minute that it will take
    ke_traffic: Mapped[float | None] = mapped_column()  # and how many come

    burnt_at: Mapped[datetime | None] = mapped_column(
        UtcDateTime
    )  # first sent to DNS: never reused from then
    released_at: Mapped[datetime | None] = mapped_column(UtcDateTime)  # the name is free again
    named_at: Mapped[datetime | None] = mapped_column(UtcDateTime)  # every authoritative server has the name
    listed_at: Mapped[datetime | None] = mapped_column(UtcDateTime)  # every one has the SRV, or left it out
    kept_at: Mapped[datetime | None] = mapped_column(
        UtcDateTime
    )  # suspended with too many others at once: it stays in the SRV until an operator has looked

    probe_due_at: Mapped[datetime | None] = mapped_column(UtcDateTime, index=True)
    judge_due_at: Mapped[datetime | None] = mapped_column(
        UtcDateTime, index=True
    )  # when its scores are reckoned anew: what monitors said gets too old
    review_due_at: Mapped[datetime | None] = mapped_column(
        UtcDateTime, index=True
    )  # when its monitors are chosen anew
    order_due_at: Mapped[datetime | None] = mapped_column(UtcDateTime, index=True)
    order_failures: Mapped[int] = mapped_column(default=0)
    queue_round: Mapped[int | None] = (
        mapped_column()
    )  # it waits for the CA's limits, and `order_due_at` is its turn
    counted_at: Mapped[datetime | None] = mapped_column(
        UtcDateTime, index=True
    )  # when its first certificate was issued; without an agent: when its member could order

    leave_at: Mapped[datetime | None] = mapped_column(UtcDateTime)  # the name lives until then
    leave_final: Mapped[bool] = mapped_column(default=False)  # it only waits for caches: nobody can cancel
    leave_reason: Mapped[str | None] = mapped_column(String(300))
    leave_by_operator: Mapped[bool] = mapped_column(default=False)  # who scheduled it may cancel it
    srv_withdrawn_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    name_broken_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    authorization_deactivated_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    certificate_revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    # Without an agent: CAA names the registry's accounts meanwhile, so that they can prove control and revoke.
    revoking_since: Mapped[datetime | None] = mapped_column(UtcDateTime)
    caa_turned_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    control_proved_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    revoking_ended_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    caa_closed_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    not_revoked: Mapped[str | None] = mapped_column(String(1000))  # why it was given up
    removal_due_at: Mapped[datetime | None] = mapped_column(UtcDateTime, index=True)
    removal_error: Mapped[str | None] = mapped_column(String(1000))
    journal_due_at: Mapped[datetime | None] = mapped_column(
        UtcDateTime, index=True
    )  # the journal lags behind
    dead_warnings: Mapped[int] = mapped_column(default=0)  # since it was last good

    member: Mapped[Member] = relationship(lazy="raise")
    addresses: Mapped[list["Address"]] = relationship(lazy="raise", order_by="Address.id")
    orders: Mapped[list["Order"]] = relationship(lazy="raise", order_by="Order.id")
    revocation_orders: Mapped[list["RevocationOrder"]] = relationship(
        lazy="raise", order_by="RevocationOrder.id"
    )
    holds: Mapped[list["Hold"]] = relationship(lazy="raise", order_by="Hold.id")
    stages: Mapped[list["StageRecord"]] = relationship(lazy="raise")


class Address(Base):
    """One address of a server: proof, probes and score are per address."""

    __tablename__ = "addresses"
    __table_args__ = (
        UniqueConstraint("server_id", "address"),
        # Those below the cutoff of `poolsvc.scoring`, which are few while the pool is well.
        Index(
            "ix_addresses_failing",
            "server_id",
            sqlite_where=text("score < 10"),
            postgresql_where=text("score < 10"),
        ),
        # Those that too few monitors know, which are none while the pool is well.
        Index(
            "ix_addresses_unknown",
            "server_id",
            sqlite_where=text("unknown IS NOT NULL"),
            postgresql_where=text("unknown IS NOT NULL"),
        ),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    server_id: Mapped[int] = mapped_column(ForeignKey("servers.id"), index=True)
    address: Mapped[str] = mapped_column(String(45), index=True)
    nonce: Mapped[str | None] = mapped_column(String(64))
    proof_by: Mapped[ProofWay] = mapped_column(text_enum(ProofWay, "proof_by"), default=ProofWay.HTTP)
    served_at: Mapped[datetime | None] = mapped_column(UtcDateTime)  # first told that the answer is there
    proof_due_at: Mapped[datetime | None] = mapped_column(UtcDateTime, index=True)
    proof_error: Mapped[str | None] = mapped_column(String(300))
    called_at: Mapped[datetime | None] = mapped_column(UtcDateTime)  # last call for a proof of it
    proved_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    confirmed_at: Mapped[datetime | None] = mapped_column(
        UtcDateTime
    )  # last proof, or probe with our certificate; when it was listed, until then
    full_probes: Mapped[int] = mapped_column(default=0)  # in a row, before admission
    score: Mapped[float | None] = mapped_column()  # None until admitted
    step_reason: Mapped[str] = mapped_column(String(200), default="")  # why the last probe was not a full one
    shadow_score: Mapped[float | None] = mapped_column()  # by the scorer that is on trial
    judged_at: Mapped[datetime | None] = mapped_column(UtcDateTime)  # when enough monitors last knew it
    unknown: Mapped[str | None] = mapped_column(String(200))  # why they do not now

    server: Mapped[Server] = relationship(lazy="raise", viewonly=True)


class ConnectBack(Base):
    """One connection that the registry made to an address to prove it: what the hourly limit counts."""

    __tablename__ = "connect_backs"

    id: Mapped[int] = mapped_column(primary_key=True)
    address: Mapped[str] = mapped_column(String(45), index=True)
    prefix: Mapped[str] = mapped_column(String(49), index=True)
    at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)


class Command(Base):
    """One thing that was done for a server because somebody asked: what the limits of `poolsvc.commands` count."""

    __tablename__ = "commands"
    __table_args__ = (Index("ix_commands_server_id", "server_id", "kind", "at"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    server_id: Mapped[int] = mapped_column(ForeignKey("servers.id"))
    kind: Mapped[CommandKind] = mapped_column(text_enum(CommandKind, "kind"))
    at: Mapped[datetime] = mapped_column(UtcDateTime)


class Hold(Base):
    """A reason for suspension; active while `lifted_at` is empty."""

    __tablename__ = "holds"

    id: Mapped[int] = mapped_column(primary_key=True)
    server_id: Mapped[int] = mapped_column(ForeignKey("servers.id"), index=True)
    kind: Mapped[HoldKind] = mapped_column(text_enum(HoldKind, "kind"))
    reason: Mapped[str] = mapped_column(String(300))
    set_at: Mapped[datetime] = mapped_column(UtcDateTime)
    lifted_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class MaintenanceWindow(Base):
    """A time in which the member works on its server: a hold, and nothing counts against it."""

    __tablename__ = "maintenance_windows"

    id: Mapped[int] = mapped_column(primary_key=True)
    server_id: Mapped[int] = mapped_column(ForeignKey("servers.id"), index=True)
    starts_at: Mapped[datetime] = mapped_column(UtcDateTime)
    ends_at: Mapped[datetime] = mapped_column(UtcDateTime)
    reason: Mapped[str] = mapped_column(String(300), default="")
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    cancelled_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    due_at: Mapped[datetime | None] = mapped_column(UtcDateTime, index=True)  # the next of its two ends


class Transfer(Base):
    """A server offered to another member; it moves when that member's owner accepts."""

    __tablename__ = "transfers"

    id: Mapped[int] = mapped_column(primary_key=True)
    server_id: Mapped[int] = mapped_column(ForeignKey("servers.id"), index=True)
    from_member_id: Mapped[int] = mapped_column(ForeignKey("members.id"), index=True)
    to_member_id: Mapped[int] = mapped_column(ForeignKey("members.id"), index=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime)
    accepted_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    declined_at: Mapped[datetime | None] = mapped_column(UtcDateTime)  # or taken back


class SampleRecord(Base):
    """What one probe of one address measured. PostgreSQL keeps each day in a partition of its own."""

    __tablename__ = "samples"
    __table_args__ = {"postgresql_partition_by": "RANGE (at)"}  # noqa: RUF012 - SQLAlchemy's form

    address_id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime] = mapped_column(UtcDateTime, primary_key=True, index=True)
    monitor: Mapped[str] = mapped_column(String(40), primary_key=True)
    failed: Mapped[str | None] = mapped_column(String(32))  # the stage, None for a full probe
    step: Mapped[float] = mapped_column()
    score: Mapped[float | None] = mapped_column()  # after the step
    offset_ns: Mapped[int | None] = mapped_column(BigInteger)
    delay_ns: Mapped[int | None] = mapped_column(BigInteger)


class DailyCount(Base):
    """How many servers the pool had on one day, by state."""

    __tablename__ = "daily_counts"

    day: Mapped[date] = mapped_column(Date, primary_key=True)
    counts: Mapped[dict[str, int]] = mapped_column(JSON)


class StageRecord(Base):
    """What the last probe found at one stage, and since when it has been so."""

    __tablename__ = "stages"

    server_id: Mapped[int] = mapped_column(ForeignKey("servers.id"), primary_key=True)
    stage: Mapped[Stage] = mapped_column(text_enum(Stage, "stage"), primary_key=True)
    status: Mapped[StageStatus] = mapped_column(text_enum(StageStatus, "status"))
    since: Mapped[datetime] = mapped_column(UtcDateTime)
    detail: Mapped[str] = mapped_column(String(300), default="")


class Order(Base):
    """One ACME order and the certificate that came of it; every URL is kept, so that any process goes on."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    server_id: Mapped[int] = mapped_column(ForeignKey("servers.id"), index=True)
    status: Mapped[OrderStatus] = mapped_column(text_enum(OrderStatus, "status"), index=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)
    due_at: Mapped[datetime | None] = mapped_column(UtcDateTime, index=True)
    attempts: Mapped[int] = mapped_column(default=0)  # failed tries of the present step
    error: Mapped[str | None] = mapped_column(String(1000))

    ca: Mapped[str | None] = mapped_column(
        String(253)
    )  # as in `CaAccount`; the first of the settings if empty. Of a member's own account: where that one is
    ca_since: Mapped[datetime | None] = mapped_column(UtcDateTime)  # when this CA was chosen
    rehearsal: Mapped[bool] = mapped_column(
        default=False
    )  # it is tried at the staging CA, or was till it failed; no certificate comes of that
    account_uri: Mapped[str | None] = mapped_column(Text)  # the account there that ordered
    profile: Mapped[str | None] = mapped_column(String(64))  # that was asked for

    csr: Mapped[str | None] = mapped_column(Text)
    key_sha256: Mapped[str | None] = mapped_column(
        String(64), unique=True
    )  # of its public key: no order has it again
    url: Mapped[str | None] = mapped_column(Text)
    authorization_url: Mapped[str | None] = mapped_column(Text)
    challenge_url: Mapped[str | None] = mapped_column(Text)
    token: Mapped[str | None] = mapped_column(
        String(128)
    )  # of a failed order only if the CA looked for it in vain
    key_authorization: Mapped[str | None] = mapped_column(String(200))
    validation: Mapped[Validation] = mapped_column(
        text_enum(Validation, "validation"), default=Validation.HTTP_01
    )  # how that is served
    txt: Mapped[str | None] = mapped_column(String(64))  # in its place, for DNS, where the registry answers
    served_at: Mapped[datetime | None] = mapped_column(
        UtcDateTime
    )  # the agent says it serves the challenge, or every nameserver shows it

    issued_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    chain: Mapped[str | None] = mapped_column(Text)  # of one that was only seen: the leaf
    fingerprint: Mapped[str | None] = mapped_column(String(64), index=True)
    serial: Mapped[str | None] = mapped_column(String(64))
    not_before: Mapped[datetime | None] = mapped_column(UtcDateTime)
    not_after: Mapped[datetime | None] = mapped_column(UtcDateTime)
    ending_due_at: Mapped[datetime | None] = mapped_column(
        UtcDateTime, index=True
    )  # when a newer one must be there
    # When the CA would have it renewed (RFC 9773), and the moment that was drawn from this.
    window_start: Mapped[datetime | None] = mapped_column(UtcDateTime)
    window_end: Mapped[datetime | None] = mapped_column(UtcDateTime)
    window_url: Mapped[str | None] = mapped_column(String(1000))  # where the CA explains it
    window_due_at: Mapped[datetime | None] = mapped_column(UtcDateTime, index=True)  # when it is asked again
    renew_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    seen_at: Mapped[datetime | None] = mapped_column(UtcDateTime)  # first by probes that found no fault
    deactivated_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    compromised_at: Mapped[datetime | None] = mapped_column(UtcDateTime)  # its key is known to others
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)

    server: Mapped[Server] = relationship(lazy="raise", viewonly=True)


class RevocationOrder(Base):
    """An ACME order that nobody finalizes: it proves control of a name, so that another account's certificates may go.

    No certificate comes of it. Of the CA's limits it takes one order. One that failed is followed by another one.
    """

    __tablename__ = "revocation_orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    server_id: Mapped[int] = mapped_column(ForeignKey("servers.id"), index=True)
    ca: Mapped[str] = mapped_column(String(253))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    url: Mapped[str] = mapped_column(Text)
    authorization_url: Mapped[str] = mapped_column(Text)
    challenge_url: Mapped[str | None] = mapped_column(Text)
    txt: Mapped[str | None] = mapped_column(String(64))
    served_at: Mapped[datetime | None] = mapped_column(UtcDateTime)  # every nameserver shows TXT and CAA
    due_at: Mapped[datetime | None] = mapped_column(
        UtcDateTime
    )  # and every resolver has forgotten what was there
    answered_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    proved_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    deactivated_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    ended_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    error: Mapped[str | None] = mapped_column(String(1000))
