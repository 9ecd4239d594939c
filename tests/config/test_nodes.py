"""Settings of a trainer over several machines: what would do nothing is refused."""

from __future__ import annotations

import pytest

from async_rl.config import Settings, check
from async_rl.config.schema import structured, with_overrides
from async_rl.errors import UserError

BASE = {
    "task": {"name": "guess"},
    "trainer": {"start": "external", "ranks": 4, "nodes": 2, "network": "10.0.0.0/8"},
    "model": {"path": "m"},
}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trainer.start=launcher", "trainer.network=eth0"], "trainer.nodes is 2, but the run starts its ranks"),
        (["trainer.nodes=3"], "trainer.nodes is 3, which does not divide trainer.ranks=4"),
        (["trainer.start=launcher", "trainer.nodes=1"], "trainer.network does nothing with trainer.start=launcher"),
        (["trainer.network=10.0.0.0/64"], "trainer.network: .*write a network like 10.0.0.0/8"),
    ],
)
def test_what_does_nothing_or_cannot_be_is_refused(words: list[str], said: str) -> None:
    check_only(BASE)
    with pytest.raises(UserError, match=said):
        check_only(with_overrides(BASE, words))


def check_only(values: dict[str, object]) -> None:
    """The relations alone: the model need not exist."""
    check(structured(Settings, values, where=""))
