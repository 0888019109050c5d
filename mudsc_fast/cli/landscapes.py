"""``mudsc-fast landscape``: every task's loss around two parents and their merge, as figures."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mudsc_fast.cli import options
from mudsc_fast.cli.models import find_function

if TYPE_CHECKING:
    from mudsc_fast.checkpoints import Checkpoint


@click.command(short_help="Draw the losses around parents and merge.")
@options.checkpoints("A B [MERGED]")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path, file_okay=False), metavar="FOLDER")
@click.option(
    "--evaluate",
    required=True,
    metavar="MODULE:FUNCTION",
    help="A Python function from a state dict to {task: loss}. This imports, and so runs, that module. For a network "
    "with batch norm it must recompute the running statistics (mudsc_fast.reset_batchnorm) before it measures.",
)
@click.option("--resolution", type=click.IntRange(min=2), default=21, show_default=True, help="Points a side.")
@click.option(
    "--margin",
    type=click.FloatRange(min=0),
    default=0.3,
    show_default=True,
    help="How far the plane reaches beyond the three, in widths and heights of what they span.",
)
@click.option(
    "--low",
    type=click.FloatRange(0, 1),
    default=0.1,
    show_default=True,
    help="What counts as a low loss: this share of the way from the better to the worse parent's.",
)
@options.allow_torch_load
@options.quiet
@options.debug
def landscape(
    checkpoints: tuple[Path, ...],
    output: Path,
    evaluate: str,
    resolution: int,
    margin: float,
    low: float,
    allow_torch_load: bool,
) -> None:
    """Evaluate every task on the plane through two parents and their merge, and draw it.

    FOLDER gets landscape.png and .svg (contours of every task, the region where all are low shaded), paths.png and .svg
    (losses along the straight lines, with their barriers) and the losses themselves as JSON. An interrupted run goes on
    where it stopped when the same command is given again.

    With two checkpoints there is no plane: only the line between them is drawn.

    \b
    Example:
      mudsc-fast landscape a.safetensors b.safetensors merged.safetensors \\
          --evaluate tasks:losses -o landscape/
    """
    if not 2 <= len(checkpoints) <= 3:
        raise click.UsageError(f"expected two or three checkpoints (A, B, their merge), got {len(checkpoints)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise click.UsageError("landscape: needs matplotlib; pip install 'mudsc-fast[plot]'")
    losses = find_function(evaluate, "--evaluate")
    output.mkdir(parents=True, exist_ok=True)
    opened = options.open_all(checkpoints, allow_torch_load)
    _draw(opened, output, losses, resolution, margin, low)


def _draw(opened: list[Checkpoint], output: Path, losses: Any, resolution: int, margin: float, low: float) -> None:
    from mudsc_fast.evaluation.landscape import landscape as evaluated
    from mudsc_fast.evaluation.landscape import loss_path
    from mudsc_fast.evaluation.landscape_figures import draw_landscape, draw_paths

    settings = options.settings()
    states = [dict(checkpoint) for checkpoint in opened]
    names = ["A", "B", "merged"][: len(states)]
    about: dict[str, Any] = {"networks": {n: str(c.path) for n, c in zip(names, opened, strict=True)}}
    lines = {}
    for a in range(len(names)):
        for b in range(a + 1, len(names)):
            file = output / f"path_{names[a]}_{names[b]}.json"
            found = loss_path(states[a], states[b], losses, resolution, file, not settings.quiet)
            lines[f"{names[a]} to {names[b]}"] = found
    about["barriers"] = {name: {task: path.barrier(task) for task in path.losses} for name, path in lines.items()}
    written = draw_paths(lines, output / "paths")
    if len(states) == 3:
        plane = evaluated(states, losses, names, resolution, margin, output / "grid.json", not settings.quiet)
        written += draw_landscape(plane, output / "landscape", low)
        about["losses"] = plane.at_points
        about["low"] = {task: plane.low(task, low) for task in plane.losses}
        about["share of the merged"] = plane.needed_share("merged")
        about["merged in overlap"] = plane.in_overlap("merged", low)
        where = "inside" if about["merged in overlap"] else "outside"
        settings.say(
            f"the merged network is {where} the region where every task's loss is low; its losses are up to "
            f"{about['share of the merged']:.0%} of the way from the better to the worse parent's"
        )
    else:
        settings.say("two checkpoints: only the line between them; give their merge as the third for the plane")
    part = output / ".summary.json.part"
    part.write_text(json.dumps(_without_nan(about), indent=1) + "\n", encoding="utf-8")
    os.replace(part, output / "summary.json")
    settings.say("wrote " + ", ".join(str(path) for path in written))


def _without_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
