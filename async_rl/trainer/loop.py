"""The trainer process: batch in, step, weights out.

Who waits for whom: the trainer waits for batches (and, at the two ends of a run, for an evaluation), by
name and with a deadline. It asks for the next batch before it trains the present one, so the buffer forms
and sends it meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from async_rl.config import Settings
from async_rl.errors import RunFailed, UserError
from async_rl.events import CheckpointSaved, EvaluationReported, MemoryRanOut, StepSkipped, UpdatesStopped
from async_rl.process import is_out_of_memory
from async_rl.run_folder import RunFolder, append_row, read_rows, to_disk
from async_rl.trainer.alarm import Guard
from async_rl.trainer.packing import pack_step
from async_rl.trainer.canary_watch import CanaryWatch
from async_rl.trainer.checkpoint import Progress, save_checkpoint, save_part
from async_rl.trainer.team import weights_checksum, weights_hash
from async_rl.trainer.forward import probe_log_probs
from async_rl.trainer.inbox import Inbox
from async_rl.trainer.manifest import checkpoint_path, list_checkpoints, version_of
from async_rl.trainer.summary import Summary, Totals, mean, summarise
from async_rl.trainer.team import End, Gather, Probe, Save, Still, Team, Train, hear, wait_metrics
from async_rl.trajectory import Trajectory
from async_rl.wire import messages as msg
from async_rl.wire.heartbeat import Activity

if TYPE_CHECKING:
    from pathlib import Path

    from async_rl.trainer.alarm import Alarm
    from async_rl.trainer.learner import Learner, StepReport
    from async_rl.trainer.packing import PackedBatch
    from async_rl.trainer.publish import Publisher


CHECKSUM_BYTES = 32 << 20
"""models up to this size have a checksum of their weights recorded every step (5 ms), all a hash at checkpoints"""


@dataclass(slots=True, kw_only=True)
class TrainerLoop:
    """Everything a run's training consists of; `run` is the whole story."""

    settings: Settings
    folder: RunFolder
    learner: Learner
    inbox: Inbox
    canary: CanaryWatch
    publisher: Publisher
    source: Path
    """folder of the model the run began with"""
    team: Team
    """the other ranks"""
    eval_problems: int
    """problems of the task's eval split"""
    initial_hash: str
    """of the model the run began with"""
    guard: Guard
    totals: Totals = field(default_factory=Totals)
    """of the metric rows so far"""
    evaluations_asked: int = 0
    pending_evaluation: tuple[int, int] | None = None
    """(number, step) of an evaluation that runs beside training"""
    reward_first: float | None = None
    """held-out reward before training"""
    seconds_before: float = 0.0
    """training time of earlier lives of the run, up to where this one began"""
    busy_before: float = 0.0
    """seconds inside model steps in earlier lives (generators count from their start)"""
    started: float = 0.0
    saved: int = 0
    """newest version that is in a checkpoint"""

    def resume(self, progress: Progress, *, saved: int) -> None:
        """Go on behind a checkpoint, of version `saved`, that was loaded into the learner."""
        version = self.learner.version
        for row in read_rows(self.folder.metrics):
            if row["step"] < version:
                self.totals.add(row)
        self.guard.rebuild(read_rows(self.folder.metrics), version)
        self.evaluations_asked = progress["evaluations_asked"]
        if progress["pending_evaluation"] is not None:
            # under the same number, but by the weights there are now
            self.pending_evaluation = (progress["pending_evaluation"][0], version)
        self.reward_first = progress["reward_first"]
        self.seconds_before = progress["seconds"]
        self.busy_before = self.totals.generator_busy
        self.saved = saved
        if saved != version:  # went back: these weights have a new number
            self.record_weights("hash", weights_hash(self.team.weights(self.learner)))

    def run(self) -> Summary:
        """Train all steps. Raises RunFailed when something it waits for does not come, WentBack when the run is to
        go on from an earlier checkpoint."""
        first_step, steps = self.learner.version, self.settings.trainer.steps
        self.check_initial()
        self.publish()
        if self.reward_first is None:
            self.reward_first = mean(self.evaluate_and_wait(step=first_step).rewards)
        if self.pending_evaluation is not None:
            self.send_evaluation(self.pending_evaluation[0])
        self.started = time.monotonic()
        for step in range(first_step, steps):
            waited = time.monotonic()
            batch = self.inbox.batch(step)
            waited = time.monotonic() - waited
            if step + 1 < steps:
                self.inbox.ask_batch(step + 1)
            row, alarms = self.train(step, batch, waited)
            self.record(row)
            self.guard.tell(alarms)
            if self.guard.goes_back(alarms, step):
                to_disk(self.folder.metrics)
                raise self.guard.go_back(alarms, step, self.progress())
            self.watch_evaluation(step)
            if step + 1 < steps and self.checkpoint_due(step + 1):
                self.checkpoint()
        seconds = self.seconds()
        self.collect_evaluation(wait=True)  # what was asked for is reported, also when training ends before it
        last = self.evaluate_and_wait(step=steps)
        self.checkpoint()
        return summarise(
            totals=self.totals,
            first=self.reward_first,
            last=mean(last.rewards),
            counters=self.inbox.consumed(steps),
            canary=self.canary.summary(),
            guard=self.guard,
            seconds=seconds,
            staleness=self.settings.staleness,
            model=str(checkpoint_path(self.folder.checkpoints, self.learner.version)),
        )

    # ------------------------------------------------------------------ steps

    def train(self, step: int, batch: msg.Batch, waited: float) -> tuple[dict[str, float], Sequence[Alarm]]:
        """One step; its metric row, and the alarms it raises. Weights that will be given up are not published.
        Raises RunFailed when generators show other weights than the published."""
        self.canary.look(step, batch.counters.held_versions)
        self.inbox.listen()
        started = time.monotonic()
        self.inbox.activity.now(f"training step {step}")
        self.team.say(Train(step=step, trajectories=batch.trajectories))
        waited_before = self.team.ranks.waited_s
        packed = pack_step(self.settings, batch.trajectories, self.learner.over)
        report = self.step(step, packed)
        rank_waits = wait_metrics(self.team.ranks, waited_before)
        trained = time.monotonic()
        self.inbox.listen()  # nothing newer is published over weights that arrived wrong
        alarms = self.guard.look({"step": step, **report.metrics})
        stays = not self.guard.goes_back(alarms, step)
        if stays:
            self.inbox.activity.now(f"publishing version {step + 1}")
            self.publish(ess=report.metrics.get("ess/ratio", -1.0))
        published = time.monotonic()
        if stays and self.size_bytes <= CHECKSUM_BYTES:
            self.record_weights("checksum", weights_checksum(self.team.weights(self.learner)))
        row: dict[str, float] = {
            "step": step,
            "time": time.time(),
            **report.metrics,
            **rank_waits,
            **_lag_split(batch.trajectories, step),
            "time/wait_for_batch": waited,
            "time/step": trained - started,
            "time/publish": published - trained,
            "tokens/trained": float(packed.num_policy_tokens),
            **batch.counters.metrics(),
            "time/generator_busy": self.busy_before + batch.counters.generator_busy_seconds,
            **self.canary.row(),
            **self.guard.columns(),
        }
        if report.skipped:
            self.folder.record(StepSkipped(step=step, reason=report.skipped))
            row["skipped"] = 1.0
        elif report.stopped:
            self.folder.record(UpdatesStopped(step=step, reason=report.stopped))
        return row, alarms

    def step(self, step: int, packed: PackedBatch) -> StepReport:
        """The learner's; when memory runs out, with a word of the micro-batch that did not fit."""
        try:
            return self.learner.step(packed)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(f"{type(error).__name__} {error}"):
                largest = max(len(micro.tokens) for micro in packed.micro_batches)
                self.folder.record(MemoryRanOut(step=step, tokens=largest))
            raise

    def publish(self, *, ess: float = -1.0) -> None:
        """Hand the weights over and say so; `ess`: of the batch they were trained on, if any."""
        self.publisher.publish(self.team.sent(self.learner), self.learner.version)
        self.inbox.say(msg.Published(version=self.learner.version, ess=ess))
        self.canary.expect()

    def checkpoint_due(self, version: int) -> bool:
        """By checkpoint.every; and where the run will go back to: it only reaches that again because the checkpoint
        that was there is damaged or gone, and without it would go back for ever."""
        every, back = self.settings.checkpoint.every, self.guard.rollback
        return bool(every and version % every == 0) or (back is not None and version == back.to)

    def checkpoint(self) -> None:
        """Save everything a step depends on, then tell the buffer that these steps are not done again."""
        version = self.learner.version
        if version == self.saved:
            return
        started = time.monotonic()
        self.inbox.activity.now(f"checkpoint {version}")
        self.record_weights("hash", weights_hash(self.team.weights(self.learner)))
        for rows in (self.folder.metrics, self.folder.weights):
            to_disk(rows)  # the rows of a checkpoint's steps must not be missing behind it
        keep, spared = self.settings.checkpoint.keep, self.guard.spared()
        try:
            path = save_checkpoint(
                self.folder.checkpoints,
                self.learner,
                self.progress(),
                source=self.source,
                keep=keep,
                spared=spared,
                team=self.team,
            )
        except (OSError, SafetensorError) as error:
            raise RunFailed(
                f"the checkpoint of version {version} cannot be written to {self.folder.checkpoints} "
                f"({getattr(error, 'strerror', None) or error}); make room there and resume the run"
            ) from None
        self.saved = version
        oldest = version_of(list_checkpoints(self.folder.checkpoints)[0])
        self.inbox.say(msg.Checkpointed(version=version, oldest=oldest))
        took = time.monotonic() - started
        self.folder.record(CheckpointSaved(version=version, path=str(path), seconds=round(took, 4)))

    def progress(self) -> dict[str, Any]:
        """What a checkpoint keeps of this loop."""
        return {
            "evaluations_asked": self.evaluations_asked,
            "pending_evaluation": self.pending_evaluation,
            "reward_first": self.reward_first,
            "seconds": self.seconds(),
        }

    def record(self, row: dict[str, float]) -> None:
        self.totals.add(row)
        append_row(self.folder.metrics, row)

    def check_initial(self) -> None:
        """The model the run began with, known by its hash, is also its reference and where a replay begins."""
        known = next((row["hash"] for row in read_rows(self.folder.weights) if row["version"] == 0), None)
        if known is None:
            self.record_weights("hash", self.initial_hash)
        elif known != self.initial_hash:
            raise UserError(
                f"model.path: {self.source} holds other weights than when the run began; put those back, or start "
                f"a new run from a checkpoint of this one (model.path={self.folder.checkpoints}/step_...)"
            )

    def record_weights(self, kind: str, value: str) -> None:
        """So that a replay finds the step at which it differs. `kind`: "hash" or "checksum"."""
        append_row(self.folder.weights, {"version": self.learner.version, kind: value})

    @property
    def size_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.learner.model.parameters())

    def seconds(self) -> float:
        """Training time of the run so far."""
        return self.seconds_before + time.monotonic() - self.started

    # ------------------------------------------------------------- evaluation

    def ask_evaluation(self) -> int:
        """Ask for held-out episodes under the newest weights; generation goes on."""
        number = self.evaluations_asked
        self.evaluations_asked += 1
        self.send_evaluation(number)
        return number

    def send_evaluation(self, number: int) -> None:
        settings = self.settings.evaluation
        self.inbox.say(
            msg.Evaluate(
                evaluation=number,
                version=self.learner.version,
                problems=tuple(range(min(settings.problems, self.eval_problems))),
                samples=settings.samples,
                temperature=settings.temperature,
            )
        )

    def evaluate_and_wait(self, *, step: int) -> msg.EvaluationResult:
        number = self.ask_evaluation()
        result = self.inbox.evaluation(number, wait=True)
        assert result is not None
        self.report_evaluation(number, step, result)
        return result

    def watch_evaluation(self, step: int) -> None:
        """Start the evaluation that is due, collect the one that is done; never wait."""
        self.collect_evaluation(wait=False)
        every = self.settings.evaluation.every
        due = every and (step + 1) % every == 0 and step + 1 < self.settings.trainer.steps
        if due and self.pending_evaluation is None:
            self.pending_evaluation = (self.ask_evaluation(), step + 1)

    def collect_evaluation(self, *, wait: bool) -> None:
        """Report the evaluation that ran beside training, if it is done."""
        if self.pending_evaluation is not None:
            number, asked_at = self.pending_evaluation
            result = self.inbox.evaluation(number, wait=wait)
            if result is not None:
                self.pending_evaluation = None
                self.report_evaluation(number, asked_at, result)

    def report_evaluation(self, number: int, step: int, result: msg.EvaluationResult) -> None:
        self.folder.record(
            EvaluationReported(
                evaluation=number,
                step=step,
                reward=mean(result.rewards),
                trajectories=len(result.rewards),
                version_min=result.version_min,
                version_max=result.version_max,
            )
        )


