"""Checks of model, task, tokenizer, reward, memory and agreement, each by its inputs."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from support_run import quick_settings
from support_tokenizers import byte_folder

from async_rl.config import Settings
from async_rl.config.schema import structured
from async_rl.doctor import machine as memory
from async_rl.doctor import problems as reward
from async_rl.doctor import problems as tokens
from async_rl.doctor.examine import examine_run
from async_rl.doctor.group_reward import judge_group_reward
from async_rl.doctor.tasks import show_episode
from async_rl.finding import Finding
from async_rl.instruments import agreement
from async_rl.instruments.agreement import WeightDifference
from async_rl.instruments.rehearsal import write_tiny_model
from async_rl.model.create import write_character_tokenizer
from async_rl.model.tokenizer import Tokenizer
from async_rl.run.memory import Estimate, Part, describe_estimate, estimate, read_available
from async_rl.task import Task, make_task
from async_rl.task.protocol import Problem, Sample, Segment, Session
from async_rl.task.weigh import Weights
from async_rl.weights.canary import Evidence, compare

# ----------------------------------------------------------------------------------------- tokenizer


def character_tokenizer(folder: Path, alphabet: str, template: str = "") -> Tokenizer:
    write_character_tokenizer(folder, alphabet)
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return Tokenizer(folder)


def lowercasing_tokenizer(folder: Path) -> Tokenizer:
    """One that does not give back what it was given, as many do."""
    write_character_tokenizer(folder, "abcdefghijklmnopqrstuvwxyz? ")
    made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.normalizer = tokenizers.normalizers.Lowercase()
    made.model = tokenizers.models.WordLevel({**made.get_vocab(), "ZZ": 90}, unk_token="")
    made.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


def test_a_tokenizer_is_judged_by_what_comes_back(tmp_path: Path) -> None:
    whole = character_tokenizer(tmp_path / "whole", "0123456789?<>=!")
    assert tokens.judge_round_trip(["?12<", ""], whole).level == "ok"
    found = tokens.judge_round_trip(["?12<", "?a"], whole)
    assert found.level == "error"
    assert "no token for 'a'" in found.said
    found = tokens.judge_round_trip(["what? ", "What?"], lowercasing_tokenizer(tmp_path / "lower"))
    assert found.level == "warning"
    assert "...'What?' as ...'what?'" in found.said


class Chats(Task):
    """Two prompts."""

    def problems(self, split):
        return [Problem(index=i, prompt=[{"role": "user", "content": f" say {i}"}]) for i in range(2)]


def test_transformers_is_asked_for_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tokens.judge_plain(Chats(), Tokenizer(byte_folder(tmp_path / "same")))
    assert (found.level, found.said) == ("ok", "it makes the same tokens of 4 prompts")
    other = byte_folder(tmp_path / "other", merges=[("s", "a"), ("sa", "y")], template=None)
    values = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(values | {"tokenizer_class": "LlamaTokenizer"}))
    found = tokens.judge_plain(Chats(), Tokenizer(other))  # whose class puts its own parts in place of the file's
    assert found.level == "warning"
    assert found.said.startswith("it makes other tokens of a prompt: behind '' it has the tokens")
    monkeypatch.setattr(Tokenizer, "render", lambda *_, **__: "else")
    found = tokens.judge_plain(Chats(), Tokenizer(byte_folder(tmp_path / "rendered")))
    assert "the chat template writes 'else', by transformers '<|im_start|>user" in found.said


def test_a_history_must_read_as_its_pieces(tmp_path: Path) -> None:
    episode = [Segment(text="?", policy=False), Segment(text="12", policy=True), Segment(text="<", policy=False)]
    tokenizer = character_tokenizer(tmp_path / "whole", "0123456789?<>=!")
    assert tokens.judge_growth([episode], tokenizer).level == "ok"
    assert tokens.judge_growth([], tokenizer).level == "ok"
    lower = [Segment(text="a ", policy=False), Segment(text="B", policy=True)]
    assert tokens.judge_growth([lower], lowercasing_tokenizer(tmp_path / "lower")).level == "warning"


KEEPS = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
REWRITES = "{{ messages | length }}" + KEEPS


@pytest.mark.parametrize(("template", "level"), [("", "ok"), (KEEPS, "ok"), (REWRITES, "warning")])
def test_a_chat_template_must_only_append(tmp_path: Path, template: str, level: str) -> None:
    tokenizer = character_tokenizer(tmp_path, "abc", template)
    assert [finding.level for finding in tokens.judge_template(tokenizer)] == [level]


def test_a_turn_that_the_template_ends_with_no_end_token_is_told(tmp_path: Path) -> None:
    marks = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    unnamed = Tokenizer(byte_folder(tmp_path / "a", specials=marks, eos="<|endoftext|>"))
    found = list(tokens.judge_template(unnamed))
    assert [finding.level for finding in found] == ["ok", "warning"]
    assert "'<|im_end|>'" in found[1].said
    assert "add 258 to eos_token_id" in found[1].remedy
    named = {"generation": {"eos_token_id": [256, 258]}}
    tokenizer = Tokenizer(byte_folder(tmp_path / "b", specials=marks, eos="<|endoftext|>", **named))
    assert [finding.level for finding in tokens.judge_template(tokenizer)] == ["ok"]


@pytest.mark.parametrize("name", ["guess", "sort", "arithmetic", "countdown", "calculator"])
def test_our_tasks_come_back_from_their_own_alphabet(tmp_path: Path, name: str) -> None:
    task = make_task(name, {})
    tokenizer = character_tokenizer(tmp_path, task.alphabet)  # type: ignore[attr-defined]
    episodes = tokens.episodes_of(task)
    assert len(episodes) == 16
    assert tokens.judge_round_trip(tokens.prompts_of(task, tokenizer), tokenizer).level == "ok"
    assert tokens.judge_growth(episodes, tokenizer).level == "ok"


# -------------------------------------------------------------------------------------------- reward


@dataclass
class Timed(Task):
    """A task whose reward takes its time."""

    blocks_s: float = 0.0
    waits_s: float = 0.0
    raises: int = 0
    """of so many episodes, one raises"""
    name: str = "timed"
    played: int = 0

    def problems(self, split: str) -> list[Problem]:
        return [Problem(index=i, prompt="?", data={"answer": "7"}) for i in range(3)]

    async def rollout(self, problem: Problem, session: Session) -> float:
        said = await session.generate(max_tokens=4)
        self.played += 1
        if self.raises and self.played % self.raises == 0:
            raise ValueError("no such unit")
        time.sleep(self.blocks_s)
        await asyncio.sleep(self.waits_s)
        return float(said == "7")


def test_a_reward_that_holds_up_the_event_loop_is_a_warning_and_one_that_waits_is_not() -> None:
    blocking = reward.measure_reward(Timed(blocks_s=0.06), seed=0, episodes=3)  # type: ignore[arg-type]
    assert blocking.blocked_s >= 0.06
    assert reward.judge_reward(blocking).level == "warning"
    waiting = reward.measure_reward(Timed(waits_s=0.06), seed=0, episodes=3)  # type: ignore[arg-type]
    assert min(waiting.seconds) >= 0.06
    assert waiting.blocked_s < min(waiting.seconds)


def test_rewards_are_judged_by_what_was_measured() -> None:
    timing = reward.Timing(seconds=(0.01, 0.02, 0.3), blocked_s=0.04)
    assert reward.judge_reward(timing).level == "ok"
    assert "take 20.0 ms an episode (p99 300.0 ms), at most 40.0 ms" in reward.judge_reward(timing).said
    assert reward.judge_reward(replace(timing, blocked_s=0.051)).level == "warning"
    assert reward.judge_reward(replace(timing, failures=("ValueError: x",))).level == "warning"
    assert reward.judge_reward(replace(timing, failures=("ValueError: x",) * 3)).level == "error"


def test_a_reward_that_raises_is_reported_with_its_words() -> None:
    some = reward.judge_reward(reward.measure_reward(Timed(raises=4), seed=0))  # type: ignore[arg-type]
    assert some.level == "warning"
    assert "6 of 24 episodes raised, e.g. ValueError: no such unit" in some.said
    every = reward.judge_reward(reward.measure_reward(Timed(raises=1), seed=0))  # type: ignore[arg-type]
    assert every.level == "error"


def test_a_task_is_set_up_for_its_scripted_episodes_and_torn_down() -> None:
    class Prepared(Timed):
        async def setup(self) -> None:
            self.open = 1

        async def teardown(self) -> None:
            self.open -= 1

        async def setup_episode(self, problem: Problem, session: Session) -> None:
            self.open += 1

        async def rollout(self, problem: Problem, session: Session) -> float:
            return float(self.open - 2)

        async def teardown_episode(self, problem: Problem, session: Session) -> None:
            self.open -= 1

    task = Prepared()
    found = reward.measure_reward(task, seed=0, episodes=5)
    assert (found.failures, len(found.seconds), task.open) == ((), 5, 0)

    assert "    reward: 0.0" in list(show_episode(task, task.problems("eval")[0]))[1:]
    assert task.open == 0

    class Broken(Timed):
        async def setup(self) -> None:
            raise OSError("no docker")

    broken = reward.judge_reward(reward.measure_reward(Broken(), seed=0))
    assert broken.level == "error"
    assert "in its setup: OSError: no docker (test_run_findings.py:" in broken.said


class Judged(Timed):
    """A group's samples are judged by a function."""

    judge: Any = None

    async def rollout(self, problem: Problem, session: Session) -> float:
        session.keep(await session.generate(max_tokens=4))
        return 0.5

    async def reward_group(self, problem: Problem, samples: Sequence[Sample]) -> Any:
        return self.judge(samples)


