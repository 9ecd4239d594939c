"""Generated tool calls, and the turns of models that make them."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from async_rl.task.tool_formats import FORMATS

NAMES = st.from_regex(r"[a-z_][a-z0-9_]{0,12}", fullmatch=True)
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12) | st.sampled_from(
    ["}", '"]}', "</tool", "</think>x"[1:], "a\nb", "\\", "[ARGS]"[1:], "<|call", "é", "12", "true", "null", ";"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1000, 1000) | st.floats(-10, 10) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
ARGUMENTS = st.dictionaries(NAMES, VALUES, max_size=4)


def several(name: str, calls: list[tuple[str, dict[str, Any]]], between: str) -> str:
    """The turn of a model that makes these calls."""
    written = [FORMATS[name].write(tool, json.dumps(arguments)) for tool, arguments in calls]
    if name == "mistral":
        listed = [{"name": tool, "arguments": arguments} for tool, arguments in calls]
        return "[TOOL_CALLS]" + json.dumps(listed)
    if name == "llama":
        return ("; " + between).join(written)
    if name == "deepseek":
        begin, end = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
        return begin + between.join(w.removeprefix(begin).removesuffix(end) for w in written) + end
    if name == "harmony":
        return "<|start|>assistant".join(written)
    return between.join(written)


def described(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    kinds = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
    properties = {key: {"type": kinds.get(type(value), "null")} for key, value in arguments.items()}
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}
