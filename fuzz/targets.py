"""The table of everything that is fuzzed."""

from fuzz import agent, dns, documents, ke, nameserver, ntp, registry, tls
from fuzz.target import Target, hold

TARGETS: dict[str, Target] = {
    target.name: target
    for module in (ke, ntp, tls, dns, nameserver, documents, agent, registry)
    for target in module.TARGETS
}


def _canary(data: bytes) -> str:
    # One octet after the other, so that only an engine that sees branches finds all.
    if data[:1] == b"b" and data[1:2] == b"a":
        hold(data[2:3] != b"d", "no input begins with bad")
    return "alive"


# Not in the table: its oracle does not hold, which proves that the engine finds such things.
CANARY = Target("canary", "No input begins with bad.", _canary, frozenset({"alive"}), longest=16)
