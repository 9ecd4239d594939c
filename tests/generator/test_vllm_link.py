"""Weights that the trainer's side of vLLM sends straight into vLLM's workers, over gloo in NCCL's place; and a model
folder whose generation_config wants other sampling. One vLLM serves all tests of this file."""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support_models import make_decoder, write_folder
from support_served import CONFIG, CONTEXT, TOLERANCE, Served, ask, clean, prompt

from async_rl.generator.engine import Completion
from async_rl.generator.pull import LinkSource
from async_rl.weights.canary import fingerprint
from async_rl.weights.link import LinkServer, Staged

pytest.importorskip("vllm", reason="vLLM is not installed (make vllm)")
gloo = pytest.importorskip("support_gloo_link", reason="vLLM before 0.28 has no trainer side to run")
pytestmark = pytest.mark.xdist_group("vllm")

UNWANTED = {
    "top_p": 0.8,
    "top_k": 3,
    "temperature": 0.3,
    "repetition_penalty": 1.7,
    "min_p": 0.2,
    "do_sample": True,
    "eos_token_id": list(range(20)),
    "max_new_tokens": 2,
}


@dataclass
class Trained:
    """The trainer's side: its link server, and what was published."""

    server: LinkServer
    endpoint: str
    events: list[dict[str, Any]]

    def publish(self, version: int) -> None:
        weights = {name: p.detach() for name, p in make_decoder(CONFIG, version).named_parameters()}
        self.server.publish(weights, version)

    def link(self) -> LinkSource:
        return LinkSource(self.endpoint, "generator-0", way="nccl", workers=1, first_s=60.0, timeout_s=60.0)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = write_folder(tmp_path_factory.mktemp("model") / "m", CONFIG)
    (folder / "generation_config.json").write_text(json.dumps(UNWANTED))
    served = Served(folder, transfer="gloo", worker="support_gloo_link.Weights")
    yield served
    served.run(served.engine.close())
    served.loop.call_soon_threadsafe(served.loop.stop)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    from async_rl.weights.vllm_links import NcclLink

    shapes = {name: tuple(p.shape) for name, p in make_decoder(CONFIG).named_parameters()}
    staged = Staged(shapes, torch.float32, "cpu")
    events: list[dict[str, Any]] = []
    endpoint = f"ipc://{tmp_path_factory.mktemp('link')}/links.sock"
    with LinkServer(
        endpoint,
        staged,
        lambda asked, control: NcclLink(control, staged, workers=asked.workers, init_info=gloo.GlooTrainerInitInfo),
        timeout_s=60.0,
        record=lambda event: events.append({"event": event.event, **event.detail()}),
    ) as server:
        yield Trained(server, endpoint, events)


