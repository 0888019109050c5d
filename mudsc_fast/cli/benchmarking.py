"""``mudsc-fast bench``: the kernels against their peers, on this machine."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import click

from mudsc_fast.cli import options


@click.command(short_help="Measure the kernels against their peers.")
@click.option("--quick", is_flag=True, help="Fewer and smaller rows: under two minutes.")
@click.option("--op", "ops", multiple=True, metavar="OP", help="Only this op; may be given several times.")
@click.option(
    "--case", "cases", multiple=True, metavar="TEXT", help="Only rows whose case begins so; several times too."
)
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write all figures here.")
@click.option("--plot", "plot_folder", type=click.Path(path_type=Path, file_okay=False), help="Draw them in here.")
@options.quiet
@options.debug
def bench(
    quick: bool, ops: tuple[str, ...], cases: tuple[str, ...], json_path: Path | None, plot_folder: Path | None
) -> int:
    """Measure the kernels against their peers, on this machine.

    Every row first checks that all contenders give the right result, then times them in turns, so that a machine that
    slows down slows all of them. A row shows our time and its spread, how many times longer each peer took, the target,
    the share of what this machine can do at most, and the extra memory. Peers that are not installed are named:
    pip install 'mudsc-fast[bench]' brings them.

    \b
    Examples:
      mudsc-fast bench --quick
      mudsc-fast bench --op assign --op zip --json figures.json --plot figures/

    Exit code 1 if a contender's result was wrong; a row below its target is marked LOW.
    """
    suite = _suite()
    unknown = [op for op in ops if op not in suite.OPS]
    if unknown:
        raise click.UsageError(f"--op: expected one of {', '.join(suite.OPS)}, got {unknown[0]!r}")
    if plot_folder is not None and importlib.util.find_spec("matplotlib") is None:
        raise click.UsageError("--plot: needs matplotlib; pip install 'mudsc-fast[plot]'")
    quiet = options.settings().quiet
    results, about, failures = suite.run(ops or suite.OPS, quick, None if quiet else click.echo, json_path, cases)
    if not results and not failures:
        raise click.UsageError(f"--case: no row begins with {' or '.join(map(repr, cases))}")
    for fit in about["exponents"]:
        asked = fit["target"]
        most = "" if asked is None else f" (target at most {asked:g}{'' if fit['exponent'] <= asked else ': LOW'})"
        sizes = f"{fit['sizes'][0]} to {fit['sizes'][1]}"
        click.echo(f"growth  {fit['op']} {fit['case']} x{fit['threads']}, {sizes}: size^{fit['exponent']:.2f}{most}")
    low = [r for r in results if r.met is False]
    judged = [r for r in results if r.met is not None]
    click.echo(f"{len(results)} rows, {len(judged) - len(low)} of {len(judged)} targets met, {len(failures)} wrong")
    for row in low:
        click.echo(f"below target: {suite.line(row)}\n    because: {suite.reason(row.op, row.case)}")
    if json_path is not None:
        suite.save(json_path, results, about, failures)
    if plot_folder is not None:
        for path in suite.plot(plot_folder, results):
            options.settings().say(f"wrote {path}")
    return 1 if failures else 0


def _suite() -> ModuleType:
    """The suite: inside an installed package, or beside the package in a checkout."""
    if importlib.util.find_spec("mudsc_fast.benchmarks") is not None:
        return importlib.import_module("mudsc_fast.benchmarks.suite")
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / "benchmarks" / "suite.py").exists():
        raise click.UsageError("bench: this installation has no benchmarks; install from a wheel or from the sources")
    sys.path.insert(0, str(checkout))
    return importlib.import_module("benchmarks.suite")
