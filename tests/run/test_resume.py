"""Real runs with killed processes: resumed, audited, replayed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support_run import quick_settings

from async_rl.buffer.store import StoreReader
from async_rl.config.schema import to_yaml
from async_rl.errors import UserError
from async_rl.instruments.replay import replay
from async_rl.run_folder import RunFolder, append_row, read_rows
from async_rl.task import make_task
from async_rl.task.order import PromptOrder

STEPS = 14
LONGEST_S = 60.0


@dataclass
class Command:
    """`async-rl` in a process of its own."""

    words: tuple[str, ...]
    process: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        words = [sys.executable, "-m", "async_rl", *self.words]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def end(self) -> tuple[int, str]:
        said, _ = self.process.communicate(timeout=LONGEST_S)
        return self.process.returncode, said


def write_config(tmp_path: Path, model: Path, *overrides: str) -> Path:
    settings = quick_settings(
        model, f"trainer.steps={STEPS}", "checkpoint.every=4", "evaluation.every=3", "wire.timeout_s=30", *overrides
    )
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(settings))
    return path


def start(tmp_path: Path, model: Path, *overrides: str) -> tuple[Command, RunFolder]:
    config = write_config(tmp_path, model, *overrides)
    folder = RunFolder(tmp_path / "run")
    return Command(("run", str(config), "--run-dir", str(folder.path))), folder


def resume(folder: RunFolder, *words: str) -> Command:
    return Command(("run", "--resume", str(folder.path), *words))


def wait_until(happened: Callable[[], bool], command: Command) -> None:
    deadline = time.monotonic() + LONGEST_S
    while not happened():
        if command.process.poll() is not None and not happened():
            pytest.fail(f"the run ended before its time: {command.end()[1]}")
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def trained(folder: RunFolder) -> int:
    return sum(1 for _ in read_rows(folder.metrics))


def kill_at(folder: RunFolder, command: Command, victim: str, *, step: int) -> tuple[int, str]:
    """Kill a process once so many steps are recorded; how the run ended."""
    wait_until(lambda: trained(folder) >= step, command)
    os.kill(command.process.pid if victim == "launcher" else pid_of(folder, victim), signal.SIGKILL)
    return command.end()


def tear(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))


def pid_of(folder: RunFolder, process: str) -> int:
    """Of its newest life."""
    started = [row for row in read_rows(folder.events) if row["event"] == "started"]
    return int([row["pid"] for row in started if row["process"] == process][-1])


def audit(folder: RunFolder, *, steps: int = STEPS) -> None:
    """Nothing lost, nothing twice, no gap, the bound kept, every row there once, the same weights again."""
    settings = folder.settings()
    size, per_step = settings.batch.group_size, settings.batch.groups_per_step
    with StoreReader(folder.store) as store:
        batches = list(store.batches())
        assert [batch.step for batch in batches] == list(range(steps))
        assert all(batch.trained_at is not None for batch in batches)
        assert store.consumed_step() == steps - 1
        rows = [row for row in store.groups() if row.split == "train"]
        in_batches = [group for batch in batches for group in batch.groups]
        assert len(in_batches) == len(set(in_batches)) == steps * per_step
        assert {row.group for row in rows if row.step is not None} == set(in_batches)
        order = PromptOrder(len(make_task(settings.task.name, settings.task.args).problems("train")), settings.seed)
        assert [row.problem for row in rows] == [order(position) for position in range(len(rows))]
        # what is neither trained nor refused was admitted and is still to come: at most the slots
        assert len(rows) - len(in_batches) <= (settings.staleness.max_staleness + 1) * per_step
        for step in range(steps):
            episodes = list(store.trajectories(step=step))
            assert len(episodes) == per_step * size
            assert len({(t.group, t.sample) for t in episodes}) == per_step * size
            assert all(0 <= step - t.version_min <= settings.staleness.max_staleness for t in episodes)
        assert {e.evaluation for e in store.evaluations()} >= {0}
        assert {group for group, _ in store.begun()} <= {row.group for row in rows} - set(in_batches)
    assert [row["step"] for row in read_rows(folder.metrics)] == list(range(steps))
    marks = list(read_rows(folder.weights))
    assert [row["version"] for row in marks if "checksum" in row] == list(range(1, steps + 1))
    assert {0, steps} <= {row["version"] for row in marks if "hash" in row}
    evaluations = [row["evaluation"] for row in read_rows(folder.events) if row["event"] == "evaluation"]
    assert len(evaluations) == len(set(evaluations))
    again = replay(folder)
    assert again.difference is None
    assert again.compared == steps + 1


def test_a_run_of_which_everything_was_killed_in_turn_is_the_run_it_would_have_been(
    tmp_path: Path, tiny_model: Path
) -> None:
    command, folder = start(tmp_path, tiny_model, "recipe=turn_gae_ppo", "critic.warmup_steps=2")
    code, said = kill_at(folder, command, "trainer", step=6)
    assert code == 1
    assert "trainer was killed from outside (SIGKILL)" in said
    assert f"--resume {folder.path}" in said
    tear(folder.checkpoints / "step_000004" / "optimizer.safetensors")

    command = resume(folder)  # from the initial model: there is no other checkpoint
    code, said = kill_at(folder, command, "buffer", step=9)
    assert code == 1
    assert "step_000004 is damaged and left out: optimizer.safetensors is not what was written" in said
    assert "buffer was killed from outside (SIGKILL)" in said

    command = resume(folder)
    kill_at(folder, command, "launcher", step=11)

    command = resume(folder, f"trainer.steps={STEPS + 2}")  # processes of the last launch may still be dying
    code, said = command.end()
    assert code == 0, said
    versions = [row["version"] for row in read_rows(folder.events) if row["event"] == "resumed"]
    assert versions[0] == 0
    assert versions == sorted(versions)
    assert versions[-1] >= 8
    audit(folder, steps=STEPS + 2)

    folder.summary.unlink()  # as if the trainer was killed behind its last checkpoint
    code, said = resume(folder).end()
    assert code == 0, said
    audit(folder, steps=STEPS + 2)

    code, said = resume(folder).end()
    assert code == 2
    assert f"this run is finished ({STEPS + 2} steps)" in said
    a_replay_names_the_first_step_that_differs(folder)


def a_replay_names_the_first_step_that_differs(folder: RunFolder) -> None:
    rows = list(read_rows(folder.weights))
    folder.weights.unlink()
    for row in rows:
        append_row(folder.weights, row if row["version"] != 3 or "hash" in row else {**row, "checksum": "0" * 8})
    code, said = Command(("replay", str(folder.path))).end()
    assert code == 1
    assert "NOT identical: the first difference arises in training step 2" in said
    until = replay(folder, until=2)
    assert until.difference is None
    assert (until.version, until.compared) == (2, 3)
    with pytest.raises(UserError, match=r"--until is 99; the run .* has trained 16 steps"):
        replay(folder, until=99)


def test_a_killed_generator_is_started_again_and_nobody_else_notices(tmp_path: Path, tiny_model: Path) -> None:
    # every finished turn is kept at once: the episodes it had begun go on behind them
    command, folder = start(tmp_path, tiny_model, "generator.count=2", "generator.save_turns_after_s=0")
    for name, step in (("generator-0", 2), ("generator-1", 5), ("generator-0", 8)):
        wait_until(lambda at=step: trained(folder) >= at, command)  # type: ignore[misc]
        os.kill(pid_of(folder, name), signal.SIGKILL)
    code, said = command.end()
    assert code == 0, said
    deaths = [row for row in read_rows(folder.events) if row["event"] == "generator_died"]
    assert len(deaths) == 3
    assert all("was killed from outside (SIGKILL)" in row["reason"] for row in deaths)
    assert [row["restart_in_s"] for row in deaths if row["name"] == "generator-0"] == [0.5, 1.0]
    assert "generator-1 is started again in 0.5 s" in said
    audit(folder)


@pytest.mark.nightly
def test_too_many_deaths_end_a_run_and_what_cannot_be_resumed_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    command, folder = start(tmp_path, tiny_model, "generator.max_restarts=1", "trainer.steps=5000")
    wait_until(lambda: trained(folder) >= 1, command)
    code, said = resume(folder).end()
    assert code == 2
    assert f"a launcher (process {command.process.pid}) is still running it" in said

    first = pid_of(folder, "generator-0")
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: pid_of(folder, "generator-0") != first, command)
    os.kill(pid_of(folder, "generator-0"), signal.SIGKILL)
    code, said = command.end()
    assert code == 1
    assert "generator-0 died 2 times within 300 s (generator.max_restarts=1)" in said
    assert "the first cause: generator-0 was killed from outside (SIGKILL)" in said
    assert f"--resume {folder.path}" in said

    for words, expected in (
        (("optimizer.learning_rate=1",), "optimizer.learning_rate cannot change in a resumed run"),
        (("batch.group_size=8", "trainer.steps=6000"), "batch.group_size cannot change in a resumed run"),
        (("other.yaml",), "leave other.yaml out"),
    ):
        code, said = resume(folder, *words).end()
        assert (code, expected in said) == (2, True), said
    code, said = resume(RunFolder(tmp_path / "nowhere")).end()
    assert code == 2
    assert "nowhere is not a run folder" in said
