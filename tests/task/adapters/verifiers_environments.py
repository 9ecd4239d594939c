"""Environments of the package verifiers, as a user would write them."""

from typing import Any

import verifiers as vf
from datasets import Dataset

ROWS = [{"question": f"Say {number} backwards.", "answer": str(number)[::-1]} for number in range(100, 140)]


def right(completion: Any, answer: str) -> float:
    return float(completion[-1]["content"].strip() == answer)


def short(completion: Any) -> float:
    return float(len(completion[-1]["content"]) < 5)


def length(completion: Any) -> float:
    return float(len(completion[-1]["content"]))


def single_turn(system: str = "", held_out: int = 0) -> vf.Environment:
    rubric = vf.Rubric(funcs=[right, short, length], weights=[1.0, 0.5, 0.0])
    more = {"eval_dataset": Dataset.from_list(ROWS[:held_out])} if held_out else {}
    return vf.SingleTurnEnv(dataset=Dataset.from_list(ROWS), system_prompt=system or None, rubric=rubric, **more)


class Guessing(vf.MultiTurnEnv):
    """The answer is told lower or higher until it is found."""

    async def env_response(self, messages: Any, state: Any, **kwargs: Any) -> Any:
        said, wanted = messages[-1]["content"].strip(), int(state["answer"])
        if not said.isdigit():
            raise vf.ToolError("no number")
        if int(said) == wanted:
            state["final_env_response"] = [{"role": "user", "content": "found"}]
        return [{"role": "user", "content": "higher" if int(said) < wanted else "lower"}]


def found(state: Any) -> float:
    return float(state.get("final_env_response") is not None)


def guessing(max_turns: int = 4) -> vf.Environment:
    rows = [{"question": "A number from 0 to 9?", "answer": str(number)} for number in range(10)]
    rows += [{"question": "A digit?", "answer": str(number)} for number in range(10)]
    return Guessing(max_turns=max_turns, dataset=Dataset.from_list(rows), rubric=vf.Rubric(funcs=[found]))


def add(a: int, b: int) -> int:
    """The sum of two numbers.

    Args:
        a: the first
        b: the second
    """
    return a + b


def tools() -> vf.Environment:
    rows = [{"question": f"What is {a} + {a}?", "answer": str(2 * a)} for a in range(20)]
    return vf.ToolEnv(tools=[add], max_turns=5, dataset=Dataset.from_list(rows), rubric=vf.Rubric(funcs=[right]))


def shortest(completions: Any, **kwargs: Any) -> list[float]:
    said = [len(completion[-1]["content"]) for completion in completions]
    return [float(length == min(said)) for length in said]


async def spoiled(completions: Any) -> list[float]:
    raise ZeroDivisionError("of the judge")


def whole_groups(judge: str = "shortest") -> vf.Environment:
    rubric = vf.Rubric(funcs=[right, globals()[judge], length], weights=[1.0, 0.5, 0.0])
    return vf.SingleTurnEnv(dataset=Dataset.from_list(ROWS), rubric=rubric)


def broken(completion: Any) -> float:
    return completion["no"]


def no_number() -> None:
    """It forgot to return one."""


def failing(func: str) -> vf.Environment:
    rubric = vf.RubricGroup([vf.Rubric(funcs=[right]), vf.Rubric(funcs=[globals()[func]])])
    return vf.SingleTurnEnv(dataset=Dataset.from_list(ROWS), rubric=rubric)


def none() -> None:
    """No environment."""


load_environment = single_turn
