"""`async-rl doctor` as a user runs it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from support_command import write_config

from async_rl.config import load_settings
from async_rl.doctor.examine import check_model


def doctor(*words: str, cwd: Path) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "async_rl", "doctor", *words],
        capture_output=True, text=True, cwd=cwd, timeout=120, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_a_sound_set_up_is_ok_from_the_machine_to_synchronous_equivalence(tiny_model: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_model)
    code, said, complained = doctor(str(config), "--json", "optimizer.learning_rate=0.002", cwd=tmp_path)
    assert complained == ""
    found = {finding["check"]: finding for finding in json.loads(said)}
    wrong = [f for f in found.values() if f["level"] == "error"]
    assert (code, wrong) == (0, [])
    expected = (
        *("settings", "python", "sqlite", "zeromq", "cores", "gpu", "unix socket", "tcp loopback"),
        *("model", "shared memory", "disk", "task", "reward", "memory", "tokenizer", "history"),
        *("chat template", "log-probs", "max_staleness=0"),
    )  # fmt: skip
    assert [name for name in expected if name not in found] == []
    assert "weights differ from synchronous training by 0.0" in found["max_staleness=0"]["said"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml"], "nothing is left behind"


def test_config_shows_the_memory_estimate(tiny_model: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "async_rl", "config", str(write_config(tmp_path, tiny_model))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    assert "memory, estimated for" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("in all on cpu")


def test_without_a_config_it_looks_at_the_machine(tmp_path: Path) -> None:
    code, said, _ = doctor(cwd=tmp_path)
    assert code == 0
    assert "\nok       unix socket" in said
    assert "log-probs" not in said
    assert "0 errors" in said.splitlines()[-1]


def test_without_a_model_folder_it_says_how_to_make_one_and_goes_on(tiny_model: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_model)
    words = ["model.path=models/none", "generator.count=500", "wire.endpoint=tcp://127.0.0.1:5", "wire.keys=none"]
    code, said, _ = doctor(str(config), *words, cwd=tmp_path)
    assert code == 1
    assert "error    wire.endpoint       wire.keys: none/server.key_secret cannot be read" in said
    assert "error    model               models/none does not exist" in said
    assert "-> `async-rl init-model models/none --task guess`" in said
    assert "warning  cores" in said
    assert "ok       reward" in said
    one_gpu = load_settings(Path(__file__).parents[2] / "configs" / "one_gpu.yaml", ["model.path=models/none"])
    remedy = check_model(one_gpu, []).remedy  # init-model has no demonstrations of this task
    assert "hf download NAME --local-dir models/none" in remedy
    assert "init-model" not in remedy
    assert "2 errors, " in said.splitlines()[-1]  # how many warnings is up to the machine


def test_a_broken_tokenizer_and_a_wrong_setting_are_error_lines(tiny_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    (broken / "tokenizer.json").write_text("{")
    config = write_config(tmp_path, broken)
    code, said, complained = doctor(str(config), cwd=tmp_path)
    assert code == 1
    assert "tokenizer.json cannot be read" in said
    assert "Traceback" not in said + complained
    code, said, _ = doctor(str(config), "batch.group_sise=3", cwd=tmp_path)
    assert code == 1
    assert "batch.group_sise is not a setting" in said
    assert "ok       tcp loopback" in said
    code, _, complained = doctor("trainer.steps=3", cwd=tmp_path)
    assert code == 2
    assert "name a YAML file of settings before trainer.steps=3" in complained
