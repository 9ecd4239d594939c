"""The metrics of the experience pool, for the glossary."""

from __future__ import annotations

from async_rl.observe.metric import Metric, Section

POOL = Section(
    title="What came back",
    before="""\
Only where the experience pool is on (`pool.*`) and something of it is in the step's batch. What the other sections
count of a batch (`reward/mean`, `len/mean`, `lag/*`, `is/*`, `kl/behaviour*`) is that of fresh trajectories alone;
`ess/*` counts every row that has an importance weight in the policy gradient.""",
    metrics=(
        Metric("pool/rows", "trajectories", "rows of the batch that come from the pool"),
        Metric("pool/rows/<source>", "trajectories", "those of this source (`pool.source`)"),
        Metric("pool/replaced", "trajectories", "fresh ones in whose place others are trained: they count for nothing"),
        Metric("pool/reward", "reward", "mean of the rows that came back"),
        Metric("pool/uses", "times", "mean over them of how often they came back, this time included"),
        Metric("pool/age", "steps", "mean over replayed rows of the step − version of their oldest token"),
        Metric("pool/age_max", "steps", "the largest of these; at most `pool.max_age`"),
        Metric("pool/advantage", "", "mean advantage over the tokens of replayed rows"),
        Metric("pool/log_ratio", "nats", "mean of log π − log μ over the tokens of replayed rows, each with its own μ"),
        Metric("pool/log_ratio_std", "nats", "standard deviation of the same: how far the policy has moved since"),
        Metric("pool/nll", "nats", "mean of −log π over the tokens of demonstrations"),
    ),
)
