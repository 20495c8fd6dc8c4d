"""AEAD algorithms as NTS uses them (RFC 8915 section 5.1; RFC 5297 and RFC 8452).

`cryptography` before 45 refuses AES-SIV with an empty plaintext, which is every NTS request: hence the floor
in pyproject.toml and the check in the tests. AES-GCM-SIV needs OpenSSL 3.2; where it is missing, `SUPPORTED`
says so and everything else works.
"""

from enum import IntEnum
from typing import NamedTuple

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV, AESSIV

from nts_core.errors import NotAuthentic

TAG_LENGTH = 16


class AeadId(IntEnum):
    """Numeric identifiers from the IANA AEAD registry."""

    AES_SIV_CMAC_256 = 15
    AES_SIV_CMAC_384 = 16
    AES_SIV_CMAC_512 = 17
    AES_128_GCM_SIV = 30


# Octets of a key of each algorithm.
KEY_LENGTH: dict[int, int] = {
    AeadId.AES_SIV_CMAC_256: 32,
    AeadId.AES_SIV_CMAC_384: 48,
    AeadId.AES_SIV_CMAC_512: 64,
    AeadId.AES_128_GCM_SIV: 16,
}
# Octets of the nonces that we draw. They are section 5.6's N_REQ as well: 16, or the algorithm's longest if that
# is less. AES-SIV takes a nonce of any length, AES-GCM-SIV one of 12 octets only.
NONCE_LENGTH: dict[int, int] = {
    AeadId.AES_SIV_CMAC_256: 16,
    AeadId.AES_SIV_CMAC_384: 16,
    AeadId.AES_SIV_CMAC_512: 16,
    AeadId.AES_128_GCM_SIV: 12,
}


def _has_gcm_siv() -> bool:
    try:
        AESGCMSIV(bytes(16))
    except UnsupportedAlgorithm:
        return False
    return True


# What this machine can do. AES-GCM-SIV comes first: its cookies and packets are the shortest, and some networks
# drop long NTP packets; AES-SIV-CMAC-256 is what everybody speaks (section 5.1).
SUPPORTED: tuple[AeadId, ...] = tuple(
    algorithm
    for algorithm in (
        AeadId.AES_128_GCM_SIV,
        AeadId.AES_SIV_CMAC_256,
        AeadId.AES_SIV_CMAC_512,
        AeadId.AES_SIV_CMAC_384,
    )
    if algorithm != AeadId.AES_128_GCM_SIV or _has_gcm_siv()
)


def parse_algorithms(text: str) -> tuple[AeadId, ...]:
    """Algorithms as people write them: numbers or IANA's names without AEAD_, with commas between.

    Raises ValueError that says what is known.
    """
    by_word = {
        word: algorithm
        for algorithm in SUPPORTED
        for word in (str(algorithm.value), algorithm.name, algorithm.name.replace("_", "-"))
    }
    chosen: list[AeadId] = []
    for word in text.split(","):
        algorithm = by_word.get(word.strip().upper().removeprefix("AEAD_"))
        if algorithm is None:
            known = ", ".join(f"{each.value} ({each.name.replace('_', '-')})" for each in SUPPORTED)
            raise ValueError(f"{word.strip()!r} is not an AEAD algorithm known here; known are {known}")
        if algorithm not in chosen:
            chosen.append(algorithm)
    return tuple(chosen)


class SessionKeys(NamedTuple):
    """What key establishment agreed on: the algorithm and one key a direction. Not to be shown."""

    aead: AeadId
    c2s: bytes
    s2c: bytes

    def __repr__(self) -> str:
        return f"SessionKeys({self.aead.name})"


class Aead:
    """One key of one algorithm. Ciphertext and tag are one string, in the order that the algorithm defines."""

    __slots__ = ("_gcm_siv", "_siv")

    def __init__(self, algorithm: int, key: bytes) -> None:
        self._siv: AESSIV | None = None
        if algorithm == AeadId.AES_128_GCM_SIV:
            self._gcm_siv = AESGCMSIV(key)
        else:
            self._siv = AESSIV(key)

    def seal(self, nonce: bytes, plaintext: bytes, associated_data: bytes) -> bytes:
        """The ciphertext, `TAG_LENGTH` octets longer than the plaintext."""
        if self._siv is not None:
            return self._siv.encrypt(plaintext, [associated_data, nonce])
        return self._gcm_siv.encrypt(nonce, plaintext, associated_data)

    def open(self, nonce: bytes, ciphertext: bytes, associated_data: bytes) -> bytes:
        """The plaintext; NotAuthentic when key, nonce, data or tag do not belong together."""
        try:
            if self._siv is not None:
                return self._siv.decrypt(ciphertext, [associated_data, nonce])
            return self._gcm_siv.decrypt(nonce, ciphertext, associated_data)
        except (InvalidTag, ValueError):
            # A ValueError is a nonce of a length that the algorithm does not have.
            raise NotAuthentic("the authenticator does not match") from None
