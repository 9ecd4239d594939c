"""The task `openenv`: episodes at a running environment server that speaks OpenEnv's protocol.

The protocol is a WebSocket at URL/ws with JSON messages: `reset` and `step` from here, answered by `observation` (its
fields, the reward, whether it is done) or `error`; URL/schema describes actions and observations. The package
openenv-core is the server's; nothing of it is needed here.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, Literal
from urllib.parse import urlsplit

from async_rl.config.imports import is_import, load_function
from async_rl.config.schema import setting
from async_rl.errors import UserError, nearest
from async_rl.task.adapters.dialogue import Dialogue, Style
from async_rl.task.adapters.registry import require_package
from async_rl.task.generated import GeneratedTask, stable_hash
from async_rl.task.protocol import Problem, Session

SLOT = "openenv"
SCHEMA_S = 10.0
"""longest time for the server's description of itself"""
MOST_BYTES = 64 << 20
"""of one message"""
UNSEEN = "The environment begins with its first observation."
"""prompt of a problem, until the server has told what it shows"""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenEnvSettings:
    """Example: `task: {name: openenv, args: {url: 'http://127.0.0.1:8000', sessions: 8, max_turns: 10}}`."""

    url: str = setting("http://127.0.0.1:8000", "where the environment server listens, http or https")
    action: str = setting(
        "auto",
        "the field of an action that holds the policy's text, or module:function or file.py:function that takes (text) "
        "and returns all fields; auto: the action's only text that has no default",
    )
    tell: str = setting(
        "auto",
        "the field of an observation that is shown, or module:function or file.py:function that takes its fields and "
        "returns text; auto: its only text, or all of its fields, a line each",
    )
    reset: dict[str, Any] = setting({}, "given to the environment's reset, beside the problem's seed")
    send_seed: bool = setting(True, "whether reset is given the problem's seed; an environment may ignore it")
    reward: Literal["sum", "last"] = setting("sum", "the episode's reward: the sum of its steps' rewards, or the last")
    prompt: Style = setting(
        "chat", "chat: observations are user messages, for the model's chat template; text: lines of plain text"
    )
    system: str = setting("", "what the policy is told first; empty: nothing")
    max_tokens: int = setting(256, "longest turn", unit="tokens", min=1, max=1_000_000)
    max_turns: int = setting(10, "steps after which an episode ends", unit="turns", min=1, max=100_000)
    sessions: int = setting(
        1,
        "episodes that a generator plays at once; the server must allow that many for all generators together "
        "(max_concurrent_envs)",
        unit="episodes",
        min=1,
        max=100_000,
    )
    timeout_s: float = setting(60.0, "longest wait for an answer of the server", unit="seconds", above=0, max=86_400)
    num_train: int = setting(10_000, "training problems: seeds of reset", unit="problems", min=1, max=10**9)
    num_eval: int = setting(256, "held-out problems", unit="problems", min=1, max=10**6)
    seed: int = setting(0, "decides the problems", min=0, max=2**32 - 1)


