"""Every message that crosses a process, each declared once, section by section by who talks with whom.

`wire/frames.py` turns them into bytes and checks what arrives against the annotations here. A message is a frozen,
keyword-only msgspec struct; `msgspec.structs.replace` changes fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct, field

from async_rl.trajectory.types import Split, Trajectory

Detail = Mapping[str, Any]
"""plain data: strings, numbers, booleans, None, and lists and dicts (with string keys) of these"""
ABANDONED = "the buffer dropped its group"
"""`reason` of a trajectory that was aborted because nobody wants it any more"""
KEEPER = "/keeper"
"""end of the identity of the process beside a generator that joined, which tells how that ended (run/keeper.py)"""
RANK = "rank"
"""role in the pulses of a follower among the trainer's ranks, where somebody else has started them"""
MOST_COLUMNS = 16
"""of one kind with a name of a generator, in a metric row"""
PULSE = "/pulse"
"""suffix of the identity of the socket that a process sends its pulses through"""


class WireStruct(Struct, frozen=True, forbid_unknown_fields=True):
    """A message, or a part of one."""


# ---------------------------------------------------------------- generator -> buffer


class Hello(WireStruct, frozen=True, kw_only=True):
    """First message of every generator and of the trainer."""

    role: str
    """generator or trainer"""
    name: str
    pid: int
    session: int = 0
    """of a generator: a number never used before, sent with everything that counts from this Hello on. Repeating Hello
    under the same session changes nothing. 0: each Hello begins a new session"""
    joined: bool = False
    """the generator was started by a user, not by the run's launcher"""


class Want(WireStruct, frozen=True, kw_only=True):
    """A generator asks for permits."""

    limit: int
    """permits it takes in all since its Hello: repeating the message asks for nothing more"""
    version: int
    """weights it holds; -1: none yet"""
    session: int = 0


class Finished(WireStruct, frozen=True, kw_only=True):
    """Finished trajectories. Answered by `Accepted` or `Refused`; until then the generator keeps and repeats them."""

    trajectories: tuple[Trajectory, ...]
    """each has passed `Trajectory.check()`, else the whole message is refused"""
    blobs: tuple[memoryview, ...] = ()
    """bytes of each trajectory as they arrived, filled in by the receiver, which stores them as they are"""
    session: int = 0
    """of the generator that sends it; 0: its last one"""


class Turns(WireStruct, frozen=True, kw_only=True):
    """Finished turns of running episodes, kept in case their generator dies. Not answered; each replaces the one
    before. The buffer sends them before a permit: what a lost generator had done of its group."""

    trajectories: tuple[Trajectory, ...]
    session: int = 0
    """as in Finished"""


class Leave(WireStruct, frozen=True, kw_only=True):
    """The generator ends and gives back what it holds; it has sent its finished turns (Turns) before."""

    name: str
    reason: str
    session: int = 0


class Holds(WireStruct, frozen=True, kw_only=True):
    """The generator has loaded weights."""

    version: int
    """weights that sample the next token"""
    session: int = 0
    """in which it holds them, as in Finished"""


class Status(WireStruct, frozen=True, kw_only=True):
    """The whole state of a generator, several times a second: whichever message was lost before, the buffer sees what
    is missing. Counters since the generator began."""

    name: str
    session: int = 0
    version: int
    limit: int = 0
    """as in Want"""
    groups: tuple[int, ...] = ()
    """groups in hand: running, or finished and not acknowledged"""
    busy_seconds: float
    """inside model steps"""
    wall_seconds: float
    task_seconds: float = 0.0
    """in which the task's code had something to do, on average over its processes (generator.task_processes)"""
    tokens_generated: int
    running: int
    """sequences being decoded now"""
    waiting: int
    """sequences not yet started"""


class Canary(WireStruct, frozen=True, kw_only=True):
    """Evidence of the weights that a generator has just loaded. The buffer passes it on to the trainer."""

    name: str
    """of the generator, as the buffer knows it"""
    version: int
    digests: tuple[tuple[str, int], ...]
    """(tensor, checksum of elements sampled from it), 64 bits unsigned"""
    split: tuple[str, ...] = ()
    """tensors without a checksum: no single process of the engine (vllm.tensor_parallel) holds them whole"""
    log_probs: tuple[float, ...]
    """of the probe under these weights, nats"""
    session: int = 0
    """in which it loaded them, as in Finished"""


