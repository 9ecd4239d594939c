"""The task `verifiers` on the real package: its rollouts play through the endpoint."""

import asyncio
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from async_rl.errors import UserError
from async_rl.model.tokenizer import Tokenizer
from async_rl.task import Task, make_task
from async_rl.trajectory.parts import parts_in

vf = pytest.importorskip("verifiers")
if not hasattr(vf, "Rubric"):
    pytest.skip("this release of verifiers has no rubrics", allow_module_level=True)

from support_agents import ScriptedEngine, agents_tokenizer, play, sampled_as, texts_of  # noqa: E402

from async_rl.generator.episodes import Episodes  # noqa: E402
from async_rl.generator.facilities import Facilities  # noqa: E402
from async_rl.trajectory import Trajectory  # noqa: E402
from async_rl.wire.messages import Permit  # noqa: E402

ENVIRONMENTS = Path(__file__).with_name("verifiers_environments.py")


def made(name: str, max_tokens: int = 200, num_eval: int = 256, **args: Any) -> Task:
    settings = {"environment": f"{ENVIRONMENTS}:{name}", "args": args, "max_tokens": max_tokens, "num_eval": num_eval}
    return make_task("verifiers", settings)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return agents_tokenizer(tmp_path_factory.mktemp("model"))


def played(task: Task, tokenizer: Tokenizer, script: Any, **more: Any) -> Any:
    engine = ScriptedEngine(tokenizer, script)

    async def episode() -> Any:
        await task.setup()
        try:
            return await play(engine, tokenizer, task, **more)
        finally:
            await task.teardown()

    trajectory = asyncio.run(episode())
    sampled_as(trajectory, engine)
    return trajectory


def test_one_turn_is_scored_by_the_rubric_part_by_part(tokenizer: Tokenizer) -> None:
    task = made("single_turn", system="Be brief.")
    problem = task.problems("train")[0]
    assert [message["role"] for message in problem.prompt] == ["system", "user"]
    answer = problem.data["answer"]
    trajectory = played(task, tokenizer, [f" {answer}"])
    assert (trajectory.ended, trajectory.reason, trajectory.reward) == ("finished", "", 1.5)
    assert parts_in(trajectory.info) == {"right": 1.0, "short": 0.5}
    assert trajectory.info["length"] == 4.0
    assert not trajectory.contexts, "the environment's first request is the problem's prompt"
    assert task.reward_parts == ["right", "short"]
    assert task.single_turn
    assert texts_of(trajectory, tokenizer) == [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n" + problem.prompt[1]["content"] + "<|im_end|>\n"
        f"<|im_start|>assistant\n[ {answer}<|im_end|>]"
    ]


def test_several_turns_go_as_the_environment_has_them(tokenizer: Tokenizer) -> None:
    task = made("guessing", num_eval=5)
    wanted = int(task.problems("train")[0].data["answer"])
    trajectory = played(task, tokenizer, ["0", "9", str(wanted)] if 0 < wanted < 9 else ["5", str(wanted)])
    assert (trajectory.ended, trajectory.reason, trajectory.reward) == ("finished", "", 1.0)
    assert len(texts_of(trajectory, tokenizer)) == 1
    assert trajectory.info["num_turns"] == len(trajectory.turns)
    late = played(task, tokenizer, lambda history: "0" if wanted else "1")
    assert (late.ended, late.reward, len(late.turns)) == ("turn_limit", 0.0, 4)
    assert not task.single_turn


def test_tools_are_called_and_their_calls_counted(tokenizer: Tokenizer) -> None:
    task = made("tools", num_eval=4)
    problem = task.problems("train")[0]
    assert problem.tools[0]["function"]["name"] == "add"
    half = int(problem.data["answer"]) // 2
    call = f'<tool_call>\n{{"name": "add", "arguments": {{"a": {half}, "b": {half}}}}}\n</tool_call>'
    trajectory = played(task, tokenizer, [call, problem.data["answer"]])
    assert (trajectory.ended, trajectory.reason, trajectory.reward) == ("finished", "", 1.0)
    (text,) = texts_of(trajectory, tokenizer)
    assert f"<|im_start|>tool\n{problem.data['answer']}<|im_end|>" in text
    assert trajectory.info["total_tool_calls"] == 1.0


def played_as_group(task: Task, tokenizer: Tokenizer, said: list[str]) -> list[Trajectory]:
    """A group whose samples say this, as a generator plays it."""
    engine = ScriptedEngine(tokenizer, said)
    permit = Permit(group=4, problem=0, split="train", samples=(0, 1, 2), seed=0, temperature=1.0, size=3)
    sent: list[Trajectory] = []
    done = asyncio.Event()

    async def play_all() -> None:
        facilities = Facilities(task, threads=4)
        await facilities.open(timeout_s=20.0)
        episodes = Episodes(
            task=task, engine=engine, tokenizer=tokenizer, generator="g", max_turns=9, timeout_s=20.0,
            save_turns_after_s=60.0, on_finished=sent.append, on_change=done.set, facilities=facilities,
        )  # type: ignore[arg-type]  # fmt: skip
        episodes.start(permit, (0, 1, 2))
        while len(sent) < 3:
            await asyncio.wait_for(done.wait(), 20.0)
            done.clear()
        await facilities.close()

    asyncio.run(play_all())
    return sorted(sent, key=lambda made: made.sample)


