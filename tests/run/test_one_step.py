"""How much of the program a reader must know to follow one training step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml
from support_command import Run

from async_rl.run_folder import RunFolder

MOST_FILES = 37
"""a GRPO step of one rank passed through 49 before rooms were merged, and 24 then; since 0.4.0 shared prefixes, the
robust reference and the decoder's own gradients have files of their own (30), since 0.5.0 compiled functions, lanes,
the model's arithmetic, updates in minibatches, the pass over one of them, and beginnings that are sent once (36), since
0.6.0 whole layers as compiled functions and publication beside training. What a run does not use (pool, forks, notes,
KL, windows) is not passed through"""
ROOT = Path(__file__).parent.parent.parent


def test_a_training_step_passes_through_few_files(tmp_path: Path, tiny_model: Path) -> None:
    values = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    values |= {"model": {"path": str(tiny_model)}, "recipe": "grpo", "evaluation": {"problems": 4, "every": 0}}
    values["trainer"] = {"steps": 4, "start": "external"}
    values["verify"] = {"share": 0}  # goes on beside the steps, and is none of them
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    run = Run(config, RunFolder(tmp_path / "run"))
    run.wait_for_event("trainer_awaited")
    out = tmp_path / "calls.json"
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    trainer = subprocess.run(
        [sys.executable, "-m", "support_traced_trainer", str(run.folder.path), "2", str(out)],
        capture_output=True, text=True, env={**os.environ, **rank}, cwd=ROOT / "tests", check=False,
    )  # fmt: skip
    said = run.said()
    assert trainer.returncode == 0, trainer.stderr + said
    assert run.process.returncode == 0, said
    called = json.loads(out.read_text())
    listed = "\n".join(f"{name}: {', '.join(found)}" for name, found in sorted(called.items()))
    assert any(name.endswith("objective/coefficients.py") for name in called), listed
    assert len(called) <= MOST_FILES, f"{len(called)} files:\n{listed}"
