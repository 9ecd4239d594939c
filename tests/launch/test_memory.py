"""The memory estimate of a run: by process and device, and what is said of it before a start."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support_command import CONFIGS
from support_run import quick_settings

from async_rl.config import load_settings
from async_rl.errors import UserError
from async_rl.model.architecture import DecoderConfig, parameters
from async_rl.model.create import create_model_folder
from async_rl.model.folder import read_config
from async_rl.run.memory import (
    PROCESS_BYTES,
    Estimate,
    Part,
    advice,
    check_room,
    describe_estimate,
    estimate,
    estimate_of,
    propose_micro_batch,
)
from async_rl.task import make_task

GB = 1 << 30
QWEN_7B = DecoderConfig(
    family="qwen2", vocabulary=152_064, hidden=3584, intermediate=18_944, layers=28, heads=28, kv_heads=4, head_dim=128,
    max_context=32_768, qkv_bias=True,
)  # fmt: skip
QWEN_06B = DecoderConfig(
    family="qwen3", vocabulary=151_936, hidden=1024, intermediate=3072, layers=28, heads=16, kv_heads=8, head_dim=128,
    max_context=40_960, qk_norm=True, tied=True,
)  # fmt: skip


QWEN_15B = DecoderConfig(
    family="qwen2", vocabulary=151_936, hidden=1536, intermediate=8960, layers=28, heads=12, kv_heads=2, head_dim=128,
    max_context=32_768, qkv_bias=True, tied=True,
)  # fmt: skip
CLAIMED = {
    "one_gpu": (QWEN_06B, 39),
    "two_gpu": (QWEN_15B, 79),
    "eight_gpu_math": (QWEN_7B, 79),
    "eight_gpu_tools": (QWEN_7B, 79),
    "stress_k128": (QWEN_7B, 79),
}
"""the model a config names, and what a GPU of the size in its head really has, GB"""


def by_name(found: Estimate) -> dict[str, int]:
    return {part.name.split(" of ")[0]: part.bytes for part in found.parts}


def test_shapes_of_known_models_have_their_known_sizes() -> None:
    assert parameters(QWEN_7B) == 7_615_616_512
    assert parameters(QWEN_06B) == 596_049_920


def test_the_parts_follow_the_settings(tiny_model: Path) -> None:
    def parts(*words: str) -> dict[str, int]:
        return by_name(estimate(quick_settings(tiny_model, *words)))

    config = read_config(tiny_model)
    assert config is not None
    plain = parts()
    weights = 4 * estimate(quick_settings(tiny_model)).parameters
    assert plain["weights in shared memory, two versions"] == plain["trainer: optimizer (AdamW)"] == 2 * weights
    assert plain["trainer: weights"] == plain["trainer: gradients"] == weights
    token = 2 * 2 * 1 * 16 * 4
    assert plain["generator-0: KV cache"] == (256 * config.max_context + 32) * token  # and a block that is never used
    assert parts("generator.kv_cache_mb=1")["generator-0: KV cache"] == 1 << 20
    assert "generator-0: new weights while they arrive" not in plain
    assert parts("lora.rank=2", "lora.send=adapter")["generator-0: new weights while they arrive"] == weights
    more = parts("generator.max_sequences=512", "generator.count=2", "trainer.micro_batch_tokens=2048")
    assert more["generator-1: KV cache"] == (512 * config.max_context + 32) * token
    assert 2 * more["trainer: activations"] == plain["trainer: activations"]  # 16 episodes have 4096 tokens at most
    assert parts("generator.engine=vllm", "vllm.kv_cache_mb=128")["generator-0: KV cache"] == 128 << 20
    half = parts("generator.dtype=bfloat16", "buffer.memory_mb=1024")
    assert 2 * half["generator-0: KV cache"] == plain["generator-0: KV cache"]
    assert half["buffer: trajectories"] - plain["buffer: trajectories"] == 768 << 20
    assert "trainer: reference model" in parts("recipe=grpo", "recipe.kl.coefficient=0.1")


def test_each_rank_and_generator_stands_on_its_gpu() -> None:
    settings = load_settings(CONFIGS / "eight_gpu_math.yaml")
    found = estimate_of(settings, parameters=parameters(QWEN_7B), config=QWEN_7B)
    assert found.devices == ["cpu", *(f"cuda:{i}" for i in range(8))]
    assert found.on("cuda:0") == found.on("cuda:3")
    assert found.on("cuda:5") == found.on("cuda:7")
    (sent,) = [part.bytes for part in found.parts if "on their way" in part.name]
    assert found.on("cuda:4") == found.on("cuda:5") + sent  # the first rank sends to four generators, one at a time
    assert sent == 2 * 2 * 152_064 * 3584 + (2 * 256 << 20) + (4 * 200 << 20)
    (copy,) = [part for part in found.parts if "for links" in part.name]
    assert (copy.bytes, copy.device) == (2 * parameters(QWEN_7B), "cpu")
    said = describe_estimate(found)
    assert "in all on each of cuda:0, cuda:1, cuda:2, cuda:3" in said
    assert "trainer: processes" in said


@pytest.mark.parametrize("name", CLAIMED)
def test_a_config_fits_the_gpus_it_asks_for(name: str) -> None:
    """vLLM's cache aside: it takes what its share leaves."""
    config, size = CLAIMED[name]
    settings = load_settings(CONFIGS / f"{name}.yaml")
    found = estimate_of(settings, parameters=parameters(config), config=config)
    for device in found.devices[1:]:
        mine = {part.name: part.bytes for part in found.parts if part.device == device and "KV cache" not in part.name}
        trainer = sum(size for part, size in mine.items() if part.startswith("trainer"))
        generator = sum(size for part, size in mine.items() if part.startswith("generator"))
        assert trainer < settings.trainer.memory_share * size * GB
        assert generator < settings.vllm.memory_share * size * GB / 2
    assert f" {size + 1} GB" in (CONFIGS / f"{name}.yaml").read_text().splitlines()[0 if name != "stress_k128" else 1]