def judged(judge: Any, **weights: float) -> Any:
    task = Judged()
    task.judge = judge
    return judge_group_reward(task, seed=0, weights=Weights(chosen=weights))


def test_a_judge_of_groups_is_called_with_a_group() -> None:
    found = judged(lambda samples: [float(s.kept == s.completion == "7") for s in samples])
    assert (found.level, found.check) == ("ok", "group reward")
    assert "right answers and random ones in turn) 1.0, 0.0, 1.0, 0.0" in found.said


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        (lambda samples: [1.0], "reward_group returned [1.0], not a list of 4 rewards"),
        (lambda samples: [float("nan")] * len(samples), "nan"),
        (lambda samples: [s.parts["right"] for s in samples], r"KeyError: 'right' (test_run_findings.py:"),
    ],
)
def test_what_a_judge_of_groups_does_wrong_is_told_with_its_place(judge: Any, said: str) -> None:
    found = judged(judge)
    assert found.level == "error"
    assert said in found.said


def test_a_weight_of_a_part_that_nobody_returns_is_told() -> None:
    assert "'rolout', which the reward did not return" in judged(lambda s: [1.0] * len(s), rolout=2.0).said


def test_an_agent_has_no_script_which_is_said_and_no_fault() -> None:
    class Agent(Timed):
        async def rollout(self, problem: Problem, session: Session) -> float:
            return float(session.openai().model == "policy")

    found = reward.judge_reward(reward.measure_reward(Agent(), seed=0))
    assert found.level == "ok"
    assert "played by an agent through the endpoint" in found.said


