"""The program around the commands: errors become one line and an exit code."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from types import FrameType

import click

from mudsc_fast.cli import processes
from mudsc_fast.cli.benchmarking import bench
from mudsc_fast.cli.calibrating import calibrate
from mudsc_fast.cli.group import Commands
from mudsc_fast.cli.inspecting import check, info, spec
from mudsc_fast.cli.landscapes import landscape
from mudsc_fast.cli.mergekit import mergekit
from mudsc_fast.cli.merging import align, merge
from mudsc_fast.cli.options import CONTEXT, Settings
from mudsc_fast.cli.reporting import report
from mudsc_fast.cli.self_help import completion, doctor, run, schema
from mudsc_fast.progress import styled

DONE, FAILED, USAGE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143

_FORMAT: ContextVar[str] = ContextVar("format", default="text")

# What the user can mend by naming another path; a full or failing disk is none of these.
_PATH_ERRNOS = {
    errno.ENOENT,
    errno.EEXIST,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}


def _show_version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        import mudsc_fast

        click.echo(f"mudsc-fast {mudsc_fast.__version__}")
        context.exit()


@click.group(cls=Commands, context_settings=CONTEXT, invoke_without_command=True)
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_show_version,
    help="Show the version and exit.",
)
@click.pass_context
def cli(context: click.Context) -> None:
    """Merge trained networks without training them again.

    Units (channels, neurons, attention heads) of separately trained models are matched by the similarity of their
    weights and of their activations, then averaged with their match. Two checkpoints of one architecture go in, one
    comes out:

    \b
      mudsc-fast merge a.safetensors b.safetensors -o merged.safetensors

    With activations the match is better. They are recorded once, from any unlabelled inputs:

    \b
      mudsc-fast calibrate a.safetensors b.safetensors --model net:build \\
          --inputs images.npy -o stats.safetensors
      mudsc-fast merge a.safetensors b.safetensors --stats stats.safetensors \\
          -o merged.safetensors

    Exit codes: 0 done, 1 failed, 2 bad usage or input, 130 interrupted. Every output is written under a temporary
    name and renamed, so an interrupted run leaves nothing behind.
    """
    if context.invoked_subcommand is None:
        # click's own no_args_is_help exits with 0 or 2, depending on its version.
        click.echo(context.get_help(), err=True)
        context.exit(USAGE)


for _command in (
    merge,
    align,
    mergekit,
    calibrate,
    spec,
    check,
    bench,
    landscape,
    report,
    info,
    doctor,
    schema,
    run,
    completion,
):
    cli.add_command(_command)


def main(args: Sequence[str] | None = None) -> int:
    """Run ``mudsc-fast`` with these arguments (default: the process's) and return its exit code."""
    settings = Settings()
    try:
        with _terminating(), styled("lines"):
            code = cli.main(
                args=None if args is None else list(args), prog_name="mudsc-fast", standalone_mode=False, obj=settings
            )
    except BaseException as error:  # noqa: BLE001 (Ctrl-C and SIGTERM have exit codes too)
        if settings.debug and not isinstance(error, SystemExit | click.UsageError):
            traceback.print_exc()
        if isinstance(error, Exception):
            processes.leave()
        return _explained(error, settings)
    processes.leave()
    return code if isinstance(code, int) else DONE


def _explained(error: BaseException, settings: Settings) -> int:
    """``_explain`` in the format that was asked for, and where the configuration file says what is wrong."""
    token = _FORMAT.set(settings.log_format)
    try:
        code = _explain(error, settings.kept)
        for option, where in settings.config_lines.items():
            if re.search(rf"{option}\b(?!-)", str(error)):
                _say(f"{option} is set at {where}")
        return code
    finally:
        _FORMAT.reset(token)


def _explain(error: BaseException, kept: Path | None = None) -> int:
    """Say on stderr what went wrong, and give the exit code for it. kept: where finished work is, if it is."""
    if kept is not None and kept.is_dir() and not isinstance(error, click.ClickException):
        _say(f"what is finished stays in {kept}: the same command with --resume goes on from there")
    match error:
        case click.ClickException():
            if _FORMAT.get() == "json":
                _say(f"error: {error.format_message()}")
            else:
                error.show()
            return error.exit_code
        case click.Abort() | KeyboardInterrupt():
            _say("interrupted" if kept is not None else "interrupted; nothing was left behind")
            return INTERRUPTED
        case SystemExit():
            return error.code if isinstance(error.code, int) else FAILED
        case BrokenPipeError():
            # The reader of our output has gone (``| head``); flushing at exit would complain once more.
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FAILED
        case OSError():
            where = f"{error.filename}: " if error.filename else ""
            _say(f"error: {where}{error.strerror or error}")
            return USAGE if error.errno is None or error.errno in _PATH_ERRNOS else FAILED
        case ValueError() | TypeError():
            _say(f"error: {error}")
            return USAGE
        case MemoryError():
            _say(f"failed: not enough memory{f' ({error})' if str(error) else ''}")
            return FAILED
        case _:
            _say(f"failed: {type(error).__name__}: {error} (--debug shows where)")
            return FAILED


def _say(text: str) -> None:
    json_line = json.dumps({"event": "error", "text": text})
    click.echo(json_line if _FORMAT.get() == "json" else f"mudsc-fast: {text}", err=True)


@contextmanager
def _terminating() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that temporaries are removed as they are after Ctrl-C."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
