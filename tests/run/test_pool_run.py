"""Real runs with an experience pool: killed and resumed, thinned out, audited, replayed; demonstrations from a file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support_run import train

from async_rl.buffer.store import Store, StoreReader
from async_rl.config import Settings, check
from async_rl.config.schema import structured, to_yaml, with_overrides
from async_rl.errors import UserError
from async_rl.instruments.replay import replay
from async_rl.model.tokenizer import Tokenizer
from async_rl.observe.audit import audit_run
from async_rl.run.demonstrations import read_demonstrations_of
from async_rl.run_folder import RunFolder, read_rows
from async_rl.task import make_task
from async_rl.trajectory.codec import unpack
from async_rl.trajectory.reuse import has_no_effect, reuse_of

STEPS = 12
LONGEST_S = 120.0


@pytest.fixture(scope="module")
def sort_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from async_rl.model.create import create_model_folder

    path = tmp_path_factory.mktemp("models") / "sort"
    alphabet = make_task("sort", {"alphabet_size": 4}).alphabet
    create_model_folder(
        path, alphabet=alphabet, hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, intermediate=64, seed=3
    )
    return path


def sort_settings(model: Path, *overrides: str) -> Settings:
    args = {"length": 3, "alphabet_size": 4, "num_train": 6, "partial_reward": True}
    base = {
        "name": "test",
        "model": {"path": str(model)},
        "task": {"name": "sort", "args": args},
        "batch": {"groups_per_step": 4, "group_size": 4},
        "optimizer": {"warmup_steps": 2, "learning_rate": 1e-3},
        "evaluation": {"problems": 4, "samples": 1},
        "verify": {"rewards": "none"},
        "wire": {"timeout_s": 60},
    }
    settings = structured(Settings, with_overrides(base, overrides), where="")
    check(settings)
    return settings


def launched(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "async_rl", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill_at(folder: RunFolder, process: subprocess.Popen[str], victim: str, step: int) -> None:
    """Kill a process of the run once so many steps are recorded."""
    wait_for(lambda: sum(1 for _ in read_rows(folder.metrics)) >= step, process)
    pid = process.pid
    if victim != "launcher":
        started = [row for row in read_rows(folder.events) if row["event"] == "started"]
        pid = int([row["pid"] for row in started if row["process"] == victim][-1])
    os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=LONGEST_S)


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + LONGEST_S
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


@pytest.mark.nightly
@pytest.mark.parametrize("kills", [(("buffer", 4),), (("buffer", 4), ("trainer", 7), ("launcher", 9))])
def test_a_run_that_is_killed_gives_back_what_was_stored_and_keeps_what_may_come_back(
    sort_model: Path, tmp_path: Path, kills: tuple[tuple[str, int], ...]
) -> None:
    """Payloads of old batches are deleted (buffer.keep_steps); those of the pool's members are spared."""
    settings = sort_settings(
        sort_model, f"trainer.steps={STEPS}", "checkpoint.every=2", "checkpoint.keep=1", "buffer.keep_steps=1",
        "recipe.name=ssb", "pool.source=priority", "pool.rows=5", "pool.max_age=6", "pool.max_uses=3", "pool.size=24",
    )  # fmt: skip
    (tmp_path / "config.yaml").write_text(to_yaml(settings))
    folder = RunFolder(tmp_path / "run")
    process = launched("run", str(tmp_path / "config.yaml"), "--run-dir", str(folder.path))
    for victim, step in kills:
        kill_at(folder, process, victim, step)
        process = launched("run", "--resume", str(folder.path))
    said, _ = process.communicate(timeout=LONGEST_S)
    assert process.returncode == 0, said
    audit = audit_run(folder)
    assert not audit.violations
    assert "priority came back" in audit.reused
    again = replay(folder)
    assert again.difference is None
    assert again.begun > 0
    with StoreReader(folder.store) as store:
        rows = {step: store.drawn(step).rows for step in range(STEPS)}
        assert sum(map(len, rows.values())) > 20
        whole = [row for step in range(store.first_step(), STEPS) for row in rows[step]]
        assert any(store.load_one(row.group, row.sample) is None for row in whole), "some were deleted with their batch"
        assert all(store.load_stored(row) is not None for row in whole)


