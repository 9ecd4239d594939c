"""Checksums and probe: what is equal shows the same, what differs is named."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support_models import make_decoder, qwen3_config
from torch import Tensor

from async_rl.model.tokenizer import Tokenizer
from async_rl.task import Problem, make_task
from async_rl.weights.canary import (
    PROBE_TOKENS,
    SAMPLES,
    Evidence,
    compare,
    fingerprint,
    probe_tokens,
    sampled_elements,
)

VERSIONS = st.integers(0, 10**7)


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {"embed": (50, 16), "norm": (16,), "up": (64, 16), "scalar": (), "none": (0, 4)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def evidence(**changes: object) -> Evidence:
    values = {"version": 4, "digests": {"a": 1, "b": 2, "c": 3}, "log_probs": (-1.0, -2.0, -3.0)}
    return Evidence(**{**values, **changes})  # type: ignore[arg-type]


# ---- checksums


def test_equal_tensors_have_equal_checksums_in_any_order_and_layout() -> None:
    turned = dict(reversed(tensors().items()))
    turned["up"] = turned["up"].T.contiguous().T
    assert not turned["up"].is_contiguous()
    assert fingerprint(turned, 7) == fingerprint(tensors(), 7)


@pytest.mark.parametrize("name", ["embed", "norm", "up", "scalar"])
def test_a_changed_tensor_changes_its_own_checksum_only(name: str) -> None:
    before = fingerprint(tensors(), 3)
    changed = tensors()
    changed[name] = changed[name] * (1 + 1e-6)
    after = fingerprint(changed, 3)
    assert {n for n in before if before[n] != after[n]} == {name}


def test_name_shape_and_dtype_are_part_of_a_checksum() -> None:
    zeros = torch.zeros(4, 6)
    found = [
        fingerprint({"a": zeros}, 0)["a"],
        fingerprint({"b": zeros}, 0)["b"],
        fingerprint({"a": zeros.view(6, 4)}, 0)["a"],
        fingerprint({"a": zeros.view(torch.int32)}, 0)["a"],
        fingerprint({"a": zeros.bfloat16()}, 0)["a"],
    ]
    assert len(set(found)) == len(found)


def test_a_cast_by_the_trainer_is_the_cast_of_the_engine() -> None:
    held = {name: tensor.to(torch.bfloat16) for name, tensor in tensors().items()}
    assert fingerprint(tensors(), 9, torch.bfloat16) == fingerprint(held, 9)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(size=st.integers(1, 10**10), version=VERSIONS)
def test_one_element_of_every_part_is_looked_at(size: int, version: int) -> None:
    (index,) = sampled_elements(np.array([size]), version)
    assert index.min() >= 0
    assert index.max() < size
    part = np.arange(SAMPLES)
    assert (index >= np.floor(part * (size / SAMPLES))).all()
    assert (index <= (part + 1) * (size / SAMPLES)).all()


@settings(derandomize=True, deadline=None, max_examples=30)
@given(version=VERSIONS, begin=st.floats(0, 1), rows=st.booleans())
def test_a_stale_stretch_of_a_tensor_is_seen_under_every_version(version: int, begin: float, rows: bool) -> None:
    """A 32nd of the rows, or half of the columns: a torn copy, or one shard of two that was not updated."""
    fresh = torch.zeros(1024, 1024)
    stale = fresh.clone()
    if rows:
        first = int(begin * (1024 - 32))
        stale[first : first + 32] = 1
    else:
        stale[:, 512 * (begin < 0.5) :][:, :512] = 1
    assert fingerprint({"w": fresh}, version) != fingerprint({"w": stale}, version)


def test_different_versions_look_at_different_elements() -> None:
    seen = {int(i) for version in range(200) for i in sampled_elements(np.array([2000]), version)[0]}
    assert len(seen) > 1900


# ---- comparison


def test_equal_evidence_is_right() -> None:
    found = compare(evidence(), evidence())
    assert (found.tensors, found.num_tensors, found.max_difference) == ((), 3, 0.0)
    assert not found.wrong(0.0)


def test_tensors_that_differ_or_that_one_side_lacks_are_named() -> None:
    found = compare(evidence(), evidence(digests={"a": 1, "b": 9, "d": 3}))
    assert found.tensors == ("b", "c", "d")
    assert found.wrong(math.inf)


def test_tensors_that_are_split_are_not_compared_but_one_must_be() -> None:
    found = compare(evidence(), evidence(digests={"a": 1}, split=("b", "c", "unknown")))
    assert (found.tensors, found.num_tensors) == ((), 1)
    found = compare(evidence(), evidence(digests={"a": 9}, split=("a", "b")))
    assert (found.tensors, found.num_tensors) == (("a", "c"), 2)
    assert compare(evidence(), evidence(digests={}, split=("a", "b", "c"))).tensors == ("a", "b", "c")


def test_the_tolerance_bounds_the_mean_difference_and_the_worst_log_prob_is_shown() -> None:
    expected = evidence(log_probs=(-0.5, -2.0, -4.0))
    found = compare(expected, evidence(log_probs=(-0.6, -2.5, -4.2)))
    assert found.max_difference == 0.5
    assert (found.worst, found.expected, found.found) == (1, -2.0, -2.5)
    assert found.mean_difference == pytest.approx((0.1 + 0.5 / 2 + 0.2 / 4) / 3)
    assert not found.wrong(0.134)
    assert found.wrong(0.133)


@pytest.mark.parametrize("log_probs", [(-1.0, -2.0), (), (-1.0, math.nan, -3.0), (-1.0, -math.inf, -3.0)])
def test_log_probs_that_are_missing_or_no_numbers_are_wrong_at_any_tolerance(log_probs: Sequence[float]) -> None:
    other = evidence(log_probs=log_probs)
    for found in (compare(evidence(), other), compare(other, evidence())):
        assert found.max_difference == math.inf
        assert found.wrong(1e9)


# ---- probe


def test_a_probe_of_poor_prompts_is_spread_over_the_vocabulary(tiny_model: Path) -> None:
    tokenizer = Tokenizer(tiny_model)
    task = make_task("guess", {})
    probe = probe_tokens(task, tokenizer, 1000)
    assert probe == probe_tokens(make_task("guess", {}), Tokenizer(tiny_model), 1000)
    assert len(probe) == PROBE_TOKENS
    assert set(probe[: PROBE_TOKENS // 2]) == set(tokenizer.encode("?"))
    assert len(set(probe)) > tokenizer.vocab_size / 2
    assert 0 <= min(probe) <= max(probe) < tokenizer.vocab_size
    assert probe_tokens(task, tokenizer, 7) == probe[:7]


class Words:
    """A task whose prompts have many different characters."""

    name = "words"

    def __init__(self, *prompts: str) -> None:
        self._problems = [Problem(index=i, prompt=prompt) for i, prompt in enumerate(prompts)]

    def problems(self, split: str) -> Sequence[Problem]:
        return self._problems


def test_a_probe_of_rich_prompts_is_these_prompts(tmp_path: Path) -> None:
    from support_models import qwen3_folder

    tokenizer = Tokenizer(qwen3_folder(tmp_path))
    first, second = "the quick brown fox jumps over the lazy dog", "0123456789 sphinx of black quartz"
    probe = probe_tokens(Words(first, second), tokenizer, 1000)  # type: ignore[arg-type]
    assert tokenizer.decode(probe) == (first + second)[:PROBE_TOKENS]


def test_every_parameter_of_a_decoder_has_a_checksum() -> None:
    model = make_decoder(replace(qwen3_config(), layers=1))
    assert fingerprint(dict(model.named_parameters()), 0).keys() == dict(model.named_parameters()).keys()
