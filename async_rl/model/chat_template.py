"""A chat template as code: compiled in the environment that transformers uses."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any


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
