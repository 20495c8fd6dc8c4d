"""How often one address and one token may ask. Each process counts for itself, in bounded memory."""

import secrets
import time
from ipaddress import ip_address

from nts_core.ratelimit import RateLimiter
from poolsvc.errors import RateLimited

_SECOND = 1_000_000_000


class Limits:
    """Token buckets for addresses, of those that name no valid token too, and for tokens."""

    def __init__(self, *, per_address: float, per_token: float, burst: int) -> None:
        """`per_address` and `per_token` are requests a second on average, `burst` how many at once."""
        self._addresses = RateLimiter(round(_SECOND / per_address), burst, secrets.token_bytes)
        self._tokens = RateLimiter(round(_SECOND / per_token), burst, secrets.token_bytes)

    def take_for_address(self, host: str) -> None:
        """Raise RateLimited when the address, or its /64, has used up its share."""
        try:
            address = ip_address(host)
        except ValueError:
            return  # no address: a socket of this host
        if not self._addresses.take(address.packed, time.monotonic_ns()):
            raise _refusal("address")

    def take_for_token(self, token_id: int) -> None:
        """Raise RateLimited when the token has used up its share."""
        if not self._tokens.take(token_id.to_bytes(4, "big"), time.monotonic_ns()):
            raise _refusal("token")


def _refusal(whose: str) -> RateLimited:
    return RateLimited(f"too many requests of one {whose}", remedy="wait a second, and ask less often")
