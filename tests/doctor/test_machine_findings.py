"""Each check of software and machine says ok, warning or error by what was measured."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from support_run import quick_settings

from async_rl.doctor import machine
from async_rl.doctor.examine import guarded
from async_rl.doctor.machine import DiskProbe, Gpus, Software, judge_software, judge_zmq, numbers, read_software
from async_rl.errors import UserError
from async_rl.finding import Finding, error, ok, warning
from async_rl.run.memory import megabytes
from async_rl.run.placement import read_cores
from async_rl.wire.endpoint import ZmqLibrary

MB = 1 << 20
ZMQ = ZmqLibrary(pyzmq="27.0", libzmq="4.3.5", ipc=True, curve=True)
PACKAGES = {
    "torch": "2.11.0+cpu", "numpy": "2.0.1", "omegaconf": "2.4", "msgspec": "0.22.0", "safetensors": "0.5",
    "tokenizers": "0.21.0",
}  # fmt: skip


def levels(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.level for finding in findings}


def test_a_finding_shows_its_level_what_was_found_and_the_remedy() -> None:
    assert str(ok("cores", "2")) == "ok       cores               2"
    assert str(warning("disk", "slow", "a faster one")).splitlines()[1].strip() == "-> a faster one"
    assert error("gpu", "none", "cpu").level == "error"
    assert [megabytes(n) for n in (3 * MB // 2, 300 * MB, 5 << 30)] == ["1.5 MB", "300 MB", "5.0 GB"]


@pytest.mark.parametrize(
    ("version", "found"), [("2.13.0+cpu", (2, 13, 0)), ("3.11", (3, 11)), ("2.4.0.dev3", (2, 4, 0)), ("x", ())]
)
def test_versions_are_read_as_numbers(version: str, found: tuple[int, ...]) -> None:
    assert numbers(version)[: len(found) or None] == found


def test_what_is_installed_here_is_enough() -> None:
    assert set(levels(list(judge_software(read_software()))).values()) == {"ok"}


def test_old_and_missing_software_is_an_error_with_the_command_that_helps() -> None:
    packages = {**PACKAGES, "torch": "2.10.1"}
    del packages["tokenizers"]
    found = list(judge_software(Software(python="3.10.4", sqlite="3.22.0", packages=packages, zmq=ZMQ)))
    assert levels(found) == {
        "python": "error", "sqlite": "error", "torch": "error", "numpy": "ok", "omegaconf": "ok", "msgspec": "ok",
        "safetensors": "ok", "tokenizers": "error", "zeromq": "ok", "optional": "ok",
    }  # fmt: skip
    assert "pip install 'torch>=2.11'" in [finding.remedy for finding in found]


def test_a_zeromq_without_unix_sockets_is_an_error_and_without_curve_a_warning() -> None:
    assert judge_zmq(ZMQ).level == "ok"
    assert judge_zmq(replace(ZMQ, curve=False)).level == "warning"
    assert judge_zmq(replace(ZMQ, ipc=False)).level == "error"


def test_more_threads_than_cores_is_a_warning(tiny_model: Path) -> None:
    settings = quick_settings(tiny_model, "generator.count=3", "trainer.threads=2")
    assert machine.judge_cores(5, settings).level == "ok"
    found = machine.judge_cores(4, settings)
    assert found.level == "warning"
    assert "trainer 2 + 3 generators x 1 threads = 5 at work" in found.said
    assert machine.judge_cores(1, None).level == "ok"
    found = machine.judge_cores(2, quick_settings(tiny_model, "generator.count=1", "trainer.ranks=8"))
    assert found.level == "warning"
    assert "trainer 8 ranks x 1 + 1 generators x 1 threads = 9 at work" in found.said
    assert "lower trainer.ranks" in found.remedy
    found = machine.judge_cores(1, quick_settings(tiny_model, "generator.device=cuda", "trainer.device=cuda"))
    assert (found.level, found.said) == ("ok", "1; trainer and generators work on GPUs")
    assert 1 <= read_cores() <= (os.cpu_count() or 1)


def test_a_gpu_is_needed_only_by_settings_that_ask_for_one(tiny_model: Path) -> None:
    none = Gpus(cuda="", names=(), free_bytes=(), driver=False)
    one = Gpus(cuda="12.8", names=("X",), free_bytes=(80 << 30,), driver=True)
    on_gpu = quick_settings(tiny_model, "trainer.device=cuda:0")
    assert machine.judge_gpus(none, None).level == "ok"
    assert machine.judge_gpus(none, quick_settings(tiny_model)).level == "ok"
    assert machine.judge_gpus(one, on_gpu).said == "X (80.0 GB free)"
    assert machine.judge_gpus(none, on_gpu).level == "error"
    assert "built without CUDA" in machine.judge_gpus(none, on_gpu).said
    assert machine.judge_gpus(replace(none, driver=True, cuda="12.8"), None).level == "warning"


def test_sockets_are_tried_for_real() -> None:
    assert machine.check_ipc().level == "ok"
    assert machine.check_tcp().level == "ok"


def test_a_socket_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    found = machine.judge_socket("unix socket", lambda: machine.round_trip(f"ipc://{tmp_path}/none/s"), "elsewhere")
    assert (found.level, found.remedy) == ("error", "does its folder exist, and may this user write there?")

    def silent() -> float:
        raise TimeoutError("no message came through")

    assert machine.judge_socket("unix socket", silent, "elsewhere").remedy == "elsewhere"
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(str(tmp_path / "s"))
        taken.listen()
        found = machine.judge_socket("unix socket", lambda: machine.round_trip(f"ipc://{tmp_path}/s"), "another")
    assert "in use" in found.said
    assert found.remedy == "end that run or choose another endpoint"


def test_a_run_folder_with_a_long_name_is_a_warning(tmp_path: Path) -> None:
    assert machine.judge_socket_path(Path("/r")).level == "ok"
    assert machine.judge_socket_path(tmp_path / ("x" * 120)).level == "warning"


def test_shared_memory_must_hold_two_versions_of_the_model() -> None:
    assert machine.judge_shared_memory(64 * MB, 32 * MB).level == "ok"
    found = machine.judge_shared_memory(64 * MB, 33 * MB)
    assert found.level == "error"
    assert "--shm-size" in found.remedy
    assert machine.judge_shared_memory(64 * MB, None).level == "ok"
    assert machine.judge_shared_memory(None, 33 * MB).level == "warning"


def test_a_disk_is_judged_by_room_and_speed(tmp_path: Path) -> None:
    fast = DiskProbe(folder=tmp_path, free_bytes=100 * MB, fsync_s=0.001, bytes_s=500 * MB)
    assert machine.judge_disk(fast, durability="power", needed_bytes=100 * MB).level == "ok"
    assert machine.judge_disk(fast, durability="process", needed_bytes=101 * MB).level == "error"
    slow = replace(fast, fsync_s=0.05)
    assert machine.judge_disk(slow, durability="process", needed_bytes=None).level == "ok"
    assert machine.judge_disk(slow, durability="power", needed_bytes=None).level == "warning"
    assert machine.judge_disk(replace(fast, bytes_s=MB), durability="process", needed_bytes=None).level == "warning"


def test_a_disk_is_measured_where_the_run_would_be_and_nothing_is_left(tmp_path: Path) -> None:
    found = machine.read_disk(tmp_path / "runs" / "later")
    assert found.folder == tmp_path
    assert found.bytes_s > 0
    assert list(tmp_path.iterdir()) == []


def test_a_check_that_raises_is_an_error_line() -> None:
    def fails() -> Finding:
        raise ZeroDivisionError("oh")

    def refuses() -> Finding:
        raise UserError("x is 3; it must be 4")

    (found,) = guarded("x", fails)
    assert (found.level, found.check, found.said) == ("error", "x", "the check raised ZeroDivisionError: oh")
    (found,) = guarded("x", refuses)
    assert (found.said, found.remedy) == ("x is 3", "it must be 4")
