"""Settings that a run would not use are refused with the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from support_run import quick_settings

from async_rl.errors import UserError
from async_rl.run.preflight import check_idle


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("recipe=grpo", "critic.kind=model"), r"critic\.\* does nothing with recipe=grpo.*critic\.kind=head"),
        (("optimizer.final_share=0.3",), "set optimizer.final_share=0, or"),
        (("recipe=ppo", "critic.loss=two_hot"), r"value_clip bounds a squared error.*set recipe\.gae\.value_clip=0"),
        (("recipe=archer", "critic.loss=two_hot"), "is for token_gae and turn_gae"),
        (("recipe=ppo", "critic.target_average=0.9"), r"does nothing with recipe\.gae\.critic_trace=1"),
        (("recipe=grpo", "updates.kl_stop=0.1"), "with one update a batch, which is always taken"),
        (("recipe=grpo", "reference.every=5"), "recipe=grpo, which has no reference policy"),
    ],
)
def test_what_does_nothing_is_refused(tmp_path: Path, words: tuple[str, ...], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        check_idle(quick_settings(tmp_path, *words))


def test_what_does_something_is_not(tmp_path: Path) -> None:
    check_idle(quick_settings(tmp_path, "recipe=grpo"))
    check_idle(quick_settings(tmp_path, "recipe=ppo", "critic.kind=model"))
    check_idle(quick_settings(tmp_path, "recipe=archer", "critic.target_average=0.9", "critic.epochs=3"))
    check_idle(quick_settings(tmp_path, "recipe=grpo", "updates.kl_stop=0.1", "updates.epochs=2"))
    check_idle(quick_settings(tmp_path, "recipe=grpo", "recipe.kl.coefficient=0.1", "reference.average=0.9"))
    check_idle(quick_settings(tmp_path, "optimizer.schedule=linear", "optimizer.final_share=0.3"))
