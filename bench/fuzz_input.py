"""Fuzzing of what people, their agents and other processes give: requests to the endpoint, the text of answers, rows of
data, settings; and what fuzz_arrivals.py describes: blobs, messages, conversations of agents.

    python bench/fuzz_input.py [--target request|answer|rows|settings|blobs|messages|agents|all] [--inputs N] [--seed S]
                               [--seconds S]

Each input is grown from known names and values, or bent from one that is right. There is one exception each target may
raise, which names what is wrong; any other is printed with the input that raised it, and the exit code is 1. Coverage
guides bench/fuzz_wire.py; here the forms are known, and random ones of the right shape reach further.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from random import Random
from typing import Any

from fuzz_arrivals import CALLS
from fuzz_arrivals import TARGETS as ARRIVALS

from async_rl.config import Settings, check
from async_rl.config.schema import load_yaml, structured
from async_rl.errors import UserError
from async_rl.generator.chat_request import NEUTRAL, READ, ROLES, WITHOUT_EFFECT, RequestError, read_request
from async_rl.task import make_task
from async_rl.task.tool_formats import FORMATS

SCALARS = (None, True, False, 0, 1, -1, 2**70, 1.5, -0.0, 1e308, float("nan"), float("inf"), "", "a", "\x00", "\ud800",
           "💥" * 50, "user", "auto", "none", "{}", "[" * 200)  # fmt: skip
INNER = ("role", "content", "type", "text", "function", "name", "arguments", "id", "tool_calls", "tool_call_id",
         "parameters", "properties", "required", "input_text", "description")  # fmt: skip
PIECES = ("<tool_call>", "</tool_call>", "<think>", "</think>", "[TOOL_CALLS]", "<function=", "</function>",
          "<parameter=", "</parameter>", "[ARGS]", '{"name": "f", "arguments": {}}', "{", "}", '"', "\\", "\n", "<",
          "<|python_tag|>", "<|tool_calls_section_begin|>", "f", ":0", "null", "NaN", "\x00", "é")  # fmt: skip
TOOLS = ({"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {}}}}},)


def value(random: Random, names: tuple[str, ...], depth: int = 0) -> Any:
    """A JSON value, of these names where it has any."""
    kind = random.random()
    if depth > 4 or kind < 0.45:
        return random.choice((*SCALARS, *names, *ROLES))
    if kind < 0.7:
        return [value(random, names, depth + 1) for _ in range(random.randint(0, 3))]
    return {random.choice(names): value(random, names, depth + 1) for _ in range(random.randint(0, 4))}


def bent(random: Random, right: Any, names: tuple[str, ...]) -> Any:
    """A right value with something in it replaced."""
    if random.random() < 0.25 or not isinstance(right, dict | list) or not right:
        return value(random, names)
    if isinstance(right, dict):
        name = random.choice(list(right))
        return {**right, name: bent(random, right[name], names)}
    place = random.randrange(len(right))
    return [*right[:place], bent(random, right[place], names), *right[place + 1 :]]


REQUEST = {
    "model": "policy", "tools": list(TOOLS), "temperature": 1.0, "max_tokens": 5, "stop": ["x"], "stream": True,
    "messages": [
        {"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "u"}]},
        {"role": "assistant", "content": None,
         "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "t"},
    ],
}  # fmt: skip
PARAMETERS = (*READ, *WITHOUT_EFFECT, *NEUTRAL, "unknown", *INNER)


def a_request(random: Random, _: Path) -> object:
    given = bent(random, REQUEST, PARAMETERS) if random.random() < 0.8 else value(random, PARAMETERS)
    if random.random() < 0.3 and isinstance(given, dict):
        given = {**given, random.choice(PARAMETERS): value(random, PARAMETERS)}
    with suppress(RequestError):
        read_request(json.loads(json.dumps(given)))
    return given


def an_answer(random: Random, _: Path) -> object:
    text = "".join(random.choice(PIECES) for _ in range(random.randint(0, 14)))
    for one in FORMATS.values():
        one.parse(text, TOOLS, random.random() < 0.5)
    return text


ROW = {"prompt": "1+1", "answer": "2"}
ROW_NAMES = ("prompt", "answer", "messages", "question", "solution", "ground_truth", "reward_model", *INNER)


def rows_of_data(random: Random, place: Path) -> object:
    rows = [bent(random, ROW, ROW_NAMES) if random.random() < 0.6 else ROW for _ in range(random.randint(0, 4))]
    text = "\n".join(json.dumps(row) for row in rows)
    data = bytearray(text.encode())
    for _ in range(random.choice((0, 0, 0, 1, 3))):
        if data:
            data[random.randrange(len(data))] = random.randrange(256)
    file = place / "rows.jsonl"
    file.write_bytes(data)
    try:
        task = make_task("dataset", {"path": str(file), "eval_share": 0.0, "as_chat": random.random() < 0.5})
        for split in ("train", "eval"):
            for problem in task.problems(split):
                problem.prompt  # noqa: B018  # what is read only when it is asked for
    except UserError:
        pass
    return bytes(data)


SETTING_NAMES = (*(one.name for one in fields(Settings)), "steps", "path", "name", "args", "count", "every")
SETTINGS = {"model": {"path": "m"}, "task": {"name": "guess", "args": {}}, "trainer": {"steps": 3}, "recipe": "grpo"}


def settings_of_a_run(random: Random, place: Path) -> object:
    given = bent(random, SETTINGS, SETTING_NAMES)
    text = json.dumps(given)
    if random.random() < 0.3:
        at = random.randrange(len(text) + 1)
        text = (
            text[:at]
            + random.choice((":", "- ", "&a ", "*a", "!!python/object:os.system ", "\t", "{", "${x}"))
            + text[at:]
        )
    file = place / "config.yaml"
    file.write_text(text, errors="replace")
    with suppress(UserError):
        check(structured(Settings, load_yaml(file), where=""))
    return text


TARGETS: dict[str, Callable[[Random, Path], object]] = {
    "request": a_request, "answer": an_answer, "rows": rows_of_data, "settings": settings_of_a_run, **ARRIVALS,
}  # fmt: skip


def play(name: str, inputs: int, seed: int, place: Path, seconds: float = math.inf) -> tuple[int, list[str]]:
    """(inputs played, those that raised what they may not; the first of each kind), for so many `seconds` at most."""
    wrong: dict[str, str] = {}
    calls, each = 0, CALLS.get(name, 1)
    end = time.monotonic() + seconds
    while calls * each < inputs and time.monotonic() < end:
        random = Random(f"{name} {seed} {calls}")
        try:
            TARGETS[name](random, place)
        except Exception as error:
            wrong.setdefault(
                f"{type(error).__name__}: {error}"[:120], f"{name} --seed {seed}, call {calls}: {error!r}"[:500]
            )
        calls += 1
    return calls * each, list(wrong.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=(*TARGETS, "all"), default="all")
    parser.add_argument("--inputs", type=int, default=100_000, help="of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=math.inf, help="longest time for each target")
    args = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as place:
        for name in TARGETS if args.target == "all" else (args.target,):
            began = time.monotonic()
            played, wrong = play(name, args.inputs, args.seed, Path(place), args.seconds)
            failed += len(wrong)
            print(f"{name}: {played} inputs in {time.monotonic() - began:.0f} s, {len(wrong)} kinds of error")
            print(*wrong, sep="\n", end="\n" if wrong else "", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
