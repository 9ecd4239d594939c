"""Ask to be let in, make sure of the same problems, generate, leave."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from async_rl import __version__
from async_rl.digest import task_digest
from async_rl.errors import RunFailed, UserError
from async_rl.interrupt import SIGNALS, Interrupted
from async_rl.join.place import Place
from async_rl.join.terms import local_settings
from async_rl.launch.child import arithmetic_environment
from async_rl.launch.preflight import check_device
from async_rl.settings import Settings
from async_rl.trajectory.codec import WireError
from async_rl.weights.shared_memory import WeightsError
from async_rl.wire import messages as msg
from async_rl.wire.channel import AsyncDealer, Dealer, WireTimeout
from async_rl.wire.endpoint import as_reached_by
from async_rl.wire.heartbeat import Activity, make_heartbeat
from async_rl.wire.host import this_host

if TYPE_CHECKING:
    from async_rl.generator.loop import GeneratorLoop
    from async_rl.model.tokenizer import Tokenizer
    from async_rl.task import Task

ANSWER_S = 30.0
"""time the buffer has to answer a knock; it does nothing else that takes long"""
POLL_S = 0.2
LEAVE_S = 3.0
"""time the last words have to leave"""


def own_name() -> str:
    """Unique among the living."""
    host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())[:60] or "host"
    return f"generator-{host}-{os.getpid()}"


def join_run(place: Place, name: str, words: Sequence[str], say: Callable[[str], None]) -> None:
    """Generate for the run at `place` until it ends. `words`: `name=value` for this host. Raises UserError when it
    is not let in or cannot take part, RunFailed when the buffer is gone, Interrupted when told to leave."""
    here = Path.cwd()
    welcome = knock(place, name)
    keys = str(place.keys.folder) if place.keys is not None else ""
    settings = local_settings(welcome.settings, words, keys, here)
    # torch reads these when it is imported
    os.environ.update(arithmetic_environment(settings.generator.threads))
    if welcome.host == this_host() and Path(welcome.folder).is_dir():
        os.chdir(welcome.folder)  # relative paths in the run's settings begin there
    check_device("generator.device", settings.generator.device)
    Joined(place, name, settings, welcome, say).run()


def knock(place: Place, name: str) -> msg.Welcome:
    """Ask to be let in. Raises UserError with the buffer's reason, RunFailed when there is no answer."""
    patience = min(ANSWER_S, place.timeout_s)
    ask = msg.Join(name=name, package=__version__, pid=os.getpid())
    dealer = Dealer(place.endpoint, f"{name}/{uuid.uuid4().hex[:8]}", keys=place.keys)
    deadline = time.monotonic() + patience
    try:
        dealer.send(ask)
        while True:
            try:
                answer = dealer.receive(POLL_S, "an answer")
            except WireTimeout:
                _complain_of(place, dealer, time.monotonic() > deadline, patience)
                continue
            match answer:
                case msg.Welcome():
                    return answer
                case msg.Refused(reason=reason):
                    raise UserError(f"the run at {place.endpoint} refused this generator: {reason}")
    except WireError as error:
        raise UserError(
            f"the run at {place.endpoint} speaks otherwise ({error}); install the version of async-rl it has"
        ) from None
    finally:
        dealer.close(linger_s=0)


def _complain_of(place: Place, dealer: Dealer, late: bool, patience: float) -> None:
    if dealer.reception is not None and dealer.reception.turned_away:
        assert place.keys is not None
        raise UserError(
            f"{place.endpoint} does not take the keys of {place.keys.folder}, or is not the server they are for; copy "
            "server.key, client.key and client.key_secret from the run's wire.keys"
        )
    if late:
        raise RunFailed(f"no answer from {place.endpoint} for {patience:g} s: is a run there, and can it be reached?")


