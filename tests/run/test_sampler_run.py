"""Runs whose sampler chooses problems, sizes, limits and starts: real processes, resumed, audited, replayed."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from support_run import quick_settings, train

from async_rl.buffer.store_reader import StoreReader
from async_rl.instruments.replay import replay
from async_rl.observe.audit import audit_run
from async_rl.observe.console import Console
from async_rl.run.launcher import resume_training
from async_rl.run_folder import RunFolder, read_rows
from async_rl.trajectory.codec import unpack
from async_rl.trajectory.given import given_in

TASK = """
from async_rl.task.guess import Guess
from async_rl.task.protocol import Problem


class Uneven(Guess):
    '''Of every other problem any guess that begins with the secret's first digit counts.'''

    def _make(self, order, rounds):
        made = super()._make(order, rounds)
        digits = {p.index: f"{p.data['secret']:0{self.num_digits}d}" for p in made}
        return [
            Problem(index=p.index, prompt=p.prompt, data={**p.data, "text": digits[p.index], "kind": p.index % 2})
            for p in made
        ]

    async def rollout(self, problem, session):
        text = ""
        for _ in range(3):
            text = await session.generate(max_tokens=self.num_digits)
            session.append("!")
            if problem.data["kind"] or text == problem.data["text"]:
                return 1.0
        return 0.0
"""


@pytest.fixture
def task(tmp_path: Path) -> str:
    file = tmp_path / "uneven.py"
    file.write_text(TASK)
    return f"task.name={file}:Uneven"


def sound(folder: RunFolder) -> None:
    audit = audit_run(folder)
    assert not audit.violations, audit.violations[:3]
    assert replay(folder).difference is None


def test_a_sampled_run_is_audited_and_replayed_bit_for_bit(tmp_path: Path, tiny_model: Path, task: str) -> None:
    settings = quick_settings(
        tiny_model, task, "trainer.steps=6", "recipe=grpo", "task.args.num_secrets=12", "task.args.rounds_train=1",
        "sampler.choose=thompson", "sampler.candidates=4", "sampler.samples=adaptive", "sampler.turns=adaptive",
        "sampler.start=failure", "sampler.start_share=0.5", "sampler.half_life=3",
    )  # fmt: skip
    folder = train(settings, tmp_path / "run")
    sound(folder)
    rows = list(read_rows(folder.metrics))
    assert all(0 < row["sampler/estimate"] < 1 for row in rows)
    assert min(row["sampler/samples"] for row in rows) < 4
    with StoreReader(folder.store) as store:
        decided = list(store.decisions())
        started = [one for one in decided if one.decision.start is not None]
        assert len({one.decision.samples for one in decided}) > 1
        assert started
        given = 0
        for one in started:
            for blob in store.load_groups([one.group]):
                trajectory = unpack(blob)
                found = given_in(trajectory)
                assert found is not None
                given += sum(length for _, length in found.stretches)
                sampled = set(trajectory.policy_positions().tolist())
                for start, length in found.stretches:
                    assert not sampled & set(range(start, start + length))
                    assert not trajectory.log_behaviour[start : start + length].any()
        assert given
    finds_defects(folder)


def finds_defects(folder: RunFolder) -> None:
    """The audit finds decisions and outcomes that do not follow from the trajectories."""
    changes = (
        "UPDATE decisions SET samples = 3 WHERE group_id = (SELECT max(group_id) FROM decisions)",
        "UPDATE decisions SET seen = 0 WHERE group_id = (SELECT max(group_id) FROM decisions)",
        "UPDATE outcomes SET successes = successes + 1 WHERE number = 1",
        "DELETE FROM decisions WHERE group_id = (SELECT max(group_id) FROM groups WHERE split = 'train')",
        "UPDATE decisions SET start = x'93c40090c2' WHERE start IS NOT NULL",
    )
    for change in changes:
        before = folder.store.read_bytes()
        connection = sqlite3.connect(folder.store)
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute(change)
        connection.commit()
        connection.close()
        kinds = {violation.kind for violation in audit_run(folder).violations}
        assert "decision" in kinds, change
        folder.store.write_bytes(before)


@pytest.mark.nightly
@pytest.mark.parametrize("choose", ["band", "ucb", "curriculum"])
def test_a_resumed_run_goes_on_with_the_same_statistics(
    tmp_path: Path, tiny_model: Path, task: str, choose: str
) -> None:
    words = {
        "ucb": "sampler.source_field=kind",
        "band": "sampler.refuse_outside=false",
        "curriculum": "sampler.low=0.2",
    }
    settings = quick_settings(
        tiny_model, task, "trainer.steps=4", "recipe=grpo", f"sampler.choose={choose}", "sampler.start=field",
        "sampler.start_field=text", "sampler.start_min=0.5", "sampler.start_max=0.5", "checkpoint.every=2",
        words[choose], "verify.share=1", "verify.rewards=always",
    )  # fmt: skip
    folder = train(settings, tmp_path / "run")
    sound(folder)
    resume_training(folder.path, ["trainer.steps=7"], console=Console(quiet=True), accepted=())
    sound(folder)
    assert not [
        row for row in folder.read_events() if row.event.event in ("trajectory_doubted", "rewards_not_repeatable")
    ]