# ---------------------------------------------------------------- buffer -> generator


class Start(WireStruct, frozen=True, kw_only=True):
    """What the answers of a group begin with: context without loss, which nobody samples."""

    source: str
    """field: the beginning of a text in the data; success, failure: of a stored answer; window: all that the episode
    said in earlier pieces, behind which it goes on"""
    share: float
    """of the text that is given"""
    field: str = ""
    """with the text"""
    in_prompt: bool = False
    """the text stands in the prompt, behind the instruction, and answers begin anew"""
    instruction: str = ""
    tokens: bytes = b""
    """int32, little endian: a stored answer from the begin of its prompt to where it is left"""
    turns: tuple[tuple[int, int], ...] = ()
    """(start, length) of its turns in `tokens`"""
    open: bool = False
    """the last of them was cut, and is gone on with"""
    group: int = -1
    """of the stored answer; -1: the text of a field"""


class Permit(WireStruct, frozen=True, kw_only=True):
    """The right to generate one group."""

    group: int
    problem: int
    split: Split
    samples: tuple[int, ...]
    """indices within the group that are still to be generated"""
    seed: int
    """of the group, 64 bits unsigned"""
    temperature: float
    size: int = 0
    """samples of the whole group, which a task that judges groups plays all of; 0: those of `samples`"""
    max_turns: int = 0
    """of an episode; 0: as many as generator.max_turns"""
    start: Start | None = None
    """what its answers begin with"""


class Permits(WireStruct, frozen=True, kw_only=True):
    """Permits for a generator. One for a group that the generator has in hand already was sent again: it changes
    nothing."""

    permits: tuple[Permit, ...]
    session: int = 0
    """of the Hello they answer; under another one they are void"""
    granted: int = 0
    """permits given in all since that Hello, these included"""


class Accepted(WireStruct, frozen=True, kw_only=True):
    """These trajectories are stored."""

    pairs: tuple[tuple[int, int], ...]
    """(group, sample) of every trajectory that is now in the store, those it had before included"""


class Refused(WireStruct, frozen=True, kw_only=True):
    """The message was not taken and need not be sent again."""

    what: str
    """kind of the message"""
    reason: str
    kind: str = ""
    """what it was counted under: a RefusalKind of wire/frames.py"""
    pairs: tuple[tuple[int, int], ...] = ()
    """(group, sample) of the trajectories that were not taken"""
    session: int = 0
    """of the generator that sent the message: it may have ended, and the next process of its name is not meant. 0: no
    generator is known"""


class Abandon(WireStruct, frozen=True, kw_only=True):
    """These groups are not wanted any more. The generator sends what it has of their unfinished trajectories as
    `Finished`, ended as aborted."""

    groups: tuple[int, ...]


class NewWeights(WireStruct, frozen=True, kw_only=True):
    """The trainer has published weights."""

    version: int


class Stop(WireStruct, frozen=True, kw_only=True):
    """To every process: end now."""

    reason: str


class Unknown(WireStruct, frozen=True, kw_only=True):
    """The buffer knows no generator under this session: say Hello anew, with nothing in hand."""

    session: int


# ---------------------------------------------------------------- every process <-> buffer, own thread and socket


class Pulse(WireStruct, frozen=True, kw_only=True):
    """A process lives, and this is what it does. Answered by `PulseAnswer`."""

    name: str
    pid: int
    role: str
    doing: str
    since_s: float
    """seconds it has been doing that"""
    group: int = -1
    """of a generator: whose code of the task runs in its event loop; -1: none"""
    host: str = ""
    """name of its machine; empty: it is one that the launcher started"""


class PulseAnswer(WireStruct, frozen=True, kw_only=True):
    """The buffer lives."""


# ---------------------------------------------------------------- trainer -> buffer


class NextBatch(WireStruct, frozen=True, kw_only=True):
    """The trainer asks for the batch of a step."""

    step: int
    after: int = 0
    """trajectories of it that have been received: a large batch comes in parts, each asked for"""


