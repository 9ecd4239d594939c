"""The metrics of the sampler, for the glossary."""

from __future__ import annotations

from async_rl.observe.metric import Metric, Section

SAMPLER = Section(
    title="What was chosen",
    before="""\
Only where the sampler is on (`sampler.*`). Counted by the buffer over the groups of the step's batch, with what was
known when each of them was admitted; absent for a batch that an earlier launch had formed.""",
    metrics=(
        Metric(
            "sampler/estimate",
            "share",
            "mean success that was estimated of the problems when they were chosen: (successes + 1) / (attempts + 2), "
            "both without a start and faded by `sampler.half_life`",
        ),
        Metric(
            "sampler/in_band",
            "share of groups",
            "those whose estimate lay within `sampler.low` and `sampler.high`; a problem never tried counts as 0.5",
        ),
        Metric("sampler/samples", "trajectories", "mean size of a group"),
        Metric("sampler/started", "share of groups", "those whose answers began with a start (`sampler.start`)"),
        Metric(
            "sampler/max_turns",
            "turns",
            "mean limit on the turns of an episode, of groups that have one; absent where none has",
        ),
        Metric("sampler/problems_tried", "problems", "different ones of which a group has ended, in the whole run"),
        Metric(
            "sampler/source/<number>",
            "share of groups",
            "those of this source of the data (ucb only); the run's `problem_sources.json` has its name; absent when 0",
        ),
    ),
)
