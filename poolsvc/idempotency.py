"""Requests that may come twice and must take effect once: the `Idempotency-Key` of draft-ietf-httpapi-idempotency-key.

The answer is kept in the transaction of what it answers, so there is never one without the other. Answers hold
secrets that are shown once, such as join tokens; so what is kept is sealed with a key made of the sender's token and
its idempotency key, neither of which is in the database. A key is good for a day.
"""

import hashlib
import os
import re
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from poolsvc.errors import IdempotencyMismatch, InvalidIdempotencyKey
from poolsvc.models import IdempotencyKey

LIFE = timedelta(days=1)
_KEY = re.compile(r'"?([!#-\[\]-~]{8,128})"?')
_NONCE_LENGTH = 12
_FORGET_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class Answer:
    """What was answered the first time."""

    status: int
    body: bytes = field(repr=False)


class Once:
    """One request of one sender under one key."""

    def __init__(self, key: str, *, secret: str, request: bytes) -> None:
        """`secret` is the sender's token, `request` all that makes the request what it is.

        Raises InvalidIdempotencyKey.
        """
        match = _KEY.fullmatch(key)
        if match is None:
            raise InvalidIdempotencyKey(
                "the idempotency key is not 8 to 128 printable characters",
                remedy="send a new UUID with each new request, and the same one when you repeat it",
                field="Idempotency-Key",
            )
        both = f"{len(secret)}:{secret}{match[1]}".encode()
        self._row_key = hashlib.sha256(b"row" + both).hexdigest()
        self._request = hashlib.sha256(request).hexdigest()
        self._cipher = AESGCM(HKDF(SHA256(), 32, salt=None, info=b"truechimer idempotency v1").derive(both))

    async def recall(self, session: AsyncSession, now: datetime) -> Answer | None:
        """The answer that was given before, if any. Raises IdempotencyMismatch when it was to another request."""
        row = await session.scalar(
            select(IdempotencyKey).where(
                IdempotencyKey.key_sha256 == self._row_key, IdempotencyKey.created_at > now - LIFE
            )
        )
        if row is None:
            return None
        if row.request_sha256 != self._request:
            raise IdempotencyMismatch(
                "the idempotency key was used for another request",
                remedy="send a new key with each new request",
                field="Idempotency-Key",
            )
        nonce, sealed = row.sealed[:_NONCE_LENGTH], row.sealed[_NONCE_LENGTH:]
        try:
            return Answer(row.status, self._cipher.decrypt(nonce, sealed, None))
        except InvalidTag:
            raise IdempotencyMismatch(
                "the answer that was kept cannot be read", remedy="look whether the request took effect"
            ) from None

    async def remember(self, session: AsyncSession, answer: Answer, now: datetime) -> None:
        """Keep the answer. A request that came at the same moment fails to, and is rolled back with all it did."""
        await session.execute(
            delete(IdempotencyKey).where(
                IdempotencyKey.key_sha256 == self._row_key, IdempotencyKey.created_at <= now - LIFE
            )
        )
        nonce = os.urandom(_NONCE_LENGTH)
        session.add(
            IdempotencyKey(
                key_sha256=self._row_key,
                request_sha256=self._request,
                status=answer.status,
                sealed=nonce + self._cipher.encrypt(nonce, answer.body, None),
                created_at=now,
            )
        )
        await session.flush()


async def forget_old(session: AsyncSession, now: datetime) -> None:
    """Drop answers older than a day, a thousand at a time."""
    old = (
        select(IdempotencyKey.key_sha256)
        .where(IdempotencyKey.created_at <= now - LIFE)
        .limit(_FORGET_AT_ONCE)
    )
    await session.execute(delete(IdempotencyKey).where(IdempotencyKey.key_sha256.in_(old)))
