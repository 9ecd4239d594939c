"""In which dtype weights lie in shared memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support_models import llama_folder
from support_run import quick_settings

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
