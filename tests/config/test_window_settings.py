"""Which settings go with episodes that are trained in pieces, and what a simulated run says of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from support_run import quick_settings

from async_rl.errors import UserError
from async_rl.instruments.simulate import Simulation, Workload
from async_rl.objective.library import load_recipe
from async_rl.run.rollouts import check_windows

PIECES = ("recipe=t_ppo", "rollout.window=8", "batch.group_size=1")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["batch.group_size=4"], "needs batch.group_size=1"),
        (["sampler.choose=band"], r"rollout.window and sampler\.\*"),
        (["pool.source=best"], "rollout.window and pool.source=best"),
    ],
)
def test_what_needs_whole_groups_is_refused(tmp_path: Path, words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        quick_settings(tmp_path, *PIECES, *words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["recipe=reinforce_pp"], "needs a recipe with advantage.credit=token_gae"),
        (["recipe=turn_gae_ppo"], "needs a recipe with advantage.credit=token_gae"),
        (["recipe=vapo"], "gae.length_adaptive looks at whole answers"),
        (["recipe.positive_nll=0.1"], "positive_nll looks at whole answers"),
        (["recipe.reward.overlong_limit=9000"], "overlong_limit looks at whole answers"),
        (["rollout.window=0"], "gae.value_earlier is about episodes that are trained in pieces"),
    ],
)
def test_what_looks_at_whole_answers_is_refused(tmp_path: Path, words: list[str], said: str) -> None:
    settings = quick_settings(tmp_path, *PIECES, *words)
    with pytest.raises(UserError, match=said):
        check_windows(settings, load_recipe(settings.recipe), judges_groups=False)


def test_a_task_that_judges_groups_has_no_pieces(tmp_path: Path) -> None:
    settings = quick_settings(tmp_path, *PIECES)
    check_windows(settings, load_recipe(settings.recipe), judges_groups=False)
    with pytest.raises(UserError, match="judges whole groups"):
        check_windows(settings, load_recipe(settings.recipe), judges_groups=True)


def test_the_critic_learns_earlier_tokens_as_returns_alone() -> None:
    with pytest.raises(UserError, match=r"gae\.value_earlier trains the critic on returns"):
        load_recipe({"name": "t_ppo", "gae": {"critic_trace": 0.9}})


def test_a_simulated_run_cuts_and_goes_on(tmp_path: Path) -> None:
    """Half of the answers have 2 tokens, half 20: whole ones wait for 20, pieces never for more than 4."""
    work = Workload(
        groups=((2,), (20,)), decode_s=0.1, decode_s_per_sequence=0.0, episode_s=0.0, train_s=(0.0,), update_s=0.0,
        message_s=0.001,
    )  # fmt: skip
    settings = quick_settings(
        tmp_path, *PIECES, "rollout.window=4", "batch.groups_per_step=8", "generator.max_sequences=8",
        "staleness.max_staleness=0",
    )  # fmt: skip
    found = Simulation(settings, work, 60, Random(0)).run()
    whole = Simulation(replace(settings, rollout=replace(settings.rollout, window=0)), work, 60, Random(0)).run()
    assert whole.step_s == pytest.approx(2.0, rel=0.05)
    assert found.step_s == pytest.approx(0.4, rel=0.05)
    # every long answer is five pieces of 4, so a place is taken by a short one in one of six turns
    assert found.tokens_per_s * found.step_s == pytest.approx(8 * (5 * 4 + 2) / 6, rel=0.1)
    assert found.tokens_per_s > 1.3 * whole.tokens_per_s
