"""The page of a run: what is in it, that nothing of the data can break out of it, and that it stays small."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs
from support_run import quick_settings, train
from support_story import REFUSED, Story

from async_rl.buffer.store import Store
from async_rl.buffer.store_reader import StoreReader
from async_rl.errors import UserError
from async_rl.events import ProcessFailed
from async_rl.model.tokenizer import Tokenizer
from async_rl.observe.record import read_run
from async_rl.observe.report import MOST_LANES, by_lane, divided, page, report_data, write_report
from async_rl.observe.samples import pieces
from async_rl.observe.timeline import Span
from async_rl.trajectory import VersionSpan
from async_rl.trajectory.codec import unpack


def embedded(text: str) -> dict[str, Any]:
    """The data of a page, as a browser would read it."""
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert len(found) == 1
    data: dict[str, Any] = json.loads(found[0])
    return data


def test_the_page_holds_the_run(tmp_path: Path, tiny_model: Path) -> None:
    story = Story(path=tmp_path / "run", model=tiny_model, steps=20)
    write_report([story.write().path], tmp_path / "page.html")
    data = embedded((tmp_path / "page.html").read_text())
    (run,) = data["runs"]
    assert run["state"] == "finished"
    assert run["curves"]["reward/mean"]["x"] == list(range(20))
    assert max(run["curves"]["grad/norm"]["y"]) > 100
    assert run["curves"]["reward/eval"] == {"x": [0, 10, 20], "y": [0.1, 0.14, 0.18], "bad": 0}
    assert run["curves"]["tokens_per_s/trained"]["y"] == [128] * 19
    assert data["meanings"]["ess/ratio"].startswith("(Σ w)² / (U Σ w²)")
    assert run["refusals"] == [["zero signal", 20 // REFUSED]]
    assert run["rejects"] == [{"reason": "truncated", "tokens": 120, "trajectories": 40, "buckets": {"below_16": 40}}]
    assert ["trainer.steps", 20, "training steps (batches)", "steps"] in run["settings"]
    assert ["task.args.num_secrets", 8, "settings of that task; `async-rl config` prints them", ""] in run["settings"]


def test_histograms_count_what_the_store_holds(tmp_path: Path, tiny_model: Path) -> None:
    folder = Story(path=tmp_path / "run", model=tiny_model, steps=20, lag=3).write()
    survey = report_data([read_run(folder.path)])["runs"][0]["survey"]
    expected: dict[str, dict[int, int]] = {"oldest token": {}, "in the queue": {}, "in flight": {}}
    with StoreReader(folder.store) as store:
        for step in range(20):
            for t in map(unpack, store.load_batch(step) or []):
                for name, value in zip(
                    expected, (step - t.version_min, step - t.version_max, t.version_max - t.version_min), strict=True
                ):
                    expected[name][value] = expected[name].get(value, 0) + 1
    assert {name: dict(counts) for name, counts in survey["staleness"].items()} == expected
    assert dict(survey["lengths"]["trained"]) == {4: 20 * 4 * 2, 6: 20 * 4, 8: 20 * 4}
    assert dict(survey["refused_lengths"]["zero signal"]) == {4: 12, 6: 6, 8: 6}


def test_nothing_of_the_data_breaks_out_of_the_page(tmp_path: Path, tiny_model: Path) -> None:
    folder = Story(path=tmp_path / "<b>run<i>", model=tiny_model, steps=2, overrides=('name="<i>"',)).write()
    evil = "</script><script>alert(1)</script><!--<script>\u2028\ud800"
    folder.record(ProcessFailed(process="trainer", message=evil), time=1.0)
    text = page(report_data([read_run(folder.path)], with_ratios=False))
    assert embedded(text)["runs"][0]["events"][0][3].startswith("message </script><script>alert(1)")
    assert "alert(1)</script>" not in text
    assert "<!--" not in text
    assert text.count("<script") == text.count("</script>") == 2
    assert "<title>&lt;b&gt;run&lt;i&gt;" in text


def test_the_page_loads_nothing_from_anywhere(tmp_path: Path, tiny_model: Path) -> None:
    text = page(report_data([read_run(Story(path=tmp_path / "run", model=tiny_model, steps=2).write().path)]))
    assert "default-src 'none'" in text
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\(""", text)


