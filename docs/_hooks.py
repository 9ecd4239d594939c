"""What the site has besides its pages: a reference made from the code, formulas as MathML, checked messages.

mkdocs calls the functions `on_*` (see `hooks` in mkdocs.yml). Everything is read from the package that is installed
beside mkdocs, so a page of the reference cannot say anything else than the program.
"""

from __future__ import annotations

import ast
import dataclasses
import html
import importlib.util
import inspect
import logging
import os
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import async_rl

log = logging.getLogger("mkdocs.hooks.async_rl")
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
PACKAGE = Path(async_rl.__file__).parent
SHORTEST_PIECE = 12
"""characters of a quoted message that are looked for in the code; shorter pieces between two `…` say nothing"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for path, make in PAGES.items():
        files.append(File.generated(config, path, content=make()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Check that the messages quoted in the page of troubleshooting are messages of the program."""
    if page.file.src_uri == "troubleshooting.md":
        known = texts_of(PACKAGE)
        for message in re.findall(r"^### `(.+)`", markdown, flags=re.MULTILINE):
            for piece in re.split("…", message):
                if len(piece.strip()) >= SHORTEST_PIECE and piece.strip() not in known:
                    log.warning("troubleshooting.md quotes %r, which the program does not print", piece.strip())
    return markdown


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas, as pymdownx.arithmatex marks them, become MathML."""

    def inline(found: re.Match[str]) -> str:
        return f'<span class="arithmatex">{mathml(found[1], display="inline")}</span>'

    def block(found: re.Match[str]) -> str:
        return f'<div class="arithmatex">{mathml(found[1], display="block")}</div>'

    content = re.sub(r'<span class="arithmatex">\\\((.+?)\\\)</span>', inline, content, flags=re.DOTALL)
    return re.sub(r'<div class="arithmatex">\s*\\\[(.+?)\\\]\s*</div>', block, content, flags=re.DOTALL)


def mathml(latex: str, *, display: Literal["inline", "block"]) -> str:
    """The formula as MathML, with the space behind a function's name that the converter leaves out."""
    made = str(convert(html.unescape(latex).strip(), display=display))
    return re.sub(r"<mi>(log|exp)</mi>", r'\g<0><mspace width="0.17em" />', made)


# -------------------- pages of the reference


def settings_page() -> str:
    """Every setting of a run, group by group."""
    from async_rl.config import Settings

    lines = [
        "# Settings",
        "",
        "A YAML file holds them, words on the command line (`name=value`) are laid over it, and "
        "`async-rl config CONFIG` prints every one as it stands. What a setting cannot be is refused before anything "
        "starts.",
        "",
    ]
    plain = [f for f in dataclasses.fields(Settings) if group_of(Settings, f) is None]
    lines += table(Settings, plain, "")
    for field in dataclasses.fields(Settings):
        group = group_of(Settings, field)
        if group is None:
            continue
        lines += [f"## {field.name}.* {{#{field.name}}}", ""]
        if summary := own_docstring(group):
            lines += [summary, ""]
        lines += table(group, dataclasses.fields(group), f"{field.name}.")
    return "\n".join(lines)


def tasks_page() -> str:
    """The tasks that come with the package, and their settings."""
    from async_rl.task.build import TASKS

    lines = [
        "# Tasks and rewards",
        "",
        "`task.name` chooses one, `task.args.*` are its settings. A task of your own: "
        "[own environment](../tutorial/own_environment.md). Rewards of the tasks that read a data set are `exact`, "
        "`numeric`, `math` or a function of your own: [rewards](../howto/rewards.md).",
        "",
    ]
    for name, task in sorted(TASKS.items()):
        settings = task.Settings
        if name == "rehearsed":
            continue  # made by --fake-model only
        lines += [f"## {name} {{#{name}}}", "", own_docstring(task) or own_docstring(settings), ""]
        lines += table(settings, dataclasses.fields(settings), "task.args.")
    return "\n".join(lines)


