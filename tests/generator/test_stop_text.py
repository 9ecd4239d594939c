"""Where a turn stops, and what the task reads of it, agree: for every tokenizer, stop string and split into tokens."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support_tokenizers import IM_END, byte_folder, metaspace_folder

from async_rl.generator.engine import Completion, Request, SamplingParams
from async_rl.generator.rollout import run_episode
from async_rl.generator.sampling import StopRules
from async_rl.generator.session import EpisodeSession, make_tickets
from async_rl.model.tokenizer import Tokenizer
from async_rl.task import make_task
from async_rl.task.tools import read_call
from async_rl.trajectory import Trajectory
from async_rl.wire.messages import Permit

NEWLINE = "\u010a"  # a line break as byte-level vocabularies spell it
MERGES = [(">", NEWLINE), (">", "<"), ("<", "/"), ("o", "l"), ("ol", ">"), ("ol>", NEWLINE), (".", NEWLINE)]
ENDS = ("<|endoftext|>", "<|im_start|>", IM_END)


def end_of(tokenizer: Tokenizer, ids: list[int], *strings: str) -> int | None:
    """Number of tokens after which the embedded engine ends a turn of `ids`."""
    rules = StopRules(tokenizer, tokenizer.vocab_size + 3)
    rule = np.array([rules.number(SamplingParams(max_tokens=1, stop_strings=strings), set)])
    for end in range(1, len(ids) + 1):
        so_far = np.array(ids[:end], dtype=np.int32)
        if rules.ended(rule, so_far[-1:].astype(np.int64), np.array([0]), lambda _slot, t=so_far: t)[0]:
            return end
    return None


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    root = tmp_path_factory.mktemp("tokenizers")
    tags = (*ENDS, "<tool>", "</tool>")
    return {
        "bytes": Tokenizer(byte_folder(root / "bytes")),
        "merged": Tokenizer(byte_folder(root / "merged", merges=MERGES)),
        "special": Tokenizer(byte_folder(root / "special", specials=tags)),
        "special and merged": Tokenizer(byte_folder(root / "both", specials=tags, merges=MERGES)),
        "metaspace": Tokenizer(metaspace_folder(root / "metaspace", ["▁the", "▁", "tool>", "</", "\n", ">\n", "▁<"])),
    }


KIND = st.sampled_from(["bytes", "merged", "special", "special and merged", "metaspace"])
STOPS = st.lists(
    st.sampled_from(["</tool>", "\n", ">", " ", "the", " the", ". ", "é", "終", "ol>\n", "<tool>", "e tool"]),
    min_size=1, max_size=3, unique=True,
)  # fmt: skip
BEHIND = st.sampled_from(["", "\n", "\n\n x", "<"])
WORDS = st.lists(
    st.sampled_from(
        ["</tool>", "<tool>", "\n", "the", " ", "  ", ">", "</", "tool", "é", "終わり", ".", "x", "\U0001f600"]
    ),
    max_size=12,
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(kind=KIND, stop=STOPS, words=WORDS, drawn=st.lists(st.integers(0, 255), max_size=8))
def test_decoding_token_by_token_stops_where_decoding_the_whole_does(kinds, kind, stop, words, drawn) -> None:
    tokenizer = kinds[kind]
    ids = [*tokenizer.encode("".join(words)), *(i for i in drawn if i not in tokenizer.end_ids)]
    read = [tokenizer.decode(ids[:n], behind=True) for n in range(len(ids) + 1)]
    whole = next((n for n, text in enumerate(read) if any(s in text for s in stop)), None)
    end = end_of(tokenizer, ids, *stop)
    assert end == whole
    text = tokenizer.turn_text(ids[:end], stop)
    assert any(text.endswith(s) for s in stop) == (end is not None) or end is None
    assert tokenizer.decode(ids[:end], behind=True).startswith(text)
    if end is not None:
        assert not any(s in text[:-1] for s in stop), "the text goes on behind a stop string"


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    kind=KIND,
    call=st.text("0123456789+-*/() ", min_size=1, max_size=9),
    behind=st.sampled_from(["", "\n", "\n\n x", "<"]),
)
def test_a_call_is_read_wherever_its_tag_stands(kinds, kind, call, behind) -> None:
    tokenizer = kinds[kind]
    ids = tokenizer.encode(f"Let me see: <tool>{call}</tool>{behind}")
    end = end_of(tokenizer, ids, "</tool>")
    assert end is not None
    assert read_call(tokenizer.turn_text(ids[:end], ("</tool>",))) == call.strip()
    assert read_call(tokenizer.decode(ids)) == call.strip()


@pytest.mark.parametrize("text", ["1+1</tool>", "<tool>1+1", "</tool><tool>", "", "<tool> </tool"])
def test_tags_that_are_no_pair_are_no_call(text: str) -> None:
    assert read_call(text) is None


def test_an_inner_tag_begins_the_call_anew() -> None:
    assert read_call("a <tool>b <tool> 1+1\n</tool>\n") == "1+1"


def test_an_end_token_is_in_the_text_only_when_a_stop_string_names_it(kinds) -> None:
    tokenizer = kinds["bytes"]
    ids = [*tokenizer.encode("42"), tokenizer.eos_id]
    assert tokenizer.turn_text(ids) == "42"
    assert tokenizer.turn_text(ids, ("</tool>", ">")) == "42"
    assert tokenizer.turn_text(ids, (IM_END,)) == "42" + IM_END
    assert end_of(tokenizer, ids, IM_END) == end_of(tokenizer, ids) == len(ids)


class Says:
    """An engine that samples what it is told, as the embedded engine would cut it."""

    def __init__(self, tokenizer: Tokenizer, *turns: str) -> None:
        self.tokenizer, self.turns = tokenizer, list(turns)

    async def generate(self, request: Request) -> Completion:
        ids = self.tokenizer.encode(self.turns.pop(0))
        end = end_of(self.tokenizer, ids, *request.params.stop_strings)
        ids = ids[:end]
        return Completion(tokens=ids, log_probs=[-0.1] * len(ids), versions=[0] * len(ids), finish="stop")

    def release(self, session: int) -> None: ...


def episode(tokenizer: Tokenizer, task: Any, *turns: str) -> Trajectory:
    permit = Permit(group=0, problem=0, split="train", samples=(0,), seed=1, temperature=1.0)
    (ticket,) = make_tickets(permit)
    engine: Any = Says(tokenizer, *turns)
    session = EpisodeSession(
        engine=engine, tokenizer=tokenizer, ticket=ticket, session_id=1, max_context=500, max_turns=6
    )
    return asyncio.run(run_episode(task, session, ticket, timeout_s=5))


@pytest.mark.parametrize("kind", ["bytes", "merged", "special", "special and merged"])
@pytest.mark.parametrize("behind", ["", "\n", "\n\n"])
def test_an_episode_with_a_tool_goes_the_same_way_with_every_tokenizer(tmp_path: Path, kinds, kind, behind) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"1+1? ({i})", "answer": "2"}) + "\n" for i in range(40)))
    task = make_task("tools", {"path": str(data), "reward": "exact", "eval_share": 0.2})
    said = f"Let me see: <tool>1+1</tool>{behind}"
    made = episode(kinds[kind], task, said, "2")
    assert (len(made.turns), made.info["tool_calls"], made.reward, made.ended) == (2, 1.0, 1.0, "finished")
    first = made.turns[0]
    sampled = made.tokens[first.start : first.start + first.length].tolist()
    assert sampled == kinds[kind].encode(said)[: len(sampled)], "the tokens stay as they were sampled"


def test_vllm_looks_for_stop_strings_in_the_text_that_the_task_gets() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed (make vllm)")
    from async_rl.generator.vllm_engine import sampling_params

    params = sampling_params(SamplingParams(max_tokens=4, stop_strings=("</tool>",)), 1, 4)
    assert not params.skip_special_tokens
    assert params.include_stop_str_in_output
