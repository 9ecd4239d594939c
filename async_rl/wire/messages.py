"""Every message that crosses a process, each declared once. Their bytes: wire/frames.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from async_rl.trajectory.codec import Blob
from async_rl.trajectory.types import Split, Trajectory

# -------------------- elsewhere
# The messages of weights and of generators that come by themselves, from other shells and hosts; a part of
# messages.py.

Detail = Mapping[str, Any]
"""plain data: strings, numbers, booleans, None, and lists and dicts (with string keys) of these"""


# ---- a generator that joins by itself <-> buffer ------------------------------------------------

JOINED = "joined"
"""in the detail of the Hello of a generator that joined by itself"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """Before its Hello: may I? Answered by `Welcome`, or `Refused`."""

    name: str
    package: str
    """version of async_rl"""
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """Everything it must know of the run."""

    run: str
    settings: Detail
    """of the run, as in its config.yaml"""
    task_digest: str
    """of its problems (async_rl/run/preflight.py)"""
    host: str
    """of the buffer (wire/host.py)"""
    folder: str
    """the buffer's working folder, where relative paths begin"""
    segment: str
    """file of the weights in that host's shared memory"""
    weights: str
    """where the weight server listens; empty: there is none"""


# ---- generator of another host <-> weight server ------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class AskWeights:
    """Answered by `Offer`, or by `Waiting` while there is nothing newer."""

    after: int
    """a version newer than this; also: of what was offered before nothing more is wanted"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A version that stays to be had while its chunks are asked for."""

    version: int
    num_bytes: int
    chunk_bytes: int
    """of every chunk but the last"""
    checksum: int
    """crc32 of all bytes"""
    layout: str
    """where each tensor lies among them (weights/layout.py)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class AskChunks:
    """Each is answered by `Chunk`; or all by `Withdrawn`."""

    version: int
    chunks: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    version: int
    index: int
    checksum: int
    """crc32 of the content"""
    content: Blob


@dataclass(frozen=True, slots=True, kw_only=True)
class Withdrawn:
    """This version is no longer there: ask for weights anew."""

    version: int


# ---- generator <-> trainer, of one host: weights that go straight into vLLM's workers ------------


@dataclass(frozen=True, slots=True, kw_only=True)
class AskLink:
    """Bring me newer weights. Answered by `LinkCall`s, by `Waiting` while there is nothing newer, or `Refused`.
    Asking again changes nothing while the answer is under way."""

    name: str
    pid: int
    session: int
    """a number this life of the generator has alone: another life begins with a new link"""
    way: str
    """nccl or ipc"""
    workers: int
    """processes that hold the model together"""
    after: int
    """a version newer than this; -1: any"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkCall:
    """What vLLM is to do next. Answered by `LinkAnswer` when it is done."""

    number: int
    method: str
    """init, start, update or finish, in this order; init once a link, update once or more"""
    version: int
    """of the weights that are sent; -1 for init"""
    detail: Detail
    """what vLLM's own method of that name is given"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkAnswer:
    session: int
    number: int
    error: str = ""
    """why it could not be done"""


ABANDONED = "the buffer dropped its group"
"""why a trajectory was aborted that nobody wants any more"""
AS_METRICS = ("drop/", "held_up/", "staleness/")
"""what begins so in the detail of a batch is a metric by that name"""
HOLDS = "holds/"
"""in the detail of a batch: this and a connected generator's name -> version it holds"""


