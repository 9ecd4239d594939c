"""What the verifier finds in episodes of real engines, and what it lets pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from support_verified import Bench

from async_rl.events import TrajectoryDoubted
from async_rl.instruments.chaos.liar import TOLD
from async_rl.trajectory import Trajectory, VersionSpan

TURNS = ("task.args.num_secrets=100", "task.args.max_turns=4")
Make = Callable[..., Bench]


@pytest.fixture
def make(tiny_model: Path, tmp_path: Path) -> Iterator[Make]:
    made: list[Bench] = []

    def one(*overrides: str, **more: float) -> Bench:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(Bench(tiny_model, folder, *TURNS, *overrides, **more))
        return made[-1]

    yield one
    for bench in made:
        bench.close()


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("generator.temperature=0.6",),
        ("generator.dtype=bfloat16",),
        ("generator.kv_on_update=keep",),
        ("staleness.max_staleness=3",),
        pytest.param(("lora.rank=2",), marks=pytest.mark.nightly, id="lora.rank=2"),
    ],
    ids=lambda words: words[0] if words else "plain",
)
def test_honest_episodes_pass_under_every_version_that_may_be_named(make: Make, overrides: tuple[str, ...]) -> None:
    bench = make(*overrides)
    stale = bench.settings.staleness.max_staleness
    checked = 0.0
    rounds = stale + 2
    for _ in range(rounds):
        bench.load()
        played = bench.play(4) + bench.play(2, split="eval")
        for _ in range(stale):
            bench.step()
        row = bench.verify(played)
        assert row["verify/skipped"] == 0
        assert row["verify/mismatch"] <= row["verify/limit"] / 3
        checked += row["verify/checked"]
        bench.step()
    assert checked == 6 * rounds
    assert not bench.verdicts
    assert not bench.events


@pytest.mark.parametrize("lie", ["tokens", "log-probs", "versions"])
@pytest.mark.parametrize("lag", [0, 1])
def test_a_lie_is_named_and_proven_within_three_trajectories(make: Make, lie: str, lag: int) -> None:
    bench = make("staleness.max_staleness=2")
    bench.step()
    bench.step()
    bench.load()
    played = bench.play(3)
    for _ in range(lag):
        bench.step()
    told = [claimed(one, lag) if lie == "versions" else TOLD[lie](one) for one in played]
    bench.verify(told, "liar")
    assert ("liar", lie) in bench.proven(), bench.verdicts
    doubt = next(event for event in bench.events if isinstance(event, TrajectoryDoubted))
    assert (doubt.name, doubt.lie, doubt.step) == ("liar", lie, 2 + lag)
    bench.verify(bench.play(3), "honest")
    assert {name for name, _ in bench.proven()} == {"liar"}


def shifted(played: list[Trajectory], old: list[Trajectory]) -> list[Trajectory]:
    """Every log-prob by a thousandth of a nat."""
    return [replace(t, log_behaviour=np.where(t.log_behaviour < 0, t.log_behaviour - 1e-3, 0)) for t in played]


def swapped(played: list[Trajectory], old: list[Trajectory]) -> list[Trajectory]:
    """Each sample of a group reports what the next one did, with its log-probs."""
    around = [*played[1:], played[0]]
    return [replace(other, sample=t.sample, seed=t.seed) for t, other in zip(played, around, strict=True)]


def repeated(played: list[Trajectory], old: list[Trajectory]) -> list[Trajectory]:
    """An episode of another group, played before under the same weights, is reported for this one."""
    names = ("group", "sample", "seed", "problem")
    return [
        replace(before, **{name: getattr(t, name) for name in names}) for t, before in zip(played, old, strict=True)
    ]


def of_another_prompt(played: list[Trajectory], old: list[Trajectory]) -> list[Trajectory]:
    """One token of the prompt is another."""
    return [replace(t, tokens=np.concatenate((t.tokens[:1], (t.tokens[1:2] + 1) % 10, t.tokens[2:]))) for t in played]


def one_token_in_ten(played: list[Trajectory], old: list[Trajectory]) -> list[Trajectory]:
    """Is another than was sampled."""
    found = []
    for t in played:
        tokens = t.tokens.copy()
        chosen = t.policy_positions()[::10]
        tokens[chosen] = (tokens[chosen] + 1) % (tokens.max() + 1)
        found.append(replace(t, tokens=tokens))
    return found


@pytest.mark.parametrize(
    ("tell", "lies"),
    [
        (shifted, {"log-probs"}),
        (swapped, {"tokens"}),
        (repeated, {"tokens"}),
        (of_another_prompt, {"log-probs", "tokens"}),
        (one_token_in_ten, {"tokens", "log-probs"}),
    ],
)
def test_other_ways_to_tell_the_same_lies_are_proven(
    make: Make, tell: Callable[..., list[Trajectory]], lies: set[str]
) -> None:
    bench = make("staleness.max_staleness=2")
    bench.step()
    bench.load()
    old = bench.play(8)
    bench.verify(tell(bench.play(8), old), "liar")
    assert {lie for _, lie in bench.proven()} <= lies
    assert bench.proven()
    assert not bench.verify(bench.play(4), "honest").get("verify/wrong")


def claimed(trajectory: Trajectory, lag: int) -> Trajectory:
    """Sampled by version 2, said to be of version 1 (a permit may allow that) or of the newest."""
    version = 1 if lag == 0 else 3
    spans = tuple(VersionSpan(version=version, start=s.start, end=s.end) for s in trajectory.versions)
    return replace(trajectory, versions=spans)


def test_it_says_whose_log_probs_they_are(make: Make) -> None:
    bench = make()
    bench.load()
    played = bench.play(2)
    bench.step()
    bench.verify([claimed_as(one, 1) for one in played], "liar")
    (doubt,) = bench.events
    assert isinstance(doubt, TrajectoryDoubted)
    assert (doubt.lie, doubt.reason) == ("versions", "it names version 1, and its log-probs are those of version 0")


def claimed_as(trajectory: Trajectory, version: int) -> Trajectory:
    return replace(
        trajectory,
        versions=tuple(VersionSpan(version=version, start=s.start, end=s.end) for s in trajectory.versions),
    )


def test_what_names_weights_that_do_not_exist_yet_is_scored_when_they_do(make: Make) -> None:
    bench = make()
    bench.load()
    bench.verify([claimed_as(one, 1) for one in bench.play(3)], "liar")
    assert not bench.events
    bench.step()
    assert bench.verify([])["verify/checked"] == 3
    assert bench.proven() == [("liar", "versions")]


def test_what_is_not_held_is_not_scored_and_counted(make: Make) -> None:
    bench = make("staleness.max_staleness=3", "verify.memory_mb=0")
    bench.load()
    played = bench.play(4)
    bench.step()
    assert bench.verify(played)["verify/checked"] == 4  # the version before lies in shared memory
    bench.step()
    row = bench.verify([TOLD["log-probs"](one) for one in played])
    assert (row["verify/checked"], row["verify/skipped"]) == (0, 4)
    assert not bench.verdicts


def test_the_learner_is_as_before(make: Make) -> None:
    bench = make("staleness.max_staleness=2")
    bench.load()
    played = bench.play(2)
    for _ in range(2):
        bench.step()
    before = {name: (p, p.data_ptr(), p.detach().clone()) for name, p in bench.learner.trained().items()}
    assert bench.verify(played)["verify/checked"] == 2
    for name, parameter in bench.learner.trained().items():
        own, place, values = before[name]
        assert parameter is own
        assert parameter.data_ptr() == place
        assert parameter.equal(values)


def test_a_slow_drift_between_versions_is_told_apart(make: Make) -> None:
    """Weights that move by a ten-thousandth: a stale version called fresh is seen by the mismatch of this very run."""
    bench = make(size=2e-4)
    bench.load()
    for _ in range(5):
        bench.verify(bench.play(8))
    assert bench.verifier.limit.limit < 1e-4
    played = bench.play(3)
    bench.step()
    bench.verify([claimed_as(one, 1) for one in played], "liar")
    assert bench.proven() == [("liar", "versions")]


def test_without_seeds_tokens_have_to_be_plausible(make: Make) -> None:
    """As with vLLM, whose noise is not known: always the same token, and always the likeliest one."""
    bench = make("task.args.max_turns=40", "task.args.num_secrets=100", size=0.3)
    bench.step()
    bench.load()
    object.__setattr__(bench.verifier.options, "seeded", False)
    honest = bench.play(16)
    bench.verify(honest)
    assert not bench.verdicts
    same = []
    for one in honest[:3]:
        tokens = one.tokens.copy()
        tokens[one.policy_positions()] = 5
        same.append(replace(one, tokens=tokens))
    bench.verify(same, "liar")
    assert ("liar", "tokens") in bench.proven()


def test_a_prompt_of_another_temperature_is_found_by_its_log_probs(make: Make) -> None:
    """A sampler at temperature 1 that says 0.7."""
    bench = make()
    bench.load()
    played = [replace(one, temperature=0.7) for one in bench.play(3)]
    bench.verify(played, "liar")
    assert np.isfinite([one.reward for one in played]).all()
    assert bench.proven()
