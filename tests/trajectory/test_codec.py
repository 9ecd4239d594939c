"""A trajectory survives its byte form, and no bytes whatever raise anything but WireError."""

import math
import struct
from contextlib import suppress
from hashlib import sha256

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from async_rl.trajectory import Trajectory, Turn, VersionSpan
from async_rl.trajectory.codec import SCHEMA, WireError, pack, unpack
from async_rl.trajectory.types import GREEDY, MOST_REWARD, turn_temperature

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
REWARDS = st.floats(-MOST_REWARD, MOST_REWARD)
NAMES = st.text(max_size=8)
TEMPERATURES = st.just(0.0) | st.just(GREEDY) | st.floats(0, 10, exclude_min=True)


NOTES = st.dictionaries(NAMES, FLOATS, max_size=3).map(lambda notes: tuple(sorted(notes.items())))


def token_notes(length: int) -> st.SearchStrategy[tuple[tuple[str, tuple[float, ...]], ...]]:
    """Notes on the tokens of a turn."""
    numbers = st.lists(st.floats(-100, 100, width=32), min_size=length, max_size=length).map(tuple)
    return st.dictionaries(NAMES, numbers, max_size=2).map(lambda notes: tuple(sorted(notes.items())))


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    turns: list[Turn] = []
    spans: list[VersionSpan] = []
    position = draw(st.integers(0, 5) | st.just(300))  # a long prompt has its zeros left out
    plain = draw(st.booleans())
    several, noted = draw(st.booleans()), draw(st.booleans())
    contexts: list[int] = []
    for _ in range(draw(st.integers(0, 5))):
        length = draw(st.integers(0, 7))
        reward = 0.0 if plain else draw(REWARDS)
        key = -1 if plain else draw(st.integers(-1, 2**63 - 1))
        agent = draw(NAMES) if several else ""
        temperature = draw(TEMPERATURES) if several else 0.0
        turns.append(
            Turn(
                start=position, length=length, reward=reward, state_key=key, agent=agent, temperature=temperature,
                notes=draw(NOTES) if noted else (),
                token_notes=draw(token_notes(length)) if noted and length else (),
            )
        )  # fmt: skip
        cut = draw(st.integers(0, length))
        version = draw(st.integers(0, 2**31 - 1))
        spans.append(VersionSpan(version=version, start=position, end=position + cut))
        spans.append(VersionSpan(version=version, start=position + cut, end=position + length))
        gap = draw(st.integers(0, 4))
        if several and gap and position + length:
            contexts += draw(st.lists(st.integers(position + length, position + length + gap - 1), max_size=1))
        position += length + gap
    log_behaviour = np.zeros(position, dtype=np.float32)
    for turn in turns:
        log = draw(st.lists(st.floats(-50, 0, width=32), min_size=turn.length, max_size=turn.length))
        log_behaviour[turn.start : turn.start + turn.length] = log
    tokens = np.arange(position, dtype=np.int32)
    listed = draw(st.lists(st.integers(0, 2**31 - 1), max_size=20))[:position]
    tokens[: len(listed)] = listed
    return Trajectory(
        group=draw(st.integers(0, 2**63 - 1)),
        sample=draw(st.integers(0, 1000)),
        problem=draw(st.integers(0, 2**40)),
        split=draw(st.sampled_from(["train", "eval"])),
        seed=draw(st.integers(0, 2**64 - 1)),
        tokens=tokens,
        log_behaviour=log_behaviour,
        turns=tuple(turns),
        versions=tuple(spans),
        reward=draw(REWARDS),
        ended=draw(st.sampled_from(["finished", "length", "turn_limit", "error", "aborted"])),
        temperature=draw(FLOATS),
        contexts=tuple(contexts),
        reason=draw(NAMES),
        generator=draw(NAMES),
        started_at=draw(FLOATS),
        finished_at=draw(FLOATS),
        info=draw(st.dictionaries(NAMES, FLOATS | NAMES, max_size=3)),
    )


def many_turns(tokens: int = 2000, turns: int = 1, *, rewards: bool = False) -> Trajectory:
    """Half of the tokens are the policy's."""
    length = tokens // (2 * turns)
    log_behaviour = np.zeros(tokens, dtype=np.float32)
    listed = []
    for i in range(turns):
        log_behaviour[2 * i * length : (2 * i + 1) * length] = -0.5
        reward, key = (1.0 * i, i) if rewards else (0.0, -1)
        listed.append(Turn(start=2 * i * length, length=length, reward=reward, state_key=key))
    return Trajectory(
        group=1,
        sample=2,
        problem=3,
        split="train",
        seed=4,
        tokens=np.arange(tokens, dtype=np.int32),
        log_behaviour=log_behaviour,
        turns=tuple(listed),
        versions=(VersionSpan(version=7, start=0, end=tokens),),
        reward=1.0,
        ended="finished",
    )