@dataclass(slots=True)
class Joined:
    """A generator that was let in."""

    place: Place
    name: str
    settings: Settings
    welcome: msg.Welcome
    say: Callable[[str], None]
    identity: str = ""
    told: str = ""
    """the signal that told it to leave"""
    activity: Activity = field(default_factory=Activity)

    def run(self) -> None:
        """Until the end, whichever comes."""
        # its own, whatever the name: a socket of the same identity would be cut off
        self.identity = f"{self.name}/{uuid.uuid4().hex[:8]}"
        tokenizer, task = self.same_problems()
        wire, endpoint = self.settings.wire, self.place.endpoint
        with make_heartbeat(
            self.name, "generator", self.activity, wire, endpoint, identity=self.identity
        ) as heartbeat:
            asyncio.run(self._generate(tokenizer, task, lambda: heartbeat.buffer_silent_s))
        if self.told:
            raise Interrupted(self.told)

    def same_problems(self) -> tuple[Tokenizer, Task]:
        """The tokenizer and the task, made here. Raises UserError when they are not the run's."""
        from async_rl.model.folder import check_folder
        from async_rl.model.tokenizer import Tokenizer
        from async_rl.task import make_task

        path = self.settings.model.path
        check_folder(path)
        tokenizer = Tokenizer(path)
        task = make_task(self.settings.task.name, self.settings.task.args)
        if task_digest(task, tokenizer) != self.welcome.task_digest:
            raise UserError(
                f"the problems of task '{task.name}' or their tokens are not those of the run: other data in "
                f"task.args, another tokenizer in model.path={path}, or another version of the task; copy them from "
                "the run's host"
            )
        return tokenizer, task

    async def _generate(self, tokenizer: Tokenizer, task: Task, buffer_silent_s: Callable[[], float]) -> None:
        from async_rl.generator.build import make_engine, make_weights
        from async_rl.generator.loop import GeneratorLoop
        from async_rl.generator.options import make_options

        segment, server = Path(self.welcome.segment), self.weight_server()
        here = self.welcome.host == this_host() and (segment.exists() or not server)
        weights = make_weights(self.settings, segment, server, self.identity, here=here)
        engine = make_engine(self.settings, tokenizer)
        limit = self.settings.wire.max_message_mb << 20
        dealer = AsyncDealer(self.place.endpoint, self.identity, max_message_bytes=limit, keys=self.place.keys)
        try:
            loop = GeneratorLoop(
                make_options(self.settings, self.name, joined=True),
                engine,
                task,
                tokenizer,
                dealer,
                weights,
                activity=self.activity,
                buffer_silent_s=buffer_silent_s,
                event=self.event,
            )
            for number in SIGNALS:
                asyncio.get_running_loop().add_signal_handler(number, self.leave, loop, number)
            self.say(f"{self.name} joins {self.welcome.run} at {self.place.endpoint}; Ctrl-C leaves")
            await loop.run()
            stats = engine.stats()
            self.say(
                f"{'the run has ended: ' + loop.stopped + '; ' if loop.stopped else ''}{self.name} generated "
                f"{stats.tokens_generated} tokens in {loop.episodes} episodes"
            )
            if self.told:
                dealer.close(linger_s=LEAVE_S)
        except WeightsError as error:
            raise RunFailed(f"{self.name}: {error}") from None
        finally:
            weights.close()
            dealer.close(linger_s=0)

    def weight_server(self) -> str:
        """Where it is reached from here; empty: there is none."""
        return as_reached_by(self.welcome.weights, self.place.endpoint) if self.welcome.weights else ""

    def leave(self, loop: GeneratorLoop, number: int) -> None:
        """Told so by a signal; further ones change nothing."""
        if not self.told:
            self.told = signal.Signals(number).name
            loop.leave(f"told to end ({self.told})")

    def event(self, kind: str, **detail: object) -> None:
        """What the launched ones write into events.jsonl."""
        self.say(f"{kind}: {detail.get('text') or detail}")
