"""The note on caches that are rebuilt at every update."""

from __future__ import annotations

import pytest
from support_command import CONFIGS

from async_rl.config import load_settings
from async_rl.run.rebuilding import describe_rebuilding


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), ""),
        # 256 half full sequences of 8192 against 3 x 32 half full ones
        (("batch.groups_per_step=4", "batch.group_size=8", "trainer.ranks=1", "trainer.sharding=none"), "1,048,576"),
        (("batch.groups_per_step=4", "trainer.ranks=4", "generator.kv_on_update=keep"), ""),
        (("batch.groups_per_step=4", "trainer.ranks=4", "generator.max_sequences=32"), ""),
    ],
)
def test_caches_that_cost_more_than_a_step_are_named_with_the_remedy(words: tuple[str, ...], said: str) -> None:
    settings = load_settings(CONFIGS / "eight_gpu_math.yaml", ["generator.max_context=8192", *words])
    notes = describe_rebuilding(settings, 8192)
    assert bool(notes) == bool(said)
    assert not said or said in notes[0]
    assert not notes or "generator.kv_on_update=keep" in notes[0]
