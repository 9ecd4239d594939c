"""The task `reasoning_gym` on the real package, every generator of it."""

import json
from collections import deque
from random import Random
from typing import Any

import pytest
from support_session import END, ScriptedSession, play

from async_rl.errors import UserError
from async_rl.task import Problem, Task, make_task
from async_rl.task.adapters.reasoning_gym import ReasoningGym, shared_worker

pytest.importorskip("reasoning_gym")

SHORT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
MANY_RIGHT = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
"""generators that give no answer, because many are right"""
SALTED = ("isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder")
"""generators that walk through sets of strings"""


def generators() -> list[str]:
    from reasoning_gym.factory import DATASETS

    return sorted(set(DATASETS) - {"composite"})


def chain_sum(**args: Any) -> Task:
    return make_task("reasoning_gym", {"dataset": "chain_sum", "config": SHORT, **args})


def mixed(names: Any, **args: Any) -> Task:
    config = {"datasets": [{"name": name} for name in names]}
    return make_task("reasoning_gym", {"dataset": "composite", "config": config, "size": 3000, **args})


class Drawn(Random):
    """Draws the numbers that it was given."""

    def __init__(self, *numbers: int) -> None:
        super().__init__()
        self.numbers = iter(numbers)

    def randrange(self, *_: Any) -> int:
        return next(self.numbers)


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.nightly), 5])
def test_the_own_answer_of_every_generator_earns_everything(every: int) -> None:
    """every: one in so many generators."""
    assert len(generators()) > 100
    names = generators()[::every]
    seed = 1
    task = mixed(names, answer="whole", max_tokens=100_000, seed=seed)
    assert isinstance(task, ReasoningGym)
    first: dict[str, int] = {}
    for number in range(3000):  # as the package mixes them
        first.setdefault(Random(seed + number).choices(names, weights=[1.0] * len(names), k=1)[0], number)
    assert set(first) == set(names)
    for name, number in first.items():
        _, prompt, data = task._draw(Drawn(number))
        assert data["source"] == name
        assert prompt[0]["content"].strip()
        if name not in MANY_RIGHT:
            session = ScriptedSession([data["answer"] + END])
            assert play(task, Problem(index=0, prompt=prompt, data=data), session) == 1.0, name
            assert session.notes == {"solved": 1.0}


@pytest.mark.parametrize("name", sorted(MANY_RIGHT))
def test_any_right_answer_earns_everything(name: str) -> None:
    """Where the package gives no answer, one found here is right."""
    import reasoning_gym

    config: dict[str, Any] = {
        "boxnet": {"max_row_num": 1, "max_column_num": 2, "colour_list": ["red"]},
        "rush_hour": {"max_moves": 6},
    }.get(name, {})
    args = {"dataset": name, "config": config, "answer": "whole", "max_tokens": 100_000}
    task = make_task("reasoning_gym", args)
    package = reasoning_gym.create_dataset(name, seed=0, size=20_000, **config)
    for problem in task.problems("train")[:20]:
        found = package[problem.data["index"]]
        answer = own_answer(name, found["metadata"])
        if answer is None:
            continue
        assert play(task, problem, ScriptedSession([answer + END])) == 1.0
        for wrong in ("?", '{"a": "b"}'):  # for some the second is a shape that their score does not expect
            assert play(task, problem, ScriptedSession([wrong + END])) < 1.0
        return
    raise AssertionError("none of 20 problems could be answered")


def own_answer(name: str, known: dict[str, Any]) -> str | None:
    if name == "graph_color":
        return json.dumps(known["possible_answer"])
    if name == "propositional_logic":
        return known["example_answer"]
    if name == "rubiks_cube":
        return known["example_correct_answer"]
    if name == "boxnet":
        for square, things in known["initial_state"].items():
            if {"box_red", "target_red"} <= set(things):
                row, _, column = square.partition("_")
                return json.dumps([{f"Agent[{row}, {column}]": "move(box_red, target_red)"}])
        return None
    return way_out(known["board_config"])


