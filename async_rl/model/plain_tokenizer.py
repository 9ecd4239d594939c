"""Compares our tokenizer with that of transformers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any

from async_rl.errors import UserError
from async_rl.model.tokenizer import HasPrompt, Tokenizer, adapted, problem_text

SHOWN = 30
"""characters of a text that a difference quotes"""


def installed() -> bool:
    """Whether transformers is there to compare with."""
    return find_spec("transformers") is not None


def first_difference(problems: Iterable[HasPrompt], tokenizer: Tokenizer) -> str:
    """In what the prompts of these problems differ from what transformers makes of them; empty where in nothing.

    Tokens are compared for every prompt; the text of the chat template where messages are plain ones, and where it
    writes no date. Raises UserError when transformers cannot load the tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(str(tokenizer.folder))
    except Exception as error:  # code of others
        raise UserError(f"{tokenizer.folder}: transformers cannot load the tokenizer: {error}") from None
    for problem in problems:
        text = problem_text(problem, tokenizer)
        if said := _rendered_otherwise(problem, text, tokenizer, theirs):
            return said
        ids, plain = tokenizer.encode(text), list(theirs(text, add_special_tokens=False)["input_ids"])
        if ids != plain:
            at = _place(ids, plain)
            before = tokenizer.decode(ids[:at], special=True)[-SHOWN:]
            return f"behind {before!r} it has the tokens {ids[at : at + 3]}, transformers {plain[at : at + 3]}"
    return ""


def _rendered_otherwise(problem: HasPrompt, text: str, tokenizer: Tokenizer, theirs: object) -> str:
    problem = adapted(problem, tokenizer)
    if isinstance(problem.prompt, str) or not tokenizer.has_chat_template or tokenizer.dated or problem.template_args:
        return ""
    if any(not isinstance(m.get("content"), str) or m.get("tool_calls") for m in problem.prompt):
        return ""
    plain = theirs.apply_chat_template(  # type: ignore[attr-defined]
        [dict(m) for m in problem.prompt],
        tools=[dict(tool) for tool in problem.tools] or None,
        tokenize=False,
        add_generation_prompt=True,
    )
    if plain == text:
        return ""
    at = _place(text, plain)
    return f"the chat template writes {text[at : at + SHOWN]!r}, by transformers {plain[at : at + SHOWN]!r}"


def _place(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Where two sequences differ first; their end where one goes on behind the other's."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