# ---- generator -> buffer ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """First message of every generator and of the trainer."""

    role: str
    name: str
    pid: int
    session: int = 0
    """of a generator: a number never used before; it is in whatever counts from this Hello on. Saying Hello
    again under the same one changes nothing. 0: a Hello always begins anew"""
    detail: Detail = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    limit: int
    """permits it takes in all since its Hello: repeating the message asks for nothing more"""
    version: int
    """weights it holds; -1: none yet"""
    session: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """Answered by `Accepted`, or `Refused`; until then the generator keeps and repeats it."""

    trajectories: tuple[Trajectory, ...]
    """each has passed `Trajectory.check()`, else the whole message is refused"""
    blobs: tuple[Blob, ...] = ()
    """the bytes of each, as they came: they can be stored as they are; the receiver finds them here"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """Finished turns of episodes that still run, kept in case their generator dies. Not answered; each takes
    the place of the one before. From the buffer, before the permit: what a lost generator had done of it."""

    trajectories: tuple[Trajectory, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Leave:
    """It ends and gives back what it holds; finished turns (Turns) were sent before."""

    name: str
    reason: str
    session: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Holds:
    version: int
    """weights that sample the next token"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The whole standing of a generator, several times a second: whatever message got lost before, the buffer
    sees what is missing. Counters since the generator began."""

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
    tokens_generated: int
    running: int
    """sequences being decoded now"""
    waiting: int
    """sequences not yet started"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """What a generator shows of the weights it has just loaded. The buffer passes it on to the trainer."""

    name: str
    """of the generator, as the buffer knows it"""
    version: int
    digests: tuple[tuple[str, int], ...]
    """(tensor, checksum of elements sampled from it), 64 bits unsigned"""
    split: tuple[str, ...] = ()
    """tensors without a checksum: none of the processes of the engine (vllm.tensor_parallel) holds them whole"""
    log_probs: tuple[float, ...]
    """of the probe under these weights, nats"""


# ---- buffer -> generator ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Permit:
    """The right to generate one group."""

    group: int
    problem: int
    split: Split
    samples: tuple[int, ...]
    """indices within the group that are still to be generated"""
    seed: int
    """of the group, 64 bits unsigned"""
    temperature: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Permits:
    """A permit for a group that the generator has in hand already is one sent again: it changes nothing."""

    permits: tuple[Permit, ...]
    session: int = 0
    """of the Hello they answer; under another one they are void"""
    granted: int = 0
    """permits given in all since that Hello, with these"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    pairs: tuple[tuple[int, int], ...]
    """(group, sample) of every trajectory that is now in the store, those it had before included"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The message was not taken and need not be sent again."""

    what: str
    reason: str
    kind: str = ""
    """what it was counted under; one of wire/refusal.py"""
    pairs: tuple[tuple[int, int], ...] = ()
    """(group, sample) of the trajectories that were not taken"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Abandon:
    """These groups are not wanted any more. What was generated of their unfinished trajectories is sent as
    `Finished`, ended as aborted."""

    groups: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewWeights:
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """To every process: end now."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Unknown:
    """The buffer knows no generator under this session: say Hello anew, with nothing in hand."""

    session: int


# ---- every process -> buffer, from a thread and a socket of its own -----------------------------

PULSE = "/pulse"
"""identity of that socket: that of the process and this"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """I live, and this is what I do. Answered by `Heard`."""

    name: str
    pid: int
    role: str
    doing: str
    since_s: float
    """for how long it has done that"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """The buffer lives."""


# ---- trainer -> buffer --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class NextBatch:
    step: int
    after: int = 0
    """trajectories of it that have been received: a large batch comes in parts, each asked for"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    version: int
    ess: float = -1.0
    """ESS / B of the batch it was trained on (metric ess/ratio), or what came of it that is no number; -1: there is
    none to tell"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpointed:
    """The checkpoint of this version is on the disk: its training steps are not done again."""

    version: int
    oldest: int = 0
    """version of the oldest checkpoint that is kept; 0: everything may be needed again"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluate:
    evaluation: int
    """its number; asking twice is the same as asking once"""
    version: int
    """oldest weights that may be used"""
    problems: tuple[int, ...]
    """indices into the eval split"""
    samples: int
    """per problem"""
    temperature: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchEvaluation:
    evaluation: int
    waits: bool = False
    """the trainer does nothing else until it is complete"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The trainer has finished its last step (reason empty) or could not go on (the cause)."""

    reason: str = ""


# ---- buffer -> trainer --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    step: int
    trajectories: tuple[Trajectory, ...] = ()
    """group by group"""
    blobs: tuple[Blob, ...] = ()
    """stored blobs, sent as they are after `trajectories`; the receiver finds them in `trajectories`"""
    after: int = 0
    """trajectories of the batch before these"""
    total: int = 0
    """of the whole batch"""
    detail: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """What was asked for is not there yet; it will come without being asked for again."""

    what: str
    reason: str
    """who is waited for"""
    seconds: float
    """for how long already"""
    progress: int = 0
    """trajectories and tokens so far: a wait during which it grows is no hang"""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult:
    evaluation: int
    finished: bool
    rewards: tuple[float, ...] = ()
    version_min: int = -1
    """oldest weights that sampled a token of it; -1: no token yet"""
    version_max: int = -1
    detail: Detail = field(default_factory=dict)


# ---- launcher -> buffer -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """Answered by `Snapshot`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    detail: Detail


@dataclass(frozen=True, slots=True, kw_only=True)
class Gone:
    """This generator's process has ended: its permits need not wait for it."""

    name: str
    pid: int
    """of that life of it"""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Shutdown:
    """To the buffer: pass on `Stop`, commit, end."""

    reason: str


# fmt: off
Message = (
    Hello | Want | Finished | Turns | Leave | Holds | Status | Canary
    | Permits | Accepted | Refused | Abandon | NewWeights | Stop | Unknown
    | Pulse | Heard
    | NextBatch | Published | Checkpointed | Evaluate | FetchEvaluation | Done
    | Batch | Waiting | EvaluationResult
    | Query | Snapshot | Gone | Shutdown
    | Join | Welcome
    | AskWeights | Offer | AskChunks | Chunk | Withdrawn
    | AskLink | LinkCall | LinkAnswer
)
# fmt: on
