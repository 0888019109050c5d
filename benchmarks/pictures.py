"""Pictures of a run: time against size, one line a contender; and every row's ratio beside its target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .harness import OURS, as_time

_COLOURS = ("#d95f02", "#7570b3", "#1b9e77", "#e7298a", "#a6761d", "#666666", "#e6ab02", "#66a61e")
_OURS, _LOW = "#1f5fb4", "#c62828"
_PANELS = 3  # side by side


def draw(folder: Path, rows: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write OP.png for each op with three sizes or more of a case, and targets.png; returns the files.

    rows: as in a results file, or ``Result.to_json``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for op in dict.fromkeys(row["op"] for row in rows):
        found = panels(rows, op)
        if found:
            written.append(_times(folder / f"{op}.png", op, found))
    if any(share(row) is not None for row in rows):
        written.append(_targets(folder / "targets.png", rows))
    return written


def panels(rows: Sequence[Mapping[str, Any]], op: str) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of an op's cases that have sizes enough for a line.

    Left out: the second of two cases with the same times, and cases that compare ours with itself.
    """
    cases: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if (
            row["op"] == op
            and row["threads"] == 1
            and ", against " not in row["case"]
            and "without looking" not in row["against"]
        ):
            cases.setdefault(row["case"], []).append(row)
    return {case: found for case, found in cases.items() if len({row["size"] for row in found}) >= 3}


def _times(path: Path, op: str, cases: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    columns = min(_PANELS, len(cases))
    lines = -(-len(cases) // columns)
    figure = Figure(figsize=(max(4.2 * columns, 6.0), 3.2 * lines + 0.6), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    names = list(dict.fromkeys(name for rows in cases.values() for row in rows for name in row["seconds"]))
    others = [name for name in names if name != OURS]
    colour = {name: _COLOURS[k % len(_COLOURS)] for k, name in enumerate(others)} | {OURS: _OURS}
    handles: dict[str, Any] = {}
    for panel, (case, rows) in zip(axes.flat, cases.items(), strict=False):
        for name in (*others, OURS):
            points = sorted((row["size"], row["seconds"][name]) for row in rows if name in row["seconds"])
            if points:
                wide = {"linewidth": 2.6, "markersize": 5} if name == OURS else {"linewidth": 1.2, "markersize": 3.5}
                (handles[name],) = panel.loglog(*zip(*points, strict=True), "o-", color=colour[name], **wide)
        sizes = sorted({row["size"] for row in rows})
        panel.set_xticks(sizes, [str(size) for size in sizes], rotation=45 if len(sizes) > 5 else 0, fontsize=8)
        panel.xaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: as_time(value)))
        panel.set_title(case, fontsize=10)
        panel.grid(alpha=0.3, linewidth=0.5)
    for panel in list(axes.flat)[max(len(cases) - columns, 0) : len(cases)]:
        panel.set_xlabel("units")
    for panel in axes.flat[len(cases) :]:
        panel.set_visible(False)
    figure.suptitle(f"{op}: time of a call on one thread")
    shown = [OURS, *(name for name in others if name in handles)]
    figure.legend(
        [handles[name] for name in shown],
        shown,
        loc="outside lower center",
        ncols=columns + 1,
        frameon=False,
        fontsize=9,
    )
    figure.savefig(path, dpi=90)
    return path


def share(row: Mapping[str, Any]) -> float | None:
    """How many times its target a row reached; None for one that has no ratio or limit of time."""
    if row["at_most"] is not None:
        return float(row["at_most"] / row["seconds"][OURS])
    if row["target"] is None or row["measured"] is None:
        return None
    return float(row["measured"] / row["target"])


def _targets(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    groups: dict[str, list[tuple[float, bool]]] = {}
    for row in rows:
        reached = share(row)
        if reached is not None:
            asked = "limit in seconds" if row["at_most"] is not None else f"{row['target']:g}x {row['against']}"
            groups.setdefault(f"{row['op']}: {asked}", []).append((reached, bool(row["met"])))
    figure = Figure(figsize=(9.0, 0.26 * len(groups) + 1.3), layout="constrained")
    panel = figure.subplots()
    for line, found in enumerate(groups.values()):
        for met, colour in ((True, _OURS), (False, _LOW)):
            reached = [value for value, kept in found if kept is met]
            panel.plot(reached, [line] * len(reached), "o", color=colour, markersize=5, alpha=0.65, markeredgewidth=0)
    panel.axvline(1.0, color="black", linewidth=1.0)
    panel.set_xscale("log")
    ticks = [tick for tick in (0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 50, 100) if _within(tick, groups)]
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    panel.set_yticks(range(len(groups)), [f"{name} ({len(found)})" for name, found in groups.items()], fontsize=9)
    panel.set_ylim(len(groups) - 0.5, -0.5)
    panel.grid(axis="both", alpha=0.3, linewidth=0.5)
    panel.set_xlabel("measured ratio as a multiple of its target; in red: below")
    low = sum(not met for found in groups.values() for _, met in found)
    count = sum(map(len, groups.values()))
    panel.set_title(f"{count - low} of {count} rows with a ratio or a limit of time reach their target", fontsize=11)
    figure.savefig(path, dpi=90)
    return path


def _within(tick: float, groups: Mapping[str, Sequence[tuple[float, bool]]]) -> bool:
    reached = [value for found in groups.values() for value, _ in found]
    return min(reached) / 1.5 <= tick <= max(reached) * 1.5
