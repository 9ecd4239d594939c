"""`async-rl generate`: a generator that joins a run which goes on elsewhere.

It finds the run, asks its buffer to be let in, makes sure that it works on the same problems, generates, and leaves.

Who waits for whom: it waits for the buffer, by deadline; the buffer does not wait for it.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from async_rl.config import Settings, WireSettings, check
from async_rl.config.imports import NAMING_SETTINGS
from async_rl.config.schema import structured, values_of, with_overrides
from async_rl.config.sources import Source, changed_sources, sources_of
from async_rl.errors import RunFailed, UserError, nearest
from async_rl.events import BufferReady, Event, ProcessStarted, StallReported, TrainerAwaited
from async_rl.generator.step_mark import StepMark
from async_rl.process import SIGNALS, Interrupted, dump_stacks_on_signal
from async_rl.process_spec import NO_PIPE
from async_rl.run.child import arithmetic_environment
from async_rl.run.placement import threads_here
from async_rl.run.preflight import check_device, task_digest
from async_rl.run_folder import RunFolder
from async_rl.tidying import freeze_set_up
from async_rl.trajectory.codec import WireError
from async_rl.version import __version__
from async_rl.weights.shared_memory import WeightsError
from async_rl.wire import messages as msg
from async_rl.wire.channel import AsyncDealer, Dealer, WireTimeout, ipc_endpoint
from async_rl.wire.endpoint import as_reached_by, as_reached_from_here, is_tcp, this_host
from async_rl.wire.heartbeat import Activity, make_heartbeat
from async_rl.wire.keys import Keys

if TYPE_CHECKING:
    from async_rl.generator.loop import GeneratorLoop
    from async_rl.model.tokenizer import Tokenizer
    from async_rl.task import Task


FOLDER_POLL_S = 0.1
"""how often the folder of a run that is being started is read"""
ANSWER_S = 30.0
"""time the buffer has to answer the request to join; it does nothing else that takes long"""
POLL_S = 0.2
LEAVE_S = 3.0
"""time the last messages have to leave"""
MAY_DIFFER = (
    "generator.device",
    "generator.threads",
    "generator.max_sequences",
    "generator.task_processes",
    "generator.kv_cache_mb",
    "generator.save_turns_after_s",
    "generator.episode_timeout_s",
    "generator.task_timeout_s",
    "vllm.tensor_parallel",
    "vllm.memory_share",
    "vllm.kv_cache_mb",
    "model.path",
    "weights.transport",
    "weights.relay",
    "wire.timeout_s",
)
"""settings of what this host can do, and of where things lie on it; all others say what a trajectory is"""
NOTHING_HERE = ("generator.count", "generator.gpus", "generator.max_restarts", "generator.restart_window_s")
"""settings of the generators that the launcher starts"""
FILES = "task.args."
"""settings of the task, of which those that name a file may differ"""


# ------------------------------------------------------------------------------------------------ finding the run


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinTarget:
    """Where the run is that is to be joined. Example: `JoinTarget(endpoint="tcp://10.0.0.3:5555",
    keys=Keys(Path("keys")), timeout_s=120.0)`."""

    endpoint: str
    keys: Keys | None
    timeout_s: float
    """longest wait for the buffer"""


def find_target(endpoint: str | None, run: Path | None, keys: Path | None) -> JoinTarget:
    """The run that the user named by its endpoint or its folder. Waits for a run that is being started. Raises
    UserError, RunFailed."""
    if endpoint is None and run is None:
        raise UserError("name the run to join: --run RUN for one on this host, or --connect tcp://HOST:PORT --keys DIR")
    chosen = Keys(keys.absolute()) if keys is not None else None
    timeout_s = WireSettings().timeout_s
    if run is not None:
        folder = RunFolder.open(run)
        wire = folder.settings().wire
        timeout_s = wire.timeout_s
        endpoint = endpoint or endpoint_of(folder, timeout_s)
        if chosen is None and wire.keys and is_tcp(endpoint):
            chosen = Keys(Path(wire.keys).absolute())
    assert endpoint is not None
    if is_tcp(endpoint) and chosen is None:
        raise UserError(f"{endpoint} is served with keys only; name their folder with --keys DIR")
    if not is_tcp(endpoint) and keys is not None:
        raise UserError(f"--keys does nothing with {endpoint}: keys are for tcp; leave it out")
    return JoinTarget(endpoint=as_reached_from_here(endpoint), keys=chosen, timeout_s=timeout_s)


def endpoint_of(folder: RunFolder, timeout_s: float) -> str:
    """Where the buffer of the run in this folder listens. Raises UserError when nobody runs it."""
    deadline = time.monotonic() + timeout_s
    while True:
        if folder.summary.exists():
            raise UserError(f"{folder.path}: this run is finished; there is nothing to join")
        if not launched(folder):
            raise UserError(f"{folder.path}: nobody runs it now; `async-rl run --resume {folder.path}` goes on with it")
        found = ""
        for row in folder.read_events():
            match row.event:
                case ProcessStarted(process="buffer"):
                    found = ""  # of a launch before
                case BufferReady(endpoint=endpoint):
                    found = endpoint
        if found:
            # a folder that is reached by another path here has its socket at that path, too
            return ipc_endpoint(folder.path) if found.endswith("/buffer.sock") else found
        if time.monotonic() > deadline:
            raise RunFailed(f"waited {timeout_s:g} s (wire.timeout_s) for the buffer of {folder.path} to start")
        time.sleep(FOLDER_POLL_S)


def awaited_trainer(folder: RunFolder, settings: Settings) -> TrainerAwaited:
    """The event in which the run describes the trainer that it waits for. Waits for a run that is being started;
    raises UserError when the run waits for no trainer."""
    if settings.trainer.start != "external":
        raise UserError(
            f"{folder.path}: this run starts its trainer itself; with trainer.start=external it waits for one"
        )
    deadline = time.monotonic() + settings.wire.timeout_s
    while True:
        if folder.summary.exists():
            raise UserError(f"{folder.path}: this run is finished; there is nothing to train")
        wanted: TrainerAwaited | None = None
        for row in folder.read_events():
            match row.event:
                case ProcessStarted(process="buffer"):
                    wanted = None  # of a launch before
                case TrainerAwaited() as event:
                    wanted = event
        elsewhere = wanted is not None and wanted.host != this_host()
        if not elsewhere and not launched(folder):
            raise UserError(f"{folder.path}: nobody runs it now; `async-rl run --resume {folder.path}` goes on with it")
        if wanted is not None:
            return wanted
        if time.monotonic() > deadline:
            waited = f"waited {settings.wire.timeout_s:g} s (wire.timeout_s)"
            raise RunFailed(f"{waited} for the run in {folder.path} to want a trainer")
        time.sleep(FOLDER_POLL_S)


def launched(folder: RunFolder) -> bool:
    """Whether the launcher that took the run's lock last is alive, on this host."""
    return launcher_pid(folder) > 0


