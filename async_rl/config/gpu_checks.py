"""Which GPUs a run may be told to use, and who may share one. As in checks.py: a function a relation."""

from __future__ import annotations

from async_rl.config.derived import generators_fit, gpus_named, shares_gpus
from async_rl.config.settings import Settings
from async_rl.errors import UserError


def gpus_are_chosen_on_cuda_only(s: Settings) -> str:
    for name, gpus, device in (
        ("generator", _generator_gpus(s), s.generator.device),
        ("trainer", _trainer_gpus(s), s.trainer.device),
    ):
        if gpus and device != "cuda":
            why = "has its number in it already" if device.startswith("cuda") else "uses none"
            return f"{name}.gpus does nothing with {name}.device={device}, which {why}; set {name}.device=cuda"
    return ""


def a_rank_has_one_gpu(s: Settings) -> str:
    gpus = _trainer_gpus(s)
    if gpus and len(gpus) != s.trainer.ranks:
        return (
            f"trainer.gpus names {len(gpus)} GPUs ('{s.trainer.gpus}'), but trainer.ranks is {s.trainer.ranks}: each "
            "rank has one GPU; change one of the two"
        )
    return ""


def gpus_are_for_generators_of_the_run(s: Settings) -> str:
    if _generator_gpus(s) and s.generator.count == 0:
        return "generator.gpus does nothing with generator.count=0: joining generators name their own device"
    return ""


def generators_fit_their_gpus(s: Settings) -> str:
    gpus = _generator_gpus(s)
    if gpus and (problem := generators_fit(s, len(gpus))):
        return f"generator.gpus is '{s.generator.gpus}', but {problem}"
    return ""


def chosen_gpus_are_shared_by_agreement(s: Settings) -> str:
    return sharing_problem(s, _generator_gpus(s), _trainer_gpus(s))


def sharing_problem(s: Settings, generators: tuple[int, ...], ranks: tuple[int, ...]) -> str:
    """Why a GPU cannot hold both a generator and the trainer, or an empty text: their shares of its memory decide."""
    both = sorted(set(generators) & set(ranks))
    if not both:
        return ""
    share = s.trainer.memory_share
    named = ",".join(map(str, both))
    if not shares_gpus(s):
        return (
            f"GPU {named} would hold both a generator and the trainer, but trainer.memory_share is 1: all of it; "
            "choose other GPUs (generator.gpus, trainer.gpus), or set trainer.memory_share=0.5"
            + (" and vllm.memory_share=0.4" if s.generator.engine == "vllm" else "")
        )
    if s.generator.engine == "vllm" and s.vllm.memory_share + share > 1:
        return (
            f"vllm.memory_share={s.vllm.memory_share:g} and trainer.memory_share={share:g} are more than GPU {named} "
            "has; lower one, e.g. vllm.memory_share=0.4 trainer.memory_share=0.5"
        )
    return ""


def check_shared(s: Settings, generators: tuple[int, ...], ranks: tuple[int, ...]) -> None:
    """Raises UserError when generators and trainer cannot share the GPUs they have in common."""
    if problem := sharing_problem(s, generators, ranks):
        raise UserError(problem)


def _generator_gpus(s: Settings) -> tuple[int, ...]:
    return gpus_named(s.generator.gpus, "generator.gpus")


def _trainer_gpus(s: Settings) -> tuple[int, ...]:
    return gpus_named(s.trainer.gpus, "trainer.gpus")


GPU_RELATIONS = (
    gpus_are_chosen_on_cuda_only,
    a_rank_has_one_gpu,
    gpus_are_for_generators_of_the_run,
    generators_fit_their_gpus,
    chosen_gpus_are_shared_by_agreement,
)