def test_the_audit_sees_what_is_wrong_with_rows_of_the_pool(sort_model: Path, tmp_path: Path) -> None:
    settings = sort_settings(
        sort_model, "trainer.steps=5", "recipe.name=arpo_replay", "pool.source=successes", "pool.place=replace",
        "pool.when=failed", "pool.gate=0.9", "pool.above=0.3",
    )  # fmt: skip
    folder = train(settings, tmp_path / "run")
    audit = audit_run(folder)
    assert not audit.violations
    assert "successes came back" in audit.reused
    rows = [row for row in read_rows(folder.metrics) if "pool/rows" in row]
    assert rows
    assert all(row["lag/max"] <= 1 and row["pool/replaced"] == row["pool/rows"] for row in rows)
    with StoreReader(folder.store) as store:
        step = next(step for step in range(5) if store.drawn(step))
        part = store.load_part(step, after=0, most_bytes=1)
        assert part is not None
        whole = [unpack(blob) for blob in store.load_batch(step) or ()]
        assert part[0] == len(whole)
        pieces = []
        for after in range(len(whole)):
            found = store.load_part(step, after=after, most_bytes=1)
            assert found is not None
            pieces += found[1]
        assert [(t.group, t.sample, dict(t.info)) for t in map(unpack, pieces)] == [
            (t.group, t.sample, dict(t.info)) for t in whole
        ], "a batch is the same in pieces"
        assert sum(map(has_no_effect, whole)) == sum(reuse_of(t) is not None for t in whole) > 0
    for change in (
        "UPDATE reused SET uses = uses + 1",
        "UPDATE reused SET age = age + 1",
        "DELETE FROM without_effect",
    ):
        store = Store(folder.store, durability="process", create=False)
        store._write(change, ())
        store.commit()
        store.close()
        assert audit_run(folder).count("pool"), change


def write_rows(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_demonstrations_are_tokenized_like_prompts_and_find_their_problems(sort_model: Path, tmp_path: Path) -> None:
    task = make_task("sort", {"length": 3, "alphabet_size": 4, "num_train": 6})
    tokenizer = Tokenizer(sort_model)
    problems = task.problems("train")
    prompt = problems[2].prompt
    assert isinstance(prompt, str)
    path = write_rows(
        tmp_path / "shown.jsonl",
        {"problem": 1, "answer": "abc.", "end": False},
        {"prompt": prompt, "answer": "abd."},
        {"prompt": "dddd=", "answer": "d", "reward": 0.5},
    )
    shown = read_demonstrations_of(path, task, tokenizer, 64)
    assert [number for number, _ in shown] == [1, 2, -1]
    first, second, third = (t for _, t in shown)
    assert tokenizer.decode(first.tokens.tolist()) == f"{problems[1].prompt}abc."
    assert second.tokens.tolist() == [*tokenizer.encode(f"{prompt}abd."), tokenizer.eos_id]
    assert [(t.start, t.length) for t in second.turns] == [(len(prompt), 5)]
    assert (second.reward, third.reward) == (1.0, 0.5)
    assert not any(t.log_behaviour.any() or t.check() for _, t in shown)
    assert [unpack(blob).tokens.tolist() for blob in map(_packed, shown)] == [t.tokens.tolist() for _, t in shown]


def _packed(shown: tuple[int, object]) -> bytes:
    from async_rl.trajectory.codec import pack

    return pack(shown[1])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"answer": "a"}, "a `prompt` or the `problem`"),
        ({"prompt": "ab=", "solution": "a"}, "it has solution"),
        ({"prompt": "ab=", "answer": ""}, "`answer` is no text"),
        ({"problem": 6, "answer": "a"}, "`problem` is 6"),
        ({"prompt": "ab=", "answer": "z"}, "no token for 'z'"),
        ({"prompt": "ab=", "answer": "a", "reward": "high"}, "`reward` is 'high'"),
        ({"messages": [{"role": "user", "content": "ab"}]}, "no message of the assistant"),
        ({"prompt": "ab=" * 30, "answer": "a"}, "the context holds 64"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(sort_model: Path, tmp_path: Path, row: object, said: str) -> None:
    task = make_task("sort", {"length": 3, "alphabet_size": 4, "num_train": 6})
    path = write_rows(tmp_path / "shown.jsonl", {"prompt": "ab=", "answer": "a"}, row)
    with pytest.raises(UserError, match=said) as refused:
        read_demonstrations_of(path, task, Tokenizer(sort_model), 64)
    assert "shown.jsonl, " in str(refused.value)


@pytest.mark.nightly
def test_a_run_learns_from_demonstrations_that_join_their_groups(sort_model: Path, tmp_path: Path) -> None:
    task = make_task("sort", {"length": 3, "alphabet_size": 4, "num_train": 6})
    rows = [{"problem": p.index, "answer": p.data["answer"] + ".", "end": False} for p in task.problems("train")]
    path = write_rows(tmp_path / "shown.jsonl", *rows)
    words = ("recipe.name=luffy", "recipe.aggregate.constant=4", "pool.source=demonstrations", "pool.place=join")
    folder = train(sort_settings(sort_model, *words, f"pool.file={path}", "trainer.steps=5"), tmp_path / "run")
    Path(path).unlink()  # what the run needs of it is in its folder
    audit = audit_run(folder)
    assert not audit.violations
    assert int(audit.reused.split()[0]) > 15  # of 20 groups; one demonstration comes back once a step
    assert replay(folder).difference is None
    nll = [row["pool/nll"] for row in read_rows(folder.metrics)]
    assert nll[-1] < nll[0]
