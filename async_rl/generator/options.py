"""What the loop of a generator needs of the settings."""

from __future__ import annotations

from dataclasses import dataclass

from async_rl.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorOptions:
    """Example: `make_options(settings, "generator-0")`."""

    name: str
    max_sequences: int
    group_size: int
    max_turns: int
    episode_timeout_s: float
    save_turns_after_s: float
    """finished turns of episodes that have run longer are kept by the buffer"""
    timeout_s: float
    """longest silence of the buffer, and longest wait for it to acknowledge something"""
    stall_report_s: float
    """longest wait for that which is not reported"""
    joined: bool = False
    """it came by itself; the launcher knows nothing of it"""


def make_options(settings: Settings, name: str, *, joined: bool = False) -> GeneratorOptions:
    """What the loop of generator `name` needs. `joined`: by itself, not started by the launcher."""
    chosen = settings.generator
    return GeneratorOptions(
        name=name,
        max_sequences=chosen.max_sequences,
        group_size=settings.batch.group_size,
        max_turns=chosen.max_turns,
        episode_timeout_s=chosen.episode_timeout_s,
        save_turns_after_s=chosen.save_turns_after_s,
        timeout_s=settings.wire.timeout_s,
        stall_report_s=settings.wire.stall_report_s,
        joined=joined,
    )
