"""Where the processor time of a training step goes, from the first sampled token to the metric row, as a table.

    python bench/step.py                                            # the quickstart
    python bench/step.py configs/demo.yaml [--steps N] [name=value ...]     # SmolLM2, once models/smollm2 is there

The parts of a run are put together in this process, one after the other (max_staleness=0, one thread): the engine
plays a batch, a dealer sends it, router, state machine and store take it and form the batch, the trainer trains on it,
publishes, and the engine loads the weights. So every stage is the run's own code, and its share of the step can be
added up; what a run wins by doing it side by side is not in it. Time is the processor's, median over the steps; a
stage inside another one is not counted in that.

- model arithmetic: decode (the engine's forward and what is fed to it), sample, forward, backward, optimizer
- the rest: session (task, tokenizer, episodes), encode and decode of messages, send (sockets), buffer, store, pack,
  objective, publish, load, metrics (row and checksum), and a checkpoint's share

Targets: the rest is at most 10 % of the step at SmolLM2, 35 % at the quickstart.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from async_rl.buffer import loop as buffer_loop
from async_rl.buffer.build import make_core
from async_rl.buffer.core import Core
from async_rl.buffer.store import Store
from async_rl.config import Settings, load_settings
from async_rl.generator.build import make_engine
from async_rl.generator.embedded import EmbeddedEngine
from async_rl.generator.session import make_tickets
from async_rl.model.create import create_model_folder
from async_rl.model.tokenizer import Tokenizer
from async_rl.run.evaluate import Limits, sample_episodes
from async_rl.run_folder import append_row
from async_rl.task import make_task
from async_rl.tidying import freeze_set_up
from async_rl.trainer import learner as learner_module
from async_rl.trainer.build import make_learner
from async_rl.trainer.checkpoint import save_checkpoint
from async_rl.trainer.learner import Learner, Pass
from async_rl.trainer.loop import CHECKSUM_BYTES
from async_rl.trainer.packing import pack_step
from async_rl.trainer.team import weights_checksum
from async_rl.weights.shared_memory import WeightPublisher, WeightReader, segment_path
from async_rl.wire import channel
from async_rl.wire import messages as msg
from async_rl.wire.channel import Dealer, Router, ipc_endpoint
from async_rl.wire.frames import portions

QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"
SKIPPED = 2
"""steps that touch memory first"""
MODEL = ("decode", "sample", "forward", "backward", "optimizer")
REST = ("session", "encode", "send", "buffer", "store", "pack", "objective", "publish", "load", "metrics", "checkpoint")


@dataclass(slots=True)
class Clock:
    """Processor seconds by stage; a stage begun inside another one stops that one's."""

    spent: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    stack: list[str] = field(default_factory=list)
    since: float = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._count()
        self.stack.append(name)
        try:
            yield
        finally:
            self._count()
            self.stack.pop()

    def _count(self) -> None:
        now = time.process_time()
        if self.stack:
            self.spent[self.stack[-1]] += now - self.since
        self.since = now

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return function(*args, **kwargs)

        return timed


def watch(clock: Clock, patches: ExitStack) -> None:
    """Put the clock around what runs inside other stages."""
    for name, owner, attribute in (
        ("decode", EmbeddedEngine, "_step"),
        ("sample", EmbeddedEngine, "_sample"),
        ("forward", Pass, "__init__"),
        ("backward", Pass, "clipped_norm"),
        ("backward", Pass, "backward"),
        ("optimizer", learner_module, "clip_gradient"),
        ("optimizer", learner_module, "step_with"),
        ("encode", channel, "encode"),
        ("encode", channel, "decode"),
        ("buffer", Core, "handle"),
        ("buffer", Core, "tick"),
        ("store", buffer_loop, "write"),
        ("store", Store, "commit"),
        ("store", Store, "load_part"),
    ):
        patches.enter_context(patch.object(owner, attribute, clock.around(name, getattr(owner, attribute))))


@dataclass(slots=True, kw_only=True)
class Parts:
    """A run in one process."""

    settings: Settings
    clock: Clock
    place: Path
    core: Core
    store: Store
    router: Router
    generator: Dealer
    trainer: Dealer
    engine: EmbeddedEngine
    learner: Learner
    publisher: WeightPublisher
    reader: WeightReader
    inbox: dict[bytes, list[msg.Message]] = field(default_factory=lambda: defaultdict(list))
    granted: int = 0

    def pump(self, wanted: type[msg.Message], dealer: Dealer) -> msg.Message:
        """Let the buffer work until `dealer` gets a message of this kind."""
        while True:
            with self.clock.stage("send"):
                effects = buffer_loop.receive(self.router, self.core, 1 << 28)
                buffer_loop.execute(effects, self.store, self.router, lambda _: None, 1 << 28)
                for message in received(dealer):
                    if isinstance(message, wanted):
                        return message

    async def step(self, number: int, task: Any, tokenizer: Tokenizer) -> None:
        clock, chosen = self.clock, self.settings
        with clock.stage("send"):
            self.trainer.send(msg.NextBatch(step=number))
        tickets: list[Any] = []
        while len(tickets) < chosen.batch.groups_per_step * chosen.batch.group_size:
            free = chosen.batch.groups_per_step - len(tickets) // chosen.batch.group_size
            with clock.stage("send"):
                self.generator.send(msg.Want(limit=self.granted + free, version=number))
            permits = self.pump(msg.Permits, self.generator)
            assert isinstance(permits, msg.Permits)
            self.granted = permits.granted
            for permit in permits.permits:
                tickets += make_tickets(permit)
        with clock.stage("session"):
            limits = Limits(max_sequences=chosen.generator.max_sequences)
            episodes = await sample_episodes(self.engine, task, tokenizer, tickets, limits)
        with clock.stage("send"):
            for some in portions(episodes):
                self.generator.send(msg.Finished(trajectories=some))
        batch = self.pump(msg.Batch, self.trainer)
        assert isinstance(batch, msg.Batch)
        with clock.stage("pack"):
            packed = pack_step(chosen, batch.trajectories)
        with clock.stage("objective"):
            report = self.learner.step(packed)
        with clock.stage("publish"):
            self.publisher.publish(self.learner.sent(), self.learner.version)
        with clock.stage("send"):
            self.trainer.send(msg.Published(version=self.learner.version, ess=-1.0))
        with clock.stage("load"):
            await self.engine.load_in_place(self.reader.read_into)
        with clock.stage("send"):
            self.generator.send(msg.Holds(version=self.learner.version))
        with clock.stage("metrics"):
            if sum(p.numel() for p in self.learner.model.parameters()) * 4 <= CHECKSUM_BYTES:
                weights_checksum(self.learner.weights())
            append_row(self.place / "metrics.jsonl", {"step": number, **report.metrics})


