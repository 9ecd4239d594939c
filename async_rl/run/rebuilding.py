"""What it costs to rebuild KV caches at every update of the weights, beside a training step."""

from __future__ import annotations

from async_rl.config import Settings

FULL = 0.5
"""share of its context that a running sequence has filled, in the mean"""
TRAINED = 3
"""forwards that training on a token takes: one, and the backward pass that costs two"""


def describe_rebuilding(settings: Settings, context: int) -> list[str]:
    """A note where the caches of a generator's running sequences, rebuilt at each update, take more work than a rank's
    share of a step. `context`: tokens of the longest sequence."""
    generator, batch = settings.generator, settings.batch
    if generator.device == "cpu" or generator.kv_on_update == "keep" or not settings.staleness.max_staleness:
        return []
    rebuilt = int(FULL * generator.max_sequences * context)
    trained = int(FULL * batch.groups_per_step * batch.group_size * context * TRAINED) // settings.trainer.ranks
    if rebuilt <= trained:
        return []
    return [
        f"each update rebuilds the caches of some {rebuilt:,} tokens on every generator, more than a rank's share of a "
        f"step ({trained:,} tokens forward, by estimate); generator.kv_on_update=keep spares it (an episode's later "
        "tokens then come from a mixture of versions, whose log-probs are recorded), or lower generator.max_sequences"
    ]
