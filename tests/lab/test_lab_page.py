"""The page of a lab: every recipe's curves on the charts of the report, tables, failed cells; nothing is loaded."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from async_rl.config.schema import structured
from async_rl.instruments.lab.merit import merits
from async_rl.instruments.lab.page import page_text
from async_rl.instruments.lab.plan import LabPlan, LabSettings, make_plan
from async_rl.instruments.lab.record import STEP_CURVES, CellRecord, Curves, summarise, write_record

STEPS = 20


def tiny_plan(folder: Path) -> LabPlan:
    return make_plan(
        structured(
            LabSettings,
            {
                "name": "a </script> lab",
                "run": {"trainer": {"steps": STEPS}},
                "tasks": {"guess": {}},
                "recipes": {"grpo": {}, "vcpo": {}},
                "warm_ups": [str(folder)],
                "lags": [0, 4],
                "learning_rates": [1e-3, 2e-3],
                "seeds": [0, 1],
            },
            where="",
        )
    )


def written(plan: LabPlan, cells: Path) -> list[CellRecord]:
    """Records and curves whose rewards follow from recipe, lag and seed; the last cell failed."""
    records = []
    for cell in plan.cells:
        record = CellRecord(name=cell.name, **asdict(cell), digest="", seconds=1.0)
        level = 0.5 + 0.1 * (cell.recipe == "vcpo") - 0.02 * cell.lag + 0.01 * cell.seed
        steps: dict[str, list[float | None]] = {name: [level] * STEPS for name in STEP_CURVES}
        steps["ess"][3] = None
        curves = Curves(versions=list(range(STEPS)), rewards=[level] * STEPS, steps=steps)
        if cell is plan.cells[-1]:
            record = replace(record, failed="its worker was killed")
            write_record(cells / f"{cell.name}.json", record)
        else:
            record = replace(record, **summarise(curves, steps=STEPS, reward_first=0.1))
            write_record(cells / f"{cell.name}.json", record, curves)
        records.append(record)
    return records


def embedded(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_every_recipe_is_on_every_chart_with_its_spread_and_failed_cells_are_told(tmp_path: Path) -> None:
    for name in ("cells", "curves"):
        (tmp_path / name).mkdir()
    plan = tiny_plan(tmp_path / "model")
    records = written(plan, tmp_path / "cells")
    text = page_text(plan, tmp_path / "cells", records, merits(records))
    assert "<title>a &lt;/script&gt; lab" in text
    assert not re.search(r"(src|href)=\"https?:", text), "nothing is loaded"
    data = embedded(text)
    (task,) = data["tasks"]
    charts = {chart["title"]: chart for chart in task["charts"]}
    assert {"lag 0: reward", "lag 4: reward", "lag 4: gradient norm", "lag 0: final reward by learning rate"} <= set(
        charts
    )
    for chart in charts.values():
        for run in data["runs"]:
            (key,) = chart["keys"]
            assert run["curves"][key]["x"], f"{run['name']} on {chart['title']}"
    grpo = next(run["curves"] for run in data["runs"] if run["name"] == "grpo")
    by_lag = grpo["guess/final reward at the best learning rate"]
    assert (by_lag["x"], by_lag["y"]) == ([0, 4], [0.505, 0.425])
    assert by_lag["lo"][0] < by_lag["y"][0] < by_lag["hi"][0], "a band of one standard deviation over seeds"
    assert len(grpo["guess/lag 0: effective sample size"]["x"]) == STEPS - 1, "a skipped step is left out"
    assert [row[:2] for row in task["table"][1:]] == [["vcpo", "0"], ["grpo", "0"], ["vcpo", "4"], ["grpo", "4"]]
    assert data["failed"] == [[plan.cells[-1].name, "its worker was killed"]]
