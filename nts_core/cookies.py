"""Cookies: the server's state, kept by the client (RFC 8915 section 6).

    version 1 | AEAD id 1 | key id 2 | nonce 16 | tag 16 | C2S key, S2C key

The first four octets are associated data. A cookie has 100 octets for AEAD_AES_SIV_CMAC_256, 132 and 164 for its
longer sisters, 68 for AEAD_AES_128_GCM_SIV: always the same for one session, and a multiple of four.

A keyring holds the master keys in the order in which they seal: one made ahead, the sealing one, the retired ones
that still open old cookies. It is a value; `at` gives the keyring for another time.
"""

import base64
import binascii
import hashlib
import json
import struct
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Self

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from nts_core.aead import KEY_LENGTH, TAG_LENGTH, Aead, AeadId, SessionKeys
from nts_core.errors import NotAuthentic, OutOfCookies, WireError

DAY = 86_400
# Clients that poll once a day must find their key for longer than that; NTPsec came to ten days.
HISTORY = 10 * DAY
NONCE_LENGTH = 16
_VERSION = 1
_FILE_VERSION = 2
_KEY_LENGTH = KEY_LENGTH[AeadId.AES_SIV_CMAC_256]
_IDS = 1 << 16
# The end of the year 9999: what lies behind it is in no calendar.
_LATEST = 253_402_300_800
_MAX_KEYS = 1024
# Years of daily keys: what a ratchet may have to be turned at once.
_MAX_TURNS = 20_000
_HEAD = struct.Struct("!BBH")
_HEAD_LENGTH = _HEAD.size
# What is not encrypted: version, algorithm and key id, and the nonce.
_CLEAR = _HEAD_LENGTH + NONCE_LENGTH
# By number: a look-up is quicker than the enumeration's own, and this is asked for every packet.
_ALGORITHMS = {int(algorithm): algorithm for algorithm in AeadId}
_RATCHET_INFO = b"truechimer cookie key"
# What a client may hold, and what a server gives in one answer (section 5.7).
MAX_COOKIES = 8
# Longer ones do not fit NTP packets that pass the networks as they are; chrony keeps at most 256 octets.
MAX_COOKIE_LENGTH = 256

Random = Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class CookieKey:
    """One master key: its 16-bit identifier, and when it begins to seal (seconds since 1970)."""

    id: int
    starts_at: int
    secret: bytes = field(repr=False)

    def successor(self, rotation: int) -> "CookieKey":
        """The next key of a ratchet: HKDF of this one, with its id as the salt (section 6)."""
        number = (self.id + 1) % _IDS
        hkdf = HKDF(SHA256(), _KEY_LENGTH, salt=self.id.to_bytes(2, "big"), info=_RATCHET_INFO)
        return CookieKey(number, self.starts_at + rotation, hkdf.derive(self.secret))


@dataclass(frozen=True, slots=True)
class Schedule:
    """How keys follow each other: every `rotation` seconds, and retired ones open cookies for `history` seconds.

    With `ratchet` each key is derived from the one before, and begins at the same second on every host that
    shares one of them; otherwise each is drawn at random.
    """

    rotation: int = DAY
    history: int = HISTORY
    ratchet: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.rotation <= 366 * DAY:
            raise ValueError(f"a rotation of {self.rotation} s is not between 1 second and 366 days")
        if not 0 <= self.history <= self.rotation * (_MAX_KEYS - 2):
            raise ValueError(f"a history of {self.history} s is more than {_MAX_KEYS - 2} rotations")

    @property
    def kept(self) -> int:
        """How many keys a keyring holds: the next, the sealing, and the retired ones."""
        return 2 - -self.history // self.rotation


class KeyRole(StrEnum):
    """What a master key is there for; the label of a counter."""

    NEXT = "next"
    SEALING = "sealing"
    RETIRED = "retired"


# Looking a member of an enumeration up takes longer than comparing with it.
_SEALING = KeyRole.SEALING


