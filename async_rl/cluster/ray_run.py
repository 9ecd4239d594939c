"""`cluster.engine=ray`: a run whose processes Ray places, restarts and watches.

The command connects to the cluster, asks for a placement group for the trainer's nodes and one for each generator,
starts an actor for each process (ray_actors.py), shows what the run shows, and decides how many generators there should
be (ray_plan.py). Data goes over ZeroMQ with CURVE keys, as for any run over several machines.

Who waits for whom: the command for Ray to place the run, by `cluster.grows` without end, and for the run's end. When
the command is gone, however it ended, Ray ends the actors, and their processes end in good order.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from async_rl.cluster.ray_actors import Buffer, Generator, TrainerRank
from async_rl.cluster.ray_cluster import End, Placed, RayCluster
from async_rl.cluster.ray_plan import (
    RayPlan,
    Reading,
    Scaler,
    generator_words,
    misfit,
    plan,
    restarts,
    spread_words,
    written,
)
from async_rl.cluster.ray_process import GeneratorOrder, RankOrder, RunOrder
from async_rl.cluster.shipping import ship
from async_rl.config import Settings
from async_rl.errors import RunFailed, UserError
from async_rl.observe.console import Console
from async_rl.process import Interrupted, ignore_interrupts, interruptible, noted_signals
from async_rl.wire.keys import Keys, make_keys

POLL_S = 0.3
READ_S = 1.0
"""between two looks at who waits"""
NOTICE_S = 15.0
"""after which a process that Ray has not placed is told of"""
SETTLE_S = 5.0
"""time a run has to end by itself with its own cause, when a part of it is gone"""
ALONE_S = 60.0
"""time a run has to end when its buffer has told all generators to"""
LEAVE_S = 15.0
"""time a generator has to hand over what it holds"""
LAST_S = 20.0
"""beyond checkpoint.grace_s, time a run has to end when it is told to"""
OURS = ":*"
"""ends the endpoint of a run whose port Ray's node chose"""
CLIENT_KEYS = ("server.key", "client.key", "client.key_secret")
"""what a generator has of the keys"""


@dataclass(slots=True, kw_only=True)
class Seat:
    """A generator that there should be."""

    number: int
    placed: Placed
    actor: Any = None
    """None: Ray has not placed it yet"""
    end: Any = None
    """of its actor: how it ends; None while Ray starts it"""
    probe: Any = None
    """a question to an actor that Ray starts, which it answers when it is there"""
    node: str = ""
    """address of its node"""
    asked: float = 0.0
    told: bool = False
    """the user knows that it waits for room"""
    deaths: int = 0
    leaving: float = 0.0
    """when it was told to leave; 0: it was not"""

    @property
    def name(self) -> str:
        return f"generator-{self.number}"


