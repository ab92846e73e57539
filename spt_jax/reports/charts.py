"""Line charts as inline SVG, whose colours are those of the page around them."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from html import escape

WIDTH, HEIGHT = 340, 210
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 10, 34
POINTS = 300  # per line; longer ones are averaged
Number = int | float
Points = Sequence[tuple[Number, Number]]


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
      points: x and y of each point, ordered by x. Points that are not finite are left out.
      style: the class of the line: "main", "accent", "faint" or "quiet".
      marked: whether each point has a dot.
    """

    points: Points
    style: str = "main"
    marked: bool = False


@dataclasses.dataclass(frozen=True)
class Level:
    """A horizontal line with a label, such as the score of another prompt."""

    value: float
    label: str


def line_chart(
    lines: Sequence[Line],
    *,
    label: str,
    x_name: str = "step",
    levels: Sequence[Level] = (),
    chosen: int | None = None,
    bounds: tuple[float, float] | None = None,
) -> str | None:
    """Returns a chart as an `svg` element.

    Args:
      lines: the lines, in the order of drawing.
      label: what the chart shows, for readers who cannot see it.
      x_name: the name of the horizontal axis.
      levels: horizontal lines.
      chosen: where to draw a vertical line.
      bounds: the ends of the vertical axis; default those of the values.

    Returns:
      The element; None if there is no finite point.
    """
    drawn = [dataclasses.replace(line, points=thinned(finite(line.points))) for line in lines]
    xs = [x for line in drawn for x, _ in line.points] + ([] if chosen is None else [float(chosen)])
    ys = [y for line in drawn for _, y in line.points]
    if not ys:
        return None
    levels = [level for level in levels if math.isfinite(level.value)]
    low, high = bounds or _padded([*ys, *(level.value for level in levels)])
    first, last = min(0.0, *xs), max(*xs, min(xs) + 1)

    def at(x: float, y: float) -> tuple[float, float]:
        share = (x - first) / (last - first), (y - low) / (high - low)
        return LEFT + share[0] * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - share[1] * (HEIGHT - TOP - BOTTOM)

    parts, names = [_axes(at, (first, last), (low, high), x_name)], []
    lowest = -math.inf  # labels of close lines are moved apart
    for level in sorted(levels, key=lambda level: -level.value):
        _, y = at(first, level.value)
        lowest = max(y - 4, lowest + 12)
        parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        names.append(f'<text class="level-name" x="{LEFT + 4}" y="{lowest:.1f}">{escape(level.label)}</text>')
    if chosen is not None:
        x, _ = at(float(chosen), low)
        parts.append(f'<line class="chosen" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    for line in drawn:
        places = [at(x, min(max(y, low), high)) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline class="{escape(line.style)}" points="{path}"/>')
        if line.marked or len(places) == 1:
            parts += [f'<circle class="{escape(line.style)}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in places]
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
    return head + "".join([*parts, *names]) + "</svg>"


def _axes(
    at: Callable[[float, float], tuple[float, float]],
    x_ends: tuple[float, float],
    y_ends: tuple[float, float],
    x_name: str,
) -> str:
    parts = []
    for value in ticks(*y_ends, 5):
        _, y = at(x_ends[0], value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick-y" x="{LEFT - 6}" y="{y + 4:.1f}">{value:g}</text>')
    for value in ticks(*x_ends, 5):
        x, _ = at(value, y_ends[0])
        parts.append(f'<text class="tick-x" x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}">{value:,g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="tick-x" x="{middle:.1f}" y="{HEIGHT - 4}">{escape(x_name)}</text>')
    return "".join(parts)


def ticks(low: float, high: float, count: int) -> list[float]:
    """Returns at most `count` + 1 multiples of 1, 2 or 5 times a power of ten between two numbers."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def thinned(points: Points, limit: int = POINTS) -> list[tuple[float, float]]:
    """Returns at most `limit` points, each the mean of consecutive ones."""
    size = math.ceil(len(points) / limit) or 1
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in own) / len(own), sum(y for _, y in own) / len(own)) for own in parts]


def smoothed(points: Points, window: int) -> list[tuple[Number, float]]:
    """Returns the mean of each `window` consecutive values, at the last of them."""
    found: list[tuple[Number, float]] = []
    total = 0.0
    for index, (x, y) in enumerate(points):
        total += y - (points[index - window][1] if index >= window else 0.0)
        if index >= window - 1:
            found.append((x, total / window))
    return found


def finite(points: Points) -> list[tuple[float, float]]:
    """Returns the points whose values are finite."""
    return [(float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or max(abs(high), 1.0) * 0.1
    return low - margin, high + margin
