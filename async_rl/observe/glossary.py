"""What every metric means, and in which unit: the one table of them, from which docs/metrics.md is written.

A row of `metrics.jsonl` is one training step; its keys are those of `SECTIONS`, beside `step` and `time`. The report
shows the meanings under its charts. `python -m async_rl.observe.glossary > docs/metrics.md` writes the page anew.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from async_rl.observe.glossary_methods import METHODS
from async_rl.observe.glossary_pool import POOL
from async_rl.observe.glossary_sampler import SAMPLER
from async_rl.observe.metric import Metric, Section

INTRODUCTION = """\
One row a training step in `metrics.jsonl`. Sums and means run over the policy tokens of the **whole** optimizer
batch (all micro-batches, all ranks) unless said otherwise; prompt and tool tokens are never in them.

Symbols: token t of trajectory i; π the policy about to be updated, μ the policy that sampled the token (its own
recorded log-prob); ℓ_t = log π_t − log μ_t; ℓ_i = Σ_t ℓ_t over the trajectory; v the version about to be updated,
v_t the version that sampled the token; N tokens, B trajectories with at least one policy token; A the advantage;
ρ the ratio of the recipe (level, pooling and denominator of `ratio.*`); κ the weight that the trust rule leaves.
In averages of exp(ℓ_t) the exponent is clamped to ±20; in `ess/ratio` and `ess/token` nothing is clamped.
Trajectories with a number that is not finite are left out of everything but `ess/*`, `reject/*` and `len/rejected`.

Beside the metrics a row has `step` (the first is 0) and `time` (when it was written, seconds since 1970)."""

SECTIONS: tuple[Section, ...] = (
    Section(
        title="How far off policy the batch is",
        after="""\
