"""What the buffer takes from whom (`Acceptance`), and what becomes of the rest (`Refusals`).

Everything that arrives is well formed already (async_rl/wire). Here it must also be possible: sent by a peer that has
business with it, about something this peer was given, with numbers that can be.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol, cast

from async_rl.buffer import effects as do
from async_rl.buffer.admission import Admission
from async_rl.buffer.depth import Rules
from async_rl.buffer.evaluation import Evaluations
from async_rl.buffer.ledger import Group, Ledger
from async_rl.buffer.trust import Trust
from async_rl.buffer.verification import of_the_launcher
from async_rl.config.rollout import RolloutSettings, parent_of
from async_rl.trajectory import Trajectory
from async_rl.trajectory.given import GIVEN, HINT, OPEN, wrong_given
from async_rl.trajectory.parts import POOL_PREFIX
from async_rl.trajectory.types import GREEDY, LOWEST_TEMPERATURE, sample_seed
from async_rl.version import __version__
from async_rl.wire import messages as msg
from async_rl.wire.frames import RefusalKind

ROLES = ("generator", "trainer")
LAUNCHER = b"launcher"
KEEPER = msg.KEEPER.encode()
LONGEST_NAME = 200
"""characters"""
LONGEST_DOING = 1000
"""characters"""
LONGEST_END = 4000
"""characters, of what the keeper of a generator tells"""
MOST_BLAMED = 1024
"""groups of which one was the cause of an end"""
MOST_GENERATORS = 1 << 14
MOST_EVALUATIONS = 64
"""evaluations that are not finished"""
MOST_EPISODES = 1 << 20
"""episodes of one evaluation"""
LARGEST = 1 << 62
"""value of a counter: SQLite holds 63 bits"""
OF_THE_TRAINER = frozenset((
    msg.NextBatch, msg.Published, msg.Checkpointed, msg.Evaluate, msg.FetchEvaluation, msg.Done, msg.Verdict
))  # fmt: skip
OF_ONE_SESSION = frozenset((msg.Want, msg.Status, msg.Leave))
"""within one session of a generator: between two of its Hellos"""
OF_A_LIFE = frozenset((msg.Holds, msg.Canary))
"""what a process holds: the next one of its name may hold less"""
OF_GENERATORS = OF_ONE_SESSION | OF_A_LIFE
FROM_A_LIFE = OF_GENERATORS | {msg.Finished, msg.Turns}
"""which nobody sends who has said no Hello"""
OF_THE_LAUNCHER = frozenset((msg.Gone, msg.Shutdown, msg.Preempt))
OF_ANYBODY = frozenset((msg.Hello, msg.Query, msg.Pulse, msg.Join))
TAKEN = OF_THE_TRAINER | FROM_A_LIFE | OF_THE_LAUNCHER | OF_ANYBODY
"""of Finished and Turns, each trajectory is checked by itself"""
EXAMPLES = 3
"""of each kind of refusal that go into events.jsonl"""
LONGEST_REASON = 200
"""characters"""
ANSWERS_AT_ONCE = 256
ANSWERS_PER_S = 20.0
"""a peer that sends nonsense and never reads must not fill this process with answers"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objection:
    """Why something is not taken."""

    kind: RefusalKind
    reason: str


class _OfALife(Protocol):
    """A message that one life of a generator sends."""

    session: int


