"""Options that several commands share, and what they mean."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    import torch

    from mudsc_fast.checkpoints import Checkpoint

Command = TypeVar("Command", bound=Callable[..., Any])

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

DTYPES = ("keep", "float64", "float32", "bfloat16", "float16")


@dataclass
class Settings:
    """What holds for a whole run."""

    debug: bool = False
    quiet: bool = False
    kept: Path | None = None  # where an interrupted run keeps its finished work
    verbose: bool = False
    log_format: str = "text"
    threads: int | None = None
    config_lines: dict[str, str] = field(default_factory=dict)  # {option: the line of a file that gave it}

    def say(self, text: str) -> None:
        """A line about the run on stderr, unless it is to be quiet; stdout holds results alone."""
        if not self.quiet:
            click.echo(json.dumps({"event": "message", "text": text}) if self.log_format == "json" else text, err=True)

    def tell(self, text: str) -> None:
        """A line for those who asked for more with --verbose."""
        if self.verbose:
            self.say(text)


def settings() -> Settings:
    """The settings of the run that is on; the usual ones where these functions are called from elsewhere."""
    context = click.get_current_context(silent=True)
    found = None if context is None else context.find_object(Settings)
    return found if found is not None else Settings()


def _remember(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and parameter.name:
        setattr(context.ensure_object(Settings), parameter.name, True)


quiet = click.option(
    "-q", "--quiet", is_flag=True, expose_value=False, callback=_remember, help="No progress bars, no summary."
)
debug = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_remember,
    help="Show the traceback of an error.",
)
output = click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="OUT",
    help="What to write: a file if it ends in .safetensors, else a folder.",
)
force = click.option("--force", is_flag=True, help="Replace OUT if it exists (an input is never replaced).")
allow_torch_load = click.option(
    "--allow-torch-load",
    is_flag=True,
    help="Also read .pt, .pth and .bin, which are pickles, with torch.load(weights_only=True).",
)
model = click.option(
    "--model",
    "model_path",
    metavar="MODULE:FACTORY",
    help="A Python function without arguments that builds the network. This imports, and so runs, that module, from "
    "the current folder or the Python path. Not needed for a Hugging Face folder with a config.json.",
)
device = click.option(
    "--device", default="cpu", show_default=True, metavar="DEVICE", help="Where to compute: auto, cpu, cuda, cuda:1."
)
dtype = click.option(
    "--dtype",
    "--out-dtype",
    "dtype",
    default="keep",
    show_default=True,
    type=click.Choice(DTYPES),
    help="Dtype of the floating tensors in the output.",
)
max_shard_size = click.option(
    "--max-shard-size", default="5GB", show_default=True, metavar="SIZE", help="Largest file in a folder output."
)
seed = click.option("--seed", default=0, show_default=True, help="Of the order in which spaces are visited.")


def checkpoints(metavar: str) -> Callable[[Command], Command]:
    """The checkpoints that a command reads, in order."""
    return click.argument("checkpoints", nargs=-1, required=True, type=click.Path(path_type=Path), metavar=metavar)


def together(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """One decorator for several options, listed in this order in the help."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


spec = together(
    click.option(
        "--spec",
        "spec_from",
        default="auto",
        show_default=True,
        metavar="auto|FILE.json",
        help="Which axes belong together: found by config.json or the tensors' names, or from a file that "
        "'mudsc-fast spec --json' wrote.",
    ),
    click.option("--heads", type=click.IntRange(min=1), help="Attention heads, if no file tells them."),
    click.option("--groups", type=click.IntRange(min=1), help="GroupNorm groups, if no file tells them."),
)


def as_device(name: str) -> torch.device:
    """The device of this name; "auto" is CUDA where there is one. ValueError if it cannot be used here."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device: {name!r} asked for, but torch sees {torch.cuda.device_count()} CUDA devices")
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    return found


def as_dtype(name: str) -> torch.dtype | None:
    """The torch dtype of this name; None for "keep"."""
    import torch

    found = None if name == "keep" else getattr(torch, name)
    return found if isinstance(found, torch.dtype) else None


def open_all(paths: tuple[Path, ...], allow: bool, device: torch.device | None = None) -> list[Checkpoint]:
    """Open checkpoints and refuse those that cannot be merged with the first one (see ``cli.alike``)."""
    from mudsc_fast.checkpoints import open_checkpoint
    from mudsc_fast.cli import alike

    opened = [open_checkpoint(path, allow_torch_load=allow, device=device) for path in paths]
    for checkpoint in opened:
        alike.refuse_quantised(checkpoint)
    opened = alike.with_one_copy(opened)
    alike.require_alike(opened)
    return opened


def check_record(path: Path, option: str, inputs: Iterable[Path], force: bool) -> None:
    """Refuse a plan or statistics file that must not be written; errors name the option."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{option}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise ValueError(f"{option}: expected a file, {path} is a folder")
    if path.exists() and any(given.exists() and path.samefile(given) for given in inputs):
        raise ValueError(f"{option}: {path} is an input")
    if path.exists() and not force:
        raise FileExistsError(f"{option}: {path} exists already (--force replaces it)")
