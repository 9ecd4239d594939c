"""A store without a file: the contract of buffer/store.py in a page. What was not committed is gone after a crash."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from async_rl.buffer.sampler import Decision
from async_rl.buffer.sampler_feedback import StoredDecision
from async_rl.buffer.sampler_statistics import Outcome
from async_rl.buffer.store import GroupRow, Store, TrajectoryRow
from async_rl.buffer.verification import FABRICATED
from async_rl.trajectory import Trajectory
from async_rl.trajectory.codec import pack
from async_rl.trajectory.types import bucket_of
from async_rl.wire.messages import ABANDONED

Pair = tuple[int, int]


@dataclass
class FakeStore:
    """Every write can be undone until it is committed."""

    rows: dict[int, GroupRow] = field(default_factory=dict)
    trajectories: dict[Pair, Trajectory] = field(default_factory=dict)
    turns: dict[Pair, Trajectory] = field(default_factory=dict)
    formed: dict[int, tuple[int, ...]] = field(default_factory=dict)
    trained: dict[int, bool] = field(default_factory=dict)
    consumed: int = -1
    evaluations: dict[int, tuple[float, ...]] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)
    decided: dict[int, tuple[Decision, bytes | None]] = field(default_factory=dict)
    ended: dict[int, Outcome] = field(default_factory=dict)
    undo: list[Callable[[], None]] = field(default_factory=list)
    seconds_writing: float = 0.0
    processor_seconds: float = 0.0
    commits: int = 0

    # ------------------------------------------------------------------ writes

    def _set(self, table: dict[Any, Any], key: Any, value: Any) -> None:
        if key in table:
            before = table[key]
            self.undo.append(lambda: table.__setitem__(key, before))
        else:
            self.undo.append(lambda: table.pop(key))
        table[key] = value

    def add_group(self, **row: Any) -> None:
        assert row["group"] not in self.rows
        self._set(self.rows, row["group"], GroupRow(**row))

    def add_decision(self, group: int, decision: Decision, start: bytes | None = None) -> None:
        assert group in self.rows, "a decision of a group that was never admitted"
        self._set(self.decided, group, (decision, start))

    def add_outcome(self, outcome: Outcome) -> None:
        assert outcome.number == len(self.ended), "outcomes are numbered in the order in which groups end"
        self._set(self.ended, outcome.number, outcome)

    def add_trajectories(self, trajectories: Sequence[Trajectory], blobs: object = ()) -> None:
        for t in trajectories:
            assert t.group in self.rows, "a trajectory of a group that was never admitted"
            if (t.group, t.sample) not in self.trajectories:
                self._set(self.trajectories, (t.group, t.sample), t)

    def add_dropped(self, trajectories: Sequence[Trajectory]) -> None:
        assert all(self.rows[t.group].refused_because for t in trajectories)
        self.add_trajectories(trajectories)

    def save_turns(self, trajectories: Iterable[Trajectory]) -> None:
        for t in trajectories:
            self._set(self.turns, (t.group, t.sample), t)

    def drop_turns(self, pairs: Iterable[Pair]) -> None:
        for pair in pairs:
            if pair in self.turns:
                turn = self.turns.pop(pair)
                self.undo.append(lambda pair=pair, turn=turn: self.turns.__setitem__(pair, turn))

    def refuse_group(self, group: int, reason: str) -> None:
        row = self.rows[group]
        assert row.step is None
        assert row.refused_because is None
        self._set(self.rows, group, replace(row, refused_because=reason))

    def form_batch(self, *, step: int, groups: Sequence[int], formed_at: float) -> None:
        assert step == len(self.formed), "batches are formed one after the other, once"
        for group in groups:
            row = self.rows[group]
            assert row.step is None
            assert row.refused_because is None
            assert row.split == "train"
            self._set(self.rows, group, replace(row, step=step))
        self._set(self.formed, step, tuple(groups))

    def mark_trained(self, *, step: int, trained_at: float) -> None:
        self._set(self.trained, step, True)

    def mark_consumed(self, *, step: int, oldest: int = 0) -> None:
        before, self.consumed = self.consumed, max(step, self.consumed)
        self.undo.append(lambda: setattr(self, "consumed", before))

    def rewind(self, *, version: int, now: float) -> None:
        for step in self.formed:
            self._set(self.trained, step, step < version)
        before, self.consumed = self.consumed, version - 1
        self.undo.append(lambda: setattr(self, "consumed", before))

    def add_evaluation(self, *, evaluation: int, rewards: Sequence[float], **_: Any) -> None:
        self._set(self.evaluations, evaluation, tuple(rewards))

    def set_meta(self, key: str, value: str | int | float) -> None:
        self._set(self.kept, key, value)

    def meta(self, key: str, default: Any = None) -> Any:
        return self.kept.get(key, default)

    def commit(self) -> None:
        self.undo.clear()

    def crash(self) -> None:
        """The process died: what was not committed never was."""
        while self.undo:
            self.undo.pop()()

    # ------------------------------------------------------------------- reads

    def load_part(self, step: int, *, after: int, most_bytes: int) -> tuple[int, list[bytes]] | None:
        if step not in self.formed:
            return None
        found: list[Trajectory] = []
        for group in self.formed[step]:
            samples = sorted(pair for pair in self.trajectories if pair[0] == group)
            found += [self.trajectories[pair] for pair in samples]
        return len(found), [pack(t) for t in found[after:]]

    def load_turns(self, pairs: Sequence[Pair]) -> list[bytes]:
        return [pack(self.turns[pair]) for pair in pairs if pair in self.turns]

    def load_one(self, group: int, sample: int) -> bytes | None:
        found = self.trajectories.get((group, sample))
        return None if found is None else bytes(pack(found))

    def load_start(self, group: int) -> bytes | None:
        return self.decided[group][1] if group in self.decided else None

    def decisions(self) -> Iterator[StoredDecision]:
        for group, (decision, _) in sorted(self.decided.items()):
            row = self.rows[group]
            yield StoredDecision(group=group, position=row.position, attempt=row.attempt, decision=decision)

    def outcomes(self) -> Iterator[Outcome]:
        yield from (outcome for _, outcome in sorted(self.ended.items()))

    def has_pool(self) -> bool:
        return False

    def first_step(self) -> int:
        return 0

    def next_numbers(self) -> tuple[int, int]:
        return len(self.formed), max(self.rows, default=-1) + 1

    def next_position(self) -> int:
        return max((row.position for row in self.rows.values()), default=-1) + 1

    def groups(self, *, unfinished: bool = False, since: int = 0) -> Iterator[GroupRow]:
        for number in sorted(self.rows):
            row = self.rows[number]
            if number >= since and not (unfinished and (row.step is not None or row.refused_because)):
                yield row

    def trajectories_of(self, group: int) -> Iterator[TrajectoryRow]:
        row = self.rows[group]
        for pair in sorted(pair for pair in self.trajectories if pair[0] == group):
            t = self.trajectories[pair]
            yield TrajectoryRow(
                group=t.group,
                sample=t.sample,
                split=t.split,
                problem=t.problem,
                step=row.step,
                version_min=t.version_min,
                version_max=t.version_max,
                reward=t.reward,
                length=len(t.tokens),
                policy_length=t.num_policy_tokens,
                num_turns=len(t.turns),
                ended=t.ended,
                reason=t.reason,
                refused_because=row.refused_because,
                generator=t.generator,
                started_at=t.started_at,
                finished_at=t.finished_at,
            )

    def failures(self) -> list[tuple[str, int]]:
        failed = (t.reason for t in self.trajectories.values() if t.failed and t.reason != ABANDONED)
        return list(Counter(failed).items())

    def dropped_last(self) -> list[tuple[int, int, str]]:
        newest: dict[int, GroupRow] = {}
        for row in self.rows.values():
            if row.split == "train" and row.attempt >= newest.get(row.position, row).attempt:
                newest[row.position] = row
        why = {row.position: (row.refused_because or "").partition(":")[0] for row in newest.values()}
        again = [row for row in newest.values() if why[row.position] in ("stale", "rollback", FABRICATED)]
        return sorted((row.position, row.attempt, why[row.position]) for row in again)

    def cut_last(self) -> list[tuple[int, int, int, int, str]]:
        newest: dict[int, GroupRow] = {}
        for row in self.groups():
            if row.split == "train":
                newest[row.position] = row
        return sorted(
            (row.group, row.position, row.attempt, row.problem, t.generator)
            for row in newest.values()
            if row.refused_because is None
            for t in self.trajectories_of(row.group)
            if t.ended == "window"
        )

    def lengths(self, ends: Sequence[int]) -> list[tuple[str, int, int, int]]:
        found: dict[tuple[str, int], list[int]] = {}
        for t in self.trajectories.values():
            row = self.rows[t.group]
            if row.step is not None:
                kind = "trained"
            elif row.refused_because is not None:
                kind = "dropped" if row.refused_because.startswith("stale:") else "refused"
            else:
                continue
            counts = not t.failed or (kind == "dropped" and t.reason == ABANDONED)
            if t.split == "train" and t.num_policy_tokens and counts:
                found.setdefault((kind, bucket_of(t.num_policy_tokens)), []).append(t.num_policy_tokens)
        return sorted((kind, bucket, len(many), sum(many)) for (kind, bucket), many in found.items())

    def tally(self) -> dict[str, int]:
        found: Counter[str] = Counter()
        for row in self.rows.values():
            if row.split == "train" and row.refused_because is not None:
                found[f"refused_{row.refused_because}"] += 1
        for t in self.trajectories.values():
            found[f"trajectories_{t.split}"] += 1
            found["tokens_generated"] += t.num_policy_tokens
            found["trajectories_failed"] += t.failed and t.reason != ABANDONED
        return dict(found)

    def begun(self) -> list[Pair]:
        return sorted(self.turns)

    def counts(self) -> dict[str, int]:
        rows = [row for row in self.rows.values() if row.split == "train"]
        return {
            "groups_admitted": len(rows),
            "groups_batched": sum(row.step is not None for row in rows),
            "groups_refused": sum(row.refused_because is not None for row in rows),
        }


class RealStore:
    """The store of a run, whose process can die: what was not committed is gone then."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = Store(path, durability="process", create=True)

    def crash(self) -> None:
        self.store.close()
        self.store = Store(self.path, durability="process", create=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("seconds_writing", "processor_seconds"):
            setattr(self.store, name, value)
        else:
            object.__setattr__(self, name, value)


class TwinStore:
    """The fake and the real store side by side: every write goes to both, every answer must be the same."""

    def __init__(self, path: Path) -> None:
        self.fake = FakeStore()
        self.real = RealStore(path)
        self.compared = 0

    def crash(self) -> None:
        self.fake.crash()
        self.real.crash()

    def __getattr__(self, name: str) -> Any:
        fake, real = getattr(self.fake, name), getattr(self.real, name)
        if not callable(fake):
            return real

        def both(*given: Any, **named: Any) -> Any:
            expected, found = _plain(fake(*given, **named)), _plain(real(*given, **named))
            if name == "tally":
                assert Counter(found) == Counter(expected)  # where nothing is counted, one says so, one does not
            if name in ANSWERS:
                assert found == expected, f"{name}{given}: {found} instead of {expected}"
                self.compared += 1
            return found

        return both

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("seconds_writing", "processor_seconds"):
            setattr(self.real, name, value)
        else:
            object.__setattr__(self, name, value)


ANSWERS = frozenset((
    "load_part", "load_turns", "next_numbers", "next_position", "groups", "trajectories_of", "dropped_last", "cut_last",
    "lengths", "begun", "meta", "decisions", "outcomes", "load_one", "load_start",
))  # fmt: skip


def _plain(answer: Any) -> Any:
    if isinstance(answer, Iterator):
        return list(answer)
    return answer