@dataclass(slots=True, kw_only=True)
class RayRun:
    """One launch of a run on Ray, from start to end."""

    settings: Settings
    path: Path
    """folder of the run, as the user named it"""
    console: Console
    cluster: RayCluster
    plan: RayPlan
    words: list[str]
    """that follow from being spread"""
    generator_words: list[str]
    keys: Mapping[str, bytes]
    resume_words: tuple[str, ...] | None = None
    """of the user, for a run that goes on; None: a new run"""
    accepted: tuple[str, ...] = ()
    quiet: bool = False
    listens: bool = True
    """the buffer's endpoint and keys are chosen for this launch; otherwise they are the user's"""
    marker: Path = Path()
    signals: list[str] = field(default_factory=list)
    """that have come, by name; Ray would turn an exception of ours into a plain KeyboardInterrupt"""
    trainer: Placed | None = None
    buffer: Any = None
    buffer_end: Any = None
    buffer_node: str = ""
    endpoint: str = ""
    ranks: dict[Any, int] = field(default_factory=dict)
    """end of each rank's actor -> its number"""
    rank_actors: list[Any] = field(default_factory=list)
    seats: dict[int, Seat] = field(default_factory=dict)
    next_number: int = 0
    scaler: Scaler | None = None
    read_at: float = 0.0
    alone_since: float = 0.0
    """when a generator ended last that the buffer told to; 0: none did"""

    # ------------------------------------------------------------------ the story

    def run(self) -> Mapping[str, Any]:
        """The run's summary. Raises UserError, RunFailed or Interrupted; all actors are gone then."""
        try:
            self.place_run()
            self.start_run()
            return self.watch()
        except Interrupted as order:
            return self.end_run(order)
        finally:
            self.cluster.end([*self.rank_actors, *(seat.actor for seat in self.seats.values()), self.buffer])

    def place_run(self) -> None:
        """Wait until Ray has placed the trainer's nodes. Raises UserError where no nodes could ever hold the run."""
        self.check_room()
        here = self.cluster.nodes_here() if self.settings.cluster.run_on == "here" else ()
        self.trainer = self.cluster.place(
            f"{self.path.name}/trainer", self.plan.trainer, self.plan.strategy, first_on=here
        )
        asked, told = time.monotonic(), False
        while not self.cluster.is_placed(self.trainer):
            if not told and time.monotonic() - asked > NOTICE_S:
                told = True
                self.console.print(
                    f"waiting for room on the cluster: the trainer needs {written(self.plan.trainer[0])}"
                )
            self.pause()

    def pause(self) -> None:
        """Raises Interrupted when a signal has come."""
        if self.signals:
            raise Interrupted(self.signals[0])
        time.sleep(POLL_S)

    def check_room(self) -> None:
        """Raises UserError where the cluster's nodes, even empty, are too small, unless it grows."""
        if self.settings.cluster.grows:
            return
        nodes = self.cluster.nodes()
        if self.settings.cluster.run_on == "here":
            own = [nodes[node] for node in self.cluster.nodes_here() if node in nodes]
            where = "the buffer with the trainer's first node, on this machine (cluster.run_on=here),"
            remedy = (
                "give the command on another node, set cluster.run_on=anywhere (the run's folder must be on storage "
                "that all nodes see), or lower cluster.trainer_cpus"
            )
            self._refuse(misfit(where, self.plan.trainer[:1], own, remedy))
        grows = "set cluster.grows=true if nodes are added on demand"
        remedy = f"lower cluster.trainer_cpus or cluster.trainer_resources, add a node, or {grows}"
        self._refuse(misfit("the trainer", self.plan.trainer, list(nodes.values()), remedy))
        remedy = f"lower cluster.generator_cpus or cluster.generator_resources, add a node, or {grows}"
        self._refuse(misfit("a generator", [self.plan.generator], list(nodes.values()), remedy))

    def _refuse(self, problem: str) -> None:
        if problem:
            raise UserError(problem)

    def start_run(self) -> None:
        """Start the run's actor, then, when it is ready, ranks and generators."""
        assert self.trainer is not None
        fresh = self.resume_words is None
        order = RunOrder(
            **self.common(),
            path=str(self.path),
            settings=_plain(self.settings) if fresh else None,
            words=(*self.words, *(self.resume_words or ())),
            accepted=self.accepted,
            quiet=self.quiet,
            listens=self.listens,
            grace_s=self.settings.checkpoint.grace_s,
        )
        self.buffer = self.cluster.start(
            Buffer, f"{self.path.name}/buffer", self.trainer, 0, {"CPU": 1.0}, order, dict(self.keys), str(self.marker)
        )
        self.buffer_end = self.buffer.ended.remote()
        look: Mapping[str, Any] = {}
        while not self.endpoint:
            look = self.look()
            if look["refused"]:
                raise UserError(self.unseen(look))
            self.endpoint, self.buffer_node = look["endpoint"], look["ip"]
            if look["over"]:
                self.result()
            self.pause()
        self.start_ranks(look["ip"])
        for _ in range(self.plan.fewest):
            self.add_generator()
        if self.plan.most > self.plan.fewest:
            chosen = self.settings.cluster
            self.scaler = Scaler(
                fewest=self.plan.fewest, most=self.plan.most, scale_s=chosen.scale_s, wanted=self.plan.fewest
            )

    def unseen(self, look: Mapping[str, Any]) -> str:
        """That the buffer's node does not see the run's folder."""
        chosen = self.settings.cluster.run_on
        either = (
            "set cluster.run_on=here"
            if chosen == "anywhere"
            else "give this machine's other nodes, of the same host name, the files that it sees"
        )
        return (
            f"Ray placed the buffer on {look['ip']} (cluster.run_on={chosen}), but {look['refused']}; put the run's "
            f"folder on storage that every node sees (--run-dir), or {either}"
        )

    def common(self) -> dict[str, Any]:
        return {"parent": 0, "directory": os.getcwd(), "keys": "", "outcome": ""}

    def start_ranks(self, address: str) -> None:
        assert self.trainer is not None
        size, per_node = self.settings.trainer.ranks, self.plan.ranks_per_node
        one_node = per_node == size
        address = "127.0.0.1" if one_node else address
        port = self.cluster.get(self.buffer.port.remote(address)) if size > 1 else 0
        for rank in range(size):
            environment = {
                "RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_RANK": "0",  # of the GPUs that Ray gives it, it sees its own alone
                "MASTER_ADDR": address,
                "MASTER_PORT": str(port),
                **({"GLOO_SOCKET_IFNAME": "lo"} if one_node else {}),
            }
            order = RankOrder(**self.common(), path=str(self.path), environment=environment if size > 1 else {})
            actor = self.cluster.start(
                TrainerRank,
                f"{self.path.name}/trainer-{rank}",
                self.trainer,
                rank // per_node,
                self.plan.rank,
                order,
                dict(self.keys),
            )
            self.rank_actors.append(actor)
            self.ranks[actor.ended.remote()] = rank

    # ------------------------------------------------------------------ generators

    def add_generator(self) -> None:
        """Ask Ray for room for one more."""
        number, self.next_number = self.next_number, self.next_number + 1
        placed = self.cluster.place(f"{self.path.name}/generator-{number}", [self.plan.generator], "PACK")
        self.seats[number] = Seat(number=number, placed=placed, asked=time.monotonic())

    def start_placed(self) -> None:
        """Start the generators for which there is room now."""
        for seat in self.seats.values():
            if seat.actor is not None:
                continue
            if not self.cluster.is_placed(seat.placed):
                if not seat.told and time.monotonic() - seat.asked > NOTICE_S:
                    seat.told = True
                    self.console.print(f"{seat.name} waits for room on the cluster: {written(self.plan.generator)}")
                continue
            order = GeneratorOrder(
                **self.common(), name=f"ray-{seat.name}", endpoint=self.endpoint, words=tuple(self.generator_words)
            )
            mine = {name: self.keys[name] for name in CLIENT_KEYS}
            seat.actor = self.cluster.start(
                Generator,
                f"{self.path.name}/{seat.name}",
                seat.placed,
                0,
                {name: amount for name, amount in self.plan.generator.items() if name in ("CPU", "GPU")},
                order,
                mine,
                list(order.words),
                max_restarts=restarts(self.settings),
            )
            seat.probe = seat.actor.where.remote()

    def look_after(self) -> None:
        """Take note of generators that ended. Raises UserError or RunFailed where the run cannot go on."""
        for seat in list(self.seats.values()):
            waited_for = seat.probe if seat.probe is not None else seat.end
            if waited_for is not None and self.cluster.is_ready(waited_for):
                self.take_in(seat, self.cluster.how_it_ended(waited_for))
            elif seat.leaving and time.monotonic() - seat.leaving > LEAVE_S:
                self.retire(seat)

    def take_in(self, seat: Seat, found: End) -> None:
        """What a generator's actor answered, or that it is gone."""
        if found.restarted and not seat.leaving:
            if seat.probe is None:
                seat.deaths += 1
                self.console.print(
                    f"{seat.name} on {seat.node} is gone (its process, or its node); Ray starts it again where there "
                    f"is room (death {seat.deaths}; {restarts(self.settings)} restarts are allowed)"
                )
            seat.probe = seat.actor.where.remote()
            return
        if seat.probe is not None and found.answer is not None:
            seat.node, seat.probe, seat.end = found.answer["ip"], None, seat.actor.ended.remote()
            return
        self.retire(seat)
        self.judge(seat, found.answer, found.reason)

    def judge(self, seat: Seat, answer: Mapping[str, Any] | None, reason: str) -> None:
        """What the end of a generator means that is not started again."""
        if seat.leaving:
            return
        if answer is None:
            self.settle()
            raise RunFailed(
                f"{seat.name} died {seat.deaths + 1} times (generator.max_restarts={restarts(self.settings)}, on Ray "
                f"counted over the whole run); the last time: {reason}"
            )
        if answer["kind"] == "user":
            raise UserError(f"{seat.name}, on {answer['ip']}: {answer['message']}")
        self.alone_since = time.monotonic()  # the buffer told it to end: the run ends, or it was proven to lie

    def check_alone(self) -> None:
        """Raises RunFailed when all generators have ended and the run goes on."""
        if not self.seats and self.alone_since and time.monotonic() - self.alone_since > ALONE_S:
            raise RunFailed("all generators were told to end, and the run did not end; events.jsonl says why")

    def retire(self, seat: Seat) -> None:
        """Give its room back."""
        del self.seats[seat.number]
        self.cluster.end([seat.actor], [seat.placed])

    def scale(self) -> None:
        """Add or take away generators, by who waited for whom."""
        if self.scaler is None or time.monotonic() - self.read_at < READ_S:
            return
        self.read_at = time.monotonic()
        staying = [seat for seat in self.seats.values() if not seat.leaving]
        if any(seat.actor is None for seat in staying):
            return  # those that were asked for have no room yet
        found = self.cluster.get(self.buffer.waits.remote(anew=False))
        read = Reading(**found)
        decision = self.scaler.decide(read, time.monotonic())
        if self.scaler.is_over(read):
            self.cluster.get(self.buffer.waits.remote(anew=True))
        difference = decision.wanted - len(staying)
        if decision.reason:
            self.console.print(f"generators {len(staying)} -> {decision.wanted}: {decision.reason}")
        for _ in range(difference):
            self.add_generator()
        for seat in sorted(staying, key=lambda seat: seat.number)[::-1][: max(0, -difference)]:
            seat.leaving = time.monotonic()
            seat.actor.signal.remote(int(signal.SIGTERM))

    # ------------------------------------------------------------------ the run itself

    def watch(self) -> Mapping[str, Any]:
        """Until the run has ended: its summary. Raises what ended it."""
        while True:
            if self.look()["over"]:
                return self.result()
            self.start_placed()
            self.look_after()
            self.check_alone()
            self.look_after_ranks()
            self.scale()
            self.pause()

    def look(self) -> Mapping[str, Any]:
        """Show what the run shows. Raises RunFailed where its actor is gone."""
        found = self.cluster.how_it_ended(self.buffer.look.remote())
        if found.answer is None:
            raise RunFailed(
                f"the node of the buffer, {self.buffer_node or 'this one'}, or its actor died: {found.reason}"
            )
        for line in found.answer["lines"]:
            self.console.print(line)
        return found.answer

    def look_after_ranks(self) -> None:
        """Raises RunFailed when a rank ended before its time, if the run does not say why itself."""
        for end, rank in list(self.ranks.items()):
            if not self.cluster.is_ready(end):
                continue
            del self.ranks[end]
            found = self.cluster.how_it_ended(end)
            if found.answer is not None and found.answer["code"] == 0:
                continue
            self.settle()
            reason = found.answer["message"] if found.answer is not None else found.reason
            if found.answer is not None and found.answer["kind"] == "user":
                raise UserError(f"trainer-{rank}, on {found.answer['ip']}: {reason}")
            raise RunFailed(f"trainer-{rank} ended before the run did: {reason}")

    def settle(self) -> None:
        """Give the run a little time to end by itself. Raises its own cause."""
        deadline = time.monotonic() + SETTLE_S
        while time.monotonic() < deadline:
            if self.look()["over"]:
                self.result()
                return
            self.pause()

    def result(self) -> Mapping[str, Any]:
        """What the run's process left: the summary. Raises its cause."""
        found = self.cluster.how_it_ended(self.buffer_end)
        with suppress(RunFailed):
            self.look()  # its last lines
        if found.answer is None:
            raise RunFailed(f"the actor of the buffer died: {found.reason}")
        message, kind = str(found.answer["message"]), found.answer["kind"]
        if kind == "user":
            raise UserError(message)
        if kind == "interrupted":
            raise Interrupted(message)
        if kind != "done":
            raise RunFailed(message)
        summary: Mapping[str, Any] = found.answer["summary"]
        return summary

    def end_run(self, order: Interrupted) -> Mapping[str, Any]:
        """Have the run end as on the same signal; a further signal ends it at once. Raises Interrupted, or what the run
        says."""
        if self.buffer is None:
            raise order
        number = int(signal.Signals[str(order)])
        self.buffer.signal.remote(number)
        deadline = time.monotonic() + self.settings.checkpoint.grace_s + LAST_S
        told = 1
        while time.monotonic() < deadline:
            if self.look()["over"]:
                return self.result()
            if len(self.signals) > told:
                told = len(self.signals)
                self.buffer.signal.remote(number)
            time.sleep(POLL_S)
        raise order


