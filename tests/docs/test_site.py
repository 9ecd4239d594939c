"""The documentation: it builds with strict links, and what code and pages cite is there."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CITING = ("async_rl", "kernels", "tests", "bench", "configs", "examples", ".github")
"""folders whose files may cite pages; so may the pages of the repository's root"""
CITED = re.compile(r"\b((?:docs|bench)/[\w/]+\.md|(?:README|CONTRIBUTING|CHANGELOG)\.md)(?:#([\w-]+(?:\.[\w-]+)*))?")
GONE = re.compile(r"(?<!bench/)\b(?:ALGORITHMS|DESIGN|METHODS|RECIPES|FACTS|FIELD|HOUSE)\.md\b")
"""notes that are not in the repository"""


@cache
def files() -> tuple[Path, ...]:
    inside = [p for folder in CITING for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".yaml", ".yml", ".md")]
    return (*sorted(inside), *sorted(ROOT.glob("*.md")), ROOT / "mkdocs.yml", *sorted((ROOT / "docs").rglob("*.md")))


def anchors(page: Path) -> set[str]:
    """Explicit ones, `## Heading {#anchor}`."""
    return set(re.findall(r"^#+ .*\{ ?#([\w.-]+) ?\}\s*$", page.read_text(), flags=re.MULTILINE))


def test_cited_pages_and_sections_are_there() -> None:
    missing = []
    for file in files():
        if file == Path(__file__):
            continue
        for page, anchor in CITED.findall(file.read_text()):
            where = f"{file.relative_to(ROOT)} cites {page}" + (f"#{anchor}" if anchor else "")
            if not (ROOT / page).is_file():
                missing.append(f"{where}: no such page")
            elif anchor and anchor not in anchors(ROOT / page):
                missing.append(f"{where}: no such section")
    assert not missing, "\n".join(missing)


def test_notes_that_are_not_in_the_repository_are_not_cited() -> None:
    found = []
    for file in files():
        if file != Path(__file__):
            found += [f"{file.relative_to(ROOT)}: {note}" for note in GONE.findall(file.read_text())]
    assert not found, "\n".join(found)


def test_every_recipe_is_in_the_table_of_algorithms() -> None:
    page = (ROOT / "docs" / "algorithms.md").read_text()
    table = page.partition("{#recipes}")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", table))
    recipes = {path.stem for path in (ROOT / "async_rl" / "objective" / "recipes").glob("*.yaml")}
    assert recipes <= named, recipes - named


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with strict links."""
    for package in ("mkdocs", "material", "latex2mathml"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


def test_the_site_has_its_pages_and_formulas(site: Path) -> None:
    for page in ("index", "algorithms", "metrics", "reference/settings", "reference/api", "reference/commands"):
        assert (site / f"{page}.html").is_file(), page
    formulas = (site / "algorithms.html").read_text()
    assert formulas.count("<math") > 150
    assert r"\(" not in re.sub(r"<(code|pre).*?</\1>", "", formulas, flags=re.DOTALL)


def test_a_page_asks_nothing_of_other_hosts(site: Path) -> None:
    for page in site.rglob("*.html"):
        asked = re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"(https?:[^\"]+)\"", page.read_text())
        assert not asked, (page, asked)
