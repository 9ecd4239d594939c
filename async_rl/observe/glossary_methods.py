"""The metrics of teachers, bands around the entropy and numbers that follow a metric, for the glossary."""

from __future__ import annotations

from async_rl.observe.metric import Metric, Section

METHODS = Section(
    title="Teachers, and numbers that follow a metric",
    before="Only for recipes that have them: `teaching`, `band`, `controller`.",
    metrics=(
        Metric(
            "teacher/kl", "nats", "mean of log π_t − log q_t over tokens with a teacher q: its reverse KL, on policy"
        ),
        Metric("teacher/missing", "share", "tokens for which no teacher spoke"),
        Metric("band/outside", "share", "tokens whose entropy is outside the band around the mean of the steps before"),
        Metric(
            "controlled/<number>", "", "the value that a number of the recipe has in the next update (`controller`)"
        ),
    ),
)
