"""What `top` shows at one moment, read from a run folder again and again at little cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from async_rl.buffer.store_reader import StoreError
from async_rl.buffer.survey import StoreSurvey, Surveyed
from async_rl.errors import UserError
from async_rl.model.tokenizer import Tokenizer
from async_rl.observe.follow import Follower
from async_rl.observe.record import RunRecord, State, read_json, read_run
from async_rl.observe.samples import tokenizer_of
from async_rl.observe.timeline import Mark, marks
from async_rl.trajectory.codec import WireError, unpack

NEWEST = 2_000
"""trajectories in the staleness histograms"""
SAMPLES = 6
SAMPLE_TOKENS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    step: int | None
    reward: float | None
    version_min: int
    version_max: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Glance:
    record: RunRecord
    state: State
    words: str
    """how the run stands"""
    live: Mapping[str, Any]
    """of live.json; empty when there is none"""
    in_flight: Mapping[int, int]
    """trajectories among the newest trained ones by versions that changed while they were generated"""
    in_queue: Mapping[int, int]
    """the same by steps waited after their last token"""
    samples: tuple[Sample, ...]
    """newest first"""
    store_note: str
    """why the store cannot be read; empty when it can"""
    marks: tuple[Mark, ...]
    """events that tell of trouble or are worth a look, newest last"""


@dataclass(slots=True)
class Watch:
    """One run, looked at again and again."""

    path: Path
    _record: RunRecord | None = None
    _metrics: Follower = field(init=False)
    _events: Follower = field(init=False)
    _rows: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    _told: list[Mapping[str, Any]] = field(default_factory=list)
    _tokenizer: Tokenizer | None = None

    def __post_init__(self) -> None:
        self._metrics = Follower(self.path / "metrics.jsonl")
        self._events = Follower(self.path / "events.jsonl")

    def look(self) -> Glance:
        """Raises UserError when the folder holds no run."""
        if self._record is None:
            self._record = read_run(self.path)
            self._tokenizer = tokenizer_of(self._record)
        self._follow()
        folder = self._record.folder
        record = RunRecord(
            folder=folder,
            rows=tuple(self._rows[step] for step in sorted(self._rows)),
            events=tuple(self._told),
            summary=read_json(folder.summary, []),
            settings=self._record.settings,
            setting_rows=self._record.setting_rows,
            notes=self._record.notes,
        )
        newest, samples, note = self._stored(record)
        trained = [row for row in newest if row.step is not None and row.version_min >= 0]
        state, words = record.state()
        return Glance(
            record=record,
            state=state,
            words=words,
            live=read_json(folder.path / "live.json", []) or {},
            in_flight=Counter(row.version_max - row.version_min for row in trained),
            in_queue=Counter((row.step or 0) - row.version_max for row in trained),
            samples=tuple(samples),
            store_note=note,
            marks=tuple(mark for mark in marks(self._told[-5000:]) if mark.level != "plain"),
        )

    def _follow(self) -> None:
        rows, again = self._metrics.new()
        if again:
            self._rows.clear()
        self._rows |= {int(row["step"]): row for row in rows if isinstance(row.get("step"), int | float)}
        told, again = self._events.new()
        if again:
            self._told.clear()
        self._told += [event for event in told if isinstance(event.get("event"), str)]

    def _stored(self, record: RunRecord) -> tuple[list[Surveyed], list[Sample], str]:
        if not record.folder.store.is_file():
            return [], [], ""
        try:
            with StoreSurvey(record.folder.store) as store:
                newest = store.newest(NEWEST)
                return newest, self._samples(store, newest), ""
        except (UserError, StoreError) as error:
            return [], [], str(error)

    def _samples(self, store: StoreSurvey, newest: list[Surveyed]) -> list[Sample]:
        """One of each of the newest groups."""
        chosen: dict[int, Surveyed] = {}
        for row in reversed(newest):
            if row.split == "train" and row.group not in chosen and len(chosen) < SAMPLES:
                chosen[row.group] = row
        found = []
        for group, row in chosen.items():
            for blob in store.load_groups([group]):
                try:
                    trajectory = unpack(blob)
                except WireError:
                    continue
                if trajectory.sample == row.sample:
                    found.append(_sample(row, trajectory.tokens[-SAMPLE_TOKENS:].tolist(), self._tokenizer))
        return found


def _sample(row: Surveyed, tokens: list[int], tokenizer: Tokenizer | None) -> Sample:
    text = tokenizer.decode(tokens) if tokenizer is not None else " ".join(map(str, tokens))
    return Sample(step=row.step, reward=row.reward, version_min=row.version_min, version_max=row.version_max, text=text)
