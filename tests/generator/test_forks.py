"""Answers that go on from within others of their group, and a greedy one beside them: real episodes of a real model."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support_run import quick_settings
from support_teacher import TeacherModel

from async_rl.config import Settings
from async_rl.config.rollout import RolloutSettings, forks_of, parent_of
from async_rl.errors import UserError
from async_rl.generator.build import make_engine
from async_rl.generator.forks import own_tokens, place_of, start_at
from async_rl.generator.replay import Replayer
from async_rl.generator.session import make_tickets
from async_rl.model.tokenizer import Tokenizer
from async_rl.run.evaluate import limits_of, sample_episodes
from async_rl.task import make_task
from async_rl.trainer.packing import pack_step
from async_rl.trajectory import Trajectory, Turn, VersionSpan
from async_rl.trajectory.forks import fork_in
from async_rl.trajectory.given import given_in, wrong_given
from async_rl.trajectory.types import GREEDY
from async_rl.wire.messages import Permit


def group(settings: Settings, *, seed: int = 3, samples: tuple[int, ...] = ()) -> list[Trajectory]:
    """One group of the settings' task. `samples`: those that are played; empty: all."""
    tokenizer, task = Tokenizer.of(settings.model), make_task(settings.task.name, settings.task.args)
    permit = Permit(
        group=0, problem=5, split="train", samples=samples or tuple(range(settings.batch.group_size)), seed=seed,
        temperature=settings.generator.temperature,
    )  # fmt: skip

    async def run() -> list[Trajectory]:
        engine = make_engine(settings, tokenizer)
        try:
            return await sample_episodes(engine, task, tokenizer, make_tickets(permit), limits_of(settings))
        finally:
            await engine.close()

    return asyncio.run(run())


def settings_of(model: Path, **rollout: Any) -> Settings:
    words = [f"rollout.{name}={str(value).lower()}" for name, value in rollout.items()]
    return quick_settings(model, "task.args.max_turns=12", "batch.group_size=8", *words)


@pytest.mark.parametrize(
    ("rollout", "parents"),
    [
        ({"roots": 3}, [0, 1, 2, 0, 1]),
        ({"roots": 1, "fork": "even", "per_cut": 2}, [0] * 7),
        ({"roots": 2, "fork": "even", "shape": "tree", "children": 2}, [0, 0, 1, 1, 2, 2]),
        ({"roots": 1, "fork": "improbable_token", "below": 0.99}, [0] * 7),
    ],
)
def test_a_fork_goes_on_from_its_parent_with_other_numbers(
    tiny_model: Path, rollout: dict[str, Any], parents: list[int]
) -> None:
    settings = settings_of(tiny_model, **rollout)
    made = group(settings)
    replayer = replace(Replayer.of(settings), whole=True)
    roots = rollout["roots"]
    assert [fork_in(t) for t in made[:roots]] == [None] * roots
    forks = [fork_in(t) for t in made[roots:]]
    assert [fork[0] if fork else None for fork in forks] == parents
    assert len({t.seed for t in made}) == len(made)
    for trajectory, fork in zip(made[roots:], forks, strict=True):
        assert fork is not None
        parent, given = made[fork[0]], given_in(trajectory)
        assert given is not None
        end = sum(given.stretches[-1])
        assert trajectory.tokens[:end].tolist() == parent.tokens[:end].tolist()
        assert trajectory.check() is None
        assert wrong_given(trajectory) == ""
        assert min(own_tokens(trajectory), default=end) >= end  # nothing that was given is trained
        assert fork[1] == sum(place < end for place in own_tokens(parent))
        assert replayer.replay(trajectory) == replayer.replay(parent)  # played, and nothing is wrong
        assert replayer.replay(trajectory).played
    texts = {t.tokens.tobytes() for t in made}
    assert len(texts) > 1
    assert {t.tokens.tobytes() for t in group(settings)} == texts  # the same again
    batch = pack_step(settings, made)
    assert batch.forks is not None
    assert [p for p, _ in batch.forks.tolist()[roots:]] == parents
    assert batch.tokens_spared > 0.1  # what they share is computed once


def test_a_group_of_other_samples_than_parents_begins_with_the_prompt(tiny_model: Path) -> None:
    """As when another generator has delivered the parents."""
    settings = settings_of(tiny_model, roots=3)
    made = group(settings, samples=(4, 6))
    assert [fork_in(t) for t in made] == [None, None]
    assert not any(t.failed for t in made)


