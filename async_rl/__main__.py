"""`async-rl` and `python -m async_rl`: the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; `argv`: its words, `sys.argv[1:]` if None. Ends with SystemExit. Ctrl-C ends also what is only
    being imported without a traceback, with exit code 130."""
    try:
        from async_rl.cli.main import main as command_line

        command_line(argv)
    except KeyboardInterrupt:
        print("async-rl: stopped by SIGINT", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
