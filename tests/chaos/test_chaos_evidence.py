"""What a store said once it says for ever."""

from __future__ import annotations

from pathlib import Path

import pytest
from support_audit import REFUSED, STEPS, P, change, put_batch, trajectory, write_run

from async_rl.buffer.store import Store, StoreReader
from async_rl.instruments.chaos.evidence import take_evidence, taken_back
from async_rl.observe.audit import describe_violations
from async_rl.run_folder import RunFolder

LAST = STEPS * P + 2


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path) -> RunFolder:
    run = write_run(tmp_path / "run", tiny_model)
    with Store(run.store, durability="process", create=False) as store:
        store.add_trajectories([trajectory(LAST, 0, STEPS)])
        store.commit()
    return run


def test_a_store_that_only_grows_has_forgotten_nothing(run: RunFolder) -> None:
    with StoreReader(run.store) as store:
        evidence = take_evidence(store)
        assert len(evidence.samples) == 1
        change(run, f"UPDATE groups SET refused_because = 'zero_signal', generator = 'other' WHERE group_id = {LAST}")
        assert list(taken_back(evidence, store)) == []


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        (f"DELETE FROM groups WHERE group_id = {LAST}", f"lost: group {LAST} was in the store when a process died"),
        (f"UPDATE groups SET problem = problem + 1 WHERE group_id = {LAST}", f"duplicated: group {LAST} was problem"),
        ("UPDATE groups SET step = NULL WHERE group_id = 0",
         "lost: group 0 was in the batch of step 0 when a process died, then in the batch of step None"),
        (f"UPDATE groups SET refused_because = NULL WHERE group_id = {REFUSED}",
         f"lost: group {REFUSED} was refused: zero_signal when a process died, then refused: None"),
        (f"DELETE FROM trajectories WHERE group_id = {LAST}",
         f"lost: sample 0 of group {LAST} was stored when a process died, and is not any more"),
    ],
)  # fmt: skip
def test_what_is_taken_back_is_named(run: RunFolder, statement: str, expected: str) -> None:
    with StoreReader(run.store) as store:
        evidence = take_evidence(store)
        change(run, statement)
        assert any(line.startswith(expected) for line in describe_violations(taken_back(evidence, store)))


def test_a_batch_that_was_formed_anew_is_named(run: RunFolder) -> None:
    with StoreReader(run.store) as store:
        evidence = take_evidence(store)
        put_batch(run, 0, [0, 1, 2, 4])
        assert describe_violations(taken_back(evidence, store)) == [
            "batch: the batch of step 0 was (0, 1, 2, 3) when a process died, then (0, 1, 2, 4)"
        ]