def recipes_page() -> str:
    """Every axis of the objective, and every recipe as it is stored."""
    from async_rl.objective.library import FOLDER, list_recipes
    from async_rl.objective.recipe import Recipe

    lines = [
        "# Recipes",
        "",
        "A recipe is one choice on every axis of the objective. `recipe=NAME` takes one, `recipe.AXIS=VALUE` changes "
        "it, `async-rl recipes NAME` explains each choice. Formulas and sources: "
        "[algorithms](../algorithms.md#recipes).",
        "",
        "## Those that come with the package {#list}",
        "",
    ]
    for name, summary in list_recipes().items():
        text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").strip()
        lines += [f"### {name} {{#{name}}}", "", escaped(summary), "", "```yaml", text, "```", ""]
    lines += ["## The axes {#axes}", ""]
    plain = [f for f in dataclasses.fields(Recipe) if group_of(Recipe, f) is None]
    lines += table(Recipe, plain, "recipe.")
    for field in dataclasses.fields(Recipe):
        group = group_of(Recipe, field)
        if group is None:
            continue
        lines += [f"### recipe.{field.name}.* {{#axis-{field.name}}}", ""]
        if summary := own_docstring(group):
            lines += [summary, ""]
        lines += table(group, dataclasses.fields(group), f"recipe.{field.name}.")
    return "\n".join(lines)


def methods_page() -> str:
    """Published methods, what of them is here and what is not."""
    from async_rl.objective.methods import counts, list_methods

    lines = [
        "# Methods",
        "",
        "Published methods, and what of them is here. *Works*: the published formula is a recipe, the tests compare "
        "its coefficients with the gradient of the published loss, and it was trained (bench/METHODS.md). Core and "
        "strong are the tiers of the project's plan. `async-rl recipes` prints the same.",
        "",
        *(f"- {tier}: {said}" for tier, said in counts().items()),
        "",
        "| method | tier | paper | state | recipes | here | not here |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in list_methods():
        paper = f"[{method.paper}](https://arxiv.org/abs/{method.paper})" if method.paper else ""
        recipes = ", ".join(f"[{name}](recipes.md#{name})" for name in method.recipes)
        row = (method.name, method.tier, paper, method.state, recipes, escaped(method.here), escaped(method.missing))
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def commands_page() -> str:
    """The help of every command, as it prints it, in the groups of the overview."""
    from async_rl.cli.main import make_parser

    _, commands = make_parser()
    width, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), "100"
    try:
        helps = {name: command.format_help().strip() for name, command in commands.subparsers.choices.items()}
    finally:
        os.environ.pop("COLUMNS") if width is None else os.environ.update(COLUMNS=width)
    lines = [
        "# Commands",
        "",
        "As each prints it with `--help`. Exit codes: 0 done; 1 a run failed, with its first cause; 2 a wrong setting "
        "or file, with the remedy; 130 stopped by Ctrl-C, 143 by SIGTERM, 129 by "
        "SIGHUP, 138 by SIGUSR1.",
        "",
    ]
    for title, entries in commands.groups.items():
        lines += [f"## {title.capitalize()} {{#group-{title}}}", ""]
        for entry in entries:
            lines += [f"### async-rl {entry.name} {{#{entry.name}}}", "", "```", helps[entry.name], "```", ""]
    return "\n".join(lines)


def events_page() -> str:
    """Every event of `events.jsonl`."""
    from async_rl.events import describe_events

    lines = [
        "# Events",
        "",
        "What happened in a run, one JSON row each in `events.jsonl`: `event` (the name below), `time` (seconds since "
        "1970) and the fields of the event. From Python: `ar.Run(path).events`.",
        "",
    ]
    for event in describe_events():
        lines += [f"## {event.name} {{#{event.name}}}", "", escaped(event.meaning), ""]
        rows = [f"| `{key}` | `{kind}` | {escaped(meaning)} |" for key, kind, meaning in event.fields]
        lines += ["| field | type | meaning |", "|---|---|---|", *rows, ""] if rows else []
    return "\n".join(lines)


