"""A trainer whose ranks are on two machines, started there by torchrun, and whose rank 0 is not the run's neighbour."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support_command import Run, write_config
from support_machines import ADDRESSES, NAMES, NETWORK, TwoMachines
from support_run import quick_settings

from async_rl.instruments.synchronous import train_synchronously
from async_rl.model.folder import load_tensors
from async_rl.run_folder import RunFolder, read_rows
from async_rl.trainer.learner import StepReport
from async_rl.wire.keys import make_keys

RUN, OTHER = 1, 0
"""number of the run's machine; rank 0 is on the other one, whose address comes first in torchrun's order"""
SAME = ("reward/mean", "grad/norm", "entropy", "ess/ratio", "lr/effective", "batch/policy_tokens", "kl/behaviour")


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[TwoMachines]:
    if shutil.which("ip") is None:
        pytest.skip("there is no ip command here (iproute2)")
    try:
        with TwoMachines(tmp_path) as made:
            yield made
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no machines can be made here: {error}")


class RunOnMachine(Run):
    """A run, or what is left of one, on its machine."""

    machines: TwoMachines
    resume: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given = ["--resume", self.folder.path, *self.resume] if self.resume else [self.config]
        words = ["-m", "async_rl", "run", *given] + ([] if self.resume else ["--run-dir", self.folder.path])
        self.process = subprocess.Popen(
            [*self.machines.command(RUN), sys.executable, *map(str, words)], stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip


def torchrun(
    machines: TwoMachines, number: int, run: Path, *, nodes: int, ranks: int, meets: int = RUN
) -> subprocess.Popen[str]:
    """As the run says it, with the address of each machine. `meets`: number of the machine that holds the meeting
    point."""
    meeting = [
        "--nnodes", str(nodes), "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d", "--rdzv-id", run.name,
        "--rdzv-endpoint", f"{NAMES[meets]}:29400", "--local-addr", ADDRESSES[number],
    ]  # fmt: skip
    words = ["-m", "torch.distributed.run", *meeting, "-m", "async_rl", "train", str(run)]
    return subprocess.Popen(
        [*machines.command(number), sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip


def settings(folder: Path, ranks: int, *more: str) -> tuple[str, ...]:
    keys = folder / "keys"
    if not keys.exists():
        make_keys(keys)
    return (
        "trainer.start=external", f"trainer.ranks={ranks}", "trainer.nodes=2", f"trainer.network={NETWORK}",
        f"wire.endpoint=tcp://{ADDRESSES[RUN]}:*", f"wire.keys={keys}", "evaluation.every=0", *more,
    )  # fmt: skip


@pytest.mark.nightly
def test_two_machines_take_the_steps_of_one_process(tmp_path: Path, tiny_model: Path, machines: TwoMachines) -> None:
    steps = ("staleness.max_staleness=0", "recipe=grpo", "batch.groups_per_step=4", "trainer.steps=3")
    config = write_config(tmp_path, tiny_model, *settings(tmp_path, 4, *steps))
    RunOnMachine.machines = machines
    run = RunOnMachine(config, RunFolder(tmp_path / "run"), longest_s=240)
    run.wait_for_event("trainer_awaited")
    trainers = [torchrun(machines, number, run.folder.path, nodes=2, ranks=2) for number in (0, 1)]
    said = run.said()
    told = [trainer.communicate(timeout=60)[0] for trainer in trainers]
    assert run.process.returncode == 0, said + "".join(told)
    assert [trainer.returncode for trainer in trainers] == [0, 0], told
    assert "torchrun --nnodes 2 --nproc-per-node 2 --rdzv-backend c10d --rdzv-id run" in said

    reference: list[StepReport] = []
    alone = quick_settings(tiny_model, "evaluation.every=0", *steps)
    learner = train_synchronously(alone, lambda _, report: reference.append(report))
    rows = list(read_rows(run.folder.metrics))
    assert len(rows) == len(reference) == 3
    for row, report in zip(rows, reference, strict=True):
        for name in SAME:
            assert row[name] == pytest.approx(report.metrics[name], rel=1e-4, abs=1e-6), (row["step"], name)
    weights = load_tensors(next(run.folder.checkpoints.glob("step_000003")))
    for name, tensor in learner.weights().items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.nightly
@pytest.mark.parametrize("meets", [RUN, OTHER])
def test_a_machine_that_dies_is_named_and_the_run_goes_on_with_fewer_ranks(
    meets: int, tmp_path: Path, tiny_model: Path, machines: TwoMachines
) -> None:
    words = settings(tmp_path, 2, "trainer.steps=100000", "checkpoint.every=1", "wire.frozen_after_s=4")
    config = write_config(tmp_path, tiny_model, *words)
    RunOnMachine.machines = machines
    run = RunOnMachine(config, RunFolder(tmp_path / "run"), longest_s=240)
    run.wait_for_event("trainer_awaited")
    trainers = [torchrun(machines, n, run.folder.path, nodes=2, ranks=1, meets=meets) for n in (0, 1)]
    run.wait_for(lambda: "checkpoint" in run.events(), "a checkpoint")
    lost = time.monotonic()
    machines.lose(OTHER)  # rank 0 is there
    said = run.said()
    assert time.monotonic() - lost < 30
    assert run.process.returncode == 1, said
    assert NAMES[OTHER] in said
    assert "--resume" in said
    told, _ = trainers[RUN].communicate(timeout=60)
    assert trainers[RUN].returncode != 0
    if meets == OTHER:  # torchrun would wait for it for minutes
        assert f"its meeting point ({NAMES[OTHER]}:29400) has died or cannot be reached" in told, told

    done = max(row["step"] for row in read_rows(run.folder.metrics)) + 2
    awaited = list(read_rows(run.folder.events))
    RunOnMachine.resume = (f"trainer.steps={done}", "trainer.ranks=1", "trainer.nodes=1")
    try:
        again = RunOnMachine(config, run.folder, longest_s=240)
    finally:
        RunOnMachine.resume = ()
    again.wait_for(
        lambda: any(row["event"] == "trainer_awaited" for row in list(read_rows(run.folder.events))[len(awaited) :]),
        "the run",
    )
    alone = torchrun(machines, RUN, run.folder.path, nodes=1, ranks=1)
    said = again.said()
    assert again.process.returncode == 0, said + alone.communicate(timeout=60)[0]
    assert [row["step"] for row in read_rows(run.folder.metrics)] == list(range(done))


@pytest.mark.nightly
def test_ranks_end_soon_when_the_run_is_ended(tmp_path: Path, tiny_model: Path, machines: TwoMachines) -> None:
    config = write_config(tmp_path, tiny_model, *settings(tmp_path, 2, "trainer.steps=100000"))
    RunOnMachine.machines = machines
    run = RunOnMachine(config, RunFolder(tmp_path / "run"), longest_s=240)
    run.wait_for_event("trainer_awaited")
    trainers = [torchrun(machines, n, run.folder.path, nodes=2, ranks=1) for n in (0, 1)]
    run.wait_for_training()
    run.press_ctrl_c()
    said = run.said()
    assert run.process.returncode == 130, said
    for trainer in trainers:
        out, _ = trainer.communicate(timeout=60)  # long before wire.timeout_s
        assert trainer.returncode != 0, out
