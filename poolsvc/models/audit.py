"""The audit log: every change of what belongs to people, members and servers, noted as it is made.

It cannot be forgotten: a session notes what it flushes of the classes in `_AUDITED`, in the same transaction, with
the actor that the transaction was begun for. The columns named there are those that people decide or that decide
about people; due times, scores and what a worker sees every minute are not among them. Texts hold ids: no name, mail
address or secret gets into a log that is kept for ever.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from enum import Enum
from typing import Any

from sqlalchemy import event, insert, inspect
from sqlalchemy.orm import InstanceState, Session

from poolsvc.db import Base, RecordedSession
from poolsvc.models.accounts import Acceptance, Identity, Invitation, Member, Membership, Token, User
from poolsvc.models.events import Event
from poolsvc.models.monitors import Monitor
from poolsvc.models.notices import Webhook
from poolsvc.models.servers import (
    Address,
    CaAccount,
    CaLimits,
    Hold,
    MaintenanceWindow,
    Order,
    Pool,
    Region,
    RevocationOrder,
    Server,
    Transfer,
    ZonePlan,
)


@dataclass(frozen=True, slots=True)
class _Rule:
    """What is noted of a class: values of `shown`, and of `hidden` only that they changed."""

    noun: str
    shown: frozenset[str]
    hidden: frozenset[str] = frozenset()


def _rule(noun: str, shown: str, hidden: str = "") -> _Rule:
    return _Rule(noun, frozenset(shown.split()), frozenset(hidden.split()))


_AUDITED: Mapping[type[Base], _Rule] = {
    Pool: _rule("pool", "domain opened_at frozen_at quorum"),
    ZonePlan: _rule("zone-plan", "checksum deleted replaced withdrawn expires_at made_at"),
    Region: _rule("region", "label"),
    CaAccount: _rule("ca-account", "ca uri"),
    CaLimits: _rule("ca-limits", "certificates orders until note"),
    User: _rule("user", "staff confirmed_at blocked_at blocked_reason erased_at", "email name"),
    Member: _rule("member", "kind status status_reason public max_servers", "name"),
    Membership: _rule("membership", "member_id user_id role mail"),
    Invitation: _rule("invitation", "member_id role invited_by expires_at accepted_at revoked_at"),
    Acceptance: _rule("acceptance", "document version"),
    Identity: _rule("identity", "issuer"),
    Token: _rule(
        "token", "kind label viewer_id member_id server_id monitor_id scopes expires_at used_at revoked_at"
    ),
    Server: _rule(
        "server",
        "member_id name weight ipv4 ipv6 public agentless own_account_uri validation waive_source short_lived dns_01"
        " burnt_at released_at joined_at leave_at leave_final leave_reason leave_by_operator",
        "agent_key",
    ),
    Address: _rule("address", "address proved_at"),
    Hold: _rule("hold", "kind reason lifted_at"),
    MaintenanceWindow: _rule("maintenance", "starts_at ends_at reason cancelled_at"),
    Order: _rule("order", "status ca serial not_after deactivated_at compromised_at revoked_at"),
    RevocationOrder: _rule("revocation-order", "ca proved_at deactivated_at ended_at"),
    Transfer: _rule("transfer", "to_member_id expires_at accepted_at declined_at"),
    Monitor: _rule("monitor", "member_id name status status_reason"),
    Webhook: _rule("webhook", "member_id generation enabled_at disabled_at deleted_at", "url"),
}
_HIDDEN = "(not kept)"
_MAX_TEXT = 300


@event.listens_for(RecordedSession, "after_flush")
def _note(session: Session, _context: object) -> None:
    """Write one event for each audited row that the flush made, changed or deleted."""
    now = datetime.now(UTC)
    rows = [
        {"at": now, "actor": session.info["actor"], "reason": "", **_whose(row), **what}
        for row, what in _changes(session)
    ]
    if rows:
        session.execute(insert(Event), rows)


def _changes(session: Session) -> Iterator[tuple[Base, dict[str, Any]]]:
    for row in session.new:
        if (rule := _AUDITED.get(type(row))) is not None:
            after = {name: value for name, value in _values(row, rule).items() if value is not None}
            yield row, _change(rule, "created", row, None, after)
    for row in session.dirty:
        if (rule := _AUDITED.get(type(row))) is not None:
            before, after = _difference(inspect(row), rule)
            if after:
                yield row, _change(rule, "changed", row, before, after)
    for row in session.deleted:
        if (rule := _AUDITED.get(type(row))) is not None:
            yield row, _change(rule, "deleted", row, _values(row, rule), None)


def _change(
    rule: _Rule, verb: str, row: Base, before: dict[str, Any] | None, after: dict[str, Any] | None
) -> dict[str, Any]:
    return {
        "kind": f"{rule.noun}-{verb}",
        "subject": f"{rule.noun} {_id(row)}",
        "before": before,
        "after": after,
    }


def _id(row: Base) -> int:
    identifier: int = inspect(row).mapper.primary_key_from_instance(row)[0]
    return identifier


def _values(row: Base, rule: _Rule) -> dict[str, Any]:
    shown = {name: _plain(getattr(row, name)) for name in sorted(rule.shown)}
    return shown | {name: _HIDDEN for name in sorted(rule.hidden) if getattr(row, name) is not None}


def _difference(state: InstanceState[Any], rule: _Rule) -> tuple[dict[str, Any], dict[str, Any]]:
    before: dict[str, Any] = {}
    after: dict[str, Any] = {}
    for name in sorted(rule.shown | rule.hidden):
        history = state.attrs[name].history
        if history.has_changes():
            old, new = (values[0] if values else None for values in (history.deleted, history.added))
            hide = name in rule.hidden
            before[name], after[name] = (
                (_HIDDEN if value and hide else _plain(value)) for value in (old, new)
            )
    return before, after


def _plain(value: Any) -> Any:
    """As JSON can say it."""
    if isinstance(value, datetime | date):
        return value.isoformat()
    return value.value if isinstance(value, Enum) else value


def _whose(row: Base) -> dict[str, int | None]:
    """Whom a row concerns, and so who may read of its changes."""
    owner = {name: getattr(row, name, None) for name in ("member_id", "server_id", "user_id")}
    if isinstance(row, (User, Member, Server)):
        owner[f"{_AUDITED[type(row)].noun}_id"] = row.id
    return owner
