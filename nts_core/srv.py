"""The SRV answer of a pool (RFC 2782): its owner, whose targets are the pool's own, and how many it holds. Pure.

It stays within one datagram that no path has to fragment, so that of a large pool it is a part, drawn anew each TTL.
"""

MAX_LABEL = 36  # characters of a server's name; longer ones that there are already go on to work
MAX_TARGETS, MIN_TARGETS = 8, 4  # with fewer a client could not tell who is right
ANSWER_OCTETS = 1232


def service_name(pool: str) -> str:
    """Where a pool lists its servers; absolute, as no search list may lead it elsewhere."""
    return f"_ntske._tcp.{pool}."


def is_own(target: str, pool: str) -> bool:
    """Whether a target's name (lower-case, no final dot) is one that the pool gives."""
    label, _, parent = target.partition(".")
    return bool(label) and parent == f"servers.{pool}"


def targets_that_fit(pool: str) -> int:
    """How many servers an SRV answer of a pool holds, with the longest names; MAX_TARGETS at most.

    Signed with P-256, and with room for a DNS cookie (RFC 7873) in its OPT.
    """
    apex = len(pool) + 2  # octets on the wire
    header, question = 12, 12 + apex + 4
    signature = 2 + 10 + 18 + apex + 64
    options = 11 + 4 + 24
    target = 2 + 10 + 6 + (1 + MAX_LABEL) + 8 + apex  # not compressed (RFC 2782)
    return min(MAX_TARGETS, (ANSWER_OCTETS - header - question - signature - options) // target)
