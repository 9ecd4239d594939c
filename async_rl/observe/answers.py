"""Answers to the same held-out problems before a run and after it, as its evaluations recorded them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from async_rl.buffer.store_reader import StoreSurvey
from async_rl.config import Settings
from async_rl.errors import UserError
from async_rl.model.tokenizer import Tokenizer
from async_rl.run_folder import RunFolder
from async_rl.trajectory import Trajectory
from async_rl.trajectory.codec import WireError, unpack

SHOWN = 3
"""problems"""
ASKED = 4
"""times as many are looked at, since some may have failed"""
WIDTH = 80
"""columns of the lines in which they are shown"""
ROLE = re.compile(r"\s*(user|human|tool|system|developer|environment)\n", re.IGNORECASE)
"""the line in which a chat template names the speaker of a message other than the assistant's"""
TURN = re.compile(r"\s*(assistant|model|chatbot)\s*(\n|<|$)", re.IGNORECASE)
"""the beginning of an assistant's message"""


def answers_before_and_after(folder: RunFolder, settings: Settings, most: int = SHOWN) -> list[dict[str, Any]]:
    """The first `most` held-out problems that were asked in more than one evaluation, in the order of the evaluation.

    Each is `question` (the last message of its prompt), `before` and `after`: the first sample of the first and of the
    last evaluation, `text` (what the policy said, and what the environment answered between its turns) and `reward`.
    All texts are one line. A problem whose episode failed is left out. The list is empty where the tokenizer or the
    store cannot be read, since a finished run must not fail for it.
    """
    try:
        with StoreSurvey(folder.store) as store:
            groups = store.held_out_twice(ASKED * most)
            pairs = [(_first_sample(store, first), _first_sample(store, last)) for first, last in groups]
        tokenizer = Tokenizer.of(settings.model)
    except (UserError, OSError, ValueError):
        return []
    return [
        {
            "question": question_of(old, tokenizer),
            "before": answer_of(old, tokenizer),
            "after": answer_of(new, tokenizer),
        }
        for old, new in pairs
        if old is not None and new is not None
    ][:most]


def answer_lines(found: Sequence[Mapping[str, Any]], width: int = WIDTH) -> Iterator[str]:
    """A heading, then three lines a problem; nothing when there are none."""
    if found:
        yield f"{len(found)} held-out problem{'s' * (len(found) > 1)}, answered before and after (reward in front):"
    for one in found:
        yield "  " + shortened(one["question"], width - 2)
        for when in ("before", "after"):
            begin = f"    {when:<6} {one[when]['reward']:5.2f}  "
            yield begin + shortened(one[when]["text"], width - len(begin))


def shortened(text: str, width: int) -> str:
    """At most `width` characters: of a longer text its two ends."""
    if len(text) <= width:
        return text
    kept = width - len(" ... ")
    return f"{text[: kept - kept // 2]} ... {text[len(text) - kept // 2 :]}"


def _first_sample(store: StoreSurvey, group: int) -> Trajectory | None:
    """The first trajectory of a group. None: the store has it no more or it is damaged, or the episode failed."""
    for blob in store.load_groups([group])[:1]:
        try:
            found = unpack(blob)
        except WireError:  # damaged
            return None
        return found if found.turns and not found.failed else None
    return None


def question_of(trajectory: Trajectory, tokenizer: Tokenizer) -> str:
    """The last message in front of the first turn: without what a chat template writes around it."""
    prompt = tokenizer.decode(trajectory.tokens[: trajectory.turns[0].start].tolist(), special=True)
    messages = [part for part in tokenizer.control_pattern.split(prompt) if part.strip()]
    if len(messages) > 1 and TURN.match(messages[-1]):
        messages.pop()
    return _one_line(ROLE.sub("", messages[-1], count=1)) if messages else ""


def answer_of(trajectory: Trajectory, tokenizer: Tokenizer) -> dict[str, Any]:
    said = tokenizer.decode(trajectory.tokens[trajectory.turns[0].start :].tolist(), special=True)
    return {"text": _one_line(tokenizer.control_pattern.sub(" ", said)), "reward": round(float(trajectory.reward), 6)}


def _one_line(text: str) -> str:
    return " ".join(text.split())
