"""What a run needs of its task: texts that the tokenizer keeps, histories that only grow, and a reward that does not
hold up other episodes."""

from __future__ import annotations

import asyncio
import itertools
import string
import time
import types
from collections.abc import Coroutine, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from random import Random
from typing import Any, TypeVar

from async_rl.errors import UserError
from async_rl.finding import Finding, error, ok, warning
from async_rl.generator.task_code import describe_error
from async_rl.model import plain_tokenizer
from async_rl.model.tokenizer import Tokenizer, problem_text
from async_rl.task.protocol import Connection, Problem, Score, Segment, Task, Utterance
from async_rl.task.weigh import Weights
from async_rl.trajectory import Split

MOST_PROMPTS = 64
"""of each split that are tokenised"""
MOST_EPISODES = 16
MOST_COMPARED = 16
"""prompts of each split of which transformers makes tokens, too"""
SHOWN = 40
"""characters of a text that a finding quotes"""
SPLITS: tuple[Split, ...] = ("train", "eval")
BLOCKED_S = 0.05
"""a step of the event loop that takes longer holds up all episodes of the generator"""
EPISODES = 24
"""that are played to measure the reward"""
MOST_S = 6.0
"""after which no further one is begun"""
RANDOM_LENGTH = 200
"""characters of a random answer"""
Result = TypeVar("Result")


# ------------------------------------------------------------------------------------------------ tokens


