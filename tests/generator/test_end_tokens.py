"""Every end token that a model folder names ends a turn, whichever file names it and in whichever form."""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support_tokenizers import byte_folder

from async_rl.generator.engine import Completion, Request, SamplingParams
from async_rl.generator.sampling import StopRules
from async_rl.generator.session import EpisodeSession, make_tickets
from async_rl.model.tokenizer import Tokenizer
from async_rl.run.preflight import task_digest
from async_rl.task import make_task
from async_rl.task.protocol import Problem
from async_rl.wire.messages import Permit

SPECIALS = ("<eos>", "<turn>", "<end_of_turn>", "<|eom|>")
EOS, TURN, END_OF_TURN, EOM = range(256, 260)
VOCABULARY = 264


def write(folder: Path, *, eos: Any = "<eos>", generation: Any = None, config: Any = None, text: Any = None) -> Path:
    """A byte tokenizer whose folder names these end tokens; None: a file names none."""
    inner = {"text_config": {"eos_token_id": text, "vocab_size": VOCABULARY}} if text is not None else {}
    return byte_folder(
        folder,
        specials=SPECIALS,
        eos=eos,
        config={"vocab_size": VOCABULARY, "eos_token_id": config} | inner,
        generation=None if generation is None else {"eos_token_id": generation},
    )


def listed(value: Any) -> set[int]:
    return set() if value is None else {value} if isinstance(value, int) else set(value)


NAMED = st.none() | st.sampled_from((EOS, END_OF_TURN)) | st.lists(st.sampled_from((EOS, TURN, EOM)), max_size=3)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(generation=NAMED, config=NAMED, text=NAMED, eos=st.sampled_from(["<eos>", {"content": "<|eom|>"}]))
def test_every_end_token_that_any_file_names_is_one(generation: Any, config: Any, text: Any, eos: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Tokenizer(write(Path(folder), eos=eos, generation=generation, config=config, text=text))
    own = EOS if eos == "<eos>" else EOM
    assert tokenizer.eos_id == own
    assert tokenizer.end_ids == {own} | listed(generation) | listed(config) | listed(text)


def test_a_token_of_no_model_is_not_an_end(tmp_path: Path) -> None:
    named = [END_OF_TURN, -1, VOCABULARY, 10**9, None, "257", True]
    assert Tokenizer(write(tmp_path, generation=named)).end_ids == {EOS, END_OF_TURN}


def test_an_old_number_in_config_json_is_not_an_end_when_it_is_an_ordinary_token(tmp_path: Path) -> None:
    assert Tokenizer(write(tmp_path, generation=END_OF_TURN, config=2)).end_ids == {EOS, END_OF_TURN}
    assert Tokenizer(write(tmp_path, config=2)).end_ids == {EOS, 2}


def test_special_tokens_map_names_the_end_where_tokenizer_config_does_not(tmp_path: Path) -> None:
    write(tmp_path, eos=None)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<end_of_turn>"}}))
    assert Tokenizer(tmp_path).end_ids == {END_OF_TURN}


@pytest.mark.parametrize("token", [EOS, END_OF_TURN, EOM])
def test_the_embedded_engine_ends_a_turn_at_each(tmp_path: Path, token: int) -> None:
    tokenizer = Tokenizer(write(tmp_path, generation=[END_OF_TURN, EOM]))
    rules = StopRules(tokenizer, VOCABULARY)
    rule = np.array([rules.number(SamplingParams(max_tokens=1), set)])
    turn = np.array([40, token], dtype=np.int32)
    assert rules.ended(rule, np.array([token]), np.array([0]), lambda _: turn)[0]
    assert not rules.ended(rule, np.array([TURN]), np.array([0]), lambda _: turn)[0]


class Recorder:
    """An engine that keeps what it was asked, and ends each turn with `token`."""

    def __init__(self, token: int) -> None:
        self.token, self.asked = token, list[Request]()

    async def generate(self, request: Request) -> Completion:
        self.asked.append(request)
        return Completion(tokens=[40, self.token], log_probs=[-1.0, -1.0], versions=[0, 0], finish="stop")

    def release(self, session: int) -> None: ...


def test_every_engine_is_asked_to_end_at_all_of_them_and_no_text_shows_one(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write(tmp_path, generation=[END_OF_TURN, EOM]))
    engine = Recorder(END_OF_TURN)
    permit = Permit(group=0, problem=0, split="train", samples=(0,), seed=0, temperature=1.0)
    session = EpisodeSession(
        engine=engine, tokenizer=tokenizer, ticket=make_tickets(permit)[0], session_id=1, max_context=50, max_turns=3
    )  # type: ignore[arg-type]
    session.begin(Problem(index=0, prompt="hi"))
    assert asyncio.run(session.generate(max_tokens=5)) == tokenizer.decode([40])
    assert engine.asked[0].params.stop_tokens == (EOS, END_OF_TURN, EOM)
    assert session.stopped


def test_vllm_is_asked_to_end_at_all_of_them() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed (make vllm)")
    from async_rl.generator.vllm_engine import sampling_params

    params = sampling_params(SamplingParams(max_tokens=4, stop_tokens=(EOS, END_OF_TURN)), 1, 4)
    assert set(params.stop_token_ids) == {EOS, END_OF_TURN}


def test_hosts_that_end_turns_at_other_tokens_have_other_digests(tmp_path: Path) -> None:
    task = make_task("arithmetic", {})
    one, two = (Tokenizer(write(tmp_path / name, generation=g)) for name, g in (("a", EOS), ("b", [EOS, EOM])))
    assert task_digest(task, one) != task_digest(task, two)
