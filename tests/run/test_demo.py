"""The demo configs, played with a tiny random model of their kind: Llama, SmolLM2's tokenizer where it is there."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from support_command import CONFIGS, run_command
from support_models import llama_config
from support_tokenizers import byte_folder

from async_rl.model.create import write_random_weights
from async_rl.model.tokenizer import Tokenizer
from async_rl.run_folder import RunFolder, read_rows

DEMOS = ("demo", "demo_lora", "demo_tools")
SMOLLM2 = CONFIGS.parent / ".venv" / "tokenizers" / "smollm2"
SMALL = (
    "trainer.steps=2", "batch.groups_per_step=2", "batch.group_size=2", "evaluation.problems=4", "evaluation.every=2",
    "generator.max_context=512", "wire.timeout_s=60",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    if (SMOLLM2 / "tokenizer.json").is_file():
        for file in SMOLLM2.iterdir():
            (folder / file.name).symlink_to(file)
    else:
        byte_folder(folder)
    vocabulary = 1 + max(Tokenizer(folder).control_tokens.values())
    config = llama_config(vocabulary=max(vocabulary, 49152), tied=True, max_context=1024)
    write_random_weights(folder, config, seed=0)
    return folder


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.nightly) if name != "demo" else name for name in DEMOS]
)
def test_it_runs_and_ends_with_answers_before_and_after(name: str, model: Path, tmp_path: Path) -> None:
    if name != "demo_tools" and importlib.util.find_spec("reasoning_gym") is None:
        pytest.skip("reasoning-gym is not installed")
    if name == "demo_lora" and importlib.util.find_spec("peft") is None:
        pytest.skip("peft is not installed")
    folder = RunFolder(tmp_path / "run")
    done = run_command(
        "run", CONFIGS / f"{name}.yaml", "--run-dir", folder.path, f"model.path={model}", *SMALL, timeout_s=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(read_rows(folder.metrics))) == 2
    answers = json.loads(folder.summary.read_text())["answers"]
    assert len(answers) == 3
    begin = "What is " if name == "demo_tools" else "Calculate "
    assert all(one["question"].startswith(begin) for one in answers)
    assert "3 held-out problems, answered before and after (reward in front):" in done.stdout


@pytest.mark.parametrize("name", DEMOS)
def test_its_head_says_how_it_is_started(name: str) -> None:
    text = (CONFIGS / f"{name}.yaml").read_text()
    head = text[: text.index("\nname:")]
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"async-rl run configs/{name}.yaml" in head


def test_the_lora_demo_is_the_demo_with_adapters() -> None:
    from async_rl.config import load_settings

    full, lora = (load_settings(CONFIGS / f"{name}.yaml", needs_model=False) for name in DEMOS[:2])
    assert lora.lora.rank > 0
    for group in ("model", "task", "batch", "recipe", "generator", "trainer", "evaluation", "staleness"):
        assert getattr(full, group) == getattr(lora, group)
