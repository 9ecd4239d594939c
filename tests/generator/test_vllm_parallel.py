"""vLLM with a model that is split over two workers, on the CPU: what the canary sees of it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from support_models import make_decoder, qwen3_config, write_folder
from support_served import TOLERANCE, Served, ask, clean, prompt
from torch import Tensor

from async_rl.weights.canary import Evidence, compare, fingerprint

pytest.importorskip("vllm", reason="vLLM is not installed (make vllm)")
pytestmark = [pytest.mark.xdist_group("vllm"), pytest.mark.nightly]
CONFIG = qwen3_config(hidden=64, head_dim=32, kv_heads=1)  # both workers hold the key-value head
RATE = 1e-6
"""largest change of an element by one step of AdamW"""


def weights(seed: int = 0, steps: int = 0) -> dict[str, Tensor]:
    """After some steps from a random model."""
    generator = torch.Generator().manual_seed(7)
    found = {name: p.detach().clone() for name, p in make_decoder(CONFIG, seed).named_parameters()}
    for _ in range(steps):
        for tensor in found.values():
            tensor += RATE * torch.randn(tensor.shape, generator=generator).sign()
    return found


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = write_folder(tmp_path_factory.mktemp("model") / "m", CONFIG)
    layout = {name: tuple(tensor.shape) for name, tensor in weights().items()}
    served = Served(folder, tensor_parallel=2, layout=layout, worker="support_vllm_worker.WithFault")
    yield served
    served.run(served.engine.close())
    served.loop.call_soon_threadsafe(served.loop.stop)


def differing(served: Served, expected: dict[str, Tensor]) -> set[str]:
    """Tensors that the canary reports for an engine that should hold the expected weights."""
    version = served.engine.version
    shown = served.run(served.engine.fingerprint())
    assert None not in shown.values()
    digests = {name: digest for name, digest in shown.items() if digest is not None}
    found = Evidence(version=version, digests=digests, log_probs=())
    comparison = compare(Evidence(version=version, digests=fingerprint(expected, version), log_probs=()), found)
    assert comparison.num_tensors == len(expected)
    return set(comparison.tensors)


def test_two_workers_compute_what_the_trainer_computes(served: Served) -> None:
    served.run(served.engine.load(weights(1), 1))
    model = make_decoder(CONFIG, 1)
    (done,) = served.ask([ask(1, prompt(1, 9), 20)])
    expected = clean(model, [*prompt(1, 9), *done.tokens])[8:]
    assert np.allclose(done.log_probs, expected, atol=TOLERANCE)
    assert not differing(served, weights(1))


def test_an_engine_one_step_behind_is_seen(served: Served) -> None:
    served.run(served.engine.load(weights(1, steps=1), 2))
    assert not differing(served, weights(1, steps=1))
    assert differing(served, weights(1, steps=2)) == weights().keys()


@pytest.mark.parametrize("kind", ["o_proj", "k_proj", "down_proj", "up_proj", "embed_tokens", "q_norm"])
def test_an_update_that_leaves_a_tensor_out_is_seen(served: Served, kind: str) -> None:
    (left, *_) = (name for name in weights() if kind in name)
    version = served.engine.version + 1
    partial = {**weights(1, steps=3), left: weights(1)[left]}
    served.run(served.engine.load(partial, version))
    assert differing(served, weights(1, steps=3)) == {left}


@pytest.mark.parametrize("rank", [0, 1])
def test_an_update_that_goes_wrong_in_one_worker_is_seen(served: Served, rank: int) -> None:
    served.run(served.engine.load(weights(1), served.engine.version + 1))
    served.run(served.engine._ask_workers("async_rl_spoil", "model.layers.1.mlp.down_proj.weight", rank))
    assert differing(served, weights(1)) == {"model.layers.1.mlp.down_proj.weight"}
