"""What each metric means, out of docs/metrics.md: written once, there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

PAGE = Path(__file__).parent / "metrics.md"
"""a link to docs/metrics.md; in a wheel a copy"""
_ROW = re.compile(r"^\| `([^`]+)` \| (.*) \|$")


@cache
def meanings() -> Mapping[str, str]:
    """Key to definition as plain text, among them patterns such as `reject/<reason>/tokens`."""
    return MappingProxyType(parse(PAGE.read_text()))


def parse(text: str) -> dict[str, str]:
    """The definitions of a page: rows of tables whose first cell is one key in backticks."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        row = _ROW.match(line)
        if row:
            found[row[1]] = row[2].replace("\\|", "|").replace("`", "")
    return found


def meaning(key: str) -> str:
    """The definition of a metric; empty when the page has none."""
    known = meanings()
    if key in known:
        return known[key]
    for pattern, text in known.items():
        if "<" in pattern and re.fullmatch(re.sub(r"<\w+>", "[^/]+", pattern), key):
            return text
    return ""
