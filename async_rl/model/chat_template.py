"""A chat template as code: compiled in the environment that transformers uses."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from async_rl.errors import UserError

CONTINUE = "continue_final_message"
"""argument that leaves the last message open, as in transformers"""
_END = "\U0010fffd"
"""marks the place where a message ends: no text has it"""


def compile_template(source: str, time: datetime) -> Any:
    """A chat template in the environment transformers uses: sandboxed, immutable, with `tojson`,
    `raise_exception`, `strftime_now` and `{% generation %}` blocks. `time`: what `strftime_now` writes.

    What a template draws at random is refused: the same prompt must be the same text in every process.
    """
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's words for training masks; here it only passes them."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def drawn(*_: Any, **__: Any) -> None:
        raise jinja2.TemplateError("it draws at random, so that its text differs from process to process")

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.filters["random"] = drawn
    environment.globals["lipsum"] = drawn
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = time.strftime
    return environment.from_string(source)


def left_open(messages: Sequence[Mapping[str, Any]], render: Callable[..., str]) -> str:
    """Chat messages up to the end of what the last one says, so that the model goes on with it. White space at its end
    stays where the template keeps it. `render`: `Tokenizer.render` with tools and arguments.

    Raises UserError when the last message is not the assistant's, or the template does not show its end.
    """
    said = messages[-1].get("content") if messages else None
    if not said or messages[-1].get("role") != "assistant":
        raise UserError(f"{CONTINUE}: the chat must end with a message of the assistant that says something")
    if isinstance(said, list):
        last = said[-1]
        more = last + _END + " " if isinstance(last, str) else {**last, "text": f"{last['text']}{_END} "}
        marked: Any = [*said[:-1], more]
    else:
        marked = f"{said}{_END} "
    whole = [*messages[:-1], {**messages[-1], "content": marked}]
    text, found, behind = render(whole, add_generation_prompt=False).rpartition(_END)
    if not found:
        raise UserError(f"{CONTINUE}: the chat template does not show the end of the last message")
    return text if behind.startswith(" ") else text.rstrip()  # a template that trims what was said
