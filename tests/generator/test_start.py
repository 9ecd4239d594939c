"""Answers that begin with something given: whole turns and parts of one are context, and the environment sees them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgpack
import numpy as np
import pytest
from msgspec.structs import replace
from support_models import qwen3_config, write_folder

from async_rl.buffer.sampler import StartChoice
from async_rl.buffer.starts import MOST_BYTES, given_tokens, read_start, start_from, with_starts
from async_rl.generator.engine import Completion, Request
from async_rl.generator.replay import Replayer
from async_rl.generator.rollout import run_episode
from async_rl.generator.session import EpisodeSession, Ticket
from async_rl.generator.start import with_hint
from async_rl.model.tokenizer import Tokenizer
from async_rl.task.protocol import Problem, Session, Split
from async_rl.task.weigh import Weights
from async_rl.trajectory import Trajectory
from async_rl.trajectory.codec import pack
from async_rl.trajectory.given import GIVEN, HINT, Given, given_in, wrong_given
from async_rl.wire.messages import Permit, Permits, Start

PERMIT = Permit(group=4, problem=0, split="train", samples=(1,), seed=0, temperature=1.0)


@dataclass
class CountingEngine:
    """Tokens that depend on the history's length and on `shift` only."""

    shift: int = 0
    version: int = 3
    max_context: int = 200
    asked: list[int] = field(default_factory=list)

    async def generate(self, request: Request) -> Completion:
        start = len(request.tokens)
        self.asked.append(start)
        length = min(2 + start % 3, request.params.max_tokens)
        return Completion(
            tokens=[2 + (start + i + self.shift) % 7 for i in range(length)],
            log_probs=[-0.25] * length,
            versions=[self.version] * length,
            finish="stop",
        )

    def release(self, session: int) -> None:
        pass


@dataclass
class Talk:
    """Four turns of at most nine tokens; the reward is what was said, letter by letter."""

    answer: str = "abcd"
    name: str = "talk"
    errors: Sequence[int] = ()
    heard: list[str] = field(default_factory=list)

    def problems(self, split: Split) -> Sequence[Problem]:
        return [Problem(index=0, prompt="abc", data={"solution": "abcdefgabcdefg", "answer": ""})]

    async def rollout(self, problem: Problem, session: Session) -> float:
        self.heard.clear()
        for number, letter in enumerate(self.answer):
            said = await session.generate(max_tokens=9)
            self.heard.append(said)
            assert session.said[-1].text == said
            session.reward_turn(1.0)
            if number in self.errors:
                session.note_turn("error", 1.0)
            session.append(letter)
        return float(sum(map(ord, "".join(self.heard))))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_folder(tmp_path_factory.mktemp("model") / "m", qwen3_config()))


def play(
    tokenizer: Tokenizer, talk: Talk, start: Start | None = None, *, shift: int = 0, record: Trajectory | None = None,
    max_turns: int = 0,
) -> tuple[Trajectory, list[Trajectory], CountingEngine]:  # fmt: skip
    """The episode, what was saved behind each sampled turn, the engine."""
    ticket = Ticket(permit=replace(PERMIT, start=start, max_turns=max_turns), sample=1, seed=7)
    saved: list[Trajectory] = []
    engine = CountingEngine(shift)
    session = EpisodeSession(
        engine=engine, tokenizer=tokenizer, ticket=ticket, session_id=1, max_context=200, max_turns=9,  # type: ignore[arg-type]
        clock=lambda: 5.0, record=record, on_turn=lambda: saved.append(session.so_far()),
    )  # fmt: skip
    made = asyncio.run(run_episode(talk, session, ticket, timeout_s=9.0))  # type: ignore[arg-type]
    assert made.check() is None
    assert made.ended == ("turn_limit" if max_turns else "finished"), made.reason
    return made, saved, engine