def launcher_pid(folder: RunFolder) -> int:
    """Process number of that launcher; 0 when it is not alive, or not on this host."""
    try:
        owner = folder.lock.read_text().strip()
    except OSError:
        return 0
    return int(owner) if owner.isdecimal() and Path(f"/proc/{owner}").exists() else 0


# ------------------------------------------------------------------------------------------------ its settings


def local_settings(told: Mapping[str, Any], words: Sequence[str], keys: str, here: Path) -> Settings:
    """The run's settings `told`, with `name=value` words laid over them. `keys`: folder of this host's keys; `here`:
    where relative paths in words begin. Raises UserError for a word that would make this another run."""
    base = structured(Settings, _with_keys(told, keys), where="")
    values = values_of(base)
    laid = [_allowed(word, base, values, here) for word in words]
    settings = structured(Settings, with_overrides(_with_keys(told, keys), laid), where="")
    if settings.generator.max_sequences > base.generator.max_sequences:
        raise UserError(
            f"generator.max_sequences is {settings.generator.max_sequences}, but the run's generators decode at most "
            f"{base.generator.max_sequences} each; start a second one here instead"
        )
    check(settings)
    return settings


def _with_keys(told: Mapping[str, Any], keys: str) -> dict[str, Any]:
    """The settings with this host's keys, and without the GPUs of the run's own generators."""
    generator = {**told.get("generator", {}), "gpus": ""}
    return {**told, "generator": generator, "wire": {**told.get("wire", {}), "keys": keys}}


