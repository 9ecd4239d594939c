"""What can be found wrong with a run's teachers before it begins."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from async_rl.config import Settings
from async_rl.config.teachers import TeacherSettings, teachers_of
from async_rl.errors import UserError
from async_rl.generator.teachers import TeacherServer, TeacherSilent
from async_rl.model.folder import check_folder
from async_rl.model.tokenizer import Tokenizer
from async_rl.model.vocabulary import check_vocabulary
from async_rl.objective.recipe import Recipe, requirements

FIRST_ANSWER_S = 20.0
"""longest wait for a server's first answer"""
PROBED = 16
"""tokens that a server is asked about"""


def check_teachers(settings: Settings, recipe: Recipe, tokenizer: Tokenizer, noted: Sequence[str] | None) -> list[str]:
    """Refuse teachers that the recipe does not use, that have another tokenizer, or that do not answer; notes for the
    user. `noted`: names that the task notes; None: not told. Raises UserError."""
    teachers = teachers_of(settings.teachers)
    if requirements(recipe).teacher != bool(teachers):
        if teachers:
            raise UserError(
                f"teachers.{next(iter(teachers))} does nothing with recipe={recipe.name}, which learns from no "
                "teacher; set recipe.teaching.coefficient, take recipe=on_policy_distillation, or leave it out"
            )
        raise UserError(
            f"recipe {recipe.name}: teaching.coefficient needs a teacher, and the run has none; name one, e.g. "
            "teachers.big.path=models/big"
        )
    notes = []
    for name, teacher in teachers.items():
        if teacher.only and noted is not None and teacher.only.partition("=")[0] not in noted:
            raise UserError(
                f"teachers.{name}.only is '{teacher.only}', and the task notes nothing of that name (session.note)"
            )
        if teacher.path:
            check_folder(Path(teacher.path))
            check_vocabulary(f"teachers.{name}.path", Path(teacher.path), tokenizer)
        else:
            notes.append(_check_server(name, teacher, settings, tokenizer))
    return notes


def _check_server(name: str, teacher: TeacherSettings, settings: Settings, tokenizer: Tokenizer) -> str:
    """A note on the server that answered. Raises UserError."""
    where = f"teachers.{name}.address"
    if settings.generator.temperature != 1:
        raise UserError(
            f"{where}: a server gives log-probs at temperature 1, and generator.temperature is "
            f"{settings.generator.temperature:g}; set it to 1, or let the trainer run the teacher (its path)"
        )
    if teacher.key_variable and teacher.key_variable not in os.environ:
        raise UserError(f"teachers.{name}.key_variable is {teacher.key_variable}, which is not set in the environment")
    server = TeacherServer(name, replace(teacher, timeout_s=min(FIRST_ANSWER_S, teacher.timeout_s)))
    probe = _probe(tokenizer.vocabulary)
    try:
        texts = server.token_texts(probe)
    except TeacherSilent as error:
        raise UserError(f"{where} is {teacher.address}, but no log-probs come from there: {error}") from None
    for token, text in zip(probe, texts, strict=True):
        if text not in (written := (tokenizer.token_text(token), tokenizer.decode([token], special=True))):
            raise UserError(
                f"{where}: token {token} is {text!r} there and {written[0]!r} here. A teacher must have the model's "
                "tokenizer"
            )
    return f"teacher '{name}': {server.model} at {teacher.address}"


def _probe(vocabulary: Mapping[str, int]) -> list[int]:
    """Tokens of plain letters and digits, spread over the vocabulary."""
    plain = sorted(token for text, token in vocabulary.items() if text.isascii() and text.isalnum())
    step = max(1, len(plain) // PROBED)
    return plain[::step][:PROBED] or sorted(vocabulary.values())[:PROBED]