def assert_same(left: Trajectory, right: Trajectory) -> None:
    for name in Trajectory.__struct_fields__:
        one, other = getattr(left, name), getattr(right, name)
        if isinstance(one, np.ndarray):
            assert one.dtype == other.dtype
            assert np.array_equal(one, other)
        else:
            assert one == other, name


def truthful(blob: bytes | memoryview) -> None:
    """Whatever the bytes: a checked trajectory, or WireError."""
    with suppress(WireError):
        assert unpack(blob).check() is None


@settings(derandomize=True, deadline=None)
@given(trajectories())
def test_a_trajectory_comes_back_as_it_was(trajectory: Trajectory) -> None:
    assert trajectory.check() is None
    blob = pack(trajectory)
    assert len(blob) % 8 == 0
    assert_same(unpack(blob), trajectory)
    assert pack(unpack(blob)) == blob
    shifted = memoryview(b"x" + blob)[1:]  # a frame may lie at any address
    assert_same(unpack(shifted), trajectory)
    assert unpack(shifted).tokens.flags.aligned


@settings(derandomize=True, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_are_refused(data: bytes) -> None:
    truthful(data)
    truthful(struct.pack("<2sHI", b"TJ", SCHEMA, len(data) % 20) + data)


@settings(derandomize=True, deadline=None)
@given(trajectories(), st.data())
def test_cut_lengthened_and_flipped_bytes_are_refused_or_still_valid(
    trajectory: Trajectory, data: st.DataObject
) -> None:
    blob = pack(trajectory)
    with pytest.raises(WireError):
        unpack(blob[: data.draw(st.integers(0, len(blob) - 1))])
    with pytest.raises(WireError):
        unpack(blob + bytes(data.draw(st.integers(1, 20))))
    flipped = bytearray(blob)
    for _ in range(data.draw(st.integers(1, 3))):
        flipped[data.draw(st.integers(0, len(blob) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    truthful(bytes(flipped))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
TEXT_AT = 96


def with_text(text: bytes) -> bytes:
    """A blob whose reason, generator and info are these bytes."""
    blob = pack(many_turns(20))
    (length,) = struct.unpack_from("<I", blob, 4)
    columns = blob[TEXT_AT + length + -length % 8 :]
    fixed = bytearray(blob[:TEXT_AT])
    struct.pack_into("<I", fixed, 4, len(text))
    return bytes(fixed) + text + bytes(-len(text) % 8) + columns


@settings(derandomize=True, deadline=None)
@given(ANYTHING, ANYTHING, ANYTHING)
def test_texts_of_any_other_type_are_refused_or_still_valid(one: object, two: object, info: object) -> None:
    for text in (one, [one, two, info], ["", "", info], ["", two, {}]):
        truthful(with_text(msgpack.packb(text)))
    assert unpack(with_text(msgpack.packb(["why", "who", {"a": 1.0}]))).reason == "why"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"versions": ()}, "no version"),
        ({"versions": (VersionSpan(version=1, start=0, end=3),)}, "no version"),
        ({"turns": (Turn(start=8, length=2), Turn(start=0, length=8))}, "out of order"),
        ({"reward": math.inf}, "not finite"),
        ({"reward": -1e200}, "beyond 1e"),
        ({"turns": (Turn(start=0, length=10, reward=1e200),)}, "beyond 1e"),
        ({"log_behaviour": np.full(20, 0.5, dtype=np.float32)}, "above zero"),
        ({"log_behaviour": np.full(20, np.nan, dtype=np.float32)}, "not finite"),
        ({"group": -1}, "below zero"),
        ({"contexts": (0,)}, "context at 0 is out of order"),
        ({"contexts": (20,)}, "context at 20 is out of order or outside 20 tokens"),
        ({"contexts": (15, 12)}, "context at 12 is out of order"),
        ({"contexts": (15, 15)}, "context at 15 is out of order"),
        ({"contexts": (4,)}, "context at 4 is inside the turn at 0"),
        ({"turns": (Turn(start=12, length=3),), "contexts": (12,)}, "begins with a sampled token"),
        (
            {"turns": (Turn(start=12, length=0), Turn(start=12, length=3)), "contexts": (12,)},
            "begins with a sampled token",
        ),
        ({"turns": (Turn(start=0, length=10, temperature=math.nan),)}, "temperature is nan"),
        ({"turns": (Turn(start=0, length=10, temperature=math.inf),)}, "temperature is inf"),
        ({"turns": (Turn(start=0, length=10, temperature=-0.5),)}, "temperature is -0.5"),
    ],
)
def test_what_a_trajectory_must_not_be_is_refused_with_its_reason(change: dict, message: str) -> None:
    with pytest.raises(WireError, match=message):
        unpack(pack(replace(many_turns(20), **change)))


