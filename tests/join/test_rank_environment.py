"""Which rank a process is, by torchrun or by SLURM, and whether it is one that the run waits for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from async_rl.config import Settings
from async_rl.config.schema import structured
from async_rl.errors import UserError
from async_rl.events import TrainerAwaited
from async_rl.run.join_trainer import check_fit, first_node, rank_environment, reached_from_here
from async_rl.version import __version__
from async_rl.wire.endpoint import this_host

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123456",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
}  # fmt: skip


def test_what_torchrun_says_is_taken_as_it_is() -> None:
    assert rank_environment(TORCHRUN | SLURM | {"HOME": "x"}) == TORCHRUN
    with pytest.raises(UserError, match="MASTER_ADDR, MASTER_PORT is not"):
        rank_environment({"RANK": "0", "WORLD_SIZE": "2"})


def test_slurms_variables_are_translated() -> None:
    expected = {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu007", "MASTER_PORT": str(20_000 + 3_456),
    }  # fmt: skip
    assert rank_environment(SLURM) == expected
    chosen = {"MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "1234"}
    assert rank_environment(SLURM | chosen) == expected | chosen


def test_a_process_alone_is_the_only_rank() -> None:
    assert rank_environment({}) == {}
    assert rank_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}) == {}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("login1", "login1"), ("gpu[007-009,12],login1", "gpu007"), ("a1,b2", "a1"), ("n[3,5]-ib", "n3-ib")],
)
def test_rank_0_is_on_slurms_first_node(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_only_the_ranks_that_a_run_waits_for_are_let_in(tmp_path: Path) -> None:
    settings = structured(Settings, {"trainer": {"ranks": 4}}, where="")
    wanted = TrainerAwaited(
        endpoint="ipc://x", version=0, package=__version__, host=this_host(), folder="", ranks=4, command="torchrun ..."
    )
    check_fit(wanted, settings, TORCHRUN)
    with pytest.raises(UserError, match=r"1 rank started, but the run waits for trainer.ranks=4; .*torchrun"):
        check_fit(wanted, settings, {})
    with pytest.raises(UserError, match="both need the same"):
        check_fit(replace(wanted, package="0.0.1"), settings, TORCHRUN)
    check_fit(replace(wanted, host="another"), settings, TORCHRUN)


ELSEWHERE = TrainerAwaited(
    endpoint="tcp://10.0.0.1:5555", version=0, package=__version__, host="another", folder="", ranks=4, command="",
    weights="tcp://0.0.0.0:7000",
)  # fmt: skip


def test_rank_0_elsewhere_reaches_the_buffer_and_the_weight_server_by_the_runs_address() -> None:
    assert reached_from_here(ELSEWHERE, 0) == ("tcp://10.0.0.1:5555", "tcp://10.0.0.1:7000")
    assert reached_from_here(ELSEWHERE, 3) == ("tcp://10.0.0.1:5555", "")  # a follower has no weights to send
    beside = replace(ELSEWHERE, host=this_host())
    assert reached_from_here(beside, 0) == ("tcp://10.0.0.1:5555", "")  # it shares the run's memory
    assert reached_from_here(replace(beside, endpoint="ipc://x"), 0) == ("ipc://x", "")


def test_a_buffer_on_every_interface_has_the_address_that_the_user_gives() -> None:
    everywhere = replace(ELSEWHERE, endpoint="tcp://127.0.0.1:5555")  # as the run itself reaches it
    with pytest.raises(UserError, match=r"wire.endpoint=tcp://ADDRESS:PORT .* --connect tcp://ADDRESS:PORT"):
        reached_from_here(everywhere, 0)
    assert reached_from_here(everywhere, 1) == ("", "")  # it says nothing to the buffer
    connect = "tcp://10.0.0.9:5555"
    assert reached_from_here(everywhere, 0, connect) == (connect, "tcp://10.0.0.9:7000")
    with pytest.raises(UserError, match="no weight server"):
        reached_from_here(replace(everywhere, weights=""), 0, connect)
    with pytest.raises(UserError, match="on another machine than the run, whose buffer listens at ipc://x"):
        reached_from_here(replace(ELSEWHERE, endpoint="ipc://x"), 0)