def _lag_split(trajectories: Sequence[Trajectory], step: int) -> dict[str, float]:
    """Staleness by where it arose, mean over trajectories: while in flight (weights changed during the
    episode) and after its last token (queue and training)."""
    sampled = [t for t in trajectories if t.version_min >= 0 and not t.failed]
    if not sampled:
        return {"lag/flight": 0.0, "lag/queue": 0.0}
    return {
        "lag/flight": mean([float(t.version_max - t.version_min) for t in sampled]),
        "lag/queue": mean([float(step - t.version_max) for t in sampled]),
    }


# -------------------- follow
# What a rank of the trainer does that does not lead: its share of whatever the leader says comes next.
#
# Who waits for whom: it waits for the leader's word, by the time-out of a collective (the leader says every few
# seconds that it is there), and talks to nobody else: buffer, generators and files of the run are the leader's.

WAITING = "waiting for the leader"


def follow(settings: Settings, learner: Learner, activity: Activity) -> None:
    """Until the leader says that the run is done. Raises RunFailed when it is gone."""
    ranks = learner.ranks
    activity.now(WAITING)
    while True:
        match hear(ranks):
            case Train(step=step, trajectories=trajectories):
                activity.now(f"training step {step}")
                waited = ranks.waited_s
                learner.step(pack_step(settings, trajectories, learner.over))
                wait_metrics(ranks, waited)
            case Gather():
                activity.now(f"gathering version {learner.version}")
                for _ in learner.full_weights():
                    pass  # they count on the leader
            case Probe(tokens=tokens):
                probe_log_probs(learner.model, tokens, learner.options.arithmetic)
            case Save(folder=folder):
                activity.now(f"checkpoint {learner.version}")
                save_part(folder, learner)
            case Still():
                pass
            case End():
                return
        activity.still(WAITING)
