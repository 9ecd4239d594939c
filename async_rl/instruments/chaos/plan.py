"""Which process is hurt, how, and when: drawn before the run from a seed. Pure.

Moments are shares of the training steps, so that all faults happen before the end however fast the machine
is. Every fourth fault follows the one before it within seconds, while the run recovers.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

Role = Literal["buffer", "generator", "trainer", "launcher"]
ROLES: tuple[Role, ...] = get_args(Role)
Lie = Literal["tokens", "log-probs", "versions", "rewards"]
LIES: tuple[Lie, ...] = get_args(Lie)
Kind = Literal["kill", "freeze", "slow", "disconnect", "lie", "raise", "cancel", "poison", "disk"]
"""SIGKILL; SIGSTOP, for a moment or for ever; stopped and continued in turn; connections cut; a generator that reports
what it did not do joins; a reward raises a BaseException, or cancels whoever awaits it; a problem whose code crashes
the generator; nothing that a process writes finds room"""
COUNTERS: Mapping[Kind, str] = {kind: f"{kind}s" for kind in get_args(Kind)}
"""kind of fault -> name of its number in `Counts` and in the outcome"""
OF_THE_TASK: tuple[Kind, ...] = ("raise", "cancel", "poison")
"""done by the task's code (sabotage.py)"""
WRITERS: tuple[Role, ...] = ("buffer", "trainer")
"""whose disk can be full"""

LATEST = 0.94
"""share of the steps before which every fault is due: the last ones must not come after the end"""
FOLLOWS = 0.25
"""share of the faults that come while the run recovers from the one before"""
FOLLOWS_WITHIN_S = 8.0
DELAY_S = 0.5
"""the moment within a step is random, too"""
SHORT_S = (0.3, 3.0)
SLOW_S = (2.0, 5.0)
SLOW_STOPPED_S, SLOW_RUNNING_S = 0.15, 0.05
HOLD_S = (0.02, 0.5)
"""how long connections carry nothing before they are cut: what gathers meanwhile is lost"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """How many faults of each kind."""

    kills: int
    freezes: int
    slows: int
    disconnects: int
    lies: int = 0
    raises: int = 0
    cancels: int = 0
    poisons: int = 0
    disks: int = 0

    @property
    def of_the_task(self) -> int:
        """Faults that the task's code commits."""
        return sum(getattr(self, COUNTERS[kind]) for kind in OF_THE_TASK)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    kind: Kind
    role: Role | None
    """None: the connections of generators and trainer, a generator of its own, or the task's code"""
    progress: float
    """share of the training steps that is done, 0 .. 1"""
    delay_s: float
    """after that, or after the fault before"""
    follows: bool
    """the run still recovers from the fault before"""
    seconds: float
    """how long; 0: at once, or for ever"""
    pick: float
    """0 .. 1, which of several generators, connections or lies"""

    @property
    def endless(self) -> bool:
        """A freeze that somebody else has to notice."""
        return self.kind == "freeze" and self.seconds == 0


def make_plan(counts: Counts, *, seed: int) -> tuple[Fault, ...]:
    """In the order in which they happen. The same arguments give the same plan. Every second freeze is for ever."""
    random = Random(seed)
    victims: list[tuple[Kind, Role | None, float]] = []
    for number, frozen in enumerate(_roles(counts.freezes, random)):
        victims.append(("freeze", frozen, random.uniform(*SHORT_S) if number % 2 else 0.0))
    victims += [("kill", role, 0.0) for role in _roles(counts.kills, random)]
    victims += [("slow", role, random.uniform(*SLOW_S)) for role in _roles(counts.slows, random)]
    victims += [("disconnect", None, random.uniform(*HOLD_S)) for _ in range(counts.disconnects)]
    victims += [("lie", None, 0.0) for _ in range(counts.lies)]
    for kind in OF_THE_TASK:
        victims += [(kind, None, 0.0)] * getattr(counts, COUNTERS[kind])
    victims += [("disk", WRITERS[number % len(WRITERS)], 0.0) for number in range(counts.disks)]
    random.shuffle(victims)
    moments = sorted(random.uniform(0.0, LATEST) for _ in victims)
    plan: list[Fault] = []
    for number, (kind, role, seconds) in enumerate(victims):
        follows = number > 0 and random.random() < FOLLOWS
        plan.append(
            Fault(
                kind=kind,
                role=role,
                progress=plan[-1].progress if follows else moments[number],
                delay_s=random.uniform(0.0, FOLLOWS_WITHIN_S if follows else DELAY_S),
                follows=follows,
                seconds=seconds,
                pick=random.random(),
            )
        )
    return tuple(plan)


def _roles(count: int, random: Random) -> list[Role]:
    """Each role as often as any other, but for one; in random order."""
    found: list[Role] = []
    while len(found) < count:
        found += random.sample(ROLES, len(ROLES))
    return found[:count]


def timetable(fault: Fault, *, patience_s: float) -> list[tuple[float, signal.Signals]]:
    """(seconds after its beginning, signal) of what is done to a process, in order.

    Nobody watches the launcher but its user: frozen for ever it is killed after `patience_s`."""
    stop, go_on, kill = signal.SIGSTOP, signal.SIGCONT, signal.SIGKILL
    match fault.kind:
        case "kill":
            return [(0.0, kill)]
        case "freeze" if fault.endless:
            return [(0.0, stop), (patience_s, kill)] if fault.role == "launcher" else [(0.0, stop)]
        case "freeze":
            return [(0.0, stop), (fault.seconds, go_on)]
        case "slow":
            cycle = SLOW_STOPPED_S + SLOW_RUNNING_S
            found: list[tuple[float, signal.Signals]] = []
            for turn in range(max(1, round(fault.seconds / cycle))):
                found += [(turn * cycle, stop), (turn * cycle + SLOW_STOPPED_S, go_on)]
            return found
        case "disconnect" | "lie" | "raise" | "cancel" | "poison" | "disk":
            return []


def describe(fault: Fault) -> str:
    """A fault, for the terminal and the record."""
    match fault.kind:
        case "kill":
            return f"{fault.role} is killed"
        case "freeze":
            return f"{fault.role} is frozen" + ("" if fault.endless else f" for {fault.seconds:.1f} s")
        case "slow":
            return f"{fault.role} is slowed for {fault.seconds:.1f} s"
        case "disconnect":
            return "connections are cut"
        case "lie":
            return f"a generator joins that lies about {lie_of(fault)}"
        case "raise":
            return "a reward raises what is no Exception"
        case "cancel":
            return "a reward cancels whoever awaits it"
        case "poison":
            return "a problem's code crashes its generator"
        case "disk":
            return f"the disk of the {fault.role} is full"


def lie_of(fault: Fault) -> Lie:
    """What it lies about."""
    return LIES[int(fault.pick * len(LIES))]
