"""What a metric is to the glossary (`Metric`); metrics that are explained together are a `Section`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Metric:
    """One key of a metric row. Example: `Metric("lag/max", "steps", "largest v − v_t")`."""

    key: str
    """may be a pattern: `reject/<reason>/tokens`"""
    unit: str
    """empty: it has none"""
    meaning: str
    """Markdown, in the symbols of `INTRODUCTION`"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Metrics that are explained together."""

    title: str
    before: str = ""
    """Markdown between the title and the table"""
    metrics: tuple[Metric, ...]
    after: str = ""
    """Markdown behind the table"""
