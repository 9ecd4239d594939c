"""Which interface ranks talk over: by a network or by names."""

from __future__ import annotations

import socket
from ipaddress import ip_address

import pytest

from async_rl.errors import UserError
from async_rl.wire.interface import VARIABLES, addresses, choose_interface, interface_variables

THERE = [
    ("lo", ip_address("127.0.0.1")), ("eth0", ip_address("10.1.2.3")), ("ib0", ip_address("192.168.7.3")),
    ("lo", ip_address("::1")), ("eth0", ip_address("fd00::3")),
]  # fmt: skip
NAMES = ["lo", "eth0", "ib0", "ib1"]


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("10.0.0.0/8", "eth0"),
        ("192.168.7.9/24", "ib0"),  # any address of the network says which one is meant
        ("fd00::/8", "eth0"),
        ("ib0", "ib0"),
        ("ib9, ib1,eth0", "ib1"),  # one without an address yet is for the library to judge
    ],
)
def test_one_setting_means_another_interface_on_each_machine(text: str, chosen: str) -> None:
    assert choose_interface(text, THERE, NAMES) == chosen


@pytest.mark.parametrize("text", ["172.16.0.0/12", "ib9", "fe80::/10"])
def test_a_machine_without_it_says_what_it_has(text: str) -> None:
    with pytest.raises(UserError, match=r"trainer.network is .*no such interface; it has: lo 127.0.0.1, eth0 10.1.2.3"):
        choose_interface(text, THERE, NAMES)


def test_this_machine_has_a_loopback_and_the_environment_comes_first() -> None:
    loopback = next(name for name, address in addresses() if address.is_loopback)
    assert loopback in [name for _, name in socket.if_nameindex()]
    assert interface_variables("127.0.0.0/8", {}) == dict.fromkeys(VARIABLES, loopback)
    assert interface_variables("", {}) == {}
    assert interface_variables("127.0.0.0/8", {VARIABLES[0]: "eth7"}) == {VARIABLES[1]: loopback}
    assert interface_variables("none-such", dict.fromkeys(VARIABLES, "eth7")) == {}
