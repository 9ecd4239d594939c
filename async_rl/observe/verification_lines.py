"""What was found of generators that do not do what they report, in words."""

from __future__ import annotations

from async_rl.events import GeneratorGivenUp, GeneratorQuarantined, RewardsNotRepeatable, TrajectoryDoubted


def verification_line(
    event: TrajectoryDoubted | GeneratorQuarantined | GeneratorGivenUp | RewardsNotRepeatable,
) -> str:
    """A line for the terminal."""
    match event:
        case TrajectoryDoubted():
            return (
                f"step {event.step}: DOUBT about {event.name} ({event.lie}): sample {event.sample} of group "
                f"{event.group}: {event.reason}; all that it sends next is verified"
            )
        case GeneratorQuarantined():
            return quarantine_line(event)
        case GeneratorGivenUp():
            return f"{event.reason}\nthe run goes on without {event.name}"
        case RewardsNotRepeatable():
            return f"rewards are not verified any more: they are not repeatable ({event.reason})"


def quarantine_line(event: GeneratorQuarantined) -> str:
    """What a generator did, and what of it reached the weights."""
    trained = "nothing of it was trained"
    if event.groups_trained:
        steps = f"steps {event.first_step} to {event.last_step}"
        trained = f"{event.groups_trained} groups of it were trained, in {steps}; `async-rl audit` names them"
    return (
        f"QUARANTINED {event.name}: it reported {event.lie} that are not what it did ({event.reason}); "
        f"{event.groups_refused} groups are refused and asked again, {trained}"
    )
