"""The command line `async-rl`: reads the words, runs the command, turns what goes wrong into an exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from async_rl.cli import check, experiment, joining, launch, look, train, values
from async_rl.cli.commands import CommandParser, Commands, completion_script
from async_rl.cli.ending import code_of
from async_rl.process import interruptible
from async_rl.version import __version__

ABOUT = "Asynchronous, off-policy RL for language models with bounded, measured and corrected staleness."


def main(argv: Sequence[str] | None = None) -> None:
    """Exit codes: 0 done, 1 a run failed, 2 a wrong setting or file, 128 and the signal's number when one stopped
    it: 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP, 138 SIGUSR1."""
    parser, commands = make_parser()
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or words in (["-h"], ["--help"]):
        print(commands.overview(), end="")
        sys.exit(0)
    arguments = _parsed(parser, words)
    with interruptible():
        code = code_of(lambda: arguments.work(arguments))
    sys.exit(code)


def make_parser() -> tuple[argparse.ArgumentParser, Commands]:
    """The parser of all commands, and the commands by group."""
    parser = CommandParser(prog="async-rl", description=ABOUT)
    parser.add_argument("--version", action="version", version=f"async-rl {__version__}")
    commands = Commands(parser)
    for group in (train, joining, launch, look, check, experiment):
        group.add_commands(commands)
    values.add_values(commands)
    commands.group("shell")
    completion = commands.add(
        "completion",
        "print the script for tab completion in bash or zsh",
        example='eval "$(async-rl completion bash)"      # in ~/.bashrc\n'
        'eval "$(async-rl completion zsh)"       # in ~/.zshrc, behind compinit',
        work=_completion,
    )
    completion.add_argument("shell", choices=("bash", "zsh"))
    return parser, commands


def _parsed(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Settings may stand before and behind options, which argparse alone does not allow."""
    arguments, more = parser.parse_known_args(words)
    if arguments.command is None:
        parser.error("name a command; `async-rl` alone lists them")
    dashed = [word for word in more if word.startswith("-")]
    if more and (not hasattr(arguments, "overrides") or dashed):
        hint = " (settings are written without dashes)" if any("=" in word for word in dashed) else ""
        parser.error(f"unrecognized arguments: {' '.join(dashed or more)}{hint}")
    if more:
        arguments.overrides = [*arguments.overrides, *more]
    return arguments


def _completion(arguments: argparse.Namespace) -> int:
    from async_rl.config import Settings
    from async_rl.config.schema import NAMED, values_of

    groups = {"task.name", "task.args", "recipe"}
    parser, _ = make_parser()
    print(completion_script(parser, arguments.shell, [*NAMED, *(p for p in values_of(Settings()) if p not in groups)]))
    return 0
