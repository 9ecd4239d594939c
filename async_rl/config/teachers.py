"""Settings of a run's teachers: models whose log-probs of the policy's own tokens a recipe distils."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from async_rl.config.schema import setting, structured
from async_rl.errors import UserError

NOTE = "teacher/"
"""what a teacher's log-probs are noted under on the tokens of a turn, with its name behind it"""
ERROR = "teacher_error/"
"""what is noted of an episode for which a teacher did not answer, with its name behind it"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSettings:
    """One teacher: a model folder, which the trainer runs, or a server, which the generators ask.

    Example: `teachers: {math: {path: models/big}, code: {address: "http://host:8000/v1", only: source=code}}`.
    """

    path: str = setting("", "folder of a model with the tokenizer of model.path; the trainer runs it on each batch")
    address: str = setting(
        "",
        "base URL of an OpenAI-compatible server whose completions give log-probs of the prompt (echo and logprobs, as "
        "vLLM's do), e.g. http://host:8000/v1; generators ask it for every finished training episode",
    )
    model: str = setting("", "address: the model's name there; empty: the first that the server lists")
    key_variable: str = setting("", "address: environment variable that holds the server's API key; empty: none")
    weight: float = setting(1.0, "share of this teacher where several speak of a token", above=0)
    only: str = setting(
        "", "NAME=VALUE: speaks only of episodes that the task noted so (session.note); empty: of all of them"
    )
    timeout_s: float = setting(60.0, "address: longest wait for one answer", unit="seconds", above=0, max=100_000)
    attempts: int = setting(3, "address: times that an answer is asked for", unit="attempts", min=1, max=100)
    at_once: int = setting(8, "address: episodes of a generator asked for at once", unit="episodes", min=1, max=10_000)
    dtype: Literal["float32", "bfloat16"] = setting("float32", "path: arithmetic of its forward")

    def speaks_of(self, info: Mapping[str, float | str]) -> bool:
        """Whether it speaks of an episode with these notes."""
        if not self.only:
            return True
        name, _, value = self.only.partition("=")
        return name in info and _text(info[name]) == value


def teachers_of(given: Mapping[str, Any]) -> dict[str, TeacherSettings]:
    """Name -> settings, of `teachers`. Raises UserError."""
    found: dict[str, TeacherSettings] = {}
    for name, values in given.items():
        where = f"teachers.{name}"
        if not isinstance(values, Mapping):
            raise UserError(f"{where} is {values!r:.80}; it must be a group of settings, e.g. {{path: models/big}}")
        teacher = found[name] = structured(TeacherSettings, values, where=where)
        if bool(teacher.path) == bool(teacher.address):
            raise UserError(f"{where} needs either a path (a model folder) or an address (a server), not both or none")
        if teacher.only and not all(teacher.only.partition("=")[::2]):
            raise UserError(f"{where}.only is '{teacher.only}'; write it as NAME=VALUE, e.g. source=math")
        usual = TeacherSettings()
        idle = ("model", "key_variable", "timeout_s", "attempts", "at_once") if teacher.path else ("dtype",)
        for setting_name in idle:
            if getattr(teacher, setting_name) != getattr(usual, setting_name):
                kind = "path" if teacher.path else "address"
                raise UserError(f"{where}.{setting_name} does nothing with {where}.{kind}; leave it out")
    return found


def _text(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"