API: dict[str, tuple[str, ...]] = {
    "Train and evaluate": ("train", "evaluate", "init_model"),
    "What a run has left": ("Run", "Rows", "Evaluation", "Trajectory", "Turn"),
    "An environment of your own": ("Task", "Problem", "Session", "Sample", "Segment"),
    "An algorithm of your own": ("RecipeFunction", "needs_columns", "Columns", "Coefficients", "ObjectiveState"),
    "Errors": ("UserError", "RunFailed"),
}
"""heading -> public names below it; every name of the package is here or in ELSEWHERE"""
ELSEWHERE = {"Settings": "settings.md", "Recipe": "recipes.md#axes", "__version__": ""}
"""public name -> the page that describes it"""


def api_page() -> str:
    """The public names of the package, from their source: signature, docstring, public members."""
    described = {name for names in API.values() for name in names}
    if missing := set(async_rl.__all__) - described - set(ELSEWHERE):
        log.warning("reference/api.md leaves out the public names %s", ", ".join(sorted(missing)))
    lines = ["# Python", "", "```python", "import async_rl as ar", "```", ""]
    for heading, names in API.items():
        lines += [f"## {heading}", ""]
        for name in names:
            lines += described_name(name)
    linked = ", ".join(f"[`ar.{name}`]({page})" for name, page in ELSEWHERE.items() if page)
    return "\n".join([*lines, "## Described elsewhere", "", f"{linked}; `ar.__version__` is the version, as text.", ""])


def described_name(name: str) -> list[str]:
    node, source = definition("async_rl", name)
    lines = [f"### ar.{name} {{#{name}}}", ""]
    if isinstance(node, ast.ClassDef):
        return [*lines, *docstring_lines(node), *field_lines(node, source), *method_lines(node)]
    return lines + signature_lines(node, "ar") + docstring_lines(node)


def field_lines(node: ast.ClassDef, source: Sequence[str]) -> list[str]:
    """The public fields of a class as a table, each with its shape and the text below it."""
    rows = []
    for field, below in zip(node.body, [*node.body[1:], None], strict=True):
        match field:
            case ast.AnnAssign(target=ast.Name(id=name)) if not name.startswith("_"):
                shape = re.search(r"#\s*(\[.*)$", source[field.lineno - 1])
                kind = escaped(f"`{ast.unparse(field.annotation)}`" + (f" {shape[1]}" if shape else ""))
                rows.append(f"| `{name}` | {kind} | {escaped(text_of(below))} |")
    return ["| field | type | meaning |", "|---|---|---|", *rows, ""] if rows else []


def method_lines(node: ast.ClassDef) -> list[str]:
    """The public methods and properties of a class."""
    lines = []
    for method in node.body:
        if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef) and not method.name.startswith("_"):
            lines += [f"#### {node.name}.{method.name} {{#{node.name}.{method.name}}}", ""]
            lines += signature_lines(method, node.name) + docstring_lines(method)
    return lines


