"""Ray's own calls: a connection to its cluster, placement groups, actors, and how an actor ended.

The only file, besides the actors, that imports Ray, and it does so when it is called.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from async_rl.cluster.ray_plan import Resources
from async_rl.errors import UserError
from async_rl.process import SIGNALS

REACH_S = 5.0
"""time the cluster's address has to take a connection"""
PACKAGES = ("async_rl", "async_rl_kernels")
"""this program, of which every node gets the command's own version"""
NODE_LABEL = "ray.io/node-id"


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Room on the cluster that was asked for."""

    name: str
    group: Any
    """Ray's placement group"""


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """What became of a call to an actor."""

    answer: dict[str, Any] | None = None
    """None: the actor died"""
    restarted: bool = False
    """Ray starts it again"""
    reason: str = ""
    """why it died, in Ray's words"""


@dataclass(slots=True)
class RayCluster:
    """A connection to a Ray cluster, and what this process has asked of it."""

    ray: Any
    asked: list[Placed] = field(default_factory=list)

    @classmethod
    def connect(cls, address: str, shipped: Path) -> RayCluster:
        """Connect to the cluster at `address`; every process that it starts for us gets a copy of the folder `shipped`,
        and this program. Raises UserError where Ray is not installed, or no cluster is there."""
        if find_spec("ray") is None:
            raise UserError("cluster.engine=ray needs Ray; pip install 'ray[default]', or set cluster.engine=local")
        reach(address)
        os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")  # where this command is itself a job of Ray
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
        import ray

        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        code = [_folder_of(package) for package in PACKAGES]
        try:
            ray.init(
                address=address,
                namespace="async-rl",
                runtime_env={"working_dir": str(shipped), "py_modules": code},
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except ConnectionError as error:
            raise UserError(f"{_no_cluster(address)} ({_first(error)})") from None
        except (RuntimeError, ValueError) as error:  # another version of Ray or Python than the cluster's
            raise UserError(f"cluster.address={address}: {_first(error)}") from None
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)  # Ray puts its own in their place
        _keep_quiet()
        return cls(ray)

    # ------------------------------------------------------------------ nodes

    def nodes(self) -> dict[str, Resources]:
        """What each living node has when it is empty, by its number."""
        return {node["NodeID"]: node["Resources"] for node in self.ray.nodes() if node["Alive"]}

    def nodes_here(self) -> tuple[str, ...]:
        """Nodes of the cluster on this machine."""
        own = self.ray.get_runtime_context().get_node_id()
        mine = [
            n["NodeID"] for n in self.ray.nodes() if n["Alive"] and n["NodeManagerHostname"] == socket.gethostname()
        ]
        return tuple(dict.fromkeys([own, *mine]))

    # ------------------------------------------------------------------ placement groups

    def place(self, name: str, bundles: Sequence[Resources], strategy: str, *, first_on: Sequence[str] = ()) -> Placed:
        """Ask for room. `first_on`: nodes of which one must hold the first bundle."""
        from ray.util.placement_group import placement_group

        labels = [{NODE_LABEL: f"in({','.join(first_on)})"}, *[{} for _ in bundles[1:]]] if first_on else None
        group = placement_group(
            [dict(bundle) for bundle in bundles], strategy=strategy, name=name, bundle_label_selector=labels
        )
        placed = Placed(name=name, group=group)
        self.asked.append(placed)
        return placed

    def is_placed(self, placed: Placed) -> bool:
        """Whether there is the room that was asked for."""
        from ray.util.placement_group import placement_group_table

        return bool(placement_group_table(placed.group).get("state") == "CREATED")

    # ------------------------------------------------------------------ actors

    def start(
        self, kind: type, name: str, placed: Placed, bundle: int, takes: Resources, *words: Any, max_restarts: int = 0
    ) -> Any:
        """Start an actor of the class `kind` in a bundle, of which it `takes` a part."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return (
            self.ray.remote(kind)
            .options(
                name=name,
                num_cpus=takes.get("CPU", 0.0),
                num_gpus=takes.get("GPU", 0.0),
                max_restarts=max_restarts,
                max_task_retries=0,
                max_concurrency=8,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=placed.group, placement_group_bundle_index=bundle
                ),
            )
            .remote(*words)
        )

    def is_ready(self, reference: Any) -> bool:
        """Whether a call has come to its end."""
        return bool(self.ray.wait([reference], timeout=0)[0])

    def get(self, reference: Any) -> Any:
        """The answer of an actor that lives."""
        return self.ray.get(reference)

    def how_it_ended(self, reference: Any) -> End:
        """Wait for a call: its answer, or that the actor died."""
        from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

        try:
            return End(answer=self.ray.get(reference))
        except ActorUnavailableError as error:
            return End(restarted=True, reason=_reason(error))
        except RayTaskError:
            raise  # an error of ours
        except RayActorError as error:
            return End(reason=_reason(error))

    # ------------------------------------------------------------------ the end

    def end(self, actors: Sequence[Any], placed: Sequence[Placed] | None = None) -> None:
        """End actors, and give room back: all that was asked for, unless `placed` says which."""
        from ray.util.placement_group import remove_placement_group

        for actor in actors:
            if actor is not None:
                with suppress(Exception):
                    self.ray.kill(actor)
        for one in list(self.asked if placed is None else placed):
            with suppress(Exception):
                remove_placement_group(one.group)
            self.asked = [other for other in self.asked if other is not one]

    def close(self) -> None:
        self.ray.shutdown()


def reach(address: str) -> None:
    """Raises UserError where nothing listens at a cluster's address; Ray itself would wait for it for a minute."""
    given = _found_here() if address == "auto" else address
    if given in ("auto", "local"):
        return
    host, colon, port = given.rpartition(":")
    if not colon or not port.isdecimal():
        raise UserError(f"cluster.address is {given}; write HOST:PORT, as `ray start` says it, or auto")
    try:
        socket.create_connection((host, int(port)), REACH_S).close()
    except OSError as error:
        raise UserError(f"{_no_cluster(given if address != 'auto' else 'auto')} ({given}: {error})") from None


def _found_here() -> str:
    """The address that Ray would take for "auto": of the environment or of the last `ray start`, which may be gone;
    "auto" where there is none."""
    with suppress(Exception):  # not part of Ray's interface: then Ray itself says it, later
        from ray._private.services import canonicalize_bootstrap_address

        return canonicalize_bootstrap_address("auto") or "auto"
    return "auto"


def _keep_quiet() -> None:
    """Ray's daemons write their own long accounts of every death to the terminal; we say it in a line."""
    with suppress(Exception):  # not part of Ray's interface: where it is not there, they are heard
        from ray._private import worker

        worker.print_to_stdstream = lambda *_, **__: None


def _folder_of(package: str) -> str:
    """Of an installed package, which is not imported."""
    found = find_spec(package)
    assert found is not None
    assert found.submodule_search_locations
    return str(found.submodule_search_locations[0])


def _no_cluster(address: str) -> str:
    if address == "auto":
        return (
            "cluster.engine=ray, but this machine is no node of a Ray cluster; `ray start --head` makes one, or name "
            "one with cluster.address=HOST:6379"
        )
    return f"no Ray cluster answers at cluster.address={address}; `ray status` on its head shows whether it runs"


def _first(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _reason(error: Exception) -> str:
    """The part of Ray's message that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "died" in line or "exit" in line.lower() or "node" in line.lower()]
    return (told[-1] if told else lines[0] if lines else type(error).__name__)[:300]
