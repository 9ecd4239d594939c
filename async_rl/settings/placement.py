"""Which GPUs a run asks for, read from its settings alone; what this machine has is looked at later
(launch/placement.py)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from async_rl.errors import UserError

if TYPE_CHECKING:
    from async_rl.settings.run import Settings

MOST_GPUS = 1024
_PART = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?")


def gpus_named(text: str, setting: str) -> tuple[int, ...]:
    """The numbers in `0-3,6`, in order; nothing for an empty text. `setting`: for messages. Raises UserError."""
    if not text.strip():
        return ()
    found: list[int] = []
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise UserError(f"{setting} is '{text}'; write numbers of GPUs like 0-3 or 0,2")
        first = int(match[1])
        last = int(match[2] or first)
        if last < first:
            raise UserError(f"{setting} is '{text}', but {first}-{last} runs backwards; write {last}-{first}")
        found += range(first, last + 1)
    twice = sorted({gpu for gpu in found if found.count(gpu) > 1})
    if twice:
        raise UserError(f"{setting} is '{text}': GPU {twice[0]} stands there twice")
    return tuple(found)


def tensor_parallel(settings: Settings) -> int:
    """GPUs of one generator."""
    return settings.vllm.tensor_parallel if settings.generator.engine == "vllm" else 1


def shares_gpus(settings: Settings) -> bool:
    """Whether generators and trainer may be on the same GPU."""
    return settings.trainer.memory_share < 1


def generators_fit(settings: Settings, gpus: int) -> str:
    """Why the run's generators cannot be laid over so many GPUs, or an empty text."""
    count, each = settings.generator.count, tensor_parallel(settings)
    if settings.generator.engine == "vllm":
        if count * each != gpus:
            return (
                f"generator.count={count} with vllm.tensor_parallel={each} needs {count * each} GPUs, not {gpus}; "
                "change one of the three"
            )
    elif count % gpus:
        return f"generator.count={count} cannot be spread evenly over {gpus} GPUs; change one of the two"
    return ""


def check_placement(settings: Settings) -> None:
    """Settings of GPUs that contradict each other or would do nothing. Raises UserError."""
    chosen, trainer = settings.generator, settings.trainer
    generators = gpus_named(chosen.gpus, "generator.gpus")
    ranks = gpus_named(trainer.gpus, "trainer.gpus")
    for name, gpus, device in (("generator", generators, chosen.device), ("trainer", ranks, trainer.device)):
        if gpus and device != "cuda":
            why = "has its number in it already" if device.startswith("cuda") else "uses none"
            raise UserError(f"{name}.gpus does nothing with {name}.device={device}, which {why}; set {name}.device=cuda")
    _check_trainer(settings, ranks)
    if generators and chosen.count == 0:
        raise UserError("generator.gpus does nothing with generator.count=0: joining generators name their own device")
    if generators and (problem := generators_fit(settings, len(generators))):
        raise UserError(f"generator.gpus is '{chosen.gpus}', but {problem}")
    check_shared(settings, generators, ranks)


def _check_trainer(settings: Settings, gpus: tuple[int, ...]) -> None:
    trainer = settings.trainer
    cuda = trainer.device.startswith("cuda")
    if trainer.start == "external":
        for name, value, default in (("gpus", trainer.gpus, ""), ("memory_share", trainer.memory_share, 1.0)):
            if value != default:
                raise UserError(
                    f"trainer.{name} does nothing with trainer.start=external: whoever starts the trainer says where it "
                    f"runs; leave trainer.{name} out"
                )
        if settings.guard.rollback:
            raise UserError(
                "guard.rollback starts the trainer again, which trainer.start=external leaves to others; leave one of the "
                "two out"
            )
    elif trainer.start_timeout_s != type(trainer).start_timeout_s:
        raise UserError("trainer.start_timeout_s does nothing with trainer.start=launcher: nobody is waited for")
    if gpus and len(gpus) != trainer.ranks:
        raise UserError(
            f"trainer.gpus names {len(gpus)} GPUs ('{trainer.gpus}'), but trainer.ranks is {trainer.ranks}: each rank has "
            "one GPU; change one of the two"
        )
    if cuda and trainer.device != "cuda" and trainer.ranks > 1:
        raise UserError(
            f"trainer.device is '{trainer.device}', but trainer.ranks is {trainer.ranks}, and NCCL takes one rank a GPU; "
            "set trainer.device=cuda, and trainer.gpus to choose"
        )
    if trainer.sharding != "none" and trainer.ranks == 1:
        raise UserError(
            f"trainer.sharding={trainer.sharding} does nothing with trainer.ranks=1: there is nobody to share the weights "
            "with; set trainer.ranks, or leave trainer.sharding out"
        )
    if trainer.sharding != "none" and settings.lora.rank:
        raise UserError(
            f"trainer.sharding={trainer.sharding} cannot be combined with lora.rank={settings.lora.rank} yet: adapters are "
            "added to whole weights; set trainer.sharding=none, which needs no optimizer memory for frozen weights"
        )
    if not cuda and trainer.memory_share != 1:
        raise UserError(f"trainer.memory_share does nothing with trainer.device={trainer.device}: it is about a GPU's memory")


def check_shared(settings: Settings, generators: tuple[int, ...], ranks: tuple[int, ...]) -> None:
    """One GPU for both only where their shares of its memory say so. Raises UserError."""
    both = sorted(set(generators) & set(ranks))
    if not both:
        return
    share = settings.trainer.memory_share
    named = ",".join(map(str, both))
    if not shares_gpus(settings):
        raise UserError(
            f"GPU {named} would hold both a generator and the trainer, but trainer.memory_share is 1: all of it; choose "
            "other GPUs (generator.gpus, trainer.gpus), or set trainer.memory_share=0.5"
            + (" and vllm.memory_share=0.4" if settings.generator.engine == "vllm" else "")
        )
    if settings.generator.engine == "vllm" and settings.vllm.memory_share + share > 1:
        raise UserError(
            f"vllm.memory_share={settings.vllm.memory_share:g} and trainer.memory_share={share:g} are more than GPU {named} "
            "has; lower one, e.g. vllm.memory_share=0.4 trainer.memory_share=0.5"
        )
