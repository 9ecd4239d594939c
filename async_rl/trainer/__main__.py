"""The trainer process; started by the launcher."""

from __future__ import annotations

import json
import os
import socket
import sys
from contextlib import ExitStack, closing
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from async_rl.config import Settings
from async_rl.events import TrainerReady
from async_rl.process import (
    GRACE_S,
    RANK,
    adopt_pipes,
    dump_stacks_on_signal,
    exit_with,
    fail,
    process_name,
    run_process,
)
from async_rl.process_spec import TrainerSpec, read_spec
from async_rl.run_folder import RunFolder, replace_text
from async_rl.tidying import freeze_set_up
from async_rl.wire import messages as msg
from async_rl.wire.channel import Dealer
from async_rl.wire.heartbeat import Activity, make_heartbeat
from async_rl.wire.keys import keys_in
from async_rl_kernels import backend

if TYPE_CHECKING:
    from async_rl.trainer.checkpoint import Progress
    from async_rl.trainer.learner import Learner
    from async_rl.trainer.publication import Publication
    from async_rl.trainer.ranks import Ranks
    from async_rl.trainer.team import Team


def train(
    spec: TrainerSpec, folder: RunFolder, settings: Settings, activity: Activity, ranks: Ranks | None = None
) -> None:
    """Build the learner, go on from the checkpoint of `spec.version` (0: from the initial model; the version a run
    went back at: from what it went back to), train. The leader, or the only rank, talks to the buffer, leaves the
    summary and says done; other ranks follow it."""
    from async_rl.task import make_task
    from async_rl.trainer.alarm import Guard, RolledBack
    from async_rl.trainer.build import backend_of
    from async_rl.trainer.canary_watch import make_canary
    from async_rl.trainer.inbox import Inbox, Preempted
    from async_rl.trainer.loop import TrainerLoop, follow
    from async_rl.trainer.mismatch_watch import make_mismatch_watch
    from async_rl.trainer.team import Finish, Team
    from async_rl.trainer.verifier import make_verifier

    activity.now("loading the model")
    begun = begin(folder, settings, spec.version, activity, ranks)
    learner = begun.learner
    if not learner.ranks.leads:
        follow(settings, learner, activity)
        return
    team = Team(learner.ranks)
    task = make_task(settings.task.name, settings.task.args)
    team.keepalive()
    limit = settings.wire.max_message_mb << 20
    with (
        Dealer(spec.endpoint, spec.name, max_message_bytes=limit, keys=keys_in(settings.wire.keys)) as dealer,
        closing(publication_of(spec, folder, settings, learner, team)) as publication,
        ExitStack() as stack,
    ):
        team.keepalive()
        canary = make_canary(settings, learner, task, folder.record, team)
        verifier = None
        if settings.verify.share:
            verifier = make_verifier(
                settings, learner, publication, team=team, run=str(folder.path), send=dealer.send, record=folder.record
            )
            stack.enter_context(closing(verifier))
        inbox = Inbox(dealer, settings.wire.timeout_s, canary, activity, team.keepalive, verifier)
        inbox.send(msg.Hello(role="trainer", name=spec.name, pid=os.getpid()))
        loop = TrainerLoop(
            settings=settings,
            folder=folder,
            learner=learner,
            inbox=inbox,
            canary=canary,
            publication=publication,
            verifier=verifier,
            team=team,
            source=Path(settings.model.path),
            eval_problems=len(task.problems("eval")),
            initial_hash=begun.initial_hash,
            guard=Guard(settings.guard, folder),
            mismatch=make_mismatch_watch(settings),
        )
        if begun.progress is not None:
            loop.resume(begun.progress, saved=begun.saved)
        kernels, attention = backend(settings.trainer.device), backend_of(settings)
        folder.record(TrainerReady(weights_bytes=learner.sent_bytes, kernels=kernels, attention=attention))
        dump_stacks_on_signal()  # the model's libraries are loaded
        freeze_set_up()
        try:
            summary = loop.run()
        except (RolledBack, Preempted):  # the launcher starts the run again from there, or ends it
            team.send(Finish())
            return
        team.send(Finish())
        replace_text(folder.summary, json.dumps(summary.to_dict(), indent=2) + "\n")
        dealer.send(msg.Done())


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """Where training begins, on any rank."""

    learner: Learner
    progress: Progress | None
    """what the loop remembers; None: a new run"""
    saved: int
    """version of the checkpoint it was read from"""
    initial_hash: str
    """of the model the run began with; the leader knows it"""


