"""``mudsc-fast report``: the record of a merge as one page."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import click

from mudsc_fast.cli import options


@click.command(short_help="Make a page about a merge.")
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.html",
    help="The page: one file that needs nothing else.",
)
@click.option("--space", "spaces", multiple=True, metavar="NAME", help="Draw the similarity of this space; repeatable.")
@click.option(
    "--max-spaces",
    type=click.IntRange(min=0),
    default=12,
    show_default=True,
    help="Without --space: draw this many, evenly spread.",
)
@click.option(
    "--table",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE.json",
    help="Results to show, such as accuracies: a list of rows, each an object from column to value.",
)
@options.force
@options.quiet
@options.debug
def report(run: Path, output: Path, spaces: tuple[str, ...], max_spaces: int, table: Path | None, force: bool) -> None:
    """Make a page about a merge that was run with --record.

    It shows the networks, the match values over the sweeps, similarities before and after the match, the layer norms of
    parents and merge, the spaces, and the command. The checkpoints are read again; what is no longer there is left out
    and said so, also when the run was interrupted.

    \b
    Example:
      mudsc-fast merge a.safetensors b.safetensors -o merged.safetensors --record run/
      mudsc-fast report run/ -o report.html
    """
    if importlib.util.find_spec("matplotlib") is None or importlib.util.find_spec("jinja2") is None:
        raise click.UsageError("report: needs matplotlib and jinja2; pip install 'mudsc-fast[plot]'")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"--output: the folder {output.parent} does not exist")
    if output.exists() and not force:
        raise FileExistsError(f"--output: {output} exists already (--force replaces it)")
    from mudsc_fast.evaluation.page import write_page
    from mudsc_fast.evaluation.report import gather

    settings = options.settings()
    found = gather(run, spaces, max_spaces, _rows(table), not settings.quiet)
    write_page(found, output)
    for note in found.notes:
        settings.say(f"note: {note}")
    settings.say(f"wrote {output}")


def _rows(table: Path | None) -> list[dict[str, Any]]:
    if table is None:
        return []
    try:
        rows = json.loads(table.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--table {table}: not JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"--table {table}: expected a list of objects from column to value")
    return rows
