"""The trainer process: batch in, step, weights out. `TrainerLoop.run` is the story of a run on one screen.

Who waits for whom: the trainer waits for batches (and, at the two ends of a run, for an evaluation), by name and with
a deadline. It asks for the next batch before it trains on the present one, so the buffer forms and sends it meanwhile.
Ranks that do not lead (`follow`) wait for the leader's orders, within the time-out of a collective, and talk to nobody
else: buffer, generators and the run's files are the leader's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from async_rl.config import Settings
from async_rl.errors import RunFailed, UserError
from async_rl.events import CheckpointSaved, EvaluationReported, MemoryRanOut, StepSkipped, UpdatesStopped
from async_rl.process import is_out_of_memory
from async_rl.run_folder import RunFolder, append_row, read_rows, to_disk
from async_rl.steady_clock import steady_time
from async_rl.task.order import choose_held_out
from async_rl.tidying import Tidying
from async_rl.trainer.alarm import Guard
from async_rl.trainer.canary_watch import CanaryWatch
from async_rl.trainer.checkpoint import Progress, delete_old, save_part, write_checkpoint
from async_rl.trainer.forward import probe_log_probs
from async_rl.trainer.held_versions import HeldShards
from async_rl.trainer.inbox import Inbox, Preempted
from async_rl.trainer.manifest import checkpoint_path, list_checkpoints, version_of
from async_rl.trainer.packing import pack_step
from async_rl.trainer.publication import lies_here
from async_rl.trainer.reused import reuse_metrics
from async_rl.trainer.saving import Saving
from async_rl.trainer.summary import Summary, Totals, judged, mean_judged, summarise
from async_rl.trainer.team import (
    Finish,
    Gather,
    Hold,
    KeepAlive,
    Probe,
    Rescore,
    Save,
    Team,
    Train,
    receive_order,
    recorded_hash,
    wait_metrics,
    weights_checksum,
    weights_hash,
)
from async_rl.trajectory import Trajectory
from async_rl.trajectory.parts import PREFIX, notes_in, part_means, parts_in
from async_rl.trajectory.reuse import fresh_of
from async_rl.wire import messages as msg
from async_rl.wire.heartbeat import Activity

if TYPE_CHECKING:
    from pathlib import Path

    from async_rl.trainer.alarm import Alarm
    from async_rl.trainer.learner import Learner, StepReport
    from async_rl.trainer.mismatch_watch import MismatchWatch
    from async_rl.trainer.packing import PackedBatch
    from async_rl.trainer.publication import Publication
    from async_rl.trainer.verifier import Verifier

CHECKSUM_BYTES = 32 << 20
"""models up to this size have a checksum of their weights recorded every step (5 ms), all a hash at checkpoints"""
WAITING = "waiting for the leader"


@dataclass(slots=True, kw_only=True)
class Step:
    """One training step on its way: what its verbs have found so far, for the metric row."""

    number: int
    """= version of the weights that are trained"""
    batch: msg.Batch
    """whole groups of trajectories"""
    waited_s: float
    """for the batch"""
    started: float = field(default_factory=time.monotonic)
    ranks_waited_s: float = 0.0
    """this rank's sum of waits before the step"""
    report: StepReport | None = None
    policy_tokens: int = 0
    rank_waits: dict[str, float] = field(default_factory=dict)
    alarms: Sequence[Alarm] = ()
    trained: float = 0.0
    published: float = 0.0


