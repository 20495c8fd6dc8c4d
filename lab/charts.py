"""Line charts as SVG, for the pages of docs/."""

import math
from collections.abc import Iterator, Mapping, Sequence
from xml.sax.saxutils import escape

Points = Sequence[tuple[float, float]]
_WIDTH, _HEIGHT = 760, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 40, 44
_COLOURS = ("#1f6fb4", "#c4461b", "#2a8a4a", "#7b4fa3", "#8a6d1d", "#555555")
_MOST = 1200  # points of a line


def chart(
    title: str,
    lines: Mapping[str, Points],
    *,
    x: tuple[str, float, float],
    y: tuple[str, float, float],
    marks: Mapping[str, float] | None = None,
) -> str:
    """Lines by name, over axes that are each a label and bounds; `marks` are values of y with a dashed line."""
    return "\n".join(_draw(title, lines, x, y, marks or {})) + "\n"


def _draw(
    title: str,
    lines: Mapping[str, Points],
    x: tuple[str, float, float],
    y: tuple[str, float, float],
    marks: Mapping[str, float],
) -> Iterator[str]:
    def across(value: float) -> float:
        return round(_LEFT + (value - x[1]) / (x[2] - x[1]) * (_WIDTH - _LEFT - _RIGHT), 1)

    def up(value: float) -> float:
        value = min(max(value, y[1]), y[2])
        return round(_HEIGHT - _BOTTOM - (value - y[1]) / (y[2] - y[1]) * (_HEIGHT - _TOP - _BOTTOM), 1)

    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"'
        f' font-family="sans-serif" font-size="11">'
    )
    yield f"<title>{escape(title)}</title>"
    yield f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>'
    for value in _ticks(y[1], y[2]):
        yield f'<path d="M{_LEFT} {up(value)}H{_WIDTH - _RIGHT}" stroke="#e4e4e4"/>'
        yield f'<text x="{_LEFT - 6}" y="{up(value) + 4}" text-anchor="end">{value:g}</text>'
    for value in _ticks(x[1], x[2]):
        yield f'<path d="M{across(value)} {_HEIGHT - _BOTTOM}v4" stroke="#333333"/>'
        yield f'<text x="{across(value)}" y="{_HEIGHT - _BOTTOM + 17}" text-anchor="middle">{value:g}</text>'
    yield f'<path d="M{_LEFT} {_TOP}V{_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}" fill="none" stroke="#333333"/>'
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    yield f'<text x="{middle}" y="{_HEIGHT - 10}" text-anchor="middle">{escape(x[0])}</text>'
    yield (
        f'<text x="14" y="{_HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 14 {_HEIGHT / 2})">'
        f"{escape(y[0])}</text>"
    )
    for name, value in marks.items():
        yield (f'<path d="M{_LEFT} {up(value)}H{_WIDTH - _RIGHT}" stroke="#333333" stroke-dasharray="5 4"/>')
        yield f'<text x="{_WIDTH - _RIGHT}" y="{up(value) - 4}" text-anchor="end">{escape(name)}</text>'
    start = float(_LEFT)
    for (name, points), colour in zip(lines.items(), _COLOURS, strict=False):
        path = "L".join(f"{across(at)} {up(value)}" for at, value in _thinned(points))
        yield f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
        yield f'<path d="M{start} 20h18" stroke="{colour}" stroke-width="3"/>'
        yield f'<text x="{start + 23}" y="24">{escape(name)}</text>'
        start += 40 + 6.2 * len(name)
    yield "</svg>"


def _thinned(points: Points) -> Points:
    every = -(-len(points) // _MOST)
    return points if every <= 1 else [*points[::every], points[-1]]


def _ticks(low: float, high: float) -> Iterator[float]:
    """Some seven round values."""
    rough = (high - low) / 7
    scale = 10.0 ** (len(f"{int(rough)}") - 1 if rough >= 1 else -1)
    every = next(scale * factor for factor in (1, 2, 2.5, 5, 10, 20) if scale * factor >= rough)
    value = math.ceil(low / every) * every
    while value <= high + every / 1e6:
        yield round(value, 6)
        value += every
