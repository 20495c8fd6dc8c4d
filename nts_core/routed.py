"""Which addresses the Internet routes to one host. Pure."""

import ipaddress

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_IPV6_UNICAST = ipaddress.ip_network("2000::/3")
# Ways to write an IPv4 address as an IPv6 one: mapped, NAT64 (two prefixes), Teredo, 6to4.
_HIDING = tuple(
    map(ipaddress.ip_network, ("::ffff:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "2001::/32", "2002::/16"))
)
# Set aside by IANA without being private: protocols' own, 6to4 relays, future use, documentation.
_NOT_ROUTED = tuple(
    map(
        ipaddress.ip_network,
        ("192.0.0.0/24", "192.88.99.0/24", "224.0.0.0/3", "2001::/23", "3fff::/20"),
    )
)


def is_hiding(address: IpAddress) -> bool:
    """Whether it is another way to write an IPv4 address."""
    return any(address in network for network in _HIDING)


def is_global_unicast(address: IpAddress) -> bool:
    """What the Internet routes to one host; stricter than `is_global`, whose lists age with Python."""
    if address.version == 6 and address not in _IPV6_UNICAST:
        return False
    return address.is_global and not any(address in network for network in _NOT_ROUTED)
