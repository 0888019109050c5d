"""``mudsc-fast doctor``, ``schema``, ``completion`` and ``run``: what a user needs around the merging itself."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from mudsc_fast.cli import options
from mudsc_fast.cli.progress import track

# {extra: what it is for, and the modules that it brings}
_EXTRAS = {
    "hf": ("Hugging Face folders", ("transformers", "huggingface_hub")),
    "mergekit": ("mudsc-fast mergekit", ("mergekit",)),
    "plot": ("figures", ("matplotlib",)),
    "gpu": ("Triton kernels", ("triton",)),
    "bench": ("peers in benchmarks", ("scipy", "lapjv", "lap")),
}


@click.command(short_help="Say what this machine can run and what is missing; test it.")
@click.option("--no-test", is_flag=True, help="Only look; do not run the self-test.")
@options.quiet
@options.debug
def doctor(no_test: bool) -> int:
    """Say what this machine can run, which extras are missing, and run a self-test of some seconds.

    The self-test compares every kernel with the float64 reference, and merges a small network with its permuted self
    through files, which must give the network back. Exit code 1 if something is wrong; missing extras are not.
    """
    for name, text in _machine():
        click.echo(f"{name:<12} {text}")
    for extra, (purpose, modules) in _EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        state = "here" if not missing else f"missing ({', '.join(missing)}): pip install 'mudsc-fast[{extra}]'"
        click.echo(f"{extra:<12} {purpose}: {state}")
    if no_test:
        return 0
    start = time.perf_counter()
    wrong = list(_self_test())
    for problem in wrong:
        click.echo(f"WRONG        {problem}")
    click.echo(f"self-test    {f'{len(wrong)} wrong' if wrong else 'all right'}, {time.perf_counter() - start:.0f} s")
    return 1 if wrong else 0


def _machine() -> Iterator[tuple[str, str]]:
    import torch

    import mudsc_fast
    from mudsc_fast.build import build_config

    built = build_config()
    yield "mudsc-fast", f"{mudsc_fast.__version__}, Python {platform.python_version()}, torch {torch.__version__}"
    yield (
        "machine",
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
    )
    yield "kernels", ", ".join(map(str, built["isas_usable"]))
    memory = _memory()
    if memory is not None:
        yield "memory", f"{memory[1] / 2**30:.1f} GiB, {memory[0] / 2**30:.1f} GiB free"
    yield "disk", f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB free here"
    count = torch.cuda.device_count()
    names = ", ".join(torch.cuda.get_device_name(k) for k in range(count))
    yield "CUDA", names or ("no device" if torch.version.cuda else "torch was built without it")


def _memory() -> tuple[int, int] | None:
    """(available, total) bytes, where the system tells."""
    try:
        rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
        return int(rows["MemAvailable"].split()[0]) * 1024, int(rows["MemTotal"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return None


def _self_test() -> Iterator[str]:
    import torch

    from mudsc_fast.checking import run_checks

    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for outcome in track(run_checks(devices), "comparing kernels with the reference", None, options.settings().quiet):
        if not outcome.ok:
            yield f"{outcome.op} ({outcome.case}) on {outcome.place}: error {outcome.error:.1e} {outcome.note}".rstrip()
    error = _round_trip()
    if error > 1e-6:
        yield f"a network merged with its permuted self differs from itself by {error:.1e}"


def _round_trip() -> float:
    """A random network, permuted, merged with itself through files: the largest difference from itself."""
    import tempfile

    import torch

    import mudsc_fast as mf
    from mudsc_fast.checkpoints import open_checkpoint, save_checkpoint

    generator = torch.Generator().manual_seed(0)
    sizes = [20, 64, 48, 10]
    state = {}
    for k, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        name = "head" if k == 2 else f"fc{k + 1}"
        state[f"{name}.weight"] = torch.randn(outputs, inputs, generator=generator)
        state[f"{name}.bias"] = torch.randn(outputs, generator=generator)
    spec = mf.spec_for(state)
    with tempfile.TemporaryDirectory() as folder:
        for name, each in (("a", state), ("b", spec.permute(state, spec.random_permutation(1)))):
            save_checkpoint(Path(folder) / f"{name}.safetensors", each)
        opened = [open_checkpoint(Path(folder) / f"{name}.safetensors") for name in "ab"]
        merged = mf.match(opened, spec, balance=1.0, progress=False).merge(opened)
    return max(float((merged[name] - state[name]).abs().max()) for name in state)


@click.command(short_help="Export the JSON schema of configuration files.")
@click.argument("which", required=False, metavar="[COMMAND|mudsc]")
@click.pass_context
def schema(context: click.Context, which: str | None) -> None:
    """Print the JSON schema of configuration files, for editors.

    Without an argument it holds every command's files, told apart by their key 'command'. 'mudsc' is the section in a
    mergekit configuration.

    \b
    Example, for an editor with a YAML language server:
      mudsc-fast schema > mudsc-fast.schema.json
      # then at the top of run.yml:
      # yaml-language-server: $schema=mudsc-fast.schema.json
    """
    from mudsc_fast.cli.group import configured
    from mudsc_fast.configuration.commands import json_schema, mudsc_schema

    commands = configured(context)
    if which == "mudsc":
        found: dict[str, Any] = mudsc_schema()
    elif which is None:
        found = json_schema(commands)
    else:
        chosen = [command for command in commands if command.name == which]
        if not chosen:
            known = ", ".join(str(command.name) for command in commands)
            raise click.UsageError(f"expected mudsc or one of {known}, got {which!r}")
        found = json_schema(chosen)
    click.echo(json.dumps(found, indent=2))


@click.command(short_help="Run the command that a configuration file is for.")
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE.yml")
@click.argument("flags", nargs=-1, metavar="[FLAGS]")
def run(file: Path, flags: tuple[str, ...]) -> None:
    """Run the command that FILE.yml names with its key 'command'; flags go before what it says.

    \b
    Example:
      mudsc-fast run run.yml --force
    """
    # Commands.resolve_command puts the file's command in the place of this one, unless FILE looks like an option.
    raise click.UsageError(f"expected a file, got {str(file)!r}")


_SHELLS = ("bash", "zsh", "fish")


@click.command(short_help="Print a script that completes commands and options.")
@click.argument("shell", type=click.Choice(_SHELLS))
def completion(shell: str) -> None:
    """Print a script for SHELL that completes commands and options.

    \b
    Examples:
      mudsc-fast completion bash >> ~/.bashrc
      mudsc-fast completion zsh >> ~/.zshrc
      mudsc-fast completion fish > ~/.config/fish/completions/mudsc-fast.fish
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    if found is None:
        raise click.UsageError(f"click {importlib.metadata.version('click')} has no completion for {shell}")
    root = click.get_current_context().find_root()
    script = found(root.command, {}, "mudsc-fast", "_MUDSC_FAST_COMPLETE").source()
    sys.stdout.write(script + "\n")
