"""Every mistake of a new user, through the real command line: exit code 2, one clear message, nothing left."""

from __future__ import annotations

import json
import shutil
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support_command import write_config

from async_rl.cli.main import main
from async_rl.errors import UserError
from async_rl.run.preflight import check_device
from async_rl.weights.shared_memory import segment_path
from async_rl.wire.keys import make_keys

Refused = Callable[..., str]
ROWS = "".join(json.dumps({"prompt": f"{i}<", "answer": str(i)}) + "\n" for i in range(60))
DATASET = ("task=dataset", "task.args.as_chat=false", "task.args.max_tokens=3")


@pytest.fixture
def refused(tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run with these overrides; what stderr said, without the prefix."""
    config = write_config(tmp_path, tiny_model)

    def attempt(*overrides: str, config: Path = config, run_dir: Path = tmp_path / "run") -> str:
        before = run_dir.exists()
        with pytest.raises(SystemExit) as end:
            main(["run", str(config), "--run-dir", str(run_dir), *overrides])
        printed = capsys.readouterr()
        assert end.value.code == 2, printed.err
        assert printed.out == ""
        assert printed.err.startswith("async-rl: ")
        assert printed.err.count("\n") == 1, "one message on one line"
        assert run_dir.exists() == before
        assert not segment_path(run_dir).exists()
        return printed.err.removeprefix("async-rl: ").rstrip("\n")

    return attempt


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # unknown names, at every depth
        ("trainr.steps=3", "trainr is not a setting; did you mean 'trainer'?"),
        ("trainer.stps=3", "trainer.stps is not a setting; did you mean 'trainer.steps'?"),
        ("steps=3", "steps is not a setting; did you mean 'trainer.steps'?"),
        ("staleness.temperature=1", "did you mean 'generator.temperature' or 'evaluation.temperature'?"),
        ("task.args.num_secret=3", "task.args.num_secret is not a setting; did you mean 'task.args.num_secrets'?"),
        ("recipe.ess.refernce=1", "recipe.ess.refernce is not a setting; did you mean 'recipe.ess.reference'?"),
        ("task=gues", "task.name 'gues' is not a task; did you mean 'guess'?"),
        ("recipe=vcop", "recipe.name 'vcop' is not a recipe; did you mean 'vcpo'?"),
        ("generator.engine=vlm", "generator.engine is 'vlm'; choose one of "),
        # types
        ("trainer.steps=abc", "trainer.steps is 'abc'; it must be a whole number"),
        ("trainer.steps=1.5", "trainer.steps is 1.5; it must be a whole number"),
        ("trainer.steps=true", "trainer.steps is True; it must be a whole number"),
        ("trainer.steps=null", "trainer.steps is empty; it must be a whole number"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate is 'fast'; it must be a number"),
        ("buffer.drop_zero_signal=maybe", "buffer.drop_zero_signal is 'maybe'; it must be true or false"),
        ("model.path=", "model.path is empty; it must be text"),
        ("name={a: 1}", "name is {'a': 1}; it must be text"),
        ("trainer=3", "trainer is a group of settings (steps, "),
        ("task.args=null", "task.args is a group of settings (name: value), not empty"),
        ("trainer.steps", "'trainer.steps' is not a setting; write name=value"),
        ("model.path=${nowhere}", "model.path: Interpolation key 'nowhere' not found"),
        ("task.args.num_secrets=many", "task.args.num_secrets is 'many'; it must be a whole number"),
        # values
        ("generator.count=-1", "generator.count is -1; it must be at least 0"),
        ("generator.threads=5000", "generator.threads is 5000; it must be at most 1,024"),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate is nan; it must be a finite number"),
        ("optimizer.beta2=1", "optimizer.beta2 is 1.0; it must be at least 0 and below 1"),
        ("name=a/b", "name is 'a/b'; it names a folder"),
        ("task.args.num_secrets=1", "task.args.num_secrets is 1; it must lie between 2 and 100"),
        # contradictions
        ("staleness.pipeline_depth=9", "with staleness.max_staleness=1 it must lie between 1 and 2"),
        ("generator.max_sequences=2", "generator.max_sequences is 2, less than one group (batch.group_size=4); raise"),
        ("batch.group_size=1", "with groups of one trajectory makes every advantage 0; raise the group size"),
        ("recipe.ratio.denominator=proximal", "makes every ratio 1 by construction"),
        # what the machine and the model have
        ("generator.max_context=99999", "generator.max_context is 99999, but the model of "),
        ("generator.max_context=4", "an episode of task 'guess' takes up to "),
        ("generator.device=cpu:x", "generator.device is 'cpu:x'; it must be cpu, cuda or cuda:N"),
        ("trainer.device=cuda:99", "trainer.device is 'cuda:99', but "),
        # where the buffer listens
        (
            "wire.endpoint=nonsense",
            "wire.endpoint: cannot use nonsense: it must look like ipc://PATH or tcp://HOST:PORT",
        ),
        ("wire.endpoint=inproc://x", "it must look like ipc://PATH or tcp://HOST:PORT"),
        ("wire.endpoint=tcp://127.0.0.1:5555", "but wire.keys is not set: TCP is served with keys only"),
        ("wire.endpoint=tcp://:*", "but wire.keys is not set: TCP is served with keys only; `async-rl keys DIR` makes"),
        ("weights.transport=stream", "weights.transport is stream, but with wire.endpoint=auto no weight server runs"),
        ("weights.endpoint=tcp://:1", "weights.endpoint is tcp://:1, but with wire.endpoint=auto no weight server"),
        ("wire.keys=somewhere", "wire.endpoint=auto is no tcp endpoint, and a Unix socket needs none"),
        ("wire.endpoint=ipc:///nowhere/at/all", "does its folder exist, and may this user write there?"),
    ],
)
def test_a_wrong_setting_is_named_with_the_remedy(refused: Refused, override: str, message: str) -> None:
    assert message in refused(override)


def test_a_gpu_that_is_not_there_is_said_before_anything_starts(refused: Refused) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    message = refused("generator.device=cuda")
    assert message.startswith("generator.device is 'cuda', but torch ")
    assert message.endswith("set generator.device=cpu, or play the config through on a CPU with `run --fake-model`")
    with pytest.raises(UserError, match=r"set generator\.device=cpu$"):
        check_device("generator.device", "cuda", rehearsed=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer:\n  steps: [1\nfoo: 2\n", "is not valid YAML: "),
        ("trainer:\n\tsteps: 1\n", "line 2, column 1"),
        ("- a\n- b\n", "must hold settings (name: value), not a list"),
        ("a: 1\na: 2\n", "found duplicate key a"),
        ("trainer:\n", "trainer is a group of settings (steps, "),
        ("task: 3\n", "task is a group of settings (name, args, reward_weights), not 3"),
        ("recipe: [vcpo]\n", "recipe is a group of settings (name: value), not ['vcpo']"),
        ("model: {path: x}\ntask: guess\nrecipe: vcop\n", "recipe.name 'vcop' is not a recipe; did you mean 'vcpo'?"),
        ("name: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("", "model.path is not set"),
        (b"\xff\xfe\x00\x01\x02", "is not a text file"),
        (b"a: \x00", "control characters are not allowed"),
    ],
)
def test_a_file_that_holds_no_settings_is_refused(
    refused: Refused, tmp_path: Path, text: str | bytes, message: str
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert message in refused(config=path)


def test_a_config_that_is_no_file_is_refused(refused: Refused, tmp_path: Path) -> None:
    assert refused(config=tmp_path / "none.yaml") == f"{tmp_path}/none.yaml: no such file"
    assert refused(config=tmp_path) == f"{tmp_path} is a folder, not a YAML file"


# --------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "rows.jsonl holds no rows"),
        ('{"prompt": "1<", "answer": "1"}\n{"prompt": \n', "rows.jsonl, line 2: not valid JSON"),
        ('{"prompt": "1<", "answr": "1"}\n', "rows.jsonl, line 1: no field 'answer' (task.args.answer_field); did you"),
        ('{"prompt": "1<", "answer": null}\n', "rows.jsonl, line 1: field 'answer' is None; an answer is text or a"),
        ('{"prompt": 3, "answer": "1"}\n', "rows.jsonl, line 1: field 'prompt' is 3; a prompt is text or a list"),
        (b'{"prompt": "\xe9", "answer": "1"}\n', "rows.jsonl, line 1: not UTF-8 text"),
        (ROWS.replace('"30<"', '"3é0<"'), "rows.jsonl, line 31: the tokenizer of "),
        (ROWS.replace('"30<"', f'"{"3" * 9999}"'), "(the longest 9,999; first: "),
    ],
)
def test_a_malformed_row_is_named_with_file_line_and_field(
    refused: Refused, tmp_path: Path, content: str | bytes, message: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in refused(*DATASET, f"task.args.path={path}", "task.args.eval_share=0.3")


def test_a_dataset_that_is_missing_or_not_usable_is_refused(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(ROWS)
    here = (*DATASET, f"task.args.path={path}")
    assert "task.args.path is not set; name a file with your rows, e.g. a .jsonl or .parquet file" in refused(*DATASET)
    assert "there is no file" in refused(*DATASET, f"task.args.path={tmp_path}/none.jsonl")
    assert "has no problem in its eval split" in refused(*here, "task.args.eval_share=0")
    assert "task.args.reward 'exat' is not known; did you mean 'exact'?" in refused(*here, "task.args.reward=exat")
    assert "cannot import 'no_such_module'" in refused(*here, "task.args.reward=no_such_module:f")
    assert "it takes nothing; a reward takes any of completion, answer, problem" in refused(
        *here, "task.args.reward=os:getpid"
    )


# -------------------------------------------------------------------------------------------- model


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def truncated(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def of_lists(folder: Path) -> None:
    """A header that is JSON, but not that of safetensors."""
    text = b'{"a": [1]}'
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)


def configured(**values: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return write


def lacking(character: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / "tokenizer.json"
        tokenizer = json.loads(path.read_text())
        del tokenizer["model"]["vocab"][character]
        path.write_text(json.dumps(tokenizer))

    return write


def with_more_tokens(folder: Path) -> None:
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["~"] = 500
    path.write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "does not exist; put a Hugging Face model there"),
        (without("config.json"), "no config.json; this is not a Hugging Face model folder"),
        (without("tokenizer.json"), "no tokenizer.json; save the tokenizer in the fast format"),
        (without("model.safetensors"), "no weights, model.safetensors is missing"),
        (truncated, "model.safetensors is truncated: "),
        (of_lists, "model.safetensors is not a safetensors file; copy or download it again"),
        (configured(hidden_size="wide"), "hidden_size must be a positive whole number, it is 'wide'"),
        (configured(vocab_size=10), "and the model has embeddings for 10 tokens only (vocab_size in config.json)"),
        (configured(num_hidden_layers=3), "the weights do not fit config.json: "),
        (configured(model_type=None), "names no model_type"),
        (with_more_tokens, "the tokenizer has 501 tokens, the model only "),
        (lacking("<"), "task 'guess' does not fit the tokenizer: the tokenizer of "),
    ],
)
def test_a_model_folder_that_cannot_be_used_says_which_file_and_why(
    refused: Refused, tmp_path: Path, tiny_model: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    damage(folder)
    said = refused(f"model.path={folder}")
    assert message in said
    assert str(folder) in said


# ------------------------------------------------------------------------------- folders and sockets


def test_a_run_folder_that_exists_or_cannot_be_made_is_refused(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "metrics.jsonl").write_text("precious\n")
    assert refused(run_dir=tmp_path / "taken").endswith("exists already; choose another --run-dir or remove it")
    assert (tmp_path / "taken" / "metrics.jsonl").read_text() == "precious\n"
    assert "exists already" in refused(run_dir=tmp_path / "config.yaml")


def test_a_run_folder_under_a_file_is_refused(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, tiny_model)
    with pytest.raises(SystemExit) as end:
        main(["run", str(config), "--run-dir", str(config / "run")])
    assert end.value.code == 2
    assert "cannot be written: Not a directory; choose another --run-dir" in capsys.readouterr().err


def with_keys(folder: Path) -> str:
    return f"wire.keys={make_keys(folder / 'keys').folder}"


def test_what_is_wrong_with_a_tcp_endpoint_or_its_keys_is_said(refused: Refused, tmp_path: Path) -> None:
    words = with_keys(tmp_path)
    for endpoint, message in (
        ("tcp://127.0.0.1:99999", "has a port above 65535"),
        ("tcp://203.0.113.7:4000", "this machine has no such address"),
        ("tcp://5555", "it must look like ipc://PATH or tcp://HOST:PORT"),
        ("tcp://127.0.0.1:http", "it must look like ipc://PATH or tcp://HOST:PORT"),
    ):
        assert message in refused(f"wire.endpoint={endpoint}", words)
    tcp = "wire.endpoint=tcp://:*"
    assert "`async-rl keys " in refused(tcp, f"wire.keys={tmp_path / 'none'}")
    (tmp_path / "keys" / "server.key_secret").chmod(0o644)
    assert "server.key_secret can be read by others than its owner; chmod 600" in refused(tcp, words)
    (tmp_path / "keys" / "client.key").write_text("curve\n")
    (tmp_path / "keys" / "server.key_secret").chmod(0o600)
    assert "client.key holds no key" in refused(tcp, words)


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """A TCP port and a socket file that somebody uses."""
    path = tmp_path / "used.sock"
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix:
        tcp.bind(("127.0.0.1", 0))
        unix.bind(str(path))
        tcp.listen()
        unix.listen()
        yield tcp.getsockname()[1], path


def test_a_port_or_socket_in_use_is_refused_and_left_alone(refused: Refused, listening: tuple[int, Path]) -> None:
    port, path = listening
    words = with_keys(path.parent)
    assert "it is in use; end the other run or choose another port" in refused(f"wire.endpoint=tcp://:{port}", words)
    assert "is in use by another process" in refused(f"wire.endpoint=ipc://{path}")
    assert path.exists()


def test_a_recipe_that_reads_what_the_task_does_not_note_is_refused(refused: Refused) -> None:
    assert refused("recipe=ttrl").endswith(
        "reward.answer_note names 'answer', and this task notes nothing (Session.note, Session.note_turn)"
    )
