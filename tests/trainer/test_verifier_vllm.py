"""What the verifier finds in tokens of a real vLLM, whose seeds prescribe nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from support_models import write_folder
from support_served import CONFIG, Served, ask, clean, prompt

from async_rl.instruments.chaos.liar import TOLD
from async_rl.trainer.replays import Replays
from async_rl.trainer.rescoring import Scored, Wanted, score
from async_rl.trainer.verifier import Verifier, VerifyOptions
from async_rl.trajectory import Trajectory, Turn, VersionSpan
from async_rl.weights.canary import TOLERANCE
from async_rl.wire import messages as msg

pytest.importorskip("vllm", reason="vLLM is not installed (make vllm)")
pytestmark = [pytest.mark.nightly, pytest.mark.xdist_group("vllm")]
MANY, LENGTH = 50, 60


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(write_folder(tmp_path_factory.mktemp("model") / "m", CONFIG))
    yield served
    served.run(served.engine.close())
    served.loop.call_soon_threadsafe(served.loop.stop)


class Held:
    """The weights that vLLM serves."""

    def __init__(self, served: Served) -> None:
        self.served = served

    def versions(self) -> frozenset[int]:
        return frozenset({0})

    def score(self, version: int, wanted: Sequence[Wanted], *, most_tokens: int) -> list[Scored]:
        return score(self.served.model, wanted, most_tokens=most_tokens)


def episodes(served: Served, temperature: float) -> list[Trajectory]:
    """Sampled by vLLM at this temperature, and reported as sampled at 1."""
    requests = [ask(i, prompt(i, 5), LENGTH, temperature=temperature) for i in range(MANY)]
    made = []
    for number, (request, done) in enumerate(zip(requests, served.ask(requests), strict=True)):
        tokens = np.array([*request.tokens, *done.tokens], np.int32)
        said = np.zeros(len(tokens), np.float32)
        said[5:] = done.log_probs if temperature == 1.0 else clean(served.model, tokens.tolist())[4:]
        made.append(
            Trajectory(
                group=number, sample=0, problem=0, split="train", seed=1000 + number, tokens=tokens,
                log_behaviour=said, turns=(Turn(start=5, length=len(tokens) - 5),),
                versions=(VersionSpan(version=0, start=5, end=len(tokens)),), reward=0.0, ended="finished",
                temperature=1.0, generator="g",
            )
        )  # fmt: skip
    return made


def proofs(served: Served, told: Sequence[Trajectory], tmp_path: Path) -> list[tuple[str, int]]:
    """(lie, group at which it was proven)."""
    verdicts: list[Any] = []
    learner: Any = SimpleNamespace(model=served.model, version=0)
    held: Any = Held(served)
    verifier = Verifier(
        learner=learner,
        held=held,
        options=VerifyOptions(
            dtype="float32", tolerance=TOLERANCE["float32"], seeded=False, mixes=False, most_tokens=1000
        ),
        send=verdicts.append,
        record=lambda _: None,
        replays=Replays(str(tmp_path), over=True),
    )
    found: list[tuple[str, int]] = []
    for one in told:
        verifier.receive(msg.Verify(name="g", session=1, trajectories=(one,)))
        verifier.work()
        found += [(v.lie, one.group) for v in verdicts if v.proven]
        verdicts.clear()
    return found


def test_honest_tokens_pass_and_false_ones_are_proven_soon(served: Served, tmp_path: Path) -> None:
    honest = episodes(served, 1.0)
    assert proofs(served, honest, tmp_path) == []
    neighbours = proofs(served, [TOLD["tokens"](one) for one in honest], tmp_path)
    assert neighbours[0][1] <= 3
    # log-probs that are right for the tokens: only these themselves can give it away
    cold = proofs(served, episodes(served, 0.0), tmp_path)
    assert cold[0][0] == "tokens"
    assert cold[0][1] <= 10
    shifted = [replace(one, tokens=moved(one), log_behaviour=fitting(served, moved(one))) for one in honest]
    found = proofs(served, shifted, tmp_path)
    assert found[0][0] == "tokens"
    assert found[0][1] <= 10


def moved(one: Trajectory) -> np.ndarray:
    """Every sampled token is its neighbour."""
    tokens: np.ndarray = TOLD["tokens"](one).tokens
    return tokens


def fitting(served: Served, tokens: np.ndarray) -> np.ndarray:
    said = np.zeros(len(tokens), np.float32)
    said[5:] = clean(served.model, tokens.tolist())[4:]
    return said
