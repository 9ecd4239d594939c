"""An hour of the quickstart under faults: does anything grow? Prints one JSON object, exit code 1 when something does.

    python bench/soak.py [--minutes 60] [--seed 0] [--out FOLDER] [name=value ...]

A run of the quickstart's task, without an end, of which every 15 seconds something is hurt: a generator is killed, any
process stands still for a moment, the disk is kept busy with synchronous writes, a generator joins and leaves. Memory
(RssAnon: what a process has allocated itself) and open files of every process are read every two seconds, the store's
size too.

What is asked of each life of a process that lasts for three minutes, after its first 90 seconds: its memory changes by
2 % at most, by the median of all slopes (Theil and Sen); its open files are as many at the end as at the beginning. Of
the store (buffer.keep_steps): what stays of a trajectory whose tokens are deleted, its row, is 250 bytes at most. Of
the run: no group lost, none trained twice (the audit), and a training step at least every minute.

The buffer's process keeps pages of the store in memory, a quarter of buffer.memory_mb at most, here 4 MB and some 20 %
for their bookkeeping. Until these are there it grows by some 200 bytes a trajectory, so it is looked at from when the
store is half as large again as the cache; a soak of a few minutes does not get there and has no "buffer" in its lives.
Nothing else in it grows: the state machine's books are bounded by the groups under way, and Python's lists of freed
tuples, which would fill for hours, are emptied (tidying.py).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from async_rl.observe.audit import audit_run
from async_rl.run_folder import RunFolder, read_rows

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"
SETTINGS = (
    *("trainer.steps=1000000", "generator.count=2", "generator.max_restarts=100000", "optimizer.schedule=constant"),
    "optimizer.final_share=0",
    *("batch.groups_per_step=4", "batch.group_size=4", "evaluation.every=200", "evaluation.problems=8"),
    *(
        "buffer.keep_steps=50",
        "buffer.memory_mb=16",
        "checkpoint.every=50",
        "checkpoint.keep=2",
        "wire.frozen_after_s=10",
    ),
)
EVERY_S, LOOK_S = 15.0, 2.0
WARM_S, LEAST_LIFE_S = 90.0, 180.0
MOST_GROWTH = 0.02
LEAST_GROWTH_KB = 512.0
"""less than this is a page here and there"""
CACHE_FULL_KB = 1.5 * 4096
"""size of the store from which on as many of its pages are in the buffer's memory as may be"""
LONGEST_STEP_S = 60.0
END_S = 300.0
"""for the run to come to its end on a machine with much else to do"""
MOST_ROW_BYTES = 250.0
"""that stay in the store of a trajectory whose tokens are deleted"""
POINTS = 200
"""of a curve whose slopes are taken, spread evenly"""