def prompts_of(task: Task, tokenizer: Tokenizer) -> list[str]:
    """Some prompts of both splits as the model gets them."""
    found = []
    for split in SPLITS:
        problems = task.problems(split)
        for number in range(0, len(problems), max(1, -(-len(problems) // min(MOST_PROMPTS, task.looked_at)))):
            found.append(problem_text(problems[number], tokenizer))
    return found


def episodes_of(task: Task) -> list[list[Segment]]:
    """Some demonstrations, where the task has any."""
    if not task.demonstrates:
        return []
    problems = task.problems("train")
    shown = range(min(MOST_EPISODES, len(problems)))
    return [task.demonstration(problems[number], Random(number)) for number in shown]


def judge_round_trip(texts: Sequence[str], tokenizer: Tokenizer) -> Finding:
    """Whether decode(encode(text)) is the text, special tokens included."""
    check = "tokenizer"
    for text in texts:
        try:
            back = tokenizer.decode(tokenizer.encode(text), special=True)
        except ValueError as failure:
            return error(check, str(failure), "use a tokenizer that knows the task's characters, or another task")
        if back != text:
            differs = (i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b)
            start = max(0, next(differs, min(len(text), len(back))) - SHOWN // 2)
            shown = slice(start, start + SHOWN)
            return warning(
                check,
                f"a prompt comes back changed: ...{text[shown]!r} as ...{back[shown]!r}",
                "what the model reads is not what the task wrote; use prompts the tokenizer keeps (white space and "
                "normalisation are the usual causes)",
            )
    return ok(check, f"{len(texts)} prompts and episodes come back as they were ({tokenizer.vocab_size} tokens)")


def judge_growth(episodes: Sequence[Sequence[Segment]], tokenizer: Tokenizer) -> Finding:
    """Whether the tokens of an episode's pieces read as the whole text: a history is appended to piece by piece and
    never tokenised again."""
    check = "history"
    if not episodes:
        return ok(check, "the task shows no episodes; turns are appended as tokens, nothing is tokenised twice")
    for episode in episodes:
        tokens = [t for n, segment in enumerate(episode) for t in tokenizer.encode(segment.text, behind=n > 0)]
        whole = "".join(segment.text for segment in episode)
        back = tokenizer.decode(tokens, special=True)
        if back != whole:
            return warning(
                check, f"{whole[:SHOWN]!r} put together from its turns reads {back[:SHOWN]!r}",
                "the tokenizer adds or drops characters at the ends of a text (a leading space?); end and begin turns "
                "with characters it keeps",
            )  # fmt: skip
    return ok(check, f"{len(episodes)} episodes put together turn by turn read as the whole")


def judge_template(tokenizer: Tokenizer) -> Iterator[Finding]:
    """Whether a further turn only appends to the rendered chat."""
    check = "chat template"
    if not tokenizer.has_chat_template:
        yield ok(check, "none; prompts are used as they are written")
        return
    chat = [{"role": "user", "content": "What is 2 + 3?"}]
    more = [*chat, {"role": "assistant", "content": "It is 5."}, {"role": "user", "content": "And 4 + 4?"}]
    short = tokenizer.render(chat)
    if not tokenizer.render(more).startswith(short):
        yield warning(
            check, "it rewrites earlier messages when more follow (thinking that is taken out, a changed header)",
            "async_rl renders the first prompt only and appends tokens from there; a task that renders a whole chat "
            "anew for each turn would train on other tokens than were sampled",
        )  # fmt: skip
        return
    yield ok(check, "further messages only append to what was rendered")
    _, _, behind = tokenizer.render(more[:2], add_generation_prompt=False).rpartition("It is 5.")
    end = tokenizer.mark_at(behind.lstrip())
    if end is not None and end not in tokenizer.end_ids:
        yield warning(
            check, f"it ends the assistant's turn with {tokenizer.decode([end], special=True)!r}, which no file of the "
            "model names as an end: turns go on behind it",
            f"add {end} to eos_token_id in generation_config.json",
        )  # fmt: skip


def judge_plain(task: Task, tokenizer: Tokenizer) -> Finding:
    """Whether transformers makes the same tokens of the task's prompts."""
    check = "transformers"
    if not plain_tokenizer.installed():
        return ok(check, "not installed; its tokenizer and ours are not compared")
    shown = [problem for split in SPLITS for problem in itertools.islice(task.problems(split), MOST_COMPARED)]
    try:
        found = plain_tokenizer.first_difference(shown, tokenizer)
    except UserError as failure:
        return ok(check, f"not compared: {failure}")
    if found:
        return warning(
            check, f"it makes other tokens of a prompt: {found}",
            "this program reads tokenizer.json as it is; where transformers is right for this model, save the "
            "tokenizer with it (AutoTokenizer.from_pretrained(folder).save_pretrained(folder))",
        )  # fmt: skip
    return ok(check, f"it makes the same tokens of {len(shown)} prompts")


# ------------------------------------------------------------------------------------------------ reward


class NotScripted(Exception):
    """The episode is played by an agent through the endpoint, where no script can speak."""


@dataclass(slots=True)
class ScriptedSession:
    """An episode in which the policy says what is in `answers`, turn by turn, at once; then nothing."""

    answers: Sequence[str]
    turn: int = 0
    truncated: bool = False
    stopped: bool = True
    said: Sequence[Utterance] = ()
    split: Split = "train"
    seed: int = 0
    template: str = ""
    contexts: int = 0
    """that the task has started"""
    kept: Any = None
    """what the task keeps for the group's reward"""
    notes: dict[str, float | str] = field(default_factory=dict)
    transcript: str = ""
    """what was said and appended"""

    async def generate(self, *, max_tokens: int, agent: str = "", **how: Any) -> str:
        said = self.answers[self.turn] if self.turn < len(self.answers) else ""
        self.turn += 1
        self.said = [*self.said, Utterance(text=said, tokens=range(len(said)), agent=agent)]
        self.transcript += said
        return said

    def append(self, text: str) -> None:
        self.transcript += text

    def append_messages(self, messages: Sequence[Mapping[str, Any]], *, as_sampled: bool = False) -> None: ...

    def start_context(self, prompt: str | Sequence[Mapping[str, Any]]) -> int:
        self.contexts += 1
        return self.contexts

    def resume_context(self, number: int) -> None: ...

    async def score(self, text: str) -> Score:
        return Score(log_probs=[-1.0] * len(text), version=0)

    def openai(self, *, max_tokens: int | None = None) -> Connection:
        raise NotScripted("the episode is played by an agent through the endpoint")

    def slot(self, name: str) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    def reward_turn(self, value: float, *, agent: str | None = None) -> None: ...

    def note_turn(self, key: str, value: float, *, agent: str | None = None) -> None: ...

    def note_tokens(self, key: str, values: Sequence[float], *, agent: str | None = None) -> None: ...

    def end_at_turn_limit(self) -> None: ...

    def end_at_token_limit(self) -> None: ...

    def note(self, key: str, value: float | str) -> None:
        self.notes[key] = value

    def keep(self, value: Any) -> None:
        self.kept = value


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long scripted episodes took."""

    seconds: tuple[float, ...] = ()
    """wall time of each"""
    blocked_s: float = 0.0
    """longest stretch in which the event loop could do nothing else"""
    failures: tuple[str, ...] = field(default_factory=tuple)
    """what some of them raised"""
    by_agent: bool = False
    """they are played by an agent through the endpoint, which has no script"""


def measure_reward(task: Task, *, seed: int, episodes: int = EPISODES, template: str = "") -> Timing:
    """Play episodes in which the policy gives right answers (the task's demonstrations, if any) and random ones, in
    turn. `template`: text of the model's chat template."""
    problems = task.problems("train")
    random = Random(seed)
    seconds, failures, steps = [], [], [0.0]
    by_agent = False
    begun = time.perf_counter()

    async def play() -> None:
        try:
            await task.setup()
        except Exception as failure:  # the task is the user's code
            failures.append(f"in its setup: {describe_error(failure)}")
            seconds.append(0.0)
            return
        try:
            await play_all()
        finally:
            await task.teardown()

    async def play_all() -> None:
        nonlocal by_agent
        for number in range(episodes):
            problem = problems[random.randrange(len(problems))]
            said = answers_of(task, problem, random, right=number % 2 == 0)
            session = ScriptedSession(said, template=template)
            started = time.perf_counter()
            try:
                Weights().weigh(await stepped(play_scripted(task, problem, session), steps))
            except NotScripted:
                by_agent = True
                return
            except Exception as failure:  # the task is the user's code
                failures.append(describe_error(failure))
            seconds.append(time.perf_counter() - started)
            if time.perf_counter() - begun > MOST_S:
                return

    asyncio.run(play())
    return Timing(seconds=tuple(seconds), blocked_s=max(steps), failures=tuple(failures), by_agent=by_agent)


async def play_scripted(task: Task, problem: Problem, session: ScriptedSession) -> Any:
    """What the task returns for an episode, which is set up before and torn down behind."""
    try:
        await task.setup_episode(problem, session)
        return await task.rollout(problem, session)
    finally:
        await task.teardown_episode(problem, session)


def answers_of(task: Task, problem: Problem, random: Random, *, right: bool) -> list[str]:
    """What the policy says in an episode."""
    if right and task.demonstrates:
        return [segment.text for segment in task.demonstration(problem, random) if segment.policy]
    if right and (answer := task.right_answer(problem)) is not None:
        return [answer]
    return ["".join(random.choices(string.ascii_lowercase + string.digits + " ", k=RANDOM_LENGTH))]


@types.coroutine
def stepped(work: Coroutine[Any, Any, Result], steps: list[float]) -> Generator[Any, Any, Result]:
    """Run a coroutine and note how long each of its steps, from one wait to the next, takes."""
    resume, value = work.send, None
    while True:
        started = time.perf_counter()
        try:
            waited = resume(value)
        except StopIteration as done:
            found: Result = done.value
            return found
        finally:
            steps.append(time.perf_counter() - started)
        try:
            value, resume = (yield waited), work.send
        except BaseException as thrown:
            value, resume = thrown, work.throw


def judge_reward(found: Timing) -> Finding:
    check = "reward"
    if found.by_agent:
        return ok(check, "not measured: episodes are played by an agent through the endpoint")
    if found.failures and len(found.failures) == len(found.seconds):
        return error(check, f"every episode raised, e.g. {found.failures[0]}", "mend the task or its reward function")
    said = (
        f"environment and reward take {quantile(found.seconds, 0.5) * 1000:.1f} ms an episode "
        f"(p99 {quantile(found.seconds, 0.99) * 1000:.1f} ms), at most {found.blocked_s * 1000:.1f} ms at a stretch"
    )
    if found.failures:
        return warning(
            check, f"{said}; {len(found.failures)} of {len(found.seconds)} episodes raised, e.g. {found.failures[0]}",
            "such trajectories are stored as failed and not trained; see buffer.max_failures",
        )  # fmt: skip
    if found.blocked_s > BLOCKED_S:
        return warning(
            check, said,
            "meanwhile no token is sampled: make the slow part `async def`, or call it by `asyncio.to_thread`",
        )  # fmt: skip
    return ok(check, said)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, int(share * len(ordered) + 0.999999) - 1))]
