"""The SRV answer of a pool (RFC 2782): its owner, whose targets are the pool's own, and how many it holds. Pure.

It stays within one datagram that no path has to fragment, so that of a large pool it is a part, drawn anew each TTL.
"""

MAX_LABEL = 36  # characters of a server's name; longer ones that there are already go on to work
MAX_TARGETS, MIN_TARGETS = 8, 4  # with fewer a client could not tell who is right
ANSWER_OCTETS = 1232
_REGION = len("north-america") + 1  # octets of the longest label that a region of a pool has in front


def service_name(pool: str) -> str:
    """Where a pool lists its servers; absolute, as no search list may lead it elsewhere."""
    return f"_ntske._tcp.{pool}."


def is_own(target: str, pool: str) -> bool:
    """Whether a target's name (lower-case, no final dot) is one that the pool gives."""
    label, _, parent = target.partition(".")
    return bool(label) and parent == f"servers.{pool}"


def is_own_around(target: str, pool: str) -> bool:
    """The same, where the pool's name may be that of a region: `europe.pool.example` has the servers of `pool.example`.

    Only for an answer that is proved. Of a name alone nobody can tell which label is a region's: for a pool `de.example` that
    would let in whoever has `servers.example`.
    """
    return is_own(target, pool) or is_own(target, pool.partition(".")[2])


def targets_that_fit(pool: str) -> int:
    """How many servers an SRV answer of a pool, or of a region of it, holds, with the longest names; MAX_TARGETS at most.

    Signed with P-256, and with room for a DNS cookie (RFC 7873) in its OPT.
    """
    apex = len(pool) + 2  # octets on the wire
    header, question = 12, 12 + _REGION + apex + 4
    signature = 2 + 10 + 18 + apex + 64
    options = 11 + 4 + 24
    target = 2 + 10 + 6 + (1 + MAX_LABEL) + 8 + apex  # not compressed (RFC 2782)
    return min(MAX_TARGETS, (ANSWER_OCTETS - header - question - signature - options) // target)
