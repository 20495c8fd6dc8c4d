"""16-bit integers and padding, in network byte order."""

from nts_core.errors import WireError


def uint16(value: int) -> bytes:
    return value.to_bytes(2, "big")


def uint16_list(body: bytes | bytearray) -> tuple[int, ...]:
    """A body that is a sequence of 16-bit integers; WireError when a half is left over."""
    if len(body) % 2:
        raise WireError(f"a list of 16-bit integers has {len(body)} octets")
    return tuple(int.from_bytes(body[i : i + 2], "big") for i in range(0, len(body), 2))


def pad4(octets: bytes) -> bytes:
    """`octets` with zeroes up to the next multiple of four."""
    missing = -len(octets) % 4
    return octets + bytes(missing) if missing else octets
