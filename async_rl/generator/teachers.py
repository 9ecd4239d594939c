"""Teachers that are servers: asked for the log-probs of a finished episode's tokens, which become notes on them.

An OpenAI-compatible server that echoes a prompt with its log-probs (`echo` and `logprobs` of /v1/completions, as vLLM
has them) is a scorer: the prompt is the numbers of the episode's tokens, one list a context, so nothing is written out
as text and read again. What a teacher said travels and is stored with the trajectory. One that does not answer costs
its time limit, is noted with the reason, and is told on the standard error; the episode is trained without it, or left
out where the recipe learns from teachers alone (metric teacher/missing).

The standard library's client is used, in threads: a request is rare, large and slow.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace

from async_rl.config.teachers import ERROR, NOTE, TeacherSettings
from async_rl.trajectory import Trajectory
from async_rl.trajectory.turn_notes import noted_tokens

PAUSE_S = 0.5
"""before an answer is asked for again; twice as long each time"""
LONGEST_SAID = 300
"""characters kept of what a server complains of"""
LARGEST_ANSWER = 1 << 28
"""bytes"""


class TeacherSilent(Exception):
    """A server did not answer, or not with what was asked for; the text says why."""


@dataclass(slots=True, eq=False)
class TeacherServer:
    """One server."""

    name: str
    settings: TeacherSettings
    model: str = ""
    """as the server calls it; empty: not asked yet"""

    def log_probs(self, contexts: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probs of the tokens of each context behind its first. Blocks. Raises TeacherSilent."""
        found = self._echoed(contexts, "token_logprobs")
        return [self._of_prompt(values, context) for values, context in zip(found, contexts, strict=True)]

    def token_texts(self, tokens: Sequence[int]) -> list[str]:
        """The tokens as the server writes them, asked for together with their log-probs. Raises TeacherSilent."""
        self.log_probs([tokens])
        (texts,) = self._echoed([tokens], "tokens")
        if not isinstance(texts, list) or len(texts) < len(tokens):
            raise TeacherSilent("its answer does not say which tokens it read")
        return [str(text) for text in texts[: len(tokens)]]

    def _echoed(self, contexts: Sequence[Sequence[int]], column: str) -> list[Any]:
        """A column of the log-probs of each prompt. Raises TeacherSilent."""
        if not self.model:
            self.model = self.settings.model or self.first_model()
        asked = {
            "model": self.model,
            "prompt": [list(context) for context in contexts],
            "max_tokens": 1,  # some servers refuse 0; what it adds stands behind the prompt
            "temperature": 0,
            "echo": True,
            "logprobs": 0,
        }
        answer = self._call("/completions", asked)
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            found = [choice["logprobs"][column] for choice in choices]
        except (KeyError, TypeError):
            raise TeacherSilent("its answer has no log-probs of the prompt; it must echo them") from None
        if len(found) != len(contexts):
            raise TeacherSilent(f"it answered {len(found)} of {len(contexts)} prompts")
        return found

    def first_model(self) -> str:
        """The name of the first model that the server lists. Raises TeacherSilent."""
        listed = self._call("/models", None).get("data")
        if not isinstance(listed, list) or not listed or "id" not in listed[0]:
            raise TeacherSilent("it lists no model")
        return str(listed[0]["id"])

    @staticmethod
    def _of_prompt(values: Any, context: Sequence[int]) -> list[float]:
        if not isinstance(values, list) or len(values) < len(context):
            count = len(values) if isinstance(values, list) else 0
            raise TeacherSilent(f"it answered {count} log-probs for {len(context)} tokens; it must echo the prompt")
        found = values[1 : len(context)]
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in found):
            raise TeacherSilent("a log-prob is no finite number")
        return [float(value) for value in found]

    def _call(self, path: str, values: Mapping[str, Any] | None) -> dict[str, Any]:
        chosen = self.settings
        headers = {"Content-Type": "application/json"}
        if chosen.key_variable:
            headers["Authorization"] = f"Bearer {os.environ.get(chosen.key_variable, '')}"
        body = None if values is None else json.dumps(values).encode()
        request = urllib.request.Request(chosen.address.rstrip("/") + path, data=body, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=chosen.timeout_s) as answer:
                found = json.loads(answer.read(LARGEST_ANSWER))
        except urllib.error.HTTPError as error:
            said = error.read(LONGEST_SAID).decode("utf-8", "replace")
            raise TeacherSilent(f"it answered {error.code}: {said}") from None
        except (OSError, ValueError) as error:  # no connection, a timeout, a wrong address, no JSON
            raise TeacherSilent(str(getattr(error, "reason", "")) or str(error) or type(error).__name__) from None
        if not isinstance(found, dict):
            raise TeacherSilent("its answer is no JSON object")
        return found