def _allowed(word: str, base: Settings, values: Mapping[str, Any], here: Path) -> str:
    """The word, its path made absolute. Raises UserError."""
    name, equals, value = word.partition("=")
    if not equals or not name:
        raise UserError(f"'{word}' is not a setting; write name=value, e.g. generator.threads=2")
    if name in NAMING_SETTINGS and ".py:" in value:
        return _own_code(name, value, base, here)
    if name.startswith(FILES):
        return _file(name, value, base.task.args, here)
    if name in NOTHING_HERE:
        raise UserError(f"{name} does nothing here: it is for the generators that the launcher starts; leave it out")
    if name in MAY_DIFFER:
        there = name == "model.path" and (here / value).exists()
        return f"{name}={(here / value).resolve()}" if there else word
    if name not in values and name.partition(".")[0] not in ("task", "recipe"):
        raise UserError(f"{name} is not a setting; {nearest(name, MAY_DIFFER)}")
    raise UserError(
        f"{name} is the run's ({values.get(name, 'chosen there')!r}): it says what is generated, so it cannot differ "
        f"here. What may: {', '.join(MAY_DIFFER)}, and files in {FILES}*"
    )


def _file(name: str, value: str, args: Mapping[str, Any], here: Path) -> str:
    """A setting of the task may say where a file lies on this host, and nothing else."""
    if not isinstance(args.get(name.removeprefix(FILES)), str):
        raise UserError(f"{name} is the run's: of the task's settings only those that name a file may differ here")
    path = here / Path(value).expanduser()
    if not path.exists():
        raise UserError(f"{name}: there is no file {path}; of the task's settings only those that name one may differ")
    return f"{name}={path.resolve()}"


def _own_code(name: str, value: str, base: Settings, here: Path) -> str:
    """A setting that names an object may say in which file it lies on this host; which object stays the run's, and
    `check_sources` makes sure that the file is the same."""
    *groups, last = name.split(".")
    told: Any = {"task": {"name": base.task.name, "args": base.task.args}, "recipe": base.recipe}
    for group in groups:
        told = told.get(group, {})
    file, _, found = value.rpartition(":")
    if not isinstance(told.get(last), str) or told[last].rpartition(":")[2] != found:
        raise UserError(f"{name} is the run's ({told.get(last)!r}): only the file in which it lies may differ here")
    if not (here / Path(file).expanduser()).is_file():
        raise UserError(f"{name}: there is no file {here / file}")
    return f"{name}={(here / Path(file).expanduser()).resolve()}:{found}"


def check_sources(settings: Settings, welcome: msg.Welcome) -> None:
    """Refuse to generate with other code than the run's. Raises UserError for a file of the user's own that is missing
    here or differs."""
    recorded = [Source(**source) for source in welcome.sources]
    try:
        found = sources_of(settings)
    except UserError as error:
        raise UserError(
            f"{error}; the run uses it: copy it from {welcome.host}, or say where it lies here, e.g. "
            "task.name=path/file.py:Class"
        ) from None
    for source in changed_sources(recorded, found):
        raise UserError(
            f"{source.setting} '{source.name}' differs from the run's: {source.file} on {welcome.host} has blake2b "
            f"{source.digest[:12]}; copy that file to this host"
        )


# ------------------------------------------------------------------------------------------------ joining


