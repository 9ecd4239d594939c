"""The audit of steps whose tokens are deleted: what the columns tell, read once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from async_rl.buffer.store import Store, StoreReader
from async_rl.observe.audit import Audit, Promise, audit_store
from async_rl.trajectory import Trajectory, Turn, VersionSpan

KEPT, SIZE = 3, 2


def trajectory(group: int, sample: int, version: int) -> Trajectory:
    return Trajectory(
        group=group,
        sample=sample,
        problem=group,
        split="train",
        seed=1,
        tokens=np.array([1, 2], np.int32),
        log_behaviour=np.array([0.0, -0.5], np.float32),
        turns=(Turn(start=1, length=1),),
        versions=(VersionSpan(version=version, start=1, end=2),),
        reward=float(sample),
        ended="finished",
    )


def filled(path: Path, steps: int) -> Path:
    """A run of a group a step, of which the tokens of the last KEPT steps are there."""
    with Store(path, durability="process", create=True) as store:
        for step in range(steps):
            store.add_group(
                group=step,
                problem=step,
                split="train",
                admitted_version=step,
                admitted_at=1.0,
                generator="g",
                position=step,
            )
            store.add_trajectories([trajectory(step, sample, step) for sample in range(SIZE)])
            store.form_batch(step=step, groups=[step], formed_at=1.0)
        store.mark_consumed(step=steps - 1, oldest=steps)
        while store.prune(keep_steps=KEPT, oldest_live=steps):
            pass
        store.commit()
    return path


def audited(path: Path) -> Audit:
    with StoreReader(path) as store:
        assert store.first_step() > 0
        return audit_store(store, promise())


def promise() -> Promise:
    return Promise(
        groups_per_step=1,
        group_size=SIZE,
        max_staleness=1,
        most_waiting=2,
        problem_at=lambda position: position,
        steps=None,
        evaluation_size=0,
    )


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Hundreds of instructions that SQLite has carried out for readers."""
    from async_rl.buffer import store_reader
    from async_rl.observe import audit_versions

    count = [0]

    def note() -> int:
        count[0] += 1
        return 0

    def connect(path: Path, *, mode: str) -> object:
        made = plain(path, mode=mode)
        made.set_progress_handler(note, 100)
        return made

    plain = store_reader.connect
    for module in (store_reader, audit_versions):
        monkeypatch.setattr(module, "connect", connect)
    return count


def test_a_run_twice_as_long_takes_twice_as_much(tmp_path: Path, counted: list[int]) -> None:
    spent = []
    for steps in (300, 600):
        path = filled(tmp_path / f"{steps}.sqlite", steps)
        counted[0] = 0
        found = audited(path)
        assert (found.steps, found.trajectories, found.violations) == (steps, SIZE * steps, ())
        spent.append(counted[0])
    assert spent[1] < 2.5 * spent[0]


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ("UPDATE trajectories SET version_min = 2 WHERE group_id = 5 AND sample = 1", "stale", "tokens of version 2"),
        ("UPDATE trajectories SET version_max = 9 WHERE group_id = 5 AND sample = 1", "stale", "came after it"),
        ("DELETE FROM trajectories WHERE group_id = 5 AND sample = 1", "lost", "group 5 of step 5 lacks its samples 1"),
        ("UPDATE trajectories SET step = 4 WHERE group_id = 5", "lost", "group 5 of step 5 lacks its samples 0, 1"),
        ("UPDATE trajectories SET step = NULL WHERE group_id = 0", "lost", "group 0 of step 0 lacks its samples 0, 1"),
    ],
)
def test_what_is_wrong_in_the_columns_is_found(tmp_path: Path, change: str, kind: str, said: str) -> None:
    path = filled(tmp_path / "store.sqlite", 12)
    with Store(path, durability="process", create=False) as store:
        store._write(change, ())
        store.commit()
    found = audited(path).violations
    assert [(one.kind, said in one.what) for one in found if said in one.what][:1] == [(kind, True)], found
