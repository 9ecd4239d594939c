"""`async-rl generate`, `async-rl train` and `async-rl keys` on the command line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_joining(commands: Any) -> None:
    """`commands`: what argparse's `add_subparsers` gave."""
    generate = commands.add_parser("generate", help="one more generator for a run that is going on, here or elsewhere")
    generate.add_argument("overrides", nargs="*", help="name=value for this host, e.g. generator.device=cuda:1")
    generate.add_argument("--run", type=Path, metavar="RUN", help="folder of the run, on its own host")
    generate.add_argument("--connect", metavar="ENDPOINT", help="where the run's buffer listens: tcp://HOST:PORT")
    generate.add_argument("--keys", type=Path, metavar="DIR", help="folder of keys, needed for tcp")
    generate.add_argument("--name", help="of this generator (default: generator-HOST-PROCESS)")
    generate.set_defaults(work=_generate)

    train = commands.add_parser("train", help="a rank of the trainer of a run that waits for it, by torchrun or srun")
    # not an option: torchrun would take `--run` for one of its own
    train.add_argument("run", type=Path, metavar="RUN", help="folder of the run (trainer.start=external)")
    train.set_defaults(work=_train)

    keys = commands.add_parser("keys", help="make the keys a run needs to be reached over TCP")
    keys.add_argument("folder", type=Path, metavar="DIR", help="folder to make")
    keys.set_defaults(work=_keys)


def _generate(arguments: argparse.Namespace) -> int:
    from async_rl.run.join import find_place

    place = find_place(arguments.connect, arguments.run, arguments.keys)

    from async_rl.run.join import join_run, own_name

    join_run(place, arguments.name or own_name(), arguments.overrides, lambda line: print(line, flush=True))
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from async_rl.run.join_trainer import train_for

    train_for(arguments.run)
    return 0


def _keys(arguments: argparse.Namespace) -> int:
    from async_rl.wire.keys import make_keys

    folder = make_keys(arguments.folder).folder
    print(
        f"{folder}: run with wire.keys={folder} wire.endpoint=tcp://HOST:PORT. A host of more generators needs "
        "server.key, client.key and client.key_secret; server.key_secret stays here"
    )
    return 0