def test_one_gpu_holds_both() -> None:
    settings = load_settings(CONFIGS / "one_gpu.yaml")
    found = estimate_of(settings, parameters=parameters(QWEN_06B), config=QWEN_06B)
    assert found.devices == ["cpu", "cuda:0"]
    assert {part.name.split(":")[0] for part in found.parts if part.device == "cuda:0"} == {"trainer", "generator-0"}


def test_adapters_have_small_gradients_and_moments() -> None:
    def parts(*words: str) -> dict[str, int]:
        settings = load_settings(CONFIGS / "two_gpu.yaml", ["recipe=grpo", *words])
        return by_name(estimate_of(settings, parameters=10**9, config=QWEN_06B))

    whole, few = parts(), parts("lora.rank=8")
    assert few["trainer: weights"] == whole["trainer: weights"]
    assert few["trainer: optimizer (AdamW)"] < whole["trainer: optimizer (AdamW)"] / 100


def host_parts(config: str, *words: str) -> dict[str, int]:
    settings = load_settings(CONFIGS / f"{config}.yaml", list(words))
    found = estimate_of(settings, parameters=10**9, config=QWEN_06B)
    return {part.name: part.bytes for part in found.parts if part.device == "cpu"}


SEGMENT, ARRIVING = "weights in shared memory, two versions", "generators: new weights while they arrive"


def test_main_memory_holds_what_the_way_of_the_weights_needs() -> None:
    linked = host_parts("eight_gpu_math")
    assert SEGMENT not in linked
    assert ARRIVING not in linked
    joined = host_parts("eight_gpu_math", "wire.endpoint=tcp://127.0.0.1:5555", "wire.keys=keys")
    assert joined[SEGMENT] == 2 * 2 * 10**9  # others may join: what is staged for the links, bfloat16
    assert ARRIVING not in joined
    shared = host_parts("eight_gpu_math", "weights.transport=shared_memory")
    assert shared[SEGMENT] == 2 * 2 * 10**9  # in the dtype of the engine
    assert ARRIVING not in shared  # its workers copy themselves
    far = ("weights.transport=stream", "wire.endpoint=tcp://127.0.0.1:5555", "wire.keys=keys")
    streamed = host_parts("eight_gpu_math", *far)
    assert streamed[SEGMENT] == 2 * 2 * 10**9
    assert streamed[ARRIVING] == 4 * 2 * 10**9
    assert host_parts("eight_gpu_math", *far, "generator.quantization=fp8")[ARRIVING] == 4 * 4 * 10**9


