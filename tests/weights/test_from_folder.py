"""Weights of a folder are read into the places where an engine wants them, and are in memory once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support_models import llama_folder, qwen3_config, write_folder
from support_run import quick_settings

from async_rl.generator.build import make_engine
from async_rl.model.folder import load_model
from async_rl.model.tokenizer import Tokenizer
from async_rl.weights import from_folder
from async_rl.weights.from_folder import can_read, read_weights


def stored() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(70, 33, generator=random),
        "half": torch.randn(9, 5, generator=random).to(torch.float16),
        "brain": torch.randn(65, 7, generator=random).to(torch.bfloat16),
        "double": torch.randn(4, 3, generator=random, dtype=torch.float64),
        "vector": torch.randn(300, generator=random),
        "scalar": torch.randn((), generator=random),
        "empty": torch.zeros(0, 4),
        "cube": torch.randn(3, 4, 5, generator=random),
    }


@pytest.mark.parametrize("buffer", [4 << 20, 1000, 8])
@pytest.mark.parametrize("files", [1, 3])
def test_what_is_read_is_what_a_cast_of_the_file_gives_wherever_it_is_to_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffer: int, files: int
) -> None:
    monkeypatch.setattr(from_folder, "BUFFER_BYTES", buffer)
    tensors, where = stored(), {}
    for number in range(files):
        name = "model.safetensors" if files == 1 else f"model-{number}.safetensors"
        some = dict(list(tensors.items())[number::files])
        save_file(some, tmp_path / name)
        where |= dict.fromkeys(some, name)
    if files > 1:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert can_read(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        targets = {name: torch.full(tensor.shape, 9.0, dtype=dtype) for name, tensor in tensors.items()}
        targets["matrix"] = torch.full((33, 70), 9.0, dtype=dtype).t()  # as an engine lays it
        targets["brain"] = torch.full((7, 2 * 65), 9.0, dtype=dtype).t()[65:]
        del targets["half"]  # others are passed over
        read_weights(tmp_path, targets)
        for name, target in targets.items():
            assert torch.equal(target, tensors[name].to(dtype)), name
    with pytest.raises(KeyError, match="other"):
        read_weights(tmp_path, {"other": torch.zeros(1)})


def test_other_dtypes_are_left_to_the_mapping(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, dtype=torch.int8)}, tmp_path / "model.safetensors")
    assert not can_read(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_holds_the_weights_of_its_folder(tmp_path: Path, dtype: str) -> None:
    folder = llama_folder(tmp_path / "model")
    settings = quick_settings(folder, f"generator.dtype={dtype}")
    engine = make_engine(settings, Tokenizer.of(settings.model))
    held = dict(engine._model.named_parameters())  # type: ignore[attr-defined]
    expected = dict(load_model(folder, dtype=getattr(torch, dtype)).named_parameters())
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[name], tensor) for name, tensor in expected.items())


STARTS = """
import sys
from pathlib import Path
import torch
from support_run import quick_settings
from async_rl.generator.build import make_engine
from async_rl.model.tokenizer import Tokenizer

def read(what):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(what))

torch.set_num_threads(1)
torch.randn(64, 64) @ torch.randn(64, 64)
settings = quick_settings(Path(sys.argv[1]), "generator.max_context=64")
tokenizer = Tokenizer.of(settings.model)
before = read("VmRSS")
engine = make_engine(settings, tokenizer)
print(sum(p.nbytes for p in engine._model.parameters()), read("VmHWM") - before, read("VmRSS") - before)
"""


def test_a_generator_holds_its_weights_once_also_while_it_starts(tmp_path: Path) -> None:
    """It took twice the weights while it mapped the files, and copied each layer twice."""
    config = qwen3_config(hidden=512, intermediate=2048, layers=6, heads=8, kv_heads=4, head_dim=64)
    folder = write_folder(tmp_path / "model", config)
    path = str(Path(__file__).parent.parent)
    words = [sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r})\n{STARTS}", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    weights, peak, held = map(int, done.stdout.split())
    assert weights > 80 << 20
    assert peak < 1.35 * weights, "with what is imported on the way"
    assert held < 1.3 * weights