@dataclass(slots=True)
class Life:
    """One process, as it was seen."""

    name: str
    seconds: list[float] = field(default_factory=list)
    memory_kb: list[float] = field(default_factory=list)
    files: list[int] = field(default_factory=list)

    def warm(self, values: Sequence[float]) -> list[float]:
        """Those after its first WARM_S."""
        return [v for at, v in zip(self.seconds, values, strict=True) if at - self.seconds[0] >= WARM_S]

    def growth(self) -> float:
        """How much its memory changes over its warm life, as a share; the median of all slopes says it."""
        at, kb = self.warm(self.seconds), self.warm(self.memory_kb)
        changed = slope(at, kb) * (at[-1] - at[0])
        return changed / statistics.median(kb) if abs(changed) > LEAST_GROWTH_KB else 0.0

    def more_files(self) -> float:
        """How many more files it has open at the end of its warm life than at the beginning; medians of quarters."""
        files = self.warm(self.files)
        quarter = max(1, len(files) // 4)
        return statistics.median(files[-quarter:]) - statistics.median(files[:quarter])


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The median of the slopes between all pairs of points."""
    step = max(1, len(x) // POINTS)
    points = list(zip(x[::step], y[::step], strict=True))
    found = [(b[1] - a[1]) / (b[0] - a[0]) for i, a in enumerate(points) for b in points[i + 1 :] if b[0] > a[0]]
    return statistics.median(found) if found else 0.0


def processes(launcher: int, folder: RunFolder) -> dict[int, str]:
    """Process number -> name, of those that live."""
    started = [row for row in read_rows(folder.events) if row["event"] == "started"]
    found = {int(row["pid"]): str(row["process"]) for row in started} | {launcher: "launcher"}
    return {pid: name for pid, name in found.items() if Path(f"/proc/{pid}/fd").is_dir() and not zombie(pid)}


def zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


class Soak:
    """One run, hurt and watched."""

    def __init__(self, place: Path, seed: int, words: Sequence[str]) -> None:
        self.place, self.folder, self.random = place, RunFolder(place / "run"), Random(seed)
        self.lives: dict[int, Life] = {}
        self.store_kb: list[float] = []
        self.faults: Counter[str] = Counter()
        self.joiners: list[subprocess.Popen[bytes]] = []
        self.rows, self.stepped_at, self.longest_s = 0, time.monotonic(), 0.0
        model = place / "model"
        command = [sys.executable, "-m", "async_rl"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run([*command, "init-model", str(model), "--task", "guess", "--until", "0.3"], check=True, **quiet)
        chosen = [f"model.path={model}", *SETTINGS, *words]
        with (place / "said.log").open("wb") as said:
            self.launcher = subprocess.Popen(
                [*command, "run", str(CONFIG), "--run-dir", str(self.folder.path), *chosen], stdout=said, stderr=said
            )

    def play(self, seconds: float) -> None:
        began = time.monotonic()
        hurt_at = began + WARM_S / 2
        while time.monotonic() - began < seconds and self.launcher.poll() is None:
            self.look()
            if time.monotonic() >= hurt_at and self.folder.metrics.exists():
                self.hurt()
                hurt_at = time.monotonic() + EVERY_S
            time.sleep(LOOK_S)

    def look(self) -> None:
        now = time.monotonic()
        for pid, name in processes(self.launcher.pid, self.folder).items():
            try:
                status = Path(f"/proc/{pid}/status").read_text()
                files = len(os.listdir(f"/proc/{pid}/fd"))
            except OSError:
                continue
            if name == "buffer" and max(self.store_kb, default=0.0) < CACHE_FULL_KB:
                continue
            kb = next((line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")), None)
            if kb is not None:
                life = self.lives.setdefault(pid, Life(name))
                life.seconds.append(now)
                life.memory_kb.append(float(kb))
                life.files.append(files)
        if self.folder.store.exists():
            self.store_kb.append(self.folder.store.stat().st_size / 1024)
        rows = self.folder.metrics.read_bytes().count(b"\n") if self.folder.metrics.exists() else 0
        if rows > self.rows or not rows:
            self.rows, self.stepped_at = rows, now
        self.longest_s = max(self.longest_s, now - self.stepped_at)

    def hurt(self) -> None:
        living = processes(self.launcher.pid, self.folder)
        generators = sorted(pid for pid, name in living.items() if name.startswith("generator"))
        what = self.random.choice(("kill", "freeze", "freeze", "slow disk", "join"))
        self.faults[what] += 1
        match what:
            case "kill" if generators:
                os.kill(generators[-1], signal.SIGKILL)  # the youngest: others live long enough to be measured
            case "freeze" if living:
                pid = self.random.choice(sorted(living))
                os.kill(pid, signal.SIGSTOP)
                threading.Timer(self.random.uniform(0.3, 3.0), awake, (pid,)).start()
            case "slow disk":
                threading.Thread(target=self.keep_disk_busy, args=(self.random.uniform(2.0, 8.0),), daemon=True).start()
            case "join":
                self.join_or_leave()

    def keep_disk_busy(self, seconds: float) -> None:
        """Synchronous writes beside the store."""
        end = time.monotonic() + seconds
        with (self.place / "busy").open("wb") as file:
            while time.monotonic() < end:
                file.seek(0)
                file.write(bytes(4 << 20))
                file.flush()
                os.fsync(file.fileno())

    def join_or_leave(self) -> None:
        alive = [one for one in self.joiners if one.poll() is None]
        if alive:
            alive[0].terminate()
            return
        words = ["generate", "--run", str(self.folder.path), "--name", f"guest-{len(self.joiners)}"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.joiners.append(subprocess.Popen([sys.executable, "-m", "async_rl", *words], **quiet))  # type: ignore[call-overload]

    def end(self) -> int | None:
        """Press Ctrl-C; the code of the launcher, None where it had ended before."""
        code = self.launcher.poll()
        for pid in processes(self.launcher.pid, self.folder):
            awake(pid)
        if code is None:
            self.launcher.send_signal(signal.SIGINT)
            self.launcher.wait(END_S)
        for joiner in self.joiners:
            if joiner.poll() is None:
                joiner.terminate()
            joiner.wait(END_S)
        return code

    def result(self) -> dict[str, Any]:
        audit = audit_run(self.folder)
        measured: dict[str, list[dict[str, float]]] = defaultdict(list)
        wrong = [str(violation.what) for violation in audit.violations]
        for life in self.lives.values():
            if len(life.seconds) < 2 or life.seconds[-1] - life.seconds[0] < LEAST_LIFE_S:
                continue
            growth, files = life.growth(), life.more_files()
            row = {
                "seconds": round(life.seconds[-1] - life.seconds[0]),
                "memory_mb": round(life.memory_kb[-1] / 1024, 1),
            }
            measured[life.name].append(row | {"growth": round(growth, 4), "more_files": files})
            if growth > MOST_GROWTH:
                wrong.append(f"the memory of {life.name} grew by {growth:.1%}")
            if files > 0:
                wrong.append(f"{life.name} has {files:g} more files open")
        half = len(self.store_kb) // 2
        first, second = (max(part, default=0.0) for part in (self.store_kb[:half], self.store_kb[half:]))
        row = 1024 * (second - first) / max(1, audit.trajectories / 2)
        if row > MOST_ROW_BYTES:
            wrong.append(f"the store grew from {first:.0f} to {second:.0f} kB, {row:.0f} bytes a trajectory")
        if self.longest_s > LONGEST_STEP_S:
            wrong.append(f"no training step for {self.longest_s:.0f} s")
        return {
            "steps": self.rows, "groups_trained": audit.groups_trained, "lost": audit.count("lost"),
            "duplicated": audit.count("duplicated"), "faults": dict(self.faults), "joined": len(self.joiners),
            "longest_s_without_a_step": round(self.longest_s, 1), "store_kb": [round(first), round(second)],
            "lives": dict(measured), "wrong": wrong,
        }  # fmt: skip


def awake(pid: int) -> None:
    """Let a process go on that was stopped."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="keep the run here; default: a temporary folder")
    parser.add_argument("settings", nargs="*", metavar="name=value")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        place = args.out or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        soak = Soak(place, args.seed, args.settings)
        code: int | None = None
        try:
            soak.play(60 * args.minutes)
        finally:
            code = soak.end()
        last = "\n".join((place / "said.log").read_text().strip().splitlines()[-3:])
        if not soak.folder.metrics.exists():
            sys.exit(f"the run never began: {last}")
        found = soak.result()
        if code is not None:
            found["wrong"].append(f"the run ended by itself with {code}: {last}")
    print(json.dumps(found, indent=1))
    sys.exit(1 if found["wrong"] else 0)


if __name__ == "__main__":
    main()
