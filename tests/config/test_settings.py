"""Bounds, choices and relations of settings: refused where they are broken, explained where they are listed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from support_run import quick_settings

from async_rl.config import Settings, check
from async_rl.config.checks import RELATIONS
from async_rl.config.schema import Bounds, check_bounds, describe, structured
from async_rl.errors import UserError

BOUNDED = [info for info in describe(Settings()) if info.bounds != Bounds()]


def nested(path: str, value: Any) -> dict[str, Any]:
    for name in reversed(path.split(".")):
        value = {name: value}
    assert isinstance(value, dict)
    return value


def outside(bounds: Bounds) -> list[float]:
    """A number just beyond each limit."""
    found = [limit for limit in (bounds.above, bounds.below) if limit is not None]
    found += [] if bounds.min is None else [bounds.min - 1]
    return found + ([] if bounds.max is None else [bounds.max + 1])


@pytest.mark.parametrize("info", BOUNDED, ids=lambda info: info.path)
def test_a_number_beyond_a_limit_is_refused_by_its_path(info: Any) -> None:
    kind = type(info.default)
    for value in outside(info.bounds):
        with pytest.raises(UserError, match=rf"^{info.path} is -?\d.*; it must be (at|above|below)"):
            structured(Settings, nested(info.path, kind(value)), where="")


def test_the_limits_themselves_are_allowed() -> None:
    for info in BOUNDED:
        for limit in (info.bounds.min, info.bounds.max):
            if limit is not None:
                structured(Settings, nested(info.path, type(info.default)(limit)), where="")


def test_what_is_refused_is_told_from_where_it_stands() -> None:
    with pytest.raises(UserError, match=r"^run\.optimizer\.learning_rate is inf; it must be a finite number"):
        structured(Settings, {"optimizer": {"learning_rate": float("inf")}}, where="run")


@pytest.mark.parametrize(
    ("bounds", "value", "refusal"),
    [
        (Bounds(min=1), 0, "it must be at least 1"),
        (Bounds(above=0), 0.0, "it must be above 0"),
        (Bounds(max=1024), 5000, "it must be at most 1,024"),
        (Bounds(min=0, below=1), 1.0, "it must be at least 0 and below 1"),
        (Bounds(min=0, below=1), -0.1, "it must be at least 0 and below 1"),
        (Bounds(below=1), 1, "it must be below 1"),
        (Bounds(), float("nan"), "it must be a finite number"),
        (Bounds(min=1, max=3), 2, ""),
    ],
)
def test_bounds_say_what_is_wrong(bounds: Bounds, value: float, refusal: str) -> None:
    assert bounds.refusal(value) == refusal


def test_every_setting_is_explained_and_every_choice_is_listed() -> None:
    found = {info.path: info for info in describe(Settings())}
    assert all(info.meaning for info in found.values())
    assert found["staleness.policy"].describe_range() == "pace | wait | drop"
    assert found["trainer.steps"].describe_range() == "steps; at least 1, at most 1,000,000,000"
    assert found["trainer.memory_share"].describe_range() == "above 0, at most 1"
    assert found["batch.group_size"].default == 8
    for group, cls in get_type_hints(Settings).items():
        for name, hint in get_type_hints(cls).items() if isinstance(cls, type) and cls.__module__ != "builtins" else ():
            if get_origin(hint) is Literal:
                assert found[f"{group}.{name}"].choices == get_args(hint)


def test_bounds_are_checked_for_settings_made_in_python(tmp_path: Path) -> None:
    from dataclasses import replace

    settings = quick_settings(tmp_path)
    with pytest.raises(UserError, match=r"trainer\.steps is 0; it must be at least 1"):
        check(replace(settings, trainer=replace(settings.trainer, steps=0)))
    check_bounds(settings)


BROKEN: dict[str, tuple[tuple[str, ...], str]] = {
    "tcp_is_served_with_keys": (("wire.endpoint=tcp://:1",), "TCP is served with keys only"),
    "keys_need_tcp": (("wire.keys=k",), "a Unix socket needs none"),
    "stream_needs_tcp": (("weights.transport=stream",), "no weight server runs"),
    "weight_endpoint_needs_tcp": (("weights.endpoint=tcp://:1",), "no weight server runs"),
    "forks_have_parents_and_groups": (("rollout.children=3",), "does nothing with rollout.roots=0"),
    "a_greedy_answer_is_beside_others": (("rollout.greedy=true", "batch.group_size=1"), "needs batch.group_size=2"),
    "relays_need_tcp": (("weights.fan_out=2",), "no weight server runs that relays could fetch from"),
    "connect_looks_like_the_endpoint": (("wire.connect=tcp://x:1",), "it must look like ipc://PATH"),
    "adapters_are_trained": (("lora.alpha=8",), "lora.* does nothing with lora.rank=0"),
    "a_layer_has_one_adapter": (("lora.rank=2", "lora.targets=[q_proj,q_proj]"), "names a layer twice"),
    "adapters_are_added_by_generators": (
        ("lora.rank=2", "lora.send=adapter", "weights.transport=ipc"), "weights go straight into the engine",
    ),
    "a_frozen_critic_comes_from_somewhere": (("critic.learning_rate=0",), "freezes a critic that is 0 everywhere"),
    "a_distribution_has_a_range": (("critic.bins=9",), "does nothing with critic.loss=squared"),
    "minibatches_are_whole_groups": (
        ("updates.minibatches=9", "batch.groups_per_step=8"), "a batch has 8 groups (batch.groups_per_step)",
    ),
    "kl_target_needs_a_bound": (("updates.kl_target=behaviour",), "does nothing with updates.kl_stop=0"),
    "reference_moves_one_way": (("reference.every=2", "reference.average=0.9"), "choose one"),
    "reference_without_adapters_stays": (("reference.every=2", "lora.rank=4"), "the model without its adapters"),
    "thresholds_need_alarms": (("guard.alarms=false", "guard.ess=0.1"), "does nothing with guard.alarms=false"),
    "alarm_factors_are_above_one": (("guard.entropy=0.5",), "a factor above 1, or 0 for never"),
    "rollback_scale_needs_rollback": (("guard.rollback_lr_scale=0.5",), "does nothing with guard.rollback=false"),
    "rollback_needs_an_alarm": (
        ("guard.rollback=true", *(f"guard.{name}=0" for name in ("ess", "reference", "entropy", "gradient", "reward"))),
        "every alarm is off",
    ),
    "rollback_needs_checkpoints": (("guard.rollback=true", "checkpoint.every=0"), "no checkpoint to go back to"),
    "what_is_verified_needs_a_share": (
        ("verify.share=0", "verify.rewards=always"), "verify.rewards does nothing with verify.share=0",
    ),
    "rollback_needs_generators": (("guard.rollback=true", "generator.count=0"), "nobody would generate behind it"),
    "checkpoint_signals_are_known": (("checkpoint.signals=[SIGKILL]",), "names 'SIGKILL'; a run can be told"),
    "grace_needs_signals": (("checkpoint.signals=[]", "checkpoint.grace_s=9"), "does nothing with checkpoint"),
    "quantized_rollouts_need_vllm_on_a_gpu": (("generator.quantization=fp8",), "is done by vLLM"),
    "a_broadcast_is_loaded_as_it_comes": (("weights.broadcast=true",), "weights.broadcast is for vLLM"),
    "guesses_are_verified_on_a_gpu": (
        ("generator.engine=vllm", "vllm.speculative={method: ngram}"), "verifies guessed tokens at a temperature",
    ),
    "guessed_tokens_are_samples": (
        ("generator.engine=vllm", "vllm.speculative={method: ngram, rejection_sample_method: synthetic}"),
        "keeps tokens that are no samples of the model",
    ),
    "name_is_a_folder": (("name=a/b",), "it names a folder"),
    "model_is_named": (("model.path=''",), "model.path is not set"),
    "template_time_is_a_time": (("model.template_time=noon",), "write it as 2026-01-31T12:00"),
    "task_is_named": (("task.name=''",), "task.name is not set"),
    "reward_weights_are_finite": (("task.reward_weights.format=.nan",), "a weight is a finite number"),
    "temperature_is_sampled_at": (
        ("evaluation.temperature=0.001",), "engines sample at 0.01 or above, or greedily with 0",
    ),
    "recipe_is_named": (("recipe.name=3",), "recipe.name is not set"),
    "depth_lies_within_the_bound": (("staleness.pipeline_depth=9",), "it must lie between 1 and 2"),
    "target_ess_has_a_depth_to_move": (
        ("staleness.target_ess=0.5", "staleness.max_staleness=0"), "one batch deep whatever the ESS",
    ),
    "window_belongs_to_pace": (("staleness.policy=wait", "staleness.window=0.5"), "has no window"),
    "keep_steps_needs_checkpoints": (("buffer.keep_steps=3", "checkpoint.every=0"), "deletes nothing before"),
    "the_choice_reads_its_settings": (("sampler.candidates=4",), "sampler.candidates does nothing without"),
    "a_band_is_read": (("sampler.choose=band", "sampler.low=0.9"), "low must be below high"),
    "a_band_of_groups_has_groups": (("sampler.refuse_outside=true", "batch.group_size=1"), "always lies outside"),
    "samples_read_their_settings": (("sampler.min_samples=3",), "sampler.min_samples does nothing without"),
    "turns_read_their_settings": (("sampler.turns_slack=2",), "sampler.turns_slack does nothing without"),
    "starts_read_their_settings": (("sampler.start=field",), "needs sampler.start_field"),
    "what_is_forgotten_is_used": (("sampler.half_life=3",), "sampler.half_life does nothing without"),
    "the_pool_has_a_source": (("pool.max_uses=3",), "pool.max_uses does nothing with pool.source=none"),
    "demonstrations_come_from_a_file": (("pool.source=demonstrations",), "needs pool.file"),
    "the_pool_gives_what_its_place_takes": (
        ("pool.source=successes", "pool.place=replace"), "would take the place of every fresh group",
    ),
    "the_pool_keeps_by_what_it_draws_by": (
        ("pool.source=best", "pool.priority=reward"), "pool.priority does nothing with pool.source=best",
    ),
    "the_pool_has_one_amount": (("pool.source=successes", "pool.share=0.5", "pool.rows=2"), "leave one of them out"),
    "the_pool_holds_a_group": (("pool.source=groups", "pool.size=2"), "less than one group"),
    "the_depth_follows_fresh_data": (
        ("pool.source=groups", "staleness.target_ess=0.5"), "which the pool's old rows lower",
    ),
    "limits_end_before_the_timeout": (("wire.frozen_after_s=90",), "a wait ends the run after wire.timeout_s=60"),
    "a_group_fits_a_generator": (("generator.max_sequences=2",), "less than one group"),
    "vllm_settings_need_vllm": (("vllm.kv_cache_mb=9",), "vllm.* does nothing with generator.engine=embedded"),
    "vllm_has_its_own_cache": (("generator.engine=vllm", "generator.kv_cache_mb=9"), "set vllm.kv_cache_mb"),
    "vllm_chooses_its_gpu_itself": (("generator.engine=vllm", "generator.device=cuda:1"), "it is cpu or cuda"),
    "vllm_on_a_cpu_has_no_gpu_settings": (("generator.engine=vllm", "vllm.tensor_parallel=2"), "need GPUs"),
    "head_dtype_needs_half_precision": (("generator.engine=vllm", "vllm.head_dtype=model"), "where all is float32"),
    "gpus_are_chosen_on_cuda_only": (("generator.gpus=0",), "generator.gpus does nothing with generator.device=cpu"),
    "external_trainer_is_placed_by_others": (
        ("trainer.start=external", "trainer.device=cuda", "trainer.gpus=0"), "whoever starts the trainer says where",
    ),
    "external_trainer_is_not_started_again": (("trainer.start=external", "guard.rollback=true"), "leave one of"),
    "start_timeout_needs_an_external_trainer": (("trainer.start_timeout_s=5",), "nobody is waited for"),
    "absent_generators_join_by_themselves": (
        ("generator.start_timeout_s=5",), "the run starts its generators itself",
    ),
    "a_rank_has_one_gpu": (("trainer.device=cuda", "trainer.gpus=0-1"), "each rank has one GPU"),
    "one_cuda_device_holds_one_rank": (("trainer.device=cuda:1", "trainer.ranks=2"), "NCCL takes one rank a GPU"),
    "sharding_needs_ranks": (("trainer.sharding=full",), "nobody to share the weights with"),
    "sharding_excludes_adapters": (
        ("trainer.sharding=full", "trainer.ranks=2", "lora.rank=2"), "cannot be combined with lora.rank=2",
    ),
    "memory_share_needs_a_gpu": (("trainer.memory_share=0.5",), "it is about a GPU's memory"),
    "gpus_are_for_generators_of_the_run": (
        ("generator.device=cuda", "generator.gpus=0", "generator.count=0"), "joining generators name their own device",
    ),
    "cluster_settings_need_ray": (("cluster.generators=4",), "does nothing with cluster.engine=local"),
    "pieces_go_on_alone": (("rollout.window=8",), "rollout.window needs batch.group_size=1 (now "),
    "nodes_need_an_external_trainer": (
        ("trainer.nodes=2", "trainer.ranks=2"), "the run starts its ranks on its own machine",
    ),
    "a_network_needs_ranks_that_others_start": (
        ("trainer.network=10.0.0.0/8",), "does nothing with trainer.start=launcher",
    ),
    "ray_takes_the_place_of_settings": (
        ("cluster.engine=ray", "guard.rollback=true"), "whose ranks are actors of Ray with cluster.engine=ray",
    ),
    "generators_on_ray_have_a_number": (
        ("cluster.engine=ray", "cluster.generators=8..4"), "write it as FEWEST..MOST",
    ),
    "resources_of_ray_can_be_used": (
        ("cluster.engine=ray", "cluster.generator_gpus=1"), "does nothing with generator.device=cpu",
    ),
    "generators_fit_their_gpus": (
        ("generator.device=cuda", "generator.gpus=0-1", "generator.count=3"), "cannot be spread evenly over 2 GPUs",
    ),
    "chosen_gpus_are_shared_by_agreement": (
        ("generator.device=cuda", "generator.gpus=0", "trainer.device=cuda", "trainer.gpus=0"), "would hold both",
    ),
}  # fmt: skip
"""relation -> (words that break it and no earlier one, what is said)"""


@pytest.mark.parametrize("name", [relation.__name__ for relation in RELATIONS])
def test_every_relation_is_refused_with_its_sentence(tmp_path: Path, name: str) -> None:
    words, message = BROKEN[name]
    with pytest.raises(UserError) as refused:
        quick_settings(tmp_path, *words)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("pool.source=successes", "pool.file=x.jsonl"), "pool.file does nothing with pool.source=successes"),
        (
            ("pool.source=demonstrations", "pool.file=x", "pool.max_age=3"),
            "pool.max_age does nothing with pool.source=demonstrations",
        ),
        (("pool.source=successes", "pool.gate=1"), "pool.gate does nothing with pool.place=extra"),
        (("pool.source=successes", "pool.place=join", "pool.share=0.5"), "it is for pool.place=extra"),
        (("pool.source=groups", "pool.place=join"), "pool.source=groups needs pool.place=extra"),
        (("pool.source=successes", "pool.place=join", "pool.gate=1"), "pool.gate does nothing with pool.when=always"),
        (
            ("pool.source=successes", "pool.place=replace", "pool.when=failed", "pool.rows=9"),
            "4 samples that could be replaced",
        ),
        (("pool.source=groups", "pool.above=1"), "pool.above does nothing with pool.source=groups"),
        (("pool.source=priority", "pool.above=-1"), "must be above 0"),
        (("pool.source=groups", "pool.per_problem=2"), "pool.per_problem does nothing with pool.source=groups"),
        (("pool.source=successes", "pool.flush_at=9"), "set pool.max_uses=1"),
        (("pool.source=successes", "pool.flush_at=9", "pool.max_uses=1", "pool.size=4"), "it is never reached"),
        (("pool.source=successes", "pool.flush_at=9", "pool.max_uses=1", "pool.rows=4"), "all rows back at once"),
    ],
)
def test_settings_of_the_pool_that_would_do_nothing_are_refused(
    tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        quick_settings(tmp_path, *words)
