"""Landscapes and paths as pictures: contours of every task with the overlap shaded, losses along lines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mudsc_fast.evaluation.landscape import LOW

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mudsc_fast.evaluation.landscape import Landscape, Path1D

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart without red and green
_MARKERS = ("o", "s", "*")
_LEVELS = 8


def draw_landscape(found: Landscape, stem: Path, share: float = LOW) -> list[Path]:
    """Write STEM.png and STEM.svg: a panel a task, and one with the low-loss regions of all tasks over each other.

    share: what counts as low, see `Landscape.low`.
    """
    import matplotlib.figure
    import numpy as np

    tasks = list(found.losses)
    grids = {task: np.ma.masked_invalid(np.array(found.losses[task])) for task in tasks}
    lows = {task: found.low(task, share) for task in tasks}
    wide, tall = (ticks[-1] - ticks[0] for ticks in (found.xs, found.ys))
    height = min(max(3.4 * tall / wide, 1.5), 5.0) + 1.4
    figure = matplotlib.figure.Figure(figsize=(4.4 * (len(tasks) + 1), height), layout="constrained")
    panels = figure.subplots(1, len(tasks) + 1, squeeze=False)[0]
    for task, panel, colour in zip(tasks, panels, _cycle(len(tasks)), strict=False):
        # Levels by quantiles: the walls around a basin are many times higher than anything inside it.
        levels = np.unique(np.quantile(grids[task].compressed(), np.linspace(0, 1, _LEVELS + 2)))
        if len(levels) > 2:
            shades = panel.contourf(found.xs, found.ys, grids[task], levels, cmap="Greys_r")
            figure.colorbar(shades, ax=panel, shrink=0.7, format="%.2g")
            panel.contour(found.xs, found.ys, grids[task], [lows[task]], colors=colour, linewidths=2)
        panel.set_title(f"{task}: loss")
        _mark(panel, found)
    last = panels[-1]
    for task, colour in zip(tasks, _cycle(len(tasks)), strict=True):
        if grids[task].min() < lows[task] < grids[task].max():
            last.contour(found.xs, found.ys, grids[task], [lows[task]], colors=colour, linewidths=2)
            last.contourf(found.xs, found.ys, grids[task], [grids[task].min(), lows[task]], colors=[colour], alpha=0.2)
        last.plot([], [], color=colour, label=f"{task} low (under {lows[task]:.2g})")
    # How far the worst task is above what is low; inside the overlap no task is.
    above = np.ma.max(np.ma.stack([grids[task] - lows[task] for task in tasks]), axis=0)
    if above.min() < 0 < above.max():
        last.contourf(found.xs, found.ys, above, [above.min(), 0], colors=["#f0e442"], alpha=0.6)
    merged = list(found.points)[-1]
    last.set_title(f"overlap of all tasks; {merged} is {'inside' if found.in_overlap(merged, share) else 'outside'}")
    _mark(last, found)
    figure.legend(*last.get_legend_handles_labels(), loc="outside lower right", ncols=len(tasks), frameon=False)
    return _written(figure, stem)


def draw_paths(paths: Mapping[str, Path1D], stem: Path) -> list[Path]:
    """Write STEM.png and STEM.svg: a panel a line, with every task's losses along it and its barrier."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(4.6 * len(paths), 3.6), layout="constrained")
    panels = figure.subplots(1, len(paths), squeeze=False, sharey=True)[0]
    for (name, found), panel in zip(paths.items(), panels, strict=True):
        for task, colour in zip(found.losses, _cycle(len(found.losses)), strict=True):
            label = f"{task}, barrier {found.barrier(task):.3g}"
            panel.plot(found.shares, found.losses[task], color=colour, marker=".", label=label)
        panel.set_title(name)
        panel.set_xlabel("share of the second network")
        panel.legend(frameon=False, fontsize="small")
    panels[0].set_ylabel("loss")
    return _written(figure, stem)


def _cycle(count: int) -> list[str]:
    return [_COLOURS[k % len(_COLOURS)] for k in range(count)]


def _mark(panel: Any, found: Landscape) -> None:
    for (name, (x, y)), marker in zip(found.points.items(), _MARKERS, strict=True):
        panel.plot([x], [y], marker, color="black", markeredgecolor="white", markersize=13 if marker == "*" else 9)
        panel.annotate(
            name, (x, y), xytext=(7, 7), textcoords="offset points",
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        )  # fmt: skip
    panel.set_xlabel("distance in weight space")
    panel.set_aspect("equal")


def _written(figure: Any, stem: Path) -> list[Path]:
    written = []
    for kind in ("png", "svg"):
        path = stem.with_suffix(f".{kind}")
        figure.savefig(path, dpi=110, metadata={"Date": None} if kind == "svg" else None)
        written.append(path)
    return written
