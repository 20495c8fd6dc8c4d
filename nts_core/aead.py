"""AEAD algorithms as NTS uses them (RFC 8915 section 5.1; RFC 5297).

`cryptography` before 45 refuses AES-SIV with an empty plaintext, which is every NTS request: hence the floor
in pyproject.toml and the check in the tests.
"""

from dataclasses import dataclass
from enum import IntEnum

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV

from nts_core.errors import NotAuthentic

TAG_LENGTH = 16
NONCE_LENGTH = 16


class AeadId(IntEnum):
    """Numeric identifiers from the IANA AEAD registry."""

    AES_SIV_CMAC_256 = 15


# Key length in octets of each algorithm that this package speaks.
KEY_LENGTH = {AeadId.AES_SIV_CMAC_256: 32}


@dataclass(frozen=True, slots=True, repr=False)
class SessionKeys:
    """What key establishment agreed on: the algorithm and one key a direction."""

    aead: AeadId
    c2s: bytes
    s2c: bytes


class Aead:
    """One key of AES-SIV-CMAC; the synthetic tag precedes the ciphertext, as on the wire."""

    __slots__ = ("_siv",)

    def __init__(self, key: bytes) -> None:
        self._siv = AESSIV(key)

    def seal(self, nonce: bytes, plaintext: bytes, associated_data: bytes) -> bytes:
        return self._siv.encrypt(plaintext, [associated_data, nonce])

    def open(self, nonce: bytes, ciphertext: bytes, associated_data: bytes) -> bytes:
        """The plaintext; NotAuthentic when key, nonce, data or tag do not belong together."""
        if len(ciphertext) < TAG_LENGTH:
            raise NotAuthentic("a ciphertext shorter than its tag")
        try:
            return self._siv.decrypt(ciphertext, [associated_data, nonce])
        except InvalidTag:
            raise NotAuthentic("the authenticator does not match") from None
