"""The outbox of the zone: which servers' records the publisher has to look at again.

It cannot be forgotten: a session notes each flushed change that DNS depends on, in the same transaction. Rows are only
ever added; the publisher removes those that it has read and published. Statements that change rows without the session
(`update(Server)`) are not seen; the publisher's full pass finds what they did.
"""

from collections.abc import Iterator

from sqlalchemy import event, insert, inspect
from sqlalchemy.orm import Mapped, Session, mapped_column

from poolsvc import scoring
from poolsvc.db import Base, RecordedSession
from poolsvc.models.servers import Address, Hold, HoldKind, Order, RevocationOrder, Server

_SERVER = (
    "member_id",
    "state",
    "name",
    "weight",
    "ipv4",
    "ipv6",
    "own_account_uri",
    "validation",
    "dns_01",
    "leave_at",
    "leave_final",
    "srv_withdrawn_at",
    "revoking_since",
    "revoking_ended_at",
)
_TRAFFIC = ("traffic_cap", "traffic", "ke_cap", "ke_traffic")
_ADDRESS = ("address", "proved_at")


class ZoneChange(Base):
    """One server whose records may have changed. Without a foreign key: adding one waits for nobody."""

    __tablename__ = "zone_changes"

    id: Mapped[int] = mapped_column(primary_key=True)
    server_id: Mapped[int] = mapped_column()


@event.listens_for(RecordedSession, "after_flush")
def _note(session: Session, _context: object) -> None:
    """Write one row for each server that the flush changed for DNS."""
    if changed := sorted(set(_changed(session))):
        session.execute(insert(ZoneChange), [{"server_id": server_id} for server_id in changed])


def _changed(session: Session) -> Iterator[int]:
    for row in session.new:
        # A server begins without a proved address, and so outside DNS.
        is_proved = isinstance(row, Address) and row.proved_at is not None
        if is_proved or isinstance(row, RevocationOrder) or _is_by_operator(row):
            yield row.server_id
    for row in session.dirty:
        if isinstance(row, Server) and (_any_changed(row, _SERVER) or _share_changed(row)):
            yield row.id
        elif (
            (isinstance(row, Address) and (_any_changed(row, _ADDRESS) or _crossed(row)))
            or (isinstance(row, Order | RevocationOrder) and _proof_changed(row))
            or (isinstance(row, Hold) and _is_by_operator(row) and _any_changed(row, ("lifted_at",)))
        ):
            yield row.server_id
    for row in session.deleted:
        if isinstance(row, Address):
            yield row.server_id


def _is_by_operator(row: Base) -> bool:
    """Whether it is a hold that tells that somebody meant a server to go, which may be suspended already."""
    return isinstance(row, Hold) and row.kind is HoldKind.OPERATOR


def _any_changed(row: Base, names: tuple[str, ...]) -> bool:
    attributes = inspect(row).attrs
    return any(attributes[name].history.has_changes() for name in names)


def _proof_changed(row: Order | RevocationOrder) -> bool:
    """Whether a CA may begin, or ceases, to look for the order's text."""
    state = "status" if isinstance(row, Order) else "ended_at"
    return row.txt is not None and _any_changed(row, ("txt", state))


def _share_changed(row: Server) -> bool:
    """Whether what an agent says of its traffic, which is something else each time, makes a difference."""
    if not _any_changed(row, _TRAFFIC):
        return False
    histories = (inspect(row).attrs[name].history for name in _TRAFFIC)
    before = [(history.deleted or history.unchanged or [None])[0] for history in histories]
    after = [getattr(row, name) for name in _TRAFFIC]
    return scoring.sampling_weight(row.weight, *before) != scoring.sampling_weight(row.weight, *after)


def _crossed(row: Address) -> bool:
    """Whether the score went over or under the cutoff, or makes another share.

    Below the cutoff an address is left out beside a good one.
    """
    history = inspect(row).attrs["score"].history
    if not history.has_changes():
        return False
    before = history.deleted[0] if history.deleted else None
    return (scoring.is_good(before), scoring.tenths(before)) != (
        scoring.is_good(row.score),
        scoring.tenths(row.score),
    )