def definition(module: str, name: str) -> tuple[Definition, Sequence[str]]:
    """The definition of a name, followed through the modules that import it, and the lines of its file."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef() if node.name == name:
                return node, source.splitlines()
            case ast.ImportFrom(module=str(origin)) if any(alias.name == name for alias in node.names):
                return definition(origin, name)
    raise AssertionError(f"{module} has no {name}")


def signature_lines(node: ast.FunctionDef | ast.AsyncFunctionDef, owner: str) -> list[str]:
    """A call as one writes it, or the value of a property."""
    returns = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    if any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list):
        return ["```python", f"{owner}.{node.name}{returns}", "```", ""]
    arguments = ast.unparse(node.args).removeprefix("self").removeprefix("cls").removeprefix(", ")
    wait = "await " if isinstance(node, ast.AsyncFunctionDef) else ""
    parts = split_arguments(arguments)
    call = f"{wait}{owner}.{node.name}({', '.join(parts)}){returns}"
    if len(call) > 100:
        call = f"{wait}{owner}.{node.name}(\n    " + ",\n    ".join(parts) + f",\n){returns}"
    return ["```python", call, "```", ""]


def split_arguments(text: str) -> list[str]:
    """Arguments one by one, with spaces around a default; commas inside brackets do not part them."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[({") - (character in "])}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [re.sub(r"^(\w+: [^=]+)=", r"\1 = ", part.strip()) for part in parts]


def docstring_lines(node: Definition) -> list[str]:
    """A docstring as Markdown: sections `Args:` and `Raises:` become lists, `Example:` becomes code."""
    text, _, example = (ast.get_docstring(node) or "").partition("\nExample:\n")
    lines: list[str] = []
    for block in text.strip().split("\n\n"):
        first, _, rest = block.partition("\n")
        if first in ("Args:", "Raises:", "Returns:"):
            items = re.split(r"\n(?=\S)", inspect.cleandoc("\n" + rest))
            lines += [f"**{first.rstrip(':')}**", "", *(argument_line(item) for item in items), ""]
        elif block:
            lines += [" ".join(line.strip() for line in block.splitlines()), ""]
    if example:
        code = re.sub(r" *# doctest: \+\w+", "", inspect.cleandoc("\n" + example))
        lines += ["```python", code, "```", ""]
    return lines


def argument_line(text: str) -> str:
    """Example: "name: what it is" -> "- `name`: what it is"."""
    name, colon, meaning = " ".join(text.split()).partition(": ")
    return f"- `{name}`: {meaning}" if colon else f"- {name}"


def text_of(node: ast.stmt | None) -> str:
    """The text of a statement that is nothing else."""
    match node:
        case ast.Expr(value=ast.Constant(value=str(text))):
            return text
        case _:
            return ""


PAGES: dict[str, Callable[[], str]] = {
    "reference/settings.md": settings_page,
    "reference/tasks.md": tasks_page,
    "reference/recipes.md": recipes_page,
    "reference/methods.md": methods_page,
    "reference/commands.md": commands_page,
    "reference/events.md": events_page,
    "reference/api.md": api_page,
}
"""generated page -> what makes it"""

# -------------------- what they share


def table(cls: type, fields: Sequence[dataclasses.Field[Any]], prefix: str) -> list[str]:
    """A Markdown table of settings: name, default, unit, meaning with choices and bounds."""
    hints = typing.get_type_hints(cls)
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for field in fields:
        unit = f" {field.metadata['unit']}" if field.metadata.get("unit") else ""
        allowed = allowed_values(hints[field.name], field)
        meaning = escaped(field.metadata.get("meaning", "")) + (f" *({allowed})*" if allowed else "")
        rows.append(f"| `{prefix}{field.name}` | {shown(default_of(field))}{unit} | {meaning} |")
    return [*rows, ""] if len(rows) > 2 else []


def default_of(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def shown(value: Any) -> str:
    if value in ("", [], {}):
        return "-"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def allowed_values(hint: Any, field: dataclasses.Field[Any]) -> str:
    """Choices of a setting, or the bounds of its number; empty where there are none."""
    if typing.get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(hint))
    return bounds_of(field)


def bounds_of(field: dataclasses.Field[Any]) -> str:
    """The bounds of a number in words. Example: "at least 1, at most 1,000,000"."""
    bounds = field.metadata.get("bounds")
    said = {"min": "at least", "above": "above", "below": "below", "max": "at most"}
    values = {name: getattr(bounds, name, None) for name in said}
    return ", ".join(f"{said[name]} {value:,}" for name, value in values.items() if value is not None)


def group_of(cls: type, field: dataclasses.Field[Any]) -> type | None:
    """The dataclass of a field that holds a group of settings."""
    hint = typing.get_type_hints(cls)[field.name]
    return hint if dataclasses.is_dataclass(hint) and isinstance(hint, type) else None


def own_docstring(thing: object) -> str:
    """The docstring that somebody wrote, not the one that dataclasses make."""
    text = getattr(thing, "__doc__", None) or ""
    name = getattr(thing, "__name__", "")
    return "" if text.startswith(f"{name}(") else escaped(inspect.cleandoc(text).split("\n\n")[0])


def escaped(text: str) -> str:
    """Plain text as Markdown, in one line; what stands in backticks stays as it is, but for the bars of a table."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(
        part.replace("|", "\\|") if number % 2 else html.escape(re.sub(r"([|*_\[\]$#])", r"\\\1", part), quote=False)
        for number, part in enumerate(parts)
    )


def texts_of(package: Path) -> str:
    """Every piece of text in the package's code, adjacent literals joined, one after the other."""
    return "\n".join(piece for path in sorted(package.rglob("*.py")) for piece in literals(path))


def literals(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