@dataclass(slots=True, kw_only=True)
class Acceptance:
    """Checks messages and trajectories. Reads the state machine's parts and changes nothing in them."""

    rules: Rules
    ledger: Ledger
    admission: Admission
    evaluations: Evaluations
    trust: Trust

    def message(self, peer: bytes, message: msg.Message, trainer: bytes) -> Objection | None:
        """Why a message is not taken, or None. `trainer`: the peer that is the trainer; empty: none yet."""
        kind = type(message)
        if kind not in TAKEN:
            return Objection(kind="direction", reason="the buffer does not take this kind")
        if kind in OF_THE_TRAINER and peer != trainer:
            return Objection(kind="stranger", reason="only the trainer may say this")
        if kind in FROM_A_LIFE and (why := self.trust.barred(peer, message)):
            return Objection(kind="quarantine", reason=f"quarantined: {why}")
        if kind in OF_GENERATORS and peer not in self.admission.generators:
            return Objection(kind="stranger", reason="say Hello first")
        if kind in OF_ONE_SESSION and self.admission.known(peer, cast(_OfALife, message).session) is None:
            return Objection(kind="stranger", reason="say Hello first: this is another life of the generator")
        if (
            kind in OF_A_LIFE
            and (session := cast(_OfALife, message).session)
            and self.admission.known(peer, session) is None
        ):
            return Objection(kind="stranger", reason="another life of the generator loaded these weights")
        if isinstance(message, msg.Gone) and peer.endswith(KEEPER):
            return self._told_by_keeper(peer.removesuffix(KEEPER), message)
        if kind in OF_THE_LAUNCHER and peer != LAUNCHER:
            return Objection(kind="stranger", reason="only the launcher may say this")
        match message:
            case msg.Status():  # first: most messages are one
                return self._status(peer, message) or self._version(message.version, -1)
            case msg.Hello():
                return self._hello(peer, message, trainer)
            case msg.Pulse(doing=doing, since_s=since_s) if len(doing) > LONGEST_DOING or not 0 <= since_s < LARGEST:
                return Objection(kind="number", reason=f"a pulse says what is done in {LONGEST_DOING} characters")
            case msg.Join(name=name, package=package, pid=pid):
                return self._joining(package) or self._kept_out(name, pid) or self._name(peer, name)
            case msg.Want(limit=limit, version=version):
                return self._want(peer, limit) or self._version(version, -1)
            case msg.Holds(version=version) | msg.Published(version=version) | msg.Canary(version=version):
                return self._version(version, 0)
            case msg.Checkpointed(version=version, oldest=oldest) if not 0 <= oldest <= version:
                return Objection(kind="number", reason=f"the oldest checkpoint cannot be of version {oldest}")
            case msg.Checkpointed(version=version):
                return self._version(version, 1)
            case msg.NextBatch(step=step) if not 0 <= step <= self.ledger.step:
                return Objection(kind="step", reason=f"the next batch is that of step {self.ledger.step}")
            case msg.NextBatch(after=after) if after < 0:
                return Objection(kind="number", reason=f"{after} trajectories cannot have been received")
            case msg.Evaluate():
                return self._evaluate(message) or self._version(message.version, 0)
            case msg.FetchEvaluation(evaluation=number) if number not in self.evaluations.asked:
                return Objection(kind="number", reason="no such evaluation was asked for")
        return None

    def trajectory(self, peer: bytes, trajectory: Trajectory, group: Group | None) -> Objection | None:
        """Why a trajectory is not taken, or None. `group`: the live group of its number; None: there is none (any
        more), which is harmless when there was one and the peer is known."""
        if group is None:
            if 0 <= trajectory.group < self.ledger.next_group and self.admission.met(peer):
                return None
            return Objection(kind="group", reason=f"group {trajectory.group} was not given to this peer")
        if not self._given(peer, group):
            return Objection(kind="group", reason=f"group {group.group} was not given to this peer")
        plan = self.rules.rollout
        if (objection := _permitted(trajectory, group, plan)) is not None or trajectory.sample in group.samples:
            return objection  # one that comes again changes nothing
        if trajectory.info and any(name.startswith(POOL_PREFIX) for name in trajectory.info):
            return Objection(kind="number", reason=f"a note called {POOL_PREFIX}...: those are the buffer's own")
        return self._sampled(trajectory, group) or self._within_vocabulary(trajectory) or _trainable(trajectory, plan)

    # ---------------------------------------------------------------- messages

    def _hello(self, peer: bytes, hello: msg.Hello, trainer: bytes) -> Objection | None:
        if hello.role not in ROLES:
            return Objection(kind="role", reason=f"there is no role {hello.role[:40]!r}")
        if not 0 < len(hello.name) <= LONGEST_NAME:
            return Objection(kind="number", reason=f"a name has 1 to {LONGEST_NAME} characters")
        if hello.role == "trainer" and trainer not in (b"", peer):
            return Objection(kind="second", reason="there is a trainer already")
        generators = self.admission.generators
        if hello.role == "generator" and peer not in generators and len(generators) >= MOST_GENERATORS:
            return Objection(kind="crowd", reason=f"there are {len(generators)} generators already")
        if hello.role == "generator" and (out := self._kept_out(hello.name, hello.pid)) is not None:
            return out
        return self._name(peer, hello.name) if hello.role == "generator" and hello.joined else None

    def _kept_out(self, name: str, pid: int) -> Objection | None:
        """A process that was proven to lie may not come back."""
        why = self.trust.quarantine.keeps_out(name, pid)
        return Objection(kind="quarantine", reason=f"quarantined: {why}") if why else None

    def _told_by_keeper(self, peer: bytes, gone: msg.Gone) -> Objection | None:
        """The process beside a generator that joined speaks of that one alone, and of groups that it was given."""
        life = self.admission.life(peer)
        if life is None or life[0] != gone.name or of_the_launcher(gone.name):
            return Objection(kind="stranger", reason="only the launcher may say this of another generator")
        groups = [self.evaluations.group(number) or self.ledger.groups.get(number) for number in gone.groups]
        if any(group is not None and not self._given(peer, group) for group in groups):
            return Objection(kind="group", reason="a group of which it tells was not given to its generator")
        if len(gone.groups) > MOST_BLAMED or len(gone.reason) + len(gone.place) > LONGEST_END:
            return Objection(kind="number", reason=f"an end is told in {LONGEST_END} characters")
        return None

    def _joining(self, package: str) -> Objection | None:
        if package != __version__:
            reason = f"it is async-rl {package[:40]}, this run is {__version__}; both need the same"
            return Objection(kind="unlike", reason=reason)
        return None

    def _name(self, peer: bytes, name: str) -> Objection | None:
        """A generator that joins by itself needs a name that is nobody else's."""
        if not 0 < len(name) <= LONGEST_NAME:
            return Objection(kind="name", reason=f"a name has 1 to {LONGEST_NAME} characters")
        if re.fullmatch(r"generator-\d+|trainer|buffer|weights|launcher", name):
            return Objection(kind="name", reason=f"{name} is a name of the launcher's own; choose another")
        if any(g.name == name for p, g in self.admission.generators.items() if p != peer):
            return Objection(kind="name", reason=f"there is a generator of the name {name}; choose another")
        return None

    def _want(self, peer: bytes, limit: int) -> Objection | None:
        most = self.admission.generators[peer].granted + self.rules.max_permits
        if not 0 <= limit <= most:
            return Objection(kind="number", reason=f"a limit of {limit} permits; it may reach {most} now")
        return None

    def _version(self, version: int, lowest: int) -> Objection | None:
        """A version of weights exists only when the batch before it was formed. A generator may know of published
        weights before the trainer's message about them arrives here: it reads them elsewhere."""
        if not lowest <= version <= self.ledger.step:
            return Objection(kind="version", reason=f"there are no weights of version {version}")
        return None

    def _status(self, peer: bytes, status: msg.Status) -> Objection | None:
        counters = (
            status.busy_seconds, status.wall_seconds, status.task_seconds, status.tokens_generated, status.running,
            status.waiting,
        )  # fmt: skip
        if not all(0 <= counter < LARGEST for counter in counters):
            return Objection(kind="number", reason="a counter is below zero, too large or no number")
        return self._want(peer, status.limit)

    def _evaluate(self, ask: msg.Evaluate) -> Objection | None:
        episodes = len(ask.problems) * ask.samples
        if not (0 <= ask.evaluation < LARGEST and ask.samples >= 1 and episodes <= MOST_EPISODES):
            return Objection(kind="number", reason=f"an evaluation {ask.evaluation} of {episodes} episodes")
        if not all(0 <= problem < LARGEST for problem in ask.problems):
            return Objection(kind="number", reason="a problem's number is below zero or too large")
        if not 0 <= ask.temperature < math.inf:
            return Objection(kind="number", reason=f"a temperature of {ask.temperature}")
        if ask.evaluation not in self.evaluations.asked and self.evaluations.unfinished >= MOST_EVALUATIONS:
            return Objection(kind="crowd", reason=f"{MOST_EVALUATIONS} evaluations are not finished")
        return None

    # ------------------------------------------------------------ trajectories

    def _given(self, peer: bytes, group: Group) -> bool:
        """Whether the group was given to this peer, now or before. Of a restored group that is not known: any
        generator may finish it."""
        return peer in group.holders or (group.restored and self.admission.met(peer))

    def _sampled(self, trajectory: Trajectory, group: Group) -> Objection | None:
        """Why its tokens cannot have been sampled by weights that its generators held, or None."""
        spans = trajectory.versions
        newest = trajectory.version_max
        if newest > self.ledger.step:
            return Objection(kind="version", reason=f"tokens of version {newest}, which does not exist")
        if spans and trajectory.version_min < group.oldest_held:
            reason = f"tokens of version {trajectory.version_min}; the permit was for {group.oldest_held} and later"
            return Objection(kind="version", reason=reason)
        # saved turns may have been sampled by newer weights than the rest: the run was resumed at a checkpoint
        # behind them, or the group went to a generator that is behind
        if trajectory.sample not in group.begun and _goes_down(trajectory):
            return Objection(kind="version", reason="versions go down within a context of the trajectory")
        return None

    def _within_vocabulary(self, trajectory: Trajectory) -> Objection | None:
        known, tokens = self.rules.vocabulary, trajectory.tokens
        if known and len(tokens) and tokens.item(tokens.argmax()) >= known:
            return Objection(kind="tokens", reason=f"token {tokens.max()} of a vocabulary of {known}")
        return None


