"""Triton's segment_ratio, in its interpreter, against its definition."""

from __future__ import annotations

from dataclasses import asdict
from unittest.mock import patch

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from async_rl_kernels import reference
from async_rl_kernels import segment_ratio_triton as fast
from async_rl_kernels.segment_ratio import Rule, Turns

RULES = st.builds(
    Rule,
    level=st.sampled_from(["token", "turn", "sequence"]),
    pool=st.sampled_from(["mean", "sum"]),
    rule=st.sampled_from(["none", "ppo", "truncate", "interval", "cispo"]),
    gradient=st.sampled_from(["unit", "token"]),
    dual_clip=st.sampled_from([0.0, 1.5]),
    cap=st.sampled_from([1.2, 8.0]),
)


@settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    shape=st.lists(st.lists(st.sampled_from([0, 1, 3, 33]), max_size=3), min_size=1, max_size=3),
    rule=RULES,
    scale=st.sampled_from([0.2, 15.0]),
    seed=st.integers(0, 2**31),
)
def test_every_column_equals_the_definition(shape: list[list[int]], rule: Rule, scale: float, seed: int) -> None:
    lengths, turns = [n for each in shape for n in each], [len(each) for each in shape]
    random = torch.Generator().manual_seed(seed)
    log_ratio, advantage, share = torch.randn(3, sum(lengths), generator=random)
    log_ratio *= scale
    with patch.object(fast, "block_of", lambda _: 32):
        got = fast.segment_ratio_columns(log_ratio, advantage, share, Turns(lengths, turns), rule)
    columns = log_ratio.double(), advantage.double(), share.double()
    want = reference.segment_ratio(*columns, lengths, turns, **asdict(rule))
    assert torch.equal(got[1], want[1])
    for number in (0, 2, 3, 4):
        torch.testing.assert_close(got[number].double(), want[number], rtol=1e-4, atol=1e-5)


def test_a_block_fits_the_mean_length() -> None:
    assert [fast.block_of(n) for n in (0, 20, 33, 500, 100_000)] == [32, 32, 64, 512, 1024]
