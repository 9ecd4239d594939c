"""`async-rl simulate`: forecast speed and staleness of a configuration, and recommend a better one."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from random import Random
from typing import Any

from async_rl.config import Settings, load_settings
from async_rl.errors import UserError
from async_rl.instruments.simulate import (
    MESSAGE_S,
    UPDATE_S,
    Forecast,
    Simulation,
    Workload,
    lognormal_groups,
)
from async_rl.run_folder import RunFolder

ENOUGH = 1.1
"""a configuration is fast enough when its step takes at most so many times as long as the fastest one's"""
MOST_GENERATORS = 10_000
HEADER = "  step s  tokens/s  staleness      idle: trainer  generators  held up  dropped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Variation:
    """One configuration of a sweep and its forecast."""

    what: str
    settings: Settings
    forecast: Forecast


def simulate(arguments: argparse.Namespace) -> int:
    """Print the forecast, and the sweeps around it. Raises UserError."""
    settings = load_settings(arguments.config, arguments.overrides)
    if arguments.steps < 5:
        raise UserError(f"--steps is {arguments.steps}; at least 5 are needed for a steady state")
    if arguments.generators is not None:
        if not 1 <= arguments.generators <= MOST_GENERATORS:
            raise UserError(f"--generators is {arguments.generators}; it must lie between 1 and {MOST_GENERATORS}")
        settings = replace(settings, generator=replace(settings.generator, count=arguments.generators))
    work = given(arguments, settings)

    def forecast(chosen: Settings) -> Forecast:
        return Simulation(chosen, work, arguments.steps, Random(arguments.seed)).run()

    first = forecast(settings)
    sweeps = {} if arguments.one else sweep(settings, forecast)
    if arguments.json:
        found = {what: {v.what: asdict(v.forecast) for v in some} for what, some in sweeps.items()}
        print(json.dumps({"forecast": asdict(first), **found}))
        return 0
    print("\n".join([*describe(work), "", HEADER, line(first, "as configured"), *histogram(first)]))
    for what, some in sweeps.items():
        print("\n".join(["", what, HEADER, *(line(v.forecast, v.what) for v in some)]))
    if sweeps:
        print("\n" + recommend(settings, sweeps))
    return 0


def given(arguments: argparse.Namespace, settings: Settings) -> Workload:
    """The workload measured in the run of `--from`; numbers among the options replace its own. Raises UserError."""
    if arguments.run is not None:
        from async_rl.instruments.workload import workload_of  # opens a store

        work = workload_of(RunFolder(arguments.run))
    elif None in (arguments.length, arguments.decode_s, arguments.train_s):
        raise UserError("simulate needs the times of a run (--from RUN), or --length, --decode-s and --train-s")
    else:
        work = Workload(
            groups=(), decode_s=0.0, decode_s_per_sequence=0.0, episode_s=0.0, train_s=(), update_s=UPDATE_S,
            message_s=MESSAGE_S,
        )  # fmt: skip
    if arguments.length is not None:
        mean, variation = _two("--length", arguments.length)
        size = settings.batch.group_size
        work = replace(work, groups=lognormal_groups(mean=mean, variation=variation, size=size, seed=arguments.seed))
    if arguments.decode_s is not None:
        step, sequence = _two("--decode-s", arguments.decode_s)
        work = replace(work, decode_s=step, decode_s_per_sequence=sequence)
    for name in ("train_s", "update_s"):
        value = getattr(arguments, name)
        if value is not None and not 0 <= value < 1e6:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be a number of seconds, 0 or more")
    if arguments.train_s is not None:
        work = replace(work, train_s=(arguments.train_s,))
    if arguments.update_s is not None:
        work = replace(work, update_s=arguments.update_s)
    return work


