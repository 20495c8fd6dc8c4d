"""Server names and addresses: what may be registered. Pure.

A server name is one RFC 1123 label, short enough that eight SRV targets fit a signed answer (`nts_core.srv`). An
address is unicast and globally routable, unless the demo or a test allows private ones.
"""

import ipaddress
import re
from collections.abc import Sequence

from nts_core.routed import IpAddress, is_global_unicast, is_hiding
from nts_core.srv import MAX_LABEL, MAX_TARGETS, targets_that_fit
from poolsvc.errors import InvalidAddress, InvalidName, ReservedName

MAX_ADDRESSES = 8
_SHOWN = 80  # characters of what was refused
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?")
DOMAIN = re.compile(r"(?=.{1,253}$)(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z0-9-]{2,63}")
# Names that people or programs take for the pool's own.
RESERVED = frozenset(
    {
        *("abuse", "acme", "admin", "administrator", "api", "autoconfig", "autodiscover", "ca", "dns", "ftp"),
        *("hostmaster", "imap", "info", "isatap", "localhost", "mail", "monitor", "mta-sts", "mx", "ntp"),
        *("nts", "ntske", "operator", "pool", "pop", "postmaster", "registry", "root", "security", "servers"),
        *("smtp", "ssl", "status", "support", "time", "tls", "webmaster", "wpad", "www", "ns", "ns1", "ns2"),
    }
)

# What a hurried eye takes for each other; host names are shown in capitals too, where I is l.
_LOOKS = str.maketrans("015i", "olsl")
_PAIRS = (("rn", "m"), ("vv", "w"))


def is_label(name: str) -> bool:
    """Whether anything could ever have been registered under this name."""
    return len(name) <= MAX_LABEL and _LABEL.fullmatch(name.lower()) is not None


def check_name(name: str) -> str:
    """The name in lower case. Raises InvalidName or ReservedName."""
    lowered = name.strip().lower()
    if not name.isascii() or lowered.startswith("xn--"):
        raise InvalidName(
            f"the name {name!r} is internationalised",
            remedy="use letters a to z, digits and hyphens",
            field="name",
        )
    if len(lowered) > MAX_LABEL:
        raise InvalidName(
            f"the name {lowered[:_SHOWN]!r} has {len(lowered)} characters",
            remedy=f"use {MAX_LABEL} characters at most",
            field="name",
        )
    if not lowered or not _LABEL.fullmatch(lowered):
        raise InvalidName(
            f"the name {name!r} is not a host label",
            remedy=f"use 1 to {MAX_LABEL} letters, digits and hyphens, with no hyphen at either end",
            field="name",
        )
    if lowered in RESERVED:
        raise ReservedName(f"the name {lowered!r} is reserved", remedy="choose another name", field="name")
    return lowered


def narrowness(pool: str) -> str | None:
    """What an operator is told whose pool's name leaves room for fewer servers, if it does."""
    fit = targets_that_fit(pool)
    if fit == MAX_TARGETS:
        return None
    return f"the name {pool} is long: an SRV answer holds {fit} servers with it instead of {MAX_TARGETS}"


def skeleton(name: str) -> str:
    """Equal for names that look alike: what a server name and a forgery of it have in common.

    0 is o, 1 and i are l, 5 is s; hyphens do not count; then rn is m and vv is w. (The idea of Unicode's UTS 39,
    for the 37 characters of a label. Pairs such as cl for d are left out: they would refuse more honest names
    than forgeries.)
    """
    text = name.lower().translate(_LOOKS).replace("-", "")
    for pair, single in _PAIRS:
        text = text.replace(pair, single)
    return text


def reserved_lookalike(name: str) -> str | None:
    """The reserved name that a name looks like, if any."""
    return _RESERVED_SKELETONS.get(skeleton(name))


_RESERVED_SKELETONS = {skeleton(name): name for name in sorted(RESERVED)}


def check_addresses(texts: Sequence[str], *, allow_private: bool) -> list[str]:
    """The addresses in canonical form. Raises InvalidAddress that says which one and why."""
    if not 1 <= len(texts) <= MAX_ADDRESSES:
        raise InvalidAddress(
            f"{len(texts)} addresses", remedy=f"give 1 to {MAX_ADDRESSES} addresses", field="addresses"
        )
    checked = [str(check_address(text, allow_private=allow_private)) for text in texts]
    if len(set(checked)) != len(checked):
        raise InvalidAddress("an address is listed twice", remedy="list each address once", field="addresses")
    return checked


def check_address(text: str, *, allow_private: bool) -> IpAddress:
    """One address, to be dialled and published. Raises InvalidAddress."""
    try:
        address = ipaddress.ip_address(text.strip())
    except ValueError:
        raise InvalidAddress(
            f"{text!r} is not an IP address",
            remedy="give IPv4 or IPv6 addresses, not names",
            field="addresses",
        ) from None
    if getattr(address, "scope_id", None) or is_hiding(address):
        raise InvalidAddress(
            f"{text} hides another address or a zone", remedy="give the plain address", field="addresses"
        )
    if address.is_multicast or address.is_unspecified or str(address) == "255.255.255.255":
        raise InvalidAddress(
            f"{text} is not a unicast address", remedy="give the host's address", field="addresses"
        )
    if not allow_private and not is_global_unicast(address):
        raise InvalidAddress(
            f"{text} is not a public address",
            remedy="give the address by which the Internet reaches the server",
            field="addresses",
        )
    return address
