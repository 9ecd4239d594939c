"""What a run asks of a cluster: words that can be given to `async-rl run` again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from support_run import quick_settings

from async_rl.cluster.demand import Asked, demand
from async_rl.config import Settings

PLACED = ("generator.device=cuda", "generator.gpus=0", "trainer.device=cuda", "trainer.gpus=1")


def test_gpus_that_the_config_names_are_taken_back_by_words_that_can_be_read() -> None:
    def load(words: Sequence[str]) -> Settings:
        return quick_settings(Path("model"), *PLACED, *words)

    found = demand(Asked(config="c.yaml"), load)
    assert (found.settings.generator.gpus, found.settings.trainer.gpus) == ("", "")
    assert "generator.gpus=''" in found.words
