"""A learner that was saved and loaded goes on bit for bit; what is damaged on the disk is not used."""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
import torch
from blake3 import blake3
from support_run import quick_settings

from async_rl.config import Settings
from async_rl.errors import UserError
from async_rl.objective import ObjectiveState
from async_rl.trainer import manifest as manifest_module
from async_rl.trainer.build import make_learner
from async_rl.trainer.checkpoint import load_checkpoint, random_state, save_checkpoint, set_random_state
from async_rl.trainer.learner import Learner
from async_rl.trainer.manifest import (
    MANIFEST,
    checkpoint_path,
    damage_of,
    list_checkpoints,
    newest_whole,
    version_of,
    write_whole,
)
from async_rl.trainer.packing import pack_step
from async_rl.trainer.team import weights_checksum, weights_hash
from async_rl.trajectory import Trajectory, Turn, VersionSpan


def episodes(step: int) -> list[Trajectory]:
    """Two-turn episodes in groups of four, with made-up behaviour log-probs."""
    drawn = np.random.default_rng(step)
    made = []
    for number in range(8):
        first, second = int(drawn.integers(1, 5)), int(drawn.integers(1, 4))
        length = 3 + first + 2 + second
        made.append(
            Trajectory(
                group=100 * step + number // 4,
                sample=number % 4,
                problem=0,
                split="train",
                seed=0,
                tokens=drawn.integers(0, 10, length).astype(np.int32),
                log_behaviour=drawn.uniform(-3.0, -1.0, length).astype(np.float32),
                turns=(Turn(start=3, length=first, reward=0.25), Turn(start=5 + first, length=second)),
                versions=(VersionSpan(version=max(0, step - number % 2), start=3, end=length),),
                reward=float(drawn.integers(0, 2)),
                ended="finished",
            )
        )
    return made


def train(learner: Learner, settings: Settings, steps: Sequence[int]) -> list[object]:
    return [learner.step(pack_step(settings, episodes(step))).metrics for step in steps]


@pytest.mark.parametrize(
    "overrides",
    [
        ("recipe=vcpo",),
        ("recipe=turn_gae_ppo", "critic.warmup_steps=1"),
        ("recipe=turn_gae_ppo", "critic.kind=model", "critic.warmup_steps=1"),
        ("recipe=ppo", "recipe.kl.coefficient=0.1", "updates.epochs=2", "optimizer.schedule=cosine"),
        ("recipe=ppo", "updates.epochs=2", "updates.minibatches=2", "updates.kl_stop=0.1", "batch.groups_per_step=2"),
        ("recipe=dr_grpo", "recipe.kl.coefficient=0.1", "reference.average=0.5"),
        ("recipe=archer", "critic.kind=model", "critic.warmup_steps=1", "critic.target_average=0.9", "critic.epochs=2"),
    ],
    ids=" ".join,
)
def test_a_learner_saved_and_loaded_goes_on_bit_for_bit(
    overrides: tuple[str, ...], tmp_path: Path, tiny_model: Path
) -> None:
    settings = quick_settings(tiny_model, "trainer.steps=6", *overrides)
    whole = make_learner(settings)
    train(whole, settings, range(3))
    path = save_checkpoint(tmp_path, whole, {"evaluations_asked": 2}, source=tiny_model, keep=3)
    expected = train(whole, settings, range(3, 6))

    torch.rand(3)
    resumed = make_learner(settings)
    progress = load_checkpoint(path, resumed)

    assert progress == {"evaluations_asked": 2}
    assert resumed.version == version_of(path) == 3
    assert train(resumed, settings, range(3, 6)) == expected
    assert weights_hash(resumed.weights()) == weights_hash(whole.weights())
    assert resumed.state == whole.state
    assert resumed.state != ObjectiveState() or overrides[0] != "recipe=vcpo"


def test_a_checkpoint_of_another_recipe_is_refused_with_what_is_missing(tmp_path: Path, tiny_model: Path) -> None:
    settings = quick_settings(tiny_model, "recipe=grpo")
    learner = make_learner(settings)
    train(learner, settings, [0])
    path = save_checkpoint(tmp_path, learner, {}, source=tiny_model, keep=1)
    with pytest.raises(UserError, match=r"does not belong to these settings.*critic\.safetensors"):
        load_checkpoint(path, make_learner(quick_settings(tiny_model, "recipe=turn_gae_ppo")))


def test_random_numbers_go_on_where_they_were() -> None:
    state = json.loads(json.dumps(random_state()))
    first = (torch.rand(4).tolist(), np.random.rand(4).tolist(), [random.random() for _ in range(4)])
    set_random_state(state)
    assert (torch.rand(4).tolist(), np.random.rand(4).tolist(), [random.random() for _ in range(4)]) == first


@pytest.mark.parametrize("mark", [weights_hash, weights_checksum])
def test_hash_and_checksum_see_every_bit_and_every_name(mark: Callable[[Mapping[str, torch.Tensor]], str]) -> None:
    weights = {"a": torch.zeros(3), "b": torch.ones(2, 2, dtype=torch.bfloat16)}
    known = mark(weights)
    assert mark(dict(reversed(weights.items()))) == known
    assert mark({**weights, "a": torch.tensor([0.0, -0.0, 0.0])}) != known
    assert mark({"a": weights["a"], "c": weights["b"]}) != known
    assert mark({**weights, "b": weights["b"].flatten()}) != known