def test_a_rubric_of_whole_groups_scores_them(tokenizer: Tokenizer) -> None:
    task = made("whole_groups")
    assert task.has_group_reward
    assert task.reward_parts == ["right", "shortest"]
    answer = task.problems("train")[0].data["answer"]
    sent = played_as_group(task, tokenizer, [answer, "1", "no idea"])
    by_text = {tokenizer.turn_text(t.tokens[t.turns[0].start :].tolist(), ()): t for t in sent}
    assert {text: (t.ended, t.reason, t.reward) for text, t in by_text.items()} == {
        answer: ("finished", "", 1.0),
        "1": ("finished", "", 0.5),
        "no idea": ("finished", "", 0.0),
    }
    assert parts_in(by_text["1"].info) == {"right": 0.0, "shortest": 0.5}


def test_a_judge_of_groups_that_raises_fails_them(tokenizer: Tokenizer) -> None:
    for made_of in played_as_group(made("whole_groups", judge="spoiled"), tokenizer, ["1", "2", "3"]):
        assert made_of.ended == "error"
        assert "the rubric's spoiled raised ZeroDivisionError: of the judge" in made_of.reason
        assert "verifiers_environments.py:" in made_of.reason


@pytest.mark.parametrize(("func", "said"), [("broken", "TypeError"), ("no_number", "TypeError: float()")])
def test_a_function_of_the_rubric_that_raises_is_no_reward_of_0(tokenizer: Tokenizer, func: str, said: str) -> None:
    trajectory = played(made("failing", func=func), tokenizer, ["321"])
    assert trajectory.ended == "error"
    assert f"the rubric's {func} raised {said}" in trajectory.reason


def test_an_error_of_the_environment_is_no_reward_of_0(tokenizer: Tokenizer) -> None:
    trajectory = played(made("guessing", num_eval=5), tokenizer, ["what?"])
    assert trajectory.ended == "error"
    assert "ToolError" in trajectory.reason


def test_an_answer_that_is_cut_is_recorded_as_such(tokenizer: Tokenizer) -> None:
    trajectory = played(made("single_turn", max_tokens=2), tokenizer, ["1234567"])
    assert (trajectory.ended, trajectory.reason, trajectory.turns[0].length) == ("length", "", 2)


def test_an_episode_that_fills_the_context_is_scored(tokenizer: Tokenizer) -> None:
    task = made("guessing", max_turns=50, max_tokens=4000, num_eval=5)
    wanted = int(task.problems("train")[0].data["answer"])
    wrong = "1" if wanted == 0 else "0"
    engine = ScriptedEngine(tokenizer, lambda _: wrong, max_context=400)
    trajectory = asyncio.run(play(engine, tokenizer, task, max_turns=50))
    assert (trajectory.ended, trajectory.reason, trajectory.reward) == ("length", "", 0.0)
    assert len(trajectory.turns) > 2


def test_no_held_out_prompt_is_trained_on() -> None:
    asked = {split: {str(p.prompt) for p in made("single_turn").problems(split)} for split in ("train", "eval")}
    assert len(asked["train"]) == 30
    assert len(asked["eval"]) == 10
    assert not asked["train"] & asked["eval"]
    own = made("single_turn", held_out=6)
    assert [p.data["answer"] for p in own.problems("eval")] == ["001", "101", "201", "301", "401", "501"]
    assert len(own.problems("train")) == 34
    alike = made("guessing", num_eval=1)
    assert {len(alike.problems(split)) for split in ("train", "eval")} == {10}, "rows with one prompt stay together"


def test_a_release_without_rubrics_is_refused_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    newer = ModuleType("verifiers")  # all that 0.4.0 has at its root
    newer.__spec__, newer.__version__ = vf.__spec__, "0.4.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "verifiers", newer)
    with pytest.raises(UserError, match=r"which verifiers 0\.4\.0 .*pip install 'verifiers>=0\.2,<0\.[34]'"):
        made("single_turn")


def test_an_environment_leaves_our_signals_alone() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    made("single_turn")
    assert {number: signal.getsignal(number) for number in before} == before


def test_an_installed_environment_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "backwards_again.py").write_text(ENVIRONMENTS.read_text())
    monkeypatch.syspath_prepend(tmp_path)
    task = make_task("verifiers", {"environment": "backwards-again", "args": {"system": "Short."}})
    assert task.problems("train")[0].prompt[0] == {"role": "system", "content": "Short."}


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("none", {}, "not an environment of verifiers"),
        ("nothing", {}, "has no function 'nothing'"),
        ("single_turn", {"sistem": "x"}, "unexpected keyword argument 'sistem'"),
    ],
)
def test_what_cannot_be_played_is_refused(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        made(name, **args)
    assert message in str(refused.value)
    assert "task.args.environment" in str(refused.value)


@pytest.mark.parametrize(("name", "message"), [("", "is not set"), ("no-such-environment", "no_such_environment")])
def test_a_missing_environment_is_named(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("_", "[_-]")):
        make_task("verifiers", {"environment": name})