def test_a_stored_answer_is_given_up_to_a_share_of_its_tokens(tokenizer: Tokenizer) -> None:
    talk = Talk()
    first, _, _ = play(tokenizer, talk)
    told = list(talk.heard)
    total = first.num_policy_tokens
    for share in np.linspace(0.0, 0.99, 12):
        left = int(share * total)
        start = start_from(first, StartChoice(source="success", share=float(share), group=4, sample=1))
        made, _, engine = play(tokenizer, talk, start, shift=3)
        given = given_in(made)
        assert given is not None
        assert not wrong_given(made)
        positions = [p for begin, length in given.stretches for p in range(begin, begin + length)]
        assert len(positions) == left
        # the very tokens of the stored answer, at their places
        assert positions == first.policy_positions()[:left].tolist()
        assert made.tokens[positions].tolist() == first.tokens[positions].tolist()
        # nobody sampled them: no loss, no log-prob, no version
        assert not set(positions) & set(made.policy_positions().tolist())
        assert not made.log_behaviour[positions].any()
        whole = len(given.stretches) - given.open
        assert talk.heard[:whole] == told[:whole]
        assert len(made.turns) == len(told) - whole == len(engine.asked)
        assert made.reward == float(sum(map(ord, "".join(talk.heard))))
        if given.open:  # text and sampled tokens of the turn make one answer
            begin, length = given.stretches[-1]
            assert made.turns[0].start == begin + length
            text = tokenizer.decode(made.tokens[begin : begin + length].tolist(), behind=True)
            assert talk.heard[whole].startswith(text)
        assert [turn.reward for turn in made.turns] == [1.0] * len(made.turns)


def test_a_failure_is_given_up_to_its_error(tokenizer: Tokenizer) -> None:
    failed, _, _ = play(tokenizer, Talk(errors=(1, 2)))
    start = start_from(failed, StartChoice(source="failure", share=0.1, group=4, sample=1))
    made, _, _ = play(tokenizer, Talk(), start, shift=3)
    turns = tuple((turn.start, turn.length) for turn in failed.turns[:2])
    assert given_in(made) == Given(stretches=turns, open=False)
    end = failed.turns[2].start  # the environment's answer to the error included
    assert made.tokens[:end].tolist() == failed.tokens[:end].tolist()
    assert len(made.turns) == 2


def test_where_the_environment_goes_another_way_the_policy_goes_on_by_itself(tokenizer: Tokenizer) -> None:
    first, _, _ = play(tokenizer, Talk())
    start = start_from(first, StartChoice(source="success", share=0.99, group=4, sample=1))
    made, _, _ = play(tokenizer, Talk("azcd"), start, shift=3)
    given = given_in(made)
    assert given is not None
    assert len(given.stretches) == 2  # the second turn follows the same "a"; the third does not follow "z"
    assert len(made.turns) == 2


def test_a_lost_episode_goes_on_behind_its_start_and_its_turns(tokenizer: Tokenizer) -> None:
    first, _, _ = play(tokenizer, Talk())
    start = start_from(first, StartChoice(source="success", share=0.4, group=4, sample=1))
    whole, saved, _ = play(tokenizer, Talk(), start, shift=3)
    assert len(saved) == len(whole.turns)
    for number, record in enumerate(saved):
        again, _, engine = play(tokenizer, Talk(), start, shift=3, record=record)
        assert again.tokens.tolist() == whole.tokens.tolist()
        assert (again.turns, again.info) == (whole.turns, whole.info)
        assert len(engine.asked) == len(whole.turns) - number - 1


def test_a_text_of_the_data_is_given_in_part(tokenizer: Tokenizer) -> None:
    text = Talk().problems("train")[0].data["solution"]
    tokens = tokenizer.encode(text, behind=True)
    for share in (0.2, 0.5):
        talk = Talk()
        made, _, _ = play(tokenizer, talk, Start(source="field", share=share, field="solution"))
        prompt = len(tokenizer.encode("abc"))
        count = int(share * len(tokens))
        assert given_in(made) == Given(stretches=((prompt, count),), open=True)
        assert made.tokens[prompt : prompt + count].tolist() == tokens[:count]
        assert talk.heard[0].startswith(tokenizer.decode(tokens[:count], behind=True))
    made, _, engine = play(tokenizer, Talk(), Start(source="field", share=0.99, field="solution"))
    assert made.turns[0].length == 1  # an answer of at most nine tokens keeps one to say
    assert engine.asked[0] == made.turns[0].start


def test_a_text_may_stand_in_the_prompt_instead(tokenizer: Tokenizer) -> None:
    start = Start(source="field", share=0.5, field="solution", in_prompt=True, instruction="ab")
    talk = Talk()
    made, _, _ = play(tokenizer, talk, start)
    prompt = tokenizer.encode("abc" + "ab" + "abcdefg")
    assert made.tokens[: len(prompt)].tolist() == prompt
    assert made.turns[0].start == len(prompt)
    assert (made.info[GIVEN], made.info[HINT]) == ("", 0.5)
    again = replayer(tokenizer, Talk(), "solution", "ab").replay(made)
    assert (again.lie, again.played) == ("", True)
    said = with_hint([{"role": "user", "content": "what?"}], start, "0123456789")
    assert said == [{"role": "user", "content": "what?\n\nab\n\n01234"}]


