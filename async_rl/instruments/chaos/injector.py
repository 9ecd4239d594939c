"""Injects the planned faults into a run: begins each when it is due, carries it on, and records what followed.

A fault is *active* while signals of it are still to come, *open* from then on until the run has stepped again: what
the run does meanwhile counts as its consequence.
"""

from __future__ import annotations

import subprocess
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGCONT
from typing import Any

from async_rl.instruments.chaos.plan import OF_THE_TASK, Fault, Lie, describe, lie_of, timetable
from async_rl.instruments.chaos.proxy import Proxy
from async_rl.instruments.chaos.target import Target
from async_rl.run_folder import append_row

FREEZE_LIMIT_S = 4.0
"""after which its user kills a launcher that is frozen"""
FOLLOWED_S = 3.0
"""what happens so long after a fault counts as its consequence, and until the next step"""


@dataclass(slots=True, kw_only=True)
class InjectedFault:
    """A fault that has begun."""

    fault: Fault
    target: Target | None
    """None: connections, a liar or the task's code"""
    began: float
    step: int
    """training steps done then"""
    ahead: deque[tuple[float, Any]]
    """(when, signal) still to come"""
    cut: Callable[[], int] | None = None
    """cuts the connections that are held"""
    liar: subprocess.Popen[bytes] | None = None
    """a generator that lies"""
    lasts: Callable[[], bool] | None = None
    """whether it goes on, where others end it: the order still lies there, the process still lives"""
    followed: list[str] = field(default_factory=list)
    """what the run did next"""
    next_step_s: float | None = None
    """from its beginning to the next training step"""

    def advance(self, now: float) -> bool:
        """Do what is due; True when it is over."""
        while self.ahead and now >= self.ahead[0][0]:
            number = self.ahead.popleft()[1]
            if self.target is not None and not self.target.send(number):
                self.ahead.clear()
                if self.fault.kind != "kill":
                    self.followed.append("it ended meanwhile")
        if self.cut is not None and now >= self.began + self.fault.seconds:
            self.followed.append(f"{self.cut()} connections cut")
            self.cut = None
        if self.liar is not None:
            return self.liar.poll() is not None
        if self.lasts is not None:
            return not self.lasts()
        return not self.ahead and self.cut is None


@dataclass(slots=True, kw_only=True)
class Injector:
    """Of one run. Times are of one monotonic clock, seconds."""

    plan: Sequence[Fault]
    steps: int
    """training steps of the run"""
    proxy: Proxy | None
    record: Path
    """chaos.jsonl"""
    started: float
    start_liar: Callable[[str, Lie], subprocess.Popen[bytes]]
    """of that name, about that"""
    orders: Path | None = None
    """folder of what the task's code is to do; None: it does nothing of the kind"""
    next: int = 0
    """place in the plan"""
    due: float | None = None
    """when the next fault comes; None: its step has not come"""
    active: list[InjectedFault] = field(default_factory=list)
    open: list[InjectedFault] = field(default_factory=list)

    @property
    def undone(self) -> int:
        """Faults that have not begun."""
        return len(self.plan) - self.next

    @property
    def frozen_for_good(self) -> bool:
        """Somebody is frozen until the run itself notices."""
        return any(one.fault.endless for one in self.active)

    def poll(self, now: float, steps_done: int, living: Sequence[Target]) -> InjectedFault | None:
        """Carry on with the active faults, begin the next one when it is due, and return it."""
        for one in [one for one in self.active if one.advance(now)]:
            self.active.remove(one)
            self.open.append(one)
        if not self.undone:
            return None
        fault = self.plan[self.next]
        done = steps_done / self.steps
        if self.due is None and (fault.follows or done >= fault.progress):
            self.due = now + fault.delay_s
        if self.active and (fault.endless or self.frozen_for_good):
            return None  # whoever is frozen for ever must not be woken, nor left without anybody who notices
        in_time = done < (fault.progress + 1.0) / 2.0  # else the run is so fast that it would end before
        if self.due is not None and (now >= self.due or not in_time):
            return self._begin(fault, now, steps_done, living)
        return None

    def _begin(self, fault: Fault, now: float, steps_done: int, living: Sequence[Target]) -> InjectedFault | None:
        """None where nobody of that role lives at the moment: the fault then comes a little later."""
        target: Target | None = None
        cut: Callable[[], int] | None = None
        liar: subprocess.Popen[bytes] | None = None
        lasts: Callable[[], bool] | None = None
        if fault.kind in OF_THE_TASK:
            assert self.orders is not None
            order = self.orders / f"{fault.kind}-{self.next}"
            order.touch()
            lasts = order.exists
        elif fault.kind == "lie":
            if not any(one.role == "buffer" and one.alive() for one in living):
                return None
            liar = self.start_liar(f"liar-{self.next}", lie_of(fault))
        elif fault.role is not None:
            fitting = [one for one in living if one.role == fault.role and one.alive()]
            if not fitting:
                return None
            target = fitting[int(fault.pick * len(fitting))]
            if fault.kind == "disk":
                target.fill_disk()
            if fault.kind == "disk" or fault.endless:
                lasts = target.alive
        else:
            assert self.proxy is not None
            if not self.proxy.connections:
                return None
            cut = self.proxy.hold(fault.pick)
        begun = InjectedFault(
            fault=fault,
            target=target,
            began=now,
            step=steps_done,
            ahead=deque((now + seconds, number) for seconds, number in timetable(fault, patience_s=FREEZE_LIMIT_S)),
            cut=cut,
            liar=liar,
            lasts=lasts,
        )
        self.next += 1
        self.due = None
        (self.open if begun.advance(now) else self.active).append(begun)
        return begun

    def note(self, what: str) -> None:
        """Something happened: a consequence of every fault that the run has not stepped on from."""
        for one in (*self.open, *self.active):
            one.followed.append(what)

    def stepped(self, now: float) -> None:
        """The run has stepped: the consequences of faults that are some time ago are complete."""
        for one in list(self.open):
            if one.next_step_s is None:
                one.next_step_s = now - one.began
            if now - one.began > FOLLOWED_S:
                self._write(one)
                self.open.remove(one)

    def wake(self) -> None:
        """Let go on whoever was stopped by a fault."""
        for one in self.active:
            if one.target is not None:
                one.target.send(SIGCONT)
                one.ahead.clear()

    def end_liars(self) -> None:
        """End the generators that lie, wherever they are."""
        for one in (*self.open, *self.active):
            if one.liar is not None:
                one.liar.kill()
                one.liar.wait()

    def close(self) -> None:
        """Record the faults that are not recorded yet."""
        for one in (*self.open, *self.active):
            self._write(one)

    def _write(self, one: InjectedFault) -> None:
        fault = one.fault
        others = {"lie": "a liar", "disconnect": "connections"}
        row = {
            "fault": fault.kind,
            "what": describe(fault),
            "target": one.target.name if one.target is not None else others.get(fault.kind, "the task"),
            "pid": one.target.pid if one.target is not None else None,
            "at_s": round(one.began - self.started, 3),
            "step": one.step,
            "planned_progress": round(fault.progress, 4),
            "follows_the_one_before": fault.follows,
            "followed": one.followed or ["nothing"],
            "next_step_after_s": one.next_step_s and round(one.next_step_s, 3),
        }
        append_row(self.record, row)