class Published(WireStruct, frozen=True, kw_only=True):
    """The trainer has published weights."""

    version: int
    ess: float = -1.0
    """ESS / B of the batch it was trained on (metric ess/ratio), finite or not; -1: not reported"""


class Checkpointed(WireStruct, frozen=True, kw_only=True):
    """The checkpoint of this version is on the disk: its training steps are not done again."""

    version: int
    oldest: int = 0
    """version of the oldest checkpoint that is kept; 0: everything may be needed again"""


class Evaluate(WireStruct, frozen=True, kw_only=True):
    """The trainer asks for an evaluation."""

    evaluation: int
    """its number; asking twice is the same as asking once"""
    version: int
    """oldest weights that may be used"""
    problems: tuple[int, ...]
    """indices into the eval split"""
    samples: int
    """per problem"""
    temperature: float


class FetchEvaluation(WireStruct, frozen=True, kw_only=True):
    """The trainer asks how far an evaluation is. Answered by `EvaluationResult`."""

    evaluation: int
    waits: bool = False
    """the trainer does nothing else until it is complete"""


class Done(WireStruct, frozen=True, kw_only=True):
    """The trainer has finished its last step (reason empty) or could not go on (the cause)."""

    reason: str = ""


class Verdict(WireStruct, frozen=True, kw_only=True):
    """A trajectory of this generator is not what it says. Said again for each one that follows."""

    name: str
    session: int
    """both as in Verify"""
    lie: str
    """what is wrong: tokens, log-probs, versions, rewards or prompts"""
    reason: str
    """in words and numbers"""
    proven: bool
    """the generator is to be quarantined; else all that it sends next is to be verified"""


# ---------------------------------------------------------------- buffer -> trainer


class DroppedCounters(WireStruct, frozen=True, kw_only=True):
    """What the `drop` policy discarded for its age, beside what was trained, since the start of the run."""

    groups: int = 0
    trajectories: int = 0
    tokens: int = 0
    """policy tokens of the dropped trajectories"""
    trajectories_trained: int = 0
    tokens_trained: int = 0
    """policy tokens of the trained trajectories"""
    by_length: Mapping[str, int] = field(default_factory=dict)
    """dropped trajectories by the name of their length bucket; empty buckets are left out"""
    trained_by_length: Mapping[str, int] = field(default_factory=dict)
    """trained trajectories, likewise"""

    def metrics(self) -> dict[str, float]:
        """Columns of the trainer's row."""
        trained = self.tokens_trained / max(1, self.trajectories_trained)
        means = {"drop/len_trained": trained}
        if self.trajectories:
            means["drop/len_mean"] = self.tokens / self.trajectories
        if self.trajectories and self.trajectories_trained:
            means["drop/len_bias"] = means["drop/len_mean"] / trained
        return {
            "drop/groups": float(self.groups),
            "drop/trajectories": float(self.trajectories),
            "drop/tokens": float(self.tokens),
            **means,
            **{f"drop/{name}": float(count) for name, count in self.by_length.items()},
            **{f"drop/trained_{name}": float(count) for name, count in self.trained_by_length.items()},
        }


class SamplerCounters(WireStruct, frozen=True, kw_only=True):
    """What the sampler had chosen for the newest batch. Means are over its groups."""

    estimate: float
    """mean of the success that was estimated of their problems when they were chosen"""
    in_band: float
    """share of them whose estimate lay in the band"""
    samples: float
    """mean size"""
    started: float
    """share with a start"""
    max_turns: float
    """mean of the limits on turns, of groups that have one; 0: none has"""
    problems_tried: int
    """in the whole run"""
    by_source: Mapping[str, float] = field(default_factory=dict)
    """number of a source -> share of the groups"""

    def metrics(self) -> dict[str, float]:
        """Columns of the trainer's row."""
        return {
            "sampler/estimate": self.estimate,
            "sampler/in_band": self.in_band,
            "sampler/samples": self.samples,
            "sampler/started": self.started,
            **({"sampler/max_turns": self.max_turns} if self.max_turns else {}),
            "sampler/problems_tried": float(self.problems_tried),
            **{f"sampler/source/{source}": share for source, share in self.by_source.items()},
        }