def default_name() -> str:
    """A name that no other living generator has."""
    host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())[:60] or "host"
    return f"generator-{host}-{os.getpid()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Traces:
    """What a generator leaves for the process beside it (run/keeper.py)."""

    marks: Path
    """file of its marks (generator/step_mark.py)"""
    stacks: Path
    """file of the stacks of its threads"""
    pulse: int
    """end of a pipe for its pulses"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """A generator that was let in."""

    target: JoinTarget
    name: str
    identity: str
    """of its socket: unique, whatever the name; a second socket of the same identity would be cut off"""
    settings: Settings
    welcome: msg.Welcome


def admitted(target: JoinTarget, name: str, words: Sequence[str]) -> Admitted:
    """Ask to be let into the run at `target`. `words`: `name=value` for this host. Raises UserError when it is not let
    in or a word would make this another run, RunFailed when the buffer is gone."""
    welcome = request_join(target, name)
    keys = str(target.keys.folder) if target.keys is not None else ""
    settings = local_settings(welcome.settings, words, keys, Path.cwd())
    identity = f"{name}/{uuid.uuid4().hex[:8]}"
    return Admitted(target=target, name=name, identity=identity, settings=settings, welcome=welcome)


def join_run(target: JoinTarget, name: str, words: Sequence[str], log: Callable[[str], None]) -> None:
    """`admitted` and `generate_for` in this process."""
    generate_for(admitted(target, name, words), log)


def generate_for(found: Admitted, log: Callable[[str], None], traces: Traces | None = None) -> None:
    """Generate until the run ends. `log`: writes a line for the user; `traces`: for the process beside this one. Raises
    UserError when it cannot take part, RunFailed when the buffer is gone, Interrupted when told to leave."""
    welcome = found.welcome
    if sees_files_of(welcome):
        os.chdir(welcome.folder)  # relative paths in the run's settings begin there
    settings = threads_here(found.settings)
    # torch reads these when it is imported
    os.environ.update(arithmetic_environment(settings.generator.threads))
    check_device("generator.device", settings.generator.device)
    check_sources(settings, welcome)
    JoinedGenerator(found.target, found.name, settings, welcome, log, found.identity, traces).run()


def sees_files_of(welcome: msg.Welcome) -> bool:
    """Whether the run's files are here, where the run has them. Containers of one machine share its identity and often
    the name of their working folder, and not the files."""
    return welcome.host == this_host() and RunFolder(Path(welcome.folder, welcome.run)).config.is_file()


def request_join(target: JoinTarget, name: str) -> msg.Welcome:
    """Ask to be let in. Raises UserError with the buffer's reason, RunFailed when there is no answer."""
    limit_s = min(ANSWER_S, target.timeout_s)
    ask = msg.Join(name=name, package=__version__, pid=os.getpid())
    dealer = Dealer(target.endpoint, f"{name}/{uuid.uuid4().hex[:8]}", keys=target.keys)
    deadline = time.monotonic() + limit_s
    try:
        dealer.send(ask)
        while True:
            try:
                answer = dealer.receive(POLL_S, "an answer")
            except WireTimeout:
                _check_silence(target, dealer, late=time.monotonic() > deadline, limit_s=limit_s)
                continue
            match answer:
                case msg.Welcome():
                    return answer
                case msg.Refused(reason=reason):
                    raise UserError(f"the run at {target.endpoint} refused this generator: {reason}")
    except WireError as error:
        raise UserError(
            f"the run at {target.endpoint} speaks otherwise ({error}); install the version of async-rl it has"
        ) from None
    finally:
        dealer.close(linger_s=0)


def _check_silence(target: JoinTarget, dealer: Dealer, *, late: bool, limit_s: float) -> None:
    """Raises UserError when the buffer does not take our keys, RunFailed when it is `late`."""
    if dealer.reception is not None and dealer.reception.turned_away:
        assert target.keys is not None
        raise UserError(
            f"{target.endpoint} does not take the keys of {target.keys.folder}, or is not the server they are for; "
            "copy server.key, client.key and client.key_secret from the run's wire.keys"
        )
    if late:
        raise RunFailed(f"no answer from {target.endpoint} for {limit_s:g} s: is a run there, and can it be reached?")