def test_a_problem_without_the_text_fails_with_the_reason(tokenizer: Tokenizer) -> None:
    ticket = Ticket(permit=replace(PERMIT, start=Start(source="field", share=0.5, field="nothing")), sample=1, seed=7)
    session = EpisodeSession(
        engine=CountingEngine(), tokenizer=tokenizer, ticket=ticket, session_id=1, max_context=200, max_turns=9  # type: ignore[arg-type]
    )  # fmt: skip
    made = asyncio.run(run_episode(Talk(), session, ticket, timeout_s=9.0))  # type: ignore[arg-type]
    assert made.ended == "error"
    assert made.reason == "ValueError: problem 0 has no text in its field 'nothing'"


def test_a_permit_may_allow_fewer_turns(tokenizer: Tokenizer) -> None:
    made, _, _ = play(tokenizer, Talk(), max_turns=2)
    assert len(made.turns) == 2
    assert made.reward == 0.0


def replayer(tokenizer: Tokenizer, talk: Talk, start_field: str = "", instruction: str = "") -> Replayer:
    return Replayer(
        task=talk, tokenizer=tokenizer, max_context=200, max_turns=9, timeout_s=9.0, weights=Weights(),  # type: ignore[arg-type]
        whole=True, start_field=start_field, instruction=instruction,
    )  # fmt: skip


def test_what_began_with_a_start_is_played_again_to_the_same_reward(tokenizer: Tokenizer) -> None:
    first, _, _ = play(tokenizer, Talk())
    again = replayer(tokenizer, Talk(), "solution")
    stored = [start_from(first, StartChoice(source="success", share=s, group=4, sample=1)) for s in (0.0, 0.3, 0.9)]
    for start in (*stored, Start(source="field", share=0.5, field="solution")):
        by_field = bool(start.field)
        one = again if by_field else replayer(tokenizer, Talk())
        made, _, _ = play(tokenizer, Talk(), start, shift=3)
        found = one.replay(made)
        assert (found.lie, found.played) == ("", True), found
        assert one.replay(replace(made, reward=made.reward + 1)).lie == "rewards"
        if by_field:
            tokens = made.tokens.copy()
            tokens[given_in(made).stretches[0][0]] += 1  # type: ignore[union-attr]
            found = one.replay(replace(made, tokens=tokens))
            assert found.lie == "prompts"
            assert found.reason == "what its answer begins with is not the beginning of the text in 'solution'"
    cut, _, _ = play(tokenizer, Talk(), max_turns=2)
    assert replayer(tokenizer, Talk()).replay(cut).lie == ""


def test_long_starts_go_in_several_messages(tokenizer: Tokenizer) -> None:
    first, _, _ = play(tokenizer, Talk())

    class Stored:
        def load_one(self, group: int, sample: int) -> bytes | None:
            return None if group == 9 else bytes(pack(first))

        def load_start(self, group: int) -> bytes | None:
            chosen = StartChoice(source="success", share=0.5, group=group, sample=1)
            stored = read_start(self, chosen)
            assert stored is not None
            tokens, turns, is_open = given_tokens(stored)
            return bytes(msgpack.packb([tokens + bytes(MOST_BYTES // 2), turns, is_open])) if group == 7 else stored

    start = Start(source="success", share=0.5)
    permits = tuple(replace(PERMIT, group=group, start=start) for group in (4, 7, 7, 9, 7))
    parts = with_starts(Permits(permits=permits, granted=5), Stored())
    assert [[permit.group for permit in part.permits] for part in parts] == [[4, 7], [7, 9], [7]]
    assert {part.granted for part in parts} == {5}
    filled = {permit.group: permit.start for part in parts for permit in part.permits}
    assert filled[4] == start_from(first, StartChoice(source="success", share=0.5))
    assert filled[9] == start  # what is not there any more gives nothing
    plain = Permits(permits=(PERMIT,), granted=1)
    assert with_starts(plain, Stored()) == [plain]


def test_what_was_given_is_written_and_read() -> None:
    for given in (Given(), Given(stretches=((3, 5),)), Given(stretches=((3, 5), (20, 1)), open=True)):
        assert Given.read(given.write()) == given
    assert Given(stretches=((3, 5), (20, 1)), open=True).write() == "3+5,20+1~"
    for text in ("~", "3+", "3+5,", "a", "-1+3", "3+5~~"):
        assert Given.read(text) is None