def test_numbers_that_are_not_finite_are_counted_not_drawn(tmp_path: Path, tiny_model: Path) -> None:
    folder = Story(path=tmp_path / "run", model=tiny_model, steps=4).write()
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    rows[2]["grad/norm"], rows[3]["entropy"] = float("inf"), float("nan")
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves = embedded(page(report_data([read_run(folder.path)])))["runs"][0]["curves"]
    assert (curves["grad/norm"]["x"], curves["grad/norm"]["bad"]) == ([0, 1, 3], 1)
    assert (curves["entropy"]["x"], curves["entropy"]["bad"]) == ([0, 1, 2], 1)


@pytest.mark.parametrize("missing", ["metrics.jsonl", "events.jsonl", "trajectories.sqlite", "config.yaml"])
def test_a_run_that_lacks_a_file_has_a_page_all_the_same(missing: str, tmp_path: Path, tiny_model: Path) -> None:
    folder = Story(path=tmp_path / "run", model=tiny_model, steps=3).write(summary=False)
    (folder.path / missing).unlink()
    (run,) = embedded(page(report_data([read_run(folder.path)])))["runs"]
    assert run["name"] == "run"
    assert missing != "trajectories.sqlite" or any("there is no store here" in note for note in run["notes"])


def test_several_runs_stand_side_by_side(tmp_path: Path, tiny_model: Path) -> None:
    runs = [Story(path=tmp_path / f"run{i}", model=tiny_model, steps=3 + i, seed=i).write().path for i in range(3)]
    write_report(runs, tmp_path / "page.html", with_ratios=False)
    data = embedded((tmp_path / "page.html").read_text())
    assert [run["name"] for run in data["runs"]] == ["run0", "run1", "run2"]
    assert [len(run["curves"]["reward/mean"]["x"]) for run in data["runs"]] == [3, 4, 5]


def test_a_long_run_stays_small_and_keeps_its_spike(tmp_path: Path, tiny_model: Path) -> None:
    story = Story(path=tmp_path / "run", model=tiny_model, steps=5000, groups=1, size=1, spike_at=4321)
    text = page(report_data([read_run(story.write().path)], with_ratios=False))
    assert len(text) < 2_000_000
    curve = embedded(text)["runs"][0]["curves"]["grad/norm"]
    assert len(curve["y"]) <= 1200
    assert max(curve["hi"]) > 400
    assert max(curve["y"]) < 150


def test_ratios_are_those_of_the_checkpoint_to_the_policy_that_sampled(tmp_path: Path, tiny_model: Path) -> None:
    folder = train(quick_settings(tiny_model, "checkpoint.every=2"), tmp_path / "run")
    run = report_data([read_run(folder.path)])["runs"][0]
    exact = [s for s in run["samples"] if s["step"] is not None and s["step"] == s["ratio_version"]]
    row = json.loads(folder.metrics.read_text().splitlines()[2])
    assert {s["step"] for s in exact} == {2}
    ratios = [r for s in exact for r in s["ratio"] if r is not None]
    assert len(ratios) == sum(s["policy"] for s in exact) > 0
    # those the trainer saw in step 2: its largest and smallest bound them
    assert row["is/ratio_min"] - 1e-3 <= min(ratios) <= max(ratios) <= row["is/ratio_max"] + 1e-3
    assert any("Ratios are computed for this page" in note for note in run["sample_notes"])


def test_pieces_of_text_make_up_the_text(tiny_model: Path) -> None:
    tokenizer = Tokenizer(tiny_model)
    tokens = tokenizer.encode("?12<34>5=")
    assert "".join(pieces(tokenizer, tokens)) == "?12<34>5="
    assert len(pieces(tokenizer, tokens)) == len(tokens)
    assert pieces(None, [5, 17]) == ["5 ", "17 "]


def test_a_character_of_several_tokens_comes_with_its_last_one() -> None:
    class Bytes:
        """A tokenizer whose tokens are bytes."""

        def decode(self, ids: list[int], *, special: bool = False) -> str:
            return bytes(ids).decode(errors="replace")

    text = "aé漢b"
    found = pieces(Bytes(), list(text.encode()))  # type: ignore[arg-type]
    assert found == ["a", "", "é", "", "", "漢", "b"]


