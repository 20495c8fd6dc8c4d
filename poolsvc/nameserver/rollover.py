"""When a key of the zone goes on to its next state (`keys.TRANSITIONS`). Pure; times are Unix time, spans seconds."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from poolsvc.nameserver.keys import TRANSITIONS, KeyState, SigningKey
from poolsvc.nameserver.store import KeyRow


@dataclass(frozen=True, slots=True)
class Waits:
    """How long others may know what was: the TTL of the set of keys, the longest of the zone, that of the parent's DS;
    and `margin` for every authoritative server to have what is new.
    """

    keys: int
    zone: int
    ds: int
    margin: int


def advance(rows: Sequence[KeyRow], waits: Waits, now: int, *, signed_since: int | None) -> list[KeyRow]:
    """The keys that go on now, in their next state.

    `signed_since` is since when nothing in the zone is signed by the key before any more; None while something is.
    """
    if made := [row for row in rows if row.key.state is KeyState.MADE]:
        return [_next(row, now) for row in made]
    moved = []
    active = next(row for row in rows if row.key.state is KeyState.ACTIVE)
    retiring = [row for row in rows if row.key.state is KeyState.RETIRING]
    for row in rows:
        if (
            row.key.state is KeyState.PUBLISHED
            and now >= row.since + waits.keys + waits.margin
            and not retiring
        ):
            moved += [_next(active, now), _next(row, now)]
            break
    for row in retiring:
        is_unknown = (
            signed_since is not None and now >= max(row.since, signed_since) + waits.zone + waits.margin
        )
        is_unnamed = active.ds_seen is not None and now >= active.ds_seen + waits.ds + waits.margin
        if is_unknown and is_unnamed:
            moved.append(_next(row, now))
    return moved


def moved(rows: Sequence[KeyRow], news: Sequence[KeyRow]) -> list[KeyRow]:
    """The rows with those that moved, without those that were removed."""
    by_id = {row.id: row for row in rows} | {row.id: row for row in news}
    return [row for row in by_id.values() if row.key.state is not KeyState.REMOVED]


def explain(row: KeyRow, rows: Sequence[KeyRow], waits: Waits) -> tuple[str, int | None]:
    """What a key waits for, and when that is over if only time has to pass."""
    active = next(each for each in rows if each.key.state is KeyState.ACTIVE)
    if row.key.state is KeyState.MADE:
        return "for the server to publish it", None
    if row.key.state is KeyState.PUBLISHED:
        is_second = any(each.key.state is KeyState.RETIRING for each in rows)
        known = None if is_second else row.since + waits.keys + waits.margin
        return "for the key before to go" if is_second else "until resolvers know it", known
    if row.key.state is not KeyState.RETIRING:
        return "", None
    if active.ds_seen is None:
        return f"for the parent to name key {active.key.tag} in its DS, and no other", None
    known, unnamed = row.since + waits.zone + waits.margin, active.ds_seen + waits.ds + waits.margin
    return "until nobody needs it", max(known, unnamed)


def _next(row: KeyRow, now: int) -> KeyRow:
    key = row.key
    state = TRANSITIONS[key.state]
    return replace(row, key=SigningKey(key.private, state, key.dnskey, key.tag), since=now)
