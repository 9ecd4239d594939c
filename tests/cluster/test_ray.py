"""Runs on real Ray clusters of several nodes on this machine."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from support_command import run_command, wait_for
from support_ray import GROUPS, INSTALLED, NAMES, add, asked, lose, nodes, ray_run

from async_rl.observe.audit import audit_run

pytestmark = [pytest.mark.nightly, pytest.mark.skipif(not INSTALLED, reason="needs Ray: make ray")]
ON_GENERATOR_NODES = ("cluster.generator_resources={generators: 1}",)

OWN_TASK = """
import asyncio, os
from pathlib import Path
from async_rl.task.guess import Guess
from pace import SLOW_S

class Slow(Guess):
    async def rollout(self, problem, session):
        if Path(SLOW_FILE).exists():
            await asyncio.sleep(SLOW_S)
        return await super().rollout(problem, session)
"""
OWN_RECIPE = """
import time
from pathlib import Path
import torch
from async_rl import Coefficients, Columns

def reinforce(columns: Columns) -> Coefficients:
    if not Path(SLOW_FILE).exists():
        time.sleep(2.0)  # now the trainer is the slower side
    of_token = columns.trajectory_of_turn[columns.turn_of_token]
    policy = (columns.reward - columns.reward.mean())[of_token] / len(of_token)
    return Coefficients(policy=policy.to(columns.log_prob.dtype), metrics={})
