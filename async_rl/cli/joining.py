"""Commands of processes that take part in a run from elsewhere: `async-rl generate | relay | train`.

Each imports what it needs when it runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from async_rl.cli.commands import FOLDER, Commands, add_run, complete
from async_rl.cli.ending import code_of


def add_commands(commands: Commands) -> None:
    """Declare the commands in the present group."""
    generate = commands.add(
        "generate",
        "one more generator for a run that is going on, here or on another machine",
        example="async-rl generate --run runs/x generator.device=cuda:1\n"
        "async-rl generate --connect tcp://trainer-host:5555 --keys keys",
        work=_generate,
    )
    overrides = "settings of this host, e.g. generator.device=cuda:1"
    generate.add_argument("overrides", nargs="*", metavar="NAME=VALUE", help=overrides)
    there = generate.add_argument("--run", type=Path, metavar="RUN", help="folder of the run, on its own host")
    generate.add_argument("--connect", metavar="ENDPOINT", help="where the run's buffer listens: tcp://HOST:PORT")
    keys = generate.add_argument("--keys", type=Path, metavar="DIR", help="folder of keys, needed for tcp")
    for action in (there, keys):
        complete(action, FOLDER)
    generate.add_argument("--name", help="of this generator (default: generator-HOST-PROCESS)")
    relay = commands.add(
        "relay",
        "fetch weights once for this machine, and pass them on to generators and other relays",
        about="Generators use it with weights.relay=tcp://HOST:PORT. Relays form a chain by themselves (a tree with "
        "weights.fan_out of the run above 1): each is told whom to fetch from, and another one when that one is lost.",
        example="async-rl relay --connect tcp://trainer-host:5555 --keys keys --listen tcp://0.0.0.0:6000",
        work=_relay,
    )
    relay.add_argument("--connect", required=True, metavar="ENDPOINT", help="where the run's buffer listens")
    folder = relay.add_argument("--keys", required=True, type=Path, metavar="DIR", help="folder of keys")
    complete(folder, FOLDER)
    relay.add_argument("--listen", required=True, metavar="ENDPOINT", help="where readers connect: tcp://HOST:PORT")
    relay.add_argument(
        "--reached-as", default="", metavar="ENDPOINT", help="the same, as other machines reach it (default: found out)"
    )
    train = commands.add(
        "train",
        "a rank of the trainer of a run that waits for it, started by torchrun or srun",
        about="The run has trainer.start=external and says which command to give.",
        example="torchrun --standalone --nproc-per-node 4 -m async_rl train runs/x\n"
        "torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint first-node:29400 -m async_rl train "
        "runs/x",
        work=_train,
    )
    # not an option: torchrun would take `--run` for one of its own
    add_run(train, "folder of the run (trainer.start=external)")
    train.add_argument(
        "--connect", default="", metavar="ENDPOINT", help="where this machine reaches the run's buffer: tcp://HOST:PORT"
    )
    own = train.add_argument("--keys", type=Path, metavar="DIR", help="folder of keys on this machine")
    complete(own, FOLDER)


def _generate(arguments: argparse.Namespace) -> int:
    from async_rl.run.join import find_target

    target = find_target(arguments.connect, arguments.run, arguments.keys)

    from async_rl.run.join import Traces, admitted, default_name, generate_for
    from async_rl.run.keeper import Keeper

    found = admitted(target, arguments.name or default_name(), arguments.overrides)

    def generate(traces: Traces) -> int:
        def work() -> int:
            generate_for(found, lambda line: print(line, flush=True), traces)
            return 0

        return code_of(work)

    frozen_after_s = found.settings.wire.frozen_after_s
    return Keeper(target=target, name=found.name, identity=found.identity, frozen_after_s=frozen_after_s).run(generate)


def _relay(arguments: argparse.Namespace) -> int:
    from async_rl.run.join import find_target
    from async_rl.run.join_relay import relay_for

    target = find_target(arguments.connect, None, arguments.keys)
    print(relay_for(target, arguments.listen, arguments.reached_as, lambda line: print(line, flush=True)))
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from async_rl.run.join_trainer import train_for

    train_for(arguments.run, arguments.connect, arguments.keys)
    return 0
