"""P-256 keys that everybody can have: those that standards print as examples, and the smallest numbers. Pure."""

import base64
from functools import cache

from cryptography.hazmat.primitives.asymmetric import ec

# Private keys, as they are printed.
PUBLISHED = {
    "RFC 5903 section 8.1, initiator": "C88F01F510D9AC3F70A292DAA2316DE544E9AAB8AFE84049C62A9C57862D1433",
    "RFC 5903 section 8.1, responder": "C6EF9C5D78AE012A011164ACB397CE2088685D8F06BF9BE0B283AB46476BEE53",
    "RFC 6979 appendix A.2.5": "C9AFA9D845BA75166B5C215767B1D6934E50C3DB36E89B127B8A622B120F6721",
    "RFC 7515 appendix A.3": "jpsQnnGQmL-YBIffH1136cspYG6-0iY7X1fCE9-E9LI",
    "RFC 7517 appendix A.2": "870MB6gfuTJ4HtUnUvYMyJpr5eUZNP4Bk43bVdj3eAE",
    "RFC 7518 appendix C, Alice": "0_NxaRPUMQoAJt50Gz8YiTr8gRTwyEaCumd-MToTmIo",
    "RFC 7518 appendix C, Bob": "VEmDZpDXXK8p8N0Cndsxs924q6nS1RXFASRl6BfUqdw",
    "RFC 9500 section 2.3": "E6CB5BDD80AA45AE9C95E8C15476679FFEC953C16851E711E743939589C64FC1",
}
SMALLEST = 1024  # private keys from 1 on, and their negatives


def is_known(key: ec.EllipticCurvePublicKey) -> bool:
    """Whether others have the private key of this P-256 key."""
    return key.public_numbers().x in _known()


@cache
def _known() -> frozenset[int]:
    """By the x coordinate, which a key shares with its negative."""
    numbers = [*range(1, SMALLEST + 1), *map(scalar, PUBLISHED.values())]
    curve = ec.SECP256R1()
    return frozenset(
        ec.derive_private_key(number, curve).public_key().public_numbers().x for number in numbers
    )


def scalar(text: str) -> int:
    """A private key in hex, or in base64url as in JSON Web Keys."""
    return int(text, 16) if len(text) == 64 else int.from_bytes(base64.urlsafe_b64decode(text + "="))
