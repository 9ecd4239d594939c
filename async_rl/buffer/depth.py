"""The depth of the pipeline, moved so that the effective sample size (ESS) stays at a target (`DepthControl`); and the
rules that the state machine follows, the control among them (`Rules`).

A deeper pipeline keeps generators busy and makes data older, which lowers the ESS of the batches: an ESS below the
target asks for a shallower pipeline, one above it for a deeper one. The bound on staleness does not depend on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from math import ceil, floor, inf, isfinite, nan
from typing import Any

from msgspec import structs

from async_rl.buffer import effects as do
from async_rl.buffer.ledger import Ledger
from async_rl.buffer.sampler import Decision, SamplerRules
from async_rl.buffer.sampler_feedback import start_in
from async_rl.buffer.staleness import Policy
from async_rl.config.pool import PoolSettings
from async_rl.config.rollout import RolloutSettings
from async_rl.events import DepthChanged
from async_rl.wire.messages import Permit

KEY = "depth"
"""key of the controller's state among the store's meta"""
SMOOTHING = 0.1
"""weight of the newest step in the smoothed ESS; a plain mean while fewer steps than 1 / this are in it"""
LEAST_STEPS = 10
"""steps that are measured between two changes"""
CALM_STEPS = 4 * LEAST_STEPS
"""steps within the band after which what was learned of other depths is forgotten"""
LONGEST_PATIENCE = 1000
"""steps, see `DepthState.patience`"""
FIRST_STRIDE = 0.5
LONGEST_STRIDE = 1.0
"""batches"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthState:
    """All that the controller remembers."""

    depth: float
    """batches"""
    moved: float = 0.0
    """the last change without a bracket, batches (above 0: deeper)"""
    too_deep: float = inf
    """shallowest depth that was found too deep; inf: none"""
    too_shallow: float = 0.0
    """deepest depth that was found too shallow; 0: none"""
    patience: int = CALM_STEPS
    """measured steps after which a depth that was too deep is tried again, if the next shallower one is too shallow"""
    settling: int = 0
    """steps still to come whose data were started at the depth before"""
    measured: int = 0
    """steps in `smoothed`"""
    smoothed: float = nan
    """ESS / B since the last change"""
    newest: int = -1
    """training step seen last"""
    nonfinite: int = 0
    """steps whose ESS was no finite number"""
    at_bound: bool = False
    """the target asks for a depth beyond the bounds, and that was reported"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthControl:
    """Pure: state and observation in, state and decision out.

    - The ESS is averaged over at least LEAST_STEPS steps. Steps whose data were started at the depth before the last
      change are left out.
    - Inside the band nothing changes. Outside, the depth moves by a stride that grows with the distance and doubles
      each time the direction stays the same.
    - A depth that was too deep and one that was too shallow bracket the target: the next one lies in the middle.
      When no slot is left between them, the shallower one is kept; the other is tried again after `patience` steps,
      which doubles each time. So the depth of a run whose ESS does not drift changes only a few times, whatever the
      band.
    - A bracket that the ESS contradicts is forgotten, and so is one that was not needed for CALM_STEPS.
    - There is no integral term, so nothing builds up at a bound: the first measured steps on the other side of the
      band count.

    Example: `DepthControl(target=0.5, deepest=3.0, groups_per_step=16)`.
    """

    target: float
    """of ESS / B, in (0, 1)"""
    deepest: float
    """batches: the depth stays within 1 .. this, at which the policy's own bound on slots is reached"""
    groups_per_step: int
    """P: one slot is 1 / P batches"""

    @property
    def band(self) -> float:
        """Half width of the dead band, ESS / B."""
        return min(0.1 * self.target, 0.5 * (1 - self.target))

    def start(self, depth: float) -> DepthState:
        return DepthState(depth=min(depth, self.deepest))

    def observe(self, state: DepthState, *, step: int, ess: float) -> tuple[DepthState, DepthChanged | None]:
        """The next state and the change, if any, after a training step with this ESS / B. A step seen before changes
        nothing."""
        if step <= state.newest:
            return state, None
        state = replace(state, newest=step)
        finite = isfinite(ess)
        if not finite:
            state = replace(state, nonfinite=state.nonfinite + 1)
        if state.settling:
            return replace(state, settling=state.settling - 1), None
        if not finite:
            return self._decide(state, -1, step=step, ess=ess, reason="the ESS is not finite")
        state = _measured(state, ess)
        low, high = self.target - self.band, self.target + self.band
        if low <= state.smoothed <= high:
            return _rested(state), None
        if state.measured < LEAST_STEPS:
            return state, None
        if state.smoothed < low:
            return self._decide(state, -1, step=step, ess=ess, reason=f"the ESS is below {low:.3g}")
        return self._decide(state, 1, step=step, ess=ess, reason=f"the ESS is above {high:.3g}")

    def _decide(
        self, state: DepthState, direction: int, *, step: int, ess: float, reason: str
    ) -> tuple[DepthState, DepthChanged | None]:
        """Move one stride in this direction, unless the depth is at its bound."""
        old = state.depth
        decision = DepthChanged(step=step, ess=ess, smoothed=state.smoothed, old=old, new=old, reason=reason)
        if old == (1.0 if direction < 0 else self.deepest):
            if state.at_bound:
                return state, None
            return replace(state, at_bound=True), replace(decision, reason=f"{reason}; the depth is at its bound")
        state = _bracketed(state, direction)
        slot = 1 / self.groups_per_step
        if state.too_shallow and state.too_deep - state.too_shallow <= 1.5 * slot and direction > 0:
            if state.measured < state.patience:
                return state, None
            state = replace(state, too_deep=inf, moved=0.0, patience=min(2 * state.patience, LONGEST_PATIENCE))
            stride = slot
        elif state.too_shallow and isfinite(state.too_deep):
            stride = abs(old - (state.too_deep + state.too_shallow) / 2)
        else:
            stride = self._stride(state, direction)
            state = replace(state, moved=direction * stride)
        slots = max(1, floor(stride * self.groups_per_step + 1e-6))
        new = (floor(old * self.groups_per_step + 1e-6) + direction * slots) / self.groups_per_step
        new = min(max(new, 1.0), self.deepest)
        settling = ceil(max(old, new)) + 1
        after = replace(state, depth=new, settling=settling, measured=0, smoothed=nan, at_bound=False)
        return after, replace(decision, new=new)

    def _stride(self, state: DepthState, direction: int) -> float:
        """Length of a move without a bracket, batches: by the distance to the target, and longer each time."""
        distance = abs(state.smoothed - self.target) / self.band - 1 if state.measured else 1.0
        again = 2 * abs(state.moved) if direction * state.moved > 0 else 0.0
        return min(max(FIRST_STRIDE * distance, again), LONGEST_STRIDE)