**The calibrated reference.** Engine noise alone spreads ℓ_i like √length, so even fresh data has ρ < 1. Tokens with
v_t = v carry that noise and nothing else. Their sums per unit, divided by √length, are counted by size in length
buckets, with counts that fade; the variance per token σ²_b of a bucket is (median |x − median| / 0.6745)², which almost
half of them cannot move far. With E[w] = 1 and log-normal w, E[w²] = e^{var}, so
ρ_fresh = 1 / mean_u e^{σ²_b length_u}. A bucket with fewer than 8 fresh units takes the σ² of all; before any fresh
data ρ_fresh = 1. The same of the run's first 256 fresh units is ρ_begun, and ρ_ref = max(ρ_fresh, `ess.floor` ·
ρ_begun, 1/U). The log-normal form is an assumption: heavy tails make the true ρ_ref lower and the rule stricter than
intended.""",
        metrics=(
            Metric(
                "ess/ratio",
                "share",
                "(Σ w)² / (U Σ w²), computed as exp(2 lse(x) − lse(2x)) / U, with one log-weight x per unit of "
                "`ess.level` (default: x = ℓ_i, U = B). In [1/U, 1]; 1 means on policy. Invariant to a common "
                "factor. 1/U when any x is not finite",
            ),
            Metric("ess/size", "units", "U · `ess/ratio`: effective number of units"),
            Metric(
                "ess/ratio_clipped",
                "share",
                "the same over trajectories with w capped at `trust.cap` (recipes that truncate only); "
                "optimistic, never used for the learning rate",
            ),
            Metric(
                "ess/reference",
                "share",
                "ρ_ref: what `ess/ratio` would be on fresh data of these lengths (see below), or the number set",
            ),
            Metric(
                "ess/fresh",
                "share",
                "ρ_fresh: the same from the newest fresh data alone; below `ess/reference` where `ess.floor` holds "
                "that up",
            ),
            Metric(
                "ess/noise",
                "share",
                "variance of x over this batch's fresh tokens, around that of the run's start and as a share of what "
                "that allows: 4 times its variance, or half of its ρ. Above 1, fresh data are no longer what this "
                "engine samples. Absent when the batch has no fresh token",
            ),
            Metric("ess/nonfinite", "units", "units of trajectories with a log-prob (or value) that is not finite"),
            Metric("ess/token", "share", "(Σ_t e^{ℓ_t})² / (N Σ_t e^{2ℓ_t})"),
            Metric("is/log_weight_mean", "nats", "mean of ℓ_i"),
            Metric(
                "is/log_weight_std",
                "nats",
                "standard deviation of ℓ_i (divisor B); for log-normal weights `ess/ratio` ≈ exp(−std²)",
            ),
            Metric("is/log_weight_min", "nats", "smallest ℓ_i"),
            Metric("is/log_weight_max", "nats", "largest ℓ_i"),
            Metric("is/ratio_mean", "", "mean of e^{ℓ_t}; 1 in expectation when μ is true"),
            Metric("is/ratio_max", "", "largest e^{ℓ_t}"),
            Metric("is/ratio_min", "", "smallest e^{ℓ_t}"),
            Metric("is/ratio_p99", "", "smallest value that 99 % of the e^{ℓ_t} do not exceed"),
            Metric("is/chi2_token", "", "mean of e^{2ℓ_t} − 1"),
            Metric("kl/behaviour", "nats", "mean of e^{ℓ_t} − 1 − ℓ_t: estimates KL(μ ‖ π), never negative (k3)"),
            Metric("kl/behaviour_k1", "nats", "−mean of ℓ_t: the same, unbiased, noisier"),
            Metric(
                "kl/mismatch",
                "nats",
                "`kl/behaviour` over tokens with v_t = v, before any update of this batch: what engine and "
                "trainer disagree about at equal weights. Absent when the batch has no such token; `verify/mismatch` "
                "is measured at every version",
            ),
            Metric("lag/mean", "steps", "mean of v − v_t, in steps"),
            Metric("lag/max", "steps", "largest v − v_t: never above `max_staleness`"),
            Metric("lag/p95", "steps", "smallest lag that 95 % of the tokens do not exceed"),
            Metric(
                "lag/span",
                "steps",
                "mean over trajectories of max v_t − min v_t: weights changed while it was generated",
            ),
            Metric(
                "lag/flight",
                "steps",
                "mean over trajectories of newest − oldest version: the part of the lag that arose while generating",
            ),
            Metric(
                "lag/queue",
                "steps",
                "mean over trajectories of v − newest version: the part that arose while waiting for the trainer",
            ),
        ),
    ),
    Section(
        title="What the objective did about it",
        metrics=(
            Metric("clip/frac", "share", "share of kept tokens whose weight the trust rule changed"),
            Metric("clip/frac_pos", "share", "the same with A > 0, over all kept tokens"),
            Metric("clip/frac_neg", "share", "the same with A < 0"),
            Metric("clip/dual", "share", "share changed by the dual clip"),
            Metric(
                "clip/bias",
                "share",
                "Σ |(ρ − κ) A| / Σ |ρ A|: relative clipping bias, 0 when nothing is clipped. With "
                "`bias.estimator=exact`: ‖C‖ / (‖C‖ + ‖g‖), C the gradient cut away, g the gradient used",
            ),
            Metric("clip/bias_size", "", "mean of |(ρ − κ) A|, or ‖C‖ with the exact estimator"),
            Metric("opob/baseline", "reward", "mean over groups of the off-policy optimal baseline b = Σ W R / Σ W"),
            Metric(
                "opob/max_weight_share",
                "share",
                "mean over groups of max W / Σ W (with exact norms: of the length estimate); near 1 one "
                "trajectory decides alone",
            ),
            Metric("grad/norm_per_trajectory_median", "", "median over trajectories of ‖g_i‖ (exact OPOB)"),
            Metric("grad/norm_per_trajectory_max", "", "largest ‖g_i‖"),
            Metric("kl/regulariser", "nats", "mean of the estimator of `kl.estimator` against `kl.target`"),
            Metric("kl/coefficient", "", "β of this step, with `kl.allowance` times what the KL is above it"),
            Metric("kl/more<n>/regulariser", "nats", "the same of the n-th of `recipe.more_kl`, counted from 1"),
            Metric("kl/more<n>/coefficient", "", "and its β"),
            Metric("lr/base", "", "learning rate of the schedule"),
            Metric(
                "lr/ess_scale",
                "factor",
                "min(1, `ess/ratio` / `ess/reference`) ^ ½ (sqrt) or ^ 1 (linear); 1 when off",
            ),
            Metric("lr/kappa", "factor", "κ of the clipping-bias correction; 1 when off or nothing was clipped"),
            Metric(
                "lr/rollback",
                "factor",
                "`guard.rollback_lr_scale`, from the step on at which the run went back; absent before",
            ),
            Metric(
                "lr/effective",
                "",
                "`lr/base` · `lr/ess_scale` · `lr/kappa` · `lr/rollback`: what this step was done with",
            ),
            Metric("grad/norm", "", "global L2 norm of the gradient before clipping"),
            Metric(
                "updates/done",
                "updates",
                "updates of the weights that this step took on its batch, where it may take several (`updates.*`, "
                "`recipe.turn_order`); fewer than planned where the KL passed a bound, nothing was left to learn or a "
                "gradient was not finite (event `updates_stopped`). Other metrics of such a step are means over its "
                "updates",
            ),
            Metric("updates/left_out", "updates", "minibatches, or passes over turns, with nothing to learn; as above"),
            Metric(
                "updates/kl",
                "nats per token",
                "KL of `updates.kl_target` to the policy before the newest update, where `updates.kl_stop` is set; "
                "above it, that update was not taken",
            ),
        ),
    ),
    Section(
        title="What was left out",
        before="""\
