"""The first stage of A*-PO: values of problems under the first model, written as a column and noted from there."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from support_models import qwen3_folder
from support_run import quick_settings

from async_rl.cli.main import main
from async_rl.run.values import value
from async_rl.task import make_task


def test_the_value_is_the_published_one() -> None:
    rewards = [1.0, 1.0, *[0.0] * 6]
    assert value(rewards, 0.5) == pytest.approx(0.477229, abs=1e-6)
    assert value(rewards, 0.5) == pytest.approx(0.5 * math.log(sum(math.exp(r / 0.5) for r in rewards) / 8))
    assert value([1000.0, 0.0], 0.1) == pytest.approx(1000 - 0.1 * math.log(2))


def test_the_command_writes_the_rows_with_a_column_that_the_task_notes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1), "source": "sums", "deep": {"x": i}} for i in range(12)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config, out = tmp_path / "config.yaml", tmp_path / "valued.jsonl"
    model = qwen3_folder(tmp_path / "model")
    config.write_text(
        f"model: {{path: {model}}}\nrecipe: grpo\ngenerator: {{max_context: 64}}\n"
        f"task: {{name: dataset, args: {{path: {data}, max_tokens: 2, eval_share: 0.2, as_chat: false}}}}\n"
    )
    words = ["values", str(config), "--out", str(out), "--samples", "2"]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0, capsys.readouterr().err
    found = [json.loads(line) for line in out.read_text().splitlines()]
    without = [{name: v for name, v in row.items() if name != "v_star"} for row in found]
    assert sorted(without, key=lambda row: row["prompt"]) == sorted(rows, key=lambda row: str(row["prompt"]))
    possible = (0.0, value([1.0, 0.0], 0.5), 1.0)
    train = make_task("dataset", {"path": str(out), "note_fields": ["v_star"], "eval_share": 0.2}).problems("train")
    valued = [row for row in found if "v_star" in row]
    assert len(valued) == len(train)  # the same rows are held out of the new file
    assert all(any(math.isclose(row["v_star"], p, abs_tol=1e-9) for p in possible) for row in valued)
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "which exists; name another file" in capsys.readouterr().err


def test_a_task_without_rows_is_refused(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    from async_rl.config.schema import to_yaml

    config.write_text(to_yaml(quick_settings(tiny_model)))
    with pytest.raises(SystemExit):
        main(["values", str(config), "--out", str(tmp_path / "x.jsonl")])
    assert "it must be a data set" in capsys.readouterr().err
