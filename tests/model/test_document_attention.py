"""Packed documents never see each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support_models import make_decoder, qwen3_config

from async_rl.model.attention import MAX_PADDING, DocumentAttention, make_buckets

MODEL = make_decoder(qwen3_config(layers=1))


def pack(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(40, (sum(lengths),), generator=torch.Generator().manual_seed(len(lengths)))
    return tokens, torch.cat([torch.arange(length) for length in lengths])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=9))
def test_packed_forward_and_gradient_equal_one_by_one(lengths):
    tokens, positions = pack(lengths)
    weight = torch.randn(len(tokens), 32, generator=torch.Generator().manual_seed(1))
    MODEL.zero_grad()
    packed = MODEL(tokens, positions, DocumentAttention(lengths))
    (packed * weight).sum().backward()
    gradients = [p.grad.clone() for p in MODEL.parameters() if p.grad is not None]
    MODEL.zero_grad()
    alone = torch.cat(
        [MODEL(part, torch.arange(len(part)), DocumentAttention([len(part)])) for part in tokens.split(lengths)]
    )
    (alone * weight).sum().backward()
    assert torch.allclose(packed, alone, atol=1e-5)
    for found, expected in zip(gradients, (p.grad for p in MODEL.parameters() if p.grad is not None), strict=True):
        assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=30))
def test_buckets_hold_every_token_once_and_little_padding(lengths):
    buckets = make_buckets(lengths, torch.device("cpu"))
    flat = torch.cat([bucket.gather.flatten() for bucket in buckets])
    assert torch.equal(flat[buckets[0].restore], torch.arange(sum(lengths)))
    assert len(flat) <= MAX_PADDING * sum(lengths)


def test_one_attention_serves_every_layer():
    model = make_decoder(qwen3_config(layers=3))
    tokens, positions = pack([5, 9, 2])
    attention = DocumentAttention([5, 9, 2])
    assert torch.equal(model(tokens, positions, attention), model(tokens, positions, attention))


@pytest.mark.parametrize("lengths", [[0], [3, 0, 2], [-1]])
def test_empty_documents_are_refused(lengths):
    with pytest.raises(ValueError, match="at least one token"):
        DocumentAttention(lengths)


def test_lengths_that_do_not_cover_the_tokens_are_refused():
    tokens, positions = pack([5, 4])
    with pytest.raises(ValueError, match="9 tokens for documents of 8"):
        MODEL(tokens, positions, DocumentAttention([5, 3]))
