"""min_p_log_prob against its definition in float64."""

from __future__ import annotations

import pytest
import torch

from async_rl_kernels import linear_logprob, min_p_log_prob, reference


@pytest.mark.parametrize("tokens", [0, 1, 40])
@pytest.mark.parametrize("share", [0.001, 0.02, 0.5, 0.999])
def test_kept_tokens_are_renormalised_and_the_others_have_none(tokens: int, share: float) -> None:
    random = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 16, generator=random, dtype=torch.float64)
    weight = torch.randn(97, 16, generator=random, dtype=torch.float64)
    targets = torch.randint(97, (tokens,), generator=random)
    got = min_p_log_prob(hidden, weight, targets, share=share, temperature=1.3)
    wanted = reference.min_p_log_prob(hidden, weight, targets, share=share, temperature=1.3)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    kept = got.isfinite()
    assert tokens < 2 or share != 0.02 or 0 < int(kept.sum()) < tokens
    whole = linear_logprob(hidden, weight, targets, temperature=1.3).log_prob
    assert bool((got[kept] >= whole[kept]).all())


def test_a_small_tile_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(33, 8, generator=random), torch.randn(64, 8, generator=random)
    targets, cap = torch.randint(64, (33,), generator=random), torch.full((33,), 3.0)
    whole = min_p_log_prob(hidden, weight, targets, share=0.1, cap=cap)
    monkeypatch.setattr("async_rl_kernels.min_p.tile_limits", lambda _: (100, 1))
    torch.testing.assert_close(min_p_log_prob(hidden, weight, targets, share=0.1, cap=cap), whole)


def test_a_share_that_keeps_all_or_nothing_is_refused() -> None:
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match="between 0 and 1"):
            min_p_log_prob(torch.ones(1, 2), torch.ones(3, 2), torch.zeros(1, dtype=torch.int64), share=share)
