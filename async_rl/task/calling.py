"""How a reward function of the user's is called: which convention its parameters follow, and what they are given.

Three conventions are known by their parameters:

- ours: any of the names in `OURS`, and names of fields of the row; or one parameter for the whole `Sample`;
- verl's (verl/experimental/reward_loop/reward_manager/naive.py, batch.py; 0.9): `compute_score(data_source,
  solution_str, ground_truth, extra_info)`, by keyword, a number or a mapping with `score`; or the same in the plural;
- TRL's (trl/trainer/grpo_trainer.py `_calculate_rewards`; 1.16): `(prompts, completions, completion_ids, **columns)`,
  lists of equal length, by keyword; a list of numbers, None where the reward does not apply.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from async_rl.config.imports import is_import, load_object
from async_rl.errors import UserError, nearest
from async_rl.task.protocol import Problem, Sample
from async_rl.task.weigh import RewardError

Convention = Literal["ours", "sample", "position", "verl", "verl batch", "trl"]
Note = Callable[[str, float | str], None]
"""attaches a number or label to a sample's trajectory"""

OURS: Mapping[str, Callable[[Sample], Any]] = {
    "completion": lambda s: s.completion,
    "answer": lambda s: s.answer,
    "problem": lambda s: s.problem,
    "prompt": lambda s: s.prompt,
    "turns": lambda s: list(s.turns),
    "transcript": lambda s: s.transcript,
    "tool_calls": lambda s: list(s.tool_calls),
    "num_tokens": lambda s: s.num_tokens,
    "total_tokens": lambda s: s.total_tokens,
    "token_ids": lambda s: s.token_ids,
    "ended": lambda s: s.ended,
    "row": lambda s: dict(s.row),
    "sample": lambda s: s,
}
"""what a reward of one's own may take, by the name of its parameter"""
IN_ORDER = ("completion", "answer", "problem")
"""for a function without names: a builtin, or one of *args alone"""
OF_A_GROUP = ("problem", "samples", "prompt", "answer", "row")
"""what a group reward of one's own may take"""
VERL = ("data_source", "solution_str", "ground_truth", "extra_info")
VERL_BATCH = ("data_sources", "solution_strs", "ground_truths", "extra_infos")
TRL = ("prompts", "completions", "completion_ids")
TRL_LOGS = ("log_extra", "log_metric")
TRL_ONLY = ("trainer_state", "environments")
"""what only TRL's trainer can give"""
ANYTHING = "*"
EMPTY = inspect.Parameter.empty


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """The parameters of a reward function."""

    convention: Convention
    names: tuple[str, ...]
    """of all parameters that take one value, in order"""
    required: frozenset[str]
    """of them, those without a default"""
    in_order: int
    """the first so many can only be given by their place"""
    takes_more: bool
    """it has **kwargs"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardFunction:
    """A function of the user's with the way to call it. Example: `load_reward_function("my.py:reward", where="x")`."""

    name: str
    function: Callable[..., Any]
    signature: Signature
    whole_group: bool
    """it is given all samples of a group, not one"""

    @property
    def sees_the_end(self) -> bool:
        """Whether it can tell an episode without an answer (its turns are used up) from one with an answer."""
        return self.signature.convention == "sample" or "ended" in self.signature.names

    @property
    def waits(self) -> bool:
        """Whether it is `async def`, as what asks somebody else is."""
        called = (self.function, type(self.function).__call__)  # a function, or an object that can be called
        return any(inspect.iscoroutinefunction(one) for one in called)

    def known(self) -> tuple[str, ...]:
        """Names of parameters that its convention gives, beside fields of the row."""
        ours = OF_A_GROUP if self.whole_group else tuple(OURS)
        by = {"ours": ours, "verl": VERL, "verl batch": VERL_BATCH, "trl": (*TRL, *TRL_LOGS)}
        return by.get(self.signature.convention, ())

    def columns(self) -> list[str]:
        """Fields of the rows that it cannot do without."""
        if not self.known():
            return []
        return [name for name in self.signature.names if name in self.signature.required.difference(self.known())]

    async def call(self, samples: Sequence[Sample], answer_field: str, notes: Sequence[Note]) -> list[Any]:
        """What it returns for each of the samples, which are of one problem. `answer_field`: the row's field with the
        answer. `notes`: of each sample. Raises what the function raises, or RewardError."""
        if self.whole_group or self.signature.convention in ("trl", "verl batch"):
            given = self._of_group(samples, answer_field, notes)
            found = await self._called(given)
            if isinstance(found, str | Mapping) or not hasattr(found, "__len__"):
                raise RewardError(f"returned {found!r:.100}, not a list of {len(samples)} rewards")
            if len(found) != len(samples):
                raise RewardError(f"returned {len(found)} rewards for {len(samples)} samples")
            return list(found)
        return [await self._called(self._of_one(sample, answer_field)) for sample in samples]

    async def _called(self, given: Mapping[str, Any] | Sequence[Any]) -> Any:
        if isinstance(given, Mapping):
            first = [given[name] for name in self.signature.names[: self.signature.in_order]]
            rest = {name: value for name, value in given.items() if name not in self.signature.names[: len(first)]}
            value = self.function(*first, **rest)
        else:
            value = self.function(*given)
        return await value if inspect.isawaitable(value) else value

    def _of_one(self, sample: Sample, answer_field: str) -> Mapping[str, Any] | Sequence[Any]:
        columns = _columns(sample, answer_field)
        match self.signature.convention:
            case "sample":
                return [sample]
            case "position":
                return [OURS[name](sample) for name in IN_ORDER]
            case "verl":
                return self._taken(_for_verl(sample), {})
        if self.signature.takes_more:
            return self._taken({name: get(sample) for name, get in OURS.items()}, columns)
        return self._taken({name: OURS[name](sample) for name in self.signature.names if name in OURS}, columns)

    def _of_group(self, samples: Sequence[Sample], answer_field: str, notes: Sequence[Note]) -> Any:
        first = samples[0]
        columns = _columns(first, answer_field)
        match self.signature.convention:
            case "sample":
                return [samples]
            case "position":
                return [first.problem, samples]
            case "verl batch":
                each = [_for_verl(sample) for sample in samples]
                plural = {many: [one[name] for one in each] for name, many in zip(VERL, VERL_BATCH, strict=True)}
                return self._taken(plural, {})
            case "trl":
                lists = {name: [value] * len(samples) for name, value in columns.items() if name not in NOT_COLUMNS}
                return self._taken({**_for_trl(samples), **_logs(notes)}, lists)
        own = {"problem": first.problem, "samples": samples, "prompt": first.prompt, "answer": first.answer,
               "row": dict(first.row)}  # fmt: skip
        return self._taken(own, columns)

    def _taken(self, known: Mapping[str, Any], columns: Mapping[str, Any]) -> dict[str, Any]:
        """Of what there is, what the function takes; `known` before `columns`."""
        there = {**columns, **known}
        if self.signature.takes_more:
            return {str(name): value for name, value in there.items()}
        return {name: there[name] for name in self.signature.names if name in there}


