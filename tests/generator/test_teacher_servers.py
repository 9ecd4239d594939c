"""A server's log-probs become notes on the tokens of an episode; a server that fails costs no more than its limit."""

from __future__ import annotations

import asyncio
import math
import time
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from support_teacher import TeacherModel, teacher_server

from async_rl.config.teachers import TeacherSettings, teachers_of
from async_rl.errors import UserError
from async_rl.generator.teachers import TeacherServers
from async_rl.trajectory import Trajectory, Turn, VersionSpan


def played(**changes: object) -> Trajectory:
    """Two contexts: turns at 1..3 and 4..5, and at 8..9 behind a context that starts at 7."""
    tokens = np.asarray([1, 2, 3, 4, 5, 6, 1, 1, 2, 3], np.int32)
    turns = (Turn(start=1, length=3), Turn(start=5, length=1), Turn(start=8, length=2))
    made = Trajectory(
        group=0, sample=0, problem=0, split="train", seed=0, tokens=tokens,
        log_behaviour=np.full(10, -1.0, np.float32), turns=turns, contexts=(7,),
        versions=(VersionSpan(version=0, start=0, end=10),), reward=1.0, ended="finished", info={"source": "math"},
    )  # fmt: skip
    return replace(made, **changes)


def ask(address: str, trajectory: Trajectory, **chosen: object) -> Trajectory:
    teacher = TeacherSettings(address=address, **chosen)  # type: ignore[arg-type]
    return asyncio.run(TeacherServers.of({"big": teacher}).noted(trajectory))


def test_the_notes_are_the_log_probs_that_transformers_computes(tiny_model: Path) -> None:
    with teacher_server(tiny_model) as (address, asked):
        found = ask(address, played())
    model = TeacherModel(tiny_model)
    contexts = [found.tokens[:7].tolist(), found.tokens[7:].tolist()]
    assert [values["prompt"] for values in asked] == [contexts]
    every = [math.nan, *model.log_probs(contexts[0]), math.nan, *model.log_probs(contexts[1])]
    for turn in found.turns:
        (values,) = [values for name, values in turn.token_notes if name == "teacher/big"]
        assert values == pytest.approx(every[turn.start : turn.start + turn.length], abs=1e-6)
    assert found.check() is None


@pytest.mark.parametrize(
    ("fault", "said"),
    [("500", "it answered 500: out of memory"), ("short", "1 log-probs for"), ("nan", "no finite number"),
     ("text", "Expecting value")],
)  # fmt: skip
def test_a_server_that_fails_is_asked_again_and_then_noted_with_the_reason(
    tiny_model: Path, fault: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with teacher_server(tiny_model, faults=[fault]) as (address, _):
        again = ask(address, played(), attempts=2)
    assert all(turn.token_notes for turn in again.turns)
    with teacher_server(tiny_model, faults=[fault]) as (address, _):
        failed = ask(address, played(), attempts=1)
    assert not any(turn.token_notes for turn in failed.turns)
    assert said in str(failed.info["teacher_error/big"])
    assert said in capfd.readouterr().err


def test_a_silent_server_and_none_at_all_cost_their_limits(tiny_model: Path) -> None:
    with teacher_server(tiny_model, faults=["silent"]) as (address, _):
        before = time.monotonic()
        failed = ask(address, played(), attempts=1, timeout_s=0.2)
        assert time.monotonic() - before < 0.9
    assert "timed out" in str(failed.info["teacher_error/big"])
    assert "refused" in str(ask(address, played(), attempts=1).info["teacher_error/big"])


def test_episodes_that_do_not_train_or_are_of_another_kind_are_not_asked_about(tiny_model: Path) -> None:
    with teacher_server(tiny_model) as (address, asked):
        for trajectory in (played(split="eval"), played(ended="error"), played(turns=())):
            assert ask(address, trajectory) is trajectory
        assert ask(address, played(), only="source=code").info == played().info
        assert not asked
        assert ask(address, played(), only="source=math").turns[0].token_notes


@pytest.mark.parametrize(
    ("given", "said"),
    [({"big": {}}, "either a path"), ({"big": {"path": "a", "address": "b"}}, "either a path"),
     ({"big": "models/big"}, "must be a group"), ({"big": {"pth": "x"}}, "did you mean 'teachers.big.path'"),
     ({"big": {"path": "a", "timeout_s": 3.0}}, "timeout_s does nothing"),
     ({"big": {"path": "a", "only": "x"}}, "NAME=VALUE")],
)  # fmt: skip
def test_settings_that_say_nothing_are_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        teachers_of(given)