class OpenEnv(GeneratedTask):
    """Reset, then a step a turn, each with the policy's text as its action. Every episode has a session of its own at
    the server; the reward of each step is the reward of its turn.

    A problem is a seed of reset; held-out seeds are never trained on. What an episode begins with is what the server
    shows then. An error that the server reports ends the episode as failed. Notes: `steps`.
    """

    name = "openenv"
    Settings = OpenEnvSettings

    def __init__(self, settings: OpenEnvSettings) -> None:
        require_package(self.name)
        self.settings: OpenEnvSettings = settings
        if urlsplit(settings.url).scheme not in ("http", "https") or not urlsplit(settings.url).netloc:
            raise UserError(f"task.args.url is '{settings.url}'; write http://HOST:PORT")
        self.url = settings.url.rstrip("/")
        schema = _schema(self.url)
        self._act = _actor(settings.action, schema.get("action", {}))
        self._tell = _teller(settings.tell, schema.get("observation", {}))
        self.dialogue = Dialogue(style=settings.prompt, system=settings.system)
        self.slots = {SLOT: settings.sessions}
        super().__init__(self._draw, num_train=settings.num_train, num_eval=settings.num_eval, seed=settings.seed)

    def _draw(self, random: Random) -> tuple[str, Any, Mapping[str, Any]]:
        seed = random.randrange(2**31)
        return str(seed), self.dialogue.prompt(UNSEEN), {"seed": seed}

    async def rollout(self, problem: Problem, session: Session) -> float:
        from aiohttp import ClientSession

        async with (
            session.slot(SLOT),
            ClientSession() as http,
            http.ws_connect(f"{self.url}/ws", max_msg_size=MOST_BYTES) as socket,
        ):
            try:
                return await self._play(socket, problem, session)
            finally:
                await socket.send_json({"type": "close"})

    async def _play(self, socket: Any, problem: Problem, session: Session) -> float:
        seed = {"seed": problem.data["seed"]} if self.settings.send_seed else {}
        found = await self._ask(socket, "reset", {**self.settings.reset, **seed})
        observed = self.told(found["observation"])
        session.start_context(self.dialogue.prompt(observed))
        rewards = [0.0]
        for turn in range(self.settings.max_turns):
            said = await session.generate(
                max_tokens=self.settings.max_tokens, stop=self.dialogue.stop, state_key=stable_hash(observed)
            )
            if session.truncated:
                break  # the context is full: no further turn can be taken
            found = await self._ask(socket, "step", self._act(said.strip()))
            observed = self.told(found["observation"])
            rewards.append(float(found.get("reward") or 0.0))
            if rewards[-1]:
                session.reward_turn(rewards[-1])
            if found.get("done"):
                break
            if turn + 1 < self.settings.max_turns:
                self.dialogue.answer(session, said, observed)
        else:
            session.end_at_turn_limit()
        session.note("steps", float(len(rewards) - 1))
        return sum(rewards) if self.settings.reward == "sum" else rewards[-1]

    async def _ask(self, socket: Any, what: str, data: Mapping[str, Any]) -> Mapping[str, Any]:
        """The server's answer. Raises RuntimeError with what it says is wrong."""
        await socket.send_json({"type": what, "data": data})
        try:
            answer = await socket.receive_json(timeout=self.settings.timeout_s)
        except TimeoutError:
            raise RuntimeError(f"{self.url} did not answer within {self.settings.timeout_s:g} s") from None
        except TypeError:  # no text came: the connection was closed
            raise RuntimeError(f"{self.url} ended the session") from None
        found: Mapping[str, Any] = answer.get("data", {})
        if answer.get("type") != "observation":
            raise RuntimeError(f"{self.url} says {found.get('code', answer.get('type'))}: {found.get('message', '')}")
        return found

    def told(self, observation: Mapping[str, Any]) -> str:
        """An observation as text. Raises ValueError for an empty one."""
        text = str(self._tell(observation)).strip("\n")
        if not text:
            raise ValueError(
                f"task.args.tell '{self.settings.tell}' made no text of the observation {dict(observation)}"
            )
        return text


def _schema(url: str) -> Mapping[str, Any]:
    """What the server says of its actions and observations. Raises UserError."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{url}/schema", timeout=SCHEMA_S) as answer:
            found = json.load(answer)
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"task.args.url: no environment server answers at {url} ({reason}); start it, or name the address it has"
        ) from None
    if not isinstance(found, dict):
        raise UserError(f"task.args.url: what answers at {url}/schema is no environment server of OpenEnv")
    return found


def _fields(schema: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """The fields that an environment has of its own."""
    known = ("metadata", "done", "reward")
    return {name: field for name, field in schema.get("properties", {}).items() if name not in known}


def _actor(action: str, schema: Mapping[str, Any]) -> Callable[[str], Mapping[str, Any]]:
    if is_import(action):
        own: Callable[[str], Mapping[str, Any]] = load_function(
            action, where=f"task.args.action '{action}'", arguments="(text)"
        )
        return own
    fields = _fields(schema)
    if action == "auto":
        needed = [name for name in schema.get("required", ()) if name in fields]
        texts = [name for name in needed if fields[name].get("type") == "string"]
        if len(needed) != 1 or texts != needed:
            raise UserError(
                f"task.args.action: an action of this environment has the fields {', '.join(fields) or '(none)'}; name "
                "the one that holds the policy's text, or a function that makes all of them, file.py:function"
            )
        action = needed[0]
    if action not in fields:
        raise UserError(f"task.args.action '{action}' is no field of an action; {nearest(action, fields)}")
    return lambda text: {action: text}


def _teller(tell: str, schema: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Any]:
    if is_import(tell):
        own: Callable[[Mapping[str, Any]], Any] = load_function(
            tell, where=f"task.args.tell '{tell}'", arguments="(observation)"
        )
        return own
    fields = _fields(schema)
    if tell == "auto":
        texts = [name for name, field in fields.items() if field.get("type") == "string"]
        if len(texts) != 1:
            return lambda observation: "\n".join(f"{name}: {_plain(value)}" for name, value in observation.items())
        tell = texts[0]
    if tell not in fields:
        raise UserError(f"task.args.tell '{tell}' is no field of an observation; {nearest(tell, fields)}")
    return lambda observation: _plain(observation[tell])


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
