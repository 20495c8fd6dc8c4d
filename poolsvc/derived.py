"""Secrets that are derived from the registry's key, and so never stored.

Links in mails, webhook secrets and the state of a detour by an OpenID provider are HMACs of what they are for. Who
reads the database learns none of them; who replaces the key makes all of them useless at once.
"""

import base64
import hashlib
import hmac
import secrets
from datetime import datetime
from enum import StrEnum
from pathlib import Path

from nts_core.shell import make_file, replace_file

_KEY_LENGTH = 32
_TAG_LENGTH = 24
_OPERATOR_LENGTH = 8
_MAX_DIGITS = 16


class Purpose(StrEnum):
    """What a secret is good for; one of one purpose is never one of another."""

    SIGN_IN = "sign-in"
    INVITATION = "invitation"
    WEBHOOK = "webhook"
    WEBHOOK_CHALLENGE = "webhook-challenge"
    REJOIN = "rejoin"
    MAIL_RECIPIENT = "mail-recipient"
    OIDC_STATE = "oidc-state"
    OIDC_NONCE = "oidc-nonce"
    OIDC_VERIFIER = "oidc-verifier"
    OIDC_BINDING = "oidc-binding"
    OPERATOR_ID = "operator-id"
    VANTAGE = "vantage"


class RegistryKey:
    """The key of one registry; all its processes share the file."""

    def __init__(self, key: bytes) -> None:
        if len(key) != _KEY_LENGTH:
            raise ValueError(f"the registry's key has {len(key)} octets instead of {_KEY_LENGTH}")
        self._key = key

    @classmethod
    def load(cls, file: Path) -> "RegistryKey":
        """The key in a file, made if there is none. Raises OSError, ValueError."""
        if not file.exists():
            make_file(file, base64.b64encode(secrets.token_bytes(_KEY_LENGTH)))
        return cls(base64.b64decode(file.read_text(), validate=True))

    @staticmethod
    def renew(file: Path) -> None:
        """A new key in the file: every link, and every webhook's secret, made with the old one is void."""
        replace_file(file, base64.b64encode(secrets.token_bytes(_KEY_LENGTH)))

    def secret(self, purpose: Purpose, *parts: int | str) -> bytes:
        """32 octets that nobody without the key can know."""
        message = "\n".join((purpose, *map(str, parts))).encode()
        return hmac.digest(self._key, message, hashlib.sha256)

    def operator_id(self, member: int) -> str:
        """What everybody may call a member: it tells nothing of it, and is no key to anything. 13 characters."""
        octets = self.secret(Purpose.OPERATOR_ID, member)[:_OPERATOR_LENGTH]
        return base64.b32encode(octets).decode().rstrip("=").lower()

    def token(self, purpose: Purpose, identifier: int) -> str:
        """A text that proves having been told of a row: its key, and a tag. Only for keys that never come again."""
        tag = self.secret(purpose, identifier)[:_TAG_LENGTH]
        return f"{identifier}.{base64.urlsafe_b64encode(tag).decode()}"

    def read(self, purpose: Purpose, token: str) -> int | None:
        """The id in a text made by `token`; None when it is not one."""
        head, _, _ = token.partition(".")
        if not (head.isascii() and head.isdigit() and len(head) <= _MAX_DIGITS):
            return None
        identifier = int(head)
        right = hmac.compare_digest(self.token(purpose, identifier).encode(), token.encode())
        return identifier if right else None

    def challenge(self, purpose: Purpose, subject: str, until: datetime) -> str:
        """A text that is good for one subject until a time; nothing of it need be kept."""
        end = int(until.timestamp())
        tag = self.secret(purpose, subject, end)[:_TAG_LENGTH]
        return f"{end}.{base64.urlsafe_b64encode(tag).decode()}"

    def is_challenge(self, purpose: Purpose, subject: str, text: str, now: datetime) -> bool:
        """Whether `challenge` made the text for this subject, and its time has not passed."""
        head, _, _ = text.partition(".")
        if (
            not (head.isascii() and head.isdigit() and len(head) <= _MAX_DIGITS)
            or int(head) <= now.timestamp()
        ):
            return False
        tag = self.secret(purpose, subject, int(head))[:_TAG_LENGTH]
        return hmac.compare_digest(f"{head}.{base64.urlsafe_b64encode(tag).decode()}".encode(), text.encode())
