"""Charts as SVG in the page's own colours, so that they follow light and dark and need no other file."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 12, 12, 40
COLOURS = 8  # --s0 … --s7 of the page


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Args:
        label: for the legend and the tooltips.
        points: (x, y); points that are not finite are left out.
        colour: which of the page's.
        dashed: drawn thin and dashed, for what the others are compared with.
    """

    label: str
    points: Sequence[tuple[float, float]]
    colour: int
    dashed: bool = False


class _Axes:
    """The mapping from values to the picture, and the ticks."""

    def __init__(self, xs: list[float], ys: list[float], log_y: bool, y_from_zero: bool) -> None:
        self.log_y = log_y
        self.x0, self.x1 = min(xs), max(xs)
        if self.x0 == self.x1:
            self.x0, self.x1 = self.x0 - 0.5, self.x1 + 0.5
        low, high = min(ys), max(ys)
        if log_y:
            low, high = math.floor(math.log10(low)), math.ceil(math.log10(high))
        elif y_from_zero:
            low = min(0.0, low)
        if low == high:
            high = low + 1
        self.y_ticks = [float(k) for k in range(int(low), int(high) + 1)] if log_y else ticks(low, high)
        self.y0, self.y1 = min(low, self.y_ticks[0]), max(high, self.y_ticks[-1])
        if len(self.y_ticks) > 7:
            self.y_ticks = self.y_ticks[:: math.ceil(len(self.y_ticks) / 6)]

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        value = math.log10(value) if self.log_y else value
        return HEIGHT - _BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - _TOP - _BOTTOM)

    def frame(self, x_ticks: Sequence[tuple[float, str]], x_label: str, y_label: str) -> list[str]:
        parts = []
        for tick in self.y_ticks:
            y = self.y(10**tick if self.log_y else tick)
            text = shown(10**tick if self.log_y else tick)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
        for value, text in x_ticks:
            place = f'x="{self.x(value):.1f}" y="{HEIGHT - _BOTTOM + 14}"'
            parts.append(f'<text class="tick" {place} text-anchor="middle">{escape(text)}</text>')
        middle = _LEFT + (WIDTH - _LEFT - _RIGHT) / 2
        parts.append(
            f'<text class="label" x="{middle:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
        )
        centre = _TOP + (HEIGHT - _TOP - _BOTTOM) / 2
        parts.append(
            f'<text class="label" transform="translate(11 {centre:.0f}) rotate(-90)" text-anchor="middle">'
            f"{escape(y_label)}</text>"
        )
        return parts


def line_chart(
    lines: list[Line],
    x_label: str,
    y_label: str,
    log_y: bool = False,
    y_from_zero: bool = True,
    x_ticks: Sequence[tuple[float, str]] | None = None,
) -> str:
    """Return a chart of lines with their points, or nothing if there are no values."""
    kept = [_finite(line, log_y) for line in lines]
    kept = [line for line in kept if line.points]
    if not kept:
        return ""
    xs, ys = ([point[axis] for line in kept for point in line.points] for axis in (0, 1))
    axes = _Axes(xs, ys, log_y, y_from_zero)
    named = x_ticks if x_ticks is not None else [(tick, shown(tick)) for tick in ticks(axes.x0, axes.x1)]
    parts = axes.frame([(x, text) for x, text in named if axes.x0 <= x <= axes.x1], x_label, y_label)
    for line in kept:
        path = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in line.points)
        kind = "line dashed" if line.dashed else "line"
        parts.append(f'<polyline class="{kind}" style="stroke:var(--s{line.colour % COLOURS})" points="{path}"/>')
        if not line.dashed:
            parts += (
                f'<circle class="point" style="fill:var(--s{line.colour % COLOURS})" cx="{axes.x(x):.1f}" '
                f'cy="{axes.y(y):.1f}" r="2.6"><title>{escape(line.label)}: {shown(x)}, {shown(y)}</title></circle>'
                for x, y in line.points
            )
    return _svg(parts, f"{y_label} against {x_label}") + _legend(kept)


def bar_chart(bars: list[tuple[str, list[float]]], labels: list[str], x_label: str, y_label: str) -> str:
    """Return stacked bars, or nothing if there are no values.

    Args:
        bars: below each bar its text, and the heights of its parts from the axis up.
        labels: of the parts.
    """
    if not bars:
        return ""
    tops = [sum(heights) for _, heights in bars]
    axes = _Axes([-0.5, len(bars) - 0.5], [0.0, max(tops)], log_y=False, y_from_zero=True)
    every = math.ceil(len(bars) / 8)
    named = [(float(i), text) for i, (text, _) in enumerate(bars) if i % every == 0]
    parts, width = axes.frame(named, x_label, y_label), (WIDTH - _LEFT - _RIGHT) / len(bars) * 0.82
    for i, (text, heights) in enumerate(bars):
        base = 0.0
        for colour, height in enumerate(heights):
            top, bottom = axes.y(base + height), axes.y(base)
            parts.append(
                f'<rect style="fill:var(--s{colour % COLOURS})" x="{axes.x(i) - width / 2:.1f}" y="{top:.1f}" '
                f'width="{width:.1f}" height="{max(0.0, bottom - top):.1f}">'
                f"<title>{escape(labels[colour])}, {escape(text)}: {shown(height)}</title></rect>"
            )
            base += height
    legend = _legend([Line(label, [], colour) for colour, label in enumerate(labels)])
    return _svg(parts, f"{y_label} by {x_label}") + legend


def ticks(low: float, high: float) -> list[float]:
    """Return four to nine round numbers that span low … high."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, last + 1)]


def shown(value: float) -> str:
    """Return a number as briefly as it can be read."""
    return f"{value:.0f}" if value == int(value) and abs(value) < 1e6 else f"{value:.3g}"


def _finite(line: Line, positive: bool) -> Line:
    points = [(x, y) for x, y in line.points if math.isfinite(y) and (y > 0 or not positive)]
    return Line(line.label, points, line.colour, line.dashed)


def _svg(parts: list[str], description: str) -> str:
    body = "".join(parts)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(description)}">{body}</svg>'
    )


def _legend(lines: list[Line]) -> str:
    if len(lines) < 2:
        return ""
    entries = "".join(
        f'<span><i class="{"dashed" if line.dashed else ""}" style="--c:var(--s{line.colour % COLOURS})"></i>'
        f"{escape(line.label)}</span>"
        for line in lines
    )
    return f'<div class="legend">{entries}</div>'
