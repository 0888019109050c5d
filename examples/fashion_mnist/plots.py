"""python -m fashion_mnist plots: the results file as pictures for the document."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from fashion_mnist.landscapes import FIGURES
from fashion_mnist.methods import CONTROLS, METHODS, PLAIN, REFERENCE, REPAIRED, ROTATED
from fashion_mnist.parents import NETWORKS
from fashion_mnist.table import BETTER_BODY, RESULTS, values

# Of the controls of one kind those with heads are drawn, the better of the two bodies as one row.
DRAWN = (*(m for m in METHODS if m not in REFERENCE and m not in CONTROLS), BETTER_BODY,
         "control: random halves + refit, heads")  # fmt: skip
SUMMARY = ("average", "MuDSC align", "activation zip (ZipIt)", "MuDSC zip", "zip + decoder + rescaling",
           "best, without heads", "best, heads known", BETTER_BODY,
           "control: random halves + refit, heads")  # fmt: skip
GROUPS = {"plain": "#5d6d7e", "repaired": "#0072b2", "refitted": "#009e73", "control": "#d55e00"}


def group_of(method: str) -> str:
    """Which colour a method has."""
    if method in PLAIN:
        return "plain"
    if method in REPAIRED or method in ROTATED:
        return "repaired"
    return "control" if method.startswith("control") else "refitted"


def draw_methods(split: dict[str, Any], stem: Path, methods: Sequence[str] = DRAWN) -> list[Path]:
    """Write STEM.png and STEM.svg: a panel a network, a row a method, a dot a seed; parents and ensemble as lines."""
    import matplotlib.figure

    networks = [n for n in NETWORKS if n in split]
    drawn = [method for method in methods if any(values(split[n], method, "mean") for n in networks)]
    rows = {method: -k for k, method in enumerate(drawn)}
    figure = matplotlib.figure.Figure(
        figsize=(2.6 + 1.5 * len(networks), 1.5 + 0.22 * len(drawn)), layout="constrained"
    )
    panels = figure.subplots(1, len(networks), squeeze=False, sharex=True, sharey=True)[0]
    for network, panel in zip(networks, panels, strict=True):
        for method, y in rows.items():
            found = values(split[network], method, "mean")
            colour = GROUPS[group_of(method)]
            if found:
                panel.plot(found, [y] * len(found), "o", color=colour, alpha=0.55, markersize=5, markeredgewidth=0)
                panel.plot([statistics.mean(found)], [y], "|", color=colour, markersize=13, markeredgewidth=2)
        for reference, style in (("parents", "-"), ("ensemble", "--")):
            level = values(split[network], reference, "mean")
            panel.axvline(statistics.mean(level), color="black", linewidth=0.9, linestyle=style, label=reference)
        panel.set_title(network)
        panel.set(xlim=(0, 100), xticks=(0, 50, 100))
        panel.grid(axis="y", color="#e5e7e9", linewidth=0.8)
        panel.set_axisbelow(True)
        for side in ("top", "right", "left"):
            panel.spines[side].set_visible(False)
        panel.tick_params(axis="y", length=0)
    panels[0].set_yticks(list(rows.values()), list(rows))
    for label, method in zip(panels[0].get_yticklabels(), rows, strict=True):
        label.set_color(GROUPS[group_of(method)])
    figure.supxlabel("mean of both tasks, % of test images; a dot is a pair of parents, a bar their mean", fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    written = []
    for kind in ("png", "svg"):
        written.append(stem.with_suffix(f".{kind}"))
        figure.savefig(written[-1], dpi=110, metadata={"Date": None} if kind == "svg" else None)
    return written


@click.command("plots")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
@click.option("--figures", type=click.Path(path_type=Path), default=FIGURES, show_default=True)
def main(results: Path, figures: Path) -> None:
    """Draw every split of the results file."""
    found = json.loads(results.read_text())["results"]
    figures.mkdir(parents=True, exist_ok=True)
    for split in ("halves", "evenodd", "halves-base"):
        if split in found:
            for path in draw_methods(found[split], figures / f"methods-{split}"):
                click.echo(path)
    if "halves" in found:
        for path in draw_methods(found["halves"], figures / "summary-halves", SUMMARY):
            click.echo(path)