"""


def test_a_node_with_two_generators_dies_and_another_comes(tmp_path: Path, tiny_model: Path) -> None:
    with nodes(num_cpus=2, resources={"trainers": 1}) as cluster:
        first = add(cluster, num_cpus=2, resources={"generators": 2})
        words = (
            "cluster.generators=2",
            "cluster.trainer_resources={trainers: 1}",
            "trainer.steps=100000",
            *ON_GENERATOR_NODES,
        )
        run = ray_run(cluster, tmp_path, tiny_model, *words)
        run.wait_for(lambda: run.steps >= 5 and len(run.events("generator_joined")) == 2, "both generators' work")
        assert asked(cluster, NAMES) == str(
            [f"run/{name}" for name in ("buffer", "generator-0", "generator-1", "trainer-0")]
        )
        lose(cluster, first)
        run.wait_for(lambda: len(run.events("generator_lost")) == 2, "the loss to be seen")
        add(cluster, num_cpus=2, resources={"generators": 2})
        run.wait_for(lambda: len(run.events("generator_joined")) == 4, "both to be back")
        done = run.steps
        run.wait_for(lambda: run.steps >= done + 5, "further steps")
        run.process.send_signal(signal.SIGTERM)
        said = run.said()
        assert run.process.returncode == 143, said
        assert asked(cluster, f"({NAMES}, {GROUPS})") == "([], [])"
    assert said.count("Ray starts it again where there is room (death 1; 5 restarts are allowed)") == 2
    assert len(run.events("generator_joined")) == 4
    audit = audit_run(run.folder)
    assert (audit.count("lost"), audit.count("duplicated"), audit.violations) == (0, 0, ())
    assert audit.steps >= done + 5


def test_ctrl_c_ends_the_run_in_one_line_and_it_goes_on_with_ray_and_without(tmp_path: Path, tiny_model: Path) -> None:
    with nodes(num_cpus=4) as cluster:
        run = ray_run(
            cluster, tmp_path, tiny_model, "cluster.generators=1", "trainer.steps=100000", "checkpoint.every=2"
        )
        run.wait_for(lambda: run.steps >= 4, "some steps")
        os.killpg(run.process.pid, signal.SIGINT)
        said = run.said()
        assert run.process.returncode == 130, said
        assert said.splitlines()[-1].startswith(
            "async-rl: stopped by SIGINT; everything is down, the record of the run is"
        )
        assert "Traceback" not in said
        assert asked(cluster, f"({NAMES}, {GROUPS})") == "([], [])"
        done = run.steps
        run.start(["--resume", "run", f"trainer.steps={done + 4}"])
        said = run.said()
        assert run.process.returncode == 0, said
        assert run.steps == done + 4
    words = ["run", "--resume", tmp_path / "run", "cluster.engine=local", f"trainer.steps={done + 8}"]
    local = run_command(*words, timeout_s=300)
    assert local.returncode == 0, local.stderr
    assert run.steps == done + 8
    assert audit_run(run.folder).violations == ()


def test_generators_come_and_go_by_who_waits_and_the_users_code_goes_with_them(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))  # where the audit finds the task
    slow = tmp_path / "slow"
    slow.touch()
    (tmp_path / "task.py").write_text(OWN_TASK.replace("SLOW_FILE", repr(str(slow))))
    (tmp_path / "pace.py").write_text("SLOW_S = 3.0\n")
    (tmp_path / "patient.py").write_text(OWN_RECIPE.replace("SLOW_FILE", repr(str(slow))))
    with nodes(num_cpus=4) as cluster:
        words = ("cluster.generators=1..3", "cluster.scale_s=6", "trainer.steps=100000", "task.name=task.py:Slow")
        words = (*words, "recipe=patient.py:reinforce")
        run = ray_run(cluster, tmp_path, tiny_model, *words, "task.args={num_secrets: 8, max_turns: 3}")
        run.wait_for(lambda: len(run.events("generator_joined")) >= 3, "three generators")
        slow.unlink()
        run.wait_for(lambda: run.events("generator_left"), "one that leaves")
        run.process.send_signal(signal.SIGTERM)
        said = run.said()
        assert run.process.returncode == 143, said
    assert "generators 1 -> 2: the trainer waited for data" in said
    assert "-> 1: generators waited for permits" in said or "-> 2: generators waited for permits" in said
    assert next(row["reason"] for row in run.events("generator_left")) == "told to end (SIGTERM)"
    assert audit_run(run.folder).violations == ()


def test_ranks_are_spread_over_nodes_and_one_that_dies_ends_the_run(tmp_path: Path, tiny_model: Path) -> None:
    with nodes(num_cpus=0) as cluster:
        for _ in range(2):
            last = add(cluster, num_cpus=2, resources={"trainers": 1})
        words = (
            "trainer.ranks=2", "cluster.ranks_per_node=1", "cluster.run_on=anywhere", "cluster.generators=1",
            "cluster.trainer_resources={trainers: 1}", "trainer.steps=100000", "checkpoint.every=2",
        )  # fmt: skip
        run = ray_run(cluster, tmp_path, tiny_model, *words)
        run.wait_for(lambda: run.steps >= 4, "some steps")
        lose(cluster, last)
        said = run.said()
        assert run.process.returncode == 1, said
        assert "goes on with the run" in said
        done = run.steps
        run.start(["--resume", "run", "trainer.ranks=1", "cluster.ranks_per_node=0", f"trainer.steps={done + 2}"])
        said = run.said()
        assert run.process.returncode == 0, said
    assert run.steps == done + 2
    assert audit_run(run.folder).violations == ()


def test_nothing_outlives_a_command_that_is_killed(tmp_path: Path, tiny_model: Path) -> None:
    from support_ray import processes_of_ours

    with nodes(num_cpus=4) as cluster:
        run = ray_run(cluster, tmp_path, tiny_model, "cluster.generators=1", "trainer.steps=100000")
        run.wait_for(lambda: run.steps >= 2, "some steps")
        run.process.kill()
        run.process.communicate()
        wait_for(lambda: not processes_of_ours(tmp_path), "the end of every process", 90)
        assert asked(cluster, NAMES) == "[]"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("cluster.generator_resources={spot: 1}",),
            "a generator needs 0.5 CPU, 1 spot on one node, and none has that",
        ),
        (("cluster.trainer_cpus=64",), "set cluster.run_on=anywhere"),
        (("cluster.run_on=anywhere", "cluster.trainer_cpus=64"), "the trainer needs 65 CPU on one node"),
    ],
)
def test_what_the_cluster_cannot_hold_is_said_in_one_line(
    words: tuple[str, ...], said: str, tmp_path: Path, tiny_model: Path
) -> None:
    with nodes(num_cpus=2) as cluster:
        run = ray_run(cluster, tmp_path, tiny_model, *words)
        found = run.said()
    assert run.process.returncode == 2
    assert found.startswith("async-rl: ")
    assert len(found.splitlines()) == 1
    assert said in found
    assert not run.folder.path.exists()
    assert list(tmp_path.glob(".run.*")) == []