class BufferCounters(WireStruct, frozen=True, kw_only=True):
    """The buffer's state in numbers, sent to the trainer with every batch. Counts are totals of the whole run, over
    every launch of it, unless a line says otherwise."""

    slots_used: int = 0
    """slots in use now, groups"""
    slots: int = 0
    """slots there are, groups"""
    pipeline_depth: float = 0.0
    """batches in the pipeline that the slots stand for"""
    generators: int = 0
    """generators connected now"""
    held_versions: Mapping[str, int] = field(default_factory=dict)
    """name of each connected generator -> version of the weights it holds"""
    generator_busy_seconds: float = 0.0
    """seconds inside model steps, summed over generators, since this buffer started"""
    task_busy_seconds: float = 0.0
    """seconds in which processes of the task ran its code (generator.task_processes), summed over generators"""
    tokens_generated: int = 0
    """policy tokens, unfinished episodes included"""
    groups_admitted: int = 0
    groups_trained: int = 0
    groups_refused: int = 0
    """groups that will not be trained"""
    trajectories_failed: int = 0
    trajectories_arrived: int = 0
    """all, those that failed and those of evaluations included"""
    failures: Mapping[str, int] = field(default_factory=dict)
    """failed trajectories by reason, the most frequent ones"""
    last_failure: str = ""
    """why the newest of them failed"""
    refused_length: float = 0.0
    """mean policy tokens of the trajectories of refused groups"""
    messages_refused: int = 0
    """messages and trajectories that were not taken, since this buffer started"""
    batches_held_up: int = 0
    """batches that waited for a running group although P others were finished, since this buffer started"""
    held_up_seconds: float = 0.0
    """seconds that those batches waited"""
    held_up_by: Mapping[str, int] = field(default_factory=dict)
    """name of a generator ("nobody": none had it) -> batches that waited for a group of it"""
    dropped: DroppedCounters | None = None
    """None: the policy drops nothing"""
    sampler: SamplerCounters | None = None
    """None: problems are asked in the prompt order"""
    store_seconds: float = 0.0
    """wall seconds of writes and commits, since this buffer started"""
    store_processor_seconds: float = 0.0
    """processor seconds among them"""
    store_commits: int = 0
    """commits, since this buffer started"""

    def metrics(self) -> dict[str, float]:
        """Columns of the trainer's row."""
        return {
            "len/refused": self.refused_length,
            "episodes/arrived": float(self.trajectories_arrived),
            "episodes/failed_total": float(self.trajectories_failed),
            "tokens/generated": float(self.tokens_generated),
            "slots/used": float(self.slots_used),
            "slots/all": float(self.slots),
            "groups/refused": float(self.groups_refused),
            "generators": float(self.generators),
            "time/generator_busy": self.generator_busy_seconds,
            "time/task_busy": self.task_busy_seconds,
            "time/store": self.store_seconds,
            "time/store_processor": self.store_processor_seconds,
            "wire/refused": float(self.messages_refused),
            "store/commits": float(self.store_commits),
            "held_up/batches": float(self.batches_held_up),
            "held_up/seconds": self.held_up_seconds,
            **{f"held_up/by/{name}": float(count) for name, count in self._held_up_most()},
            "staleness/depth": self.pipeline_depth,
            **(self.dropped.metrics() if self.dropped is not None else {}),
            **(self.sampler.metrics() if self.sampler is not None else {}),
        }

    def _held_up_most(self) -> list[tuple[str, int]]:
        """Generators by the batches that waited for them: a row has room for a few of a thousand."""
        return sorted(self.held_up_by.items(), key=lambda item: -item[1])[:MOST_COLUMNS]


class Batch(WireStruct, frozen=True, kw_only=True):
    """The trajectories of a training step, or a part of them."""

    step: int
    trajectories: tuple[Trajectory, ...] = ()
    """group by group"""
    blobs: tuple[memoryview, ...] = ()
    """stored blobs, sent as they are after `trajectories`; the receiver finds them in `trajectories`"""
    after: int = 0
    """trajectories of the batch before these"""
    total: int = 0
    """trajectories of the whole batch"""
    counters: BufferCounters = BufferCounters()


class Verify(WireStruct, frozen=True, kw_only=True):
    """Trajectories that one generator sent, of which the trainer is to find out whether they are what they say. Not
    answered, unless there is something to say (`Verdict`)."""

    name: str
    """of the generator, as the buffer knows it"""
    session: int
    """of its Hello"""
    trajectories: tuple[Trajectory, ...]