@dataclass(slots=True, kw_only=True)
class TrainerLoop:
    """The leader's loop over the steps of a run, or the only rank's."""

    settings: Settings
    folder: RunFolder
    learner: Learner
    inbox: Inbox
    canary: CanaryWatch
    publication: Publication
    verifier: Verifier | None
    """None: no trajectories are verified"""
    source: Path
    """folder of the model the run began with"""
    team: Team
    """the other ranks"""
    eval_problems: int
    """problems of the task's eval split"""
    initial_hash: str
    """of the model the run began with"""
    guard: Guard
    mismatch: MismatchWatch
    totals: Totals = field(default_factory=Totals)
    """of the metric rows so far"""
    evaluations_asked: int = 0
    pending_evaluation: tuple[int, int] | None = None
    """(number, step) of an evaluation that runs beside training"""
    reward_first: float | None = None
    """held-out reward before training"""
    rewards_first: Sequence[float] = ()
    """of its episodes; NaN for those that failed"""
    seconds_before: float = 0.0
    """training time of earlier lives of the run, up to where this one began"""
    busy_before: float = 0.0
    """seconds inside model steps in earlier lives (generators count from their start)"""
    started: float = 0.0
    saved: int = 0
    """newest version that is in a checkpoint, or in one that is being finished"""
    saving: Saving | None = None
    """the checkpoint that is being finished"""
    tidying: Tidying = field(default_factory=Tidying)

    def resume(self, progress: Progress, *, saved: int) -> None:
        """Go on behind a checkpoint, of version `saved`, that was loaded into the learner."""
        version = self.learner.version
        for row in read_rows(self.folder.metrics):
            if row["step"] < version:
                self.totals.add(row)
        self.guard.rebuild(read_rows(self.folder.metrics), version)
        self.mismatch.rebuild(row for row in read_rows(self.folder.metrics) if row["step"] < version)
        self.evaluations_asked = progress["evaluations_asked"]
        if progress["pending_evaluation"] is not None:
            # under the same number, but by the weights there are now
            self.pending_evaluation = (progress["pending_evaluation"][0], version)
        self.reward_first = progress["reward_first"]
        self.rewards_first = progress.get("rewards_first", ())
        self.seconds_before = progress["seconds"]
        self.busy_before = self.totals.generator_busy
        self.saved = saved
        if saved != version:  # went back: these weights have a new number
            self.record_weights("hash", weights_hash(self.team.weights(self.learner)))

    def run(self) -> Summary:
        """Train all steps. Raises RunFailed when something it waits for does not come, RolledBack when the run is to
        go on from an earlier checkpoint, Preempted (with a checkpoint written) when it was told to end."""
        try:
            self.begin()
            for number in range(self.learner.version, self.settings.trainer.steps):
                step = self.receive(number)  # trajectories of whole groups, from the buffer
                packed = self.pack(step)  # columns [policy tokens], micro-batches of whole trajectories
                self.update(step, packed)  # log-probs, coefficients, gradient, optimizer: version number + 1
                self.publish(step)  # the weights, to the generators
                self.record(step)  # metric row, alarms, evaluations, checkpoint
            return self.finish()
        except Preempted:
            self.checkpoint()
            self.finish_checkpoint()
            raise

    # The verbs of a step.

    def receive(self, number: int) -> Step:
        """Wait for the batch of a step, and ask for the next one."""
        began = time.monotonic()
        self.publication.wait(unless=lambda: self.inbox.has_come(number))
        batch = self.inbox.receive_batch(number)
        waited = time.monotonic() - began
        if number + 1 < self.settings.trainer.steps:
            self.inbox.ask_batch(number + 1)
        self.canary.report_silent(number, batch.counters.held_versions)
        self.inbox.drain()
        if self.verifier is not None:
            self.verifier.work()
        return Step(number=number, batch=batch, waited_s=waited)

    def pack(self, step: Step) -> PackedBatch:
        """Lay the trajectories out as flat tensors, here and on every other rank."""
        self.inbox.activity.now(f"training step {step.number}")
        self.team.send(Train(step=step.number, trajectories=step.batch.trajectories))
        step.ranks_waited_s = self.team.ranks.waited_s
        packed = pack_step(self.settings, step.batch.trajectories, self.learner.over, needs=self.learner.needs)
        step.policy_tokens = packed.num_policy_tokens
        return packed

    def update(self, step: Step, packed: PackedBatch) -> None:
        """Train on the batch (`Learner.step` has the story), and check the result for a collapse.

        When memory runs out, the event names the micro-batch that did not fit. Raises RunFailed when generators show
        other weights than the published.
        """
        try:
            step.report = self.learner.step(packed)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(f"{type(error).__name__} {error}"):
                largest = max(micro.counted for micro in packed.micro_batches)
                self.folder.record(MemoryRanOut(step=step.number, tokens=largest))
            raise
        step.rank_waits = dict(wait_metrics(self.team.ranks, step.ranks_waited_s))
        step.trained = time.monotonic()
        self.inbox.drain()  # nothing newer is published over weights that arrived wrong
        step.alarms = self.guard.check({"step": step.number, **step.report.metrics})

    def publish(self, step: Step) -> None:
        """Hand the new weights to the generators, beside the next step, unless the run gives them up and goes back."""
        assert step.report is not None
        if not self.guard.gives_up(step.alarms, step.number):
            self.inbox.activity.now(f"publishing version {step.number + 1}")
            self.publish_weights(ess=step.report.metrics.get("ess/ratio", -1.0))
        step.published = time.monotonic()

    def record(self, step: Step) -> None:
        """Write the metric row and the alarms, start and collect evaluations, save a checkpoint when one is due.
        Raises RolledBack when the run gives these weights up."""
        gives_up = self.guard.gives_up(step.alarms, step.number)
        if not gives_up and self.size_bytes <= CHECKSUM_BYTES:
            self.record_weights("checksum", weights_checksum(self.team.weights(self.learner)))
        row = self.row(step)
        self.totals.add(row)
        append_row(self.folder.metrics, row)
        self.guard.report(step.alarms)
        if (found := self.mismatch.check(row)) is not None:
            self.folder.record(found)
        if gives_up:
            to_disk(self.folder.metrics)
            self.finish_checkpoint()
            raise self.guard.roll_back(step.alarms, step.number, self.progress())
        self.watch_evaluation(step.number)
        if self.saving is not None and self.saving.is_done:
            self.finish_checkpoint()
        if step.number + 1 < self.settings.trainer.steps and self.checkpoint_due(step.number + 1):
            self.checkpoint()
        self.tidying.round(time.monotonic())

    # Before the first step and after the last.

    def begin(self) -> None:
        """Publish the first weights and evaluate them."""
        self.check_initial()
        self.learner.before_write = self.before_write
        self.publish_weights()
        self.publication.wait()
        if self.reward_first is None:
            result = self.evaluate_and_wait(step=self.learner.version)
            check_judged(result)
            self.reward_first, self.rewards_first = mean_judged(result.rewards), result.rewards
        if self.pending_evaluation is not None:
            self.send_evaluation(self.pending_evaluation[0])
        self.started = time.monotonic()

    def finish(self) -> Summary:
        """Evaluate and save the last weights; what the run came to."""
        assert self.reward_first is not None
        self.publication.wait()
        seconds, steps = self.seconds(), self.settings.trainer.steps
        self.collect_evaluation(wait=True)  # what was asked for is reported, also when training ends before it
        last = self.evaluate_and_wait(step=steps)
        self.checkpoint()
        self.finish_checkpoint()
        check_judged(last)
        return summarise(
            totals=self.totals,
            first=self.reward_first,
            first_rewards=self.rewards_first,
            last_rewards=last.rewards,
            counters=self.inbox.consumed(steps),
            canary=self.canary.summary(),
            guard=self.guard,
            seconds=seconds,
            staleness=self.settings.staleness,
            model=str(checkpoint_path(self.folder.checkpoints, self.learner.version)),
        )

    # What the verbs are made of.

    def row(self, step: Step) -> dict[str, Any]:
        """The metric row of a step; a step that was skipped is recorded as an event too."""
        report, batch = step.report, step.batch
        assert report is not None
        fresh = fresh_of(batch.trajectories)
        row: dict[str, Any] = {
            "step": step.number,
            "time": steady_time(),
            **report.metrics,
            **step.rank_waits,
            **_lag_split(fresh, step.number),
            **_part_means(fresh),
            **reuse_metrics(batch.trajectories),
            "time/wait_for_batch": step.waited_s,
            "time/step": step.trained - step.started,
            "time/publish": step.published - step.trained,
            "tokens/trained": float(step.policy_tokens),
            **batch.counters.metrics(),
            **failed_since(self.totals.last, batch.counters),
            "time/generator_busy": self.busy_before + batch.counters.generator_busy_seconds,
            **self.publication.row(),
            **self.canary.row(),
            **({} if self.verifier is None else self.verifier.row()),
            **self.guard.columns(),
        }
        if report.skipped:
            self.folder.record(StepSkipped(step=step.number, reason=report.skipped))
            row["skipped"] = 1.0
        elif report.stopped:
            self.folder.record(UpdatesStopped(step=step.number, reason=report.stopped))
        return row

    def publish_weights(self, *, ess: float = -1.0) -> None:
        """Begin to hand the weights out; the buffer is told when they are. `ess`: of the batch they were trained on, if
        any."""
        if self.verifier is not None:
            self.verifier.held.keep()
        message = msg.Published(version=self.learner.version, ess=ess)
        self.publication.begin(self.team.sent(self.learner), message.version, lambda: self.inbox.send(message))
        self.canary.expect()

    def checkpoint_due(self, version: int) -> bool:
        """By checkpoint.every; and where the run will go back to: it only reaches that again because the checkpoint
        that was there is damaged or gone, and without it would go back for ever."""
        every, back = self.settings.checkpoint.every, self.guard.rollback
        return bool(every and version % every == 0) or (back is not None and version == back.to)

    def before_write(self) -> None:
        """Wait until nobody reads the weights any more."""
        self.publication.before_write()
        if self.saving is not None:
            self.saving.before_write()

    def checkpoint(self) -> None:
        """Begin to save everything a step depends on, unless that is saved already; `finish_checkpoint` ends it."""
        version = self.learner.version
        if version == self.saved:
            return
        self.finish_checkpoint()
        started = time.monotonic()
        self.inbox.activity.now(f"checkpoint {version}")
        here = lies_here(self.learner)
        if not here:
            self.record_weights("hash", weights_hash(self.team.weights(self.learner)))
        for rows in (self.folder.metrics, self.folder.weights):
            to_disk(rows)  # the rows of a checkpoint's steps must not be missing behind it
        keep, spared = self.settings.checkpoint.keep, self.guard.protected_checkpoint()
        try:
            partial = write_checkpoint(
                self.folder.checkpoints, self.learner, self.progress(), source=self.source, team=self.team
            )
        except (OSError, SafetensorError) as error:
            raise self.not_written(version, error) from None
        self.saved = version

        def record_hash(value: str) -> None:
            self.record_weights("hash", value, version)
            to_disk(self.folder.weights)

        self.saving = Saving(
            partial=partial,
            version=version,
            stood_still_s=time.monotonic() - started,
            weights=list(self.learner.full_weights()) if here else (),
            record_hash=record_hash,
            tidy=lambda: delete_old(self.folder.checkpoints, keep=keep, spared=spared),
        ).begin()

    def finish_checkpoint(self) -> None:
        """Wait for the checkpoint that is being finished, if any, then tell the buffer that its steps are not done
        again."""
        saving, self.saving = self.saving, None
        if saving is None:
            return
        try:
            saving.wait(self.team.keepalive)
        except (OSError, SafetensorError) as error:
            raise self.not_written(saving.version, error) from None
        oldest = version_of(list_checkpoints(self.folder.checkpoints)[0])
        self.inbox.send(msg.Checkpointed(version=saving.version, oldest=oldest))
        self.folder.record(
            CheckpointSaved(
                version=saving.version,
                path=str(saving.partial.final),
                seconds=round(saving.stood_still_s, 4),
                beside=round(time.monotonic() - saving.began, 4),
            )
        )

    def not_written(self, version: int, error: Exception) -> RunFailed:
        return RunFailed(
            f"the checkpoint of version {version} cannot be written to {self.folder.checkpoints} "
            f"({getattr(error, 'strerror', None) or error}); make room there and resume the run"
        )

    def progress(self) -> dict[str, Any]:
        """What a checkpoint keeps of this loop."""
        return {
            "evaluations_asked": self.evaluations_asked,
            "pending_evaluation": self.pending_evaluation,
            "reward_first": self.reward_first,
            "rewards_first": list(self.rewards_first),
            "seconds": self.seconds(),
        }

    def check_initial(self) -> None:
        """The model the run began with, known by its hash, is also its reference and where a replay begins."""
        known = recorded_hash(self.folder, 0)
        if not known:
            self.record_weights("hash", self.initial_hash)
        elif known != self.initial_hash:
            raise UserError(
                f"model.path: {self.source} holds other weights than when the run began; put those back, or start "
                f"a new run from a checkpoint of this one (model.path={self.folder.checkpoints}/step_...)"
            )

    def record_weights(self, kind: str, value: str, version: int | None = None) -> None:
        """So that a replay finds the step at which it differs. `kind`: "hash" or "checksum"; `version`: None: the
        learner's."""
        append_row(self.folder.weights, {"version": self.learner.version if version is None else version, kind: value})

    @property
    def size_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.learner.model.parameters())

    def seconds(self) -> float:
        """Training time of the run so far."""
        return self.seconds_before + time.monotonic() - self.started

    def ask_evaluation(self) -> int:
        """Ask for held-out episodes under the newest weights; generation goes on."""
        number = self.evaluations_asked
        self.evaluations_asked += 1
        self.send_evaluation(number)
        return number

    def send_evaluation(self, number: int) -> None:
        settings = self.settings.evaluation
        self.inbox.send(
            msg.Evaluate(
                evaluation=number,
                version=self.learner.version,
                problems=choose_held_out(settings.problems, self.eval_problems, settings.choice),
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
                reward=mean_judged(result.rewards),
                trajectories=len(result.rewards),
                failed=len(result.rewards) - len(judged(result.rewards)),
                failures=result.failures,
                parts=result.parts,
                version_min=result.version_min,
                version_max=result.version_max,
            )
        )


