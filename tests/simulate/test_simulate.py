"""The simulation against timings that can be told by hand, and the workload against episodes with known speeds."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from support_run import quick_settings

from async_rl.buffer.store_reader import GroupRow, TrajectoryRow
from async_rl.cli.main import main
from async_rl.config.schema import to_yaml
from async_rl.instruments.simulate import Forecast, Simulation, Workload, lognormal_groups
from async_rl.instruments.workload import decoding, update_delay

EVEN = Workload(
    groups=((10, 10), (10, 10)), decode_s=0.1, decode_s_per_sequence=0.0, episode_s=0.5, train_s=(3.0,), update_s=0.25,
    message_s=0.01,
)  # fmt: skip
ONE = ("batch.groups_per_step=1", "batch.group_size=2", "generator.max_sequences=64")


def simulate(model: Path, work: Workload, *words: str, steps: int = 40) -> Forecast:
    return Simulation(quick_settings(model, *ONE, *words), work, steps, Random(0)).run()


def test_without_staleness_generating_training_and_updating_follow_each_other(tmp_path: Path) -> None:
    f = simulate(tmp_path, EVEN, "staleness.max_staleness=0")
    # 10 tokens, the reward, training, update; messages: trajectory, batch, published, weights, holds, permit
    assert f.step_s == pytest.approx(10 * 0.1 + 0.5 + 3.0 + 0.25 + 6 * 0.01)
    assert f.lag_share == {0: 1.0}
    assert f.trainer_idle == pytest.approx(1 - 3.0 / f.step_s)
    assert f.generator_idle == pytest.approx(1 - 1.0 / f.step_s)
    assert f.running == pytest.approx(2.0)
    assert f.tokens_per_s == pytest.approx(20 / f.step_s)


def test_side_by_side_the_slower_one_sets_the_pace(tmp_path: Path) -> None:
    f = simulate(tmp_path, EVEN, "staleness.max_staleness=1", "staleness.window=0")
    assert f.step_s == pytest.approx(3.0, rel=0.02), "the trainer never waits"
    assert f.trainer_idle == pytest.approx(0.0, abs=0.01)
    assert f.lag_share == {1: 1.0}
    slow = replace(EVEN, decode_s=1.0)
    f = simulate(tmp_path, slow, "staleness.max_staleness=1", "staleness.window=0")
    # two groups on their way at once, side by side at no cost: twice in the time that one takes around
    assert f.step_s == pytest.approx((10 * 1.0 + 0.5 + 3.0 + 0.25 + 6 * 0.01) / 2, rel=0.01)


@pytest.mark.parametrize("policy", ["pace", "wait", "drop"])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_every_policy_keeps_the_bound_and_fills_every_batch(policy: str, k: int, tmp_path: Path) -> None:
    work = Workload(
        groups=lognormal_groups(mean=40, variation=1.5, size=4, seed=1), decode_s=0.01, decode_s_per_sequence=0.001,
        episode_s=0.1, train_s=(0.3, 0.5), update_s=0.1, message_s=0.005,
    )  # fmt: skip
    words = (f"staleness.policy={policy}", f"staleness.max_staleness={k}", "generator.count=3", "trainer.steps=30")
    settings = quick_settings(tmp_path, *words, "generator.max_sequences=8")
    f = Simulation(settings, work, 30, Random(0)).run()
    assert f.lag_max <= k
    assert sum(f.lag_share.values()) == pytest.approx(1.0)
    assert 0 <= f.trainer_idle <= 1
    assert 0 <= f.generator_idle <= 1
    if policy == "drop" and k == 1:
        assert f.groups_dropped > 0
    assert policy == "drop" or f.groups_dropped == 0
    again = Simulation(settings, work, 30, Random(0)).run()
    assert again == f, "the same seed gives the same run"


def test_the_speed_of_decoding_is_found_again_in_episodes() -> None:
    random = Random(0)
    rows, groups = [], {}
    now = [0.0, 0.0]
    for number in range(300):
        generator, beside = number % 2, random.randint(1, 20)
        # `beside` episodes of equal length side by side, one batch of them after the other
        length = random.randint(5, 200)
        seconds = 0.05 + length * (0.01 + 0.002 * beside)
        for sample in range(beside):
            rows.append(episode(number, sample, length, now[generator], now[generator] + seconds))
        groups[number] = GroupRow(
            group=number, problem=0, split="train", position=number, attempt=0, admitted_version=number,
            admitted_at=100.0 + number, generator=f"generator-{generator}",
        )  # fmt: skip
        now[generator] += seconds
    fixed, step, sequence = decoding(rows, groups)
    assert (fixed, step, sequence) == pytest.approx((0.05, 0.01, 0.002), rel=1e-3)
    assert update_delay(groups.values(), {n: 100.0 + n - 0.3 for n in range(300)}) == pytest.approx(0.3)
    assert update_delay([], {0: 1.0}) == 0.0


def episode(group: int, sample: int, length: int, start: float, end: float) -> TrajectoryRow:
    return TrajectoryRow(
        group=group, sample=sample, split="train", problem=0, step=None, version_min=0, version_max=0, reward=0.0,
        length=length, policy_length=length, num_turns=1, ended="finished", reason="", refused_because=None,
        generator="", started_at=start, finished_at=end,
    )  # fmt: skip


def test_lengths_given_by_hand_have_their_mean_and_spread() -> None:
    groups = lognormal_groups(mean=300, variation=0.8, size=32, seed=0)
    lengths = [length for group in groups for length in group]
    mean = sum(lengths) / len(lengths)
    assert mean == pytest.approx(300, rel=0.1)
    assert (sum((x - mean) ** 2 for x in lengths) / len(lengths)) ** 0.5 / mean == pytest.approx(0.8, rel=0.15)


def test_the_command_prints_forecast_sweeps_and_a_recommendation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(quick_settings(tmp_path)))
    times = ["--length", "20,1", "--decode-s", "0.01,0.0001", "--train-s", "0.4", "--steps", "12"]
    with pytest.raises(SystemExit) as end:
        main(["simulate", str(config), *times, "generator.count=2"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "as configured" in said
    assert "against max_staleness" in said
    assert "recommended: staleness.max_staleness=" in said
    with pytest.raises(SystemExit):
        main(["simulate", str(config), *times, "--one", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["forecast"]["step_s"] > 0.3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "simulate needs the times of a run (--from RUN), or --length, --decode-s and --train-s"),
        (["--length", "long", "--decode-s", "1,1", "--train-s", "1"], "--length is 'long'; it must be two numbers"),
        (["--length", "9,1", "--decode-s", "0,1", "--train-s", "1"], "the first number must be above 0"),
        (["--length", "9,1", "--decode-s", "1,1", "--train-s", "-1"], "--train-s is -1.0; it must be a number of s"),
        (["--generators", "100000"], "--generators is 100000; it must lie between 1 and 10000"),
        (["--steps", "1"], "--steps is 1; at least 5"),
        (["--from", "nowhere"], "nowhere has trained 0 steps; copying a run needs 10 at least"),
    ],
)
def test_what_cannot_be_simulated_is_said(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(quick_settings(tmp_path)))
    with pytest.raises(SystemExit) as end:
        main(["simulate", str(config), *words])
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_the_simulator_loads_no_sockets_no_store_and_no_model() -> None:
    script = (
        "import sys, async_rl.instruments.simulate, async_rl.cli.simulate\n"
        "print([name for name in ('zmq', 'sqlite3', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