def _goes_down(trajectory: Trajectory) -> bool:
    """Whether versions go down within a context. Contexts may have been sampled in turn: behind the end of one, another
    begins that is older."""
    if len(trajectory.versions) < 2:  # the usual case
        return False
    found = [(a.end, b.start) for a, b in pairwise(trajectory.versions) if a.version > b.version]
    return any(not any(end <= start <= begin for start in trajectory.contexts) for end, begin in found)


def _hint(permit: msg.Permit) -> float | None:
    """The share of a text that its prompt holds."""
    return permit.start.share if permit.start is not None and permit.start.in_prompt else None


def _trainable(trajectory: Trajectory, plan: RolloutSettings) -> Objection | None:
    """Why nothing could be learned from it by right, or None."""
    if trajectory.split != "train":
        return None
    spoken = [turn for turn in trajectory.turns if turn.length]
    if spoken and spoken[0].start == 0:
        return Objection(kind="tokens", reason="it begins with a sampled token, which nothing predicts")
    greedy = plan.greedy and trajectory.sample == 0
    for turn in spoken:
        own = turn.temperature
        if not own and not greedy:  # as the trajectory: the usual case
            continue
        if greedy and own != GREEDY:
            return Objection(kind="number", reason="the first sample of a group is to be greedy (rollout.greedy)")
        if own and own < LOWEST_TEMPERATURE and not greedy:
            how = "greedily" if own == GREEDY else f"at temperature {own:g}"
            return Objection(kind="number", reason=f"a turn was sampled {how} in an episode that trains")
    return None