def test_the_first_answer_is_the_likeliest_token_at_every_place(tiny_model: Path) -> None:
    settings = settings_of(tiny_model, greedy=True)
    made = group(settings)
    model = TeacherModel(tiny_model)
    with torch.no_grad():
        logits = model.model(torch.tensor([made[0].tokens.tolist()])).logits[0]
    places = made[0].policy_positions()
    assert made[0].tokens[places].tolist() == logits[places - 1].argmax(-1).tolist()
    wanted = torch.log_softmax(logits, -1)[places - 1, made[0].tokens[places]]
    assert made[0].log_behaviour[places] == pytest.approx(wanted.numpy(), abs=1e-4)
    assert all(turn.temperature == GREEDY for turn in made[0].turns)
    assert not any(turn.temperature for t in made[1:] for turn in t.turns)
    batch = pack_step(settings, made)
    assert batch.greedy is not None
    assert batch.greedy.tolist() == [True] + [False] * 7


# Where forks lie.


def played(log: list[float], turns: list[tuple[int, int]]) -> Trajectory:
    tokens = np.arange(len(log), dtype=np.int32)
    return Trajectory(
        group=0, sample=0, problem=0, split="train", seed=0, tokens=tokens,
        log_behaviour=np.asarray(log, np.float32), turns=tuple(Turn(start=s, length=n) for s, n in turns),
        versions=(VersionSpan(version=0, start=0, end=len(log)),), reward=0.0, ended="finished",
    )  # fmt: skip


PARENT = played([0, -0.1, -3, 0, -2, -0.1, 0, -1, -0.01, -0.01], [(1, 2), (4, 2), (7, 3)])


def test_turns_of_the_lowest_first_log_probs_come_first_and_the_first_turn_never() -> None:
    plan = RolloutSettings(roots=1, first_tokens=1)
    assert [place_of(PARENT, number, 3, plan) for number in range(3)] == [4, 7, 4]
    assert place_of(played([0, -1, -1], [(1, 2)]), 0, 1, plan) is None
    longer = RolloutSettings(roots=1, first_tokens=2)  # means -1.05 and -.505
    assert place_of(PARENT, 0, 1, longer) == 4


def test_places_are_spread_over_the_tokens_that_may_be_forked_at() -> None:
    even = RolloutSettings(roots=1, fork="even", per_cut=2)  # of 2, 4, 5, 7, 8, 9: two cuts
    assert [place_of(PARENT, number, 4, even) for number in range(4)] == [5, 5, 8, 8]
    improbable = RolloutSettings(roots=1, fork="improbable_token", below=0.5)  # of 2, 4, 7
    assert [place_of(PARENT, number, 2, improbable) for number in range(2)] == [4, 7]


def test_a_fork_is_given_whole_turns_and_the_part_of_one() -> None:
    start = start_at(PARENT, 4)
    assert start is not None
    assert (start.turns, start.open, len(start.tokens)) == (((1, 2),), False, 4 * 3)
    start = start_at(PARENT, 8)
    assert start is not None
    assert (start.turns, start.open, len(start.tokens)) == (((1, 2), (4, 2), (7, 1)), True, 4 * 8)


def test_every_sample_has_one_parent_before_it() -> None:
    for plan in (RolloutSettings(roots=3), RolloutSettings(roots=2, shape="tree", children=3)):
        counted = dict.fromkeys(range(17), 0)
        for sample in range(plan.roots, 17):
            found = parent_of(sample, plan)
            assert found is not None
            assert found[0] < sample
            assert found[1] == counted[found[0]]
            counted[found[0]] += 1
        assert [forks_of(parent, 17, plan) for parent in range(17)] == list(counted.values())


@pytest.mark.parametrize(
    ("words", "said"),
    [(["rollout.roots=8"], "none is left to be a fork"), (["rollout.shape=tree"], "does nothing with rollout.roots=0"),
     (["rollout.roots=2", "rollout.children=3"], "does nothing with rollout.shape=chain"),
     (["rollout.roots=2", "rollout.greedy=true"], "exclude each other"),
     (["rollout.roots=2", "rollout.per_cut=2"], "does nothing with rollout.fork=uncertain_turn")],
)  # fmt: skip
def test_plans_that_say_nothing_are_refused(tiny_model: Path, words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        quick_settings(tiny_model, "batch.group_size=8", *words)