def received(dealer: Dealer) -> Iterator[msg.Message]:
    while True:
        try:
            yield dealer.receive(0.001, "nothing")
        except channel.WireTimeout:
            return


async def measured(settings: Settings, place: Path, steps: int) -> dict[str, float]:
    """Median processor seconds of each stage of a step."""
    clock = Clock()
    tokenizer, task = Tokenizer.of(settings.model), make_task(settings.task.name, settings.task.args)
    learner, engine = make_learner(settings), make_engine(settings, tokenizer)
    assert isinstance(engine, EmbeddedEngine)
    endpoint = ipc_endpoint(place, "step")
    core = make_core(settings, train_problems=len(task.problems("train")), vocabulary=0)
    taken: list[dict[str, float]] = []
    with ExitStack() as stack:
        router = stack.enter_context(Router(endpoint))
        store = stack.enter_context(Store(place / "store.sqlite", durability=settings.buffer.durability, create=True))
        generator = stack.enter_context(Dealer(endpoint, "generator-0"))
        trainer = stack.enter_context(Dealer(endpoint, "trainer"))
        publisher = stack.enter_context(WeightPublisher(segment_path(place), learner.sent()))
        reader = WeightReader(segment_path(place))
        publisher.publish(learner.sent(), 0)
        await engine.load_in_place(reader.read_into)
        generator.send(msg.Hello(role="generator", name="generator-0", pid=os.getpid()))
        trainer.send(msg.Hello(role="trainer", name="trainer", pid=os.getpid()))
        trainer.send(msg.Published(version=0, ess=-1.0))
        generator.send(msg.Holds(version=0))
        freeze_set_up()  # as the processes of a run do
        watch(clock, stack)
        parts = Parts(
            settings=settings,
            clock=clock,
            place=place,
            core=core,
            store=store,
            router=router,
            generator=generator,
            trainer=trainer,
            engine=engine,
            learner=learner,
            publisher=publisher,
            reader=reader,
        )
        for number in range(SKIPPED + steps):
            clock.spent.clear()
            await parts.step(number, task, tokenizer)
            taken.append(dict(clock.spent))
        reader.close()
        began = time.process_time()
        save_checkpoint(place / "checkpoints", learner, {}, source=Path(settings.model.path), keep=1)
        checkpoint = time.process_time() - began
        await engine.close()
    found = {name: statistics.median(step.get(name, 0.0) for step in taken[SKIPPED:]) for name in (*MODEL, *REST)}
    found["checkpoint"] = checkpoint / settings.checkpoint.every if settings.checkpoint.every else 0.0
    return found


def table(found: dict[str, float]) -> Iterator[str]:
    whole = sum(found.values())
    yield f"{'stage':12} {'ms':>10} {'share':>7}"
    for title, names in (("model", MODEL), ("rest", REST)):
        for name in names:
            yield f"{name:12} {1e3 * found[name]:10.2f} {found[name] / whole:7.1%}"
        part = sum(found[name] for name in names)
        yield f"{'= ' + title:12} {1e3 * part:10.2f} {part / whole:7.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, default=QUICKSTART)
    parser.add_argument("settings", nargs="*", metavar="name=value")
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    words = ["staleness.max_staleness=0", "staleness.pipeline_depth=1", "buffer.drop_zero_signal=false",
             *arguments.settings]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="step-") as name:
        place = Path(name)
        if arguments.config == QUICKSTART and not any(word.startswith("model.path=") for word in words):
            alphabet = make_task("guess", {}).alphabet  # type: ignore[attr-defined]
            create_model_folder(place / "model", alphabet=alphabet)
            words.append(f"model.path={place / 'model'}")
        settings = load_settings(arguments.config, words)
        settings = replace(settings, trainer=replace(settings.trainer, threads=1))
        found = asyncio.run(measured(settings, place, arguments.steps))
    print("\n".join(table(found)))
    print(json.dumps({name: round(1e3 * seconds, 3) for name, seconds in found.items()}))


if __name__ == "__main__":
    main()
