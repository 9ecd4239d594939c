"""Rows of tensors written by some ranks and read by others: nothing lost, nothing twice, to the last bit."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from async_rl.errors import UserError
from async_rl.trainer.ranks import Ranks
from async_rl.trainer.sharding import RowFiles, rows_of, save_rows


def rank(number: int, size: int) -> Ranks:
    """One of several that need not talk to each other."""
    return Ranks(rank=number, size=size, mesh=None if size == 1 else object(), timeout_s=1.0)  # type: ignore[arg-type]


@settings(deadline=None)
@given(total=st.integers(0, 40), size=st.integers(1, 9))
def test_rows_are_cut_as_torch_cuts(total: int, size: int) -> None:
    cut = [rows_of(total, number, size) for number in range(size)]
    pieces = torch.arange(total).chunk(size) if total else ()
    assert [list(range(*c)) for c in cut if c[0] < c[1]] == [piece.tolist() for piece in pieces]


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 9), wrote=st.integers(1, 5), reads=st.integers(1, 5))
def test_what_some_ranks_wrote_others_read(rows: int, wrote: int, reads: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    tensors = {
        "exp_avg/a": torch.randn(rows, 3, generator=generator),
        "exp_avg/b": torch.randn(rows, generator=generator),
        "step/a": torch.tensor(7.0),
    }
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for number in range(wrote):
            save_rows(tensors, folder, "optimizer", rank(number, wrote))
        with RowFiles(folder, "optimizer") as files:
            assert set(files.names()) == tensors.keys()
            assert files.scalar("step/a") == 7
            for name in ("exp_avg/a", "exp_avg/b"):
                read = [files.rows(name, *rows_of(rows, number, reads)) for number in range(reads)]
                assert torch.equal(torch.cat(read), tensors[name])
                assert torch.equal(files.as_laid_out(name, tensors[name]), tensors[name])


def test_a_missing_part_is_not_overlooked(tmp_path: Path) -> None:
    for number in (0, 2):
        save_rows({"x": torch.arange(6)}, tmp_path, "optimizer", rank(number, 3))
    with RowFiles(tmp_path, "optimizer") as files, pytest.raises(KeyError, match="rows 0 to 5 of x"):
        files.rows("x", 0, 6)
    with pytest.raises(UserError, match=r"no critic.safetensors is in it"), RowFiles(tmp_path, "critic"):
        pass
