"""The same held-out problems before and after a run, in lines of 80 columns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from rich.console import Console as RichConsole
from support_real_tokenizers import NAMES, TEMPLATES, ours
from support_run import quick_settings, train
from support_tokenizers import byte_folder

from async_rl.buffer.store_reader import StoreReader
from async_rl.model.tokenizer import Tokenizer
from async_rl.observe.answers import answer_lines, answer_of, answers_before_and_after, question_of, shortened
from async_rl.observe.console import Console
from async_rl.run_folder import RunFolder
from async_rl.trajectory import Trajectory, Turn, VersionSpan
from async_rl.trajectory.codec import pack, unpack


def episode(prompt: Sequence[int], *said: Sequence[int], reward: float = 1.0) -> Trajectory:
    """`said`: the policy's tokens, the environment's, the policy's, ..."""
    tokens, turns = list(prompt), []
    for place, part in enumerate(said):
        if place % 2 == 0:
            turns.append(Turn(start=len(tokens), length=len(part)))
        tokens += part
    return Trajectory(
        group=0, sample=0, problem=0, split="eval", seed=0, tokens=np.array(tokens, np.int32),
        log_behaviour=np.zeros(len(tokens), np.float32), turns=tuple(turns),
        versions=tuple(VersionSpan(version=0, start=t.start, end=t.start + t.length) for t in turns),
        reward=reward, ended="finished",
    )  # fmt: skip


def test_a_run_ends_with_the_first_held_out_problems_before_and_after(tmp_path: Path, tiny_model: Path) -> None:
    settings = quick_settings(tiny_model, "evaluation.every=2", "evaluation.problems=5", "evaluation.samples=2")
    folder = train(settings, tmp_path / "run")
    summary = json.loads(folder.summary.read_text())
    with StoreReader(folder.store) as store:
        rows = [row for row in store.trajectories(split="eval") if row.sample == 0]
        made = {(row.problem, row.version_min): unpack(store.load_groups([row.group])[0]) for row in rows}
    tokenizer = Tokenizer(tiny_model)
    asked = list(dict.fromkeys(row.problem for row in sorted(rows, key=lambda row: row.group)))
    assert len(summary["answers"]) == 3
    for problem, shown in zip(asked, summary["answers"], strict=False):
        assert shown["question"] == "?"
        for when, version in (("before", 0), ("after", 4)):
            whole = made[problem, version]
            assert shown[when] == {"text": tokenizer.decode(whole.tokens[1:].tolist()), "reward": whole.reward}

    out = RichConsole(record=True, width=80)
    Console(out=out).summary(summary)
    lines = out.export_text().splitlines()
    place = lines.index("3 held-out problems, answered before and after (reward in front):")
    assert lines[place + 1] == "  ?"
    assert lines[place + 2].split()[:2] == ["before", f"{summary['answers'][0]['before']['reward']:.2f}"]
    assert len(lines[place:]) >= 11, "what the run came to stands below"


def test_a_run_without_a_store_or_with_one_evaluation_has_none(tmp_path: Path, tiny_model: Path) -> None:
    assert answers_before_and_after(RunFolder(tmp_path), quick_settings(tiny_model)) == []
    assert list(answer_lines([])) == []


@pytest.mark.parametrize("name", [name for name in NAMES if name != "llama2"])  # it has no chat template
def test_the_question_of_a_real_models_chat_is_its_last_message(name: str) -> None:
    tokenizer = ours(name, {**TEMPLATES, "gemma3": "gemma3"}.get(name, ""))
    chat = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What is 7 + 8?\n Say it."}]
    prompt = tokenizer.encode(tokenizer.render(chat, add_generation_prompt=True))
    shown = question_of(episode(prompt, tokenizer.encode("15")), tokenizer)
    system = "Be short. " if name == "gemma3" else ""  # its template puts that into the user's message
    assert shown == f"{system}What is 7 + 8? Say it."


def test_control_tokens_are_left_out_of_answers_of_several_turns(tmp_path: Path) -> None:
    tokenizer = Tokenizer(byte_folder(tmp_path))
    between = tokenizer.encode("<|im_end|>\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n")
    whole = episode(
        tokenizer.encode("a raw prompt\n"), tokenizer.encode("calc"), between, tokenizer.encode("It is 42.<|im_end|>")
    )
    assert question_of(whole, tokenizer) == "a raw prompt"
    assert answer_of(whole, tokenizer) == {"text": "calc tool 42 assistant It is 42.", "reward": 1.0}


def test_no_line_is_wider_than_80_columns_and_both_ends_are_kept() -> None:
    long = "begin " + "x" * 300 + " end"
    found = [{"question": long, "before": {"text": long, "reward": -12.345}, "after": {"text": "", "reward": 0.5}}]
    lines = list(answer_lines(found))
    assert lines[0].startswith("1 held-out problem, answered")
    assert max(map(len, lines)) == 80
    assert lines[1].startswith("  begin xxx")
    assert lines[1].endswith("xxx end")
    assert lines[2].startswith("    before -12.35  ") or lines[2].startswith("    before -12.34  ")
    assert shortened("short", 80) == "short"
    assert all(len(shortened("y" * n, 30)) == min(n, 30) for n in range(60))


class Recorded:
    """A store with two evaluations of so many problems, of which the first three failed in the second one."""

    def __init__(self, path: Path) -> None:
        pass

    def __enter__(self) -> Recorded:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def held_out_twice(self, most: int) -> list[tuple[int, int]]:
        return [(number, 100 + number) for number in range(8)][:most]

    def load_groups(self, groups: Sequence[int]) -> list[bytes]:
        made = episode([1], [2, 3], reward=groups[0] % 100)
        failed = replace(made, ended="error", reason="KeyError", reward=0.0)
        return [bytes(pack(failed if 100 <= groups[0] < 103 else made))]


def test_a_held_out_episode_that_failed_is_not_shown_as_one_without_reward(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("async_rl.observe.answers.StoreSurvey", Recorded)
    shown = answers_before_and_after(RunFolder(tmp_path), quick_settings(tiny_model))
    assert [one["before"]["reward"] for one in shown] == [3.0, 4.0, 5.0]