class Waiting(WireStruct, frozen=True, kw_only=True):
    """What was asked for is not there yet; it will come without being asked for again."""

    what: str
    reason: str
    """who is waited for"""
    seconds: float
    """waited so far"""
    progress: int = 0
    """trajectories and tokens so far: a wait during which it grows is no hang"""


class EvaluationResult(WireStruct, frozen=True, kw_only=True):
    """How far an evaluation is."""

    evaluation: int
    finished: bool
    rewards: tuple[float, ...] = ()
    """NaN for an episode that failed"""
    failures: tuple[str, ...] = ()
    """why episodes failed: the first reasons"""
    parts: Mapping[str, float] = field(default_factory=dict)
    """named parts of the rewards: mean over the episodes that have the part"""
    version_min: int = -1
    """oldest weights that sampled a token of it; -1: no token yet"""
    version_max: int = -1
    missing: int = 0
    """episodes that have not arrived"""
    progress: int = 0
    """while it is not finished: as in Waiting"""
    reason: str = ""
    """while it is not finished: who is waited for"""


# ---------------------------------------------------------------- launcher and monitors <-> buffer


class Query(WireStruct, frozen=True, kw_only=True):
    """Answered by `Snapshot`."""


class StandingWait(WireStruct, frozen=True, kw_only=True):
    """Somebody waits."""

    who: str
    what: str
    """is waited for"""
    seconds: float
    why: str
    """who keeps it waiting, as far as is known"""


class GeneratorState(WireStruct, frozen=True, kw_only=True):
    """A connected generator."""

    name: str
    version: int
    """of the weights it holds"""
    held: int
    """groups it works on"""
    running: int
    """sequences being decoded"""


class ProcessState(WireStruct, frozen=True, kw_only=True):
    """A process that sends pulses."""

    name: str
    role: str
    pid: int
    doing: str
    since_s: float
    """seconds it has been doing that"""
    silent_s: float
    """seconds since its last message"""
    host: str = ""
    """as in Pulse"""


