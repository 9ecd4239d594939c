"""Named parts of a reward: their sum, their weights, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from async_rl.errors import UserError
from async_rl.task.protocol import Problem, Session, Task
from async_rl.task.weigh import RewardError, Weights, weights_of
from async_rl.trajectory import Split
from async_rl.trajectory.parts import part_means


class Named(Task):
    """A task that says which parts its rewards have."""

    name = "named"
    parts: Sequence[str] | None = None

    @property
    def reward_parts(self) -> Sequence[str] | None:
        return self.parts

    def problems(self, split: Split) -> list[Problem]:
        return []

    async def rollout(self, problem: Problem, session: Session) -> float:
        return 0.0


def test_the_reward_is_the_weighted_sum_and_the_parts_stay_as_they_are() -> None:
    found = Weights(chosen={"format": 0.5, "length": -1.0, "judge": 0.0}).weigh(
        {"format": 1, "length": np.float32(0.25), "judge": True, "correct": 2}
    )
    assert found.total == 0.5 - 0.25 + 0.0 + 2.0
    assert found.parts == {"format": 1.0, "length": 0.25, "judge": 1.0, "correct": 2.0}


def test_a_part_that_does_not_apply_adds_nothing_and_is_in_no_mean() -> None:
    weights = Weights(chosen={"code": 3.0})
    episodes = [weights.weigh(r) for r in ({"code": 1.0, "style": 0.5}, {"code": None, "style": 1.5}, {"style": 1.0})]
    assert [e.total for e in episodes] == [3.5, 1.5, 1.0]
    assert part_means(e.parts for e in episodes) == {"code": 1.0, "style": 1.0}
    weights.check(episodes[1])
    with pytest.raises(RewardError, match="'code', which the reward did not return"):
        weights.check(episodes[2])


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (float("nan"), "the reward is nan"),
        ("good", "the reward is 'good', not a number"),
        ({"a": float("inf")}, "part 'a' is inf"),
        ({"a": "x"}, "part 'a' is 'x', not a number"),
        ({3: 1.0}, "called 3"),
        ({"a/b": 1.0}, "called 'a/b'"),
        ({"": 1.0}, "called ''"),
        ({"x" * 61: 1.0}, "1 to 60 characters"),
        ({str(i): 0.0 for i in range(65)}, "65 parts"),
        (1e16, r"the reward is 1e\+16; a reward lies between -1e\+15 and 1e\+15"),
        ({"a": 9e14, "b": 9e14}, r"weighed sum of the reward's parts is 1.8e\+15"),
    ],
)
def test_what_is_no_reward_is_refused_with_the_reason(returned: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        Weights().weigh(returned)


def test_a_misspelt_weight_is_named_at_the_first_episode() -> None:
    weights = Weights(chosen={"formt": 2.0})
    with pytest.raises(RewardError, match=r"'formt'.*did you mean 'format'"):
        weights.check(weights.weigh({"format": 1.0}))
    with pytest.raises(RewardError, match="the reward is a plain number"):
        weights.check(weights.weigh(1.0))
    weights.check(weights.weigh({}))  # no part applies


def test_names_that_are_known_before_are_checked_before() -> None:
    task = Named()
    assert weights_of(task, {"anything": 2.0}).chosen == {"anything": 2.0}
    task.parts = ("format", "correct")
    with pytest.raises(UserError, match=r"task.reward_weights names 'formt'.*did you mean 'format'"):
        weights_of(task, {"formt": 1.0})
    task.parts = ()
    with pytest.raises(UserError, match="the reward of task 'named' is a plain number; leave it out"):
        weights_of(task, {"format": 1.0})
    with pytest.raises(UserError, match="is no name"):
        weights_of(task, {"a/b": 1.0})
