"""Two hosts and the network between them: name spaces of the kernel, and packets that are lost, late and out of order.

The kernel's own emulator (tc netem) is often not there, so the packets go through this process: each host has a TUN
device, and what comes out of one is put into the other, as `Weather` says. TCP, ZeroMQ and CURVE above are the real
ones. Only root may make such hosts.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import select
import struct
import subprocess
import threading
import time
from dataclasses import dataclass, field
from random import Random

TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
LONGEST_PACKET = 1 << 16
ADDRESSES = ("10.77.31.1", "10.77.31.2")


@dataclass(slots=True)
class Weather:
    """What happens to a packet."""

    loss: float = 0.0
    """share that never arrives"""
    delay_s: tuple[float, float] = (0.0, 0.0)
    """between these; a packet overtakes another whose delay is longer"""
    parted: bool = False
    """nothing arrives"""


@dataclass
class TwoHosts:
    """Host 0 and host 1, with one address each and a loopback of their own."""

    seed: int = 0
    weather: Weather = field(default_factory=Weather)
    lost: int = 0
    carried: int = 0
    overtaken: int = 0
    """packets that arrived before one that was sent earlier"""

    def __post_init__(self) -> None:
        self.names = [f"async-rl-{os.getpid()}-{number}" for number in range(2)]
        self.tuns: list[int] = []
        self._over = threading.Event()
        self._random = Random(self.seed)

    def __enter__(self) -> TwoHosts:
        """Raises OSError or CalledProcessError where such hosts cannot be made."""
        try:
            for number, (name, address) in enumerate(zip(self.names, ADDRESSES, strict=True)):
                _ip("netns", "add", name)
                tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
                self.tuns.append(tun)
                device = f"arl{os.getpid() % 100_000}n{number}"
                fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH", device.encode(), IFF_TUN | IFF_NO_PI))
                _ip("link", "set", device, "netns", name)
                _ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
                _ip("-n", name, "link", "set", device, "up")
                _ip("-n", name, "link", "set", "lo", "up")
        except BaseException:
            self.__exit__()
            raise
        self._thread = threading.Thread(target=self._carry, name="network", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if hasattr(self, "_thread"):
            self._thread.join(5)
        for tun in self.tuns:
            os.close(tun)
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def command(self, host: int) -> list[str]:
        """What a command begins with that runs on this host."""
        return ["ip", "netns", "exec", self.names[host]]

    def _carry(self) -> None:
        ahead: list[tuple[float, int, int, bytes]] = []
        number, newest = 0, 0
        while not self._over.is_set():
            wait = max(0.0, min(ahead[0][0] - time.monotonic(), 0.05)) if ahead else 0.05
            ready, _, _ = select.select(self.tuns, [], [], wait)
            for tun in ready:
                try:
                    packet = os.read(tun, LONGEST_PACKET)
                except BlockingIOError:
                    continue
                number += 1
                if self.weather.parted or self._random.random() < self.weather.loss:
                    self.lost += 1
                    continue
                due = time.monotonic() + self._random.uniform(*self.weather.delay_s)
                heapq.heappush(ahead, (due, number, self.tuns[1 - self.tuns.index(tun)], packet))
            while ahead and ahead[0][0] <= time.monotonic():
                _, sent, tun, packet = heapq.heappop(ahead)
                if self.weather.parted:
                    self.lost += 1
                    continue
                self.carried += 1
                self.overtaken += sent < newest
                newest = max(newest, sent)
                try:
                    os.write(tun, packet)
                except OSError:  # a packet of a kind that the device does not take
                    self.lost += 1


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
