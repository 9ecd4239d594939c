"""The task `verifiers`: an environment of the package verifiers, whose own rollout plays against the episode."""

from __future__ import annotations

import functools
import inspect
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from async_rl.config.imports import is_import, load_object
from async_rl.config.schema import setting
from async_rl.errors import UserError
from async_rl.task.adapters.registry import ADAPTERS, require_package
from async_rl.task.generated import stable_hash
from async_rl.task.protocol import Connection, Problem, Reward, Sample, Session, Task
from async_rl.trajectory import Split

REWARD = "rubric"
"""name of the reward where the environment makes it of its metrics in a way of its own"""
NEAR = 1e-6
"""difference of two sums that are meant to be equal"""
LOG_LEVEL = "VF_LOG_LEVEL"


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiersSettings:
    """Example: `task: {name: verifiers, args: {environment: my_env.py:load_environment, args: {split: easy}}}`."""

    environment: str = setting(
        "",
        "name of an installed environment (e.g. reverse-text), or file.py:load_environment or "
        "module:load_environment of your own",
    )
    args: dict[str, Any] = setting({}, "arguments of its load_environment")
    max_tokens: int = setting(512, "longest turn", unit="tokens", min=1, max=1_000_000)
    num_eval: int = setting(
        256,
        "rows held out of the environment's data where it brings no eval data of its own; at most a quarter of them",
        unit="problems",
        min=1,
        max=1_000_000,
    )