NOT_COLUMNS = ("prompt", "completion", "completion_ids")
"""columns that TRL does not pass on"""


def load_reward_function(name: str, *, where: str, whole_group: bool = False) -> RewardFunction:
    """The function `module:function` or `path/file.py:function`. `where`: the setting that names it.

    Raises UserError when it cannot be loaded, or has parameters that no convention knows and that a row's field cannot
    have. Which fields the rows have is checked later (`RewardFunction.columns`)."""
    at = f"{where} '{name}'"
    function = load_object(name, where=at, what="function")
    if not callable(function) or inspect.isclass(function):
        source, _, path = name.rpartition(":")
        raise UserError(f"{at}: '{source}' has no function '{path}'; it is {function!r:.40}")
    return as_reward_function(name, function, where=at, whole_group=whole_group)


def as_reward_function(
    name: str, function: Callable[..., Any], *, where: str, whole_group: bool = False
) -> RewardFunction:
    """A function with its convention, read from its parameters. Raises UserError."""
    signature = _read(function, whole_group)
    known = OF_A_GROUP if whole_group else tuple(OURS)
    if signature.convention == "trl":
        for parameter in TRL_ONLY:
            if parameter in signature.required:
                raise UserError(f"{where}: it takes {parameter}, which only TRL's trainer has; give it a default")
    if signature.convention == "verl" and whole_group:
        raise UserError(f"{where}: verl's compute_score judges one sample; name it in task.args.reward instead")
    if signature.convention == "ours" and not signature.names and not signature.takes_more:
        raise UserError(f"{where}: it takes nothing; a reward takes any of {', '.join(known)}")
    return RewardFunction(name=name, function=function, signature=signature, whole_group=whole_group)