def _measured(state: DepthState, ess: float) -> DepthState:
    """The state with one more step in the smoothed ESS."""
    count = state.measured + 1
    weight = max(1 / count, SMOOTHING)
    before = state.smoothed if state.measured else 0.0
    return replace(state, measured=count, smoothed=before + weight * (ess - before))


def _bracketed(state: DepthState, direction: int) -> DepthState:
    """The state that knows this depth as too deep (direction -1) or too shallow; what contradicts that is forgotten."""
    depth = state.depth
    if direction < 0:
        return replace(state, too_deep=depth, too_shallow=state.too_shallow if state.too_shallow < depth else 0.0)
    return replace(state, too_shallow=depth, too_deep=state.too_deep if state.too_deep > depth else inf)


def _rested(state: DepthState) -> DepthState:
    """The state within the band; after a long time there, what was learned of other depths is forgotten."""
    state = replace(state, at_bound=False)
    if state.measured < CALM_STEPS:
        return state
    return replace(state, moved=0.0, too_deep=inf, too_shallow=0.0, patience=CALM_STEPS)


@dataclass(slots=True, kw_only=True)
class DepthController:
    """Applies a control to the ledger's policy."""

    control: DepthControl
    ledger: Ledger
    state: DepthState

    def observe(self, *, step: int, ess: float) -> list[do.Effect]:
        """The trainer has done `step` with this ESS / B."""
        before = self.state
        self.state, decision = self.control.observe(before, step=step, ess=ess)
        if self.state == before:
            return []
        self.ledger.policy = self.ledger.policy.at_depth(self.state.depth)
        out: list[do.Effect] = [do.Remember(key=KEY, value=asdict(self.state))]
        if decision is not None:
            out.append(do.Note(event=decision))
        return out

    def restore(self, remembered: Mapping[str, Any]) -> None:
        """Go on where an earlier launch of the run stood."""
        self.state = DepthState(**remembered)
        self.ledger.policy = self.ledger.policy.at_depth(self.state.depth)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The settings that the state machine follows.

    Example: `Rules(policy=policy, group_size=8, temperature=1.0, drop_zero_signal=False, max_failures=64,
    max_refusals=1000, seed=0)`."""

    policy: Policy
    group_size: int
    """trajectories of one group"""
    temperature: float
    drop_zero_signal: bool
    """refuse groups whose rewards are all equal, at once"""
    max_failures: int
    """trajectories in a row that may fail before the run ends"""
    max_refusals: int
    """groups in a row that may be refused before the run ends"""
    seed: int
    control: DepthControl | None = None
    """what moves the policy's depth during the run; None: it stays"""
    pool: PoolSettings = field(default_factory=PoolSettings)
    """what of earlier batches comes back"""
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    """how the answers of a group hang together"""
    vocabulary: int = 0
    """tokens are below it; 0: not known"""
    max_permits: int = 1 << 31
    """permits that one generator may have under way"""
    max_deaths: int = 2
    """of generators that one problem may cause before it is refused"""
    verify_share: float = 0.0
    """of every generator's trajectories, which the trainer verifies"""
    secret: bytes = b""
    """decides which"""
    frozen_after_s: float = 15.0
    """a generator that has been silent for so long is lost"""
    stall_report_s: float = 10.0
    """waits that last longer are reported"""
    absence_s: float = 0.0
    """for so long nobody waits in vain while no generator is connected: those that join by themselves may be late"""
    how_to_join: str = ""
    """what follows "no generator is connected" where the launcher starts none"""
    sampler: SamplerRules | None = None
    """what chooses problems and sizes of groups; None: the prompt order and `group_size`"""

    def permit(self, *, group: int, problem: int, seed: int, decision: Decision | None = None) -> Permit:
        """The right to generate all samples of a training group. `seed`: of the group; `decision`: of the sampler,
        or that an episode goes on."""
        permit = Permit(
            group=group,
            problem=problem,
            split="train",
            samples=tuple(range(self.group_size if decision is None else decision.samples)),
            seed=seed,
            temperature=self.temperature,
        )
        if decision is None:
            return permit
        start = start_in(decision, None if self.sampler is None else self.sampler.chosen)
        return structs.replace(permit, max_turns=decision.max_turns, start=start)
