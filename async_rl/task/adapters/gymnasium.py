"""The task `gymnasium`: an environment of the package gymnasium, told and played in text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from async_rl.config.imports import is_import, load_function
from async_rl.config.schema import setting
from async_rl.errors import UserError, nearest
from async_rl.task.adapters.dialogue import MARK, Dialogue, Style, alphabet_of, last_named
from async_rl.task.adapters.registry import require_package
from async_rl.task.generated import GeneratedTask, stable_hash
from async_rl.task.protocol import Problem, Segment, Session

ACTIONS: dict[str, tuple[str, ...]] = {
    "FrozenLake": ("left", "down", "right", "up"),
    "FrozenLake8x8": ("left", "down", "right", "up"),
    "CliffWalking": ("up", "right", "down", "left"),
    "CliffWalkingSlippery": ("up", "right", "down", "left"),
    "Taxi": ("south", "north", "east", "west", "pickup", "dropoff"),
    "Blackjack": ("stick", "hit"),
    "CartPole": ("left", "right"),
    "MountainCar": ("left", "none", "right"),
}
"""words for the actions of well-known environments, in the order of their numbers"""
COLOURED = re.compile(r"\x1b\[([\d;]+)m(.*?)\x1b\[0m", re.DOTALL)
LEFT_OVER = re.compile(r"\x1b\[[\d;]*m")
BACKGROUND = re.compile(r"\b(4|10)[0-7]\b")
INVALID = "That is none of the actions."
SEEN_EPISODES = 50
"""random episodes that are played to see which characters occur"""
Tell = Callable[[Any, Any], Any]
"""(observation, environment) -> text"""


@dataclass(frozen=True, slots=True, kw_only=True)
class GymnasiumSettings:
    """Example: `task: {name: gymnasium, args: {env: FrozenLake-v1, kwargs: {is_slippery: false}, max_turns: 20}}`."""

    env: str = setting(
        "FrozenLake-v1",
        "id of a registered environment with a finite number of actions, or module:function or file.py:function that "
        "takes kwargs and returns one",
    )
    kwargs: dict[str, Any] = setting({}, "given to the environment when it is made, e.g. {is_slippery: false}")
    tell: str = setting(
        "observation",
        "how an observation is told: observation (its numbers), render (the environment's own text picture), or "
        "module:function or file.py:function that takes (observation, environment) and returns text",
    )
    actions: list[str] = setting(
        [], "a word for each action, by number; empty: those known for the environment, else the numbers"
    )
    prompt: Style = setting(
        "chat", "chat: observations are user messages, for the model's chat template; text: lines of plain text"
    )
    system: str = setting(
        "auto", "what the policy is told first; auto: the actions, in chat, and nothing in plain text; empty: nothing"
    )
    invalid_reward: float = setting(
        0.0, "added for a turn that names no action; it costs a turn and the environment does not move"
    )
    max_tokens: int = setting(16, "longest turn", unit="tokens", min=1, max=1_000_000)
    max_turns: int = setting(
        20, "turns after which an episode ends; the environment's own limit holds too", unit="turns", min=1, max=100_000
    )
    num_train: int = setting(10_000, "training problems: seeds of the start", unit="problems", min=1, max=10**9)
    num_eval: int = setting(256, "held-out problems", unit="problems", min=1, max=10**6)
    seed: int = setting(0, "decides the problems", min=0, max=2**32 - 1)


class Gymnasium(GeneratedTask):
    """An episode of the environment: each turn names an action, the last such word in it counts; the reward is the sum
    of the environment's rewards, and that of each step is the reward of its turn.

    A problem is a seed of `reset`: it decides the start. What is random later follows from the episode's own seed, so
    the samples of a group start alike and then differ. Held-out seeds are never trained on; an environment that always
    starts alike is the same in both splits, and its held-out reward measures the policy without its exploration.
    Notes: `steps`, `invalid_actions`.
    """

    name = "gymnasium"
    Settings = GymnasiumSettings

    def __init__(self, settings: GymnasiumSettings) -> None:
        require_package(self.name)
        self.settings: GymnasiumSettings = settings
        self._tell = _teller(settings.tell)
        self.actions = self._action_words()
        told = f"Each turn, name one action: {', '.join(self.actions)}." if settings.prompt == "chat" else ""
        self.dialogue = Dialogue(style=settings.prompt, system=told if settings.system == "auto" else settings.system)
        super().__init__(self._draw, num_train=settings.num_train, num_eval=settings.num_eval, seed=settings.seed)

    def make(self) -> Any:
        """A new environment."""
        import gymnasium

        name, kwargs = self.settings.env, self.settings.kwargs
        where = f"task.args.env '{name}'"
        try:
            if is_import(name):
                arguments = ", ".join(kwargs)
                return load_function(name, where=where, arguments=f"({arguments})" if kwargs else "")(**kwargs)
            drawn: dict[str, Any] = {"render_mode": "ansi"} if self.settings.tell == "render" else {}
            return gymnasium.make(name, disable_env_checker=True, **drawn, **kwargs)
        except UserError:
            raise
        except gymnasium.error.UnregisteredEnv:
            raise UserError(f"{where} is not registered; {nearest(name, gymnasium.registry)}") from None
        except Exception as error:  # of the environment's own code
            raise UserError(f"{where} with task.args.kwargs {kwargs}: {type(error).__name__}: {error}") from error

    def _action_words(self) -> tuple[str, ...]:
        env = self.make()
        number = getattr(env.action_space, "n", None)
        start = int(getattr(env.action_space, "start", 0))
        name = env.spec.name if env.spec is not None else ""
        env.close()
        if number is None or start:
            raise UserError(
                f"task.args.env '{self.settings.env}': its actions are {env.action_space}, not a number of choices "
                "that counts from 0; wrap it in a function of your own, task.args.env=file.py:function"
            )
        words = tuple(self.settings.actions or ACTIONS.get(name, ()))
        words = words if words or self.settings.actions else tuple(str(i) for i in range(number))
        if len(words) != number or len({word.lower() for word in words}) != number or not all(map(str.strip, words)):
            raise UserError(
                f"task.args.actions names {', '.join(words)}; environment '{self.settings.env}' has {number} actions, "
                "give each a word of its own"
            )
        return words

    def _draw(self, random: Random) -> tuple[str, Any, Mapping[str, Any]]:
        seed = random.randrange(2**31)
        env = self.make()
        try:
            return str(seed), self.dialogue.prompt(self._start(env, seed)), {"seed": seed}
        finally:
            env.close()

    def _start(self, env: Any, seed: int) -> str:
        return self.told(env.reset(seed=seed)[0], env)

    def told(self, observation: Any, env: Any) -> str:
        """The observation as text. Raises ValueError for an empty one."""
        text = str(self._tell(observation, env)).strip("\n")
        if not text:
            raise ValueError(f"task.args.tell '{self.settings.tell}' returned no text")
        return text

    async def rollout(self, problem: Problem, session: Session) -> float:
        env = self.make()
        try:
            return await self._play(env, problem, session)
        finally:
            env.close()

    async def _play(self, env: Any, problem: Problem, session: Session) -> float:
        observed = self._start(env, problem.data["seed"])
        env.unwrapped.np_random = _generator(session.seed)
        total, steps, invalid = 0.0, 0, 0
        ended = False
        for turn in range(self.settings.max_turns):
            said = await session.generate(
                max_tokens=self.settings.max_tokens, stop=self.dialogue.stop, state_key=stable_hash(observed)
            )
            if session.truncated:
                break  # the context is full: no further turn can be taken
            action = last_named(said, self.actions)
            if action is None:
                invalid += 1
                reward, told = self.settings.invalid_reward, self._refused(observed)
            else:
                steps += 1
                observation, gained, terminated, cut, _ = env.step(action)
                observed = told = self.told(observation, env)
                reward, ended = float(gained), terminated or cut
                if cut and not terminated:
                    session.end_at_turn_limit()
            total += reward
            if reward:
                session.reward_turn(reward)
            if ended:
                break
            if turn + 1 < self.settings.max_turns:
                self.dialogue.answer(session, said, told)
        else:
            session.end_at_turn_limit()
        session.note("steps", float(steps))
        session.note("invalid_actions", float(invalid))
        return total

    def _refused(self, observed: str) -> str:
        return observed if self.settings.prompt == "text" else f"{INVALID}\n{observed}"

    # ------------------------------------------------------------------ a model that is to learn it from nothing

    @property
    def demonstrates(self) -> bool:
        return self.settings.prompt == "text"

    @property
    def alphabet(self) -> str:
        """What occurs in episodes of random actions, and printable ASCII."""
        problems = self.problems("train")
        return alphabet_of(self.demonstration(problems[i % len(problems)], Random(i)) for i in range(SEEN_EPISODES))

    def demonstration(self, problem: Problem, random: Random) -> list[Segment]:
        """An episode of random actions: it shows how to play, and nothing of how to play well."""
        if not isinstance(problem.prompt, str):
            raise UserError("a model is warmed up on plain text: --arg prompt=text")
        segments = [Segment(text=problem.prompt, policy=False)]
        env = self.make()
        self._start(env, problem.data["seed"])
        env.unwrapped.np_random = _generator(random.getrandbits(63))
        for turn in range(self.settings.max_turns):
            action = random.randrange(len(self.actions))
            segments.append(Segment(text=self.actions[action] + "\n", policy=True))
            observation, _, terminated, cut, _ = env.step(action)
            if terminated or cut or turn + 1 == self.settings.max_turns:
                break
            segments.append(Segment(text=self.told(observation, env) + MARK, policy=False))
        env.close()
        return segments


def _generator(seed: int) -> Any:
    import numpy as np

    return np.random.default_rng(seed)


def _teller(name: str) -> Tell:
    if name == "observation":
        return lambda observation, _: plain(observation)
    if name == "render":
        return lambda _, env: pictured(env.render())
    if not is_import(name):
        raise UserError(f"task.args.tell is '{name}'; it is observation, render, or module:function (file.py:function)")
    return load_function(name, where=f"task.args.tell '{name}'", arguments="(observation, environment)")


def plain(observation: Any) -> str:
    """An observation in numbers and words: `3`, `0.12, -1.5`, `position: 3`, a line each."""
    if isinstance(observation, str):
        return observation
    if isinstance(observation, Mapping):
        return "\n".join(f"{key}: {plain(value)}" for key, value in observation.items())
    if isinstance(observation, Sequence) or getattr(observation, "ndim", 0) > 0:
        return ", ".join(plain(part) for part in observation)
    if isinstance(observation, bool) or observation == int(observation):
        return str(int(observation))
    return f"{float(observation):.3g}"


def pictured(drawn: Any) -> str:
    """A text picture with brackets for colours: [ ] around what has a coloured background, { } around what is bold,
    ( ) around what has another colour."""
    if not isinstance(drawn, str):
        raise ValueError("the environment draws no text (render_mode ansi); use task.args.tell=observation or your own")
    return LEFT_OVER.sub("", COLOURED.sub(_bracketed, drawn))


def _bracketed(found: re.Match[str]) -> str:
    colour, text = found.groups()
    before, after = "[]" if BACKGROUND.search(colour) else "{}" if "1" in colour.split(";") else "()"
    return before + text + after
