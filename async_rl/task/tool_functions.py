"""Tools that a model may call: Python functions, what is told of them to the model, and how they are called."""

from __future__ import annotations

import contextlib
import inspect
import json
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from async_rl.config.imports import is_import, load_object
from async_rl.errors import UserError
from async_rl.task.expression import ExpressionError, parse
from async_rl.task.protocol import Problem

CALCULATOR = "calculator"
PROBLEM = "problem"
"""name of the parameter that is given the episode's problem and that the model is not told of"""
MOST_RESULT = 2000
"""characters of a result that are shown"""
_TYPES: dict[Any, str] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    list: "array",
    dict: "object",
}


class BadCall(Exception):
    """A call that does not fit the tool; the model is answered with the message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFunction:
    """A tool. Example: `load_tool("tools.py:search").describe()`."""

    name: str
    function: Callable[..., Any]
    """a plain function or a coroutine function"""
    description: str
    """what it does, from its docstring"""
    parameters: Mapping[str, Mapping[str, Any]]
    """JSON schema of each, in order"""
    required: tuple[str, ...]
    takes_problem: bool
    by_place: bool = False
    """its parameters are a call's text and the problem, whatever their names"""

    def describe(self) -> dict[str, Any]:
        """The description for a chat template: a function with a JSON schema, as transformers' `get_json_schema`."""
        schema = {"type": "object", "properties": dict(self.parameters), "required": list(self.required)}
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.description, "parameters": schema},
        }

    async def call(self, arguments: Mapping[str, Any], problem: Problem) -> str:
        """The result as text. Raises BadCall for arguments that do not fit, and what the function raises."""
        for name in arguments:
            if name not in self.parameters:
                known = ", ".join(self.parameters) or "none"
                raise BadCall(f"{self.name} takes no argument '{name}'; it takes: {known}")
        for name in self.required:
            if name not in arguments:
                raise BadCall(f"{self.name} needs the argument '{name}'")
        given = dict(arguments)
        if self.takes_problem:
            given[PROBLEM] = problem
        return await _text_of(self.function(**given))

    async def call_with_text(self, text: str, problem: Problem) -> str:
        """The result of a call that is one text (format `tags`)."""
        return await _text_of(self.function(text, problem) if self.by_place else self.function(text))

    @property
    def takes_text(self) -> bool:
        """Whether a call can be one text."""
        return self.by_place or len(self.parameters) == 1

    def check_takes_text(self) -> None:
        """Raises UserError unless a call can be one text."""
        if not self.takes_text:
            takes = ", ".join(self.parameters) or "nothing"
            raise UserError(
                f"task.args.tool: {self.name} takes {takes}; in the format 'tags' a call is one text, so a tool takes "
                "one or two arguments: (call, problem). Use a model whose chat template describes tools, or change it"
            )

    def example(self) -> str:
        """Arguments that fit, as JSON text: for rehearsals."""
        values: dict[str, Any] = {
            "string": "1+2",
            "integer": 1,
            "number": 1.0,
            "boolean": True,
            "array": [],
            "object": {},
        }
        return json.dumps(
            {n: (s.get("enum") or [values.get(str(s.get("type")), "1+2")])[0] for n, s in self.parameters.items()}
        )


async def _text_of(result: Any) -> str:
    if inspect.isawaitable(result):
        result = await result
    if isinstance(result, Mapping | list | tuple | bool) or result is None:
        with contextlib.suppress(TypeError, ValueError):
            result = json.dumps(result, ensure_ascii=False)
    return str(result)[:MOST_RESULT]


def load_tools(given: Any) -> dict[str, ToolFunction]:
    """The tools that `task.args.tool` names, by name: one, or a list. Raises UserError."""
    names: Sequence[Any] = given if isinstance(given, list | tuple) else [given]
    found: dict[str, ToolFunction] = {}
    for name in names:
        if not isinstance(name, str):
            raise UserError(f"task.args.tool holds {name!r:.60}; a tool is calculator or module:function")
        tool = load_tool(name)
        if tool.name in found:
            raise UserError(f"task.args.tool names two tools called '{tool.name}'; rename one of the functions")
        found[tool.name] = tool
    if not found:
        raise UserError("task.args.tool is empty; name a tool, or use the task 'dataset'")
    return found


