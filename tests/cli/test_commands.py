"""What the command line says of itself: the overview, every --help, tab completion; quick and without torch."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from async_rl.__main__ import main as run_command
from async_rl.cli.main import main, make_parser
from async_rl.version import __version__

PARSER, COMMANDS = make_parser()
NAMES = [entry.name for entries in COMMANDS.groups.values() for entry in entries]
HEAVY = ("torch", "zmq", "numpy", "rich", "transformers")


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0
    return capsys.readouterr().out


def parser_of(name: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = COMMANDS.subparsers.choices[name]
    return parser


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_the_command_alone_shows_every_command_in_its_group(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    said = printed(capsys, *words)
    assert list(COMMANDS.groups) == ["train", "look", "check", "experiment", "shell"]
    assert sorted(NAMES) == sorted(COMMANDS.subparsers.choices)
    for title, entries in COMMANDS.groups.items():
        section = said[said.index(f"\n{title}\n") :]
        assert all(re.search(rf"^  {entry.name} +{re.escape(entry.summary)}$", section, re.M) for entry in entries)
    assert max(map(len, said.splitlines())) <= 100


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "--version") == f"async-rl {__version__}\n"


def test_a_program_of_ones_own_runs_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run_command(["--version"])
    assert (end.value.code, capsys.readouterr().out) == (0, f"async-rl {__version__}\n")


@pytest.mark.parametrize("name", NAMES)
def test_help_says_what_a_command_is_for_and_its_examples_can_be_typed(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    said = printed(capsys, name, "--help")
    [entry] = [e for entries in COMMANDS.groups.values() for e in entries if e.name == name]
    assert entry.summary[1:] in " ".join(said.split())
    examples = said.partition("example:\n")[2].strip().splitlines()
    assert examples
    for example in examples:
        for command in example.partition("#")[0].partition(" > ")[0].split("&&"):
            words = shlex.split(command.replace('eval "$(', "").replace(')"', ""))
            if words[0] in ("async-rl", "torchrun"):
                begin = 1 if words[0] == "async-rl" else words.index("async_rl") + 1
                parsed, more = PARSER.parse_known_args(words[begin:])
                assert not [word for word in more if "=" not in word], command
                assert parsed.command in (name, "run", "new")


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_is_explained(name: str) -> None:
    unsaid = [action.dest for action in parser_of(name)._actions if not action.help and action.dest != "shell"]
    assert not unsaid


def test_a_misspelt_command_is_told_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["reprot"])
    assert end.value.code == 2
    assert "invalid choice: 'reprot'; did you mean 'report'?" in capsys.readouterr().err


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys\nfrom async_rl.cli.main import main\n"
        "try: main(['run', '--help'])\nexcept SystemExit: pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


# ---------------------------------------------------------------------- tab completion


def completed(script: str, *words: str) -> list[str]:
    """What bash would offer for the last of `words`."""
    typed = " ".join(shlex.quote(word) for word in words)
    program = (
        f"{script}\ncompopt() {{ :; }}\nCOMP_WORDS=({typed})\nCOMP_CWORD={len(words) - 1}\n_async_rl\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True, env={**os.environ})
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_options_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    script = printed(capsys, "completion", "bash")
    assert completed(script, "async-rl", "re") == ["relay", "report", "recipes", "replay", "rescore"]
    assert completed(script, "async-rl", "run", "x.yaml", "trainer.st") == [
        "trainer.steps=", "trainer.start=", "trainer.start_timeout_s=",
    ]  # fmt: skip
    assert "--resume" in completed(script, "async-rl", "run", "--re")
    assert completed(script, "async-rl", "completion", "z") == ["zsh"]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_takes_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    script = printed(capsys, "completion", "zsh")
    program = f"autoload -Uz compinit && compinit -D -u\n{script}\nwhence -w _shtab_async_rl _async_rl_settings"
    done = subprocess.run(["zsh", "-fc", program], capture_output=True, text=True, check=False)
    assert done.stdout.count("function") == 2, done.stderr
