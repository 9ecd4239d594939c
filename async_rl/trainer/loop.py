"""The trainer process: batch in, step, weights out.

Who waits for whom: the trainer waits for batches (and, at the two ends of a run, for an evaluation), by
name and with a deadline. It asks for the next batch before it trains the present one, so the buffer forms
and sends it meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from async_rl.batch import pack_batch
from async_rl.errors import RunFailed
from async_rl.run_folder import RunFolder, append_row
from async_rl.settings import Settings
from async_rl.trainer.checkpoint import save_checkpoint
from async_rl.trainer.inbox import Inbox
from async_rl.trainer.summary import Summary, mean, summarise
from async_rl.trajectory import Trajectory
from async_rl.wire import messages as msg

if TYPE_CHECKING:
    from pathlib import Path

    from async_rl.trainer.learner import Learner
    from async_rl.weights.shared_memory import WeightPublisher


@dataclass(slots=True, kw_only=True)
class TrainerLoop:
    """Everything a run's training consists of; `run` is the whole story."""

    settings: Settings
    folder: RunFolder
    learner: Learner
    inbox: Inbox
    publisher: WeightPublisher
    source: Path
    """folder of the model the run began with"""
    eval_problems: int
    """problems of the task's eval split"""
    rows: list[dict[str, float]] = field(default_factory=list)
    evaluations_asked: int = 0
    pending_evaluation: tuple[int, int] | None = None
    """(number, step) of an evaluation that runs beside training"""

    def run(self) -> Summary:
        """Train all steps. Raises RunFailed when something it waits for does not come."""
        self.publish()
        first = self.evaluate_and_wait(step=0)
        steps = self.settings.trainer.steps
        started = time.monotonic()
        generating = 0.0
        detail: dict[str, float] = {}
        for step in range(steps):
            waited = time.monotonic()
            batch = self.inbox.batch(step)
            waited = time.monotonic() - waited
            if step + 1 < steps:
                self.inbox.ask_batch(step + 1)
            if step == 0:
                generating = batch.detail.get("generator_busy_seconds", 0.0)
            detail = dict(batch.detail)
            row = self.train(step, batch, waited)
            self.watch_evaluation(step)
            self.record(row)
        seconds = time.monotonic() - started
        last = self.evaluate_and_wait(step=steps)
        model = self.checkpoint()
        busy = detail.get("generator_busy_seconds", 0.0) - generating
        return summarise(
            rows=self.rows,
            first=first,
            last=last,
            detail=detail,
            generating=busy / max(1.0, detail.get("generators", 1.0)),
            seconds=seconds,
            max_staleness=self.settings.staleness.max_staleness,
            model=str(model),
        )

    # ------------------------------------------------------------------ steps

    def train(self, step: int, batch: msg.Batch, waited: float) -> dict[str, float]:
        """One step; its metric row."""
        started = time.monotonic()
        usable = [t for t in batch.trajectories if not t.failed]
        if not usable:
            raise RunFailed(f"the batch of step {step} holds no usable trajectory")
        packed = pack_batch(
            usable,
            micro_batch_tokens=self.settings.trainer.micro_batch_tokens,
            device=self.settings.trainer.device,
        )
        report = self.learner.step(packed)
        trained = time.monotonic()
        self.publish()
        row: dict[str, float] = {
            "step": step,
            "time": time.time(),
            **report.metrics,
            **_lag_split(usable, step),
            "time/wait_for_batch": waited,
            "time/step": trained - started,
            "time/publish": time.monotonic() - trained,
            "len/refused": batch.detail.get("len_refused", 0.0),
            "tokens/generated": batch.detail.get("tokens_generated", 0.0),
            "tokens/trained": float(packed.num_policy_tokens),
            "slots/used": batch.detail.get("slots_used", 0.0),
            "slots/all": batch.detail.get("slots", 0.0),
            "groups/refused": batch.detail.get("groups_refused", 0.0),
            "time/generator_busy": batch.detail.get("generator_busy_seconds", 0.0),
            "generators": batch.detail.get("generators", 0.0),
        }
        if report.skipped:
            self.folder.event("step_skipped", step=step, reason=report.skipped, time=time.time())
            row["skipped"] = 1.0
        every = self.settings.checkpoint.every
        if every and (step + 1) % every == 0 and step + 1 < self.settings.trainer.steps:
            self.checkpoint()
        return row

    def publish(self) -> None:
        """Hand the weights over and say so."""
        self.publisher.publish(self.learner.weights(), self.learner.version)
        self.inbox.dealer.send(msg.Published(version=self.learner.version))

    def checkpoint(self) -> Path:
        keep = self.settings.checkpoint.keep
        return save_checkpoint(self.folder.checkpoints, self.learner, source=self.source, keep=keep)

    def record(self, row: dict[str, float]) -> None:
        self.rows.append(row)
        append_row(self.folder.metrics, row)

    # ------------------------------------------------------------- evaluation

    def ask_evaluation(self) -> int:
        """Ask for held-out episodes under the newest weights; generation goes on."""
        number = self.evaluations_asked
        self.evaluations_asked += 1
        settings = self.settings.evaluation
        self.inbox.dealer.send(
            msg.Evaluate(
                evaluation=number,
                version=self.learner.version,
                problems=tuple(range(min(settings.problems, self.eval_problems))),
                samples=settings.samples,
                temperature=settings.temperature,
            )
        )
        return number

    def evaluate_and_wait(self, *, step: int) -> msg.EvaluationResult:
        result = self.inbox.evaluation(self.ask_evaluation(), wait=True)
        assert result is not None
        self.report_evaluation(step, result)
        return result

    def watch_evaluation(self, step: int) -> None:
        """Start the evaluation that is due, collect the one that is done; never wait."""
        if self.pending_evaluation is not None:
            number, asked_at = self.pending_evaluation
            result = self.inbox.evaluation(number, wait=False)
            if result is not None:
                self.pending_evaluation = None
                self.report_evaluation(asked_at, result)
        every = self.settings.evaluation.every
        due = every and (step + 1) % every == 0 and step + 1 < self.settings.trainer.steps
        if due and self.pending_evaluation is None:
            self.pending_evaluation = (self.ask_evaluation(), step + 1)

    def report_evaluation(self, step: int, result: msg.EvaluationResult) -> None:
        self.folder.event(
            "evaluation",
            step=step,
            reward=mean(result.rewards),
            trajectories=len(result.rewards),
            version_min=result.version_min,
            version_max=result.version_max,
            time=time.time(),
        )


def _lag_split(trajectories: Sequence[Trajectory], step: int) -> dict[str, float]:
    """Staleness by where it arose, mean over trajectories: while in flight (weights changed during the
    episode) and after its last token (queue and training)."""
    sampled = [t for t in trajectories if t.version_min >= 0]
    if not sampled:
        return {"lag/flight": 0.0, "lag/queue": 0.0}
    return {
        "lag/flight": mean([float(t.version_max - t.version_min) for t in sampled]),
        "lag/queue": mean([float(step - t.version_max) for t in sampled]),
    }
