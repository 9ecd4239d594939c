"""What an objective reads and answers, and the batch as it computes with it: float64, cleaned, with its segments.

Columns in, coefficients out. Shapes: T policy tokens, U turns with tokens, I trajectories, G groups of one optimizer
batch over all ranks; [T] int64 `turn`, `trajectory` and `group` map each token to its segment. The numbers of a batch
are float64 from `tokens_of` on, whatever dtype the columns have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import log

import torch
from torch import Tensor

from async_rl.objective.axes import Level, Pool, RatioSettings, ReuseSettings
from async_rl.objective.recipe import Recipe, Requirements

LARGEST_LOG_RATIO = 20.0
"""log-ratios are clamped to this before exp wherever a weight is formed (docs/algorithms.md#clamps); never for ESS"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """The policy tokens of one optimizer batch, trajectory by trajectory, turn by turn.

    Prompt and environment tokens are not here, so no sum can ever meet one. All tensors are detached
    and on one device; floating columns share one dtype (float32, float64 in tests).
    The gradient of every recipe is `sum_t c_t * grad log pi(y_t)`; an objective answers the `c_t`.
    """

    log_prob: Tensor  # [tokens]
    """log pi_theta of the sampled token under the weights about to be updated"""
    log_behaviour: Tensor  # [tokens]
    """log mu, returned by the generator, at the weights that sampled the token"""
    version: Tensor  # [tokens] int64
    """weight version that sampled the token"""
    turn_of_token: Tensor  # [tokens] int64, non-decreasing
    trajectory_of_turn: Tensor  # [turns] int64, non-decreasing
    group_of_trajectory: Tensor  # [trajectories] int64, non-decreasing, 0..groups-1
    reward: Tensor  # [trajectories]
    turn_reward: Tensor  # [turns]
    state_key: Tensor  # [turns] int64
    """hash of the environment state in which the turn began; -1 unknown"""
    truncated: Tensor  # [trajectories] bool
    """ended by a token or turn limit, not by itself"""
    current_version: int
    """version of the weights about to be updated (= training step)"""
    log_proximal: Tensor | None = None  # [tokens]
    """log-prob under the weights at the start of the step (several updates a batch)"""
    log_reference: Tensor | None = None  # [tokens]
    median: Tensor | None = None  # [tokens]
    """critic's median of the return from the state before the token (BPO)"""
    value: Tensor | None = None  # [tokens]
    """critic's value of the state *before* the token was sampled"""
    value_before: Tensor | None = None  # [tokens]
    """the same at the start of the step, for the clipped value loss (several updates a batch)"""
    log_teacher: Tensor | None = None  # [tokens]
    """log-prob under the run's teachers (the weighted mean of theirs); NaN where there is none"""
    log_proxy: Tensor | None = None  # [tokens]
    """log-prob under the policy at the start of the step, of which only the tokens are kept whose probability is at
    least a share of the likeliest's; -inf where the token is not kept"""
    value_slow: Tensor | None = None  # [tokens]
    """`value` by the target network, which the critic's targets are formed with; None: by the critic"""
    turn_values: Tensor | None = None  # [tokens, 4]
    """of a critic with Q heads: V1, V2 before the token, Q1, Q2 behind it"""
    turn_values_slow: Tensor | None = None  # [tokens, 4]
    """the same by the target network"""
    forks: Tensor | None = None  # [trajectories, 2] int64
    """which trajectory of the batch each goes on from (-1: it begins with the prompt), and how many of the tokens that
    one sampled come before the fork; None: none does"""
    cut: Tensor | None = None  # [trajectories] bool
    """pieces of episodes that go on, whose reward is not known (`rollout.window`); None: all are over"""
    greedy: Tensor | None = None  # [trajectories] bool
    """sampled greedily, as a baseline that is not trained; None: none was"""
    entropy: Tensor | None = None  # [tokens]
    """entropy of the distribution the token was sampled from, under the current weights"""
    prob_square_sum: Tensor | None = None  # [tokens]
    """sum over the vocabulary of pi^2, for the logit-space gradient norm"""
    agent_of_turn: Tensor | None = None  # [turns] int64
    """who spoke, an index into `agents`; None: the only one"""
    agents: tuple[str, ...] = ("",)
    """names of those who speak in the batch; the empty one where a task names none"""
    noted: Noted = field(default_factory=lambda: Noted())
    """what the task noted, of the names that the recipe asks for"""
    reused: Reused | None = None
    """what came back from the experience pool; None: nothing did"""
    turn_pass: int | None = None
    """which turns, or tokens, this update is for, where a recipe updates them one after another (turn_order.py); None:
    all"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted:
    """Numbers that the task gave to episodes, turns and tokens, by name: columns in the order of the batch, NaN where
    there is none. A name is missing where no episode of the batch has it."""

    trajectory: Mapping[str, Tensor] = field(default_factory=dict)  # [trajectories]
    """also the named parts of rewards, as `reward/NAME`"""
    turn: Mapping[str, Tensor] = field(default_factory=dict)  # [turns]
    token: Mapping[str, Tensor] = field(default_factory=dict)  # [tokens]
    weights: Mapping[str, float] = field(default_factory=dict)
    """of the parts, where they are not 1 (`task.reward_weights`)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reused:
    """Which trajectories of a batch came back from the experience pool, and what the pool says of them."""

    source: Tensor  # [trajectories] int64
    """-1: fresh; else the query, an index into trajectory/reuse.py's SOURCES; demonstrations have a behaviour log-prob
    of 0, which means nothing"""
    replayed: Tensor  # [trajectories] bool
    """sampled by an earlier policy, whose log-probs they have"""
    demonstration: Tensor  # [trajectories] bool
    out: Tensor  # [trajectories] bool
    """fresh ones in whose place others are trained: they count for nothing"""
    advantage: Tensor  # [trajectories]
    """within their own group, when they were fresh; 0 of the others"""
    baseline: Tensor  # [trajectories]
    """median of the mean rewards of the newest groups"""
    scale: Tensor  # [trajectories]
    """median of their standard deviations"""

    @property
    def fresh(self) -> Tensor:  # [trajectories] bool
        return self.source < 0

    def in_policy_term(self, settings: ReuseSettings) -> Tensor:  # [trajectories] bool
        """Those that the policy gradient is taken of, or whose place they have."""
        found = torch.ones_like(self.out)
        if settings.replayed == "none":
            found = found & ~self.replayed
        if settings.demonstrations == "none":
            found = found & ~self.demonstration
        return found

    def in_statistics(self, settings: ReuseSettings) -> Tensor:  # [trajectories] bool
        """Those that groups' means and stds are taken over."""
        return (self.fresh if settings.statistics == "fresh" else self.in_policy_term(settings)) & ~self.out


@dataclass(frozen=True, slots=True, kw_only=True)
class Coefficients:
    """What the trainer multiplies gradients with. Everything is detached.

    loss = - sum_t policy[t] log pi_t  (+ sum_t value_grad[t] V_t  - sum_t entropy[t] H_t)

    All columns have the dtype of `Columns.log_prob`.

    Denominators are already inside, so micro-batches and ranks simply add up.
    """

    policy: Tensor  # [tokens]
    """c_t. With an exact baseline: the part that multiplies the reward (see `baseline`), on every
    trajectory a number times `baseline`"""
    baseline: Tensor | None = None  # [tokens]
    """OPOB with exact norms: the gradient is sum(policy*grad) - sum_groups b_g * sum(baseline*grad),
    where the trainer finds b_g from per-trajectory gradient norms (docs/algorithms.md#two-columns)"""
    entropy: Tensor | None = None  # [tokens]
    value_grad: Tensor | None = None  # [tokens], with Q heads [tokens, 4], with a median [tokens, 2]
    """d(value loss)/d(V_t)"""
    value_target: Tensor | None = None  # as `value_grad`
    """what the critic is trained towards, for one that is a distribution"""
    value_share: Tensor | None = None  # as `value_grad`
    """weight of each value in the critic's loss, 0 where it is not trained; they sum to 1"""
    clipped: Tensor | None = None  # [tokens]
    """coefficients of the clipped-away part of the surrogate (ST-PPO's clipping bias)"""
    learning_rate_factors: Mapping[str, float] = field(default_factory=dict)
    """named factors multiplied into this step's learning rate only, e.g. ess_scale and kappa"""
    skip: str = ""
    """not empty: nothing is left to train on; the step leaves the policy's weights and moments unchanged
    (`value_grad` may still be worth a step of the critic)"""
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Speakers:
    """Who spoke in a batch in which some trajectory has several agents: a speaker is one agent in one trajectory.

    S speakers, sorted by trajectory. What a speaker's token leads to, rewards and values, is looked for in the same
    speaker's later turns: those of the others are its environment.
    """

    of_turn: Tensor  # [U] int64, speaker
    agent: Tensor  # [U] int64, the same number for the same agent in every trajectory
    trajectory: Tensor  # [S] int64


Recurrence = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(values, other, segment) -> result, [rows] each, over segments of consecutive rows"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """A batch in float64. Trajectories with a value that is not finite are zeros here, and `select` rejects them.

    Turns without a token are left out; their reward is at the last token sampled before them.
    """

    columns: Columns
    log_prob: Tensor  # [T]
    log_behaviour: Tensor  # [T]
    log_proximal: Tensor  # [T], log_prob where the column is absent
    log_reference: Tensor | None  # [T]
    value: Tensor | None  # [T]
    value_before: Tensor | None  # [T], the critic at the start of the step
    value_slow: Tensor | None  # [T], the target network
    turn_values: Tensor | None  # [T, 4]
    turn_values_slow: Tensor | None  # [T, 4]
    entropy: Tensor | None  # [T]
    prob_square_sum: Tensor | None  # [T]
    reward: Tensor  # [I], 0 where not finite
    token_reward: Tensor  # [T]: turn rewards at the turn's last token, without the outcome
    turn: Tensor  # [T] int64, 0..turns-1
    trajectory: Tensor  # [T] int64
    group: Tensor  # [T] int64
    trajectory_of_turn: Tensor  # [U] int64
    group_of_trajectory: Tensor  # [I] int64
    state_key: Tensor  # [U] int64
    speakers: Speakers | None
    """None: no trajectory has several agents"""
    turn_length: Tensor  # [U] float64, > 0
    length: Tensor  # [I] float64
    num_groups: int
    readable: Tensor  # [I] bool: every column of its tokens is finite
    finite: Tensor  # [I] bool: and so is its reward
    rewarded: Tensor  # [I] bool: its reward is finite
    compared: Tensor  # [I] bool: and groups' means and stds are taken over it
    weighted: Tensor | None = None  # [I] bool: those with an importance weight in the policy term; None: all
    fresh: Tensor | None = None  # [I] bool: those that did not come back from the pool; None: all

    def of_fresh(self, chosen: Tensor) -> Tensor:
        """The fresh ones of the chosen trajectories, [I] bool -> [I] bool."""
        return chosen if self.fresh is None else chosen & self.fresh

    @property
    def num_tokens(self) -> int:
        return len(self.log_prob)

    @property
    def num_turns(self) -> int:
        return len(self.turn_length)

    @property
    def num_trajectories(self) -> int:
        return len(self.length)

    def sum_turn(self, values: Tensor) -> Tensor:
        """Sums, [T] -> [U]"""
        return segment_sum(values, self.turn, self.num_turns)

    def sum_trajectory(self, values: Tensor) -> Tensor:
        """Sums, [T] -> [I]"""
        return segment_sum(values, self.trajectory, self.num_trajectories)

    def sum_group(self, values: Tensor) -> Tensor:
        """Sums, [I] -> [G]"""
        return segment_sum(values, self.group_of_trajectory, self.num_groups)

    def recur(self, function: Recurrence, values: Tensor, other: Tensor, segment: Tensor) -> Tensor:
        """`function(values, other, segment)` over rows, tokens or turns, whose `segment` is that of `owner`: within a
        trajectory, or where it has several agents within the turns of each. All [rows]."""
        if self.speakers is None:
            return function(values, other, segment)
        order = torch.argsort(segment, stable=True)
        found = torch.empty_like(values)
        found[order] = function(values[order], other[order], segment[order])
        return found

    @property
    def owner_of_token(self) -> Tensor:  # [T] int64
        """To whom a token's future belongs: its trajectory, or its agent there."""
        return self.trajectory if self.speakers is None else self.speakers.of_turn[self.turn]

    @property
    def owner_of_turn(self) -> Tensor:  # [U] int64
        return self.trajectory_of_turn if self.speakers is None else self.speakers.of_turn

    @property
    def num_owners(self) -> int:
        return self.num_trajectories if self.speakers is None else len(self.speakers.trajectory)

    def mean_trajectory(self, values: Tensor) -> Tensor:
        """[T] -> [I], 0 for one without tokens"""
        return self.sum_trajectory(values) / self.length.clamp(min=1.0)


def tokens_of(columns: Columns, recipe: Recipe, need: Requirements) -> Tokens:
    """`columns` in float64. Raises ValueError when a column that `recipe` needs is missing."""
    _check(columns, recipe, need)
    trajectories = len(columns.reward)
    per_turn = torch.bincount(columns.turn_of_token, minlength=len(columns.trajectory_of_turn))
    kept_turn = per_turn > 0
    compact = kept_turn.cumsum(0) - 1
    trajectory = columns.trajectory_of_turn[columns.turn_of_token]
    length = torch.bincount(trajectory, minlength=trajectories)
    token_finite = torch.isfinite(columns.log_prob - columns.log_behaviour)
    for column in (columns.log_proximal, columns.log_reference, columns.value, columns.value_before,
                   columns.value_slow, columns.turn_values, columns.turn_values_slow):  # fmt: skip
        if column is not None:
            token_finite &= torch.isfinite(column) if column.ndim == 1 else torch.isfinite(column).all(1)
    rewarded = torch.isfinite(columns.reward)
    rewarded &= segment_sum((~torch.isfinite(columns.turn_reward)).double(), columns.trajectory_of_turn,
                            trajectories) == 0  # fmt: skip
    broken = segment_sum((~token_finite).double(), trajectory, trajectories) > 0
    finite = rewarded & ~broken
    ok = ~broken[trajectory]
    whole = bool(ok.all())

    def clean(column: Tensor | None) -> Tensor | None:  # [T] -> [T], [T, 4] -> [T, 4]
        if column is None:
            return None
        values = column.double()
        if whole and bool(torch.isfinite(values.sum())):  # nothing to clean, as nearly always
            return values
        return torch.where(ok if column.ndim == 1 else ok[:, None], values, 0.0).nan_to_num()

    def must(column: Tensor) -> Tensor:  # [T] -> [T]
        cleaned = clean(column)
        assert cleaned is not None
        return cleaned

    compared, weighted, fresh = rewarded, None, None
    if (reused := columns.reused) is not None:
        compared = rewarded & reused.in_statistics(recipe.reuse)
        weighted = reused.in_policy_term(recipe.reuse) & ~reused.out & ~reused.demonstration
        fresh = reused.fresh
    groups = int(columns.group_of_trajectory[-1]) + 1 if trajectories else 0
    proximal = columns.log_proximal if columns.log_proximal is not None else columns.log_prob
    return Tokens(
        columns=columns,
        log_prob=must(columns.log_prob),
        log_behaviour=must(columns.log_behaviour),
        log_proximal=must(proximal),
        log_reference=clean(columns.log_reference),
        value=clean(columns.value),
        value_before=clean(columns.value_before if columns.value_before is not None else columns.value),
        value_slow=clean(columns.value_slow),
        turn_values=clean(columns.turn_values),
        turn_values_slow=clean(columns.turn_values_slow),
        entropy=clean(columns.entropy),
        prob_square_sum=clean(columns.prob_square_sum),
        reward=torch.where(rewarded, columns.reward.double(), 0.0),
        token_reward=_token_rewards(columns, per_turn, trajectory, length, rewarded),
        turn=compact[columns.turn_of_token],
        trajectory=trajectory,
        group=columns.group_of_trajectory[trajectory],
        trajectory_of_turn=columns.trajectory_of_turn[kept_turn],
        group_of_trajectory=columns.group_of_trajectory,
        state_key=columns.state_key[kept_turn],
        speakers=_speakers(columns, kept_turn),
        turn_length=per_turn[kept_turn].double(),
        length=length.double(),
        num_groups=groups,
        readable=~broken,
        finite=finite,
        rewarded=rewarded,
        compared=compared,
        weighted=weighted,
        fresh=fresh,
    )


def _speakers(columns: Columns, kept: Tensor) -> Speakers | None:
    """kept [turns] bool: those with tokens."""
    if columns.agent_of_turn is None or len(columns.agents) == 1:
        return None
    agent, trajectory = columns.agent_of_turn[kept], columns.trajectory_of_turn[kept]
    if not ((agent[1:] != agent[:-1]) & (trajectory[1:] == trajectory[:-1])).any():
        return None
    agents = len(columns.agents)
    speaker, of_turn = torch.unique(trajectory * agents + agent, return_inverse=True)
    return Speakers(of_turn=of_turn, agent=agent, trajectory=speaker // agents)


def _token_rewards(columns: Columns, per_turn: Tensor, trajectory: Tensor, length: Tensor, rewarded: Tensor) -> Tensor:
    """Turn rewards at the last token of the turn, [T]; of a turn without tokens at the token before it.

    Of a first turn without tokens it is at the trajectory's first token; it is lost only when the trajectory has no
    token at all. per_turn [turns] counts tokens, trajectory [T], length and rewarded [I].
    """
    end = length.cumsum(0)
    last = per_turn.cumsum(0) - 1
    owner = columns.trajectory_of_turn
    position = torch.maximum(last, (end - length)[owner])
    usable = (length[owner] > 0) & rewarded[owner]
    values = columns.turn_reward.double()[usable]
    return segment_sum(values, position[usable], len(trajectory))


def _check(columns: Columns, recipe: Recipe, need: Requirements) -> None:
    """Refuse columns of unequal lengths, and missing ones. Raises ValueError."""
    tokens = len(columns.log_prob)
    if len(columns.log_behaviour) != tokens or len(columns.turn_of_token) != tokens:
        raise ValueError("log_prob, log_behaviour and turn_of_token must have one entry per policy token")
    columns_needed = {
        "log_proximal": need.proximal,
        "log_reference": need.reference,
        "value": need.value and not need.turn_q,
        "turn_values": need.turn_q,
        "turn_values_slow": need.turn_q,
        "prob_square_sum": need.prob_square_sum,
        "entropy": need.entropy_value,
        "log_teacher": need.teacher,
        "median": need.median,
        "log_proxy": need.proxy_share > 0,
    }
    for name, needed in columns_needed.items():
        column = getattr(columns, name)
        if needed and column is None:
            raise ValueError(f"recipe {recipe.name!r} needs the column {name}")
        if column is not None and len(column) != tokens:
            raise ValueError(f"{name} has {len(column)} entries for {tokens} policy tokens")


# Importance ratios: which policies, pooled over what, and where their gradient goes.


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """The ratio of every token's unit (itself, its turn, its trajectory)."""

    log: Tensor  # [T], not clamped
    value: Tensor  # [T], exp of the clamped log
    level: Level | str
    pool: Pool
    clamp: float = LARGEST_LOG_RATIO

    @property
    def inside(self) -> Tensor:  # [T] bool
        """Where the clamp leaves a gradient."""
        return self.log.abs() <= self.clamp

    def pull_back(self, per_token: Tensor, tokens: Tokens) -> Tensor:
        """d(sum_t per_token_t * log ratio_t) / d(log pi_s), [T] -> [T].

        With the mean every token of a unit receives the unit's mean: the turn-mean advantage of
        ST-PPO (docs/algorithms.md#turn-ratio)."""
        if self.level == "none":
            return torch.zeros_like(per_token)
        if self.level == "token":
            return per_token
        if self.level == "turn":
            total, length, unit = tokens.sum_turn(per_token), tokens.turn_length, tokens.turn
        else:
            total, length, unit = tokens.sum_trajectory(per_token), tokens.length, tokens.trajectory
        return (total / length.clamp(min=1.0) if self.pool == "mean" else total)[unit]


def pooled(log_ratio: Tensor, tokens: Tokens, level: Level | str, pool: Pool) -> Tensor:
    """Log-ratio of each token's unit (itself, its turn, its trajectory), [T] -> [T]."""
    if level == "none":
        return torch.zeros_like(log_ratio)
    if level == "token":
        return log_ratio
    if level == "turn":
        total, length, unit = tokens.sum_turn(log_ratio), tokens.turn_length, tokens.turn
    else:
        total, length, unit = tokens.sum_trajectory(log_ratio), tokens.length, tokens.trajectory
    return (total / length.clamp(min=1.0) if pool == "mean" else total)[unit]


def weight_of(log_ratio: Tensor, clamp: float = LARGEST_LOG_RATIO) -> Tensor:
    """exp of a log-ratio [T], clamped to +-20 (docs/algorithms.md#clamps)."""
    return log_ratio.clamp(-clamp, clamp).exp()


def ratio_of(tokens: Tokens, settings: RatioSettings) -> Ratio:
    """The recipe's ratio of the current policy to its denominator."""
    log_ratio = tokens.log_prob - log_denominator(tokens, settings)
    unit_log = pooled(log_ratio, tokens, settings.level, settings.pool)
    value = weight_of(unit_log, settings.clamp)
    return Ratio(log=unit_log, value=value, level=settings.level, pool=settings.pool, clamp=settings.clamp)


def log_denominator(tokens: Tokens, settings: RatioSettings) -> Tensor:
    """Log-prob of each token under the policy below the ratio, [T]."""
    match settings.denominator:
        case "behaviour":
            return tokens.log_behaviour
        case "proximal":
            return tokens.log_proximal
        case "proximal_loglinear":
            return log_linear_proximal(tokens)
        case "mixture":
            share = settings.mixture_weight
            return torch.logaddexp(tokens.log_behaviour + log(1 - share), tokens.log_prob + log(share))
        case "reference":
            assert tokens.log_reference is not None
            return tokens.log_reference
        case "group_expected":
            return log_group_expected(tokens)


def log_group_expected(tokens: Tokens) -> Tensor:
    """log of sum q^2 / sum q over the answers of the group, q = exp(mean log mu): the probability of an answer that
    the behaviour policy expects, each taken with its geometric mean over tokens (GEPO). [T]"""
    mean = tokens.mean_trajectory(tokens.log_behaviour)
    counted = tokens.readable & (tokens.length > 0)
    mean = torch.where(counted, mean, -torch.inf)
    group = tokens.group_of_trajectory
    once = segment_log_sum_exp(mean, group, tokens.num_groups)
    twice = segment_log_sum_exp(2 * mean, group, tokens.num_groups)
    expected = torch.where(torch.isfinite(once), twice - once, 0.0)
    return expected[tokens.group]


def log_linear_proximal(tokens: Tokens) -> Tensor:
    """The proximal policy without a forward pass, from token versions (AReaL; docs/algorithms.md#proximal-loglinear).

    With the proximal version one below the current one: log mu + a (log pi - log mu),
    a = clip((v_prox - v) / (v_now - v), 0, 1), and 0 for tokens of the current version. [T]
    """
    version = tokens.columns.version
    now = tokens.columns.current_version
    age = (now - version).double()
    share = ((now - 1 - version).double() / age.clamp(min=1.0)).clamp(0.0, 1.0)
    share = torch.where((age > 0) & (version >= 0), share, 0.0)
    return tokens.log_behaviour + share * (tokens.log_prob - tokens.log_behaviour)


def behaviour_log_ratio(tokens: Tokens) -> Tensor:
    """log pi_theta - log mu of every token: staleness and engine mismatch together. [T]"""
    return tokens.log_prob - tokens.log_behaviour


# Sums, extremes and backward recurrences over contiguous segments of a column, without Python loops.


def segment_sum(values: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """[rows] and [rows] int64 -> [segments]; an empty segment is 0."""
    return values.new_zeros(num_segments).index_add_(0, segment, values)


def segment_max(values: Tensor, segment: Tensor, num_segments: int, *, empty: float) -> Tensor:
    """[rows] and [rows] int64 -> [segments]; an empty segment is `empty`."""
    return values.new_full((num_segments,), empty).scatter_reduce_(0, segment, values, "amax", include_self=False)


def segment_min(values: Tensor, segment: Tensor, num_segments: int, *, empty: float) -> Tensor:
    """[rows] and [rows] int64 -> [segments]; an empty segment is `empty`."""
    return -segment_max(-values, segment, num_segments, empty=-empty)


def segment_log_sum_exp(log_values: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """log sum exp of each segment, [rows] and [rows] int64 -> [segments]; -inf when it is empty or all -inf."""
    highest = segment_max(log_values, segment, num_segments, empty=-torch.inf)
    highest = torch.where(torch.isfinite(highest), highest, torch.zeros_like(highest))
    return highest + segment_sum((log_values - highest[segment]).exp(), segment, num_segments).log()


def discounted_suffix_sum(values: Tensor, decay: Tensor, segment: Tensor) -> Tensor:
    """y_t = values_t + decay_t * y_{t+1} within each segment; `decay` is constant in a segment.

    Doubling the reach log2(longest segment) times instead of walking: after step j, y_t holds
    sum_{i < 2^j} decay^i values_{t+i}. `segment` is non-decreasing. All [rows].
    """
    result = values.clone()
    rows = len(values)
    longest = int(torch.bincount(segment).max()) if rows else 0
    reach, power = 1, decay.clone()
    while reach < longest:
        same = segment[:-reach] == segment[reach:]
        ahead = torch.where(same, power[:-reach] * result[reach:], 0.0)
        result = torch.cat([result[:-reach] + ahead, result[-reach:]])
        power = power * power
        reach *= 2
    return result


def next_in_segment(values: Tensor, segment: Tensor, *, last: Tensor) -> Tensor:
    """values_{t+1} within each segment, and `last` [rows] where row t is the last of its segment."""
    if len(values) == 0:
        return values.clone()
    shifted = torch.cat([values[1:], last[-1:]])
    is_last = torch.ones_like(segment, dtype=torch.bool)
    is_last[:-1] = segment[1:] != segment[:-1]
    return torch.where(is_last, last, shifted)
