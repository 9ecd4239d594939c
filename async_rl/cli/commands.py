"""The commands of `async-rl` in titled groups: how each is declared, and the overview that lists them all."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from async_rl.errors import nearest

Work = Callable[[argparse.Namespace], int]
"""what a command does; returns the exit code"""

FILE: dict[str, str] = {"bash": "_shtab_compgen_files", "zsh": "_files"}
FOLDER: dict[str, str] = {"bash": "_shtab_compgen_dirs", "zsh": "_files -/"}
SETTING: dict[str, str] = {"bash": "_async_rl_settings", "zsh": "_async_rl_settings"}
"""what tab completion offers for an argument, as shtab reads it"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line of the overview."""

    name: str
    summary: str


class CommandParser(argparse.ArgumentParser):
    """argparse's parser of one command; a misspelt command or choice is told the nearest one."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            hint = nearest(str(value), map(str, action.choices or ()))
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}; {hint}") from error


@dataclass(slots=True)
class Commands:
    """The subparsers of `async-rl`. `group` opens a titled group, `add` declares a command in it."""

    parser: argparse.ArgumentParser
    subparsers: Any = field(init=False)
    groups: dict[str, list[Entry]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.subparsers = self.parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=CommandParser)

    def group(self, title: str) -> None:
        """Begin the group that the next commands belong to."""
        self.groups[title] = []

    def add(self, name: str, summary: str, *, about: str = "", example: str, work: Work) -> argparse.ArgumentParser:
        """Declare a command.

        `summary`: its line in the overview. `about`: what more `--help` says. `example`: a command line that works.
        """
        text = f"{summary[0].upper()}{summary[1:]}."
        command: argparse.ArgumentParser = self.subparsers.add_parser(
            name,
            help=summary,
            description="\n".join(textwrap.wrap(f"{text} {about}".strip(), 100)),
            epilog="example:\n" + textwrap.indent(example, "  "),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(work=work)
        list(self.groups.values())[-1].append(Entry(name=name, summary=summary))
        return command

    def overview(self) -> str:
        """Every command by group."""
        width = max(len(entry.name) for entries in self.groups.values() for entry in entries)
        lines = ["usage: async-rl COMMAND [...]", "", str(self.parser.description)]
        for title, entries in self.groups.items():
            lines += ["", title, *(f"  {entry.name:<{width}}  {entry.summary}" for entry in entries)]
        lines += [
            "",
            "async-rl COMMAND --help explains a command with an example, async-rl --version prints the version.",
            "To begin: async-rl new demo",
        ]
        return "\n".join(lines) + "\n"


def add_config(command: argparse.ArgumentParser, *, nargs: str | None = None, help: str = "") -> None:
    """The arguments `CONFIG [NAME=VALUE ...]` that most commands take."""
    kind = Path if nargs is None else str  # where it may be left out, a setting may stand in its place
    config = command.add_argument(
        "config", type=kind, nargs=nargs, metavar="CONFIG", help=help or "YAML file of settings"
    )
    overrides = command.add_argument(
        "overrides", nargs="*", metavar="NAME=VALUE", help="settings laid over the file, e.g. trainer.steps=100"
    )
    complete(config, FILE)
    complete(overrides, SETTING)


def add_run(command: argparse.ArgumentParser, help: str = "folder of the run") -> None:
    """The argument `RUN`."""
    complete(command.add_argument("run", type=Path, metavar="RUN", help=help), FOLDER)


def complete(action: argparse.Action, kind: dict[str, str]) -> None:
    """Tell tab completion what `action` takes."""
    action.complete = kind  # type: ignore[attr-defined]


def completion_script(parser: argparse.ArgumentParser, shell: str, settings: Sequence[str]) -> str:
    """The script that makes `shell` (bash or zsh) complete `async-rl`, names of settings included."""
    import shtab

    names = " ".join(f"{name}=" for name in settings)
    if shell == "zsh":
        preamble = f"_async_rl_settings() {{ compadd -S '' -- {names} }}"
        return str(shtab.complete(parser, shell, preamble=preamble))
    preamble = f'_async_rl_settings() {{ compgen -W "{names}" -- "$1"; }}'
    script = str(shtab.complete(parser, shell, preamble=preamble))
    # behind name= the value follows at once, without a space
    return script + (
        "\n_async_rl() { _shtab_async_rl; [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace; return 0; }\n"
        "complete -o bashdefault -F _async_rl async-rl\n"
    )
