"""Python functions as tools: what a model is told of them, and how a call reaches them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from async_rl.config.imports import locate_all
from async_rl.errors import UserError
from async_rl.task import Problem
from async_rl.task.tool_functions import BadCall, as_tool, calculate, load_tools

PROBLEM = Problem(index=0, prompt="x", data={"answer": "42"})


def weather(city: str, days: int = 1, unit: Literal["C", "F"] = "C", alerts: list[str] | None = None) -> str:
    """
    Forecast of the weather of a city,
    day by day.

    Args:
        city: name of the city, in
            English
        days: how many days
        unit: of the temperature
        alerts: kinds that are wanted

    Returns:
        The forecast.
    """
    return f"{city} {days} {unit} {alerts}"


async def mixed(where: dict, precise: bool, factor: float, problem: Problem) -> Any:  # type: ignore[type-arg]
    """Computes.

    Args:
        where: a place
        precise: whether
        factor: by which
    """
    return {"answer": problem.data["answer"], "factor": factor}


def unsaid(text, more=3):  # type: ignore[no-untyped-def]
    return text


def tool(function: Callable[..., Any]) -> Any:
    return as_tool(function, name=function.__name__, where="task.args.tool 'x'")


@pytest.mark.parametrize("function", [weather, calculate])
def test_a_function_is_described_as_transformers_describes_it(function: Callable[..., Any]) -> None:
    from transformers.utils import get_json_schema

    made, theirs = tool(function).describe(), get_json_schema(function)
    theirs["function"].pop("return", None)
    theirs["function"]["description"] = " ".join(theirs["function"]["description"].split())
    assert made == theirs


def test_the_problem_is_given_and_not_described() -> None:
    made = tool(mixed)
    parameters = made.describe()["function"]["parameters"]
    assert parameters["required"] == ["where", "precise", "factor"]
    assert {name: schema["type"] for name, schema in parameters["properties"].items()} == {
        "where": "object", "precise": "boolean", "factor": "number",
    }  # fmt: skip
    given = {"where": {}, "precise": True, "factor": 2.5}
    assert asyncio.run(made.call(given, PROBLEM)) == '{"answer": "42", "factor": 2.5}'


def test_what_is_not_said_is_text_and_optional_where_it_has_a_default() -> None:
    function = tool(unsaid).describe()["function"]
    assert function["parameters"]["required"] == ["text"]
    assert function["parameters"]["properties"] == {"text": {"type": "string"}, "more": {"type": "string"}}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"town": "Rome"}, "weather takes no argument 'town'; it takes: city, days, unit, alerts"),
        ({}, "weather needs the argument 'city'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(BadCall, match=said):
        asyncio.run(tool(weather).call(arguments, PROBLEM))


def test_a_call_takes_arguments_by_name() -> None:
    assert asyncio.run(tool(weather).call({"city": "Rome", "days": 3}, PROBLEM)) == "Rome 3 C None"


@pytest.mark.parametrize(
    ("result", "text"), [(None, "null"), ([1, "é"], '[1, "é"]'), (2.5, "2.5"), ("a" * 3000, "a" * 2000)]
)
def test_results_become_text(result: Any, text: str) -> None:
    def give() -> Any:
        return result

    assert asyncio.run(tool(give).call({}, PROBLEM)) == text


def star(*words: str) -> str:
    return " ".join(words)


@pytest.mark.parametrize("function", [star, lambda a, /: a])
def test_parameters_that_have_no_name_for_a_call_are_refused(function: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="a call gives arguments by name"):
        tool(function)


def test_tools_are_found_beside_the_config_that_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine.py").write_text("def look(key: str) -> str:\n    return key\n\n\ndef put(key: str): ...\n")
    monkeypatch.chdir(tmp_path)
    values: dict[str, Any] = {"task": {"args": {"tool": ["calculator", "mine.py:look", "mine.py:put"]}}}
    locate_all(values, tmp_path / "a")
    assert values["task"]["args"]["tool"] == ["calculator", "a/mine.py:look", "a/mine.py:put"]
    assert list(load_tools(values["task"]["args"]["tool"])) == ["calculator", "look", "put"]
