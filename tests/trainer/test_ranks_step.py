"""Several ranks take the step that one process takes: of weights around 1 in float64 to 1e-11, in float32 to 1e-5."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path

import pytest
import support_ranks as support
import torch
from safetensors.torch import load_file
from support_models import ALPHABET, make_decoder, qwen3_config
from torch import Tensor

from async_rl.errors import UserError
from async_rl.model.architecture import config_values
from async_rl.model.create import write_character_tokenizer
from async_rl.model.folder import load_tensors, save_folder
from async_rl.trainer.ranks import LAUNCHED, join_ranks, one_rank

pytestmark = pytest.mark.xdist_group("ranks")  # what the ranks did is made once
SIZES = (2, 4) if os.environ.get("ASYNC_RL_NIGHTLY") else (2,)
"""numbers of ranks that are started; four take a minute of two cores"""
TOLERANCE = 1e-11
"""of weights around 1 in float64, behind two steps that moved them by about 0.03; sums are in another order"""
FLOAT32 = 1e-5
"""the same for float32"""
BFLOAT16 = 0.05
"""where products are rounded to bfloat16 (sharded, norms' weights too): length of the difference, as a share of the
length of the movement; 0.02 was seen sharded, 0.012 from another order of trajectories alone"""
NOT_COMPARED = ("batch/micro_batches", "batch/rank_imbalance", "batch/shared")
"""metrics that say how the work was shared"""
ALL = [
    pytest.param(
        size, key, case, sharding, id=f"{size} ranks, {sharding}, {case.name}",
        marks=pytest.mark.nightly if size > 2 else (),
    )
    for size in (2, 4)
    for key, case, sharding in support.keys(size)
]  # fmt: skip

Outcome = tuple[dict[str, Tensor], list[dict[str, float]]]


@pytest.fixture(scope="module")
def alone() -> dict[str, Outcome]:
    """What one process does, by name of the case."""
    return {case.name: support.outcome(case, one_rank(), "none") for case in support.CASES}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By number of ranks, the folder with what they did."""
    folders = {size: tmp_path_factory.mktemp(f"ranks{size}") for size in SIZES}
    for name in support.RUNS:
        if name != "foreign":
            save_model(folders[2] / name, untied=name == "critic")
    if importlib.util.find_spec("transformers"):
        save_foreign_model(folders[2] / "foreign")
    for size, folder in folders.items():
        support.start(support.__file__, folder, size)
    return folders


@pytest.mark.parametrize(("size", "key", "case", "sharding"), ALL)
def test_ranks_take_the_step_of_one_process(
    size: int, key: str, case: support.Case, sharding: str, together: dict[int, Path], alone: dict[str, Outcome]
) -> None:
    want, metrics = alone[case.name]
    before = dict(support.make_model(case.config, 1).named_parameters())
    assert max(float((want[name] - p).detach().abs().max()) for name, p in before.items()) > 1e-3
    compare(together[size], key, size, (want, metrics), TOLERANCE)


@pytest.mark.parametrize("sharding", ["none", "full"])
@pytest.mark.parametrize("name", support.RUNS)
def test_learners_of_a_run_take_the_step_of_one_process(name: str, sharding: str, together: dict[int, Path]) -> None:
    if name == "foreign":
        pytest.importorskip("transformers")
    want = support.run_outcome(together[2] / name, one_rank(), "none")
    if name != "bfloat16":
        compare(together[2], f"{name}-{sharding}", 2, want, FLOAT32)
        return
    found, before = load_file(together[2] / f"{name}-{sharding}.0.safetensors"), load_tensors(together[2] / name)
    weights, _ = want
    moved = torch.cat([(weights[n] - before[n]).flatten() for n in weights])
    apart = torch.cat([(weights[n] - found[n]).flatten() for n in weights])
    assert apart.norm() < BFLOAT16 * moved.norm()


def compare(folder: Path, key: str, size: int, wanted: Outcome, tolerance: float) -> None:
    want, metrics = wanted
    every = [load_file(folder / f"{key}.{rank}.safetensors") for rank in range(size)]
    for name, tensor in want.items():
        assert all(torch.equal(every[0][name], other[name]) for other in every[1:]), f"ranks have parted: {name}"
        torch.testing.assert_close(every[0][name], tensor, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    found = json.loads((folder / f"{key}.0.json").read_text())
    for row, one in zip(found, metrics, strict=True):
        assert row.keys() - {"batch/rank_imbalance", "batch/shared"} == one.keys()
        if tolerance == TOLERANCE:
            for name in one.keys() - set(NOT_COMPARED):
                assert row[name] == pytest.approx(one[name], rel=1e-8, abs=1e-10, nan_ok=True), name
        for name in {"grad/norm", "probe", "critic/grad_norm", "rescored", "rescored_held"} & one.keys():
            assert row[name] == pytest.approx(one[name], rel=1e-4), name


def save_model(folder: Path, *, untied: bool) -> None:
    config = qwen3_config(tied=not untied)
    folder.mkdir()
    write_character_tokenizer(folder, ALPHABET)
    (folder / "config.json").write_text(json.dumps(config_values(config)))
    save_folder(folder, make_decoder(config), source=folder)


def save_foreign_model(folder: Path) -> None:
    """With a tied head and multipliers that the built-in decoder has not."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GraniteConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    write_character_tokenizer(folder, "0123456789abcdef")


def test_a_rank_that_is_gone_is_an_error_with_words(tmp_path: Path) -> None:
    support.start(support.__file__, tmp_path, 3, "lost")
    for rank in (0, 1):
        assert re.search(rf"rank {rank} of 3 did not get .*: a rank is gone", (tmp_path / f"{rank}.txt").read_text())


def test_one_rank_exchanges_with_itself() -> None:
    ranks = one_rank()
    rows = torch.arange(6.0).view(3, 2)
    assert ranks.leads
    assert ranks.gather_rows(rows, [3]) is rows
    assert ranks.broadcast_bytes(b"x") == b"x"
    assert ranks.sum_tensor(rows) is rows
    ranks.barrier()
    ranks.close()


def test_a_rank_without_the_others_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    assert join_ranks("cpu", 1.0).size == 1
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="MASTER_ADDR, MASTER_PORT is not in the environment"):
        join_ranks("cpu", 1.0)