# ------------------------------------------------------------------------------------- files


def some_checkpoint(folder: Path, version: int) -> Path:
    def write(into: Path) -> None:
        (into / "model.safetensors").write_bytes(bytes(range(200)) * version)
        (into / "learner.json").write_text("{}")

    path = checkpoint_path(folder, version)
    write_whole(path, write)
    return path


def test_every_kind_of_damage_is_found_and_the_checkpoint_before_is_used(tmp_path: Path) -> None:
    good = some_checkpoint(tmp_path, 1)

    def truncated(path: Path) -> None:
        (path / "model.safetensors").write_bytes(bytes(100))

    def flipped(path: Path) -> None:
        content = bytearray((path / "model.safetensors").read_bytes())
        content[77] ^= 1
        (path / "model.safetensors").write_bytes(bytes(content))

    damages = {
        r"model\.safetensors has 100 bytes instead of 400": truncated,
        "checksum": flipped,
        "learner.json is missing": lambda path: (path / "learner.json").unlink(),
        f"{MANIFEST} is missing": lambda path: (path / MANIFEST).unlink(),
        f"{MANIFEST} is damaged": lambda path: (path / MANIFEST).write_text('{"schema": 1, "fil'),
        f"{MANIFEST} has schema 9": lambda path: (path / MANIFEST).write_text('{"schema": 9}'),
    }
    for expected, harm in damages.items():
        path = some_checkpoint(tmp_path, 2)
        assert newest_whole(tmp_path) == (path, [])
        harm(path)
        found, (damage,) = newest_whole(tmp_path)
        assert found == good
        assert damage.path == path
        assert damage.reason == damage_of(path)
        assert re.search(expected, damage.reason), damage.reason


def test_a_checkpoint_of_an_older_version_is_checked_by_its_own_sums(tmp_path: Path) -> None:
    """Up to 0.4.0 they were BLAKE2b's."""
    path = some_checkpoint(tmp_path, 2)
    manifest = json.loads((path / MANIFEST).read_text())
    for name, entry in manifest["files"].items():
        assert entry.pop("blake3")
        entry["blake2b"] = blake2b((path / name).read_bytes(), digest_size=16).hexdigest()
    (path / MANIFEST).write_text(json.dumps(manifest))
    assert damage_of(path) is None
    (path / "learner.json").write_text("[]")
    assert damage_of(path) == "learner.json is not what was written (checksum)"
    del manifest["files"]["learner.json"]["blake2b"]
    (path / MANIFEST).write_text(json.dumps(manifest))
    assert damage_of(path) == f"{MANIFEST} is damaged", "one without a sum proves nothing"


def test_files_of_a_checkpoint_are_summed_side_by_side_while_the_ranks_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, whole = threading.Barrier(4), manifest_module._digest

    def digest(path: Path, kind: str) -> str:
        together.wait(20)  # all four are under way at once, or this fails
        return whole(path, kind)

    monkeypatch.setattr(manifest_module, "_digest", digest)
    told: list[int] = []
    path = checkpoint_path(tmp_path, 1)

    def write(into: Path) -> None:
        for i in range(4):
            (into / f"{i}.bin").write_bytes(bytes([i]) * 9)

    write_whole(path, write, keepalive=lambda: told.append(1))
    assert told
    entries = json.loads((path / MANIFEST).read_text())["files"]
    assert {name: entry["blake3"] for name, entry in entries.items()} == {
        f"{i}.bin": blake3(bytes([i]) * 9).hexdigest() for i in range(4)
    }


def test_a_file_that_cannot_be_summed_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest_module, "to_disk", full)
    with pytest.raises(OSError, match="No space left"):
        some_checkpoint(tmp_path, 1)
    assert list_checkpoints(tmp_path) == []


def test_a_hash_is_compared_in_the_form_it_was_written_in() -> None:
    weights = {"a": torch.arange(5.0), "b": torch.ones(2, dtype=torch.bfloat16)}
    said = b"a torch.float32 (5,)\n" + torch.arange(5.0).numpy().tobytes()
    said += b"b torch.bfloat16 (2,)\n\x80\x3f\x80\x3f"
    old = blake2b(said, digest_size=16).hexdigest()
    assert weights_hash(weights, like=old) == old
    new = f"blake3:{blake3(said).hexdigest(16)}"
    assert weights_hash(weights) == weights_hash(weights, like=new) == new


def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    good = some_checkpoint(tmp_path, 1)

    def half(into: Path) -> None:
        (into / "model.safetensors").write_bytes(b"x")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_whole(checkpoint_path(tmp_path, 2), half)
    assert list_checkpoints(tmp_path) == [good]
    assert newest_whole(tmp_path) == (good, [])
    assert newest_whole(tmp_path / "nothing") == (None, [])


def test_only_the_newest_are_kept(tmp_path: Path, tiny_model: Path) -> None:
    settings = quick_settings(tiny_model)
    learner = make_learner(settings)
    for step in range(4):
        train(learner, settings, [step])
        save_checkpoint(tmp_path, learner, {}, source=tiny_model, keep=2)
    assert [version_of(path) for path in list_checkpoints(tmp_path)] == [3, 4]
    assert all(damage_of(path) is None for path in list_checkpoints(tmp_path))