def _may_fork(sample: int, permit: msg.Permit, plan: RolloutSettings) -> bool:
    """Whether this sample of a permit may go on from another one."""
    return permit.split == "train" and permit.start is None and parent_of(sample, plan) is not None


def _permitted(trajectory: Trajectory, group: Group, plan: RolloutSettings) -> Objection | None:
    """Why the trajectory is not one that the permit names, or None."""
    permit = group.permit
    if not 0 <= trajectory.sample < group.size:
        said = f"sample {trajectory.sample} of {group.size}"
    elif trajectory.problem != permit.problem or trajectory.split != permit.split:
        said = f"problem {trajectory.problem} ({trajectory.split}) instead of {permit.problem} ({permit.split})"
    elif trajectory.seed != sample_seed(permit.seed, trajectory.sample):
        said = "another seed"
    elif trajectory.temperature != permit.temperature:
        said = f"temperature {trajectory.temperature:g} instead of {permit.temperature:g}"
    elif (permit.start is None) == (GIVEN in trajectory.info) and not (
        trajectory.failed or _may_fork(trajectory.sample, permit, plan)
    ):
        said = "with a start" if permit.start is not None else "without a start"
    elif (hint := trajectory.info.get(HINT)) != _hint(permit) and not trajectory.failed:
        said = f"with {hint} of a text in its prompt"
    elif said := _wrong_cut(trajectory, plan):
        pass
    elif permit.max_turns and len(trajectory.turns) > permit.max_turns:
        said = f"{len(trajectory.turns)} turns instead of at most {permit.max_turns}"
    else:
        return None
    return Objection(kind="permit", reason=f"group {group.group} was permitted otherwise: {said}")