def begin(folder: RunFolder, settings: Settings, version: int, activity: Activity, ranks: Ranks | None) -> Begun:
    """The learner at `version`. Collective over ranks."""
    import torch

    from async_rl.objective.own import check_recorded
    from async_rl.run_folder import read_rollback
    from async_rl.trainer.build import make_learner
    from async_rl.trainer.checkpoint import load_checkpoint
    from async_rl.trainer.loop import follow
    from async_rl.trainer.manifest import checkpoint_path
    from async_rl.trainer.team import Finish, Team, recorded_hash, weights_hash

    torch.set_num_threads(max(1, settings.trainer.threads))
    if settings.trainer.memory_share < 1:  # generators are on the same GPU
        limit_memory(settings)
    check_recorded(folder.path, str(settings.recipe["name"]))
    learner = make_learner(settings, ranks)
    initial_hash = ""
    if learner.ranks.leads:
        team = Team(learner.ranks)
        initial_hash = weights_hash(team.weights(learner), like=recorded_hash(folder, 0))
        team.send(Finish())
    else:
        follow(settings, learner, activity)
    back = read_rollback(folder)
    there = checkpoint_path(folder.checkpoints, version).exists()
    saved = version if back is None else back.source(version, there=there)
    progress = load_checkpoint(checkpoint_path(folder.checkpoints, saved), learner) if saved else None
    if back is not None and version >= back.at:
        learner.version, learner.given_up, learner.rate_scale = version, back.given_up, back.lr_scale
        progress = progress if saved == version else back.progress
    return Begun(learner=learner, progress=progress, saved=saved, initial_hash=initial_hash)


def publication_of(
    spec: TrainerSpec, folder: RunFolder, settings: Settings, learner: Learner, team: Team
) -> Publication:
    """What hands out this trainer's weights."""
    from async_rl.trainer.publication import make_publication

    to = spec.weights_endpoint
    return make_publication(folder, settings, learner, spec.ways, folder.record, keepalive=team.keepalive, upload_to=to)


def limit_memory(settings: Settings) -> None:
    """To this process's share of the GPU it trains on: the one named, else the current one, which each rank chose."""
    import torch

    number = torch.device(settings.trainer.device).index
    torch.cuda.set_per_process_memory_fraction(settings.trainer.memory_share, number)


def train_as_rank(spec: TrainerSpec, folder: RunFolder, settings: Settings, activity: Activity) -> None:
    """`train`, as one of the ranks of which torchrun's variables tell; alone without them."""
    if RANK not in os.environ:
        train(spec, folder, settings, activity)
        return
    from async_rl.trainer.ranks import join_ranks

    activity.now("waiting for the other ranks")
    with join_ranks(settings.trainer.device, settings.wire.timeout_s) as ranks:
        train(spec, folder, settings, activity, ranks)


def main(spec: TrainerSpec, *, owner: int | None = None) -> None:
    """Train until the run is done; ends this process. `owner`: process number of the launcher, where somebody else
    has started this process; 0: the launcher is on another host."""
    folder = RunFolder(spec.path)
    rank = int(os.environ.get(RANK, "0"))
    spec, outside = replace(spec, name=process_name(rank)), owner is not None
    if owner:
        exit_with(owner, 2 * GRACE_S)
    elif owner is None and spec.agent:
        spec = replace(spec, pipes=adopt_pipes(spec.agent, spec.pipes))
        if rank > 0:
            own_log(folder.logs / f"{spec.name}.log")

    def work() -> None:
        settings, activity = settings_here(folder, spec), Activity()
        watch: dict[str, Any] = {}
        if outside:  # followers say that they live, too, and nobody but these pulses tells them that the run has ended
            watch = {"host": socket.gethostname(), "on_lost": partial(end_with_buffer, spec)}
        with make_heartbeat(
            spec.name,
            "trainer" if rank == 0 else msg.RANK,
            activity,
            settings.wire,
            (spec.endpoint or None) if rank == 0 or outside else None,
            pipe=spec.pipes.pulse,
            agent=spec.agent,
            **watch,
        ):
            train_as_rank(spec, folder, settings, activity)

    run_process(spec, work, from_outside=outside)


def settings_here(folder: RunFolder, spec: TrainerSpec) -> Settings:
    """The run's settings, with the keys of this host."""
    settings = folder.settings()
    return replace_fields(settings, wire=replace_fields(settings.wire, keys=spec.keys)) if spec.keys else settings


def end_with_buffer(spec: TrainerSpec, why: str) -> None:
    """End this rank, which somebody else has started: nobody else tells it that the run has ended, and the others may
    keep it waiting in a collective. `why`: what the run's buffer does."""
    message = f"the run's buffer at {spec.endpoint} {why}"
    print(f"async-rl: {spec.name}: {message}", file=sys.stderr)
    fail(spec, message)


def own_log(path: Path) -> None:
    """Standard output and error of this process go there from now on, whatever writes to them."""
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log, stream.fileno())
    os.close(log)


if __name__ == "__main__":
    main(read_spec(TrainerSpec))
