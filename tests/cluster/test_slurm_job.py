"""`async-rl launch slurm`: what the file asks for, what it does, and that SLURM itself takes it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support_command import alive, descendants, run_command, wait_for, write_config
from support_slurm import FakeSlurm, cluster, installed, program, said

from async_rl.run_folder import RunFolder, read_rows

ROOT = Path(__file__).resolve().parents[2]
MATH = ROOT / "configs" / "eight_gpu_math.yaml"
FAST = ("trainer.threads=1", "generator.threads=1", "evaluation.every=0")


def launch(folder: Path, *words: object) -> str:
    """The text of the file; the words name a config first."""
    path = folder / "job.sbatch"
    done = run_command("launch", "slurm", *words, "--output", path)
    assert done.returncode == 0, done.stderr
    return path.read_text()


def directives(text: str) -> list[dict[str, str]]:
    """Options of each component."""
    parts: list[dict[str, str]] = [{}]
    for line in re.findall(r"^#SBATCH (.+)$", text, re.M):
        if line == "hetjob":
            parts.append({})
        else:
            name, _, value = line.removeprefix("--").partition("=")
            parts[-1][name] = value
    return parts


def test_the_two_components_ask_for_what_the_config_and_the_options_say(tmp_path: Path) -> None:
    words = ("--generators", 16, "--gpus-per-generator", 2, "--cpus", 12, "--memory", 96, "--trainer-memory", 500)
    text = launch(tmp_path, MATH, *words, "--time", "1-12:00:00", "--partition", "gpu", "--account", "me")
    run, generators = directives(text)
    both = {"requeue": "", "time": "1-12:00:00", "partition": "gpu", "account": "me"}
    assert run == {
        "job-name": "eight-gpu-math", "signal": "B:USR1@40", "open-mode": "append", **both, "nodes": "1", "ntasks": "1",
        "cpus-per-task": "34", "gpus-per-node": "4", "mem": "500G",
    }  # fmt: skip
    assert generators == {
        **both, "ntasks": "16", "cpus-per-task": "12", "gpus-per-task": "2", "mem-per-cpu": "8192M",
    }  # fmt: skip
    assert "vllm.tensor_parallel=2" in text
    assert text.startswith("#!/bin/bash\n")
    assert "sbatch " in text.partition("#SBATCH")[0]
    assert subprocess.run(["bash", "-n", str(tmp_path / "job.sbatch")], check=False).returncode == 0


def test_settings_of_one_machine_are_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "job.sbatch"
    config = ROOT / "configs" / "one_gpu.yaml"  # one GPU that both sides share
    done = run_command("launch", "slurm", config, "--generators", 2, "--output", path)
    assert done.returncode == 0, done.stderr
    assert "trainer.memory_share=0.55 becomes 1" in done.stdout
    assert "the run takes 3 GPUs in all: one machine that has them needs no cluster" in done.stdout
    assert "generator.count=0 trainer.memory_share=1" in path.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--generators", "0"), "--generators is 0; it must be at least 1"),
        (("--time", "soon"), "--time is 'soon'; write hours"),
        (("--time", "0:01:00"), "--time is 60 s, of which the last 40 s are for the checkpoint"),
        (("--image", "x"), "--image is for kubernetes; leave it out"),
        (("--trainer-nodes", "3"), "--trainer-nodes is 3, over which trainer.ranks=4 cannot be spread"),
        (
            ("trainer.device=cuda:1", "trainer.ranks=1", "trainer.sharding=none"),
            "trainer.device is cuda:1: on a cluster",
        ),
        (("trainer.start=external",), "trainer.start=external is for a trainer over several nodes"),
        (("checkpoint.signals=[SIGTERM]",), "checkpoint.signals must hold SIGUSR1"),
        (("generator.count=0",), "say how many with --generators"),
        (("generator.cuont=1",), "did you mean"),
    ],
)
def test_what_does_not_fit_is_refused(
    words: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from async_rl.cli.main import main

    path = tmp_path / "job.sbatch"
    with pytest.raises(SystemExit) as end:
        main(["launch", "slurm", str(MATH), "--output", str(path), *words])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not path.exists()


def test_a_file_that_is_there_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "job.sbatch"
    path.write_text("mine")
    done = run_command("launch", "slurm", MATH, "--output", path)
    assert done.returncode == 2
    assert "name another file with --output" in done.stderr
    assert path.read_text() == "mine"


def test_a_job_that_is_queued_again_goes_on_and_trains_every_step_once(tmp_path: Path, tiny_model: Path) -> None:
    config = write_config(tmp_path, tiny_model, *FAST, "trainer.steps=100000", "checkpoint.every=100000", "name=a job")
    text = launch(tmp_path, config, "--generators", 1, "--relay")
    assert "weights.relay=tcp://127.0.0.1:$relay" in text
    slurm, run = FakeSlurm(tmp_path / "bin"), RunFolder(tmp_path / "runs" / "a job-7")
    done, seen = [0], set[int]()
    for _ in range(2):
        job = slurm.start(tmp_path / "job.sbatch", 7, tmp_path)
        wait_for(lambda: len(list(read_rows(run.metrics))) >= done[-1] + 3, "three steps of this life", 240)
        seen |= descendants(job.pid)
        job.send_signal(signal.SIGUSR1)  # to the script alone, as with --signal=B:USR1@40
        out, _ = job.communicate(timeout=120)
        assert job.returncode == 128 + signal.SIGUSR1, out
        done.append(len(list(read_rows(run.metrics))))
    assert slurm.requeued == ["requeue 7"] * 2
    assert slurm.steps == ["--het-group=1 --ntasks=1 --cpus-per-task=1 --kill-on-bad-exit=0 --wait=0 --label"] * 2
    events = list(read_rows(run.events))
    assert [row["version"] for row in events if row["event"] == "resumed"] == [done[1]]
    assert sum(row["event"] == "generator_joined" for row in events) >= 2
    assert [row["step"] for row in read_rows(run.metrics)] == list(range(done[-1]))
    wait_for(lambda: not any(map(alive, seen)), "the end of every process")


# -------------------- SLURM itself


@pytest.mark.nightly
@pytest.mark.skipif(not installed(), reason="needs slurmctld, slurmd, slurm-client and munge, and root")
def test_slurm_runs_the_job_ends_it_queues_it_again_and_it_goes_on(tmp_path: Path, tiny_model: Path) -> None:
    """One job over two nodes, three lives: twice USR1 and the requeue of SLURM, then SIGTERM."""
    config = write_config(tmp_path, tiny_model, *FAST, "trainer.steps=100000", "name=job", "checkpoint.every=100000")
    launch(tmp_path, config, "--generators", 2, "--cpus", 1, "--relay", "--trainer-cpus", 2)
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin" / "async-rl", f'exec "{sys.executable}" -m async_rl "$@"')
    with cluster(tmp_path / "slurm") as environment:
        environment = {**environment, "PATH": f"{tmp_path / 'bin'}:{environment['PATH']}", "OMP_NUM_THREADS": "1"}
        where = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "check": True}
        subprocess.run(["sbatch", "--test-only", "job.sbatch"], **where)  # type: ignore[call-overload]
        job = subprocess.run(["sbatch", "--parsable", "job.sbatch"], **where).stdout.strip()  # type: ignore[call-overload]
        run = RunFolder(tmp_path / "runs" / f"job-{job}")
        lives = [0]
        for _ in range(2):
            wait_for(lambda: len(list(read_rows(run.metrics))) >= lives[-1] + 3, "three steps", 400)
            subprocess.run(["scancel", "--batch", "--signal=USR1", job], **where)  # type: ignore[call-overload]
            wait_for(lambda: count(run, "interrupted") == len(lives), "the end of this life", 240)
            lives.append(len(list(read_rows(run.metrics))))
        wait_for(lambda: len(list(read_rows(run.metrics))) >= lives[-1] + 3, "three steps of the third life", 400)
        subprocess.run(["scancel", "--batch", "--signal=TERM", job], **where)  # type: ignore[call-overload]
        wait_for(lambda: not said(["squeue", "-h", "-t", "PD,R,CG"], environment), "the end of the job", 120)
    assert count(run, "resumed") == 2
    steps = [row["step"] for row in read_rows(run.metrics)]
    assert steps == list(range(len(steps)))


@pytest.mark.nightly
@pytest.mark.skipif(not installed(), reason="needs slurmctld, slurmd, slurm-client and munge, and root")
def test_slurm_spreads_the_trainer_over_two_nodes(tmp_path: Path, tiny_model: Path) -> None:
    config = write_config(tmp_path, tiny_model, *FAST, "trainer.steps=4", "name=job", "trainer.ranks=2")
    launch(tmp_path, config, "--generators", 2, "--cpus", 1, "--trainer-nodes", 2, "--trainer-cpus", 2)
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin" / "async-rl", f'exec "{sys.executable}" -m async_rl "$@"')
    with cluster(tmp_path / "slurm") as environment:
        environment = {**environment, "PATH": f"{tmp_path / 'bin'}:{environment['PATH']}", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            ["sbatch", "--wait", "job.sbatch"], cwd=tmp_path, env=environment, timeout=500, check=False
        )
    [out] = tmp_path.glob("slurm-*.out")
    assert done.returncode == 0, out.read_text()
    [run] = [RunFolder(path) for path in (tmp_path / "runs").glob("job-*") if path.suffix != ".keys"]
    assert [row["step"] for row in read_rows(run.metrics)] == [0, 1, 2, 3]


def count(run: RunFolder, kind: str) -> int:
    return sum(row["event"] == kind for row in read_rows(run.events))