def _wrong_cut(trajectory: Trajectory, plan: RolloutSettings) -> str:
    """Why it cannot begin, or end, as it says; empty: it can."""
    wrong = wrong_given(trajectory) if GIVEN in trajectory.info else ""
    return wrong or (_wrong_piece(trajectory, plan) if trajectory.ended == "window" else "")


def _wrong_piece(trajectory: Trajectory, plan: RolloutSettings) -> str:
    """Why it cannot be a piece of an episode that goes on; empty: it can."""
    if not plan.window or trajectory.split != "train":
        return "cut, where episodes are whole"
    if trajectory.num_policy_tokens != plan.window:
        return f"cut behind {trajectory.num_policy_tokens} tokens instead of {plan.window}"
    if trajectory.contexts or trajectory.reward or trajectory.info.get(OPEN) not in ("turn", "between"):
        return "cut with several contexts, with a reward, or without saying where"
    return ""


@dataclass(slots=True)
class Refusals:
    """What was not taken: counted by kind, a few examples of each recorded, and the sender told as long as that is
    cheap."""

    counts: Counter[str] = field(default_factory=Counter)
    """by RefusalKind (wire/frames.py)"""
    answers_left: float = ANSWERS_AT_ONCE
    answered_at: float = 0.0
    """when the budget of answers was last filled up"""

    def may_answer(self, now: float) -> bool:
        """Whether a stranger is answered; takes one answer out of the budget."""
        rested = max(0.0, now - self.answered_at)
        self.answers_left = min(ANSWERS_AT_ONCE, self.answers_left + ANSWERS_PER_S * rested)
        self.answered_at = now
        if self.answers_left < 1:
            return False
        self.answers_left -= 1
        return True

    def refuse(
        self,
        peer: bytes,
        what: str,
        objection: Objection,
        *,
        answer: bool,
        pairs: tuple[tuple[int, int], ...] = (),
        session: int = 0,
    ) -> list[do.Effect]:
        """Count, record and answer. `pairs`: (group, sample) of the trajectories that are meant; each counts.
        `session`: of the generator that is answered; 0: it is none."""
        before = self.counts[objection.kind]
        self.counts[objection.kind] += max(1, len(pairs))
        reason = objection.reason[:LONGEST_REASON]
        out: list[do.Effect] = []
        if before < EXAMPLES:
            out.append(do.RecordRefusal(peer=peer, what=what, kind=objection.kind, reason=reason))
        if answer:
            refused = msg.Refused(what=what, reason=reason, kind=objection.kind, pairs=pairs, session=session)
            out.append(do.Send(peer=peer, message=refused))
        return out
