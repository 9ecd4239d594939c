"""Published methods, what of them is here and what is not (methods.yaml); shown by `async-rl recipes` and the docs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

import msgspec
import yaml

Tier = Literal["core", "strong", "nice"]
State = Literal["works", "part", "no"]
FILE = Path(__file__).parent / "methods.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One published method."""

    name: str
    tier: Tier
    """of the project's plan: core and strong are those that must be there"""
    paper: str
    """arXiv number; empty where there is none"""
    state: State
    recipes: tuple[str, ...]
    """of the library"""
    here: str = ""
    missing: str = ""


@lru_cache(maxsize=1)
def list_methods() -> tuple[Method, ...]:
    """All of them, in the order of the file."""
    return tuple(msgspec.convert(yaml.safe_load(FILE.read_text(encoding="utf-8")), list[Method]))


def counts() -> dict[str, str]:
    """Tier -> "19 of 46 work, 13 in part"."""
    found = {}
    for tier in get_args(Tier):
        own = [method.state for method in list_methods() if method.tier == tier]
        found[tier] = f"{own.count('works')} of {len(own)} work, {own.count('part')} in part"
    return found


def describe_methods() -> list[str]:
    """A line for each, for the terminal: state, name, paper, recipes, what is here and what is not."""
    lines = [f"{tier}: {said}" for tier, said in counts().items()]
    width = max(len(method.name) for method in list_methods())
    for method in list_methods():
        said = [f"here: {method.here}" if method.here else "", f"not here: {method.missing}" if method.missing else ""]
        recipes = ", ".join(method.recipes)
        rest = "; ".join(part for part in (recipes, *said) if part)
        lines.append(f"{method.state:<5}  {method.tier:<6}  {method.name:<{width}}  {method.paper or '-':<10}  {rest}")
    return lines