def sweep(settings: Settings, forecast: Callable[[Settings], Forecast]) -> dict[str, list[Variation]]:
    """Forecasts with one setting varied at a time, all others as configured."""
    stale = settings.staleness
    deepest = stale.max_staleness + 1
    depths = sorted({1.0, 1.5, 2.0, 3.0, float(deepest), stale.pipeline_depth or float(deepest)})
    count = settings.generator.count
    varied: dict[str, list[tuple[str, Settings]]] = {
        "against max_staleness, the pipeline as deep as it allows": [
            (f"max_staleness {k}", _staleness(settings, max_staleness=k, pipeline_depth=0.0, target_ess=0.0))
            for k in sorted({0, 1, 2, 4, 8, stale.max_staleness})
        ],
        f"against pipeline_depth, max_staleness {stale.max_staleness}": [
            (f"pipeline_depth {depth:g}", _staleness(settings, pipeline_depth=depth))
            for depth in depths
            if depth <= deepest
        ],
        "against generators": [
            (f"generators {n}", replace(settings, generator=replace(settings.generator, count=n)))
            for n in sorted({max(1, count // 4), max(1, count // 2), count, 2 * count, 4 * count})
            if n <= MOST_GENERATORS
        ],
        "against policy": [
            (f"policy {policy}", _staleness(settings, policy=policy)) for policy in ("pace", "wait", "drop")
        ],
    }
    if stale.policy == "pace":
        varied["against window"] = [(f"window {w:g}", _staleness(settings, window=w)) for w in (0.0, 0.3, 0.6, 1.0)]
    return {
        what: [Variation(what=name, settings=chosen, forecast=forecast(chosen)) for name, chosen in some]
        for what, some in varied.items()
    }


def recommend(settings: Settings, sweeps: dict[str, list[Variation]]) -> str:
    """The configuration with the freshest data among the fast ones, and whether more generators would help."""
    some = [v for name, found in sweeps.items() if name.startswith(("against max_s", "against pipe")) for v in found]
    fastest = min(v.forecast.step_s for v in some)
    knee = min((v for v in some if v.forecast.step_s <= ENOUGH * fastest), key=lambda v: v.forecast.lag_mean)
    f, stale = knee.forecast, knee.settings.staleness
    depth = stale.pipeline_depth or stale.max_staleness + 1
    text = [
        f"recommended: staleness.max_staleness={stale.max_staleness} staleness.pipeline_depth={depth:g}",
        f"  a step takes {f.step_s:.3g} s, the fastest of all takes {fastest:.3g} s; of those within "
        f"{ENOUGH - 1:.0%} of that it trains on the freshest data, {f.lag_mean:.2f} steps old on average",
    ]
    generators = sweeps["against generators"]
    best = min(v.forecast.step_s for v in generators)
    enough = min(
        (v for v in generators if v.forecast.step_s <= ENOUGH * best), key=lambda v: v.settings.generator.count
    )
    count = enough.settings.generator.count
    if count > settings.generator.count:
        text.append(f"  generators are what it waits for: with generator.count={count} a step takes {best:.3g} s")
    elif count < settings.generator.count:
        text.append(f"  generator.count={count} would do: a step then takes {enough.forecast.step_s:.3g} s")
    else:
        text.append("  more generators would not help: the trainer, or the bound on staleness, is what it waits for")
    return "\n".join(text)


def describe(work: Workload) -> list[str]:
    train = sum(work.train_s) / len(work.train_s)
    return [
        f"episodes of {work.mean_length:.1f} policy tokens on average, {work.episode_s:.3g} s beside decoding",
        f"a decoding step takes {work.decode_s:.3g} s + {work.decode_s_per_sequence:.3g} s a sequence, a training step "
        f"{train:.3g} s, new weights reach generators after {work.update_s:.3g} s",
        "evaluations are left out; processes that share processors are as fast as they were measured side by side",
    ]


def line(f: Forecast, what: str) -> str:
    dropped = f"{f.groups_dropped}" + (f" ({f.length_bias:.2f} x as long)" if f.length_bias is not None else "")
    return (
        f"{f.step_s:8.4f}  {f.tokens_per_s:8.0f}  {f.lag_mean:4.2f} / {f.lag_max:<3d}  {f.trainer_idle:13.0%}  "
        f"{f.generator_idle:10.0%}  {f.held_up:7d}  {dropped:<7s}  {what}"
    )


def histogram(f: Forecast) -> list[str]:
    """Share of the trained tokens by staleness."""
    return ["", "staleness of trained tokens, steps"] + [
        f"  {lag:3d}  {share:6.1%}  {'#' * round(40 * share)}" for lag, share in f.lag_share.items()
    ]


def _staleness(settings: Settings, **changes: Any) -> Settings:
    return replace(settings, staleness=replace(settings.staleness, **changes))


def _two(name: str, text: str) -> tuple[float, float]:
    """Two numbers with a comma between. Raises UserError."""
    parts: Sequence[str] = text.split(",")
    try:
        first, second = map(float, parts)
    except ValueError:
        raise UserError(f"{name} is '{text}'; it must be two numbers with a comma between") from None
    if not (0 < first < 1e9 and 0 <= second < 1e9):
        raise UserError(f"{name} is '{text}'; the first number must be above 0, the second not below it")
    return first, second