@pytest.mark.parametrize("name", ["guess", "sort", "calculator"])
def test_demonstrations_play_through_our_tasks(name: str) -> None:
    found = reward.measure_reward(make_task(name, {}), seed=1)
    assert len(found.seconds) == reward.EPISODES
    assert not found.failures


def test_a_step_of_a_rollout_ends_where_it_waits_and_passes_errors_on() -> None:
    async def work() -> float:
        await asyncio.sleep(0)
        try:
            await asyncio.wait_for(asyncio.Event().wait(), 0.01)
        except TimeoutError:
            return 3.0
        return 0.0

    async def run() -> float:
        return await reward.stepped(work(), steps)

    steps: list[float] = []
    assert asyncio.run(run()) == 3.0
    assert len(steps) >= 3


# -------------------------------------------------------------------------------------------- memory


def test_memory_is_judged_by_device() -> None:
    found = Estimate(
        parameters=1, context=1,
        parts=(Part(name="a", bytes=80, device="cpu"), Part(name="b", bytes=15, device="cpu"),
               Part(name="c", bytes=50, device="cuda:0")),
    )  # fmt: skip
    assert found.devices == ["cpu", "cuda:0"]
    assert memory.judge_memory(found, "cpu", 110).level == "ok"
    assert memory.judge_memory(found, "cpu", 100).level == "warning"
    assert memory.judge_memory(found, "cpu", 94).level == "error"
    assert memory.judge_memory(found, "cuda:0", 100).level == "ok"
    assert "in all on cuda:0" in describe_estimate(found)


