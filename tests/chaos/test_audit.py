"""Every kind of defect, written by hand into a whole run, is found and named; a whole run has none."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path

import pytest
from support_audit import (
    REFUSED,
    SIZE,
    STEPS,
    WAITING,
    P,
    change,
    put_batch,
    put_trajectory,
    replace_weights,
    reported,
    write_run,
)

from async_rl.cli.main import main
from async_rl.errors import UserError
from async_rl.observe.audit import Audit, audit_run, describe_violations
from async_rl.run_folder import RunFolder, append_row


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path) -> RunFolder:
    return write_run(tmp_path / "run", tiny_model)


def test_a_whole_run_has_no_defect(run: RunFolder) -> None:
    assert audit_run(run) == Audit(
        groups_admitted=STEPS * P + 1 + WAITING,
        groups_trained=STEPS * P,
        groups_refused=1,
        groups_waiting=WAITING,
        steps=STEPS,
        trajectories=STEPS * P * SIZE,
        lag_max=1,
        violations=(),
    )


LAST = STEPS * P + WAITING
"""number of the last group"""


def drop_last(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


@pytest.mark.parametrize(
    ("defect", "expected"),
    [
        # a group of which nothing is known any more
        (lambda run: change(run, f"DELETE FROM groups WHERE group_id = {REFUSED}"),
         f"lost: group {REFUSED} was admitted and has no row in the store"),
        # its row is there, its batch has forgotten it
        (lambda run: put_batch(run, 1, [4, 5, 7]),
         "lost: group 8 has step 1, but is not in that batch"),
        (lambda run: change(run, f"UPDATE groups SET refused_because = NULL WHERE group_id = {REFUSED}"),
         f"lost: group {REFUSED} is neither trained nor refused; begun with weights 0, it had to be by"),
        (lambda run: change(run, f"UPDATE groups SET refused_because = '' WHERE group_id = {REFUSED}"),
         f"lost: group {REFUSED} was refused without a reason"),
        (lambda run: change(run, "DELETE FROM trajectories WHERE group_id = 3 AND sample = 1"),
         "lost: group 3 of step 0 lacks its samples 1"),
        (lambda run: change(run, "UPDATE payloads SET payload = x'00' WHERE id = 1"),
         "lost: a trajectory of step 0 cannot be read"),
        (lambda run: put_batch(run, 2, [9, 10, 11, 99]),
         "lost: group 99 of step 2 has no row in the store"),
        (lambda run: put_batch(run, 2, [0, 10, 11, 12]),
         "duplicated: group 0 is in the batches of steps 0, 2"),
        (lambda run: put_batch(run, 2, [10, 10, 11, 12]),
         "duplicated: group 10 is in the batches of steps 2, 2"),
        (lambda run: change(run, "UPDATE groups SET refused_because = 'stale' WHERE group_id = 5"),
         "duplicated: group 5 is in a batch and also refused (stale)"),
        (lambda run: put_trajectory(run, 16, 2, version=1),
         "stale: sample 2 of group 16, trained at step 3, has tokens of version 1: 2 steps old, at most 1 are allowed"),
        (lambda run: put_trajectory(run, 16, 2, version=2, newest=4),
         "stale: sample 2 of group 16, trained at step 3, has tokens of version 4, which came after it"),
        (lambda run: change(run, "UPDATE groups SET problem = problem + 1 WHERE group_id = 7"),
         "order: group 7 has problem"),
        (lambda run: change(run, "UPDATE groups SET position = position + 1 WHERE group_id >= 7"),
         "order: group 7 is attempt 0 at position 8 of the prompt order; attempt 0 at position 7 is next"),
        (lambda run: change(run, f"UPDATE groups SET position = 5, attempt = 1 WHERE group_id = {LAST}"),
         f"duplicated: groups 5 and {LAST} both are attempt 1 at position 5 of the prompt order, or the first of them"),
        (lambda run: put_batch(run, 1, [4, 5, 7]),
         "batch: the batch of step 1 has 3 groups instead of 4"),
        (lambda run: change(run, "DELETE FROM batches WHERE step = 2"),
         "batch: the batch of step 2 was formed 0 times"),
        (lambda run: change(run, f"INSERT INTO batches VALUES ({STEPS}, '[{LAST}]', 0, 0)"),
         f"batch: there is a batch of step {STEPS}, but the run has {STEPS} steps"),
        (lambda run: change(run, "UPDATE batches SET trained_at = NULL WHERE step = 1"),
         "batch: the batch of step 1 was never marked as trained"),
        (lambda run: change(run, "UPDATE meta SET value = 1 WHERE key = 'consumed_step'"),
         "checkpoint: the store says steps up to 1 are in a checkpoint, of 4"),
        (lambda run: change(run, "DELETE FROM evaluations WHERE evaluation = 1"),
         "evaluation: evaluation 1 was reported and is not in the store"),
        (lambda run: change(run, "UPDATE evaluations SET rewards = '[1.0]' WHERE evaluation = 0"),
         "evaluation: evaluation 0 has 1 trajectories instead of 4"),
        (lambda run: run.record(reported(1, STEPS)),
         "evaluation: evaluation 1 was reported 2 times"),
        (lambda run: drop_last(run.events), "evaluation: there is no evaluation after the last step"),
        (lambda run: append_row(run.metrics, {"step": 2}), "record: metrics.jsonl has step 2 2 times"),
        (lambda run: drop_last(run.metrics), "record: metrics.jsonl has step 3 0 times"),
        (lambda run: drop_last(run.weights), "record: weights.jsonl has no hash of the last weights"),
        (lambda run: append_row(run.weights, {"version": 2, "hash": "0"}),
         "record: weights.jsonl has the hash of version 2 2 times"),
        (lambda run: replace_weights(run.checkpoints / "step_000004", b"other"),
         "checkpoint: step_000004: model.safetensors is not what was written (checksum)"),
        (lambda run: (run.checkpoints / "step_000004").rename(run.checkpoints / "step_000003"),
         "checkpoint: there is no checkpoint of the last version, 4"),
    ],
)  # fmt: skip
def test_a_defect_is_found_and_named(run: RunFolder, defect: Callable[[RunFolder], object], expected: str) -> None:
    defect(run)
    found = describe_violations(audit_run(run).violations)
    assert any(line.startswith(expected) for line in found), found


def test_the_groups_behind_the_last_batch_are_not_lost_unless_there_are_too_many(run: RunFolder) -> None:
    more = range(LAST + 1, LAST + 8)
    for group in more:
        row = f"{group}, problem, split, {group}, 0, {STEPS}, 0, '', NULL, NULL"
        change(run, f"INSERT INTO groups SELECT {row} FROM groups LIMIT 1")
    lines = [line for line in describe_violations(audit_run(run).violations) if line.startswith("lost")]
    assert len(lines) == WAITING + len(more) - 2 * P  # with max_staleness 1 there are two batches of slots
    assert lines[-1].startswith(f"lost: group {more[-1]} is neither trained nor refused; at most 8 groups can be in")


def test_a_run_that_was_stopped_on_its_way_is_whole_as_far_as_it_came(run: RunFolder) -> None:
    run.summary.unlink()
    assert audit_run(run).violations == ()
    drop_last(run.metrics)  # the batch of the last step is formed, the step is still to come
    drop_last(run.events)
    assert audit_run(run).violations == ()


def test_the_command_ends_with_what_it_found(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(run) == 0
    assert "Nothing was lost, nothing was trained twice" in capsys.readouterr().out
    change(run, "DELETE FROM batches WHERE step = 2")
    assert command(run) == 1
    assert "WRONG: batch: the batch of step 2 was formed 0 times" in capsys.readouterr().out


def command(run: RunFolder) -> int:
    with pytest.raises(SystemExit) as end:
        main(["audit", str(run.path)])
    return int(str(end.value.code))


def test_what_is_no_run_or_still_runs_is_not_audited(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is not a run folder"):
        audit_run(RunFolder(tmp_path / "nowhere"))
    with run.lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="this run is still going on"):
            audit_run(run)


def test_a_problem_may_be_asked_again_after_its_group_was_refused(run: RunFolder) -> None:
    again = f"UPDATE groups SET attempt = 1, position = {REFUSED}, problem = (SELECT problem FROM groups WHERE"
    change(run, f"{again} group_id = {REFUSED}) WHERE group_id = {LAST}")
    assert audit_run(run).violations == ()


def test_batches_whose_tokens_are_deleted_are_judged_by_their_rows(run: RunFolder) -> None:
    of_step_0 = "SELECT id FROM trajectories WHERE step = 0"
    change(run, f"DELETE FROM payloads WHERE id IN ({of_step_0})", "INSERT INTO meta VALUES ('first_step', 1)")
    audit = audit_run(run)
    assert (audit.violations, audit.trajectories) == ((), STEPS * P * SIZE)
    change(run, "UPDATE trajectories SET version_max = 1 WHERE group_id = 2 AND sample = 0")
    assert [finding.kind for finding in audit_run(run).violations] == ["stale"]
