"""A few trajectories of a run with everything a page shows of them: text token by token, turns, versions,
log-probs and importance ratios."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from async_rl.buffer.survey import StoreSurvey, Surveyed
from async_rl.errors import UserError
from async_rl.model.tokenizer import Tokenizer
from async_rl.observe.importance import Ratios, checkpoints_of, ratios
from async_rl.observe.record import RunRecord
from async_rl.trajectory import Trajectory
from async_rl.trajectory.codec import WireError, unpack

STEPS_SHOWN = 14
MOST_OF_A_GROUP = 8
MOST_TOKENS = 40_000
"""of all trajectories shown: about 1.5 MB of page"""
HEAD, TAIL = 900, 300
"""tokens shown of a long trajectory"""
NUMBER_DIGITS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    row: Surveyed
    trajectory: Trajectory


def samples(record: RunRecord, store: StoreSurvey, *, with_ratios: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """Trajectories as plain values for the page, and sentences on what is shown and what is missing."""
    chosen = _choose(record, store)
    notes: list[str] = []
    if not chosen:
        return [], ["There are no trajectories with their tokens to show yet."]
    tokenizer = tokenizer_of(record)
    if tokenizer is None:
        notes.append("model.path and the checkpoints have no tokenizer that can be read: tokens are shown as numbers.")
    found: dict[int, Ratios] = {}
    if with_ratios:
        made, note = ratios(record, [c.trajectory for c in chosen], [c.row.step for c in chosen])
        found = dict(made)
        notes.append(note)
    shown, tokens = [], 0
    for place, one in enumerate(chosen):
        if tokens > MOST_TOKENS:
            notes.append(f"{len(chosen) - place} trajectories are left out to keep this page small.")
            break
        tokens += min(len(one.trajectory.tokens), HEAD + TAIL)
        shown.append(_plain(one, tokenizer, found.get(place)))
    return shown, notes


def _choose(record: RunRecord, store: StoreSurvey) -> list[Chosen]:
    """Whole groups: of steps spread over the run and those whose weights a checkpoint holds, of held-out
    problems, and what was refused or failed."""
    first, last = store.steps()
    first = max(first, store.first_step())  # of older ones the tokens are deleted
    steps = {int(s) for s in np.linspace(first, last, STEPS_SHOWN)} if last >= first else set()
    steps |= {version for version in checkpoints_of(record) if first <= version <= last}
    groups = [groups[step % len(groups)] for step in sorted(steps) if (groups := store.groups_in(step))]
    wanted = dict.fromkeys([*groups, *store.odd_groups(6), *store.held_out_groups(6)])
    return [one for group in wanted for one in _group(store, group)]


def _group(store: StoreSurvey, group: int) -> list[Chosen]:
    rows = {row.sample: row for row in store.of_group(group)}
    found = []
    for blob in store.load_groups([group]):
        try:
            trajectory = unpack(blob)
        except WireError:
            continue  # a damaged or newer one: the others are still worth seeing
        if trajectory.sample in rows:
            found.append(Chosen(row=rows[trajectory.sample], trajectory=trajectory))
    return found[:MOST_OF_A_GROUP]


def tokenizer_of(record: RunRecord) -> Tokenizer | None:
    """That of the newest checkpoint, else of the model the run began with; None when neither can be read."""
    folders = [str(path) for _, path in sorted(checkpoints_of(record).items(), reverse=True)]
    if record.settings is not None:
        folders.append(record.settings.model.path)
    for folder in folders:
        try:
            return Tokenizer(folder)
        except (UserError, OSError, ValueError):
            continue
    return None


def pieces(tokenizer: Tokenizer | None, tokens: Sequence[int]) -> list[str]:
    """The text that each token adds. A token that ends in the middle of a character adds nothing, the one that
    ends the character all of it."""
    if tokenizer is None:
        return [f"{token} " for token in tokens]
    found, begun, read = [], 0, 0
    before = ""
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[begun:end], special=True)
        if text.endswith("\ufffd") and end - read < 8 and end < len(tokens):
            found.append("")
            continue
        found.append(text[len(before) :])
        begun, read = read, end
        before = tokenizer.decode(tokens[begun:end], special=True)
    return found


def _plain(one: Chosen, tokenizer: Tokenizer | None, ratio: Ratios | None) -> dict[str, Any]:
    t, row = one.trajectory, one.row
    n = len(t.tokens)
    turn_of = np.full(n, -1, np.int64)
    for number, turn in enumerate(t.turns):
        turn_of[turn.start : turn.start + turn.length] = number
    version = np.full(n, -1, np.int64)
    for span in t.versions:
        version[span.start : span.end] = span.version
    version[turn_of < 0] = -1
    of_token = np.full(n, np.nan)
    if ratio is not None:
        of_token[t.policy_positions()] = ratio.ratio
    cut = n > HEAD + TAIL
    shown = [*range(HEAD), *range(n - TAIL, n)] if cut else list(range(n))
    text = pieces(tokenizer, t.tokens.tolist()) if n <= 4 * (HEAD + TAIL) else _ends(tokenizer, t.tokens.tolist())
    return {
        "group": t.group,
        "sample": t.sample,
        "problem": t.problem,
        "split": t.split,
        "step": row.step,
        "versions": [t.version_min, t.version_max],
        "reward": float(t.reward) if np.isfinite(t.reward) else None,
        "ended": t.ended,
        "reason": t.reason or row.refused_because or "",
        "refused": row.refused_because or "",
        "generator": t.generator or row.generator,
        "seconds": round(t.finished_at - t.started_at, 3),
        "turns": [[turn.start, turn.length, round(turn.reward, 4)] for turn in t.turns],
        "info": dict(list(t.info.items())[:12]),
        "length": n,
        "policy": t.num_policy_tokens,
        "cut": HEAD if cut else None,
        "ratio_version": ratio.version if ratio is not None else None,
        "text": [text[i] for i in shown],
        "turn": turn_of[shown].tolist(),
        "version": version[shown].tolist(),
        "logp": [_short(x) if p >= 0 else None for x, p in zip(t.log_behaviour[shown], turn_of[shown], strict=True)],
        "ratio": [_short(x) for x in of_token[shown]] if ratio is not None else None,
    }


def _ends(tokenizer: Tokenizer | None, tokens: Sequence[int]) -> list[str]:
    """The pieces of a very long trajectory where they are shown; empty between."""
    middle = len(tokens) - HEAD - TAIL
    return [*pieces(tokenizer, tokens[:HEAD]), *[""] * middle, *pieces(tokenizer, tokens[-TAIL:])]


def _short(value: float) -> float | None:
    return round(float(value), NUMBER_DIGITS) if np.isfinite(value) else None
