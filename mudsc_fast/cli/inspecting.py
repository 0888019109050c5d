"""``mudsc-fast spec``, ``check`` and ``info``: what a checkpoint and this machine look like."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mudsc_fast.cli import huggingface, options
from mudsc_fast.cli.progress import track
from mudsc_fast.cli.specs import find_spec, spec_of_network
from mudsc_fast.cli.verifying import TOLERANCE, config_alone, law_of_small

if TYPE_CHECKING:
    from rich.table import Table

    from mudsc_fast.checking import Outcome
    from mudsc_fast.cli.specs import AnyCheckpoint
    from mudsc_fast.spaces import Space
    from mudsc_fast.spec import PermutationSpec


@click.command(short_help="Show which units of a checkpoint move together.")
@click.argument("checkpoint", type=click.Path(path_type=Path), metavar="CHECKPOINT")
@click.option("--json", "as_json", is_flag=True, help="Print the spec as JSON, to keep, change and give to --spec.")
@click.option(
    "--verify",
    is_flag=True,
    help="Also try the law, for a Hugging Face folder: random weights of a shrunken config, spaces permuted at random.",
)
@options.model
@options.spec
@options.allow_torch_load
@options.quiet
@options.debug
def spec(
    checkpoint: Path,
    as_json: bool,
    verify: bool,
    model_path: str | None,
    spec_from: str,
    heads: int | None,
    groups: int | None,
    allow_torch_load: bool,
) -> None:
    """Show which units of a CHECKPOINT move together.

    A space is a set of tensor axes that must be regrouped together, such as a hidden layer or a residual stream. Its
    units may move freely, inside blocks (attention heads, groups), or, where a tie is named, only with another space.
    Known architectures are recognised; all others are found by following axes through the network's graph. No weights
    are read: of a Hugging Face folder, config.json is enough.

    \b
    Examples:
      mudsc-fast spec model.safetensors
      mudsc-fast spec folder --verify
      mudsc-fast spec model.safetensors --json > spec.json

    Exit code 1 if --verify finds that the function changes.
    """
    alone = config_alone(checkpoint) if spec_from == "auto" and model_path is None and checkpoint.is_dir() else None
    if alone is not None:
        model = huggingface.empty_model(alone)
        where: huggingface.AnyFolder = alone
        found = spec_of_network(model, checkpoint)
        sizes = {name: tensor.nbytes for name, tensor in model.state_dict().items()}
    else:
        found, where, sizes = _of_checkpoint(checkpoint, model_path, spec_from, heads, groups, allow_torch_load)
    if as_json:
        click.echo(found.to_json())
    else:
        print_table(_spec_table(found, checkpoint))
        _print_rest(found, sizes)
    if verify:
        if not huggingface.has_config(where):
            raise click.UsageError("--verify: builds a network from config.json, and there is none here")
        change, count = law_of_small(where, found)
        options.settings().say(
            f"law: {count} spaces of the shrunken network, each alone and all together, permuted at random: outputs "
            f"change by {change:.1e} at most"
        )
        if change > TOLERANCE:
            click.echo(f"the function changes: {change:.2g} is over {TOLERANCE:g}")
            raise click.exceptions.Exit(1)


def _of_checkpoint(
    path: Path, model_path: str | None, spec_from: str, heads: int | None, groups: int | None, allow: bool
) -> tuple[PermutationSpec, huggingface.AnyFolder, dict[str, int]]:
    """The spec of a checkpoint, the checkpoint, and the sizes of its tensors."""
    from mudsc_fast.checkpoints import open_checkpoint

    opened = open_checkpoint(path, allow_torch_load=allow)
    by_network: AnyCheckpoint = opened
    if model_path is not None and spec_from == "auto":
        from mudsc_fast.cli.models import call_factory
        from mudsc_fast.specs import spec_for

        found = spec_for(call_factory(model_path), heads=heads, groups=groups)
        found.check({name: info.shape for name, info in opened.layout.items()})
    else:
        stacked = huggingface.stacked([opened]) if spec_from == "auto" else None
        by_network = stacked[0] if stacked else opened
        found = find_spec(by_network, spec_from, heads, groups)
    return found, opened, {name: info.nbytes for name, info in by_network.layout.items()}


def _print_rest(found: PermutationSpec, sizes: Mapping[str, int]) -> None:
    """What no space touches, and why."""
    covered = {axis.tensor for space in found.spaces for axis in space.axes}
    left = [name for name in sizes if name not in covered]
    share = sum(sizes[name] for name in covered) / max(sum(sizes.values()), 1)
    click.echo(f"{len(covered)} of {len(sizes)} tensors, {share:.1%} of the bytes, are in a space")
    if left:
        more = f" and {len(left) - 8} more" if len(left) > 8 else ""
        click.echo(f"in none (averaged as they are): {', '.join(left[:8])}{more}")
    reasons: dict[str, list[str]] = {}
    for item in found.frozen:
        reasons.setdefault(re.sub(r"\d+", "N", item.reason), []).append(f"{item.tensor} [{item.dim}]")
    for reason, places in reasons.items():
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        click.echo(f"left alone: {places[0]}{more}: {reason}")


def _spec_table(found: PermutationSpec, checkpoint: Path) -> Table:
    from rich.table import Table

    table = Table(title=f"{len(found.spaces)} spaces of {checkpoint}", title_justify="left")
    for heading, justify in (("space", "left"), ("width", "right"), ("blocks", "right")):
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for heading in ("units move", "tie", "axes", "taps"):
        table.add_column(heading, overflow="fold")
    for space in found.spaces:
        axes = "\n".join(f"{axis.tensor} [{axis.dim}] {axis.role}" for axis in space.axes)
        taps = "\n".join(f"{tap.module} {tap.port}" for tap in space.taps)
        table.add_row(space.name, str(space.width), str(space.blocks), _moves(space), space.tie or "", axes, taps)
    return table


def _moves(space: Space) -> str:
    if space.within == "fixed":
        return "whole blocks"
    return "freely" if space.blocks == 1 else "in blocks"


@click.command(short_help="Show how the package was built and what runs here.")
@options.debug
def info() -> None:
    """Show the version, how the kernels were built, and what this machine can run of them."""
    from rich.table import Table

    from mudsc_fast.build import build_config

    table = Table(show_header=False, box=None)
    for key, value in build_config().items():
        text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        table.add_row(key.replace("_", " "), text or "none")
    print_table(table)


@click.command(short_help="Compare every kernel with the reference.")
@click.option(
    "--device",
    default="all",
    show_default=True,
    type=click.Choice(["all", "cpu", "cuda"]),
    help="all: the CPU, and CUDA where torch sees one.",
)
@options.quiet
@options.debug
def check(device: str) -> None:
    """Compare every kernel that this machine can run with the float64 reference.

    Each operation runs on every backend and instruction set that is usable here, on small inputs. The table shows the
    largest error and what is tolerated; the exit code is 1 if one is over it.

    \b
    Example:
      mudsc-fast check
    """
    from mudsc_fast.checking import run_checks

    settings = options.settings()
    outcomes = list(track(run_checks(_devices(device)), "checking", None, settings.quiet))
    failures = [outcome for outcome in outcomes if not outcome.ok]
    if failures or not settings.quiet:
        print_table(_check_table(outcomes))
    for outcome in failures:
        click.echo(f"over: {outcome.op} ({outcome.case}) on {outcome.place} {outcome.note}".rstrip())
    if failures:
        click.echo(f"{len(failures)} of {len(outcomes)} comparisons are over their tolerance")
        raise click.exceptions.Exit(1)
    settings.say(f"{len(outcomes)} comparisons, all within their tolerance")


def _check_table(outcomes: Sequence[Outcome]) -> Table:
    """One row a case, one column a backend and instruction set."""
    from rich.table import Table

    table = Table(title="Largest absolute error against the float64 reference", title_justify="left")
    places = list(dict.fromkeys(outcome.place for outcome in outcomes))
    table.add_column("operation")
    for heading in (*places, "tolerated"):
        table.add_column(heading, justify="right")
    cases: dict[tuple[str, str, float], dict[str, Outcome]] = {}
    for outcome in outcomes:
        cases.setdefault((outcome.op, outcome.case, outcome.tolerance), {})[outcome.place] = outcome
    for (op, case, tolerance), found in cases.items():
        errors = [
            "-" if place not in found else f"{found[place].error:.1e}{'' if found[place].ok else ' OVER'}"
            for place in places
        ]
        table.add_row(f"{op}: {case}", *errors, f"{tolerance:.1e}")
    return table


def _devices(asked: str) -> list[str]:
    import torch

    if asked == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: cuda asked for, but torch sees no CUDA device")
    if asked != "all":
        return [asked]
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def print_table(table: Table) -> None:
    """The table on stdout, as wide as the terminal, or as it needs where another program reads it."""
    from rich.console import Console

    console = Console(file=sys.stdout, markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = 100_000
        console.width = console.measure(table).maximum
    console.print(table)
