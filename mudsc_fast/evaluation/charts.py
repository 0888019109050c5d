"""Small figures for a web page: lines and bars as SVG that follows the page's colours, matrices as tiny PNGs."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 12, 34
_TICKS = 5


class _Area:
    """The drawing area of a chart: pixels of the picture, and the values that its axes span."""

    def __init__(self, size: tuple[int, int], x: tuple[float, float], y: tuple[float, float]) -> None:
        self.width, self.height = size
        self.x_span, self.y_span = x, y

    def x(self, value: float) -> float:
        low, high = self.x_span
        return _LEFT + (value - low) / (high - low) * (self.width - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_span
        return self.height - _BOTTOM - (value - low) / (high - low) * (self.height - _TOP - _BOTTOM)

    @property
    def floor(self) -> int:
        return self.height - _BOTTOM


_WIDE, _COMPACT = (640, 260), (330, 190)


def line_chart(
    lines: Mapping[str, Sequence[float]], x_label: str, y_label: str, emphasised: str | None = None, log: bool = False
) -> str:
    """An SVG of several lines over 1, 2, 3, ...; a line says its name and value where it is pointed at.

    emphasised: the line drawn thick. log: a logarithmic y axis; values <= 0 are left out.
    """
    count = max((len(values) for values in lines.values()), default=0)
    shown = {
        name: [
            (k, math.log10(v) if log else v)
            for k, v in enumerate(values, start=1)
            if math.isfinite(v) and (v > 0 or not log)
        ]
        for name, values in lines.items()
    }
    heights = [v for points in shown.values() for _, v in points]
    if not heights:
        return ""
    area = _Area(_WIDE, (0.5, count + 0.5), _span(min(heights), max(heights)))
    parts = [_frame(area, x_label, y_label, log)]
    for index, (name, points) in enumerate(shown.items()):
        kind = "main" if name == emphasised else f"c{index % 6}"
        path = " ".join(f"{area.x(k):.1f},{area.y(v):.1f}" for k, v in points)
        parts.append(f'<polyline class="line {kind}" points="{path}"><title>{escape(name)}</title></polyline>')
        if len(lines) <= 4 or len(points) == 1:
            parts += [
                f'<circle class="dot {kind}" cx="{area.x(k):.1f}" cy="{area.y(v):.1f}" r="3">'
                f"<title>{escape(name)}, {k}: {10**v if log else v:.4g}</title></circle>"
                for k, v in points
            ]
    parts += [_x_tick(area, k, str(k)) for k in range(1, count + 1, max(1, math.ceil(count / 10)))]
    return _svg(area, parts, f"{y_label} over {x_label}")


def bar_chart(
    heights: Sequence[float], edges: Sequence[float], x_label: str, y_label: str, labels: Sequence[str] = ()
) -> str:
    """An SVG histogram: heights[k] between edges[k] and edges[k + 1]; labels: of the bars, instead of numbers."""
    if not heights or max(heights) <= 0:
        return ""
    area = _Area(_WIDE if labels else _COMPACT, (edges[0], edges[-1]), (0.0, max(heights) * 1.05))
    parts = [_frame(area, x_label, y_label, False)]
    for k, height in enumerate(heights):
        x, top = area.x(edges[k]), area.y(height)
        name = labels[k] if labels else f"{edges[k]:.2g} to {edges[k + 1]:.2g}"
        parts.append(
            f'<rect class="bar" x="{x:.1f}" y="{top:.1f}" width="{max(area.x(edges[k + 1]) - x - 1, 1):.1f}" '
            f'height="{area.floor - top:.1f}"><title>{name}: {height:g}</title></rect>'
        )
    if labels:
        parts += [_x_tick(area, (edges[k] + edges[k + 1]) / 2, name) for k, name in enumerate(labels)]
    else:
        parts += [_x_tick(area, value, f"{value:g}") for value in _ticks(*area.x_span)]
    return _svg(area, parts, f"{y_label} by {x_label}")


def heat_map(matrix: Tensor, cells: int = 128) -> str:
    """A data URL of a PNG of at most cells x cells pixels; a pixel shows the largest entry that it covers.

    matrix: (n, k) float; 0 and below is darkest, 1 brightest. The largest and not the mean, since a matched pair is one
    entry in a pixel of many.
    """
    import matplotlib.image
    from torch.nn.functional import adaptive_max_pool2d

    small = matrix.float()
    if max(small.shape) > cells:
        small = adaptive_max_pool2d(small[None, None], (min(small.shape[0], cells), min(small.shape[1], cells)))[0, 0]
    stream = io.BytesIO()
    matplotlib.image.imsave(stream, small.clamp(0, 1).numpy(), vmin=0, vmax=1, cmap="viridis", format="png")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _span(low: float, high: float) -> tuple[float, float]:
    room = 0.05 * (high - low) or max(abs(high) * 0.05, 1e-3)
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers inside the span."""
    from matplotlib.ticker import MaxNLocator

    return [float(v) for v in MaxNLocator(_TICKS, min_n_ticks=2).tick_values(low, high) if low <= v <= high]


def _x_tick(area: _Area, value: float, text: str) -> str:
    x, y = area.x(value), area.height - 20
    return f'<text class="tick" x="{x:.1f}" y="{y}" text-anchor="middle">{escape(text)}</text>'


def _frame(area: _Area, x_label: str, y_label: str, log: bool) -> str:
    parts = []
    for value in _ticks(*area.y_span):
        y = area.y(value)
        text = f"{10**value:.2g}" if log else f"{value:g}"
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{area.width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    middle = (_TOP + area.floor) / 2
    parts.append(
        f'<text class="label" x="{(_LEFT + area.width) / 2}" y="{area.height - 4}" text-anchor="middle">'
        f'{escape(x_label)}</text><text class="label" transform="translate(12 {middle}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>'
    )
    return "".join(parts)


def _svg(area: _Area, parts: Sequence[str], name: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {area.width} {area.height}" role="img" aria-label="{escape(name)}">'
        + "".join(parts)
        + "</svg>"
    )
