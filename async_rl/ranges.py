"""What numbers a setting may have, by its path."""

from __future__ import annotations

AT_LEAST: dict[str, float] = {
    "seed": 0,
    "batch.groups_per_step": 1,
    "batch.group_size": 1,
    "staleness.max_staleness": 0,
    "staleness.pipeline_depth": 0,
    "staleness.window": 0,
    "buffer.max_failures": 1,
    "buffer.max_refusals": 1,
    "buffer.memory_mb": 16,
    "buffer.max_store_mb": 0,
    "buffer.keep_steps": 0,
    "generator.count": 1,
    "generator.max_sequences": 1,
    "generator.max_context": 0,
    "generator.max_turns": 1,
    "generator.threads": 1,
    "generator.max_restarts": 0,
    "generator.save_turns_after_s": 0,
    "trainer.steps": 1,
    "trainer.updates_per_batch": 1,
    "trainer.micro_batch_tokens": 1,
    "trainer.threads": 1,
    "optimizer.learning_rate": 0,
    "optimizer.warmup_steps": 0,
    "optimizer.final_share": 0,
    "optimizer.weight_decay": 0,
    "optimizer.clip_norm": 0,
    "critic.learning_rate": 0,
    "critic.warmup_steps": 0,
    "evaluation.every": 0,
    "evaluation.problems": 1,
    "evaluation.samples": 1,
    "evaluation.temperature": 0,
    "canary.tolerance": 0,
    "canary.silent_steps": 0,
    "checkpoint.every": 0,
    "checkpoint.keep": 1,
    "wire.max_message_mb": 1,
}
"""Smallest allowed value of a setting."""

AT_MOST: dict[str, float] = {
    "seed": 2**63 - 1,
    "batch.groups_per_step": 10**6,
    "batch.group_size": 10**6,
    "staleness.max_staleness": 10**6,
    "staleness.window": 1,
    "buffer.memory_mb": 10**6,
    "buffer.max_store_mb": 10**8,
    "generator.count": 1024,
    "generator.max_sequences": 10**6,
    "generator.max_context": 10**9,
    "generator.threads": 1024,
    "generator.episode_timeout_s": 10**7,
    "trainer.steps": 10**9,
    "trainer.updates_per_batch": 10**4,
    "trainer.threads": 1024,
    "optimizer.final_share": 1,
    "evaluation.problems": 10**6,
    "evaluation.samples": 10**6,
    "wire.timeout_s": 10**6,
    "wire.max_message_mb": 10**6,
}
"""Largest allowed value of a setting."""

BELOW_ONE = ("optimizer.beta1", "optimizer.beta2")

ABOVE_ZERO = (
    "generator.temperature",
    "generator.episode_timeout_s",
    "generator.restart_window_s",
    "optimizer.epsilon",
    "wire.timeout_s",
)
