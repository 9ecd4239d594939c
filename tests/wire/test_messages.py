"""Every message survives the wire; whatever else arrives is a WireError."""

from collections.abc import Mapping
from contextlib import suppress
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import msgpack
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_rl.trajectory import Split, Trajectory, Turn, VersionSpan
from async_rl.trajectory.codec import WireError, pack
from async_rl.wire import messages as msg
from async_rl.wire.frames import SCHEMA, decode, encode

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
KINDS = get_args(msg.Message)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def trajectory(sample: int = 0, tokens: int = 20) -> Trajectory:
    log_behaviour = np.zeros(tokens, dtype=np.float32)
    log_behaviour[5:] = -0.25
    return Trajectory(
        group=3,
        sample=sample,
        problem=7,
        split="train",
        seed=11,
        tokens=np.arange(tokens, dtype=np.int32),
        log_behaviour=log_behaviour,
        turns=(Turn(start=5, length=tokens - 5),),
        versions=(VersionSpan(version=2, start=5, end=tokens),),
        reward=0.5,
        ended="finished",
    )


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Anything a field of this type may hold."""
    arguments = get_args(hint)
    if hint is int:
        return st.integers(-(2**63), 2**64 - 1)
    if hint is memoryview:
        return st.binary(max_size=8).map(memoryview)
    if hint is NoneType:
        return st.none()
    if get_origin(hint) is UnionType:
        return st.one_of(*map(values, arguments))
    if hint == Split:
        return st.sampled_from(arguments)
    if hint == msg.Detail:
        return st.dictionaries(st.text(max_size=4), PLAIN, max_size=3)
    if get_origin(hint) is Mapping:
        return st.dictionaries(st.text(max_size=4), values(arguments[1]), max_size=3)
    if get_origin(hint) is tuple and arguments[-1] is Ellipsis:
        return st.lists(values(arguments[0]), max_size=3).map(tuple)
    if get_origin(hint) is tuple:
        return st.tuples(*(values(argument) for argument in arguments))
    if isinstance(hint, type) and issubclass(hint, msg.WireStruct):
        return messages(hint)
    return {
        float: st.floats(allow_nan=False),
        str: st.text(max_size=8),
        bool: st.booleans(),
        bytes: st.binary(max_size=8),
    }[hint]


def messages(kind: type) -> st.SearchStrategy[Any]:
    hints = get_type_hints(kind)
    return st.builds(kind, **{name: values(hints[name]) for name in kind.__struct_fields__})


SMALL = [kind for kind in KINDS if kind not in (msg.Finished, msg.Turns, msg.Batch, msg.Verify)]


@pytest.mark.parametrize("kind", SMALL)
@settings(derandomize=True, deadline=None, max_examples=30)
@given(data=st.data())
def test_a_message_comes_back_as_it_was(kind: type, data: st.DataObject) -> None:
    message = data.draw(messages(kind))
    assert decode(encode(message)) == message


@pytest.mark.parametrize("kind", [msg.Finished, msg.Turns, msg.Verify])
def test_trajectories_small_and_large_come_back_in_order(kind: type) -> None:
    sent = [trajectory(i, tokens) for i, tokens in enumerate([20, 2000, 20, 70_000, 40, 3000, 20])]
    others = {"name": "generator-0", "session": 7} if kind is msg.Verify else {}
    frames = encode(kind(trajectories=tuple(sent), **others))
    assert len(frames) == 3  # the header, everything up to the large one, the rest
    received = decode([memoryview(frame) for frame in frames])
    assert type(received) is kind
    assert [pack(t) for t in received.trajectories] == [pack(t) for t in sent]


def test_stored_blobs_travel_as_they_are() -> None:
    blobs = tuple(pack(trajectory(i)) for i in range(5))
    received = decode(encode(msg.Batch(step=4, blobs=blobs, counters=msg.BufferCounters(slots=3, held_up_seconds=3))))
    assert isinstance(received, msg.Batch)
    assert (received.step, received.blobs, received.counters.slots) == (4, (), 3)
    assert type(received.counters.held_up_seconds) is float
    assert tuple(pack(t) for t in received.trajectories) == blobs


def test_whole_numbers_in_float_fields_arrive_as_floats() -> None:
    received = decode(encode(msg.Waiting(what="a", reason="b", seconds=3)))
    assert isinstance(received, msg.Waiting)
    assert type(received.seconds) is float


@pytest.mark.parametrize("detail", [{"a": object()}, {"a": 2**70}, {"a": np.float32(1)}])
def test_what_is_no_plain_data_is_an_error_of_the_sender(detail: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="LinkCall cannot be sent"):
        encode(msg.LinkCall(number=1, method="init", version=-1, detail=detail))


CALL: dict[str, Any] = {"number": 1, "method": "init", "version": -1}


def altered(kind: str, value: Any, schema: Any = SCHEMA) -> list[bytes]:
    return [msgpack.packb([schema, kind, value])]


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([], "without frames"),
        ([b""], "not msgpack"),
        ([b"\xc1"], "not msgpack"),
        ([b"\x91" * 5000], "not msgpack"),
        ([msgpack.packb({"kind": "Want"})], "not a message"),
        (altered("Want", {"limit": 1, "version": 0, "session": 0}, schema=2), "schema 2"),
        (altered("Want", {"limit": 1, "version": 0, "session": 0}, schema=True), "schema True"),
        (altered("Exec", {}), "unknown kind 'Exec'"),
        (altered("Want", {"limit": 1}), "missing or extra"),
        (altered("Want", {"limit": 1, "version": 0, "session": 0, "x": 1}), "missing or extra"),
        (altered("Want", {"limit": 1.0, "version": 0, "session": 0}), "Want.limit is a float, not a int"),
        (altered("Want", {"limit": True, "version": 0, "session": 0}), "Want.limit is a bool"),
        (altered("Want", [1, 0]), "missing or extra"),
        (altered("Accepted", {"pairs": [[1, 2, 3]]}), "not a list of 2"),
        (altered("Accepted", {"pairs": [[1, 2.0]]}), "not a list of 2: int, int"),
        (altered("Accepted", {"pairs": 3}), "not a list"),
        (altered("LinkCall", CALL | {"detail": {"a": b"x"}}), "holds a bytes"),
        (altered("LinkCall", CALL | {"detail": {"a": [[[[[[[[[[[1]]]]]]]]]]]}}), "nested"),
        ([*altered("Query", {}), b""], "2 frames"),
        (altered("Finished", {}), "without trajectories"),
        (altered("Finished", {"trajectories": [[3]]}), "1 frames"),
        ([*altered("Finished", {"trajectories": [[3]]}), b"xx"], "2 bytes instead of 3"),
        ([*altered("Finished", {"trajectories": [[4, -2]]}), b"xx"], "no list of lengths"),
        ([*altered("Finished", {"trajectories": [[2]]}), b"xx"], "truncated"),
    ],
)
def test_what_is_wrong_with_a_message_is_said(frames: list[bytes], reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        decode(frames)


@settings(derandomize=True, deadline=None)
@given(st.lists(st.binary(max_size=60), max_size=4))
def test_random_frames_are_refused(frames: list[bytes]) -> None:
    with pytest.raises(WireError):
        decode(frames)


@settings(derandomize=True, deadline=None)
@given(kind=st.sampled_from([kind.__name__ for kind in KINDS]), value=PLAIN, data=st.data())
def test_any_content_of_a_known_kind_is_a_message_or_refused(kind: str, value: Any, data: st.DataObject) -> None:
    known = {kind.__name__: kind for kind in KINDS}[kind]
    names = [f.name for f in msgspec.structs.fields(known) if f.name != "blobs" and f.required]
    for content in (value, {name: data.draw(PLAIN) for name in names}):
        with suppress(WireError):
            assert type(decode(altered(kind, content))) is known


@settings(derandomize=True, deadline=None)
@given(st.data())
def test_flipped_and_cut_frames_of_trajectories_are_refused_or_still_valid(data: st.DataObject) -> None:
    frames = [bytearray(frame) for frame in encode(msg.Finished(trajectories=(trajectory(), trajectory(1))))]
    frame = data.draw(st.sampled_from(frames))
    if data.draw(st.booleans()):
        del frame[data.draw(st.integers(0, len(frame) - 1)) :]
    else:
        frame[data.draw(st.integers(0, len(frame) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with suppress(WireError):
        decoded = decode([bytes(frame) for frame in frames])
        assert isinstance(decoded, msg.Finished)
        assert all(t.check() is None for t in decoded.trajectories)
