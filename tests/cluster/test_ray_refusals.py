"""What is said, in one line, where Ray or its cluster is not there: without either."""

from __future__ import annotations

import importlib.machinery
import socket
from pathlib import Path

import pytest

from async_rl.cluster import ray_cluster
from async_rl.cluster.ray_cluster import RayCluster
from async_rl.errors import UserError


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None))


def refusal(address: str) -> str:
    with pytest.raises(UserError) as refused:
        RayCluster.connect(address, Path())
    return str(refused.value)


def test_ray_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "find_spec", lambda name: None)
    assert refusal("auto") == (
        "cluster.engine=ray needs Ray; pip install 'ray[default]', or set cluster.engine=local"
    )  # fmt: skip


@pytest.mark.usefixtures("installed")
def test_nothing_answers_at_the_address() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"  # bound, and nobody listens
        assert refusal(address).startswith(f"no Ray cluster answers at cluster.address={address}; `ray status`")
    assert "write HOST:PORT" in refusal("somewhere")


@pytest.mark.usefixtures("installed")
def test_the_last_cluster_of_this_machine_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "_found_here", lambda: "127.0.0.1:1")
    assert refusal("auto").startswith(
        "cluster.engine=ray, but this machine is no node of a Ray cluster; `ray start --head`"
    )