def load_tool(name: str) -> ToolFunction:
    """The tool `calculator`, `module:function` or `file.py:function`. Raises UserError."""
    if name == CALCULATOR:
        return as_tool(calculate, name=CALCULATOR, where="task.args.tool 'calculator'")
    if not is_import(name):
        raise UserError(f"task.args.tool is '{name}'; it is calculator or module:function (or file.py:function)")
    where = f"task.args.tool '{name}'"
    function = load_object(name, where=where, what="function")
    if not callable(function):
        source, _, path = name.rpartition(":")
        raise UserError(f"{where}: '{source}' has no function '{path}'; it is {function!r:.40}")
    return as_tool(function, name=name.rpartition(":")[2].rpartition(".")[2], where=where)


def as_tool(function: Callable[..., Any], *, name: str, where: str) -> ToolFunction:
    """A function as a tool, described by its parameters, their types and its docstring (Google's style). `where`: for
    messages. Raises UserError for parameters that a call cannot give."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        raise UserError(f"{where}: its parameters cannot be read; wrap it in a function of yours") from None
    try:
        hints = get_type_hints(function)
    except Exception:  # names that only a type checker knows
        hints = {}
    about, described = _docstring(inspect.getdoc(function) or "")
    given = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    for parameter in given:
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
            raise UserError(f"{where}: a call gives arguments by name, and '{parameter}' has none that it could give")
    shown = [p for p in given if p.name != PROBLEM]
    return ToolFunction(
        name=name,
        function=function,
        description=about,
        parameters={p.name: _parameter(hints.get(p.name), described.get(p.name, "")) for p in shown},
        required=tuple(p.name for p in shown if p.default is p.empty),
        takes_problem=len(shown) < len(given),
        by_place=len([p for p in given if p.kind is p.POSITIONAL_OR_KEYWORD]) == 2
        and all(p.default is p.empty for p in given),
    )


def _parameter(hint: Any, about: str) -> dict[str, Any]:
    made = _schema(hint)
    if about:
        made["description"] = about
    return made


def _schema(hint: Any) -> dict[str, Any]:
    """JSON schema of a type; text where none is said, anything where JSON has no such type."""
    if hint is None:
        return {"type": "string"}
    if hint in _TYPES:
        return {"type": _TYPES[hint]}
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        kind = _TYPES.get(type(inner[0]))
        return {**({"type": kind} if kind else {}), "enum": list(inner)}
    if origin in (Union, types.UnionType):
        rest = [_schema(one) for one in inner if one is not type(None)]
        made = rest[0] if len(rest) == 1 else {"anyOf": rest}
        return {**made, "nullable": True} if len(rest) < len(inner) else made
    if origin is list or origin is tuple:
        return {"type": "array", **({"items": _schema(inner[0])} if inner else {})}
    return {"type": "object"} if origin is dict else {}


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """(what it does, what each argument is)"""
    about, _, rest = text.partition("\nArgs:")
    arguments: dict[str, str] = {}
    last, indent = "", 0
    for line in rest.splitlines():
        body = line.strip()
        depth = len(line) - len(line.lstrip())
        if body and not depth:
            break  # the next section
        name, colon, said = body.partition(":")
        if colon and name.partition(" ")[0].isidentifier() and (not last or depth <= indent):
            last, indent = name.partition(" ")[0], depth
            arguments[last] = said.strip()
        elif last and body:
            arguments[last] += f" {body}"
    return " ".join(about.partition("\nReturns:")[0].split()), arguments


def calculate(expression: str) -> str:
    """Computes an arithmetic expression of numbers, + - * / and parentheses, exactly.

    Args:
        expression: what to compute, for example (12 + 7) * 35
    """
    value = parse(expression).value
    if value is None:
        raise ExpressionError("division by zero")
    return str(value)