def test_a_long_trajectory_is_cut_in_the_middle(tmp_path: Path, tiny_model: Path) -> None:
    story = Story(path=tmp_path / "run", model=tiny_model, steps=1, groups=1, size=1)
    folder = story.write()
    folder.store.unlink()
    with Store(folder.store, durability="process", create=True) as store:
        t = story.trajectory(0, 0, 0, 0.0)
        long = np.resize(t.tokens[2:], 9000).astype(np.int32)
        values = {name: getattr(t, name) for name in type(t).__slots__}
        values |= {"tokens": np.concatenate([t.tokens[:2], long]), "versions": (), "turns": ()}
        values["log_behaviour"] = np.zeros(9002, np.float32)
        store.add_group(group=0, problem=0, split="train", admitted_version=0, admitted_at=0.0, generator="g")
        store.add_trajectories([type(t)(**values)])
        store.form_batch(step=0, groups=[0], formed_at=1.0)
        store.commit()
    (sample,) = report_data([read_run(folder.path)])["runs"][0]["samples"]
    assert sample["length"] == 9002
    assert len(sample["text"]) == len(sample["turn"]) == 1200
    assert sample["cut"] == 900


def test_contexts_and_agents_are_shown_where_they_begin_and_greedy_episodes_have_ratios(
    tmp_path: Path, tiny_model: Path
) -> None:
    folder = train(quick_settings(tiny_model, "checkpoint.every=2"), tmp_path / "run")
    with StoreReader(folder.store) as store:
        blobs = store.load_batch(0)
    assert blobs is not None
    whole = unpack(blobs[0])
    turn = whole.turns[0]
    n = turn.start + turn.length
    one = structs.replace(
        whole,
        tokens=whole.tokens[:n],
        log_behaviour=whole.log_behaviour[:n],
        turns=(turn,),
        versions=(VersionSpan(version=0, start=0, end=n),),
    )
    twice = structs.replace(
        one,
        group=999,
        tokens=np.concatenate([one.tokens, one.tokens]),
        log_behaviour=np.concatenate([one.log_behaviour, one.log_behaviour]),
        turns=(
            structs.replace(turn, agent="solver"),
            structs.replace(turn, start=n + turn.start, agent="critic", temperature=0.5),
        ),
        versions=(VersionSpan(version=0, start=0, end=2 * n),),
        contexts=(n,),
        split="eval",
        temperature=0.0,
    )
    greedy = structs.replace(one, group=999, sample=1, split="eval", temperature=0.0)
    assert twice.check() is None
    with Store(folder.store, durability="process", create=False) as store:
        store.add_group(group=999, problem=0, split="eval", admitted_version=0, admitted_at=0.0, generator="g")
        store.add_trajectories([twice, greedy])
        store.commit()
    data = report_data([read_run(folder.path)])["runs"][0]
    first, second = sorted((s for s in data["samples"] if s["group"] == 999), key=lambda s: s["sample"])
    assert (first["contexts"], first["context_at"]) == (2, [[n, 2]])
    assert [turn[3:] for turn in first["turns"]] == [["solver", None], ["critic", 0.5]]
    assert first["text"][:n] == first["text"][n:] == second["text"]
    assert (second["contexts"], second["context_at"]) == (1, [])
    # the same tokens behind the same prompt, at temperature 1 and at 0.5
    ratios = np.array([r for r in first["ratio"] if r is not None]).reshape(2, -1)
    assert ratios[0] == pytest.approx([r for r in second["ratio"] if r is not None], abs=1e-3)
    assert np.abs(ratios[0] - ratios[1]).max() > 0.01


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, tiny_model: Path) -> None:
    folder = Story(path=tmp_path / "run", model=tiny_model, steps=2).write()
    with pytest.raises(UserError, match="choose another --out"):
        write_report([folder.path], tmp_path / "no" / "such" / "page.html")


def test_of_a_thousand_generators_those_that_worked_least_have_a_lane() -> None:
    spans = [Span(lane=f"generator-{i}", doing="generating", start=0.0, end=100.0 - i % 97) for i in range(1000)]
    spans += [Span(lane=f"generator-{i}", doing="waiting", start=100.0 - i % 97, end=100.0) for i in range(1000)]
    spans += [Span(lane=name, doing="alive", start=0.0, end=1.0) for name in ("trainer", "trainer-rank-1", "buffer")]
    shown, rest = divided(by_lane(spans))
    generators = [name for name in shown if name.startswith("generator")]
    assert len(generators) == MOST_LANES
    assert len(rest) == 1000 - MOST_LANES
    assert {"trainer", "trainer-rank-1", "buffer"} <= set(shown)
    assert all(int(name.removeprefix("generator-")) % 97 >= 94 for name in generators)
    assert divided(by_lane(spans[:MOST_LANES])) == (sorted(s.lane for s in spans[:MOST_LANES]), [])
