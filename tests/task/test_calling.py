"""Rewards are called with what their parameters name, in our convention, verl's and TRL's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from async_rl.errors import UserError
from async_rl.task.calling import OURS, as_reward_function, check_columns
from async_rl.task.protocol import Problem, Sample, Utterance
from async_rl.task.reward import Reward, check_rows
from async_rl.task.weigh import RewardError

CHAT = [{"role": "user", "content": "What is 2 + 3?"}]
PROBLEM = Problem(
    index=7,
    prompt=CHAT,
    data={
        "answer": "5",
        "where": "sums.jsonl, line 8",
        "row": {"data_source": "sums", "extra_info": {"split": "train"}, "difficulty": 3, "solution": "five"},
    },
)
SAMPLE = Sample(
    problem=PROBLEM,
    said=(Utterance(text="<tool>2+3</tool>", tokens=(1, 2, 3)), Utterance(text="It is 5.", tokens=(4, 5))),
    transcript="<tool>2+3</tool><result>5</result>It is 5.",
    ended="length",
    tool_calls=("2+3",),
)


def judge(function: Callable[..., Any], *samples: Sample, answer_field: str = "answer") -> Any:
    reward = Reward("mine", function, answer_field=answer_field)
    notes: dict[str, float | str] = {}
    found = asyncio.run(reward.judge((samples or (SAMPLE,))[0], notes.__setitem__))
    return (found, notes) if notes else found


def group(function: Callable[..., Any], *samples: Sample) -> Any:
    made = as_reward_function("mine", function, where="here", whole_group=True)
    return asyncio.run(Reward("mine", made, answer_field="answer").judge_group(samples))


def test_any_subset_of_the_names_in_any_order() -> None:
    seen: dict[str, Any] = {}

    def everything(
        token_ids, total_tokens, num_tokens, ended, row, tool_calls, turns, transcript, prompt, problem, answer,
        completion, sample,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        seen.update(locals())
        return 1

    assert judge(everything) == 1.0
    seen.pop("seen", None)
    assert set(seen) == set(OURS), "each documented name, and no other"
    assert seen["completion"] == "It is 5."
    assert seen["turns"] == ["<tool>2+3</tool>", "It is 5."]
    assert (seen["num_tokens"], seen["total_tokens"], seen["token_ids"]) == (2, 5, [4, 5])
    assert (seen["ended"], seen["tool_calls"], seen["answer"]) == ("length", ["2+3"], "5")
    assert seen["prompt"] == CHAT
    assert seen["row"]["difficulty"] == 3
    assert seen["sample"] is SAMPLE
    assert judge(lambda answer, completion: float(answer in completion)) == 1.0
    assert judge(lambda completion: len(completion)) == 8.0


def test_the_whole_sample_by_name_or_annotation() -> None:
    def annotated(it: Sample) -> float:
        return it.total_tokens

    def in_quotes(it: ar.Sample) -> float:  # type: ignore[name-defined]  # noqa: F821
        return it.total_tokens

    assert judge(annotated) == judge(in_quotes) == judge(lambda sample: sample.total_tokens) == 5.0


def test_fields_of_the_row_by_their_names_and_defaults_stay() -> None:
    assert judge(lambda completion, difficulty: difficulty) == 3.0
    assert judge(lambda completion, difficulty=9: difficulty) == 3.0
    assert judge(lambda completion, tolerance=0.5: tolerance) == 0.5
    assert judge(lambda answer, gold: float(answer == gold), answer_field="gold") == 1.0

    def more(completion: str, **rest: Any) -> float:
        assert rest["difficulty"] == 3
        assert rest["num_tokens"] == 2
        return len(rest)

    assert judge(more) >= len(OURS)


def test_positional_only_parameters_and_functions_without_names() -> None:
    def placed(answer: str, completion: str, /) -> float:
        return float(answer in completion)

    assert judge(placed) == 1.0
    assert judge(lambda *given: len(given)) == 3.0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda completon, answer: 0,
            r"takes 'completon', and sums.jsonl, line 8 has no such field; did you mean 'com",
        ),
        (lambda completion, gold: 0, "known: .*completion.*difficulty"),
        (lambda solution_str, ground_truth, prompt: 0, "takes 'prompt'"),
        (lambda completions, solutions: 0, "did you mean 'solution'"),
    ],
)
def test_a_parameter_that_nothing_can_be_given_for_is_refused_at_load(
    function: Callable[..., Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_rows((Reward("mine", function, answer_field="answer"),), ([PROBLEM],))


@pytest.mark.parametrize(
    ("function", "message"),
    [(lambda: 0, "it takes nothing"), (lambda prompts, completions, trainer_state: [0], "only TRL's trainer has")],
)
def test_a_function_that_cannot_be_called_at_all(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        as_reward_function("mine", function, where="task.args.reward 'x.py:f'")


def test_every_row_is_looked_at_for_a_field_that_is_needed() -> None:
    other = Problem(index=8, prompt="?", data={"row": {}, "where": "sums.jsonl, line 9"})
    found = as_reward_function("mine", lambda completion, difficulty: 0.0, where="x")
    check_columns(found, [PROBLEM], where="task.args.reward", answer_field="answer")
    with pytest.raises(UserError, match="line 9 has no such field"):
        check_columns(found, [PROBLEM, other], where="task.args.reward", answer_field="answer")


# ---------------------------------------------------------------- verl's convention


def test_verls_compute_score_is_called_by_keyword() -> None:
    def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> dict[str, Any]:
        assert (data_source, ground_truth) == ("sums", "5")
        assert extra_info == {"split": "train", "num_turns": 2, "rollout_reward_scores": {}}
        return {"score": float(solution_str.endswith("5.")), "acc": True, "pred": "5"}

    assert judge(compute_score) == (1.0, {"reward/acc": 1.0, "pred": "5"})


def test_verls_ground_truth_is_that_of_the_reward_model() -> None:
    row = {"reward_model": {"style": "rule", "ground_truth": ["a", "b"]}}
    sample = Sample(problem=Problem(index=0, prompt="?", data={"answer": "a", "row": row}), said=SAMPLE.said)

    async def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):  # type: ignore[no-untyped-def]
        assert ground_truth == ["a", "b"]
        assert data_source == "unknown"
        assert not kwargs
        return 0.25

    assert judge(compute_score, sample) == 0.25


def test_a_mapping_without_score_is_named() -> None:
    with pytest.raises(RewardError, match="without 'score'"):
        judge(lambda solution_str, ground_truth: {"acc": 1.0})


def test_verls_batch_convention_gets_lists() -> None:
    def compute_score(data_sources, solution_strs, ground_truths, extra_infos):  # type: ignore[no-untyped-def]
        assert ground_truths == ["5"] * len(solution_strs)
        assert len(extra_infos) == len(data_sources) == len(solution_strs)
        return [{"score": len(text)} for text in solution_strs]

    assert judge(compute_score) == len(SAMPLE.transcript)
    assert group(compute_score, SAMPLE, SAMPLE) == [len(SAMPLE.transcript)] * 2


# ---------------------------------------------------------------- TRL's convention


def test_trls_reward_gets_lists_of_one_with_the_columns_as_lists() -> None:
    def reward(prompts, completions, answer, difficulty, log_extra=None, log_metric=None, **kwargs):  # type: ignore[no-untyped-def]
        assert prompts == [CHAT]
        assert [message["content"] for message in completions[0]] == ["<tool>2+3</tool>", "It is 5."]
        assert {message["role"] for message in completions[0]} == {"assistant"}
        assert (answer, difficulty) == (["5"], [3])
        assert kwargs["completion_ids"] == [[1, 2, 3, 4, 5]]
        assert kwargs["solution"] == ["five"]
        log_extra("seen", ["five"])
        log_metric("accuracy", 1)
        return [0.75]

    assert judge(reward) == (0.75, {"seen": "five", "accuracy": 1.0})


def test_trls_completions_of_a_text_prompt_are_texts() -> None:
    sample = Sample(problem=Problem(index=0, prompt="2+3="), said=(Utterance(text="5", tokens=(1,)),))
    assert judge(lambda completions, **kwargs: [float(c == "5") for c in completions], sample) == 1.0


def test_trls_none_says_that_the_reward_does_not_apply() -> None:
    assert judge(lambda completions, **kwargs: [None]) == ({}, {"reward_not_applicable": 1.0})


@pytest.mark.parametrize("returned", [1.0, "1", {"a": 1.0}, [1.0, 2.0], []])
def test_trls_reward_must_return_one_number_a_sample(returned: Any) -> None:
    with pytest.raises(RewardError, match=r"mine.*returned"):
        judge(lambda completions: returned)


# ---------------------------------------------------------------- group rewards


def test_a_group_reward_sees_all_samples() -> None:
    long = Sample(problem=PROBLEM, said=(Utterance(text="a long answer", tokens=range(9)),), number=1)

    def shorter(samples: list[Sample]) -> list[float]:
        shortest = min(s.num_tokens for s in samples)
        return [shortest - s.num_tokens for s in samples]

    def named(answer: str, samples: list[Sample], difficulty: int) -> list[dict[str, float]]:
        return [{"length": float(s.num_tokens * difficulty), "said": float(answer in s.completion)} for s in samples]

    def of_trl(completions, **kwargs):  # type: ignore[no-untyped-def]
        return [float(len(completion)) for completion in completions]

    assert group(shorter, SAMPLE, long) == [0.0, -7.0]
    assert group(named, SAMPLE, long) == [{"length": 6.0, "said": 1.0}, {"length": 27.0, "said": 0.0}]
    assert group(of_trl, SAMPLE, long) == [2.0, 1.0]


@pytest.mark.parametrize(
    ("function", "message"), [(lambda samples: [1.0], "1 rewards for 2"), (lambda samples: 1.0, "not a list of 2")]
)
def test_a_group_reward_returns_one_for_each(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        group(function, SAMPLE, SAMPLE)


def test_verls_compute_score_is_no_group_reward() -> None:
    with pytest.raises(UserError, match=r"task\.args\.reward instead"):
        as_reward_function("x", lambda solution_str, ground_truth: 0, where="task.args.group_reward", whole_group=True)
