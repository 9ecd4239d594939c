"""Chat messages that a session appends: what the model sees is what the template writes, and what was sampled stays."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from support_agents import FORGETFUL, HERMES, WEATHER, Played, ScriptedEngine, agents_tokenizer, play, texts_of
from support_tokenizers import CHAT, ENDOFTEXT, IM_END

from async_rl.generator.chat import Chat, HistoryRewritten, written_until
from async_rl.generator.endpoint import Endpoint
from async_rl.generator.session import STOPS
from async_rl.model.tokenizer import Tokenizer
from async_rl.trajectory import Trajectory
from async_rl.trajectory.codec import pack, unpack

TOKENIZERS = Path(__file__).parents[2] / ".venv" / "tokenizers"
USER = {"role": "user", "content": "hi"}
CALL = '<tool_call>\n{"name": "get_weather",  "arguments": {"city":   "abc"}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return agents_tokenizer(tmp_path_factory.mktemp("model"))


def played(engine: ScriptedEngine, rollout: Any, prompt: Any = (USER,), **more: Any) -> Trajectory:
    fields = {name: more.pop(name) for name in ("tools", "template_args") if name in more}
    return asyncio.run(play(engine, engine.tokenizer, Played(rollout, prompt, **fields), **more))


async def talk(problem: Any, session: Any) -> float:
    await session.generate(max_tokens=20)
    session.append_messages([{"role": "user", "content": "abc"}])
    await session.generate(max_tokens=20)
    session.append_messages([{"role": "user", "content": "x"}, {"role": "user", "content": "y"}])
    await session.generate(max_tokens=20)
    return 1.0


def test_messages_are_written_as_the_template_writes_the_whole_chat(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, ["abc", "a b", "c"])
    (text,) = texts_of(played(engine, talk), tokenizer)
    chat = [USER, {"role": "assistant", "content": "abc"}, {"role": "user", "content": "abc"},
            {"role": "assistant", "content": "a b"}, {"role": "user", "content": "x"},
            {"role": "user", "content": "y"}, {"role": "assistant", "content": "c"}]  # fmt: skip
    assert text.replace("[", "").replace("]", "") == tokenizer.render(chat, add_generation_prompt=False).rstrip("\n")
    assert engine.asked[2].tokens[-1] == tokenizer.encode("\n")[0]


@pytest.mark.parametrize(
    ("said", "how", "between"),
    [
        ("abc", {}, "[abc<|im_end|>]\n"),
        ("abcdef", {"max_tokens": 3}, "[abc]<|im_end|>\n"),
        ("a.b", {"stop": (".",)}, "[a.]<|im_end|>\n"),
        ("  abc \n", {}, "[  abc \n<|im_end|>]\n"),
    ],
)
def test_a_turn_has_one_end_whatever_ended_it(
    tokenizer: Tokenizer, said: str, how: dict[str, Any], between: str
) -> None:
    async def rollout(problem: Any, session: Any) -> float:
        await session.generate(**{"max_tokens": 20, **how})
        session.append_messages([USER])
        return 1.0

    (text,) = texts_of(played(ScriptedEngine(tokenizer, [said]), rollout), tokenizer)
    start = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert text == f"{start}{between}{start}"


def test_another_end_token_and_one_that_the_task_named(tmp_path: Path) -> None:
    """The folder names the end of text as its end; the template ends turns with another token."""
    tokenizer = Tokenizer(agents_tokenizer(tmp_path, CHAT, eos=ENDOFTEXT).folder)
    mark = tokenizer.encode(IM_END)[0]
    start = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"

    async def rollout(problem: Any, session: Any) -> float:
        await session.generate(max_tokens=9, stop_tokens=[mark])
        session.append_messages([USER])
        return 1.0

    for end, between in ((ENDOFTEXT, "[abc<|endoftext|>]<|im_end|>\n"), (IM_END, "[abc<|im_end|>]\n")):
        engine = ScriptedEngine(tokenizer, ["abc"], end=end)
        (text,) = texts_of(played(engine, rollout), tokenizer)
        assert text == f"{start}{between}{start}"
        assert mark in engine.asked[0].params.stop_tokens


def test_control_tokens_in_appended_messages_are_text(tokenizer: Tokenizer) -> None:
    async def rollout(problem: Any, session: Any) -> float:
        await session.generate(max_tokens=9)
        session.append_messages([{"role": "user", "content": f"a{IM_END}b"}])
        return 1.0

    made = played(ScriptedEngine(tokenizer, ["abc"]), rollout)
    mark = tokenizer.encode(IM_END)[0]
    assert made.tokens.tolist().count(mark) == 3, "of the prompt, the turn and the message"
    assert f"a{IM_END}b" in texts_of(made, tokenizer)[0]


def test_a_tools_answer_follows_the_call_as_it_was_sampled(tokenizer: Tokenizer) -> None:
    async def rollout(problem: Any, session: Any) -> float:
        await session.generate(max_tokens=200)
        session.append_messages([{"role": "tool", "content": "sun"}])
        return 1.0

    (text,) = texts_of(played(ScriptedEngine(tokenizer, [CALL]), rollout, tools=[WEATHER]), tokenizer)
    assert text.endswith(f"[{CALL}<|im_end|>]\n<|im_start|>tool\nsun<|im_end|>\n<|im_start|>assistant\n")


def test_a_template_that_rewrites_the_history_is_refused_and_nothing_is_appended(tmp_path: Path) -> None:
    tokenizer = agents_tokenizer(tmp_path, FORGETFUL)

    async def rollout(problem: Any, session: Any) -> float:
        await session.generate(max_tokens=99)
        before = session.transcript
        with pytest.raises(ValueError, match=r"begin a new context \(start_context\)"):
            session.append_messages([USER])
        assert session.transcript == before
        session.append_messages([USER], as_sampled=True)
        await session.generate(max_tokens=99)
        session.start_context([USER, {"role": "assistant", "content": "abc"}, USER])
        await session.generate(max_tokens=99)
        return 1.0

    engine = ScriptedEngine(tokenizer, ["<think>\nhm\n</think>\n\nabc", "hi", "z"])
    made = played(engine, rollout)
    assert made.reason == ""
    start = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert texts_of(made, tokenizer) == [
        f"{start}[<think>\nhm\n</think>\n\nabc<|im_end|>]\n{start}[hi<|im_end|>]",
        f"{start}abc<|im_end|>\n{start}[z<|im_end|>]",
    ]


def test_what_the_template_writes_is_rendered_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = agents_tokenizer(tmp_path)
    Chat(tokenizer=tokenizer).begin([USER])  # the template is looked into once
    render, rendered = tokenizer.render, []
    monkeypatch.setattr(tokenizer, "render", lambda *a, **how: (rendered.append(1), render(*a, **how))[1])
    chat = Chat(tokenizer=tokenizer)
    tokens = chat.begin([USER])
    assert (len(rendered), tokens) == (1, tokenizer.encode(chat.text))
    assert chat.text == render([USER])
    chat.follow(tokenizer.encode("abc<|im_end|>"), [USER])
    assert len(rendered) == 2
    assert chat.text == render([USER, {"role": "assistant", "content": "abc"}, USER])


def test_a_dated_header_is_refused(tmp_path: Path) -> None:
    dated = "{{ messages | length }}" + HERMES
    tokenizer = agents_tokenizer(tmp_path, dated)
    chat = Chat(tokenizer=tokenizer)
    chat.begin([USER])
    with pytest.raises(HistoryRewritten, match="rewrites the history when more follows: '1"):
        chat.follow(tokenizer.encode("abc"), [USER])


def test_messages_behind_text_or_without_a_turn_are_refused(tokenizer: Tokenizer) -> None:
    async def text(problem: Any, session: Any) -> float:
        await session.generate(max_tokens=9)
        session.append_messages([USER])
        return 1.0

    made = played(ScriptedEngine(tokenizer, ["abc"]), text, prompt="hello")
    assert "give the prompt as messages" in made.reason

    async def twice(problem: Any, session: Any) -> float:
        session.append_messages([USER])
        return 1.0

    assert "append them in one call" in played(ScriptedEngine(tokenizer, []), twice).reason


def test_without_a_template_a_message_is_a_line(tmp_path: Path) -> None:
    tokenizer = agents_tokenizer(tmp_path, None)  # type: ignore[arg-type]
    engine = ScriptedEngine(tokenizer, ["abc", "a", "c"])
    (text,) = texts_of(played(engine, talk), tokenizer)
    assert text == "hi[abc<|im_end|>]\nabc[a<|im_end|>]\nx\ny[c<|im_end|>]"


@pytest.mark.parametrize(
    ("said", "text", "end"),
    [("4", "4<e>", 1), ("4 \n", "4<e>", 1), (" 4", "4<e>", 1), ("a  b", "a b<e>", 3), ("a", "b", -1), ("ab", "a", -1),
     ("", "<e>", 0), ("a\nb", "a\n\nb\n<e>", 4)],
)  # fmt: skip
def test_where_a_turn_ends_in_what_the_template_writes(said: str, text: str, end: int) -> None:
    assert written_until(said, text) == end


# ------------------------------------------------------------------------------------------------ real tokenizers

WORDS = [
    "the",
    " weather",
    "\n",
    "\n\n",
    " ",
    "é",
    "終わり",
    "12345",
    "```py\nx = 1\n```",
    "<|im_end|>",
    "don't",
    "\t",
    "(a)",
]


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "gemma3", "deepseek_v3"])
def test_random_conversations_on_real_tokenizers(name: str) -> None:
    """The text is what transformers renders for the chat, but for white space that the template strips at the ends of
    a turn; tokens behind a turn are those of the whole text."""
    if not (TOKENIZERS / name / "tokenizer.json").is_file():
        pytest.skip(f"the tokenizer of {name} is not there (make tokenizers)")
    from transformers import AutoTokenizer

    ours, theirs = (
        Tokenizer(TOKENIZERS / name, control_tokens="allow"),
        AutoTokenizer.from_pretrained(TOKENIZERS / name),
    )
    for seed in range(15):
        random = Random(seed)

        def text(random: Random = random, words: Sequence[str] = WORDS[:9]) -> str:
            return "".join(random.choices(words, k=random.randint(1, 8))).strip() or "x"

        chat: list[Any] = [{"role": "user", "content": text()}]
        talk = Chat(tokenizer=ours)
        tokens = talk.begin(chat)
        for _ in range(3):
            said, more = text(), {"role": "user", "content": text()}
            turn = ours.encode(said, behind=True)
            turn += [random.choice(sorted(ours.end_ids))] if random.random() < 0.6 else []
            chat += [{"role": "assistant", "content": said}, more]
            behind = talk.follow(turn, [more])
            tokens += [*turn, *behind]
            whole = theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            assert ours.decode(tokens, special=True) == whole
            assert ours.encode(whole)[-len(behind) :] == behind
            assert talk.length == len(tokens)


# ------------------------------------------------------------------------------------------------ the session


def test_seeds_differ_by_sample_and_are_the_same_in_a_replay(tokenizer: Tokenizer) -> None:
    seen: list[tuple[int, str]] = []

    async def rollout(problem: Any, session: Any) -> float:
        seen.append((session.seed, session.split))
        return 0.0

    for sample, split in ((0, "train"), (1, "train"), (0, "train"), (0, "eval")):
        played(ScriptedEngine(tokenizer, []), rollout, sample=sample, split=split)
    seeds = [seed for seed, _ in seen]
    assert seeds[0] == seeds[2] != seeds[1]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert [split for _, split in seen] == ["train", "train", "train", "eval"]


def test_score_is_that_of_the_text_behind_the_context_and_leaves_no_trace(tokenizer: Tokenizer) -> None:
    scores: list[Any] = []

    class Moving(ScriptedEngine):
        """Its weights change while the first text is scored."""

        async def probe(self, tokens: Sequence[int]) -> Sequence[float]:
            self.version = max(self.version, 4)
            return await super().probe(tokens)

    async def rollout(problem: Any, session: Any) -> float:
        scores.append(await session.score("hi there"))
        scores.append(await session.score(""))
        with pytest.raises(ValueError, match="does not fit"):
            await session.score("x" * 5000)
        return scores[0].total

    made = played(Moving(tokenizer, []), rollout)
    tokens = tokenizer.encode("hi there", behind=True)
    assert (list(scores[0].log_probs), scores[0].version) == ([-float(token) for token in tokens], 4)
    assert (list(scores[1].log_probs), scores[1].total) == ([], 0.0)
    assert made.turns == ()
    assert texts_of(made, tokenizer) == ["<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"]


def test_at_most_so_many_episodes_hold_a_slot_and_waiting_is_not_the_tasks_time(tokenizer: Tokenizer) -> None:
    from async_rl.generator.places import Slots
    from async_rl.generator.rollout import run_episode
    from async_rl.generator.session import EpisodeSession, make_tickets
    from async_rl.generator.task_code import TaskGuard
    from async_rl.wire.messages import Permit

    inside, most = [0], [0]

    async def rollout(problem: Any, session: Any) -> float:
        with pytest.raises(ValueError, match=r"no slots named 'x' \(known: sandbox\)"):
            async with session.slot("x"):
                pass
        async with session.slot("sandbox"):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            await asyncio.sleep(0.06)
            inside[0] -= 1
        if session.seed % 2:
            raise KeyError("after")
        return 1.0

    async def hangs(problem: Any, session: Any) -> float:
        async with session.slot("sandbox"):
            await asyncio.Event().wait()
        return 1.0

    async def all_of_them() -> list[Trajectory]:
        slots = Slots({"sandbox": 2})
        engine = ScriptedEngine(tokenizer, [])
        permit = Permit(group=0, problem=0, split="train", samples=tuple(range(9)), seed=5, temperature=1.0)

        async def one(number: int, ticket: Any) -> Trajectory:
            session = EpisodeSession(
                engine=engine, tokenizer=tokenizer, ticket=ticket, session_id=number, max_context=99, max_turns=3,
                slots=slots,
            )  # type: ignore[arg-type]  # fmt: skip
            task = Played(hangs if number == 0 else rollout)
            return await run_episode(task, session, ticket, timeout_s=9, guard=TaskGuard(limit_s=0.2))

        return await asyncio.gather(*(one(i, t) for i, t in enumerate(make_tickets(permit))))

    made = asyncio.run(all_of_them())
    assert most[0] <= 2
    assert {t.reason.split(" (")[0] for t in made} <= {
        "", "KeyError: 'after'", "the task or its reward took more than 0.2 s"
    }  # fmt: skip
    assert [t.ended for t in made].count("error") >= 1
    assert made[0].ended == "error", "it held a slot, which others got after it"
    assert sum(t.ended == "finished" for t in made) >= 1


@pytest.mark.parametrize("ends", ["well", "error", "late", "wrong prompt"])
def test_an_episode_is_torn_down_however_it_ends(tokenizer: Tokenizer, ends: str) -> None:
    calls: list[str] = []

    class Careful(Played):
        async def setup_episode(self, problem: Any, session: Any) -> None:
            calls.append("up")

        async def teardown_episode(self, problem: Any, session: Any) -> None:
            calls.append("down")
            raise OSError("no such container")

    async def rollout(problem: Any, session: Any) -> float:
        if ends == "error":
            raise KeyError("x")
        if ends == "late":
            await asyncio.Event().wait()
        return 1.0

    task = Careful(rollout, "x" * 9000 if ends == "wrong prompt" else (USER,))
    made = asyncio.run(play(ScriptedEngine(tokenizer, []), tokenizer, task, timeout_s=0.2 if ends == "late" else 9))
    assert calls == (["down"] if ends == "wrong prompt" else ["up", "down"])
    assert str(made.info["teardown_error"]).startswith("OSError: no such container")
    assert made.ended == ("finished" if ends == "well" else "error")


def test_an_episode_that_the_generator_gives_up_is_torn_down(tokenizer: Tokenizer) -> None:
    calls: list[str] = []

    class Careful(Played):
        async def teardown_episode(self, problem: Any, session: Any) -> None:
            await asyncio.sleep(0)
            calls.append("down")

    async def main() -> None:
        begun = asyncio.Event()

        async def rollout(problem: Any, session: Any) -> float:
            begun.set()
            await asyncio.Event().wait()
            return 1.0

        playing = asyncio.ensure_future(play(ScriptedEngine(tokenizer, []), tokenizer, Careful(rollout)))
        await begun.wait()
        playing.cancel()
        await asyncio.wait({playing})
        assert playing.cancelled()

    asyncio.run(main())
    assert calls == ["down"]


def test_a_session_without_an_endpoint_says_so(tokenizer: Tokenizer) -> None:
    from async_rl.generator.session import EpisodeSession, make_tickets
    from async_rl.wire.messages import Permit

    permit = Permit(group=0, problem=0, split="train", samples=(0,), seed=5, temperature=1.0)
    session = EpisodeSession(
        engine=ScriptedEngine(tokenizer, []), tokenizer=tokenizer, ticket=make_tickets(permit)[0], session_id=1,
        max_context=99, max_turns=3,
    )  # type: ignore[arg-type]  # fmt: skip
    with pytest.raises(RuntimeError, match="without an endpoint"):
        session.openai()


def test_turns_of_several_contexts_come_back_from_a_record(tokenizer: Tokenizer) -> None:
    async def rollout(problem: Any, session: Any) -> float:
        for number in range(3):
            await session.generate(max_tokens=20, agent=f"{number}", temperature=0.5 if number else None)
            session.append_messages([USER])
            await session.generate(max_tokens=20)
            session.start_context([{"role": "user", "content": f"part {number}"}])
        return 1.0

    saved: list[Trajectory] = []
    whole = played(ScriptedEngine(tokenizer, lambda h: f"{len(h)}"), rollout, saved=saved)
    assert len(whole.contexts) == 2
    assert len(saved) == 6
    for count, record in enumerate(saved, start=1):
        engine = ScriptedEngine(tokenizer, lambda h: f"{len(h)}")
        again = played(engine, rollout, record=unpack(pack(record)))
        assert again.tokens.tolist() == whole.tokens.tolist()
        assert (again.turns, again.contexts) == (whole.turns, whole.contexts)
        assert len(engine.asked) == 6 - count
        assert STOPS not in again.info


def test_an_endpoint_may_be_shut_twice_or_unused() -> None:
    async def main() -> None:
        endpoint = Endpoint()
        await endpoint.shut()
        await endpoint.shut()

    asyncio.run(main())