@dataclass(slots=True)
class JoinedGenerator:
    """A generator that was let in."""

    target: JoinTarget
    name: str
    settings: Settings
    welcome: msg.Welcome
    log: Callable[[str], None]
    """writes a line for the user"""
    identity: str
    """of its socket"""
    traces: Traces | None = None
    """for the process beside it"""
    mark: StepMark | None = None
    interrupted_by: str = ""
    """the signal that told it to leave"""
    activity: Activity = field(default_factory=Activity)

    def run(self) -> None:
        """Generate until the run ends or a signal comes. Raises RunFailed, UserError, Interrupted."""
        from async_rl.generator.task_code import run_to_end

        if self.traces is not None:
            self.mark = StepMark.create(self.traces.marks)
            self.mark.watch_exit()
            dump_stacks_on_signal(self.traces.stacks)
        tokenizer, task = self.same_problems()
        with make_heartbeat(
            self.name,
            "generator",
            self.activity,
            self.settings.wire,
            self.target.endpoint,
            identity=self.identity,
            pipe=NO_PIPE if self.traces is None else self.traces.pulse,
            group=(lambda: -1) if self.mark is None else self.mark.group,
        ) as heartbeat:
            try:
                run_to_end(self._generate(tokenizer, task, lambda: heartbeat.buffer_silent_s))
            finally:
                if self.traces is not None:
                    self.traces.marks.unlink(missing_ok=True)  # it ends by itself: nobody is to blame
        if self.interrupted_by:
            raise Interrupted(self.interrupted_by)

    def same_problems(self) -> tuple[Tokenizer, Task]:
        """The tokenizer and the task, made here. Raises UserError when they are not the run's."""
        from async_rl.model.folder import check_folder
        from async_rl.model.tokenizer import Tokenizer
        from async_rl.task import make_task

        path = self.settings.model.path
        check_folder(path)
        tokenizer = Tokenizer.of(self.settings.model)
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
        from async_rl.generator.loop import GeneratorLoop, make_options
        from async_rl.generator.task_pool import in_processes

        segment, server = Path(self.welcome.segment), self.settings.weights.relay or self.weight_server()
        relayed = bool(self.settings.weights.relay)
        here = self.welcome.host == this_host() and (segment.exists() or not server) and not relayed
        weights = make_weights(self.settings, segment, server, self.identity, here=here)
        engine = make_engine(self.settings, tokenizer)
        dump_stacks_on_signal()  # the engine's libraries are loaded
        limit = self.settings.wire.max_message_mb << 20
        dealer = AsyncDealer(self.target.endpoint, self.identity, max_message_bytes=limit, keys=self.target.keys)
        try:
            loop = GeneratorLoop(
                make_options(self.settings, self.name, joined=True),
                engine,
                in_processes(task, self.settings),
                tokenizer,
                dealer,
                weights,
                activity=self.activity,
                buffer_silent_s=buffer_silent_s,
                record=self.record,
                on_stuck=self.give_up if self.mark is not None else None,
                mark=self.mark,
            )
            for number in SIGNALS:
                asyncio.get_running_loop().add_signal_handler(number, self.leave, loop, number)
            self.log(f"{self.name} joins {self.welcome.run} at {self.target.endpoint}; Ctrl-C leaves")
            freeze_set_up()
            await loop.run()
            stats = engine.stats()
            self.log(
                f"{'the run has ended: ' + loop.stopped + '; ' if loop.stopped else ''}{self.name} generated "
                f"{stats.tokens_generated} tokens in {loop.episodes.started} episodes"
            )
            if self.interrupted_by:
                dealer.close(linger_s=LEAVE_S)
        except WeightsError as error:
            raise RunFailed(f"{self.name}: {error}") from None
        finally:
            weights.close()
            dealer.close(linger_s=0)

    def weight_server(self) -> str:
        """Where the weight server is reached from here; empty: there is none."""
        return as_reached_by(self.welcome.weights, self.target.endpoint) if self.welcome.weights else ""

    def leave(self, loop: GeneratorLoop, number: int) -> None:
        """A signal came; further ones change nothing."""
        if not self.interrupted_by:
            self.interrupted_by = signal.Signals(number).name
            loop.leave(f"told to end ({self.interrupted_by})")

    def give_up(self, why: str) -> None:
        """End now, because code of the task does not give the word back; the mark tells whose."""
        self.log(f"{self.name}: {why}")
        os._exit(1)

    def record(self, event: Event) -> None:
        """Show an event; generators that the launcher starts write it into events.jsonl."""
        self.log(f"{event.event}: {event.text if isinstance(event, StallReported) else event.detail()}")
