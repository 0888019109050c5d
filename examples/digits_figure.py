"""The demo's picture: how every way of merging did, and one space's similarity before and after matching."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor

INK, QUIET, RULE = "#22272e", "#6e7781", "#d8dee4"
COLOURS = {"parent": "#aab2bb", "average": "#8b949e", "align": "#3b7dd8", "zip": "#e07b39"}


@dataclass(frozen=True)
class Row:
    """One line of the comparison: what it is, its joint accuracy, and the mean accuracy on the two tasks alone."""

    name: str
    kind: str  # a key of COLOURS
    joint: float
    mean: float


def draw(rows: Sequence[Row], before: Tensor, after: Tensor, space: str, path: Path) -> None:
    """Writes the PNG. `before` and `after` are (units, units) similarities: row i is unit i of parent A."""
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "axes.labelcolor": INK})
    figure = plt.figure(figsize=(12.4, 5.0), dpi=110, facecolor="white")
    bars = figure.add_axes((0.155, 0.115, 0.365, 0.765))
    _comparison(bars, rows)
    figure.text(0.012, 0.925, "Two networks into one, without training", fontsize=12.5, fontweight="bold")

    maps = [figure.add_axes((left, 0.29, 0.18, 0.58)) for left in (0.575, 0.767)]
    limit = max(0.5, float(after.max()))
    for axes, similarity, title in zip(maps, (before, after), ("before matching", "after matching"), strict=True):
        image = axes.imshow(similarity.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        axes.set_title(title, fontsize=10.5, color=INK, pad=7)
        axes.set(xticks=[], yticks=[], xlabel="units of parent B")
        axes.spines[:].set_color(RULE)
    maps[0].set_ylabel("units of parent A")
    scale = figure.colorbar(image, cax=figure.add_axes((0.955, 0.357, 0.007, 0.446)))
    scale.outline.set_visible(False)  # type: ignore[operator]
    scale.ax.tick_params(length=0, labelsize=8, colors=QUIET, pad=2)
    figure.text(0.575, 0.925, "What matching does to the units", fontsize=12.5, fontweight="bold")
    means = [float(similarity.diagonal().mean()) for similarity in (before, after)]
    caption = (
        f"Correlation of activations on the same images, space {space} ({len(after)} units),\n"
        "parent A's units in order of their match (align, both).\n"
        f"Mean of the diagonal: {means[0]:.2f} before, {means[1]:.2f} after."
    )
    figure.text(0.575, 0.125, caption, fontsize=9, color=QUIET, linespacing=1.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, pil_kwargs={"optimize": True})
    plt.close(figure)


def _comparison(axes: Axes, rows: Sequence[Row]) -> None:
    """Bars for the joint accuracy, a ring for the mean of the tasks, the best merge in bold."""
    best = max((row.joint for row in rows if row.kind != "parent"), default=0.0)
    gaps = [0.0]
    for last, row in itertools.pairwise(rows):
        gaps.append(gaps[-1] + (1.0 if row.kind == last.kind else 1.45))
    for place, row in zip(gaps, rows, strict=True):
        colour = COLOURS[row.kind]
        axes.barh(place, row.joint, height=0.74, color=colour, zorder=2)
        bold = "bold" if row.kind != "parent" and row.joint == best else "normal"
        inside = row.joint > 14
        axes.text(
            row.joint - 1.2 if inside else row.joint + 1.2, place, f"{row.joint:.1f}", va="center",
            ha="right" if inside else "left", color="white" if inside else INK, fontsize=9.5, fontweight=bold, zorder=4,
        )  # fmt: skip
        axes.plot(row.mean, place, "o", ms=6.5, mfc="white", mec=INK, mew=1.3, zorder=5, clip_on=False)
        axes.text(-1.5, place, row.name, va="center", ha="right", fontsize=10, fontweight=bold)
    axes.set_xlim(0, 100)
    axes.set_ylim(gaps[-1] + 0.6, -0.6)
    axes.set_yticks([])
    axes.set_xticks(range(0, 101, 20))
    axes.tick_params(axis="x", length=0, labelsize=9, colors=QUIET)
    axes.xaxis.grid(True, color=RULE, lw=0.8, zorder=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(
        "test accuracy, %     bar: all ten digits at once     ○: mean of the two tasks", fontsize=9, color=QUIET
    )
