"""Reward functions of verl and TRL give here what they give where they come from: called by the packages' own code on
one side, by `task.args.reward` on the other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from async_rl.task.calling import as_reward_function
from async_rl.task.protocol import Problem, Sample, Utterance
from async_rl.task.reward import Reward

ANSWERS = ("so 4 * 3 = 12\n#### 12", "#### 1,200", "no number", "<think>\nhm\n</think>\n12")


def sample(text: str, prompt: Any, **row: Any) -> Sample:
    data = {"answer": "12", "row": row}
    said = (Utterance(text=text, tokens=tuple(range(len(text)))),)
    return Sample(problem=Problem(index=0, prompt=prompt, data=data), said=said, transcript=text)


Load = Callable[[str], ModuleType]


@pytest.mark.parametrize("text", ANSWERS)
def test_verls_gsm8k_and_its_default_compute_score(module_of: Load, text: str) -> None:
    scores = module_of("verl.utils.reward_score")
    gsm8k = module_of("verl.utils.reward_score.gsm8k")
    one = sample(text, "What?", data_source="openai/gsm8k")
    for function in (scores.default_compute_score, gsm8k.compute_score):
        found = asyncio.run(Reward("verl", function).judge(one))
        assert found == gsm8k.compute_score(text, "12")


def test_verls_mapping_with_score(module_of: Load) -> None:
    scores = module_of("verl.utils.reward_score")
    one = sample("Answer: 12", "What?", data_source="math_dapo")
    notes: dict[str, float | str] = {}
    wanted = scores.default_compute_score("math_dapo", "Answer: 12", "12")
    found = asyncio.run(Reward("verl", scores.default_compute_score).judge(one, notes.__setitem__))
    assert found == wanted["score"] == 1.0
    assert notes == {"reward/acc": 1.0, "pred": wanted["pred"]}


@pytest.mark.parametrize("text", ANSWERS)
def test_trls_format_and_length_rewards(module_of: Load, text: str) -> None:
    rewards = module_of("trl.rewards.format_rewards")
    other = module_of("trl.rewards.other_rewards")
    chat = sample(text, [{"role": "user", "content": "What?"}])
    wanted = rewards.think_format_reward([[{"content": text}]])
    assert [asyncio.run(Reward("trl", rewards.think_format_reward).judge(chat))] == wanted
    punish = other.get_soft_overlong_punishment(max_completion_len=20, soft_punish_cache=10)
    assert asyncio.run(Reward("trl", punish).judge(chat)) == punish([[0] * len(text)])[0]


def test_a_trl_reward_over_a_group(module_of: Load) -> None:
    rewards = module_of("trl.rewards.format_rewards")
    chats = [sample(text, [{"role": "user", "content": "What?"}]) for text in ANSWERS]
    made = as_reward_function("trl", rewards.think_format_reward, where="x", whole_group=True)
    found = asyncio.run(Reward("trl", made).judge_group(chats))
    assert found == rewards.think_format_reward([[{"content": text}] for text in ANSWERS])
