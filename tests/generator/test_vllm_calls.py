"""What is asked of vLLM, checked against the installed release's signatures (of others: test_vllm_releases.py)."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from support_models import qwen3_config
from support_run import quick_settings
from support_vllm import vllm_options

from async_rl.errors import UserError
from async_rl.generator.build import MOST_CPU_CACHE_BYTES, cpu_cache_bytes


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("vllm.kv_cache_mb=100",), r"vllm\.\* does nothing with generator\.engine=embedded"),
        (("generator.engine=vllm", "vllm.tensor_parallel=2"), "need GPUs, .* is cpu; leave them out"),
        (("generator.engine=vllm", "vllm.memory_share=0.5"), "need GPUs, and generator.device is cpu"),
        (("generator.engine=vllm", "generator.device=cuda:1"), "CUDA_VISIBLE_DEVICES says which GPU"),
        (("generator.engine=vllm", "vllm.memory_share=0", "generator.device=cuda"), "it must be above 0"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(tmp_path: Path, words: tuple[str, ...], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        quick_settings(tmp_path, *words)


def test_the_cache_of_a_cpu_holds_every_sequence_and_is_bounded() -> None:
    config = qwen3_config()
    token = 2 * config.layers * config.kv_heads * config.head_dim * 4
    assert cpu_cache_bytes(config, 4096, 1024, 4) >= 4096 * 1024 * token
    assert cpu_cache_bytes(config, 10**6, 10**5, 4) == MOST_CPU_CACHE_BYTES
    assert cpu_cache_bytes(config, 1, 100, 4) == 64 << 20


def test_every_call_fits_the_installed_release() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed (make vllm)")
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM

    from async_rl.generator import engine, vllm_engine

    calls = {
        "generate": ("prompt", "sampling_params", "request_id"),
        "abort": ("request_id",),
        "pause_generation": ("mode", "clear_cache"),
        "resume_generation": (),
        "reset_prefix_cache": ("reset_running_requests",),
        "update_weight_version": ("new_version",),
        "collective_rpc": ("method", "timeout", "args"),
        "shutdown": (),
    }
    for name, arguments in calls.items():
        inspect.signature(getattr(AsyncLLM, name)).bind_partial(None, **dict.fromkeys(arguments))
    for device in ("cpu", "cuda"):
        given = vllm_engine.engine_arguments(vllm_options(device=device))
        assert given.keys() <= {f.name for f in fields(AsyncEngineArgs)}
    params = vllm_engine.sampling_params(engine.SamplingParams(max_tokens=3, stop_strings=("x",)), 7, 3)
    assert isinstance(params, SamplingParams)
    assert (params.top_p, params.top_k, params.min_p, params.repetition_penalty) == (1.0, 0, 0.0, 1.0)
    assert {"token_ids", "logprobs", "finish_reason", "weight_versions"} <= {f.name for f in fields(CompletionOutput)}
    assert "prompt_logprobs" in inspect.signature(RequestOutput.__init__).parameters


def test_a_worker_puts_handles_together_for_vllms_own_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed (make vllm)")
    import torch
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferUpdateInfo

    monkeypatch.delenv("ASYNC_RL_VLLM_OWNER", raising=False)
    from async_rl.generator.vllm_worker import Weights

    given: list[dict[str, Any]] = []

    class Worker(Weights):
        def update_weights(self, update: dict[str, Any]) -> None:  # type: ignore[override]
            given.append(update)

    number = dict.fromkeys(("tensor_offset", "storage_device", "storage_offset_bytes", "ref_counter_offset"), 0)
    words = dict.fromkeys(("storage_handle", "ref_counter_handle", "event_handle"), "aGVsbG8=")
    handle = {"size": [2], "stride": [1], "storage_size_bytes": 8, "event_sync_required": 1, **number, **words}
    update = {"names": ["w"], "dtype_names": ["bfloat16"], "shapes": [[2]], "gpu": "GPU-7", "handles": [handle]}
    Worker().async_rl_update_ipc(update)
    info = IPCWeightTransferUpdateInfo(**given[0])  # vLLM's own checks
    assert isinstance(info.ipc_handles, list)
    (arguments,) = (by_gpu["GPU-7"] for by_gpu in info.ipc_handles)
    assert len(arguments) == 15
    assert arguments[5:8] == (torch.bfloat16, 0, b"hello")  # vLLM puts its own device in the sixth place


@pytest.mark.parametrize(("dtype", "head", "wanted"), [
    ("bfloat16", "float32", {"head_dtype": "float32"}), ("bfloat16", "model", None), ("float32", "float32", None),
])  # fmt: skip
def test_a_half_precision_engine_computes_its_logits_as_the_trainer_does(dtype: str, head: str, wanted: Any) -> None:
    from async_rl.generator.vllm_engine import engine_arguments

    assert engine_arguments(vllm_options(dtype=dtype, head_dtype=head)).get("hf_overrides") == wanted
    assert vllm_options(dtype="bfloat16").head_dtype == "float32"