class Keyring:
    """Master keys, newest first: the next one, the sealing one, the retired ones; immutable."""

    __slots__ = ("_aeads", "_keys", "_sealing", "_sealing_id", "schedule")

    def __init__(self, keys: tuple[CookieKey, ...], schedule: Schedule) -> None:
        if not 2 <= len(keys) <= _MAX_KEYS or len({key.id for key in keys}) != len(keys):
            raise ValueError("a keyring needs a sealing key and the next one, with different ids")
        self._keys = keys
        self._aeads = {key.id: Aead(AeadId.AES_SIV_CMAC_256, key.secret) for key in keys}
        self._sealing_id = keys[1].id
        self._sealing = self._aeads[self._sealing_id]
        self.schedule = schedule

    @classmethod
    def new(cls, now: int, random: Random, schedule: Schedule | None = None) -> Self:
        """A keyring of fresh keys; the id starts anywhere, so that a lost key file is noticed."""
        schedule = schedule or Schedule()
        # A ratchet's keys begin at whole multiples of its rotation: hosts then agree by their clocks alone.
        start = now - now % schedule.rotation if schedule.ratchet else now
        first = CookieKey(int.from_bytes(random(2), "big"), start, random(_KEY_LENGTH))
        return cls((_next(first, schedule, random), first), schedule)

    @property
    def keys(self) -> tuple[CookieKey, ...]:
        """Newest first: the next one, the sealing one, the retired ones."""
        return self._keys

    @property
    def sealing_since(self) -> int:
        """When the sealing key began to seal (seconds since 1970)."""
        return self._keys[1].starts_at

    def role(self, cookie: bytes) -> KeyRole:
        """What the key that opened `cookie` is there for."""
        key = int.from_bytes(cookie[2:_HEAD_LENGTH], "big")
        if key == self._sealing_id:
            return _SEALING
        return KeyRole.NEXT if key == self._keys[0].id else KeyRole.RETIRED

    @property
    def next_at(self) -> int:
        """When the key made ahead begins to seal (seconds since 1970)."""
        return self._keys[0].starts_at

    @property
    def fingerprint(self) -> str:
        """Tells the key made ahead from others, and nothing of its secret: hosts that share have the same."""
        return hashlib.sha256(b"truechimer fingerprint" + self._keys[0].secret).hexdigest()[:8]

    def at(self, now: int, random: Random) -> Self:
        """The keyring for the time `now`: this one while its sealing key is current, else one moved on.

        A random key that lies in the future means that the clock was set back; its age cannot be told, and
        fresh keys begin now. A ratchet never turns back: it waits until the clock has come up again.
        """
        due = self.next_at <= now
        ahead = not self.schedule.ratchet and self._keys[1].starts_at > now
        if not (due or ahead):
            return self
        keys = self._turned(now) if self.schedule.ratchet else self._redrawn(now, random)
        return type(self)(tuple(keys[: self.schedule.kept]), self.schedule)

    def under(self, rotation: int, history: int) -> Self:
        """The same keys with another schedule. Raises ValueError for one that cannot be.

        A ratchet keeps its rotation, which all its hosts share, and of the history what is possible with it.
        """
        if self.schedule.ratchet:
            possible = self.schedule.rotation * (_MAX_KEYS - 2)
            return type(self)(self._keys, replace(self.schedule, history=min(history, possible)))
        following, sealing, *retired = self._keys
        following = replace(following, starts_at=sealing.starts_at + rotation)
        return type(self)((following, sealing, *retired), Schedule(rotation, history))

    def _redrawn(self, now: int, random: Random) -> list[CookieKey]:
        # However long nobody looked, one new key is enough: nothing was sealed in between.
        sealing = replace(self._keys[0], starts_at=now)
        following = _next(sealing, self.schedule, random)
        return [following, sealing, *(key for key in self._keys[1:] if key.id != following.id)]

    def _turned(self, now: int) -> list[CookieKey]:
        keys = list(self._keys)
        for _ in range(_MAX_TURNS):
            if keys[0].starts_at > now:
                break
            following = keys[0].successor(self.schedule.rotation)
            keys = [following, *(key for key in keys if key.id != following.id)][: self.schedule.kept]
        return keys

    def share(self) -> Self:
        """What another host needs to follow this ratchet, and no more: the sealing key and the next one.

        Raises ValueError for a keyring whose keys are random.
        """
        if not self.schedule.ratchet:
            raise ValueError("random keys have no successors to share")
        return type(self)(self._keys[:2], self.schedule)

    def adopt(self, shared: Self) -> Self:
        """The keyring that follows another host's ratchet and still opens the cookies of this one."""
        taken = {key.id for key in shared._keys}
        retired = [key for key in self._keys if key.id not in taken]
        keys = (*shared._keys, *retired)
        return type(self)(keys[: shared.schedule.kept], shared.schedule)

    def seal(self, keys: SessionKeys, nonce: bytes) -> bytes:
        """A new cookie for one client's session keys; `nonce` is `NONCE_LENGTH` random octets."""
        return self.seal_many(keys, nonce)[0]

    def seal_many(self, keys: SessionKeys, nonces: bytes) -> list[bytes]:
        """New cookies for one client, one for each `NONCE_LENGTH` octets of `nonces`; `cookie_length` long."""
        head = _HEAD.pack(_VERSION, keys.aead, self._sealing_id)
        secret = keys.c2s + keys.s2c
        cookies = []
        for start in range(0, len(nonces), NONCE_LENGTH):
            nonce = nonces[start : start + NONCE_LENGTH]
            cookies.append(head + nonce + self._sealing.seal(nonce, secret, head))
        return cookies

    def open(self, cookie: bytes) -> SessionKeys:
        """The session keys in a cookie; NotAuthentic when no key of ours made it."""
        if len(cookie) < _CLEAR:
            raise NotAuthentic("a cookie that is too short")
        version, algorithm, key = _HEAD.unpack_from(cookie)
        aead, known = self._aeads.get(key), _ALGORITHMS.get(algorithm)
        if aead is None or version != _VERSION or known is None:
            raise NotAuthentic("a cookie of a key that is not ours")
        secret = aead.open(cookie[_HEAD_LENGTH:_CLEAR], cookie[_CLEAR:], cookie[:_HEAD_LENGTH])
        length = len(secret) // 2
        return SessionKeys(known, secret[:length], secret[length:])

    def dump(self) -> bytes:
        """The file form; secret, and to be kept as such."""
        keys = [
            {"id": key.id, "starts_at": key.starts_at, "secret": base64.b64encode(key.secret).decode()}
            for key in self._keys
        ]
        schedule = {
            "rotation": self.schedule.rotation,
            "history": self.schedule.history,
            "ratchet": self.schedule.ratchet,
        }
        return json.dumps({"version": _FILE_VERSION, **schedule, "keys": keys}, indent=1).encode() + b"\n"

    @classmethod
    def load(cls, octets: bytes) -> Self:
        """The keyring in a file; WireError when the file is not one that `dump` wrote."""
        try:
            document = json.loads(octets)
            if document["version"] != _FILE_VERSION:
                raise WireError(f"cookie keys of version {document['version']!r}, not {_FILE_VERSION}")
            schedule = Schedule(
                int(document["rotation"]), int(document["history"]), ratchet=document["ratchet"] is True
            )
            keys = tuple(
                CookieKey(
                    int(key["id"]), int(key["starts_at"]), base64.b64decode(key["secret"], validate=True)
                )
                for key in document["keys"]
            )
            if any(
                len(key.secret) != _KEY_LENGTH or not 0 <= key.id < _IDS or not 0 <= key.starts_at < _LATEST
                for key in keys
            ):
                raise WireError("a cookie key with a wrong length, id or time")
            return cls(keys, schedule)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError, binascii.Error) as error:
            raise WireError(f"not a file of cookie keys: {error}") from None


