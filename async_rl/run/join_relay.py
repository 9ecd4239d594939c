"""`async-rl relay`: a relay of weights for a run that goes on elsewhere.

It asks the run's buffer where the weight server is, as a generator does that joins, and then has to do with weights
only (weights/relay.py).
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable

from async_rl.errors import UserError
from async_rl.run.join import JoinTarget, request_join
from async_rl.weights.relay import RelayProcess
from async_rl.wire.endpoint import as_reached_by, is_tcp, tcp_address

ANYWHERE = ("0.0.0.0", "*", "")


def relay_for(target: JoinTarget, listen: str, reached: str, log: Callable[[str], None]) -> str:
    """Relay the weights of the run at `target` until it ends; why it did.

    Args:
        listen: where readers connect, tcp://HOST:PORT.
        reached: the same as other machines reach it; empty: by the address from which this one reaches the run.
        log: writes a line for the user.

    Raises UserError for endpoints that cannot be, RunFailed when the run is gone."""
    for name, endpoint in (("--connect", target.endpoint), ("--listen", listen), ("--reached-as", reached or listen)):
        if not is_tcp(endpoint):
            raise UserError(f"{name} is {endpoint}; relays work over tcp only: tcp://HOST:PORT")
    assert target.keys is not None
    if tcp_address(listen)[1] == "*":
        raise UserError(f"--listen is {listen}: name the port, so that generators can be told, e.g. tcp://0.0.0.0:6000")
    welcome = request_join(target, _name())
    if not welcome.weights:
        raise UserError("this run has no weight server; start it with wire.endpoint=tcp://HOST:PORT")
    server = as_reached_by(welcome.weights, target.endpoint)
    timeout_s = float(welcome.settings.get("wire", {}).get("timeout_s", target.timeout_s))
    process = RelayProcess(
        server=server,
        listen=listen,
        reached=reached or reached_as(listen, server),
        keys=target.keys,
        timeout_s=timeout_s,
        log=log,
    )
    return f"the weight server says: {process.run()}"


def _name() -> str:
    host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())[:60] or "host"
    return f"relay-{host}-{os.getpid()}"


def reached_as(listen: str, server: str) -> str:
    """`listen`, with the address from which this machine reaches the server where every interface is listened on."""
    host, port = tcp_address(listen)
    if host not in ANYWHERE:
        return listen
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # connecting it sends nothing
        there, number = tcp_address(server)
        probe.connect((there, int(number)))
        return f"tcp://{probe.getsockname()[0]}:{port}"