def test_the_bytes_of_a_trajectory_of_one_context_are_those_of_earlier_releases() -> None:
    """Digests were made by the code of 0.2.0: stored runs stay readable both ways."""
    written = [many_turns(2000, 10, rewards=True), many_turns(20)]
    assert [sha256(pack(t)).hexdigest()[:16] for t in written] == ["99b1abb5932f81f9", "8295f909d3ab242e"]


def two_contexts() -> Trajectory:
    turns = (
        Turn(start=2, length=3, agent="solver", temperature=0.5),
        Turn(start=5, length=0, agent="critic"),
        Turn(start=8, length=4, agent="critic", temperature=GREEDY),
    )
    return replace(many_turns(20), turns=turns, contexts=(5, 13))


def test_a_reader_of_earlier_releases_refuses_what_it_does_not_know() -> None:
    """Its fixed part had five bytes of padding where the contexts are counted, and three flags."""
    for change in ({"contexts": ()}, {"turns": two_contexts().turns[:0]}):
        flags = pack(replace(two_contexts(), **change))[90]
        assert flags > 7


@pytest.mark.parametrize("flag", [8, 16, 32])
def test_a_flag_that_does_not_fit_the_columns_is_refused(flag: int) -> None:
    for trajectory in (many_turns(20), two_contexts()):
        blob = bytearray(pack(trajectory))
        blob[90] ^= flag
        with pytest.raises(WireError):
            unpack(bytes(blob))


def test_an_agent_without_a_name_is_refused() -> None:
    blob = bytearray(pack(two_contexts()))
    assert struct.unpack_from("<3i", blob, len(blob) - 12) == (0, 1, 1)
    for wrong in (-1, 2):
        struct.pack_into("<i", blob, len(blob) - 4, wrong)
        with pytest.raises(WireError, match="agent is none of the 2"):
            unpack(bytes(blob))


def test_contexts_and_temperatures_of_turns_as_they_are_read() -> None:
    trajectory = two_contexts()
    assert trajectory.check() is None
    assert trajectory.context_lengths() == [5, 8, 7]
    assert trajectory.longest_context == 8
    assert many_turns(20).context_lengths() == [20]
    assert [trajectory.log_prob_temperature(turn) for turn in trajectory.turns] == [0.5, 1.0, 1.0]
    warm, greedy = replace(trajectory, temperature=0.7), replace(trajectory, temperature=0.0)
    assert [warm.log_prob_temperature(turn) for turn in warm.turns] == [0.5, 0.7, 1.0]
    assert [greedy.log_prob_temperature(turn) for turn in greedy.turns] == [0.5, 1.0, 1.0]
    asked = [(None, 0.7), (0.7, 0.7), (0.0, 0.7), (0.2, 0.7), (0.0, 0.0)]
    assert [turn_temperature(*one) for one in asked] == [0.0, 0.0, GREEDY, 0.2, 0.0]


def test_another_schema_is_named() -> None:
    blob = bytearray(pack(many_turns(20)))
    blob[2] = 9
    with pytest.raises(WireError, match="schema 9; this program reads 2"):
        unpack(bytes(blob))


@pytest.mark.parametrize(
    "change", [{"turns": (Turn(start=0, length=2, state_key=2**63),)}, {"seed": 2**64}, {"split": "test"}]
)
def test_a_value_that_does_not_fit_its_column_is_an_error_of_the_sender(change: dict) -> None:
    with pytest.raises(ValueError):
        pack(replace(many_turns(20), **change))


def test_half_a_surrogate_pair_in_a_reason_is_replaced() -> None:
    assert unpack(pack(replace(many_turns(20), reason="bad \udcff name"))).reason == "bad ? name"


def test_a_failed_reward_may_be_nan_when_the_trajectory_says_so() -> None:
    failed = replace(many_turns(20), reward=math.nan, ended="error", reason="ValueError: no")
    assert math.isnan(unpack(pack(failed)).reward)


