"""The registry's tables.

States change in `poolsvc.servers` only. Every change of a person's, member's or server's row is noted by
`poolsvc.models.audit`, in the same transaction; an event is never changed or deleted. Changes that DNS depends on are
noted by `poolsvc.models.zone_changes`.
"""

from poolsvc.db import Base
from poolsvc.models import audit as _audit  # noqa: F401 - whoever knows the tables has their changes noted
from poolsvc.models.accounts import (
    Acceptance,
    Identity,
    Invitation,
    Member,
    MemberKind,
    MemberRole,
    Membership,
    MemberStatus,
    Scope,
    SignIn,
    SignInKind,
    StaffRole,
    Token,
    TokenKind,
    User,
)
from poolsvc.models.events import Event, IdempotencyKey, Lease, WorkerReport
from poolsvc.models.notices import Channel, Delivery, DeliveryStatus, Notice, SentMail, Webhook
from poolsvc.models.servers import (
    ENDED_STATES,
    OPEN_ORDERS,
    Address,
    CaAccount,
    CaLimits,
    CaRefusal,
    ConnectBack,
    DailyCount,
    Hold,
    HoldKind,
    MaintenanceWindow,
    Order,
    OrderStatus,
    Pool,
    RevocationOrder,
    SampleRecord,
    Server,
    StageRecord,
    Transfer,
)
from poolsvc.models.zone_changes import ZoneChange

__all__ = [
    "ENDED_STATES",
    "OPEN_ORDERS",
    "Acceptance",
    "Address",
    "Base",
    "CaAccount",
    "CaLimits",
    "CaRefusal",
    "Channel",
    "ConnectBack",
    "DailyCount",
    "Delivery",
    "DeliveryStatus",
    "Event",
    "Hold",
    "HoldKind",
    "IdempotencyKey",
    "Identity",
    "Invitation",
    "Lease",
    "MaintenanceWindow",
    "Member",
    "MemberKind",
    "MemberRole",
    "MemberStatus",
    "Membership",
    "Notice",
    "Order",
    "OrderStatus",
    "Pool",
    "RevocationOrder",
    "SampleRecord",
    "Scope",
    "SentMail",
    "Server",
    "SignIn",
    "SignInKind",
    "StaffRole",
    "StageRecord",
    "Token",
    "TokenKind",
    "Transfer",
    "User",
    "Webhook",
    "WorkerReport",
    "ZoneChange",
]
