"""`async-rl` and `python -m async_rl`: the command line."""

import sys


def main() -> None:
    """Ctrl-C ends also what is only being imported without a traceback, with exit code 130."""
    try:
        from async_rl.cli.main import main as command_line

        command_line()
    except KeyboardInterrupt:
        print("async-rl: stopped by SIGINT", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