`reject/<reason>/<what>` with the reasons `nonfinite` (a log-prob, value or reward is not finite), `sequence_ratio`
(product of ratios outside `select.sequence_*`), `geometric_ratio` (geometric mean outside `select.geometric_*`), `veto`
(one token's ratio below `select.veto`), `opsm` (negative advantage and mean log(μ/π) above `select.opsm`), `truncated`,
`zero_signal` (no advantage on any token), `equal_rewards` (those of its group), `group_reward` (the group's mean is
outside `select.group_*`), `flag` (marked by the task, `select.drop_flag`), `no_teacher` (distillation
alone, and no teacher spoke), `greedy` (sampled greedily, as a baseline), `no_greedy` (of a group without one),
`small_advantage` (`select.largest_share`), `small_deviation` (of a group whose rewards differ least,
`select.deviating_share`), `surplus` (beyond `select.keep_in_group`), `not_noted` (without the number
`advantage.note`). A trajectory may have several. Whether the rejected stay in the loss's denominators is
`select.denominator`.""",
        metrics=(
            Metric("reject/tokens", "share", "share of the tokens that was rejected for any reason"),
            Metric("reject/trajectories", "share", "share of the trajectories"),
            Metric("reject/<reason>/tokens", "tokens", "tokens rejected for this reason"),
            Metric("reject/<reason>/trajectories", "trajectories", "trajectories"),
            Metric(
                "reject/<reason>/<bucket>",
                "trajectories",
                "trajectories, by policy tokens: `below_16`, `below_64`, `below_256`, `below_1024`, "
                "`below_4096`, `below_16384` (each from the bound before), `from_16384`; absent when 0",
            ),
            Metric(
                "len/mean",
                "tokens",
                "mean policy tokens of a trajectory (trajectories without any left out); absent when there is none",
            ),
            Metric(
                "len/kept",
                "tokens",
                "the same over kept trajectories; lower than `len/mean`: the selection prefers short answers",
            ),
            Metric("len/rejected", "tokens", "the same over rejected ones"),
            Metric(
                "len/refused",
                "tokens",
                "mean policy tokens of trajectories in groups the buffer refused, for whatever reason, since the "
                "start of the run",
            ),
            Metric("groups/refused", "groups", "groups refused by the buffer since the last step"),
        ),
    ),
    Section(
        title="Signal",
        metrics=(
            Metric(
                "reward/mean",
                "reward",
                "mean outcome of a trajectory (one without a policy token counts); absent when there is none",
            ),
            Metric(
                "reward/eval",
                "reward",
                "mean outcome on held-out problems; in no row: `report` and the trackers make it of the events "
                "`evaluation` in `events.jsonl`",
            ),
            Metric(
                "reward/<part>/mean",
                "reward",
                "a named part of the reward: mean over the trajectories of the batch that have it, unweighted "
                "(`task.reward_weights`); absent when none has",
            ),
            Metric(
                "reward/<part>/eval",
                "reward",
                "the same over held-out episodes; in no row, made as `reward/eval` is",
            ),
            Metric(
                "note/<name>/mean",
                "",
                "a number that the task noted (`session.note`), or the endpoint of agents (`agent/requests`, "
                "`agent/contexts`, ...): mean over the trajectories of the batch that have it",
            ),
            Metric("advantage/mean", "", "mean of A over tokens"),
            Metric("advantage/std", "", "standard deviation of A over tokens"),
            Metric("advantage/max", "", "largest |A|"),
            Metric("group/zero_signal", "share", "share of trajectories in groups whose rewards are all equal"),
            Metric(
                "coefficient/used",
                "share",
                "recipe functions of one's own: share of tokens whose coefficient is not 0",
            ),
            Metric("entropy", "nats", "mean entropy of π at the sampled positions, nats"),
            Metric("value/loss", "", "mean over trained tokens of ½ max((V − ret)², (V_clipped − ret)²)"),
            Metric("value/mean", "", "mean V"),
            Metric("value/explained_variance", "share", "1 − var(ret − V) / var(ret)"),
            Metric(
                "critic/outside",
                "share",
                "share of the critic's targets outside `critic.low`..`critic.high`; where "
                "`critic.loss` is a cross-entropy",
            ),
            Metric("critic/grad_norm", "", "gradient norm of the critic"),
            Metric(
                "critic/warmup",
                "0 or 1",
                "1 in the first `critic.warmup_steps` steps, which train the critic alone (`lr/effective` is 0); "
                "absent after them",
            ),
        ),
    ),
    Section(
        title="Episodes that failed",
        before="""\
The task, its reward or the engine raised, or took too long. Such an episode has no reward: it is in no mean and is not
trained. The counts include held-out episodes.""",
        metrics=(
            Metric(
                "episodes/failed",
                "share",
                "share of the episodes that arrived since the step before; absent when none arrived",
            ),
            Metric(
                "episodes/failure",
                "text",
                "why the newest of them failed; absent when none did. Reasons are counted in `failures` of "
                "`summary.json`",
            ),
            Metric("episodes/arrived", "episodes", "all that arrived since the start of the run"),
            Metric("episodes/failed_total", "episodes", "those of them that failed"),
        ),
    ),
    Section(
        title="Alarms",
        before="""\
Present unless `guard.alarms=false`; what raises them: [alarms and rollback](howto/alarms.md).""",
        metrics=(
            Metric(
                "alarm/ess",
                "0 or 1",
                "1 from the step on at which the alarm on `ess/ratio` was raised, until the run goes back; else 0",
            ),
            Metric("alarm/reference", "0 or 1", "the same for `ess/noise`"),
            Metric("alarm/entropy", "0 or 1", "the same for `entropy`"),
            Metric("alarm/gradient", "0 or 1", "the same for `grad/norm`"),
            Metric("alarm/reward", "0 or 1", "the same for `reward/mean`"),
        ),
    ),
    Section(
        title="Whether generators hold the weights published",
        before="""\
After every load a generator shows checksums of 64 sampled elements of each tensor its engine holds, and its
log-probs of a fixed probe (64 tokens: the prompts of the task's first problems; where these have fewer than 16
different tokens, half of it is spread over the vocabulary). The trainer knows what both must be for each version it
published. A checksum that differs, or a mean difference of the log-probs above `canary.tolerance`, ends the run with
both numbers and the names of the tensors. With `vllm.tensor_parallel` above 1 every GPU shows the elements of its
own parts, and together they are compared like those of a whole model. Beside it stand `kl/mismatch` (engine against
trainer on sampled tokens of equal version) and `kl/behaviour` (with lag): a canary near 0 and a high
`kl/mismatch` mean that the weights are right and the arithmetic of the two is not; a low `kl/mismatch` and a high
`kl/behaviour` mean lag. Which elements are sampled changes with the version; a fault that never meets a sampled
element, and moves the probe less than the tolerance, is not seen.""",
        after="""\
The event `canary_silent` names a generator that showed nothing for `canary.silent_steps` steps; `summary.json` lists
under `canary.unchecked` the generators of which nothing was ever compared.""",
        metrics=(
            Metric("canary/checked", "loads", "loads of generators compared since the last step"),
            Metric(
                "canary/max_difference",
                "nats",
                "largest absolute difference of one log-prob on the probe among them, nats; absent when there was none",
            ),
            Metric(
                "canary/mean_difference",
                "nats",
                "largest mean over the probe of |difference| / max(1, |log-prob|) among them, nats: what "
                "`canary.tolerance` bounds",
            ),
            Metric(
                "canary/late",
                "loads",
                "loads of versions older than the last 16, since the start of the trainer: counted, not compared",
            ),
            Metric(
                "time/canary",
                "s",
                "seconds the trainer spent on making the evidence of the versions it published",
            ),
        ),
    ),
    Section(
        title="Whether generators do what they report",
        before="""\
A sample of every generator's trajectories (`verify.share`) is scored again by the trainer, under the versions that the
tokens name, and played again where the task is repeatable. A trajectory's mismatch is the mean over its tokens of
|difference| / max(1, |log-prob|) between what the generator says and what the trainer computes, times the temperature
where that is below 1. It may reach `verify/limit`: 30 times the median of this run's trajectories, at least 2e-5
(1e-2 for `generator.dtype=bfloat16`) and at most `canary.tolerance`. docs/explanations/verification.md says what
is found and what follows. With `verify.share=0` these columns are absent.""",
        metrics=(
            Metric("verify/checked", "trajectories", "scored since the last step, at least in part"),
            Metric(
                "verify/skipped",
                "trajectories",
                "sent to be scored since the last step and not scored: the versions they name are not held any more",
            ),
            Metric("verify/replayed", "trajectories", "played again to their end since the last step"),
            Metric("verify/wrong", "findings", "what is not as its generator says, since the last step; 0 is usual"),
            Metric(
                "verify/mismatch", "nats", "largest mismatch of a trajectory among them; absent when there was none"
            ),
            Metric("verify/limit", "nats", "mismatch that is held against a trajectory"),
            Metric("time/verify", "s", "seconds the trainer spent on it, also while it waited"),
        ),
    ),
    Section(
        title="What keeping the bound costs",
        before="""\
Counted by the buffer since the start of the run, as of the moment the step's batch was formed. A group is *due* when
the batch of a step is the last that may train it. With `pace` and `wait` nothing is discarded, but a batch may have to
wait for a running group although P others are finished (the window of `pace` ends, or the group is due); the event
`held_up` in `events.jsonl` names step, seconds, groups and generators.""",
        after="""\
**The depth controller** watches `ess/ratio` of each step (with several updates a batch their mean) as it
stands in the row of the step. It averages at least 10 steps that were generated at the present depth, leaves the depth
alone within a tenth of the target (less near 1), and otherwise moves it within 1 .. what the bound allows. A number
that is not finite makes the pipeline shallower. Every recipe has an `ess/ratio`, also those that do not correct for
stale data.""",
        metrics=(
            Metric(
                "staleness/depth",
                "batches",
                "batches in the pipeline that admission allows; moved by `staleness.target_ess`, whose decisions "
                "are the events `depth` (step, ESS of that step, smoothed ESS, old and new depth, reason)",
            ),
            Metric(
                "held_up/batches",
                "batches",
                "batches that waited for running groups although P others were finished, since this launch",
            ),
            Metric("held_up/seconds", "s", "how long they waited, summed"),
            Metric(
                "held_up/by/<generator>",
                "batches",
                "of these batches, those that waited for a group of this generator",
            ),
            Metric(
                "drop/groups",
                "groups",
                "groups dropped because they were too old (policy `drop`; so are the following)",
            ),
            Metric(
                "drop/trajectories",
                "trajectories",
                "their trajectories of which a policy token is known; one that was still running counts with the "
                "tokens it had when its generator was told to stop",
            ),
            Metric("drop/tokens", "tokens", "policy tokens of these"),
            Metric("drop/len_mean", "tokens", "`drop/tokens` / `drop/trajectories`; absent before the first"),
            Metric("drop/len_trained", "tokens", "mean policy tokens of all trajectories trained so far"),
            Metric(
                "drop/len_bias",
                "ratio",
                "`drop/len_mean` / `drop/len_trained`. Above 1: long answers are dropped more often than short "
                "ones. A lower estimate, since running trajectories would have become longer",
            ),
            Metric(
                "drop/<bucket>",
                "trajectories",
                "dropped trajectories by policy tokens, buckets as under `reject/<reason>/<bucket>`; absent when 0",
            ),
            Metric("drop/trained_<bucket>", "trajectories", "trained trajectories by policy tokens"),
        ),
    ),
    METHODS,
    POOL,
    SAMPLER,
    Section(
        title="Flow",
        metrics=(
            Metric("batch/trajectories", "trajectories", "trajectories in the batch"),
            Metric("batch/policy_tokens", "tokens", "policy tokens in the batch"),
            Metric("batch/tokens", "tokens", "all tokens, prompt and environment included"),
            Metric(
                "batch/shared",
                "share",
                "of the tokens (of one rank), those that were computed once for several trajectories "
                "(`trainer.shared_prefixes`)",
            ),
            Metric(
                "contexts/mean",
                "contexts",
                "contexts of a trajectory, the sequences that the model saw apart; only in steps in which one has "
                "more than one: its agent edited its history, or several agents saw different ones",
            ),
            Metric("batch/micro_batches", "micro-batches", "micro-batches (of one rank; every rank has as many)"),
            Metric(
                "batch/rank_imbalance",
                "ratio",
                "work of the busiest trainer rank as a multiple of the mean over ranks, 1 when it is even "
                "(`trainer.ranks` above 1)",
            ),
            Metric(
                "ranks/wait_max",
                "s",
                "seconds that the rank which waited longest spent in exchanges with the others during the step "
                "(`trainer.ranks` above 1)",
            ),
            Metric(
                "ranks/step_skew",
                "s",
                "that less the same of the rank which waited least: by so much the slowest rank lags behind the "
                "fastest. Exchanges of a sharded model inside its forward and backward are not seen",
            ),
            Metric("ranks/slowest", "rank", "number of the rank which waited least: the others waited for it"),
            Metric("tokens/generated", "tokens", "policy tokens generated since the start"),
            Metric("tokens/trained", "tokens", "policy tokens of this step"),
            Metric("slots/used", "permits", "permits taken"),
            Metric(
                "generators",
                "generators",
                "connected when the batch was formed, those that joined by themselves included (events "
                "`generator_joined`, `generator_left`, `generator_lost`)",
            ),
            Metric("slots/all", "permits", "permits there are"),
            Metric("time/wait_for_batch", "s", "seconds the trainer waited for data"),
            Metric("time/step", "s", "seconds of the step itself"),
            Metric("time/publish", "s", "seconds that training stood still for the new weights to be handed out"),
            Metric(
                "time/publish_beside",
                "s",
                "seconds that handing out the version before took beside this step: the copy, and with links the wait "
                "for a transfer of an older one",
            ),
            Metric("time/publish_wait", "s", "of the step, seconds that the optimizer waited for that copy"),
            Metric("time/generator_busy", "s", "seconds in which generators had sequences to decode"),
            Metric(
                "time/task_busy",
                "s",
                "seconds in which environments and rewards had work, on average over the processes that run them, "
                "summed over generators since this launch; 0 without `generator.task_processes`",
            ),
            Metric(
                "time/store",
                "s",
                "seconds the buffer process has spent on writes and commits to the store since this launch, "
                "waits for disk and processor included",
            ),
            Metric(
                "time/store_processor",
                "s",
                "of them, processor seconds: what it takes from the others on a machine whose cores are all busy",
            ),
            Metric("store/commits", "transactions", "transactions it committed since then"),
            Metric(
                "wire/refused",
                "messages",
                "messages and trajectories the buffer refused since then: malformed, impossible, or of a peer "
                "that has no business with them; by kind in its snapshot, a few examples of each in "
                "`events.jsonl`",
            ),
        ),
    ),
)


DERIVED: Mapping[str, str] = MappingProxyType(
    {
        "tokens_per_s/trained": "policy tokens trained a second of wall time, from one step's end to the next",
        "tokens_per_s/generated": "policy tokens generated a second of wall time",
        "busy/generators": "share of the time in which the generators had sequences to decode (time/generator_busy), "
        "on average over them",
    }
)
"""curves that the report computes from the metrics, and what they mean"""


@cache
def metrics() -> Mapping[str, Metric]:
    """Every metric by its key, in the order of the page."""
    return MappingProxyType({metric.key: metric for section in SECTIONS for metric in section.metrics})


def find_metric(key: str) -> Metric | None:
    """The metric of a key in a row, by its name or its pattern; None when there is none."""
    known = metrics()
    if key in known:
        return known[key]
    for pattern, metric in known.items():
        if "<" in pattern and re.fullmatch(re.sub(r"<\w+>", "[^/]+", pattern), key):
            return metric
    return None


def meaning(key: str) -> str:
    """The meaning of a metric or a derived curve as plain text; empty when it has none."""
    if key in DERIVED:
        return DERIVED[key]
    metric = find_metric(key)
    return plain(metric.meaning) if metric is not None else ""


def plain(markdown: str) -> str:
    """Markdown of a table's cell without its marks."""
    return markdown.replace("\\|", "|").replace("`", "")


def metrics_page() -> str:
    """docs/metrics.md."""
    lines = ["# Metrics", "", INTRODUCTION, ""]
    for section in SECTIONS:
        lines += [f"## {section.title}", ""]
        lines += [section.before, ""] if section.before else []
        lines += ["| key | unit | definition |", "|---|---|---|"]
        for metric in section.metrics:
            cell = metric.meaning.replace("|", "\\|")
            lines.append(f"| `{metric.key}` | {metric.unit} | {cell} |")
        lines += ["", section.after] if section.after else []
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(metrics_page(), end="")
