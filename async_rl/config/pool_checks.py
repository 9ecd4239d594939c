"""Relations between the settings of the experience pool, and to others: what contradicts or would do nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

from async_rl.config.pool import PoolSettings
from async_rl.config.settings import Settings

_DEFAULT = PoolSettings()


def _set(s: Settings, *names: str) -> str:
    """The first of these settings of the pool that has not its default; empty: there is none."""
    return next((name for name in names if getattr(s.pool, name) != getattr(_DEFAULT, name)), "")


def the_pool_has_a_source(s: Settings) -> str:
    others = [one.name for one in fields(PoolSettings) if one.name != "source"]
    if s.pool.source == "none" and (name := _set(s, *others)):
        return f"pool.{name} does nothing with pool.source=none; set pool.source, e.g. successes"
    return ""


def demonstrations_come_from_a_file(s: Settings) -> str:
    pool = s.pool
    if pool.source == "demonstrations" and not pool.file:
        return "pool.source=demonstrations needs pool.file: rows with `prompt` and `answer`, or `messages`"
    if pool.source != "demonstrations" and pool.file:
        return f"pool.file does nothing with pool.source={pool.source}; set pool.source=demonstrations"
    if pool.source == "demonstrations" and (name := _set(s, "max_age", "size", "per_problem")):
        return f"pool.{name} does nothing with pool.source=demonstrations: all of pool.file is kept, and has no age"
    return ""


def the_pool_gives_what_its_place_takes(s: Settings) -> str:
    pool = s.pool
    if pool.place == "extra" and (name := _set(s, "when", "gate")):
        return f"pool.{name} does nothing with pool.place=extra: extra rows come at every step; see join, replace"
    if pool.place != "extra" and (name := _set(s, "share", "flush_at")):
        return f"pool.{name} does nothing with pool.place={pool.place}; it is for pool.place=extra"
    if pool.place != "extra" and pool.source == "groups":
        return f"pool.place={pool.place} takes trajectories one by one; pool.source=groups needs pool.place=extra"
    if pool.place in ("replace", "instead") and pool.when == "always":
        return f"pool.place={pool.place} would take the place of every fresh group; set pool.when=failed or no_signal"
    if pool.place != "extra" and pool.when == "always" and _set(s, "gate"):
        return "pool.gate does nothing with pool.when=always; set pool.when=failed or no_signal"
    if pool.place == "replace" and pool.rows > s.batch.group_size:
        return f"pool.rows is {pool.rows}, but a group has {s.batch.group_size} samples that could be replaced"
    return ""


def the_pool_keeps_by_what_it_draws_by(s: Settings) -> str:
    pool = s.pool
    if pool.source != "priority" and _set(s, "priority"):
        return f"pool.priority does nothing with pool.source={pool.source}; set pool.source=priority"
    by_recency = pool.source == "priority" and pool.priority == "recency"
    if (pool.source in ("groups", "demonstrations") or by_recency) and _set(s, "above"):
        what = "pool.priority=recency" if by_recency else f"pool.source={pool.source}"
        return f"pool.above does nothing with {what}, which keeps all"
    if pool.source == "groups" and _set(s, "per_problem"):
        return "pool.per_problem does nothing with pool.source=groups, which keeps whole groups; see pool.size"
    if pool.source == "priority" and pool.above < 0:
        return f"pool.above is {pool.above:g}; what is drawn in proportion must be above 0"
    return ""


def the_pool_has_one_amount(s: Settings) -> str:
    pool = s.pool
    if pool.share and _set(s, "rows"):
        return "pool.share and pool.rows both say how much comes back; leave one of them out"
    if not pool.flush_at:
        return ""
    if pool.source == "groups" or pool.share or _set(s, "rows"):
        return "pool.flush_at brings all rows back at once; leave pool.share and pool.rows out, and pool.source=groups"
    if pool.max_uses != 1:
        return "pool.flush_at empties the pool when it comes back: set pool.max_uses=1"
    if pool.flush_at > pool.size:
        return f"pool.flush_at is {pool.flush_at}, but pool.size={pool.size} trajectories are kept; it is never reached"
    return ""


def the_pool_holds_a_group(s: Settings) -> str:
    pool, group = s.pool, s.batch.group_size
    if pool.source == "groups" and pool.size < group:
        return f"pool.size is {pool.size}, less than one group (batch.group_size={group}); nothing would come back"
    return ""


def the_depth_follows_fresh_data(s: Settings) -> str:
    if s.staleness.target_ess and s.pool.source not in ("none", "demonstrations"):
        return (
            "staleness.target_ess moves the pipeline by the ESS of the batches, which the pool's old rows lower "
            "whatever the depth; leave one of the two out"
        )
    return ""


POOL_RELATIONS: tuple[Callable[[Settings], str], ...] = (
    the_pool_has_a_source,
    demonstrations_come_from_a_file,
    the_pool_gives_what_its_place_takes,
    the_pool_keeps_by_what_it_draws_by,
    the_pool_has_one_amount,
    the_pool_holds_a_group,
    the_depth_follows_fresh_data,
)