def way_out(board: str) -> str:
    """Moves of a rush-hour puzzle, by breadth-first search over boards of 6 x 6 letters."""
    seen, queue = {board}, deque([(board, "")])
    while queue:
        state, moves = queue.popleft()
        if state[17] == "A":
            return moves.strip()
        for letter in set(state) - {"o", "x"}:
            cells = [i for i, found in enumerate(state) if found == letter]
            stride = cells[1] - cells[0]
            for sign, front in ((1, cells[-1]), (-1, cells[0])):
                there = front + sign * stride
                inside = 0 <= there < 36 and (stride == 6 or there // 6 == front // 6)
                if not inside or state[there] != "o":
                    continue
                made = list(state)
                made[cells[0] if sign == 1 else cells[-1]], made[there] = "o", letter
                after = "".join(made)
                if after not in seen:
                    seen.add(after)
                    queue.append((after, f"{moves} {letter}{sign:+d}"))
    raise AssertionError("there is no way out")


def test_problems_are_the_same_in_every_process_and_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each task has a child of its own; Python salts what strings hash to in each, unless told otherwise."""
    made = []
    for salt, backwards in (("1", False), ("2", True)):
        monkeypatch.setenv("PYTHONHASHSEED", salt)
        shared_worker.cache_clear()
        problems = mixed((*SALTED, "list_functions"), size=1000).problems("train")
        order = range(23, -1, -1) if backwards else range(24)
        made.append({index: (problems[index].prompt, problems[index].data) for index in order})
    assert made[0] == made[1]
    assert {data["source"] for _, data in made[0].values()} == {*SALTED, "list_functions"}


def test_no_held_out_question_is_trained_on() -> None:
    task = chain_sum(num_train=400, num_eval=200, size=1000)
    asked = [{str(problem.prompt) for problem in task.problems(split)} for split in ("train", "eval")]
    assert len(asked[0]) > 100
    assert len(asked[1]) > 50
    assert not asked[0] & asked[1]
    assert [p.prompt for p in chain_sum(seed=1).problems("train")[:5]] != [p.prompt for p in task.problems("train")[:5]]


@pytest.mark.parametrize(
    ("place", "said", "reward", "formed"),
    [
        ("tags", "So <answer> {} </answer>", 1.0, 1.0),
        ("tags", "<answer>0</answer> no, <answer>{}</answer>", 1.0, 0.0),
        ("tags", "<answer>{}</answer> I think", 1.0, 0.0),
        ("tags", "{}", 0.0, 0.0),
        ("last_line", "First 1\nthen\n {} \n\n", 1.0, 1.0),
        ("last_line", "", 0.0, 0.0),
        ("number", "1 and 2 give\n {}.\n", 1.0, 1.0),
        ("number", "{} apples", 1.0, 0.0),
        ("number", "{} or 17", 0.0, 1.0),
        ("number", "none", 0.0, 0.0),
        ("whole", " {}\n", 1.0, 1.0),
        ("whole", "  ", 0.0, 0.0),
    ],
)
def test_the_answer_is_looked_for_where_it_is_asked_for(place: str, said: str, reward: float, formed: float) -> None:
    task = chain_sum(answer=place, format_part=True)
    problem = task.problems("eval")[0]
    parts = play(task, problem, ScriptedSession([said.replace("{}", problem.data["answer"]) + END]))
    assert parts == {"answer": reward, "format": formed}
    assert task.reward_parts == ("answer", "format")


@pytest.mark.parametrize("place", ["tags", "last_line", "number", "whole"])
def test_the_right_answer_stands_where_it_is_asked_for(place: str) -> None:
    task = chain_sum(answer=place)
    problem = task.problems("eval")[0]
    assert play(task, problem, ScriptedSession([f"{task.right_answer(problem)}{END}"])) == 1.0


def test_an_answer_that_is_cut_is_recorded_as_such() -> None:
    task = chain_sum(answer="whole", max_tokens=2, format_part=True)
    problem = task.problems("eval")[0]
    session = ScriptedSession(["123456"])
    assert play(task, problem, session)["format"] == 0.0
    assert session.at_token_limit


def test_the_prompt_says_where_the_answer_is_to_stand() -> None:
    [message] = chain_sum().problems("eval")[0].prompt
    assert message["content"].endswith(
        "\n\nThink step by step, then give the answer alone between <answer> and </answer>."
    )
    system, user = chain_sum(system="Be brief.", instruction="Only the number.").problems("eval")[0].prompt
    assert system == {"role": "system", "content": "Be brief."}
    assert user["content"].endswith("=\n\nOnly the number.")
    text = chain_sum(prompt="text", answer="whole").problems("eval")[0].prompt
    assert isinstance(text, str)
    assert text.endswith("=")


def test_a_score_that_takes_for_ever_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("async_rl.task.adapters.reasoning_gym.LIMIT_S", 2)
    shared_worker.cache_clear()
    task = make_task("reasoning_gym", {"dataset": "polynomial_multiplication", "answer": "whole"})
    problem = task.problems("eval")[0]
    session = ScriptedSession(["9**9**9**9" + END, ""])
    assert play(task, problem, session) == 0.0
    assert session.notes["score_timeout"] == 1.0
    assert play(task, problem, ScriptedSession([problem.data["answer"] + END])) == 1.0, "the next one is scored"
    shared_worker.cache_clear()


def test_a_problem_that_the_generator_never_ends_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Number 101 of number_sequence with seed 62 is such a one."""
    monkeypatch.setattr("async_rl.task.adapters.reasoning_gym.LIMIT_S", 1)
    shared_worker.cache_clear()

    task = make_task("reasoning_gym", {"dataset": "number_sequence", "seed": 62, "size": 3000})
    assert isinstance(task, ReasoningGym)
    assert task._draw(Drawn(101, 7))[2]["index"] == 7
    shared_worker.cache_clear()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"dataset": "chain_summ"}, "did you mean 'chain_sum'"),
        ({"config": {"terms": 2}}, "unexpected keyword argument 'terms'"),
        ({"config": {"min_terms": 9, "max_terms": 2}}, "max_terms must be >= min_terms"),
        ({"config": {"seed": 2}}, "write task.args.seed"),
        ({"dataset": "word_ladder", "size": 30_000}, "word_ladder"),
        ({"dataset": "composite"}, "at least one dataset"),
        ({"answer": "tag"}, "choose one of tags, last_line, number, whole"),
    ],
)
def test_what_the_package_refuses_is_said(args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        make_task("reasoning_gym", args)
    assert message in str(refused.value)
    assert "task.args" in str(refused.value)


def test_without_the_package_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("async_rl.task.adapters.registry.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'reasoning-gym>=0\.1\.25'"):
        make_task("reasoning_gym", {})
