"""What ``mudsc-fast merge`` and ``align`` are asked for: the options that both have, and which cannot go together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mudsc_fast.cli import options, work
from mudsc_fast.cli.recording import check_run_folder

if TYPE_CHECKING:
    from mudsc_fast.cli.refitting import Refit


@dataclass(frozen=True)
class Request:
    """What the user asked for; the names are those of the options."""

    checkpoints: tuple[Path, ...]
    output: Path
    spec_from: str
    heads: int | None
    groups: int | None
    dtype: str
    max_shard_size: str
    device: str
    seed: int
    force: bool
    allow_torch_load: bool
    balance: float | None = None
    stats: Path | None = None
    plan_from: Path | None = None
    save_plan: Path | None = None
    method: str = "align"
    weights: list[float] | None = None
    width: int | float | None = None
    width_budget: float | None = None
    max_memory: str | None = None
    dry_run: bool = False
    resume: bool = False
    record: Path | None = None
    verify: bool = True
    split_hubs: bool = False
    refit: Refit | None = None

    def check_usage(self) -> None:
        """Refuse options that contradict each other, before anything is opened."""
        count = len(self.checkpoints)
        if count < 2:
            raise click.UsageError(f"expected two or more checkpoints, got {count}")
        if self.weights is not None and len(self.weights) != count:
            raise click.UsageError(f"--weights: expected {count}, one for each checkpoint, got {len(self.weights)}")
        matching = {
            "--balance": self.balance,
            "--stats": self.stats,
            "--width": self.width,
            "--width-budget": self.width_budget,
            "--save-plan": self.save_plan,
        }
        unused = [name for name, value in matching.items() if value is not None]
        if self.plan_from is not None and unused:
            raise click.UsageError(f"{unused[0]} is for finding a match, but --plan gives one")
        if self.method == "average" and (unused or self.plan_from is not None):
            raise click.UsageError(f"--method average matches nothing, so it cannot use {[*unused, '--plan'][0]}")
        if self.width is not None and self.method != "zip":
            raise click.UsageError(f"--width: only --method zip changes widths, got --method {self.method}")
        if self.width_budget is not None:
            if self.method != "zip" or self.stats is None:
                raise click.UsageError("--width-budget: chooses widths by activations, for --method zip with --stats")
            for name, value in (("width", self.width), ("max-memory", self.max_memory), ("refit", self.refit)):
                if value is not None:
                    raise click.UsageError(f"--width-budget cannot be used with --{name}")
        if self.balance is not None and self.balance < 1 and self.stats is None:
            raise click.UsageError(
                f"--balance {self.balance:g} compares activations too, and there are no --stats. Record them with "
                "'mudsc-fast calibrate A B -o stats.safetensors --inputs FILE' and pass --stats stats.safetensors, "
                "or compare weights alone with --balance 1"
            )

    def check_outputs(self) -> None:
        """Refuse what could not be written at the end of a long run."""
        from mudsc_fast.checkpoints import check_output

        inputs = [path for path in (*self.checkpoints, self.stats, self.plan_from) if path is not None]
        check_output(self.output, inputs, self.force)
        if self.save_plan is not None:
            options.check_record(self.save_plan, "--save-plan", inputs, self.force)
            if self.save_plan.resolve() == self.output.resolve():
                raise ValueError(f"--save-plan: {self.save_plan} is the output too")
        if self.record is not None:
            check_run_folder(self.record, self.force)

    def used_balance(self) -> float:
        """The balance asked for, or the one that fits what is there."""
        if self.balance is not None:
            return self.balance
        if self.stats is None:
            options.settings().say("no --stats: matching by weights alone (--balance 1)")
            return 1.0
        return 0.5


def parse_weights(context: click.Context, parameter: click.Parameter, value: str | None) -> list[float] | None:
    try:
        return None if value is None else [float(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"expected numbers with commas between them, such as 1,0.5, got {value!r}") from None


def parse_width(context: click.Context, parameter: click.Parameter, value: str | None) -> int | float | None:
    if value is None:
        return None
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    raise click.BadParameter(f"expected units (an integer) or a share of the width such as 1.5, got {value!r}")


matching = options.together(
    click.option(
        "--balance",
        type=click.FloatRange(0, 1),
        help="Share of weight space in the similarity: 0 compares activations alone, 1 weights alone.  "
        "[default: 0.5 with --stats, else 1]",
    ),
    click.option(
        "--stats",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Activation statistics that 'mudsc-fast calibrate' wrote for the same checkpoints in the same order.",
    ),
    click.option(
        "--plan",
        "plan_from",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Use this match, which --save-plan wrote for the same checkpoints in the same order, or for earlier ones "
        "of the same runs, instead of finding one.",
    ),
    click.option(
        "--save-plan", type=click.Path(path_type=Path), metavar="FILE", help="Also write the match, for --plan."
    ),
)
record = click.option(
    "--record",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="Also write what was done, and the match, into this folder: 'mudsc-fast report FOLDER' makes a page of it.",
)
running = options.together(
    click.option(
        "--verify/--no-verify",
        default=True,
        show_default=True,
        help="Before anything is written, try on the network of a Hugging Face folder that permuting all spaces "
        "at random leaves its outputs as they are.",
    ),
    click.option(
        "--split-hubs",
        is_flag=True,
        help="Of several processes: all of them share the tensors of a residual stream, which one compares "
        "alone otherwise. Much faster; similarities differ by rounding.",
    ),
    options.dtype,
    options.max_shard_size,
    work.large,
    options.device,
    options.seed,
    options.spec,
    options.force,
    options.allow_torch_load,
    options.quiet,
    options.debug,
)