def test_links_do_not_queue_behind_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own packing, whose streams are kept for the whole process: one link stands still in its group, and another
    one sends meanwhile. Without a GPU, streams are counted things that are waited for in order."""
    from contextlib import nullcontext
    from types import SimpleNamespace

    from vllm.distributed.weight_transfer import packed_tensor

    from async_rl.weights.vllm_links import own_streams

    class Stream:
        """What is given to a stream is done in order."""

        def __init__(self, device: object = None) -> None:
            self.last: threading.Event | None = None

        def synchronize(self) -> None:
            assert self.last is None or self.last.wait(20)

    entered = threading.local()

    def stream(one: Stream) -> Any:
        entered.stream = one
        return nullcontext()

    monkeypatch.setattr(packed_tensor, "_get_streams", cache(packed_tensor._get_streams.__wrapped__))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    own_streams()
    own_streams()  # each link says so

    begun = threading.Event()

    def send(frozen: threading.Event | None) -> None:
        def broadcast(tensor: torch.Tensor, src: int) -> None:
            done = threading.Event()
            if frozen is None and entered.stream.last is None:
                done.set()
            entered.stream.last = done if frozen is None else frozen
            begun.set()

        packed_tensor.packed_nccl_broadcast_producer(
            iterator=iter([(str(i), torch.zeros(8)) for i in range(4)]), group=SimpleNamespace(broadcast=broadcast),
            src=0, post_iter_func=lambda pair: pair[1], buffer_size_bytes=40, num_buffers=4,
        )  # fmt: skip

    thaw = threading.Event()
    frozen = threading.Thread(target=send, args=(thaw,), daemon=True)
    frozen.start()
    assert begun.wait(10)
    other = threading.Thread(target=send, args=(None,), daemon=True)
    other.start()
    other.join(10)
    assert not other.is_alive()
    assert frozen.is_alive()
    thaw.set()
    frozen.join(10)
    assert not frozen.is_alive()


def hold(served: Served, version: int) -> None:
    served.models[version] = make_decoder(CONFIG, version)


def test_nothing_of_the_folders_generation_config_is_used(served: Served) -> None:
    requests = [ask(i, prompt(i, 4 + i), 20) for i in range(8)]
    for request, done in zip(requests, served.ask(requests), strict=True):
        assert (done.finish, len(done.tokens)) == ("length", 20)  # no end of text, no shorter limit
        expected = clean(served.model, [*request.tokens, *done.tokens])[len(request.tokens) - 1 :]
        assert np.allclose(done.log_probs, expected, atol=TOLERANCE)  # top-p and the like would renormalise
    ranks = []
    for request, done in zip(requests, served.ask(requests), strict=True):
        whole = torch.tensor([*request.tokens, *done.tokens])
        ranks += of_all(served, whole)[len(request.tokens) - 1 :]
    assert max(ranks) >= 3  # top_k=3 would forbid it


def of_all(served: Served, ids: torch.Tensor) -> list[int]:
    """Rank of each token but the first among all that could have come there; 0 is the most probable."""
    from async_rl.model.attention import DocumentAttention

    with torch.no_grad():
        hidden = served.model(ids, torch.arange(len(ids)), DocumentAttention([len(ids)]))
        logits = (hidden @ served.model.head.T)[:-1]
    chosen = logits.gather(1, ids[1:, None])
    ranks: list[int] = (logits > chosen).sum(1).tolist()
    return ranks


@pytest.mark.parametrize("length", [CONTEXT, CONTEXT - 1, 2])
def test_a_probe_may_fill_the_context(served: Served, length: int) -> None:
    tokens = prompt(17, length)
    shown = served.run(served.engine.probe(tokens))
    assert len(shown) == length - 1
    assert np.allclose(shown, clean(served.model, tokens), atol=TOLERANCE)


def test_the_trainer_sends_into_vllms_workers_while_they_generate(served: Served, trained: Trained) -> None:
    link, requests = trained.link(), [ask(i, prompt(i, 3), 110) for i in range(4)]

    async def with_two_updates() -> list[Completion]:
        trained.publish(1)
        await link.pull_into(served.engine, first=True)
        hold(served, 1)
        turns = [asyncio.ensure_future(served.engine.generate(request)) for request in requests]
        start = served.engine.stats().tokens_generated
        for number, share in ((2, 20), (5, 60)):
            while served.engine.stats().tokens_generated < start + share * len(requests):
                await asyncio.sleep(0.001)
            trained.publish(number)
            hold(served, number)
            await link.pull_into(served.engine, first=False)
            assert served.engine.version == number
        return await asyncio.gather(*turns)

    for request, done in zip(requests, served.run(with_two_updates()), strict=True):
        assert set(done.versions) == {1, 2, 5}
        versions, whole = np.array(done.versions), [*request.tokens, *done.tokens]
        for version in (1, 2, 5):
            expected = clean(served.models[version], whole)[len(request.tokens) - 1 :]
            mine = versions == version
            assert np.allclose(np.array(done.log_probs)[mine], expected[mine], atol=TOLERANCE)
    shown = served.run(served.engine.fingerprint())
    assert shown == fingerprint(dict(served.models[5].named_parameters()), 5)
    served.run(closed(link))
    assert not trained.events


def test_another_life_of_the_generator_meets_the_trainer_anew(served: Served, trained: Trained) -> None:
    """Its worker joins a second group while the first one is still there."""
    link = trained.link()
    trained.publish(6)
    hold(served, 6)
    served.run(link.pull_into(served.engine, first=True))
    assert served.run(served.engine.fingerprint()) == fingerprint(dict(served.models[6].named_parameters()), 6)
    assert [event["reason"] for event in trained.events] == ["generator-0 has begun anew"]
    served.run(closed(link))


def test_one_broadcast_goes_to_vllm_and_to_another_generator(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both generate meanwhile: vLLM's worker receives in a group of three. Then the other one leaves."""
    from dataclasses import replace

    from support_broadcast import Engine, generate

    from async_rl.weights import broadcast

    for name in ("GATHER_S", "STALL_S", "OPEN_S", "ANSWER_S"):  # however slow this machine is, nobody is left out
        monkeypatch.setattr(broadcast, name, 300.0)
    monkeypatch.setattr(served.engine, "_options", replace(served.engine._options, transfer=""))
    shapes = {name: tuple(p.shape) for name, p in make_decoder(CONFIG).named_parameters()}
    staged, events = Staged(shapes, torch.float32, "cpu"), []
    together = broadcast.Broadcast(staged, packed_bytes=10_000)
    endpoint = f"ipc://{tmp_path}/links.sock"
    said: queue.SimpleQueue[tuple[object, ...]] = queue.SimpleQueue()
    over, other = threading.Event(), Engine(shapes, lambda *words: said.put(words))
    work = generate(other, endpoint, "generator-1", lambda *words: said.put(words), over.is_set)
    thread = threading.Thread(target=asyncio.run, args=(work,), daemon=True)
    requests = [ask(i, prompt(i, 3), 110) for i in range(4)]

    with LinkServer(endpoint, staged, together.member, timeout_s=300.0, record=events.append, in_turns=False) as server:
        link = Trained(server, endpoint, []).link()

        async def updated(version: int) -> None:
            hold(served, version)
            server.publish({n: p.detach() for n, p in served.models[version].named_parameters()}, version)
            await link.pull_into(served.engine, first=version == 7)

        async def with_two_updates() -> list[Completion]:
            await updated(7)
            thread.start()
            while await asyncio.to_thread(said.get, True, 120.0) != expected(7):
                pass
            turns = [asyncio.ensure_future(served.engine.generate(request)) for request in requests]
            start = served.engine.stats().tokens_generated
            for number, share in ((8, 20), (9, 60)):
                while served.engine.stats().tokens_generated < start + share * len(requests):
                    await asyncio.sleep(0.001)
                await updated(number)
            return await asyncio.gather(*turns)

        def expected(version: int) -> tuple[object, ...]:
            shown = fingerprint(dict(served.models[version].named_parameters()), version)
            return ("holds", version, *sorted(shown.values()))

        for request, done in zip(requests, served.run(with_two_updates()), strict=True):
            versions, whole = np.array(done.versions), [*request.tokens, *done.tokens]
            assert set(done.versions) == {7, 8, 9}
            for version in (7, 8, 9):
                right = clean(served.models[version], whole)[len(request.tokens) - 1 :]
                mine = versions == version
                assert np.allclose(np.array(done.log_probs)[mine], right[mine], atol=TOLERANCE)
        assert served.run(served.engine.fingerprint()) == fingerprint(dict(served.models[9].named_parameters()), 9)
        assert [said.get(timeout=120.0) for _ in range(3)] == [("joins", 3), expected(8), expected(9)]
        over.set()
        thread.join(120.0)
        assert not events
    served.run(closed(link))


def test_what_vllm_cannot_do_is_the_generators_end_and_said_to_the_trainer(served: Served, trained: Trained) -> None:
    """Last, because it leaves vLLM paused: an update of tensors that this model does not have."""
    from async_rl.errors import RunFailed

    detail = {"names": ["x"], "dtype_names": ["float32"], "shapes": [[1]]}
    with pytest.raises(RunFailed, match="vLLM failed in"):
        served.run(served.engine.handle_call("update", 7, detail))


async def closed(link: LinkSource) -> None:
    link.close()


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's workers import support_gloo_link by its name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent))
