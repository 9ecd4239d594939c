"""What a task is: its problems, how one episode goes, how it is rewarded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol

from async_rl.trajectory import Ended, Split


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One problem. `prompt` is raw text, or chat messages (`{"role": ..., "content": ...}`, and what else the template
    knows: `tool_calls`, `name`, ...) for the tokenizer's chat template."""

    index: int
    """position in `Task.problems(split)`"""
    prompt: str | Sequence[Mapping[str, Any]]
    data: Mapping[str, Any] = field(default_factory=dict)
    """what the rollout and the reward need: the answer, the secret, ..."""
    tools: Sequence[Mapping[str, Any]] = ()
    """descriptions of tools for the chat template"""
    template_args: Mapping[str, Any] = field(default_factory=dict)
    """further variables of the chat template, e.g. `{"enable_thinking": False}`"""
    adapt: Callable[[Problem, str], Problem] | None = None
    """(this problem, text of the model's chat template; empty: it has none) -> the problem as such a model is given it;
    for tasks whose prompts depend on the model"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What `Session.score` found."""

    log_probs: Sequence[float]
    """of each token of the text, at temperature 1, nats"""
    version: int
    """of the weights that computed them"""

    @property
    def total(self) -> float:
        """Log-prob of the whole text, nats."""
        return math.fsum(self.log_probs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Utterance:
    """A turn of the policy."""

    text: str
    """as `Session.generate` returned it"""
    tokens: Sequence[int]
    """as they were sampled, the end token included"""
    agent: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """How an agent reaches its episode. Example: `openai.AsyncOpenAI(base_url=c.base_url, api_key=c.api_key)`."""

    base_url: str
    """ends in /v1; on the loopback"""
    api_key: str
    """of this episode alone"""
    model: str
    """name to give as `model`"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A stretch of a demonstration; `policy` says whether the model should learn to produce it."""

    text: str
    policy: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A finished episode as a reward sees it."""

    problem: Problem
    said: Sequence[Utterance] = ()
    """the turns of the policy, in order"""
    transcript: str = ""
    """everything behind the prompt: turns, and what the environment said between them"""
    ended: Ended = "finished"
    """finished; length: cut by a token limit; turn_limit: its turns were used up"""
    tool_calls: Sequence[str] = ()
    """what the policy called, where the task has tools"""
    number: int = 0
    """of the sample within its group"""
    reward: float = 0.0
    """that `Task.rollout` gave, weighted (group rewards only)"""
    parts: Mapping[str, float] = field(default_factory=dict)
    """of that reward (group rewards only)"""
    notes: Mapping[str, float | str] = field(default_factory=dict)
    """what `Session.note` was given (group rewards only)"""
    kept: Any = None
    """what `Session.keep` was given (group rewards only)"""

    @property
    def completion(self) -> str:
        """The last turn."""
        return self.said[-1].text if self.said else ""

    @property
    def turns(self) -> tuple[str, ...]:
        """The texts of all turns."""
        return tuple(turn.text for turn in self.said)

    @property
    def answer(self) -> Any:
        """The problem's answer; empty where it has none."""
        return self.problem.data.get("answer", "")

    @property
    def prompt(self) -> str | Sequence[Mapping[str, Any]]:
        """Text, or chat messages."""
        return self.problem.prompt

    @property
    def row(self) -> Mapping[str, Any]:
        """The other fields of the problem's row, where the task reads a data set."""
        found = self.problem.data.get("row")
        return found if isinstance(found, Mapping) else {}

    @property
    def token_ids(self) -> list[int]:
        """Tokens of the last turn."""
        return list(self.said[-1].tokens) if self.said else []

    @property
    def num_tokens(self) -> int:
        """Tokens of the last turn."""
        return len(self.said[-1].tokens) if self.said else 0

    @property
    def total_tokens(self) -> int:
        """Tokens of all turns."""
        return sum(len(turn.tokens) for turn in self.said)


class Measure(Protocol):
    """How long prompts are for the model of a run."""

    def text(self, problem: Problem) -> str:
        """The prompt as the model gets it."""
        ...

    def tokens(self, problems: Sequence[Problem]) -> Sequence[int]:
        """Tokens of each prompt."""
        ...


class Session(Protocol):
    """One running episode as a task sees it. Tokens are only ever appended; nothing is re-tokenised."""

    @property
    def turn(self) -> int:
        """Turns generated so far."""
        ...

    @property
    def truncated(self) -> bool:
        """True when the context is full: the last turn was cut by it and no further one is possible."""
        ...

    @property
    def stopped(self) -> bool:
        """True when the last turn ended at a stop string or the end of text, not at a token limit."""
        ...

    @property
    def template(self) -> str:
        """Text of the model's chat templates, joined; empty where it has none."""
        ...

    @property
    def said(self) -> Sequence[Utterance]:
        """What the policy has said so far, turn by turn."""
        ...

    @property
    def split(self) -> Split:
        """Whether the episode trains or evaluates."""
        ...

    @property
    def seed(self) -> int:
        """Seed of this episode's own randomness, 63 bits: another one for every sample of a problem, the same when the
        episode is played again."""
        ...

    async def generate(
        self,
        *,
        max_tokens: int,
        stop: Sequence[str] = (),
        state_key: int = -1,
        temperature: float | None = None,
        stop_tokens: Sequence[int] = (),
        agent: str = "",
    ) -> str:
        """Let the policy speak one turn and return its text: special tokens included, up to the stop string that ended
        it and with it, without the end token. (The token that completes a stop string may go on behind it: the history
        has it as it was sampled, the text does not.)

        It ends at a stop string, at a token that the model folder names as an end, at one of `stop_tokens`, or after
        `max_tokens` tokens.

        Args:
            state_key: non-negative hash of the environment state, for recipes that compare equal states.
            temperature: of this turn; None: the episode's. It is recorded, and the trainer computes log-probs of the
                turn at it. At least 0.01; 0 (greedy) where the episode is held out.
            agent: who speaks, where an episode has several agents.
        """
        ...

    def append(self, text: str) -> None:
        """Append environment text. These tokens carry no loss."""
        ...

    def append_messages(self, messages: Sequence[Mapping[str, Any]], *, as_sampled: bool = False) -> None:
        """Append chat messages (user, tool, ...) as the chat template writes them behind what is there, and the header
        of the next assistant turn. These tokens carry no loss.

        The sampled turn stays as it was sampled, whatever ended it: where it did not end with the end token, the
        template's end of a turn follows it. White space at its ends, which some templates strip, stays too.

        Args:
            as_sampled: the history may be another than the template would write now; it stays as it was sampled.

        Raises ValueError where the template would write the history before them differently (then only a new context,
        `start_context`, holds what the model is meant to see), and where the context began with text.
        """
        ...

    def start_context(self, prompt: str | Sequence[Mapping[str, Any]]) -> int:
        """Begin a new context of this episode with `prompt`, text or chat messages: what follows does not see what was
        before. For agents that edit or summarise their history, and for several agents in one episode. Returns its
        number, for `resume_context`."""
        ...

    def resume_context(self, number: int) -> None:
        """Go on in an earlier context, behind what is there; 0: the one that the episode began with. Raises ValueError
        for a number that `start_context` did not return."""
        ...

    async def score(self, text: str) -> Score:
        """Log-probs of `text` behind the current context, under the weights of a stated version; the episode's history
        stays as it is."""
        ...

    def openai(self, *, max_tokens: int | None = None) -> Connection:
        """Base URL and key of an OpenAI-compatible endpoint through which any agent can play this episode. What it
        samples is recorded token by token, as by `generate`. The key is valid until the episode ends.

        Args:
            max_tokens: of a turn, whatever the agent asks for; None: as many as it asks for and the context holds.
        """
        ...

    def slot(self, name: str) -> AbstractAsyncContextManager[None]:
        """One of the places `name` that the episodes of a generator process share, e.g. one of eight sandboxes:
        `async with session.slot("sandbox"): ...`. How many there are says `Task.slots`, or the setting
        `generator.task_slots`. Waiting for one does not count towards `generator.task_timeout_s`.

        Raises ValueError for a name that neither knows."""
        ...

    def reward_turn(self, value: float, *, agent: str | None = None) -> None:
        """Reward of the turn generated last, or of the last one of this agent; recipes with turn-level credit use it.
        Where several agents speak it is credited to that agent's turns alone (docs/algorithms.md#several-agents)."""
        ...

    def end_at_turn_limit(self) -> None:
        """Record that the episode is over because its turns are used up."""
        ...

    def end_at_token_limit(self) -> None:
        """Record that the episode is over because an answer was cut by a token limit. (Where the context
        is full this is recorded by itself.)"""
        ...

    def note(self, key: str, value: float | str) -> None:
        """Attach a number or label to the trajectory (shown in reports; recipes can read numbers by name)."""
        ...

    def note_turn(self, key: str, value: float, *, agent: str | None = None) -> None:
        """Attach a number to the turn generated last, or to the last one of this agent, for recipes that read it by
        name (`select.drop_flag`, `Columns.noted`)."""
        ...

    def note_tokens(self, key: str, values: Sequence[float], *, agent: str | None = None) -> None:
        """Attach a number to each token of that turn: log-probs of a teacher, scores, ... Kept as float32.

        Raises ValueError for another number of values than the turn has tokens (`Session.said[-1].tokens`)."""
        ...

    def keep(self, value: Any) -> None:
        """Keep anything of this episode for `Task.reward_group`, which sees it as `Sample.kept`: the last state of the
        environment, say. It stays in this process and is not recorded."""
        ...


Reward = float | Mapping[str, float | None]
"""a number, or named parts: each becomes a column, a metric and a curve; their weights are `task.reward_weights`. A
part that does not apply to an episode is None, or left out: it adds nothing and is in no mean. An empty mapping: no
part applies, the reward is 0"""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitPrompts:
    """What `Task.fit` found."""

    args: Mapping[str, Any]
    """to be laid over `task.args`"""
    notes: Sequence[str]
    """for the user"""


@dataclass(frozen=True, slots=True)
class NoSettings:
    """A task that has nothing to set."""


class Task:
    """Where work comes from. A task of one's own derives from this class and needs `problems` and `rollout` only.

    A task is deterministic: the same settings give the same problems in every process and after every restart.

    Example:
        class Echo(Task):
            @dataclass(frozen=True, kw_only=True)
            class Settings:
                words: int = 100

            def problems(self, split):
                return [Problem(index=i, prompt=f"say {i}:") for i in range(self.settings.words)]

            async def rollout(self, problem, session):
                text = await session.generate(max_tokens=8, stop=(".",))
                return float(text.strip(" .") == str(problem.index))
    """

    name: str = ""
    """what messages and records call the task; make_task fills in an empty one"""
    slots: Mapping[str, int] = {}
    """places that all episodes of a generator process share, by name (`Session.slot`): how many there are"""
    single_turn: bool = False
    """True when every episode is one turn. Recipes with turn-level parts, which would do nothing then, are refused."""
    repeatable: bool = False
    """True when an episode that is played again from the turns of the policy comes to the same answers and the same
    reward, in another process and later, too: then a sample of what generators report is checked so (verify.rewards).
    It is believed of the class that says it, not of classes that derive from that."""
    credits_turns: bool = False
    """True when what an episode earns is given to turns alone (`Session.reward_turn`), as in a game that the policy
    plays against itself. Recipes that see the reward of the episode alone, and would learn nothing, are refused."""
    example_call: str = ""
    """a call that the task's tool answers, for rehearsals with a model that would never write one"""

    noted: Sequence[str] | None = None
    """names that its episodes give to `Session.note`, `note_turn` and `note_tokens`; a recipe that reads another one is
    refused when a run begins. None: not told. It is believed of the class that says it, not of those that derive from
    that, which may note more"""

    looked_at: int = 500
    """problems of each split that are looked at before a run begins (lengths, control tokens, the digest by which hosts
    compare their tasks); fewer, at least 2, where making one takes long"""

    notes: Sequence[str] = ()
    """what a user should know of its data, e.g. rows that are left out; shown when a run begins"""

    Settings: type[Any] = NoSettings
    """a dataclass whose fields have types and defaults: what `task.args` may hold in a config"""

    def __init__(self, settings: Any = None) -> None:
        """`settings`: an instance of the class's `Settings`, checked."""
        self.settings = settings

    @classmethod
    def complete(cls, args: Mapping[str, Any]) -> Mapping[str, Any]:
        """`args` as given in a config, with those that others of them stand for."""
        return args

    def problems(self, split: Split) -> Sequence[Problem]:
        """The problems of a split; `len()` and indexing must be cheap. Splits do not overlap."""
        raise NotImplementedError

    def fit(self, measure: Measure, context: int, *, answer: int | None = None) -> FitPrompts | None:
        """Optional: what becomes of prompts behind which a context of so many tokens has no room for an answer. Asked
        once, when a run begins; what is found goes into `task.args` for all its processes. None: nothing is too long.

        Args:
            answer: tokens of the longest answer; None: as the task's settings say.
        """
        return None

    async def rollout(self, problem: Problem, session: Session) -> Reward:
        """Run one episode (the prompt is already in the session) and return its reward: a number, or named parts, of
        which the reward is the sum, weighted by `task.reward_weights`.

        May raise: the trajectory then ends with the reason and the run goes on."""
        raise NotImplementedError

    async def setup(self) -> None:
        """Optional: prepare a process that will play episodes (start a server, open a pool), before its first one.
        May raise: the process then ends with the reason. It may take `generator.episode_timeout_s`."""

    async def teardown(self) -> None:
        """Optional: undo `setup` before the process ends. It has a few seconds; a process that is killed does not call
        it."""

    async def setup_episode(self, problem: Problem, session: Session) -> None:
        """Optional: prepare an episode, before `rollout`; what it raises ends the episode."""

    async def teardown_episode(self, problem: Problem, session: Session) -> None:
        """Optional: undo `setup_episode`. Always called behind it, however the episode ended, also when it took too
        long or is not wanted any more; it has `generator.task_timeout_s`. What it raises is noted (`teardown_error`)
        and changes nothing of the reward."""

    async def reward_group(self, problem: Problem, samples: Sequence[Sample]) -> Sequence[Reward]:
        """Optional: what the samples of a group get for what they are beside each other (a pairwise judge, a penalty
        relative to the shortest). One reward for each of `samples`, in their order; it is added to that of `rollout`.
        A number is recorded as the part `group`, and a number of `rollout` as the part `rollout`.

        It is called once all samples of a problem are played. Episodes that failed are not among them; without any
        that did not fail it is not called. May raise: then all of them end with the reason."""
        raise NotImplementedError

    @property
    def has_group_reward(self) -> bool:
        """True when `reward_group` is to be called: when the class defines it."""
        return type(self).reward_group is not Task.reward_group

    @property
    def reward_parts(self) -> Sequence[str] | None:
        """Names of the parts of its rewards, where they are known before an episode is played: names in
        `task.reward_weights` are then checked at once. None: not known. Empty: the reward is a plain number."""
        return None

    def right_answer(self, problem: Problem) -> str | None:
        """Optional: a turn that is right, for shows and rehearsals; None: none is known. Without a definition:
        `problem.data["answer"]`."""
        answer = problem.data.get("answer")
        answer = answer[0] if isinstance(answer, list) and answer else answer
        return None if answer is None else str(answer)

    @classmethod
    def has_demonstrations(cls) -> bool:
        """True when the class defines `demonstration`, and `async-rl init-model` can warm a model up with it."""
        return cls.demonstration is not Task.demonstration

    @property
    def demonstrates(self) -> bool:
        """True when it can, with these settings."""
        return self.has_demonstrations()

    @property
    def alphabet(self) -> str:
        """Every character that can occur in an episode. Defined together with `demonstration`."""
        raise NotImplementedError

    def demonstration(self, problem: Problem, random: Random) -> list[Segment]:
        """One fair episode for `problem`, prompt first. Optional; an answer alone does not say how it is found."""
        raise NotImplementedError