def _next(key: CookieKey, schedule: Schedule, random: Random) -> CookieKey:
    following = key.successor(schedule.rotation)
    return following if schedule.ratchet else replace(following, secret=random(_KEY_LENGTH))


def cookie_length(algorithm: int) -> int:
    """Octets of our cookies for sessions of one algorithm."""
    return _CLEAR + TAG_LENGTH + 2 * KEY_LENGTH[algorithm]


class CookieJar:
    """The cookies a client holds for one server: each is used once, the oldest first, eight at most."""

    __slots__ = ("_cookies",)

    def __init__(self, cookies: tuple[bytes, ...] = ()) -> None:
        self._cookies: deque[bytes] = deque(maxlen=MAX_COOKIES)
        for cookie in cookies:
            self.add(cookie)

    def __len__(self) -> int:
        return len(self._cookies)

    def __iter__(self) -> Iterator[bytes]:
        """The cookies, the oldest first; none is taken."""
        return iter(self._cookies)

    def add(self, cookie: bytes) -> None:
        """Keep a cookie; one of no or of unusable length is not kept, and a full jar drops its oldest."""
        if 0 < len(cookie) <= MAX_COOKIE_LENGTH:
            self._cookies.append(cookie)

    def take(self) -> bytes:
        """The oldest cookie, which is gone then; OutOfCookies when there is none."""
        if not self._cookies:
            raise OutOfCookies("no cookies left: key establishment has to run again")
        return self._cookies.popleft()
