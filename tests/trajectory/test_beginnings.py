"""What trajectories of a group begin with alike is carried once, and every byte comes back."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from async_rl.trajectory import Trajectory, Turn, VersionSpan
from async_rl.trajectory.beginnings import HEAD_BYTES, cut_all, is_cut, join, join_all, whole_bytes
from async_rl.trajectory.codec import Blob, WireError, pack
from async_rl.wire.frames import decode, encode
from async_rl.wire.messages import Batch, Finished

ANY = 1 << 40


def trajectory(group: int, sample: int, tokens: list[int], first: int) -> Trajectory:
    """Its policy speaks from token `first` on."""
    log = np.zeros(len(tokens), np.float32)
    log[first:] = -0.25 * (sample + 1)
    return Trajectory(
        group=group,
        sample=sample,
        problem=group,
        split="train",
        seed=sample,
        tokens=np.array(tokens, np.int32),
        log_behaviour=log,
        turns=(Turn(start=first, length=len(tokens) - first, reward=0.5 * (sample % 2)),),
        versions=(VersionSpan(version=1, start=first, end=len(tokens)),),
        reward=float(sample),
        ended="finished",
        info={"said": "x" * (sample % 5)},
    )


def group_of(size: int, *, prompt: int, answer: int, group: int = 3) -> list[Trajectory]:
    random = Random(group)
    beginning = [random.randrange(1000) for _ in range(prompt)]
    answers = [[random.randrange(1000) for _ in range(answer)] for _ in range(size)]
    return [trajectory(group, sample, beginning + own, prompt) for sample, own in enumerate(answers)]


def cut_of(trajectories: list[Trajectory], most_bytes: int = ANY) -> list[Blob]:
    return cut_all(trajectories, map(pack, trajectories), most_bytes)


@st.composite
def trees(draw: st.DrawFn) -> list[Trajectory]:
    """Samples of two groups; each goes on from any place of an earlier one, or begins anew."""
    random = Random(draw(st.integers(0, 2**32)))
    made: list[Trajectory] = []
    for number in range(draw(st.integers(2, 12))):
        group = draw(st.integers(0, 1))
        before = [t for t in made if t.group == group]
        start: list[int] = []
        if before and draw(st.booleans()):
            parent = random.choice(before).tokens.tolist()
            start = parent[: random.randint(0, len(parent))]
        start += [random.randrange(50) for _ in range(random.choice((1, 30, 200)))]
        made.append(trajectory(group, number, start + [7] * random.randint(0, 9), len(start)))
    return made


@settings(max_examples=60, deadline=None)
@given(trees(), st.randoms(use_true_random=False))
def test_every_byte_comes_back_whatever_the_order_of_arrival(made: list[Trajectory], random: Random) -> None:
    carried = cut_of(made)
    random.shuffle(carried)
    names = {pack(t) for t in made}
    assert {bytes(blob) for blob in join_all(carried, ANY)} == names
    assert all(len(blob) % 8 == 0 for blob in carried)
    sizes = [whole_bytes(blob[:HEAD_BYTES], len(blob)) for blob in carried]
    assert sizes == [len(blob) for blob in join_all(carried, ANY)]


def test_a_message_carries_the_prompt_of_a_group_once() -> None:
    sent = [*group_of(8, prompt=512, answer=64), *group_of(8, prompt=512, answer=64, group=4)]
    frames = encode(Finished(trajectories=tuple(sent)))
    assert sum(map(len, frames)) < 0.35 * sum(len(pack(t)) for t in sent)
    received = decode(frames)
    assert isinstance(received, Finished)
    assert [bytes(blob) for blob in received.blobs] == [pack(t) for t in sent], "stored as if nothing had been cut"
    assert [pack(t) for t in received.trajectories] == [pack(t) for t in sent]


def test_a_batch_of_cut_blobs_arrives_whole() -> None:
    sent = group_of(4, prompt=200, answer=10)
    message = Batch(step=0, blobs=tuple(map(memoryview, cut_of(sent))), total=4)
    received = decode(encode(message))
    assert isinstance(received, Batch)
    assert [pack(t) for t in received.trajectories] == [pack(t) for t in sent]


def test_what_continues_another_sample_is_cut_there() -> None:
    """A branching rollout: the second goes on from the middle of the first, the third from the end of the second."""
    random = Random(0)
    first = [random.randrange(9) for _ in range(400)]
    second = first[:300] + [random.randrange(9) for _ in range(200)]
    third = [*second, 1, 2, 3]
    made = [trajectory(0, 0, first, 100), trajectory(0, 1, second, 300), trajectory(0, 2, third, 500)]
    carried = cut_of(made)
    assert [is_cut(blob) for blob in carried] == [False, True, True]
    assert len(carried[2]) <= HEAD_BYTES + 160, "of the third, three tokens and what is not tokens"
    assert join_all(carried, ANY) == [pack(t) for t in made]


def test_little_in_common_and_other_groups_are_not_cut() -> None:
    short = group_of(3, prompt=40, answer=10)
    assert cut_of(short) == [pack(t) for t in short]
    apart = [group_of(1, prompt=300, answer=4, group=group)[0] for group in (1, 2)]
    apart[1] = replace(apart[1], tokens=apart[0].tokens)
    assert cut_of(apart) == [pack(t) for t in apart]


def test_trajectories_beyond_what_is_taken_are_sent_whole() -> None:
    sent = group_of(4, prompt=500, answer=4)
    size = len(pack(sent[0]))
    carried = cut_of(sent, most_bytes=2 * size + 8)
    assert [is_cut(blob) for blob in carried] == [False, True, False, False]


def test_a_small_message_cannot_become_a_large_one() -> None:
    large = trajectory(0, 0, [1] * 100_000, 99_999)
    little = cut_of([large, trajectory(0, 1, [1] * 100_001, 100_000)])[1]
    assert len(little) < 300
    with pytest.raises(WireError, match="no more than 16777216 are taken") as refused:
        join_all([pack(large), *[little] * 100], 16 << 20)
    assert refused.value.kind == "size"


def test_a_cut_blob_without_what_it_refers_to_is_refused() -> None:
    first, second, third = group_of(3, prompt=200, answer=8)
    whole, cut, _ = cut_of([first, second, third])
    with pytest.raises(WireError, match="trajectory 1 of group 3 begins as sample 0, which is not there"):
        join_all([cut], ANY)
    other = pack(replace(first, tokens=first.tokens + 1))
    with pytest.raises(WireError, match="which has other tokens"):
        join_all([other, cut], ANY)
    with pytest.raises(WireError, match="has not its 200 tokens"):
        join(cut, pack(trajectory(3, 0, [1, 2, 3], 1)))
    around = bytearray(cut)
    around[16:24] = (1).to_bytes(8, "little")
    with pytest.raises(WireError, match="without end"):
        join_all([whole, bytes(around)], ANY)
    later = bytearray(cut)
    later[2] = 9
    with pytest.raises(WireError, match="schema 9"):
        join_all([whole, bytes(later)], ANY)


def test_a_bent_message_with_cut_blobs_is_refused_or_right() -> None:
    """Whatever byte is changed: WireError, or a message whose trajectories pass their checks."""
    random = Random(1)
    frames = [bytes(frame) for frame in encode(Finished(trajectories=tuple(group_of(3, prompt=70, answer=3))))]
    refused = 0
    for _ in range(4000):
        bent = [bytearray(frame) for frame in frames]
        for _ in range(random.choice((1, 1, 3))):
            frame = random.choice(bent)
            frame[random.randrange(len(frame))] = random.randrange(256)
        if random.random() < 0.2:
            del bent[1][random.randrange(len(bent[1])) :]
        try:
            decode([bytes(frame) for frame in bent])
        except WireError:
            refused += 1
    assert refused > 1000
