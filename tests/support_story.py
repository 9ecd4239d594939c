"""A run folder written without a run: metrics, events and a store whose every number follows from the step."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from support_run import quick_settings

from async_rl.buffer.store import Store
from async_rl.run_folder import RunFolder, replace_text
from async_rl.trajectory import Trajectory, Turn, VersionSpan
from async_rl.trajectory.codec import pack

START = 1_700_000_000.0
STEP_S = 0.5
PROMPT = 2
REFUSED = 3
"""every so many steps one more group is refused"""


@dataclass(frozen=True, kw_only=True)
class Story:
    """What happened in a run that never was."""

    path: Path
    model: Path
    steps: int = 20
    groups: int = 4
    size: int = 4
    lag: int = 2
    spike_at: int = 7
    """step whose gradient norm is 1000 times the others'"""
    overrides: tuple[str, ...] = ()
    seed: int = 0

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.path)

    def write(self, *, summary: bool = True) -> RunFolder:
        settings = quick_settings(self.model, f"trainer.steps={self.steps}", *self.overrides)
        self.folder.create(settings)
        self.folder.metrics.write_text("".join(json.dumps(self.row(step)) + "\n" for step in range(self.steps)))
        self.folder.events.write_text("".join(json.dumps(event) + "\n" for event in self.events()))
        self.write_store()
        if summary:
            replace_text(self.folder.summary, json.dumps(self.summary()))
        return self.folder

    def ends_at(self, step: int) -> float:
        return START + 3.0 + STEP_S * (step + 1)

    def row(self, step: int) -> dict[str, float]:
        wave = math.sin(step / 9 + self.seed)
        return {
            "step": step,
            "time": self.ends_at(step),
            "reward/mean": 1 - 0.9 * math.exp(-step / 40) + 0.03 * wave,
            "ess/ratio": 0.9 + 0.05 * wave,
            "entropy": 1.5 * math.exp(-step / 400) + 0.1,
            "grad/norm": (1000.0 if step == self.spike_at else 1.0) * (0.5 + 0.1 * wave),
            "lag/mean": float(min(step, self.lag)),
            "lag/max": float(min(step, self.lag)),
            "lag/queue": float(min(step, self.lag)) / 2,
            "lag/flight": float(min(step, self.lag)) / 2,
            "lr/base": 1e-3,
            "lr/ess_scale": 0.95,
            "lr/kappa": 1.0,
            "lr/effective": 0.95e-3,
            "kl/behaviour": 1e-3 * (1.1 + wave),
            "clip/frac": 0.01,
            "reject/tokens": 0.1,
            "reject/truncated/tokens": 6.0,
            "reject/truncated/trajectories": 2.0,
            "reject/truncated/below_16": 2.0,
            "len/mean": 5.0,
            "batch/policy_tokens": float(self.groups * self.size * 4),
            "time/wait_for_batch": 0.1,
            "time/step": 0.3,
            "time/publish": 0.05,
            "tokens/generated": 64.0 * (step + 1),
            "tokens/trained": 64.0,
            "slots/used": 7.0,
            "slots/all": 8.0,
            "time/generator_busy": 0.4 * (step + 1),
            "generators": 1.0,
        }

    def events(self) -> list[dict[str, Any]]:
        names = ("buffer", "trainer", "generator-0")
        found: list[dict[str, Any]] = [
            {"event": "started", "process": name, "pid": 100 + i, "time": START} for i, name in enumerate(names)
        ]
        found += [
            {"event": "buffer_ready", "endpoint": "ipc://x", "time": START + 0.5},
            {"event": "trainer_ready", "time": START + 2.0},
            {"event": "generator_ready", "name": "generator-0", "time": START + 2.0},
        ]
        for step in range(0, self.steps + 1, 10):
            at = START + 3.0 if step == 0 else self.ends_at(step - 1) + 0.02
            number = step // 10
            found.append(
                {"event": "evaluation", "evaluation": number, "step": step, "reward": 0.1 + 0.04 * number}
                | {"trajectories": 4, "version_min": step, "version_max": step + (step > 0), "time": at}
            )
        return found

    def write_store(self) -> None:
        with Store(self.folder.store, durability="process", create=True) as store:
            number = 0
            for step in range(self.steps):
                refused = step % REFUSED == REFUSED - 1
                groups = list(range(number, number + self.groups + refused))
                number += len(groups)
                for group in groups:
                    self._group(store, group, step)
                store.form_batch(step=step, groups=groups[: self.groups], formed_at=self.ends_at(step) - 0.4)
                store.mark_trained(step=step, trained_at=self.ends_at(step))
                for group in groups[self.groups :]:
                    store.refuse_group(group, "zero signal")
                if step % 50 == 0:
                    store.commit()
            store.commit()

    def _group(self, store: Store, group: int, step: int) -> None:
        began = self.ends_at(step) - STEP_S * (1 + min(step, self.lag))
        store.add_group(
            group=group,
            problem=group,
            split="train",
            admitted_version=max(0, step - self.lag),
            admitted_at=began - 0.01,
            generator="generator-0",
        )
        members = [self.trajectory(group, sample, step, began) for sample in range(self.size)]
        store.add_trajectories(members, [pack(member) for member in members])

    def trajectory(self, group: int, sample: int, step: int, began: float) -> Trajectory:
        """Half of its policy tokens by version step - lag, half by the one after."""
        length = 4 + 2 * (sample % 3)
        tokens = (np.arange(PROMPT + length) + group + sample) % 10
        log = np.full(PROMPT + length, -0.7, np.float32)
        log[:PROMPT] = 0.0
        oldest, middle = max(0, step - self.lag), PROMPT + length // 2
        newest = min(step, oldest + 1)
        spans = [VersionSpan(version=oldest, start=PROMPT, end=middle)]
        spans.append(VersionSpan(version=newest, start=middle, end=PROMPT + length))
        return Trajectory(
            group=group,
            sample=sample,
            problem=group,
            split="train",
            seed=1,
            tokens=tokens.astype(np.int32),
            log_behaviour=log,
            turns=(Turn(start=PROMPT, length=length // 2), Turn(start=middle, length=length - length // 2)),
            versions=tuple(spans),
            reward=float(sample % 2),
            ended="finished",
            started_at=began,
            finished_at=began + 0.4,
        )

    def summary(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "reward_eval_first": 0.1,
            "reward_eval_last": 0.8,
            "lag_mean": float(self.lag),
            "lag_max": self.lag,
            "max_staleness": self.lag,
            "ess_mean": 0.9,
            "seconds": STEP_S * self.steps,
            "seconds_training": 0.3 * self.steps,
            "seconds_generating": 0.4 * self.steps,
            "seconds_with_start": STEP_S * self.steps + 3,
            "overlap_efficiency": 0.8,
            "tokens_generated": 64 * self.steps,
            "tokens_trained": 64 * self.steps,
            "groups_admitted": self.groups * self.steps,
            "groups_trained": self.groups * self.steps,
            "groups_refused": self.steps // REFUSED,
            "trajectories_failed": 0,
            "canary": {"checked": self.steps, "max_difference": 1e-6, "late": 0, "unchecked": []},
            "model": "checkpoints/step",
        }
