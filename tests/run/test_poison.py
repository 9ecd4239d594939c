"""A problem whose code ends whoever runs it is found, named and refused; the run goes on, and so does a resumed one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support_command import run_command
from support_poison import begin, refused

from async_rl.buffer.store import StoreReader
from async_rl.events import GeneratorDied
from async_rl.run_folder import read_rows


@pytest.mark.parametrize(
    ("reward", "problems", "cause", "place"),
    [
        pytest.param("crash", [3], "crashed (SIGSEGV)", "in poison_rewards.py:6 crash", marks=pytest.mark.nightly),
        ("leave", [3], "ended with code 7", ""),
        pytest.param("freeze", [3], "no sign of life", "in poison_rewards.py:16 freeze", marks=pytest.mark.nightly),
    ],
)
def test_it_is_refused_with_its_place_and_the_run_goes_on(
    tmp_path: Path, tiny_model: Path, reward: str, problems: list[int], cause: str, place: str
) -> None:
    run = begin(tmp_path, tiny_model, reward, "wire.frozen_after_s=2", "generator.max_restarts=4")
    said = run.said()
    assert run.process.returncode == 0, said
    found = sorted(refused(run), key=lambda event: event.problem)
    assert [(event.split, event.problem) for event in found] == [("train", number) for number in problems]
    for event in found:
        begins = (
            f"poison: problem {event.problem} of the train split ended its generator 2 times{place and ', ' + place}"
        )
        assert event.reason.startswith(f"{begins}; the last time: generator-0 "), event.reason
        assert cause in event.reason
        assert f"{begins}; the last time" in re.sub(r"\s+", " ", said)
    deaths = [row.event for row in run.folder.read_events() if isinstance(row.event, GeneratorDied)]
    assert len(deaths) == 2 * len(problems)
    with StoreReader(run.folder.store) as store:
        groups = [row for row in store.groups() if row.split == "train" and row.problem in problems]
    assert groups  # each epoch asks for it again: it is refused without a generator
    assert all(row.refused_because and row.refused_because.startswith("poison: ") for row in groups)

    if reward != "leave":
        return
    again = run_command("run", "--resume", run.folder.path, "trainer.steps=14", timeout_s=90)
    assert again.returncode == 0, again.stderr
    assert sum(isinstance(row.event, GeneratorDied) for row in run.folder.read_events()) == 2
    audit = run_command("audit", run.folder.path)
    assert audit.returncode == 0, audit.stdout


@pytest.mark.nightly
def test_a_held_out_problem_fails_and_is_counted_apart(tmp_path: Path, tiny_model: Path) -> None:
    run = begin(tmp_path, tiny_model, "leave", "trainer.steps=3", held_out=(20, 3))
    (tmp_path / "train.jsonl").write_text("".join(f'{{"prompt": "{i}<", "answer": "x"}}\n' for i in range(12)))
    said = run.said()
    assert run.process.returncode == 0, said
    assert [(event.split, event.problem) for event in refused(run)] == [("eval", 1)]
    evaluations = [row for row in read_rows(run.folder.events) if row["event"] == "evaluation"]
    assert [(row["trajectories"], row["failed"]) for row in evaluations] == [(4, 2), (4, 2)]
    assert evaluations[0]["failures"][0].startswith("poison: problem 1 of the eval split")


@pytest.mark.nightly
def test_a_reward_that_ends_every_process_ends_the_run(tmp_path: Path, tiny_model: Path) -> None:
    run = begin(tmp_path, tiny_model, "always", "generator.max_restarts=3")
    said = run.said()
    assert run.process.returncode == 1
    assert "generator-0 died 4 times within 300 s (generator.max_restarts=3)" in said
