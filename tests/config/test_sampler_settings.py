"""Settings of the sampler that would do nothing, or contradict each other, are refused with the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from async_rl.config import Settings, check
from async_rl.config.sampler_checks import largest_group, uses_feedback
from async_rl.config.schema import structured, with_overrides
from async_rl.errors import UserError
from async_rl.task import make_task
from async_rl.task.problem_fields import check_texts, read_sources, value_of
from async_rl.task.protocol import Problem

BASE = {"model": {"path": "m"}, "task": {"name": "guess"}}


def settings_of(*words: str) -> Settings:
    settings: Settings = structured(Settings, with_overrides(BASE, words), where="")
    check(settings)
    return settings


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sampler.candidates=4"], "does nothing without sampler.choose=band, thompson or curriculum"),
        (["sampler.choose=ucb", "sampler.candidates=4"], "does nothing without sampler.choose=band"),
        (["sampler.choose=band", "sampler.value=vade"], "does nothing without sampler.choose=thompson"),
        (["sampler.choose=band", "sampler.source_field=x"], "does nothing without sampler.choose=ucb"),
        (["sampler.choose=band", "sampler.target_end=0.1"], "does nothing without sampler.choose=curriculum"),
        (
            ["sampler.choose=thompson", "sampler.low=0.1"],
            "does nothing without sampler.choose=band or sampler.refuse_out",
        ),
        (["sampler.choose=band", "sampler.low=0.9"], "low must be below high"),
        (["sampler.refuse_outside=true", "batch.group_size=1"], "a single sample always lies outside"),
        (["sampler.adaptive_above=0.5"], "does nothing without sampler.samples=adaptive"),
        (["sampler.samples=adaptive", "sampler.max_samples=20"], "does nothing without sampler.samples=gvm"),
        (["sampler.min_samples=3"], "does nothing without sampler.samples=adaptive or gvm"),
        (["sampler.samples=gvm", "sampler.min_samples=9"], "more than batch.group_size=8"),
        (["sampler.samples=gvm", "sampler.max_samples=4"], "the mean of all groups"),
        (["sampler.turns_slack=2"], "does nothing without sampler.turns=adaptive"),
        (["sampler.start_share=0.5"], "does nothing without sampler.start;"),
        (["sampler.start=success", "sampler.start_field=x"], "does nothing without sampler.start=field"),
        (["sampler.start=success", "sampler.start_place=prompt"], "does nothing without sampler.start=field"),
        (["sampler.start=field"], "needs sampler.start_field"),
        (["sampler.start=field", "sampler.start_field=x", "sampler.start_instruction=y"], "sampler.start_place=prompt"),
        (["sampler.start=success", "sampler.start_min=0.9"], "the share of a start is drawn between the two"),
        (["sampler.half_life=3"], "that follow the success of problems"),
        (["sampler.start=success", "sampler.half_life=3"], "that follow the success of problems"),
        (["sampler.success=0.9"], "does nothing without sampler.choose"),
        (["sampler.samples=gvm", "generator.max_sequences=10"], "less than the largest group (16 samples"),
    ],
)
def test_what_would_do_nothing_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=r"sampler\.") as error:
        settings_of(*words)
    assert said in str(error.value)


@pytest.mark.parametrize(
    "words",
    [
        ["sampler.choose=band", "sampler.half_life=3", "sampler.success=0.9"],
        ["sampler.choose=ucb", "sampler.source_field=x", "sampler.success=0.9"],
        ["sampler.samples=gvm", "sampler.max_samples=12"],
        ["sampler.turns=adaptive"],
        ["sampler.start=field", "sampler.start_field=x", "sampler.start_place=prompt", "sampler.start_instruction=y"],
        ["sampler.start=failure", "sampler.start_attempts=8", "sampler.half_life=3"],
    ],
)
def test_what_belongs_together_is_taken(words: list[str]) -> None:
    assert uses_feedback(settings_of(*words).sampler)


def test_without_any_of_it_there_is_no_sampler() -> None:
    assert not uses_feedback(settings_of().sampler)
    assert largest_group(settings_of()) == 8
    assert largest_group(settings_of("sampler.samples=gvm")) == 16


TASK = """
from async_rl.task.protocol import Problem, Task


class Own(Task):
    def problems(self, split):
        data = [{"kind": i % 2, "one": "x", "text": "" if i == 3 else "t"} for i in range(6)]
        return [Problem(index=i, prompt="a", data=found) for i, found in enumerate(data)]

    async def rollout(self, problem, session):
        return 0.0
"""


def test_fields_of_the_problems_are_looked_for_before_a_run(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(TASK)
    task = make_task(f"{tmp_path}/own.py:Own", {})
    assert read_sources(task, "kind").numbers == (0, 1, 0, 1, 0, 1)
    assert read_sources(task, "kind").names == ("0", "1")
    with pytest.raises(UserError, match="every training problem has 'x' there: there is nothing to choose among"):
        read_sources(task, "one")
    with pytest.raises(UserError, match="training problem 0 has no such text or number; it has kind, one, text"):
        read_sources(task, "none")
    check_texts(task, "one")
    with pytest.raises(UserError, match="training problem 3 has an empty text there"):
        check_texts(task, "text")
    with pytest.raises(UserError, match=r"training problem 0 has no text \(0\) there"):
        check_texts(task, "kind")


def test_a_field_may_lie_within_another() -> None:
    problem = Problem(index=0, prompt="", data={"answer": "7", "row": {"a": {"b": [{"c": "deep"}]}, "x.y": "flat"}})
    assert value_of(problem, "a.b.0.c") == "deep"
    assert value_of(problem, "x.y") == "flat"
    assert value_of(problem, "answer") == "7"
    assert [value_of(problem, name) for name in ("a.b.1.c", "nothing", "answer.x")] == [None, None, None]
