"""This host's network interfaces: which of them lead to the other ranks' hosts."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
from collections.abc import Iterable, Sequence

_SIOCGIFADDR = 0x8915  # Linux: the address of a network interface


def own_addresses() -> list[str]:
    """Return the IPv4 addresses of this host's interfaces: its name may stand for a loopback address (Debian)."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, interface in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface[:15].encode()))
                found.append(socket.inet_ntoa(answer[20:24]))
    return [address for address in found if not address.startswith("127.")]


def addresses_towards(hosts: Iterable[Sequence[str]], own: Sequence[str]) -> list[str]:
    """Return those of this host's own addresses from which it would send to other hosts. Sends nothing.

    An address that this host has as well, as of a container bridge that every host has, leads nowhere.

    Args:
        hosts: addresses of each other host.
        own: addresses of this one.
    """
    found: dict[str, None] = {}
    for target in {address for addresses in hosts for address in addresses} - set(own):
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))
            found[probe.getsockname()[0]] = None
    return sorted(found)
