"""Puts the tests folder on the path, so that tests can import the `support_*` modules in it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hypothesis
import pytest

sys.path.insert(0, str(Path(__file__).parent))
# an example that takes long on a busy machine is no failure; 200 ms is hypothesis' limit otherwise
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `nightly` run where ASYNC_RL_NIGHTLY is set, as `make nightly` does."""
    if os.environ.get("ASYNC_RL_NIGHTLY"):
        return
    for item in items:
        if item.get_closest_marker("nightly") is not None:
            item.add_marker(pytest.mark.skip(reason="a longer proof: make nightly"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model folder that speaks the guess task."""
    from async_rl.model.create import create_model_folder
    from async_rl.task import make_task

    path = tmp_path_factory.mktemp("models") / "tiny"
    alphabet = make_task("guess", {}).alphabet  # type: ignore[attr-defined]
    create_model_folder(
        path, alphabet=alphabet, hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, intermediate=64, seed=3
    )
    return path