def test_where_adapters_travel_alone_a_generator_keeps_a_copy_of_the_model() -> None:
    words = ("recipe=grpo", "lora.rank=8", "weights.transport=shared_memory")
    whole, alone = host_parts("two_gpu", *words), host_parts("two_gpu", *words, "lora.send=adapter")
    assert alone[SEGMENT] < whole[SEGMENT] / 50
    assert alone["generators: copies of the model for adapters, at most"] == 4 * 10**9
    assert alone[ARRIVING] == 4 * 10**9  # the sums are float32
    assert ARRIVING not in whole


def test_exact_baselines_over_ranks_keep_no_second_gradient(tiny_model: Path) -> None:
    words = ("recipe=vcpo", "recipe.opob.norm=exact")
    one = by_name(estimate(quick_settings(tiny_model, *words)))
    two = by_name(estimate(quick_settings(tiny_model, *words, "trainer.ranks=2")))
    assert "trainer: second gradient (exact OPOB)" in one
    assert not [name for name in two if "second gradient" in name]
    assert "trainer rank 1: gradient" in two, two


ROOM = Estimate(
    parameters=1, context=1,
    parts=(Part(name="trainer: weights", bytes=60, device="cuda:0"),
           Part(name="trainer: activations", bytes=50, device="cuda:0", lower="trainer.micro_batch_tokens"),
           Part(name="buffer", bytes=20, device="cpu")),
)  # fmt: skip


def test_what_fits_is_not_mentioned_what_may_not_is_noted_and_what_cannot_is_refused() -> None:
    assert check_room(ROOM, {"cpu": 100, "cuda:0": 110}, 100) == []
    (note,) = check_room(ROOM, {"cpu": 100, "cuda:0": 100}, 100)
    assert "cuda:0" in note
    assert "lower trainer.micro_batch_tokens" in note
    (note,) = check_room(ROOM, {"cpu": 100, "cuda:0": 200}, 10)
    assert "main memory" in note
    with pytest.raises(UserError, match=r"the model is too large.*cuda:0.*trainer\.sharding=full.*smaller model"):
        check_room(ROOM, {"cpu": 100, "cuda:0": 59}, 100)
    assert check_room(ROOM, {}, 0) == []  # GPUs of another machine
    ranks = tuple(Part(name=f"trainer rank {rank}: weights", bytes=60, device="cpu") for rank in range(4))
    with pytest.raises(UserError, match=r"the model is too large.*; each rank .* lower trainer\.ranks"):
        check_room(replace(ROOM, parts=ranks), {"cpu": 100}, 100)
    settings = load_settings(CONFIGS / "quickstart.yaml", ["trainer.ranks=1000"])
    many = estimate_of(settings, parameters=10**6, config=None)
    with pytest.raises(UserError, match=r"lower trainer\.ranks"):
        check_room(many, {"cpu": 16 << 30}, 16 << 30)


def test_advice_names_the_settings_of_the_process(tiny_model: Path) -> None:
    settings = quick_settings(tiny_model, "trainer.micro_batch_tokens=8192")
    assert "lower trainer.micro_batch_tokens (now 8192, the largest of this step had 6000) to 2816" in advice(
        settings, "trainer", 6000
    )
    assert advice(settings, "generator-0", None).startswith("lower generator.max_sequences")
    assert propose_micro_batch(settings, None) == 4096
    assert propose_micro_batch(settings, 100) == 256


