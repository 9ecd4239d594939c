"""The metrics of teachers, bands around the entropy, numbers that follow a metric and episodes in pieces, for the
glossary."""

from __future__ import annotations

from async_rl.observe.metric import Metric, Section

METHODS = Section(
    title="Teachers, numbers that follow a metric, episodes in pieces",
    before="Only for recipes that have them: `teaching`, `band`, `controller`; the last two with `rollout.window`.",
    metrics=(
        Metric(
            "teacher/kl", "nats", "mean of log π_t − log q_t over tokens with a teacher q: its reverse KL, on policy"
        ),
        Metric("teacher/missing", "share", "tokens for which no teacher spoke"),
        Metric("band/outside", "share", "tokens whose entropy is outside the band around the mean of the steps before"),
        Metric(
            "controlled/<number>", "", "the value that a number of the recipe has in the next update (`controller`)"
        ),
        Metric(
            "window/cut",
            "share",
            "trajectories that are pieces of episodes that go on; they are in no mean reward. Only in steps in which "
            "there are some",
        ),
        Metric("critic/earlier", "share", "of the tokens that trained the critic, those of earlier pieces"),
    ),
)
