"""`async-rl try`: episodes of the present model, shown; nothing is trained, nothing is left behind."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from support_command import LONGEST_S, write_config
from support_models import qwen3_config, write_folder

from async_rl.cli.main import main
from async_rl.model.tokenizer import Tokenizer
from async_rl.observe.episode import EpisodePrinter, colour_of, conclusion, plain
from async_rl.trajectory import Trajectory, Turn, VersionSpan

TASK = """
    from async_rl.task.guess import Guess

    class Judged(Guess):
        async def rollout(self, problem, session):
            reward = await super().rollout(problem, session)
            if session.seed % 8 == 3:
                raise KeyError("gold")
            return {"guess": reward, "turns": session.turn}

        def reward_group(self, problem, samples):
            return [{"size": len(samples)} for _ in samples]
"""


def attempt(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["try", *map(str, words)])
    said = capsys.readouterr()
    assert isinstance(end.value.code, int)
    return end.value.code, said.out, said.err


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "trial_task.py").write_text(textwrap.dedent(TASK))
    monkeypatch.chdir(tmp_path)
    return write_config(
        tmp_path, tiny_model, "task.name=trial_task.py:Judged", "task.args.num_secrets=8", "task.args.max_turns=3",
        "task.reward_weights.size=0.5",
    )  # fmt: skip


def test_turns_parts_and_failures_are_shown_as_plain_text_in_a_file(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(tmp_path.iterdir())
    code, said, _ = attempt(capsys, config, "--episodes", 6)
    assert code == 0, said
    assert "\x1b" not in said
    assert [line for line in said.splitlines() if line.startswith("episode ")][5].startswith("episode 6 of 6")
    assert said.count("sample 1") == 2, "groups of 4: a whole one and half of one"
    assert "turn 1" in said
    assert "environment" in said
    assert "guess " in said
    assert "0.5 x size " in said
    assert "FAILED  error" in said
    assert "KeyError: 'gold' (trial_task.py:" in said
    assert "parts, unweighted: " in said.splitlines()[-3]
    assert said.splitlines()[-1].startswith("failed: ")
    assert set(tmp_path.iterdir()) - {tmp_path / "__pycache__"} == before


def test_the_same_seed_gives_the_same_episodes_and_a_split_may_be_chosen(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (config, "task=guess", "--episodes", 2, "--samples", 1)
    texts = [_texts(attempt(capsys, *words)[1]) for _ in range(2)]
    assert texts[0] == texts[1]
    held_out = attempt(capsys, *words, "--split", "eval", "evaluation.temperature=0")[1]
    assert "problem 0 (eval)" in held_out
    assert "problem 1 (eval)" in held_out


def _texts(said: str) -> list[str]:
    """Without the seconds."""
    return [line for line in said.splitlines() if not line.startswith("episode ")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.path=nowhere"], "nowhere"),
        (["task.args.max_turn=3"], "did you mean 'task.args.max_turns'?"),
        (["--episodes", "0"], "--episodes is 0; it must be at least 1"),
        (["task=guess", "task.reward_weights.x=1"], "task.reward_weights names 'x', but the reward of task 'guess'"),
        (["generator.device=cuda"], "generator.device"),
        (["generator.max_context=100000"], "generator.max_context is 100000, but the model of"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    config: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    code, _, error = attempt(capsys, config, *words)
    assert code == 2
    assert said in error
    assert error.count("\n") <= 2
    assert "Traceback" not in error


def test_ctrl_c_ends_it_in_a_line(config: Path, tmp_path: Path) -> None:
    (tmp_path / "slow_task.py").write_text(
        "import asyncio\nfrom async_rl.task.guess import Guess\n\n"
        "class Slow(Guess):\n    async def rollout(self, problem, session):\n"
        "        open('begun', 'w').close()\n        await asyncio.sleep(1000)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "async_rl", "try", str(config), "task.name=slow_task.py:Slow"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    deadline = time.monotonic() + LONGEST_S
    while not (tmp_path / "begun").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=LONGEST_S)
    assert process.returncode == 130
    assert error == "async-rl: stopped by SIGINT\n"


# ---------------------------------------------------------------- one episode in a terminal


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_folder(tmp_path_factory.mktemp("model") / "m", qwen3_config()))


def made(tokenizer: Tokenizer, **changes: object) -> Trajectory:
    tokens = np.array(tokenizer.encode("abcabcab"), np.int32)
    values: dict[str, object] = {
        "group": 0, "sample": 0, "problem": 3, "split": "train", "seed": 0, "tokens": tokens,
        "log_behaviour": np.array([0, 0, -0.01, -9.0, 0, 0, -1.0, 0][: len(tokens)], np.float32),
        "turns": (Turn(start=2, length=2, agent="solver"), Turn(start=6, length=1, reward=0.5)),
        "versions": (VersionSpan(version=0, start=0, end=8),), "contexts": (4,), "reward": 1.25, "ended": "finished",
        "started_at": 1.0, "finished_at": 3.5, "info": {"reward/format": 0.5, "reward/ok": 1.0, "tool_calls": 2.0},
    }  # fmt: skip
    return Trajectory(**{**values, **changes})  # type: ignore[arg-type]


def shown(tokenizer: Tokenizer, *episodes: Trajectory, terminal: bool = True) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, color_system="truecolor" if terminal else None, width=100)
    printer = EpisodePrinter(out=console, tokenizer=tokenizer, total=len(episodes), weights={"format": 0.5})
    printer.legend()
    printer.show(episodes)
    printer.end(episodes)
    return out.getvalue()


def test_contexts_agents_and_notes_and_the_colours_of_a_terminal(tokenizer: Tokenizer) -> None:
    plain_text = shown(tokenizer, made(tokenizer), terminal=False)
    head = "episode 1 of 1  problem 3 (train)  reward 1.25 (0.5 x format 0.5, ok 1)  finished, 2 turns, 3 tokens, 2.5 s"
    assert head in plain_text
    assert "notes: tool_calls 2\n" in plain_text
    order = ["prompt\n", "turn 1 (solver)\n", "context 2\n", "turn 2, turn reward 0.5\n", "environment\n"]
    assert [plain_text.index(title) for title in order] == sorted(plain_text.index(title) for title in order)
    assert "log-prob of a token" not in plain_text
    coloured = shown(tokenizer, made(tokenizer))
    assert "log-prob of a token" in coloured
    worst = colour_of(-9.0).color
    assert worst == colour_of(-5.0).color != colour_of(-0.01).color
    assert worst is not None
    assert worst.triplet is not None
    assert f"38;2;{worst.triplet.red};{worst.triplet.green};{worst.triplet.blue}m" in coloured


def test_what_a_model_writes_cannot_command_the_terminal() -> None:
    assert plain("a\x1b[2Jb\x07\n\tü👩‍🚀\x7f\u0085") == "a␛[2Jb␇\n\tü👩‍🚀␡�"


def test_the_end_counts_what_failed_apart(tokenizer: Tokenizer) -> None:
    failed = made(tokenizer, ended="error", reason="KeyError: 'gold'", reward=0.0)
    lines = conclusion([made(tokenizer), made(tokenizer, reward=0.25, ended="length"), failed], {})
    assert lines == [
        "3 episodes: mean reward 0.75 (0.25 to 1.25)",
        "parts, unweighted: format 0.5, ok 1",
        "ended: 1 finished, 1 length; 3 tokens on average",
        "failed: 1 x KeyError: 'gold'",
    ]
    assert conclusion([failed], {}) == ["1 episodes", "failed: 1 x KeyError: 'gold'"]


def test_a_long_episode_is_cut_in_the_middle(tokenizer: Tokenizer) -> None:
    long = np.array(tokenizer.encode("ab") + tokenizer.encode("c") * 3000, np.int32)
    episode = made(
        tokenizer, tokens=long, log_behaviour=np.zeros(len(long), np.float32), contexts=(),
        turns=(Turn(start=2, length=3000),), versions=(VersionSpan(version=0, start=2, end=len(long)),),
    )  # fmt: skip
    said = shown(tokenizer, episode, terminal=False)
    assert said.count("c") < 1300
    assert "… 1802 tokens are not shown (--whole shows them) …" in said