MEASURE = """
import sys, torch
torch.set_num_threads(1)
from async_rl.trainer.build import make_learner
from async_rl.trainer.packing import pack_step
from async_rl.trainer.ranks import join_ranks
from async_rl.config.schema import structured, load_yaml
from async_rl.config import Settings
from async_rl.trajectory import Trajectory, Turn, VersionSpan
import numpy as np
from pathlib import Path
settings = structured(Settings, load_yaml(Path(sys.argv[1])), where="")
random = np.random.default_rng(0)
def trajectory(i):
    n, p = 250, 10
    return Trajectory(group=i // 4, sample=i % 4, problem=0, split="train", seed=0,
        tokens=random.integers(0, 10, n).astype(np.int32), log_behaviour=np.full(n, -1.0, np.float32),
        turns=(Turn(start=p, length=n - p),), versions=(VersionSpan(version=0, start=p, end=n),),
        reward=float(i % 2), ended="finished")
ranks = join_ranks("cpu", 120.0)
learner = make_learner(settings, ranks)
learner.step(pack_step(settings, [trajectory(i) for i in range(16)], learner.over))
# not getrusage's ru_maxrss, which a process takes over from the one that started it
status = Path("/proc/self/status").read_text()
print(int(status.split("VmHWM:")[1].split()[0]) << 10)
ranks.close()
"""


def test_the_trainers_part_is_what_a_trainer_takes(tmp_path: Path) -> None:
    """Peak of a real step on 4000 packed tokens, within a quarter of the estimate. It counts what torch's operations
    keep; compiled ones (model/compiled_layer.py) keep less."""
    from async_rl.config.schema import to_yaml

    model = tmp_path / "model"
    alphabet = make_task("guess", {}).alphabet  # type: ignore[attr-defined]
    create_model_folder(model, alphabet=alphabet, hidden=256, layers=8, heads=4, intermediate=1024, max_context=256)
    settings = quick_settings(model, "trainer.micro_batch_tokens=4096", "recipe.name=grpo")
    in_lanes = replace(settings, trainer=replace(settings.trainer, lanes=3))
    config = tmp_path / "config.yaml"
    peaks = []
    for native, chosen in (("0", settings), ("1", settings), ("1", in_lanes)):
        config.write_text(to_yaml(chosen))
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(config)], capture_output=True, text=True, check=False, timeout=120,
            env={**os.environ, "ASYNC_RL_NATIVE": native},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
    said = sum(part.bytes for part in estimate(settings).parts if part.name.startswith("trainer"))
    assert peaks[0] == pytest.approx(said, rel=0.25)
    assert peaks[1] < 1.1 * peaks[0]
    more = sum(part.bytes for part in estimate(in_lanes).parts if part.name.startswith("trainer")) - said
    assert more > 40e6, "two gradients of 6 M parameters"
    assert peaks[1] < peaks[2] < 1.25 * (said + more), (peaks, said, more)


@pytest.mark.nightly
@pytest.mark.parametrize("recipe", ["grpo", "vcpo"])
def test_a_ranks_part_is_what_a_rank_takes_of_a_sharded_model(recipe: str, tmp_path: Path) -> None:
    """Of a model with a large vocabulary, whose embedding and head every rank holds whole while it works: the peak of a
    real step over two ranks, within a quarter of the estimate."""
    from async_rl.config.schema import to_yaml

    model = tmp_path / "model"
    alphabet = make_task("guess", {}).alphabet + "".join(map(chr, range(0x4E00, 0x4E00 + 20_000)))  # type: ignore[attr-defined]
    create_model_folder(
        model, alphabet=alphabet, hidden=512, layers=6, heads=4, intermediate=1024, max_context=256, tied=False
    )
    words = ("trainer.micro_batch_tokens=1024", f"recipe.name={recipe}", "trainer.ranks=2", "trainer.sharding=full")
    settings = quick_settings(model, *words)
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    given = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", MEASURE, str(config)], stdout=subprocess.PIPE, text=True,
            env={**os.environ, **given, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    peaks = [int(rank.communicate(timeout=240)[0]) for rank in ranks]
    parts = estimate(settings).parts
    said = sum(part.bytes for part in parts if part.name.startswith("trainer rank 0")) + PROCESS_BYTES
    print(f"{recipe}: {[peak >> 20 for peak in peaks]} MB, said {said >> 20} MB")
    assert max(peaks) == pytest.approx(said, rel=0.25)
