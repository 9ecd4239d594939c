"""The end of a run, in a table and in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from async_rl.buffer.failures import sentence
from async_rl.observe.pool_lines import pool_rows

CHANGE = 0.06
"""of the held-out reward, from which on it is called one: about two standard errors of an evaluation of 256 episodes"""


def in_steps(number: int) -> str:
    return f"{number} step{'s' * (number > 1)}"


def summary_rows(s: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (
            "held-out reward",
            f"{s['reward_eval_first']:.3f} before, {s['reward_eval_last']:.3f} after {in_steps(s['steps'])}"
            f"{failed_episodes(s)}",
        ),
        ("staleness", f"mean {s['lag_mean']:.2f}, max {s['lag_max']}, bound {s['max_staleness']} steps"),
        *pool_rows(s),
        *staleness_rows(s),
        ("effective sample size", f"{s['ess_mean']:.3f} of the batch on average"),
        (
            "time",
            f"{s['seconds']:.1f} s of training steps ({s['seconds_training']:.1f} s training, "
            f"{s['seconds_generating']:.1f} s generating), {s['seconds_with_start']:.1f} s in all",
        ),
        ("overlap", f"{s['overlap_efficiency']:.2f} (1 when the slower side never waits)"),
        ("tokens", f"{s['tokens_generated']} generated, {s['tokens_trained']} trained"),
        (
            "groups",
            f"{s['groups_admitted']} admitted, {s['groups_trained']} trained, {s['groups_refused']} refused, "
            f"{s['trajectories_failed']} trajectories failed",
        ),
        *([("failed because", reasons)] if (reasons := sentence(s.get("failures", {}))) else []),
        *alarm_rows(s),
        ("weights", weights_checked(s["canary"])),
        *([("not trained", left)] if (left := s.get("not_adapted")) else []),
        ("model", str(s["model"])),
    ]


def alarm_rows(s: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Signs of a collapse, and that the run went back."""
    rows = [("went back", back["text"])] if (back := s.get("rollback")) else []
    return rows + [
        (f"ALARM {alarm['signal']}", f"at step {alarm['step']}: {alarm['reason']}") for alarm in s.get("alarms", ())
    ]


def staleness_rows(s: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What keeping the bound has cost."""
    rows = []
    held, dropped = s["held_up"], s["dropped"]
    if held.get("batches"):
        by = [f"{name.removeprefix('by/')} {count:g}" for name, count in held.items() if name.startswith("by/")]
        what = f"{held['batches']:g} batches waited {held['seconds']:.1f} s for running groups ({', '.join(by)})"
        rows.append(("held up", what))
    if dropped.get("groups"):
        what = f"{dropped['groups']:g} groups too old ({dropped['tokens']:g} tokens), their problems asked again"
        rows.append(("dropped", what))
    return rows


def length_bias(s: Mapping[str, Any]) -> str:
    """What dropping did to the data, in words."""
    dropped = s["dropped"]
    if not dropped.get("groups"):
        return ""
    if "len_bias" not in dropped:
        return f" {dropped['groups']:g} groups were dropped as too old; how long they were is not known."
    return (
        f" {dropped['groups']:g} groups were dropped as too old: {dropped['len_mean']:.0f} policy tokens a "
        f"trajectory, as far as generated, against {dropped['len_trained']:.0f} trained ({dropped['len_bias']:.2f} x)."
    )


def weights_checked(canary: Mapping[str, Any]) -> str:
    """How often generators were seen to hold what was published."""
    text = f"{canary['checked']} loads checked, log-probs differed by {canary['max_difference']:.1e} nats at most"
    if canary["unchecked"]:
        text += f"; NEVER CHECKED: {', '.join(canary['unchecked'])}"
    elif not canary["checked"]:
        text += "; NO GENERATOR WAS CHECKED"
    return text


def failed_episodes(s: Mapping[str, Any]) -> str:
    """How many held-out episodes failed, in words."""
    first, last = s.get("eval_failed_first", 0), s.get("eval_failed_last", 0)
    return f"; {first} episodes before and {last} after failed and are not counted" if first or last else ""


def learning(s: Mapping[str, Any]) -> tuple[str, str]:
    """(whether the model learned, the interval of the gain); the latter is empty unless the interval contains 0."""
    interval = s.get("reward_eval_gain")
    if interval is None:  # a run of an earlier version
        gain = s["reward_eval_last"] - s["reward_eval_first"]
        return "learned" if gain > CHANGE else "got worse" if gain < -CHANGE else "shows no clear change", ""
    low, high = interval
    if low > 0 or high < 0:
        return "learned" if low > 0 else "got worse", ""
    same = ", which all earned the same" if low == high else ""
    return "shows no clear change", f" (gain {low:.2f} to {high:.2f}, 95 % of a bootstrap over episodes{same})"


def conclusion(s: Mapping[str, Any]) -> str:
    """Whether it learned, how stale the data were, and what running side by side saved."""
    learned, gain = learning(s)
    serial = s["seconds_training"] + s["seconds_generating"]
    saved = f"generating and training in turn would have taken {serial:.0f} s, side by side {s['seconds']:.0f} s"
    if serial <= s["seconds"]:
        saved += ": nothing was saved"
    stale = (
        f"It trained on data {s['lag_mean']:.1f} steps old on average and never more than {s['lag_max']} "
        f"(allowed: {s['max_staleness']})."
    )
    return (
        f"The model {learned}: held-out reward {s['reward_eval_first']:.2f} -> {s['reward_eval_last']:.2f}{gain}. "
        f"{stale}{length_bias(s)} Time: {saved}."
    )
