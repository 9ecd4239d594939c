"""What contradicts, or would do nothing, among the settings of the sampler. As in checks.py: a function a relation."""

from __future__ import annotations

from dataclasses import fields

from async_rl.config.sampler import SamplerSettings
from async_rl.config.settings import Settings

DEFAULT = SamplerSettings()


def _idle(s: Settings, names: tuple[str, ...], needs: str) -> str:
    """The first of these settings that is set, though nothing reads it without what it needs."""
    for name in names:
        if getattr(s.sampler, name) != getattr(DEFAULT, name):
            return f"sampler.{name} does nothing without {needs}; set that, or leave sampler.{name} out"
    return ""


def the_choice_reads_its_settings(s: Settings) -> str:
    choose = s.sampler.choose
    if choose not in ("band", "thompson", "curriculum") and (
        problem := _idle(s, ("candidates",), "sampler.choose=band, thompson or curriculum")
    ):
        return problem
    if choose != "thompson" and (problem := _idle(s, ("value",), "sampler.choose=thompson")):
        return problem
    if choose != "ucb" and (
        problem := _idle(s, ("source_field", "ucb_window", "ucb_temperature"), "sampler.choose=ucb")
    ):
        return problem
    names = ("target_begin", "target_end", "target_groups")
    return _idle(s, names, "sampler.choose=curriculum") if choose != "curriculum" else ""


def a_band_is_read(s: Settings) -> str:
    if s.sampler.low >= s.sampler.high:
        return f"sampler.low is {s.sampler.low:g} and sampler.high {s.sampler.high:g}; low must be below high"
    if s.sampler.choose != "band" and not s.sampler.refuse_outside:
        return _idle(s, ("low", "high"), "sampler.choose=band or sampler.refuse_outside=true")
    return ""


def a_band_of_groups_has_groups(s: Settings) -> str:
    if s.sampler.refuse_outside and s.batch.group_size == 1:
        return (
            "sampler.refuse_outside looks at the success of a group, and batch.group_size is 1: a single sample always "
            "lies outside; raise batch.group_size"
        )
    return ""


def samples_read_their_settings(s: Settings) -> str:
    chosen = s.sampler
    if chosen.samples != "adaptive" and (problem := _idle(s, ("adaptive_above",), "sampler.samples=adaptive")):
        return problem
    if chosen.samples != "gvm" and (problem := _idle(s, ("max_samples",), "sampler.samples=gvm")):
        return problem
    if chosen.samples == "fixed":
        return _idle(s, ("min_samples",), "sampler.samples=adaptive or gvm")
    if chosen.min_samples > s.batch.group_size:
        return (
            f"sampler.min_samples is {chosen.min_samples}, more than batch.group_size={s.batch.group_size}; lower it, "
            "or raise batch.group_size"
        )
    if chosen.samples == "gvm" and 0 < chosen.max_samples < s.batch.group_size:
        return (
            f"sampler.max_samples is {chosen.max_samples}, less than batch.group_size={s.batch.group_size}, the mean "
            "of all groups; raise it"
        )
    return ""


def turns_read_their_settings(s: Settings) -> str:
    return _idle(s, ("turns_slack",), "sampler.turns=adaptive") if s.sampler.turns == "fixed" else ""


def starts_read_their_settings(s: Settings) -> str:
    chosen = s.sampler
    if chosen.start == "none":
        names = ("start_share", "start_success", "start_attempts", "start_min", "start_max")
        return _idle(s, ("start_field", "start_place", "start_instruction", *names), "sampler.start")
    if chosen.start_place != "prompt" and (problem := _idle(s, ("start_instruction",), "sampler.start_place=prompt")):
        return problem
    if chosen.start != "field":
        if problem := _idle(s, ("start_field", "start_place"), "sampler.start=field"):
            return problem
    elif not chosen.start_field:
        return (
            "sampler.start=field needs sampler.start_field: the field of the data with the text that answers begin with"
        )
    if chosen.start_min > chosen.start_max:
        return (
            f"sampler.start_min is {chosen.start_min:g} and sampler.start_max {chosen.start_max:g}; the share of a "
            "start is drawn between the two"
        )
    return ""


def what_is_forgotten_is_used(s: Settings) -> str:
    chosen = s.sampler
    reads = chosen.choose in ("band", "thompson", "curriculum") or chosen.samples != "fixed"
    reads |= chosen.start != "none" and (chosen.start_success < 1 or chosen.start_attempts > 0)
    if reads:
        return ""
    if problem := _idle(s, ("half_life",), "a choice, samples or starts that follow the success of problems"):
        return problem
    idle = chosen.choose == "order" and chosen.turns == "fixed" and not chosen.refuse_outside and chosen.start == "none"
    return _idle(s, ("success",), "sampler.choose, samples, turns, start or refuse_outside") if idle else ""


def uses_feedback(chosen: SamplerSettings) -> bool:
    """Whether anything of the sampler is on."""
    plain = {"success", "half_life"}
    return any(getattr(chosen, f.name) != getattr(DEFAULT, f.name) for f in fields(chosen) if f.name not in plain)


def largest_group(s: Settings) -> int:
    """Most samples that a group can have."""
    if s.sampler.samples != "gvm":
        return s.batch.group_size
    return s.sampler.max_samples or 2 * s.batch.group_size


SAMPLER_RELATIONS = (
    the_choice_reads_its_settings,
    a_band_is_read,
    a_band_of_groups_has_groups,
    samples_read_their_settings,
    turns_read_their_settings,
    starts_read_their_settings,
    what_is_forgotten_is_used,
)
