"""The page of a run in a real browser: it opens, draws, searches and toggles, and says nothing in the console.

Skipped where there is no browser: `pip install playwright` and a Chromium (Debian: apt install chromium).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support_story import Story

from async_rl.events import AlarmRaised, ProcessFailed, RunRolledBack
from async_rl.observe.report import write_report

sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright to test the page")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt install chromium)")

INK = """node => { const c = node.querySelector('canvas');
  const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
  let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n; }"""
"""pixels of a chart's canvas that are drawn on"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """A function that makes the page of runs and opens it. At the end: no complaint, no request was made."""
    said: list[str] = []
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    page = context.new_page()
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(("file:", "data:")) else said.append(request.url))

    def opened(*runs: Path) -> Any:
        write_report(runs, tmp_path / "page.html", with_ratios=False)
        page.goto((tmp_path / "page.html").as_uri())
        page.wait_for_selector("html[data-ready]")
        return page

    yield opened
    context.close()
    assert said == []


def test_every_chart_is_drawn_as_it_comes_into_view(open_page: Any, tmp_path: Path, tiny_model: Path) -> None:
    page = open_page(Story(path=tmp_path / "run", model=tiny_model, steps=30).write().path)
    page.eval_on_selector("details.more", "node => node.open = true")
    cards = page.query_selector_all("article.chart")
    assert len(cards) > 15
    for card in cards:
        card.scroll_into_view_if_needed()
        page.wait_for_function("node => node.dataset.drawn", arg=card)
        assert card.evaluate(INK) > 500, card.get_attribute("data-title")
    for lanes in page.query_selector_all("article.timeline"):
        assert lanes.evaluate(INK) > 5000
    assert page.locator("article.histogram rect").count() > 5


def test_a_click_on_a_name_hides_its_curve(open_page: Any, tmp_path: Path, tiny_model: Path) -> None:
    page = open_page(Story(path=tmp_path / "run", model=tiny_model, steps=30).write().path)
    card = page.locator("article.chart[data-title=Reward]")
    assert card.get_attribute("data-drawn") == "2"
    card.locator("button[data-key='reward/eval']").click()
    assert card.get_attribute("data-drawn") == "1"
    assert card.locator("button[data-key='reward/eval']").get_attribute("aria-pressed") == "false"


def test_search_finds_trajectories_by_their_text(open_page: Any, tmp_path: Path, tiny_model: Path) -> None:
    page = open_page(Story(path=tmp_path / "run", model=tiny_model, steps=30).write().path)
    everything = page.locator("#sample-list .item").count()
    assert everything > 10
    first = page.locator("#sample-list .snippet").first.inner_text()
    page.fill("#sample-search", first[:3])
    found = page.locator("#sample-list .snippet").all_inner_texts()
    assert 0 < len(found) < everything
    assert all(first[:3] in text for text in found)
    assert page.locator("#sample-view mark").count() > 0
    page.fill("#sample-search", "no such text")
    assert page.locator("#sample-list .item").count() == 0
    page.fill("#settings-search", "max_staleness")
    assert page.locator("#settings-table tbody tr:visible").count() in (1, 2, 3)


def test_tokens_are_coloured_by_what_is_chosen(open_page: Any, tmp_path: Path, tiny_model: Path) -> None:
    page = open_page(Story(path=tmp_path / "run", model=tiny_model, steps=30).write().path)
    page.locator("#sample-list .item").nth(20).click()
    colours = {}
    for mode in ("version", "log-prob", "plain"):
        page.locator("#modes button", has_text=mode).click()
        colours[mode] = page.locator("#sample-view .tok").evaluate_all("nodes => nodes.map(n => n.style.background)")
    assert len(set(colours["version"])) == 2, "two versions sampled it"
    assert set(colours["plain"]) == {"transparent"}
    assert colours["version"] != colours["log-prob"]
    assert page.locator("#sample-view .turn").all_inner_texts() == ["turn 1", "turn 2"]
    page.locator("#sample-view .tok").first.hover()
    assert "version" in page.inner_text("#tip")


def test_runs_side_by_side_can_be_hidden_and_show_what_differs(
    open_page: Any, tmp_path: Path, tiny_model: Path
) -> None:
    runs = [
        Story(path=tmp_path / f"run{i}", model=tiny_model, steps=30, seed=i, overrides=(f"seed={i}",)).write().path
        for i in range(2)
    ]
    page = open_page(*runs)
    card = page.locator("article.chart[data-title=Entropy]")
    assert card.get_attribute("data-drawn") == "2"
    page.locator("#runs .chip").first.click()
    assert card.get_attribute("data-drawn") == "1"
    assert page.locator("#settings-table tbody tr:visible td:first-child").all_inner_texts() == ["seed"]
    page.locator("#differing").click()
    assert page.locator("#settings-table tbody tr:visible").count() > 40
    page.locator("#axis button", has_text="time").click()
    assert card.get_attribute("data-drawn") == "1"


def test_markup_in_a_trajectory_or_a_message_stays_text(open_page: Any, tmp_path: Path, tiny_model: Path) -> None:
    folder = Story(path=tmp_path / "run", model=tiny_model, steps=3).write(summary=False)
    evil = "</script><script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">"
    folder.record(ProcessFailed(process=evil, message=evil), time=1_700_000_001.0)
    page = open_page(folder.path)
    assert "hacked" not in page.title()
    assert evil in page.inner_text("#events-table")
    assert page.locator("img").count() == 0


def test_a_run_without_a_step_has_a_page(open_page: Any, tmp_path: Path, tiny_model: Path) -> None:
    folder = Story(path=tmp_path / "run", model=tiny_model, steps=3).write(summary=False)
    for file in (folder.metrics, folder.events, folder.store):
        file.unlink()
    page = open_page(folder.path)
    assert "No step was trained yet." in page.inner_text("#overview")


def test_alarms_and_the_return_are_lines_on_every_curve(open_page: Any, tmp_path: Path, tiny_model: Path) -> None:
    folder = Story(path=tmp_path / "run", model=tiny_model, steps=30).write()
    folder.record(AlarmRaised(signal="ess", step=9, since=4, reason="<b>low</b>"), time=1.7e9 + 8)
    back = RunRolledBack(version=10, to=4, since=4, lr_scale=1.0, reason="low", text="at step 9 to version 4")
    folder.record(back, time=1.7e9 + 9)
    page = open_page(folder.path)
    card = page.locator("article.chart[data-title=Reward]")
    card.scroll_into_view_if_needed()
    page.wait_for_function("node => node.dataset.drawn", arg=card.element_handle())
    assert card.get_attribute("data-incidents") == "2"
    assert "step 9, alarm ess: <b>low</b>" in page.locator("#overview").inner_text()
    page.locator("#axis button", has_text="time").click()
    page.wait_for_function("node => node.dataset.incidents === '2'", arg=card.element_handle())