@dataclass(slots=True, eq=False)
class TeacherServers:
    """The servers of a run, as one generator asks them. Within one event loop."""

    servers: Sequence[TeacherServer]
    generator: str = ""
    failed: dict[str, int] = field(default_factory=dict)
    """episodes that each was silent about"""
    _places: dict[str, asyncio.Semaphore] = field(default_factory=dict)

    @classmethod
    def of(cls, teachers: Mapping[str, TeacherSettings], generator: str = "") -> TeacherServers:
        """Those of `teachers` that are servers."""
        return cls([TeacherServer(name, chosen) for name, chosen in teachers.items() if chosen.address], generator)

    async def noted(self, trajectory: Trajectory) -> Trajectory:
        """The trajectory with the log-probs of every server that speaks of it, or with the reason why one does not."""
        if trajectory.failed or trajectory.split != "train" or not trajectory.num_policy_tokens:
            return trajectory
        asked = [server for server in self.servers if server.settings.speaks_of(trajectory.info)]
        contexts = [trajectory.tokens[a:b].tolist() for a, b in trajectory.context_bounds()]
        answers = await asyncio.gather(*(self._ask(server, contexts) for server in asked))
        for server, answer in zip(asked, answers, strict=True):
            if isinstance(answer, str):
                self._tell(server, answer)
                trajectory = replace(trajectory, info={**trajectory.info, f"{ERROR}{server.name}": answer})
            else:
                trajectory = _with_log_probs(trajectory, server.name, answer)
        return trajectory

    async def _ask(self, server: TeacherServer, contexts: Sequence[Sequence[int]]) -> list[list[float]] | str:
        """Its answer, or why there is none."""
        chosen, reason = server.settings, ""
        place = self._places.setdefault(server.name, asyncio.Semaphore(chosen.at_once))
        async with place:
            for attempt in range(chosen.attempts):
                if attempt:
                    await asyncio.sleep(PAUSE_S * 2 ** (attempt - 1))
                try:
                    return await asyncio.to_thread(server.log_probs, contexts)
                except TeacherSilent as error:
                    reason = str(error)
        return reason[:LONGEST_SAID]

    def _tell(self, server: TeacherServer, reason: str) -> None:
        """Say on the standard error that it is silent: the first time, and ever more rarely."""
        count = self.failed[server.name] = self.failed.get(server.name, 0) + 1
        if count & (count - 1) == 0:
            print(
                f"{self.generator}: teacher '{server.name}' at {server.settings.address} gave no log-probs for {count} "
                f"episode(s): {reason}",
                file=sys.stderr,
                flush=True,
            )


def _with_log_probs(trajectory: Trajectory, name: str, of_contexts: Sequence[Sequence[float]]) -> Trajectory:
    """The trajectory with these log-probs as notes on its turns. of_contexts: of each token behind the first."""
    every: list[float] = []
    for values in of_contexts:
        every += [0.0, *values]  # a context's first token is never a policy's
    turns = tuple(
        noted_tokens(turn, NOTE + name, every[turn.start : turn.start + turn.length]) for turn in trajectory.turns
    )
    return replace(trajectory, turns=turns)