class Verifiers(Task):
    """The environment's own code runs the episode: its rollout asks the episode's endpoint for each turn, its rubric
    scores it. Every function of the rubric whose weight is not 0 is a part of the reward, with that weight; the others
    are notes. An episode that the environment ends with an error is a failed one, not a reward of 0.

    The eval split is the environment's eval data, or rows held out of its data; a row whose prompt is held out is
    never trained on. A rubric that scores whole groups is called once all episodes of a group are played. Notes:
    metrics of weight 0, e.g. `num_turns` (not where groups are scored); `agent/...`, see the endpoint of agents.
    """

    name = "verifiers"
    Settings = VerifiersSettings

    def __init__(self, settings: VerifiersSettings) -> None:
        require_package(self.name)
        if not settings.environment:
            raise UserError("task.args.environment is not set; name an environment, e.g. my_env.py:load_environment")
        self.settings: VerifiersSettings = settings
        with _own_signals(), _no_progress_bars():
            self._env = _load(settings.environment, settings.args)
            train, held_out = self._rows()
        rubric = self._env.rubric
        _tell_errors(rubric)
        self._weights: dict[str, float] = {}
        for name, weight in zip(rubric._get_reward_func_names(), rubric._get_reward_weights(), strict=True):
            self._weights[name] = self._weights.get(name, 0.0) + float(weight)
        self.single_turn = getattr(self._env, "max_turns", -1) == 1
        self._train, self._eval = self._made(train), self._made(held_out)
        self._http: Any = None

    # ------------------------------------------------------------------------------------------ problems

    def _rows(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """(rows to train on, held-out rows). Raises UserError."""
        env, where = self._env, f"task.args.environment '{self.settings.environment}'"
        try:
            rows = list(env.get_dataset())
            own = env.eval_dataset is not None or env.eval_dataset_source is not None
            held_out = list(env.get_eval_dataset()) if own else _held_out(rows, self.settings.num_eval)
        except Exception as error:  # of code of others that reads their data
            raise UserError(f"{where}: its data cannot be read: {type(error).__name__}: {error}") from error
        kept = {_key(row) for row in held_out}
        train = [row for row in rows if _key(row) not in kept]
        if not train or not held_out:
            raise UserError(
                f"{where}: of {len(rows)} rows {len(train)} are left to train on, {len(held_out)} to evaluate"
            )
        return train, held_out

    def _made(self, rows: Sequence[Mapping[str, Any]]) -> list[Problem]:
        own = self._env.tool_defs
        made = []
        for index, row in enumerate(rows):
            info = row.get("info")
            info = json.loads(info) if isinstance(info, str) and info else info
            tools = (info or {}).get("tool_defs", own) if isinstance(info, Mapping) else own
            prompt = row["prompt"] if isinstance(row["prompt"], str) else [_plain(message) for message in row["prompt"]]
            data = {"answer": row.get("answer", ""), "row": dict(row)}
            made.append(Problem(index=index, prompt=prompt, data=data, tools=tuple(map(_described, tools or ()))))
        return made

    def problems(self, split: Split) -> Sequence[Problem]:
        return self._train if split == "train" else self._eval

    @property
    def reward_parts(self) -> Sequence[str] | None:
        return [name for name, weight in self._weights.items() if weight]

    # ------------------------------------------------------------------------------------------ an episode

    @property
    def has_group_reward(self) -> bool:
        return bool(self._env.requires_group_rollouts)

    async def rollout(self, problem: Problem, session: Session) -> Reward:
        asked = (problem.data["row"], self._client(session.openai()), "policy")
        limits = {"max_tokens": self.settings.max_tokens}
        if self.has_group_reward:  # what scores it needs the state itself
            ended = await self._env.rollout(*asked, limits)
            if ended.get("error"):
                await self._env.rubric.cleanup(ended)
        else:
            with _scoring():
                ended = await self._env.run_rollout(*asked, limits, state_columns=[])
        if ended.get("error"):
            raise RuntimeError(f"the environment ended with an error: {_reason(ended['error'])}")
        if ended.get("is_truncated"):
            session.end_at_token_limit()
        elif ended.get("stop_condition") == "max_turns_reached" and not self.single_turn:
            session.end_at_turn_limit()
        if self.has_group_reward:
            session.keep(ended)
            return {}
        reward, notes = self._reward(ended)
        for name, value in notes.items():
            session.note(name, value)
        return reward

    async def reward_group(self, problem: Problem, samples: Sequence[Sample]) -> Sequence[Reward]:
        states, rubric = [sample.kept for sample in samples], self._env.rubric
        try:
            with _scoring():
                await rubric.score_group(states)
        finally:
            for state in states:
                await rubric.cleanup(state)
        return [self._reward(state)[0] for state in states]

    def _reward(self, ended: Mapping[str, Any]) -> tuple[Reward, Mapping[str, float]]:
        """(parts of the reward, other numbers) of an episode that its rubric has scored."""
        reward, metrics = float(ended["reward"]), ended.get("metrics") or {}
        parts = {name: weight * float(metrics.get(name, 0.0)) for name, weight in self._weights.items() if weight}
        notes = {name: float(value) for name, value in metrics.items() if not self._weights.get(name)}
        if abs(sum(parts.values()) - reward) > NEAR:
            return {REWARD: reward}, {**notes, **parts}
        return parts, notes

    def _client(self, connection: Connection) -> Any:
        """A client of verifiers for this episode; all share one pool of connections."""
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient
        from verifiers.clients.openai_chat_completions_client import OpenAIChatCompletionsClient

        if self._http is None:
            self._http = DefaultAsyncHttpxClient(timeout=None, trust_env=False)
        return OpenAIChatCompletionsClient(
            AsyncOpenAI(base_url=connection.base_url, api_key=connection.api_key, http_client=self._http, max_retries=0)
        )

    async def teardown(self) -> None:
        await self._env._teardown()
        if self._http is not None:
            await self._http.aclose()
            self._http = None


def _load(name: str, args: Mapping[str, Any]) -> Any:
    """The environment `name`. Raises UserError."""
    where = f"task.args.environment '{name}'"
    os.environ.setdefault(LOG_LEVEL, "ERROR")
    import verifiers

    if not hasattr(verifiers, "Rubric"):
        raise UserError(
            "task.name=verifiers speaks to environments with a rubric, which verifiers "
            f"{verifiers.__version__} no longer has; {ADAPTERS['verifiers'].install}"
        )
    try:
        if is_import(name):
            made = load_object(name, where=where, what="function")(**args)
        else:
            made = verifiers.load_environment(name, **args)
    except UserError:
        raise
    except Exception as error:  # of the environment's own code
        raise UserError(f"{where} with task.args.args {dict(args)}: {type(error).__name__}: {error}") from error
    if not isinstance(made, verifiers.Environment):
        raise UserError(f"{where}: it returns {made!r:.60}, not an environment of verifiers")
    return made


FAILED: ContextVar[list[tuple[str, Exception]]] = ContextVar("FAILED")
"""functions of the rubric that raised in the scoring that goes on, and what"""
TELLING = "async_rl_telling"


@contextmanager
def _scoring() -> Iterator[None]:
    """Raises RuntimeError behind a scoring in which a function of the rubric raised: verifiers itself would log that
    and count a 0."""
    failed: list[tuple[str, Exception]] = []
    before = FAILED.set(failed)
    try:
        yield
    finally:
        FAILED.reset(before)
    for name, error in failed:
        raise RuntimeError(f"the rubric's {name} raised {type(error).__name__}: {error}") from error


def _tell_errors(rubric: Any) -> None:
    """Have the functions of a rubric, and of those in it, tell `_scoring` what they raise."""
    rubric.funcs = [_telling(func, whole_groups=rubric._is_group_func(func)) for func in rubric.funcs]
    for inner in [*getattr(rubric, "rubrics", ()), *(env.rubric for env in getattr(rubric, "env_map", {}).values())]:
        _tell_errors(inner)


def _telling(func: Callable[..., Any], *, whole_groups: bool) -> Callable[..., Any]:
    if hasattr(func, TELLING):  # of a rubric that occurs twice
        return func

    @functools.wraps(func)
    async def telling(*args: Any, **kwargs: Any) -> Any:
        try:
            found = func(*args, **kwargs)
            found = await found if inspect.isawaitable(found) else found
            return found if whole_groups else float(found)
        except Exception as error:
            if (failed := FAILED.get(None)) is not None:
                failed.append((getattr(func, "__name__", repr(func)), error))
            raise

    setattr(telling, TELLING, True)
    return telling


@contextmanager
def _own_signals() -> Iterator[None]:
    """Environments take SIGINT and SIGTERM for themselves when they are made; both stay what they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            assert handler is not None  # None: a handler that is no Python
            signal.signal(number, handler)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """The package datasets draws one for each column that an environment makes."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()


def _key(row: Mapping[str, Any]) -> str:
    return json.dumps(row["prompt"], sort_keys=True, default=str)


def _held_out(rows: Sequence[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """Rows whose prompts have the lowest hashes; rows with the same prompt stay together."""
    hashes = [stable_hash(_key(row)) for row in rows]
    last = sorted(hashes)[max(0, min(number, len(rows) // 4) - 1)]
    return [row for row, value in zip(rows, hashes, strict=True) if value <= last]


def _plain(message: Any) -> Mapping[str, Any]:
    found = message if isinstance(message, Mapping) else message.model_dump()
    return {name: value for name, value in found.items() if value is not None}


def _described(tool: Any) -> Mapping[str, Any]:
    """A tool as OpenAI's API describes it, which is what the environment will send."""
    found = _plain(tool)
    function = {name: found[name] for name in ("name", "description", "parameters", "strict") if name in found}
    return {"type": "function", "function": function}


def _reason(error: Any) -> str:
    if isinstance(error, BaseException):
        chain = [error, *([error.__cause__] if error.__cause__ is not None else [])]
        return ": ".join(f"{type(one).__name__}: {one}" for one in chain)
    if isinstance(error, Mapping):
        return ": ".join(
            str(error[name]) for name in ("error", "error_chain_str", "error_chain_repr") if error.get(name)
        )
    return str(error)