def _plain(settings: Settings) -> dict[str, Any]:
    return asdict(settings)


# ------------------------------------------------------------------------------------------------ start and resume


def run_on_ray(settings: Settings, path: Path, *, console: Console, quiet: bool = False) -> Mapping[str, Any]:
    """Run `settings` in the new run folder `path`, on Ray; the summary. Raises as `run_training` does."""
    return _on_ray(settings, path, console=console, quiet=quiet, resume_words=None, accepted=())


def resume_on_ray(
    settings: Settings,
    path: Path,
    words: Sequence[str],
    *,
    console: Console,
    accepted: Sequence[str] = (),
    quiet: bool = False,
) -> Mapping[str, Any]:
    """Go on with the run in `path`, on Ray. `settings`: of the run with the user's `words`."""
    return _on_ray(settings, path, console=console, quiet=quiet, resume_words=tuple(words), accepted=tuple(accepted))


def _on_ray(
    settings: Settings,
    path: Path,
    *,
    console: Console,
    quiet: bool,
    resume_words: tuple[str, ...] | None,
    accepted: tuple[str, ...],
) -> Mapping[str, Any]:
    with interruptible():
        scratch = Path(tempfile.mkdtemp(prefix="async-rl-ray-"))
        marker = path.absolute().parent / f".{path.name}.{os.getpid()}.seen"
        try:
            wanted = plan(settings)
            shipped = ship(settings, _made(scratch / "shipped"))
            words, notes = spread_words(settings, resumed=resume_words is not None)
            listens = settings.wire.endpoint == "auto" or settings.wire.endpoint.endswith(OURS)
            keys = _keys(make_keys(scratch / "keys") if listens else Keys(Path(settings.wire.keys)))
            path.absolute().parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
            for note in [*notes, *shipped.notes]:
                console.print(f"note: {note}")
            with (
                noted_signals() as signals,
                closing(RayCluster.connect(settings.cluster.address, shipped.folder)) as cluster,
            ):
                return RayRun(
                    settings=settings,
                    path=path,
                    console=console,
                    cluster=cluster,
                    plan=wanted,
                    words=words,
                    generator_words=[*generator_words(settings), *shipped.words],
                    keys=keys,
                    resume_words=resume_words,
                    accepted=accepted,
                    quiet=quiet,
                    listens=listens,
                    marker=marker,
                    signals=signals,
                ).run()
        except Interrupted:
            ignore_interrupts()
            raise
        finally:
            marker.unlink(missing_ok=True)
            shutil.rmtree(scratch, ignore_errors=True)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _keys(keys: Keys) -> dict[str, bytes]:
    """The files of the folder, for actors to have a copy of. Raises UserError for keys that are not there."""
    keys.server()
    return {file.name: file.read_bytes() for file in keys.folder.iterdir() if file.suffix.startswith(".key")}
