"""Cookies: the server's state, kept by the client (RFC 8915 section 6).

A cookie of AEAD_AES_SIV_CMAC_256 has 100 octets:

    version 1 | AEAD id 1 | key id 2 | nonce 16 | tag 16 | C2S key, S2C key

The first four octets are associated data. A keyring holds the key that seals new cookies and the retired ones
that still open old cookies; it is a value, and rotation makes a new one.
"""

import base64
import binascii
import json
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from nts_core.aead import KEY_LENGTH, NONCE_LENGTH, Aead, AeadId, SessionKeys
from nts_core.errors import NotAuthentic, OutOfCookies, WireError

_VERSION = 1
_KEY_LENGTH = 32
_HEAD = struct.Struct("!BBH")
# What is not encrypted: version, algorithm and key id, and the nonce.
_CLEAR = _HEAD.size + NONCE_LENGTH
# What a client may hold, and what a server gives in one answer (section 5.7).
MAX_COOKIES = 8
# Longer ones do not fit NTP packets that pass the networks as they are; chrony keeps at most 256 octets.
MAX_COOKIE_LENGTH = 256

Random = Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class CookieKey:
    """One master key, its 16-bit identifier and when it was made (seconds since 1970)."""

    id: int
    made_at: int
    secret: bytes = field(repr=False)


class Keyring:
    """Master keys, the sealing one first; immutable."""

    __slots__ = ("_aeads", "_keys")

    def __init__(self, keys: tuple[CookieKey, ...]) -> None:
        if not keys or len({key.id for key in keys}) != len(keys):
            raise ValueError("a keyring needs keys with different ids")
        self._keys = keys
        self._aeads = {key.id: Aead(key.secret) for key in keys}

    @classmethod
    def new(cls, now: int, random: Random) -> Self:
        """A keyring with one fresh key; the id starts anywhere, so that a lost key file is noticed."""
        return cls((CookieKey(int.from_bytes(random(2), "big"), now, random(_KEY_LENGTH)),))

    @property
    def sealing_since(self) -> int:
        """When the sealing key was made."""
        return self._keys[0].made_at

    def rotated(self, now: int, random: Random, *, history: int) -> Self:
        """A keyring that seals with a fresh key and opens with at most `history` retired ones."""
        fresh = CookieKey((self._keys[0].id + 1) % 65536, now, random(_KEY_LENGTH))
        return type(self)((fresh, *self._keys[:history]))

    def seal(self, keys: SessionKeys, random: Random) -> bytes:
        """A new cookie for one client's session keys."""
        sealing = self._keys[0].id
        head, nonce = _HEAD.pack(_VERSION, keys.aead, sealing), random(NONCE_LENGTH)
        return head + nonce + self._aeads[sealing].seal(nonce, keys.c2s + keys.s2c, head)

    def open(self, cookie: bytes) -> SessionKeys:
        """The session keys in a cookie; NotAuthentic when no key of ours made it."""
        if len(cookie) < _CLEAR:
            raise NotAuthentic("a cookie that is too short")
        version, number, key = _HEAD.unpack_from(cookie)
        aead, length = self._aeads.get(key), KEY_LENGTH.get(number)
        if aead is None or version != _VERSION or length is None:
            raise NotAuthentic("a cookie of a key that is not ours")
        secret = aead.open(cookie[_HEAD.size : _CLEAR], cookie[_CLEAR:], cookie[: _HEAD.size])
        return SessionKeys(AeadId(number), secret[:length], secret[length:])

    def dump(self) -> bytes:
        """The file form; secret, and to be kept as such."""
        keys = [
            {"id": key.id, "made_at": key.made_at, "secret": base64.b64encode(key.secret).decode()}
            for key in self._keys
        ]
        return json.dumps({"version": _VERSION, "keys": keys}, indent=1).encode() + b"\n"

    @classmethod
    def load(cls, octets: bytes) -> Self:
        """The keyring in a file; WireError when the file is not one that `dump` wrote."""
        try:
            document = json.loads(octets)
            if document["version"] != _VERSION:
                raise WireError(f"cookie keys of version {document['version']!r}, not {_VERSION}")
            keys = tuple(
                CookieKey(int(key["id"]), int(key["made_at"]), base64.b64decode(key["secret"], validate=True))
                for key in document["keys"]
            )
            if any(len(key.secret) != _KEY_LENGTH or not 0 <= key.id < 65536 for key in keys):
                raise WireError("a cookie key with a wrong length or id")
            return cls(keys)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError, binascii.Error) as error:
            raise WireError(f"not a file of cookie keys: {error}") from None


class CookieJar:
    """The cookies a client holds for one server: each is used once, the oldest first, eight at most."""

    __slots__ = ("_cookies",)

    def __init__(self, cookies: tuple[bytes, ...] = ()) -> None:
        self._cookies: deque[bytes] = deque(maxlen=MAX_COOKIES)
        for cookie in cookies:
            self.add(cookie)

    def __len__(self) -> int:
        return len(self._cookies)

    def add(self, cookie: bytes) -> None:
        """Keep a cookie; one of no or of unusable length is not kept, and a full jar drops its oldest."""
        if 0 < len(cookie) <= MAX_COOKIE_LENGTH:
            self._cookies.append(cookie)

    def take(self) -> bytes:
        """The oldest cookie, which is gone then; OutOfCookies when there is none."""
        if not self._cookies:
            raise OutOfCookies("no cookies left: key establishment has to run again")
        return self._cookies.popleft()
