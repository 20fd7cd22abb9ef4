"""Which names and addresses on the network are the public's, and which are somebody's own."""

import ipaddress
import re

__all__ = ["is_host_pattern", "is_name", "is_public"]

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_NAME = re.compile(
    r"(?=.{1,253}$)([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?\.)+([a-z]{2,63}|xn--[a-z0-9-]+)"
)

# What `is_global` of one Python or another lets through. IANA's registries of special addresses
# (RFC 6890), and one cloud's metadata service on an address that looks public.
_REFUSED = tuple(
    ipaddress.ip_network(text)
    for text in (
        "192.0.0.0/24",  # protocol assignments, and Oracle's metadata service
        "192.88.99.0/24",  # 6to4 relays
        "168.63.129.16/32",  # Azure's wire server
        "2001::/23",  # Teredo, ORCHID and others: some carry an IPv4 address
        "2002::/16",  # 6to4: carries an IPv4 address
        "3fff::/20",  # documentation
    )
)
_UNICAST = ipaddress.IPv6Network("2000::/3")  # all that was ever given out
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # what a resolver of an IPv6-only network answers
_ISATAP = (0x00005EFE, 0x02005EFE)  # RFC 5214: the last half of an address that carries IPv4


def is_name(text: str) -> bool:
    """Whether a text is a whole name of the DNS, in small letters; no spelling of an address is."""
    return _NAME.fullmatch(text) is not None


def is_host_pattern(text: str) -> bool:
    """Whether a text may stand in a list of hosts: a name, "*.example.com", or "*"."""
    return text == "*" or is_name(text.lower().removeprefix("*."))


def is_public(text: str) -> bool:
    """Whether an address, as a resolver gives it, is one that anybody on the internet may reach.

    Another form of an IPv4 address (IPv4-mapped, NAT64) is judged by that; forms that nobody needs
    any more (IPv4-compatible, 6to4, Teredo, ISATAP) are refused, and so is what is no address.
    """
    try:
        address: Address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            return False
        if address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        elif address in _NAT64:
            address = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        elif address not in _UNICAST or (int(address) >> 32) & 0xFFFFFFFF in _ISATAP:
            return False
    return (
        address.is_global
        and not address.is_multicast
        and not address.is_reserved
        and not any(
            address in network for network in _REFUSED if network.version == address.version
        )
    )
