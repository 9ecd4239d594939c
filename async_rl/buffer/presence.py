"""Who lives, by what was last heard of each process; and whether the buffer itself was away meanwhile."""

from __future__ import annotations

from dataclasses import dataclass, field

from async_rl.wire import messages as msg

PULSE = msg.PULSE.encode()


@dataclass(slots=True, kw_only=True)
class Sign:
    """The last sign of life of one process."""

    name: str
    role: str
    pid: int
    doing: str
    since: float
    """when it began that, the buffer's clock"""
    heard: float
    """when its last message of any kind came"""


@dataclass(slots=True)
class Presence:
    """Signs of the generators and the trainer, by their peer. Others are forgotten at once."""

    limit_s: float
    """silence after which a process is taken for frozen"""
    signs: dict[bytes, Sign] = field(default_factory=dict)
    ticked: float = 0.0
    """when the buffer last looked; 0: never"""

    def join(self, peer: bytes, hello: msg.Hello, now: float) -> None:
        """From here on its signs are kept."""
        self.signs[peer] = Sign(
            name=hello.name, role=hello.role, pid=hello.pid, doing="saying hello", since=now, heard=now
        )

    def leave(self, peer: bytes) -> None:
        self.signs.pop(peer, None)

    def knows(self, peer: bytes) -> bool:
        return peer.removesuffix(PULSE) in self.signs

    def hear(self, peer: bytes, message: msg.Message, now: float) -> None:
        """Any message is a sign of life; a pulse says what the process does."""
        sign = self.signs.get(peer.removesuffix(PULSE))
        if sign is None:
            return
        sign.heard = now
        if isinstance(message, msg.Pulse):
            sign.doing, sign.since = message.doing, now - message.since_s

    def frozen(self, now: float) -> list[bytes]:
        """The peers that have been silent for too long. When the buffer itself was away it has heard nobody:
        all get their time anew."""
        if self.ticked and now - self.ticked > self.limit_s / 2:
            for sign in self.signs.values():
                sign.heard = now
        self.ticked = now
        return [peer for peer, sign in self.signs.items() if now - sign.heard > self.limit_s]

    def silent_s(self, peer: bytes, now: float) -> float:
        sign = self.signs.get(peer)
        return now - sign.heard if sign is not None else 0.0

    def last_word(self, peer: bytes, now: float) -> str:
        """Example: `last heard of generator-1 0.3 s ago: decoding 14 sequences (for 3.2 s)`."""
        sign = self.signs.get(peer)
        if sign is None:
            return "nothing was heard of it"
        return f"last heard of {sign.name} {now - sign.heard:.1f} s ago: {sign.doing} (for {now - sign.since:.1f} s)"

    def table(self, now: float) -> list[dict[str, object]]:
        """One row a process, in plain values."""
        return [
            {
                "name": s.name,
                "role": s.role,
                "pid": s.pid,
                "doing": s.doing,
                "since_s": round(now - s.since, 3),
                "silent_s": round(now - s.heard, 3),
            }
            for s in self.signs.values()
        ]