class Snapshot(WireStruct, frozen=True, kw_only=True):
    """The buffer's state, for the launcher, a person or a monitor."""

    step: int = 0
    """of the next batch"""
    published: int = 0
    """newest version of the weights"""
    consumed: int = 0
    """newest version that is in a checkpoint"""
    live: int = 0
    """training groups that are in no batch yet"""
    waits: tuple[StandingWait, ...] = ()
    """those of more than a second"""
    generators: tuple[GeneratorState, ...] = ()
    processes: tuple[ProcessState, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    """events by name, since the start of the run"""
    refused: Mapping[str, int] = field(default_factory=dict)
    """messages and trajectories not taken, by RefusalKind (wire/frames.py)"""
    counters: BufferCounters = BufferCounters()


class Gone(WireStruct, frozen=True, kw_only=True):
    """A generator's process has ended: its permits need not wait for it."""

    name: str
    pid: int
    """of the process that ended; a restarted generator has another"""
    reason: str
    groups: tuple[int, ...] = ()
    """whose code it ran when it crashed or froze; several: one of them; none: its end came from outside, or nobody's"""
    place: str = ""
    """file, line and function of that code, where they are known"""


class Shutdown(WireStruct, frozen=True, kw_only=True):
    """To the buffer: pass on `Stop`, commit, end."""

    reason: str


class Preempt(WireStruct, frozen=True, kw_only=True):
    """To the buffer, which passes it on to the trainer: finish the step in hand, write a checkpoint and end. Repeated
    until the trainer has ended; receiving it twice changes nothing."""

    reason: str
    """the signal's name"""


# ---------------------------------------------------------------- joining generator <-> buffer


class Join(WireStruct, frozen=True, kw_only=True):
    """A generator started by a user asks, before its Hello, whether it may join. Answered by `Welcome` or `Refused`."""

    name: str
    package: str
    """version of async_rl"""
    pid: int


class Welcome(WireStruct, frozen=True, kw_only=True):
    """Everything that a joining generator must know of the run."""

    run: str
    """the run's folder"""
    settings: Detail
    """of the run, as in its config.yaml"""
    task_digest: str
    """of its problems (async_rl/run/preflight.py)"""
    host: str
    """of the buffer (wire/endpoint.py, `this_host`)"""
    folder: str
    """the buffer's working folder, where relative paths begin"""
    segment: str
    """file of the weights in that host's shared memory"""
    weights: str
    """where the weight server listens; empty: there is none"""
    sources: tuple[Detail, ...] = ()
    """the user's own files that the run was started with (config/sources.py)"""


# ---------------------------------------------------------------- generator of another host <-> weight server


class AskWeights(WireStruct, frozen=True, kw_only=True):
    """Answered by `Offer`, or by `Waiting` while there is nothing newer."""

    after: int
    """a version newer than this; what was offered before is not wanted any more"""


class Offer(WireStruct, frozen=True, kw_only=True):
    """A version that stays available while its chunks are asked for."""

    version: int
    num_bytes: int
    chunk_bytes: int
    """of every chunk but the last"""
    checksum: int
    """crc32 of all bytes"""
    layout: str
    """where each tensor lies among them (weights/shared_memory.py)"""


class AskChunks(WireStruct, frozen=True, kw_only=True):
    """Each chunk is answered by `Chunk`, or all of them by `Withdrawn`."""

    version: int
    chunks: tuple[int, ...]


class Chunk(WireStruct, frozen=True, kw_only=True):
    """A piece of the weights."""

    version: int
    index: int
    checksum: int
    """crc32 of the content"""
    content: memoryview
    """bytes"""


class Withdrawn(WireStruct, frozen=True, kw_only=True):
    """This version is no longer there: ask for weights anew."""

    version: int


class Upload(WireStruct, frozen=True, kw_only=True):
    """The trainer, which is on another machine than the run, has a version of the weights for the weight server, which
    fetches it over the same connection: by `AskWeights` and `AskChunks`, and at last `Holds`. Repeating it changes
    nothing."""

    version: int


class AskParent(WireStruct, frozen=True, kw_only=True):
    """A relay of weights is there, and asks the weight server whom to fetch from. Answered by `Parent`."""

    endpoint: str
    """where others reach it"""
    lost: str = ""
    """a parent that does not answer it any more"""


class Parent(WireStruct, frozen=True, kw_only=True):
    """Whom a relay fetches from."""

    endpoint: str
    """of another relay; empty: the weight server"""


# ---------------------------------------------------------------- generator <-> trainer of one host: weights into vLLM


class AskLink(WireStruct, frozen=True, kw_only=True):
    """A generator asks for newer weights. Answered by `LinkCall`s, by `Waiting` while there is nothing newer, or by
    `Refused`. Asking again changes nothing while the answer is under way."""

    name: str
    pid: int
    session: int
    """number of this session of the generator; another session begins with a new link"""
    way: str
    """nccl or ipc"""
    workers: int
    """processes that hold the model together"""
    after: int
    """a version newer than this; -1: any"""


class LinkCall(WireStruct, frozen=True, kw_only=True):
    """What vLLM is to do next. Answered by `LinkAnswer` when it is done."""

    number: int
    method: str
    """init, start, update or finish, in this order; init once a link, update once or more"""
    version: int
    """of the weights that are sent; -1 for init"""
    detail: Detail
    """arguments of vLLM's own method of that name"""


class LinkAnswer(WireStruct, frozen=True, kw_only=True):
    """A call is done, or failed."""

    session: int
    number: int
    error: str = ""
    """why it could not be done"""
    again: str = ""
    """why it came to nothing, through no fault of this side; it may be asked for again"""


# fmt: off
Message = (
    Hello | Want | Finished | Turns | Leave | Holds | Status | Canary
    | Permits | Accepted | Refused | Abandon | NewWeights | Stop | Unknown
    | Pulse | PulseAnswer
    | NextBatch | Published | Checkpointed | Evaluate | FetchEvaluation | Done | Verdict
    | Batch | Waiting | EvaluationResult | Verify
    | Query | Snapshot | Gone | Shutdown | Preempt
    | Join | Welcome
    | AskWeights | Offer | AskChunks | Chunk | Withdrawn | Upload | AskParent | Parent
    | AskLink | LinkCall | LinkAnswer
)
# fmt: on
