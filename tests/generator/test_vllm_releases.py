"""Every call of vLLM, checked against the signatures recorded of each release (tests/record_vllm.py).

The calls are found by reading our files, so none can be added that an older or a newer release would refuse."""

from __future__ import annotations

import ast
import re

import pytest
from support_vllm import ASYNC_LLM, RELEASES, THINGS, Site, files, lines, number, refusal, sites, vllm_options

from async_rl.errors import UserError
from async_rl.generator.vllm_engine import engine_arguments
from async_rl.weights import vllm_release
from async_rl.weights.vllm_links import HAS_PACKED
from async_rl.weights.vllm_release import INSTALL, SPANS, TRAINER_FACTORY, Release, supported


def test_every_supported_release_is_recorded() -> None:
    oldest, newest = vllm_release.OLDEST, vllm_release.NEWEST
    assert {number(r) for r in RELEASES} == {(0, minor) for minor in range(oldest[1], newest[1] + 1)}


@pytest.mark.parametrize("release", RELEASES)
def test_no_call_would_be_refused_by_a_release(release: str) -> None:
    found = [site for path in files() for site in sites(path)]
    assert len(found) > 30
    unknown = {site.thing for site in found} - set(THINGS)
    assert not unknown, f"name {sorted(unknown)} in tests/record_vllm.py"
    refused = {f"{site.where}: {why}" for site in found if site.used_in(release) and (why := refusal(site, release))}
    assert not refused, f"vLLM {release} would refuse {sorted(refused)}"


@pytest.mark.parametrize("release", RELEASES)
def test_every_release_takes_the_engines_arguments(release: str) -> None:
    known = lines("vllm.engine.arg_utils.AsyncEngineArgs", release)
    fields = {line.removeprefix("field ").rstrip("=") for line in known}
    for device in ("cpu", "cuda"):
        assert set(engine_arguments(vllm_options(device=device, dtype="bfloat16"))) <= fields


@pytest.mark.parametrize("release", RELEASES)
def test_every_release_takes_what_links_tell_its_workers(release: str) -> None:
    """Tables that vLLM makes into its own records: every key is a field, and every field without default is there."""
    transfer = "vllm.distributed.weight_transfer"
    told = {
        f"{transfer}.ipc_engine.IPCWeightTransferUpdateInfo": {"names", "dtype_names", "shapes", "ipc_handles"},
        f"{transfer}.ipc_engine.IPCWeightTransferInitInfo": {"packed"} if number(release) >= HAS_PACKED else set(),
    }
    if number(release) < TRAINER_FACTORY:  # later vLLM's trainer side makes them
        init, update = tables_of("OldNcclLink")
        told[f"{transfer}.nccl_common.NCCLWeightTransferInitInfo"] = init | {"rank_offset"}
        told[f"{transfer}.nccl_engine.NCCLWeightTransferUpdateInfo"] = update
    for thing, keys in told.items():
        fields = {line.removeprefix("field ") for line in lines(thing, release) if line.startswith("field ")}
        assert keys <= {field.rstrip("=") for field in fields}, thing
        assert {field for field in fields if not field.endswith("=")} <= keys, thing


def tables_of(name: str) -> list[set[str]]:
    """Keys of the tables that a class of weights/vllm_links.py writes down, in order."""
    (path,) = [path for path in files() if path.name == "vllm_links.py"]
    (owner,) = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ClassDef) and n.name == name]
    tables = [node for node in ast.walk(owner) if isinstance(node, ast.Dict) and None not in node.keys]
    return [{ast.literal_eval(key) for key in table.keys if key is not None} for table in tables]


def test_the_check_notices_what_a_release_does_not_know() -> None:
    def why(thing: str, member: str, names: tuple[str, ...], release: str) -> str:
        return refusal(Site(thing=thing, member=member, call=(0, names), where=""), release)

    assert "no update_weight_version" in why(ASYNC_LLM, "update_weight_version", ("new_version",), "0.26.0")
    assert "unexpected keyword" in why(ASYNC_LLM, "pause_generation", ("wait_for_inflight_requests",), "0.33.0")
    assert not why(ASYNC_LLM, "pause_generation", ("wait_for_inflight_requests",), "0.31.0")
    assert "missing a required" in why(ASYNC_LLM, "abort", (), "0.30.0")
    assert "has no ['session']" in why("vllm.sampling_params.SamplingParams", "", ("session",), "0.32.0")
    assert refusal(Site(thing="vllm.outputs.WeightVersionSpan", where=""), "0.31.0")


def test_the_record_says_what_the_code_goes_by() -> None:
    def having(thing: str, line: str) -> list[Release]:
        said = THINGS[thing][line]
        return sorted({number(r) for r in (RELEASES if said == "all" else said.split())})

    newest = vllm_release.NEWEST[1]
    spans = having("vllm.outputs.CompletionOutput", "field weight_versions=")
    assert spans == [(0, minor) for minor in range(SPANS[1], newest + 1)]
    nccl = "vllm.distributed.weight_transfer.nccl_engine."
    assert having(f"{nccl}NCCLTrainerInitInfo", "here")[0] == TRAINER_FACTORY
    assert having(f"{nccl}NCCLTrainerSendWeightsArgs", "here")[-1] < TRAINER_FACTORY


def test_other_releases_are_refused_with_the_install_command() -> None:
    assert supported("0.26.0") == (0, 26)
    assert supported("0.32.0+cpu") == (0, 32)
    assert supported("0.33.1rc1") == (0, 33)
    for other in ("0.25.2", "0.34.0", "1.0.0rc1"):
        with pytest.raises(UserError, match=rf"vLLM {re.escape(other)} is installed.*0\.26 to 0\.33") as refused:
            supported(other)
        assert INSTALL in str(refused.value)