def check_judged(result: msg.EvaluationResult) -> None:
    """Raises RunFailed when every episode of an evaluation failed."""
    if result.rewards and not judged(result.rewards):
        raise RunFailed(
            f"all {len(result.rewards)} held-out episodes of evaluation {result.evaluation} failed: "
            f"{'; '.join(result.failures)}; mend the task or the reward and resume the run"
        )


def _lag_split(trajectories: Sequence[Trajectory], step: int) -> dict[str, float]:
    """Staleness by where it arose, mean over trajectories: while in flight (weights changed during the
    episode) and after its last token (queue and training)."""
    sampled = [t for t in trajectories if t.version_min >= 0 and not t.failed]
    if not sampled:
        return {"lag/flight": 0.0, "lag/queue": 0.0}
    return {
        "lag/flight": sum(float(t.version_max - t.version_min) for t in sampled) / len(sampled),
        "lag/queue": sum(float(step - t.version_max) for t in sampled) / len(sampled),
    }


def _part_means(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Named parts of the rewards and numbers that were noted, each as its mean over the trajectories that have it."""
    good = [t for t in trajectories if not t.failed]
    parts, notes = part_means(parts_in(t.info) for t in good), part_means(notes_in(t.info) for t in good)
    return {
        **{f"{PREFIX}{name}/mean": value for name, value in parts.items()},
        **{f"note/{name}/mean": value for name, value in notes.items()},
    }


def failed_since(before: Mapping[str, Any], now: msg.BufferCounters) -> dict[str, Any]:
    """The share of the episodes that arrived since the row `before` and failed, and the reason of the newest."""
    arrived = now.trajectories_arrived - before.get("episodes/arrived", 0.0)
    failed = now.trajectories_failed - before.get("episodes/failed_total", 0.0)
    if arrived <= 0:
        return {}
    columns: dict[str, Any] = {"episodes/failed": min(1.0, max(0.0, failed) / arrived)}
    if failed > 0 and now.last_failure:
        columns["episodes/failure"] = now.last_failure
    return columns


def follow(settings: Settings, learner: Learner, activity: Activity) -> None:
    """What a rank does that does not lead: its share of whatever the leader orders, until the run is done.

    Raises RunFailed when the leader is gone."""
    ranks, shards, tidying = learner.ranks, HeldShards(learner=learner), Tidying()
    activity.now(WAITING)
    while True:
        match receive_order(ranks):
            case Train(step=step, trajectories=trajectories):
                activity.now(f"training step {step}")
                waited = ranks.waited_s
                learner.step(pack_step(settings, trajectories, learner.over, needs=learner.needs))
                wait_metrics(ranks, waited)
                tidying.round(time.monotonic())
            case Gather():
                activity.now(f"gathering version {learner.version}")
                for _ in learner.full_weights():
                    pass  # they count on the leader
            case Probe(tokens=tokens):
                probe_log_probs(learner.model, tokens, learner.options.arithmetic)
            case Hold(versions=versions):
                shards.hold(versions)
            case Rescore(version=version, most_tokens=most_tokens, wanted=wanted):
                activity.now("verifying trajectories")
                shards.score(version, wanted, most_tokens=most_tokens)
            case Save(folder=folder):
                activity.now(f"checkpoint {learner.version}")
                save_part(folder, learner)
            case KeepAlive():
                pass
            case Finish():
                return
        activity.keepalive(WAITING)
