"""In which dtype weights lie in shared memory, and the cache of a GPU that is shared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support_models import llama_folder
from support_run import quick_settings

from async_rl.errors import UserError
from async_rl.generator.build import shared_gpu_cache_bytes
from async_rl.model.folder import read_config
from async_rl.trainer.build import make_learner
from async_rl.trainer.publish import segment_dtype


@pytest.mark.parametrize(
    ("overrides", "dtype"),
    [
        ((), torch.float32),
        (("generator.dtype=bfloat16",), torch.bfloat16),
        (("generator.dtype=bfloat16", "lora.rank=2", "lora.send=merged"), torch.bfloat16),
        (("generator.dtype=bfloat16", "lora.rank=2", "lora.send=adapter"), None),
    ],
)
def test_the_segment_has_the_dtype_of_the_engine_unless_something_is_added_to_it(
    tmp_path: Path, overrides: tuple[str, ...], dtype: torch.dtype | None
) -> None:
    settings = quick_settings(llama_folder(tmp_path / "model"), *overrides)
    assert segment_dtype(settings, make_learner(settings)) == dtype


@pytest.mark.parametrize(
    ("overrides", "dtype"),
    [
        (("generator.dtype=bfloat16",), torch.bfloat16),
        (("generator.dtype=float32",), torch.float32),
        (("generator.dtype=bfloat16", "lora.rank=2", "lora.send=adapter"), None),
    ],
)
def test_so_it_has_for_vllm(tmp_path: Path, overrides: tuple[str, ...], dtype: torch.dtype | None) -> None:
    """Its workers copy from the segment into parameters of that dtype."""
    settings = quick_settings(llama_folder(tmp_path / "model"), "generator.engine=vllm", *overrides)
    assert segment_dtype(settings, make_learner(settings)) == dtype


def test_the_cache_of_a_shared_gpu_does_not_depend_on_who_starts_first(tmp_path: Path) -> None:
    """It follows from the settings, the model and the size of the GPU alone."""
    settings = quick_settings(
        llama_folder(tmp_path / "model"),
        "generator.engine=vllm",
        "generator.dtype=bfloat16",
        "generator.max_sequences=7",
    )
    shared = replace(settings, vllm=replace(settings.vllm, memory_share=0.4))
    config = read_config(Path(settings.model.path))
    assert config is not None
    token = 2 * config.layers * 2 * config.kv_heads * config.head_dim

    def cache(context: int, parameters: int, gpu: int) -> int:
        return shared_gpu_cache_bytes(shared, config, context, parameters=parameters, total=gpu)

    assert cache(100, 10**6, 80 << 30) == 8 * 112 * token  # all sequences and the probe, in blocks of 16
    assert cache(10**9, 10**6, 80 << 60) == 8 * 10**9 * token
    large = 14 * 10**9  # 28 of the 32 GB that are left to it
    assert cache(10**7, large, 80 << 30) == int(0.4 * (80 << 30)) - 2 * large - (3 << 30)
    with pytest.raises(UserError, match=r"leaves no room for a sequence of 1000 tokens.*raise it"):
        cache(1000, 20 * 10**9, 80 << 30)
    with pytest.raises(UserError, match=r"vllm\.kv_cache_mb is not set"):
        shared_gpu_cache_bytes(shared, None, 100, parameters=10**6, total=80 << 30)
