"""What the alarms catch in trainings of the lab, how early, and how often they are wrong. Prints one JSON object.

    python bench/alarms.py LAB [LAB ...] [name=value ...]       # e.g. runs/lab-full guard.window=15

A cell has collapsed as lab.json defines it and, to keep cells out that only stayed where they began, has lost half of
its best reward or a fifth of its first one; the others that lab.json calls collapsed are counted as `mild`. A false
alarm is one in a cell that has not collapsed at all. `steps_before` is how long before the reward the run itself saw
had fallen half-way, for good (below 0: after it). Cells are cut in two halves by a hash of their names: thresholds are
chosen on "fit", what they are worth is read from "other".
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

from async_rl.config import GuardSettings
from async_rl.config.schema import load_yaml, structured, with_overrides
from async_rl.instruments.lab.record import STEP_CURVES, CellRecord, Curves, read_curves, read_record
from async_rl.trainer.alarm import SIGNALS, Alarm, Signal, watch


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    name: str
    kind: str
    """collapsed, mild or healthy"""
    lag: int
    fell: int
    """step at which the reward that was seen had fallen half-way"""
    raised: Mapping[Signal, Alarm]

    @property
    def half(self) -> str:
        return "fit" if blake2b(self.name.encode()).digest()[0] % 2 else "other"


def rows(record: CellRecord, curves: Curves, units: int, critic_warmup: int) -> Iterator[dict[str, float]]:
    """Metric rows as a run would have written them."""
    keys = {curve: key for curve, key in STEP_CURVES.items() if key}
    for step in range(len(curves.steps["reward_batch"])):
        found = {key: curves.steps[curve][step] for curve, key in keys.items() if curve in curves.steps}
        row = {key: value for key, value in found.items() if value is not None} | {"step": float(step)}
        if "ess/ratio" in row:
            row["ess/size"] = row["ess/ratio"] * units
        if step < critic_warmup and "grad/norm" not in row:
            row["critic/warmup"] = 1.0
        yield row


def read_cells(lab: Path, guard: GuardSettings) -> Iterator[Cell]:
    settings = load_yaml(lab / "config.yaml")
    for path in sorted((lab / "cells").glob("*.json")):
        record = read_record(path)
        if record is None or record.failed or record.reward_final is None:
            continue
        curves = read_curves(path)
        own = settings["tasks"].get(record.task, {}).get("run", {}).get("batch", {})
        batch = settings["run"]["batch"] | own
        warmup = settings["run"].get("critic", {}).get("warmup_steps", 0)
        guarded = watch(guard, rows(record, curves, batch["groups_per_step"] * batch["group_size"], warmup))
        first, best, final = record.reward_first or 0.0, record.reward_best or 0.0, record.reward_final
        lost = final < 0.5 * best or final < 0.8 * first
        yield Cell(
            name=record.name,
            kind=("collapsed" if lost else "mild") if record.collapsed else "healthy",
            lag=record.lag,
            fell=fallen(curves.steps["reward_batch"], guard.window),
            raised=guarded.raised,
        )


def fallen(rewards: Sequence[float | None], window: int) -> int:
    """The first step from which the mean over a window stays below the middle between its best and its last."""
    known = [reward for reward in rewards if reward is not None]
    means = [fmean(known[i - window : i]) for i in range(window, len(known) + 1)]
    middle = (max(means) + means[-1]) / 2
    return max((i for i, mean in enumerate(means) if mean >= middle), default=0) + window


def counted(cells: Sequence[Cell]) -> dict[str, Any]:
    def of(kind: str, signals: Sequence[Signal]) -> tuple[int, int, list[int]]:
        some = [cell for cell in cells if cell.kind == kind]
        steps = [(min((a.step for s, a in c.raised.items() if s in signals), default=None), c) for c in some]
        caught = [cell.fell - step for step, cell in steps if step is not None]
        return len(caught), len(some), caught

    found = {}
    for name, signals in (*((s, (s,)) for s in SIGNALS), ("any", SIGNALS)):
        caught, all_, before = of("collapsed", signals)
        wrong, healthy, _ = of("healthy", signals)
        mild, all_mild, _ = of("mild", signals)
        spread = [round(q) for q in quantiles(before, n=4)] if len(before) > 1 else before
        found[name] = {
            "caught": f"{caught} of {all_}",
            "mild": f"{mild} of {all_mild}",
            "false": f"{wrong} of {healthy}",
            "steps_before (quartiles)": spread,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("words", nargs="+", metavar="LAB|name=value")
    words = parser.parse_args().words
    overrides = [word.removeprefix("guard.") for word in words if "=" in word]
    guard = structured(GuardSettings, with_overrides({}, overrides), where="guard")
    cells = [cell for word in words if "=" not in word for cell in read_cells(Path(word), guard)]
    other = [cell for cell in cells if cell.half == "other"]
    kinds = {
        "fit": [cell for cell in cells if cell.half == "fit"],
        "other": other,
        "other, lag 0": [cell for cell in other if cell.lag == 0],
        "other, lag 1 to 8": [cell for cell in other if 0 < cell.lag <= 8],
        "other, lag above 8": [cell for cell in other if cell.lag > 8],
    }
    print(json.dumps({name: counted(some) for name, some in kinds.items()}, indent=1))


if __name__ == "__main__":
    main()
