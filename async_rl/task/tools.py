"""The user's own prompts, answered in several turns with a tool between them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from async_rl.config.imports import is_import, load_function
from async_rl.config.schema import setting
from async_rl.errors import UserError
from async_rl.task.dataset import Dataset, DatasetSettings
from async_rl.task.expression import ExpressionError, parse
from async_rl.task.generated import require_range, stable_hash
from async_rl.task.protocol import Problem, Session

CALL_OPEN, CALL_CLOSE = "<tool>", "</tool>"
RESULT_OPEN, RESULT_CLOSE = "<result>", "</result>\n"
CALL = re.compile(f"{CALL_OPEN}((?:(?!{CALL_OPEN}).)*?){CALL_CLOSE}", re.DOTALL)
MOST_RESULT = 2000
"""characters of a result that are shown"""
SYSTEM = (
    "Think step by step. To compute something, write an arithmetic expression as <tool>(12 + 7) * 35</tool>; its value "
    "then follows as <result>665</result>. Use the tool as often as you need, then end with the answer alone on the "
    "last line."
)
Tool = Callable[[str, Problem], Any]
"""(call, problem) -> text, or a coroutine that returns it"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolsSettings(DatasetSettings):
    """Example: `task: {name: tools, args: {path: math.jsonl, reward: math, tool: calculator, max_turns: 6}}`."""

    system: str = setting(SYSTEM, "system message put before every chat prompt that has none; says how to call")
    max_tokens: int = setting(512, "longest turn", unit="tokens")
    max_turns: int = setting(6, "calls and the answer together", unit="turns")
    tool: str = setting(
        "calculator", "calculator, or module:function or file.py:function that takes (call, problem) and returns text"
    )
    call_reward: float = setting(
        0.0, "turn reward of a call the tool could do; only recipes with turn-level credit see it"
    )


class Tools(Dataset):
    """A turn that ends at `</tool>` is a call; the tool's text follows as `<result>...</result>`. A turn that ends
    otherwise is the answer, which the named reward judges.

    A tool that raises is answered with its error and counted. An episode whose turns are used up earns 0. Notes:
    `tool_calls`, `tool_errors`.
    """

    name = "tools"
    single_turn = False
    example_call = f"{CALL_OPEN}1+2{CALL_CLOSE}"
    Settings = ToolsSettings

    def __init__(self, settings: ToolsSettings) -> None:
        require_range("max_turns", settings.max_turns, 1, 1000)
        self.tool = calculate if settings.tool == "calculator" else _own(settings.tool)
        super().__init__(settings)
        self.max_turns, self.call_reward = settings.max_turns, settings.call_reward

    async def rollout(self, problem: Problem, session: Session) -> float:
        stop = (CALL_CLOSE, *self.settings.stop)
        written: list[str] = []
        calls = errors = 0
        answered = False
        for _ in range(self.max_turns):
            text = await session.generate(
                max_tokens=self.settings.max_tokens, stop=stop, state_key=stable_hash("".join(written))
            )
            written.append(text)
            call = read_call(text)
            if call is None:
                answered = True
                break
            if session.truncated:
                break  # the context is full: no further turn can be taken
            result, failed = await self._ask(call, problem)
            calls, errors = calls + 1, errors + failed
            if self.call_reward and not failed:
                session.reward_turn(self.call_reward)
            written.append(RESULT_OPEN + result + RESULT_CLOSE)
            session.append(written[-1])
        else:
            session.end_at_turn_limit()
        session.note("tool_calls", float(calls))
        session.note("tool_errors", float(errors))
        return await self.judge(written[-1], problem, session) if answered else 0.0

    async def _ask(self, call: str, problem: Problem) -> tuple[str, bool]:
        """(the tool's text, whether it failed)"""
        try:
            result = self.tool(call, problem)
            if inspect.isawaitable(result):
                result = await result
            return str(result)[:MOST_RESULT], False
        except Exception as error:  # code of others, on text that the policy wrote: the policy gets the error
            return f"error: {error}"[:MOST_RESULT], True


def read_call(text: str) -> str | None:
    """The text in the first pair of tags; None without one. What stands behind it belongs to the token that closed it:
    the turn ended there."""
    found = CALL.search(text)
    return found[1].strip() if found else None


def calculate(call: str, problem: Problem) -> str:
    """The exact value of an expression of + - * / and parentheses. Raises ExpressionError."""
    value = parse(call).value
    if value is None:
        raise ExpressionError("division by zero")
    return str(value)


def _own(name: str) -> Tool:
    if not is_import(name):
        raise UserError(f"task.args.tool is '{name}'; it is calculator or module:function (or file.py:function)")
    found: Tool = load_function(name, where=f"task.args.tool '{name}'", arguments="(call, problem)")
    return found
