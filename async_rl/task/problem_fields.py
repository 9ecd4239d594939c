"""Values that the sampler reads beside a problem: the name of its source, a text that answers may begin with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from async_rl.errors import UserError
from async_rl.task.protocol import Problem, Task

LOOKED_AT = 500
"""problems whose text to begin with is looked for before a run begins"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemSources:
    """Where the problems of a split come from."""

    names: Sequence[str]
    """in the order in which the problems name them first"""
    numbers: Sequence[int]
    """of each problem, that of its source in `names`"""

    def write(self, path: Path) -> None:
        path.write_text(json.dumps({"names": list(self.names), "numbers": list(self.numbers)}))

    @classmethod
    def read(cls, path: Path) -> ProblemSources:
        return cls(**json.loads(path.read_text()))


def value_of(problem: Problem, name: str) -> Any:
    """A field of the problem's row, or of its `data` where the task reads no rows; a.b.0 is a field within a field.
    None: it has none."""
    row = problem.data.get("row")
    for holder in (row, problem.data) if isinstance(row, Mapping) else (problem.data,):
        found: Any = holder
        if name in found:
            return found[name]
        for part in name.split("."):
            if isinstance(found, Mapping):
                found = found.get(part)
            elif (
                isinstance(found, Sequence) and not isinstance(found, str) and part.isdigit() and int(part) < len(found)
            ):
                found = found[int(part)]
            else:
                found = None
        if found is not None:
            return found
    return None


def read_sources(task: Task, name: str) -> ProblemSources:
    """The source of each training problem, as its field `name` says. Raises UserError where one has none, or all have
    the same."""
    numbers: dict[str, int] = {}
    found = []
    problems = task.problems("train")
    for index in range(len(problems)):
        value = value_of(problems[index], name)
        if value is None or isinstance(value, Mapping | list):
            raise UserError(
                f"sampler.source_field is '{name}', but training problem {index} has no such text or number"
                f"{_known(problems[index])}"
            )
        found.append(numbers.setdefault(str(value), len(numbers)))
    if len(numbers) < 2:
        raise UserError(
            f"sampler.source_field is '{name}', and every training problem has {next(iter(numbers), 'none')!r} there: "
            "there is nothing to choose among; name another field, or leave sampler.choose=ucb out"
        )
    return ProblemSources(names=tuple(numbers), numbers=tuple(found))


def check_texts(task: Task, name: str) -> None:
    """Raises UserError where the first training problems have no text to begin with in their field `name`."""
    problems = task.problems("train")
    for index in range(min(LOOKED_AT, len(problems))):
        value = value_of(problems[index], name)
        if not isinstance(value, str) or not value:
            said = "an empty text" if value == "" else "no text" if value is None else f"no text ({value!r:.40})"
            raise UserError(
                f"sampler.start_field is '{name}', but training problem {index} has {said} there"
                f"{_known(problems[index])}"
            )


def _known(problem: Problem) -> str:
    """The fields there are, as the end of a sentence."""
    row = problem.data.get("row")
    names = [*(row if isinstance(row, Mapping) else ()), *(name for name in problem.data if name != "row")]
    return f"; it has {', '.join(names)}" if names else ""