def _read(function: Callable[..., Any], whole_group: bool) -> Signature:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (ValueError, TypeError):  # a builtin
        return Signature(convention="position", names=(), required=frozenset(), in_order=0, takes_more=False)
    single = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    names = tuple(p.name for p in single)
    return Signature(
        convention=_convention(parameters, single, whole_group),
        names=names,
        required=frozenset(p.name for p in single if p.default is EMPTY),
        in_order=sum(p.kind is p.POSITIONAL_ONLY for p in single),
        takes_more=any(p.kind is p.VAR_KEYWORD for p in parameters),
    )


def _convention(
    parameters: Sequence[inspect.Parameter], single: Sequence[inspect.Parameter], whole_group: bool
) -> Convention:
    names = {p.name for p in single}
    if "solution_strs" in names:
        return "verl batch"
    if "solution_str" in names:
        return "verl"
    if names & {*TRL}:
        return "trl"
    if not single and any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return "position"
    needed = [p for p in single if p.default is EMPTY]
    if len(needed) == 1 and _is_sample(needed[0], whole_group):
        return "sample"
    return "ours"


def _is_sample(parameter: inspect.Parameter, whole_group: bool) -> bool:
    """Whether it is named or annotated as the whole sample (or the samples of a group)."""
    if whole_group:
        return parameter.name == "samples"
    said = parameter.annotation
    return parameter.name == "sample" or said is Sample or (isinstance(said, str) and said.split(".")[-1] == "Sample")


def check_columns(found: RewardFunction, problems: Sequence[Problem], *, where: str, answer_field: str) -> None:
    """Raises UserError when the function takes a field that a row lacks."""
    for column in found.columns():
        if column == answer_field or column in getattr(problems, "fields", ()):  # those that every row has
            continue
        for problem in problems:
            row = problem.data.get("row")
            if isinstance(row, Mapping) and column in row:
                continue
            fields = [str(name) for name in row] if isinstance(row, Mapping) else []
            place = problem.data.get("where", f"problem {problem.index}")
            raise UserError(
                f"{where} '{found.name}' takes '{column}', and {place} has no such field; "
                f"{nearest(column, [*found.known(), *fields])}"
            )


def _columns(sample: Sample, answer_field: str) -> dict[str, Any]:
    """All fields of the sample's row; `answer_field` names the one with the answer."""
    return {answer_field: sample.answer, **sample.row} if answer_field else dict(sample.row)


def _for_verl(sample: Sample) -> dict[str, Any]:
    """The arguments of compute_score."""
    model, extra = sample.row.get("reward_model"), sample.row.get("extra_info")
    truth = model.get("ground_truth", sample.answer) if isinstance(model, Mapping) else sample.answer
    more = {"num_turns": len(sample.said), "rollout_reward_scores": {}}
    return {
        "data_source": sample.row.get("data_source", "unknown"),
        "solution_str": sample.transcript or sample.completion,
        "ground_truth": truth,
        "extra_info": {**(extra if isinstance(extra, Mapping) else {}), **more},
    }


def _for_trl(samples: Sequence[Sample]) -> dict[str, Any]:
    chat = not isinstance(samples[0].prompt, str)
    return {
        "prompts": [list(s.prompt) if chat else s.prompt for s in samples],
        "completions": [
            [{"role": "assistant", "content": text} for text in s.turns] if chat else s.transcript or s.completion
            for s in samples
        ],
        "completion_ids": [[token for turn in s.said for token in turn.tokens] for s in samples],
    }


def _logs(notes: Sequence[Note]) -> dict[str, Any]:
    """TRL's functions may log columns (a value a sample) and metrics; here they become notes."""

    def log_extra(column: str, values: Sequence[Any]) -> None:
        for note, value in zip(notes, values, strict=True):
            note(column, float(value) if isinstance(value, int | float) else str(value))

    def log_metric(name: str, value: float) -> None:
        for note in notes:
            note(name, float(value))

    return {"log_extra": log_extra, "log_metric": log_metric}


def check_name(name: str, known: Sequence[str], *, where: str) -> None:
    """Raises UserError unless `name` is known or names an object to import."""
    if name not in known and not is_import(name):
        raise UserError(f"{where} '{name}' is not known; {nearest(name, known)} (or module:function, file.py:function)")