def test_retention_and_limits_bound_the_disk(tiny_model: Path) -> None:
    def needed(*words: str) -> int:
        settings = quick_settings(tiny_model, "trainer.steps=100000", "checkpoint.every=10", *words)
        return memory.disk_bytes(settings, estimate(settings))

    assert needed("buffer.keep_steps=100") < needed("buffer.max_store_mb=100") < needed() / 10
    assert read_available() > 0


# ----------------------------------------------------------------------------------------- agreement


def test_log_probs_are_judged_by_the_canarys_tolerance(tiny_model: Path) -> None:
    settings = quick_settings(tiny_model)

    def judged(difference: float, *words: str) -> str:
        expected, found = (Evidence(version=0, digests={}, log_probs=[-1.0 + d] * 4) for d in (0.0, difference))
        on = agreement.Sampled(text="it", mismatch=difference**2 / 2, length=4.0)
        return agreement.judge_log_probs(compare(expected, found), on, quick_settings(tiny_model, *words)).level

    assert judged(1e-6) == "ok"
    assert judged(1e-3) == "error"
    assert judged(1e-3, "canary.tolerance=0.01") == "ok"
    assert judged(1e-3, "generator.dtype=bfloat16") == "ok"
    bears_more = ("canary.tolerance=1", "generator.dtype=bfloat16", "recipe=grpo")
    assert (judged(0.05, *bears_more), judged(0.15, *bears_more)) == ("ok", "warning")
    assert judged(0.15, *bears_more, "guard.mismatch=0") == "ok"
    task = make_task(settings.task.name, settings.task.args)
    for parameters in (1000, agreement.SMALL_PARAMETERS + 1):  # sampled episodes; the probe
        comparison, on = agreement.measure_log_probs(settings, task, parameters=parameters)
        assert comparison.max_difference < 1e-4
        assert ("episodes" in on.text) == (parameters == 1000)
        assert 0 <= on.mismatch < 1e-8


def test_a_model_too_large_for_memory_is_not_loaded(tiny_model: Path) -> None:
    settings = quick_settings(tiny_model)
    task = make_task(settings.task.name, settings.task.args)
    assert agreement.check_log_probs(settings, task, 10**9, 7 * 10**9).level == "warning"


def test_what_samples_the_model_leaves_out_the_prompts_that_a_run_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_model(tmp_path / "model", "qwen3", seed=0)
    rows = [{"prompt": "a" * (300 if i % 3 else 5) + f"{i:03d}", "answer": str(i)} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = {"path": str(tmp_path / "rows.jsonl"), "max_tokens": 8, "eval_share": 0.2, "overlong": "drop"}
    settings = structured(
        Settings,
        {
            "model": {"path": str(tmp_path / "model")},
            "generator": {"max_context": 100},
            "task": {"name": "dataset", "args": args},
        },
        where="",
    )
    seen: list[Task] = []
    ok = Finding(level="ok", check="x", said="")

    def look(chosen: Settings, *more: Any) -> Finding:
        seen.append(make_task(chosen.task.name, chosen.task.args))
        seen.extend(task for task in more if isinstance(task, Task))
        return ok

    monkeypatch.setattr(agreement, "check_log_probs", look)
    monkeypatch.setattr(agreement, "check_equivalence", look)
    assert not [found for found in examine_run(settings, tmp_path) if found.level == "error"]
    assert len(seen) == 3
    for task in seen:
        assert {len(p.prompt[0]["content"]) for split in ("train", "eval") for p in task.problems(split)} == {8}


def test_synchronous_equivalence_is_judged_by_how_far_training_moved(tiny_model: Path) -> None:
    settings = quick_settings(tiny_model)
    apart = WeightDifference(apart=1e-9, moved=1e-5, tensor="w")
    assert agreement.judge_equivalence(apart, settings).level == "ok"
    assert agreement.judge_equivalence(replace(apart, apart=1e-5), settings).level == "error"
    assert agreement.judge_equivalence(replace(apart, apart=0.0, moved=0.0), settings).level == "warning"
    assert agreement.judge_equivalence(replace(apart, moved=0.0), settings).level == "error"
    assert agreement.check_equivalence(settings, 10**9).level == "warning"
    vllm = replace(settings, generator=replace(settings.generator, engine="vllm"))
    assert agreement.check_equivalence(vllm, 1000).level == "warning"
    on_gpu = replace(settings, trainer=replace(settings.trainer, device="cuda"))
    assert agreement.check_equivalence(on_gpu, 1000).level == "warning"
