"""Whole runs with forks, a greedy answer, or a teacher behind an address that fails now and then: nothing is lost or
trained twice, what is verified is found right, and the run is replayed bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from support_run import quick_settings, train
from support_teacher import teacher_server

from async_rl.buffer.store_reader import StoreReader
from async_rl.instruments.replay import replay
from async_rl.observe.audit import audit_run
from async_rl.run_folder import read_rows
from async_rl.trajectory import Trajectory
from async_rl.trajectory.codec import unpack
from async_rl.trajectory.forks import fork_in
from async_rl.trajectory.types import GREEDY

pytestmark = pytest.mark.nightly
STEPS = 3
VERIFIED = ("verify.share=1", "verify.rewards=always")


def trained(path: Path) -> list[Trajectory]:
    reader = StoreReader(path)
    try:
        return [unpack(blob) for step in range(STEPS) for blob in reader.load_batch(step) or []]
    finally:
        reader.close()


@pytest.mark.parametrize(
    ("recipe", "words"),
    [("arpo", ["rollout.roots=2"]), ("spo", ["rollout.roots=1", "rollout.fork=even", "rollout.shape=tree"]),
     ("remax", ["rollout.greedy=true"])],
)  # fmt: skip
def test_a_run_with_a_plan(tmp_path: Path, tiny_model: Path, recipe: str, words: list[str]) -> None:
    settings = quick_settings(
        tiny_model, f"recipe={recipe}", f"trainer.steps={STEPS}", "batch.group_size=4", *VERIFIED, *words
    )
    folder = train(settings, tmp_path / "run")
    made = trained(folder.store)
    if recipe == "remax":
        assert all((turn.temperature == GREEDY) == (t.sample == 0) for t in made for turn in t.turns)
    else:
        assert sum(fork_in(t) is not None for t in made) > len(made) // 4
    assert not audit_run(folder).violations
    assert replay(folder).difference is None


def test_a_run_with_a_teacher_that_fails_now_and_then(tmp_path: Path, tiny_model: Path) -> None:
    faults = ["", "500", "", "silent", "text"] * 3
    with teacher_server(tiny_model) as (address, _):
        settings = quick_settings(
            tiny_model, "recipe=grpo", "recipe.teaching.coefficient=0.5", f"trainer.steps={STEPS}",
            f"teachers.big.address={address}", "teachers.big.attempts=1", "teachers.big.timeout_s=0.5",
        )  # fmt: skip
    with teacher_server(tiny_model, faults=["", "", *faults], port=int(address.split(":")[2].split("/")[0])) as _:
        folder = train(settings, tmp_path / "run")
    made = trained(folder.store)
    failed = [t for t in made if "teacher_error/big" in t.info]
    assert 0 < len(failed) < len(made)
    rows = list(read_rows(folder.metrics))
    assert any(0 < row["teacher/missing"] < 1 for row in rows)
    assert not audit_run(folder).violations
    assert replay(folder).difference is None  # without the server, which is gone