@pytest.mark.parametrize(("turns", "rewards"), [(1, False), (1, True), (20, True), (250, True)])
def test_two_thousand_tokens_cost_at_most_thirteen_bytes_each(turns: int, rewards: bool) -> None:
    trajectory = many_turns(2000, turns, rewards=rewards)
    assert len(pack(trajectory)) <= 13 * 2000
    assert_same(unpack(pack(trajectory)), trajectory)


def test_equal_texts_do_not_share_their_info() -> None:
    blob = pack(replace(many_turns(20), info={"a": 1.0}))
    first, second = unpack(blob), unpack(blob)
    assert isinstance(first.info, dict)
    first.info["a"] = 2.0
    assert second.info == unpack(blob).info == {"a": 1.0}


@settings(derandomize=True, deadline=None)
@given(st.lists(st.floats(width=32) | st.floats(-1, 2**-9, width=32), min_size=1, max_size=20), st.data())
def test_check_refuses_exactly_the_policy_log_probs_that_are_not_finite_or_above_zero(
    values: list[float], data: st.DataObject
) -> None:
    n = len(values)
    start = data.draw(st.integers(0, n))
    turn = Turn(start=start, length=data.draw(st.integers(0, n - start)))
    log_behaviour = np.array(values, dtype=np.float32)
    trajectory = replace(
        many_turns(n),
        log_behaviour=log_behaviour,
        turns=(turn,),
    )
    policy = log_behaviour[turn.start : turn.start + turn.length]
    right = all(math.isfinite(value) and value <= np.float32(1e-3) for value in policy)
    assert (trajectory.check() is None) == right
    truthful(pack(trajectory))


def test_a_record_is_frozen_complete_and_named() -> None:
    turn = Turn(start=3, length=4, reward=0.5, state_key=7)
    assert turn == Turn(start=3, length=4, reward=0.5, state_key=7)
    with pytest.raises(AttributeError):
        turn.start = 5  # type: ignore[misc]
    with pytest.raises(TypeError):
        Turn(start=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        Turn(3, 4)  # type: ignore[misc]
    given = many_turns(20)
    values = {name: getattr(given, name) for name in Trajectory.__struct_fields__}
    assert_same(Trajectory(**values), given)
    assert replace(unpack(pack(given)), sample=9).sample == 9


def with_notes(*, prompt: int = 2, names: int = 1) -> Trajectory:
    """Two turns; a long prompt has its zeros left out."""
    plain = many_turns(tokens=4)
    noted = tuple((f"n{i}", (0.5, -0.25)) for i in range(names))
    turns = (
        Turn(start=prompt, length=2, notes=(("void", 1.0),), token_notes=noted),
        Turn(start=prompt + 3, length=1, notes=(("depth", 3.0), ("void", 0.0))),
    )
    size = prompt + 4
    return replace(
        plain, tokens=np.arange(size, dtype=np.int32), log_behaviour=np.zeros(size, np.float32), turns=turns,
        versions=(VersionSpan(version=0, start=0, end=size),),
    )  # fmt: skip


@pytest.mark.parametrize("prompt", [2, 500])
@pytest.mark.parametrize("names", [0, 1, 3])
def test_notes_on_turns_and_tokens_survive(prompt: int, names: int) -> None:
    trajectory = with_notes(prompt=prompt, names=names)
    assert trajectory.check() is None
    assert unpack(pack(trajectory)).turns == trajectory.turns


@pytest.mark.parametrize(
    ("turn", "wrong"),
    [
        ({"notes": (("a", 1.0), ("a", 2.0))}, "two notes of one name"),
        ({"notes": (("a", math.inf),)}, "not finite"),
        ({"token_notes": (("a", (1.0,)),)}, "has not its 2 numbers"),
        ({"token_notes": (("a", (1.0, math.nan)),)}, "not finite"),
    ],
)
def test_notes_that_contradict_a_trajectory_are_told(turn: dict[str, object], wrong: str) -> None:
    trajectory = with_notes()
    first = replace(trajectory.turns[0], **{"notes": (), "token_notes": ()} | turn)
    found = replace(trajectory, turns=(first, *trajectory.turns[1:])).check()
    assert found is not None
    assert wrong in found


def test_more_names_of_notes_than_a_trajectory_may_have_are_refused() -> None:
    with pytest.raises(WireError, match="notes of 71 names") as refused:
        unpack(pack(with_notes(names=69)))
    assert refused.value.kind == "size"
