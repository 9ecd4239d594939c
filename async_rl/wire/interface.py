"""Which network interface of this machine ranks of the trainer talk over, where they are on several machines.

gloo and NCCL ask for the name of an interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME), which may be another on each
machine. `trainer.network` says it once for all: names in order of preference, or a network that one address of each
machine is in. Linux only."""

from __future__ import annotations

import array
import fcntl
import ipaddress
import socket
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from async_rl.errors import UserError

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_SIOCGIFCONF = 0x8912
_MOST = 1024
_ENTRY = struct.calcsize("16sQQQ")
"""bytes of struct ifreq on a 64-bit machine"""
_IPV6 = Path("/proc/net/if_inet6")


def network_of(text: str) -> Network | None:
    """The network that a setting names, e.g. 10.0.0.0/8; None where it holds names of interfaces. Raises ValueError
    for one that cannot be."""
    return ipaddress.ip_network(text, strict=False) if "/" in text else None


def names_in(text: str) -> list[str]:
    """Names of interfaces, in order of preference. Example: `ib0,eth0` -> `["ib0", "eth0"]`."""
    return [name.strip() for name in text.split(",")]


def addresses() -> list[tuple[str, Address]]:
    """(interface, address) of this machine, in the system's order."""
    found: list[tuple[str, Address]] = []
    buffer = array.array("B", bytes(_MOST * _ENTRY))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        asked = struct.pack("iL", len(buffer), buffer.buffer_info()[0])
        (size,) = struct.unpack_from("i", fcntl.ioctl(probe.fileno(), _SIOCGIFCONF, asked))
    content = buffer.tobytes()
    for at in range(0, size, _ENTRY):
        name = content[at : at + 16].split(b"\0", 1)[0].decode().partition(":")[0]
        found.append((name, ipaddress.IPv4Address(content[at + 20 : at + 24])))
    if _IPV6.exists():
        for line in _IPV6.read_text().splitlines():
            packed, *_, name = line.split()
            found.append((name, ipaddress.IPv6Address(int(packed, 16))))
    return found


def choose_interface(text: str, there: Sequence[tuple[str, Address]], names: Sequence[str]) -> str:
    """The interface that `trainer.network` means on a machine with these addresses and interfaces. Raises UserError
    where it has none."""
    network = network_of(text)
    wanted = [name for name, address in there if address in network] if network is not None else names_in(text)
    for name in wanted:
        if name in names:
            return name
    shown = ", ".join(f"{name} {address}" for name, address in there) or "none"
    raise UserError(
        f"trainer.network is {text}, but this machine ({socket.gethostname()}) has no such interface; it has: {shown}"
    )


def interface_variables(text: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that gloo and NCCL are to be given here; those that are in `environment` already stay. Raises
    UserError."""
    missing = [name for name in VARIABLES if not environment.get(name)]
    if not text or not missing:
        return {}
    chosen = choose_interface(text, addresses(), [name for _, name in socket.if_nameindex()])
    return dict.fromkeys(missing, chosen)
