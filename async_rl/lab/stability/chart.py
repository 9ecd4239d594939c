"""Lines on axes as SVG text: enough for a lab's page, which then needs no script and no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, isfinite, log10

COLOURS = (
    "#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b",
    "#e377c2", "#17becf", "#7f7f7f", "#bcbd22", "#003f5c", "#a05195",
)  # fmt: skip
WIDTH, HEIGHT = 380, 240
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 24, 30
MOST_POINTS = 160
"""points of a line; more are averaged"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    label: str
    colour: str
    points: Sequence[tuple[float, float]]
    spread: Sequence[float] = ()
    """half the height of a bar at each point"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    title: str
    x_label: str
    log_x: bool = False
    log_y: bool = False
    from_zero: bool = True
    """the y axis begins at 0 (not with log_y)"""


def chart(axes: Axes, lines: Sequence[Line]) -> str:
    """One SVG figure. Points that are not finite (or not above 0 on a logarithmic axis) are left out."""
    drawn = [(line, _visible(axes, line)) for line in lines]
    xs = [x for _, points in drawn for x, _, _ in points]
    ys = [y + sign * s for _, points in drawn for _, y, s in points for sign in (-1, 1)]
    if not xs:
        return ""
    x_low, x_high = _widened(min(xs), max(xs))
    y_low, y_high = _widened(min(ys), max(ys))
    if axes.from_zero and not axes.log_y:
        y_low = min(0.0, y_low)

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM),
        )

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
        f'aria-label="{escape(axes.title)}">',
        f'<text x="{LEFT}" y="14" class="title">{escape(axes.title)}</text>',
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end">{escape(axes.x_label)}</text>',
    ]
    for value, text in ticks(x_low, x_high, log=axes.log_x):
        x, y = at(value, y_low)
        parts.append(f'<text x="{x:.1f}" y="{y + 13:.1f}" text-anchor="middle">{text}</text>')
    for value, text in ticks(y_low, y_high, log=axes.log_y):
        x, y = at(x_low, value)
        parts.append(f'<path class="grid" d="M{x:.1f} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{x - 4:.1f}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for line, points in drawn:
        parts += _line(line, [(*at(x, y), at(x, y - s)[1], at(x, y + s)[1]) for x, y, s in points])
    return "\n".join([*parts, "</svg>"])


def _line(line: Line, places: Sequence[tuple[float, float, float, float]]) -> list[str]:
    """places: x, y, lower and upper end of the bar, in pixels."""
    if not places:
        return []
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y, _, _ in places)
    parts = [f'<path class="line" stroke="{line.colour}" d="M{path}"><title>{escape(line.label)}</title></path>']
    if len(places) <= 12:
        parts += [f'<circle fill="{line.colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y, _, _ in places]
    bars = [(x, low, high) for x, _, low, high in places if low != high]
    parts += [f'<path class="bar" stroke="{line.colour}" d="M{x:.1f} {a:.1f}V{b:.1f}"/>' for x, a, b in bars]
    return parts


def _visible(axes: Axes, line: Line) -> list[tuple[float, float, float]]:
    """(x, y, half height of the bar), on the axes' scales."""
    spread = line.spread or [0.0] * len(line.points)
    found = [
        (x, y, s)
        for (x, y), s in zip(line.points, spread, strict=True)
        if isfinite(y) and not (axes.log_x and x <= 0) and not (axes.log_y and y <= 0)
    ]
    found = _thinned(found)
    if axes.log_x:
        found = [(log10(x), y, s) for x, y, s in found]
    if axes.log_y:
        found = [(x, log10(y), 0.0) for x, y, _ in found]
    return found


def _thinned(points: list[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    """Means of neighbours, when there are more points than can be seen."""
    step = ceil(len(points) / MOST_POINTS)
    if step <= 1:
        return points
    groups = [points[i : i + step] for i in range(0, len(points), step)]
    return [(sum(p[0] for p in g) / len(g), sum(p[1] for p in g) / len(g), max(p[2] for p in g)) for g in groups]


def _widened(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def ticks(low: float, high: float, *, log: bool) -> list[tuple[float, str]]:
    """(position on the axis, text) of about five round values within low .. high."""
    if log:
        exponents = range(floor(low), ceil(high) + 1)
        found = [(log10(m) + e, f"{m * 10.0**e:g}") for e in exponents for m in (1, 2, 5)]
        inside = [(v, text) for v, text in found if low - 1e-9 <= v <= high + 1e-9]
        return inside[:: max(1, ceil(len(inside) / 5))]
    raw = (high - low) / 4
    size = 10.0 ** floor(log10(raw))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= raw)
    return [(i * step, f"{i * step:g}") for i in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]
