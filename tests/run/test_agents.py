"""Runs of real processes whose episodes are played by agents, one generator of which is killed."""

from __future__ import annotations

import json
import os
import signal
import textwrap
from pathlib import Path

import pytest
from support_agents import HERMES
from support_command import Run, run_command, write_config
from support_models import make_decoder, qwen3_config
from support_tokenizers import byte_folder

from async_rl.buffer.store_reader import StoreReader
from async_rl.model.architecture import config_values
from async_rl.model.folder import save_folder
from async_rl.model.tokenizer import Tokenizer
from async_rl.observe.audit import audit_run
from async_rl.run_folder import RunFolder, read_rows
from async_rl.trajectory import Trajectory
from async_rl.trajectory.codec import unpack

TASK = '''
    """An agent with a helper in two rooms at once, in threads and in this thread; it sums up what it heard."""
    import asyncio
    import openai
    from async_rl import Problem, Task

    class Crowd(Task):
        name = "crowd"
        slots = {"desk": 2}

        def problems(self, split):
            return [Problem(index=i, prompt=[{"role": "user", "content": f"task {i}"}]) for i in range(50)]

        async def setup(self):
            self.client = openai.AsyncOpenAI(base_url="http://x", api_key="x")
            self.at_desk = self.most = 0

        async def teardown(self):
            await self.client.close()
            print("torn down", self.most, flush=True)

        async def setup_episode(self, problem, session):
            session.note("number", problem.index)

        async def rollout(self, problem, session):
            reached = session.openai()
            key = {"base_url": reached.base_url, "api_key": reached.api_key}
            client = self.client.with_options(**key)

            async def ask(messages, **more):
                answer = await client.chat.completions.create(model="policy", messages=messages, max_tokens=6, **more)
                return answer.choices[0].message.content or ""

            async with session.slot("desk"):
                self.at_desk += 1
                self.most = max(self.most, self.at_desk)
                first = await ask(problem.prompt)
                self.at_desk -= 1
            history = [*problem.prompt, {"role": "assistant", "content": first}]
            rooms = [[*history, {"role": "user", "content": f"room {i}"}] for i in range(2)]
            heard = await asyncio.gather(
                *(ask(room, extra_body={"agent": f"room {i}"}) for i, room in enumerate(rooms))
            )
            if session.seed % 2:
                blocking = openai.OpenAI(**key)
                said = await asyncio.to_thread(
                    lambda: blocking.chat.completions.create(
                        model="policy", messages=rooms[0] + [{"role": "user", "content": "?"}], max_tokens=4
                    )
                )
            await ask([{"role": "user", "content": " ".join(heard)}], temperature=0.7)
            assert session.turn == 4 + session.seed % 2
            score = await session.score("abc")
            assert score.version >= 0 and score.total < 0
            return {"even": float(sum(map(ord, first)) % 2), "heard": float(len(heard[0]) % 2)}

        async def teardown_episode(self, problem, session):
            session.note("turns_seen", session.turn)
'''


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that reads and writes bytes, with a chat template."""
    folder = byte_folder(tmp_path_factory.mktemp("models") / "chat", template=HERMES, merges=[("a", "b"), ("t", "e")])
    config = qwen3_config(vocabulary=Tokenizer(folder).vocab_size, max_context=512)
    end = Tokenizer(folder).eos_id
    (folder / "config.json").write_text(json.dumps(config_values(config) | {"eos_token_id": end}))
    save_folder(folder, make_decoder(config), source=folder)
    return folder


def test_a_run_of_agents_is_bounded_complete_and_exact(tmp_path: Path, chat_model: Path, monkeypatch) -> None:
    (tmp_path / "crowd.py").write_text(textwrap.dedent(TASK))
    monkeypatch.chdir(tmp_path)
    config = write_config(
        tmp_path, chat_model, "task.name=crowd.py:Crowd", "generator.count=2", "trainer.steps=8", "wire.timeout_s=40",
        "batch.groups_per_step=2", "generator.save_turns_after_s=0.05", "generator.task_slots.desk=1",
        "evaluation.problems=2", "task.reward_weights.heard=0.5",
    )  # fmt: skip
    run = Run(config, RunFolder(tmp_path / "run"), longest_s=150.0)
    run.wait_for(lambda: len(list(read_rows(run.folder.metrics))) > 2, "some steps")
    os.kill(run.pid("generator-0"), signal.SIGKILL)
    run.wait_for_event("generator_died")
    said = run.said()
    assert run.process.returncode == 0, said
    assert not audit_run(run.folder).violations

    with StoreReader(run.folder.store) as store:
        made = [unpack(blob) for blob in store.load_groups([row.group for row in store.groups()])]
    finished = [t for t in made if t.ended == "finished"]
    assert len(finished) > 40
    assert {t.reason for t in made if t.ended == "error"} == set(), "nothing else ended badly"
    for t in finished:
        judge(t)
    rows = list(read_rows(run.folder.metrics))
    assert max(abs(row["kl/mismatch"]) for row in rows if row.get("kl/mismatch") is not None) < 1e-3
    assert all(row["note/number/mean"] >= 0 for row in rows)
    assert all(row["note/agent/contexts/mean"] >= 2 for row in rows)
    told = "".join(path.read_text() for path in run.folder.logs.glob("generator-1*.log"))
    assert "torn down 1" in told, "one episode at a time sat at the desk"


def judge(t: Trajectory) -> None:
    threaded = len(t.turns) == 5
    assert len(t.contexts) == 2 + threaded, "the main line with one room, other rooms, the summary"
    assert {turn.agent for turn in t.turns} == {"", "room 0", "room 1"}
    assert [turn.temperature for turn in t.turns].count(pytest.approx(0.7)) == 1
    assert t.info["turns_seen"] == len(t.turns)
    assert t.info["agent/requests"] == 4 + threaded
    assert t.reward == t.info["reward/even"] + 0.5 * t.info["reward/heard"]


@pytest.mark.nightly
def test_the_evaluation_of_a_folder_is_played_by_agents(tmp_path: Path, chat_model: Path, monkeypatch) -> None:
    (tmp_path / "crowd.py").write_text(textwrap.dedent(TASK))
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path, chat_model, "task.name=crowd.py:Crowd", "evaluation.problems=2")
    done = run_command("eval", config)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout[done.stdout.index("{") :])
    assert (told["trajectories"], set(told["parts"])) == (2, {"even", "heard"})
    wrong = run_command("eval", config, "generator.task_slots.dsk=3")
    assert wrong.returncode == 2
    assert "generator.task_slots names 'dsk', which is no slot of task 'crowd'; did you mean 'desk'?" in wrong.stderr
