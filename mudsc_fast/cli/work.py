"""Large runs of ``merge`` and ``align``: a memory limit, a look at the work beforehand, and going on after a kill."""

from __future__ import annotations

import errno
import fcntl
import re
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mudsc_fast.cli import options

if TYPE_CHECKING:
    from rich.table import Table

    from mudsc_fast.distributed import World
    from mudsc_fast.workplan import Step, WorkPlan

max_memory = click.option(
    "--max-memory",
    metavar="SIZE",
    help="Most memory that the process may hold, such as 4GB: tensors that do not fit are read one after another, or "
    "some rows at a time. Less than is possible is refused with the least that is.",
)
large = options.together(
    max_memory,
    click.option("--dry-run", is_flag=True, help="Only show the work: steps, estimated time, peak memory and disk."),
    click.option(
        "--resume",
        is_flag=True,
        help="Keep finished spaces and shards in a folder beside OUT until OUT is written, and go on from there if an "
        "interrupted run of the same inputs and options left some.",
    ),
)

# Visits of a space that the time estimate counts: most matches settle in three sweeps, of which some are remembered.
_SWEEPS = 3


def limit_of(size: str | None) -> int | None:
    """Bytes of --max-memory."""
    from mudsc_fast.checkpoints import parse_size

    return None if size is None else parse_size(size, "--max-memory")


class Resumption:
    """The folder in which a run with --resume keeps what is finished; nothing without --resume.

    output: of the run. about: all that decides the result, as plain values; ValueError, naming what differs, if the
    folder holds the work of another run, and while another process works in it. world: the processes that run together;
    the first one compares and decides.
    """

    def __init__(self, wanted: bool, output: Path, about: Mapping[str, Any], world: World | None = None) -> None:
        place = output.resolve()
        folder = place.parent / f".{place.name}.resume"
        self.folder = folder if wanted else None
        self._rank = None if world is None else world.rank
        self._lock: FileIO | None = None
        if not wanted:
            if folder.is_dir():
                options.settings().say(f"note: {folder} holds an unfinished run; --resume goes on from it")
            return

        def begin() -> bool:
            going_on = _begin(folder, about)
            self._lock = _alone_in(folder)
            return going_on

        going_on = begin() if world is None else world.first(begin)
        options.settings().kept = folder
        if going_on:
            options.settings().say(f"going on from {folder}")

    @property
    def journal(self) -> Path | None:
        """Where the match keeps this process's visits."""
        if self.folder is None:
            return None
        return self.folder / ("visits" if self._rank is None else f"visits-{self._rank}")

    def finish(self) -> None:
        """The output is written: nothing is needed any more."""
        options.settings().kept = None
        if self.folder is not None and not self._rank:
            shutil.rmtree(self.folder)
        if self._lock is not None:
            self._lock.close()


def _begin(folder: Path, about: Mapping[str, Any]) -> bool:
    """Make the folder or check that it holds the same run; whether there was one."""
    from mudsc_fast.journal import check_same

    going_on = folder.is_dir()
    folder.mkdir(exist_ok=True)
    check_same(folder / "run.json", about, "--resume")
    return going_on


def _alone_in(folder: Path) -> FileIO:
    """A file that no other process can have while this one has it open: two would write over each other's work."""
    lock = FileIO(str(folder / "lock"), "ab")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            lock.close()
            raise ValueError(f"--resume: another process works in {folder}; wait until it ends, or end it") from error
    return lock  # some network file systems know no locks


def files_of(paths: Iterable[Path | None]) -> list[list[Any]]:
    """[name, size, time of the last change in ns] of each file."""
    stats = [(path, path.stat()) for path in paths if path is not None]
    return [[str(path.resolve()), stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def show(work: WorkPlan, output: Path, files: Sequence[Path], resume: bool, limit: int | None) -> None:
    """The plan of work on stdout, with estimates of time, memory and disk."""
    from rich.console import Console

    from mudsc_fast.cli.inspecting import print_table
    from mudsc_fast.workplan import in_words

    flops, bytes_read = _rates(files)
    rows = _grouped(work.steps)
    print_table(_table(rows, flops, bytes_read))
    matching = sum(len(steps) * _visit_seconds(steps[0], flops, bytes_read) for _, steps in rows)
    writing = (work.read + 2 * work.output) / bytes_read
    where = "whole tensors" if work.merge_piece is None else f"slabs of at most {in_words(work.merge_piece)} a model"
    free = shutil.disk_usage(output.resolve().parent).free
    lines = [
        f"merging: {where}, {in_words(work.merge_memory)} of memory",
        f"peak memory: about {in_words(work.peak)}, of which {in_words(work.base)} are in use already"
        + ("" if limit is None else f" (limit {in_words(limit)})"),
        f"time: about {_duration(_SWEEPS * matching + writing)}: {_SWEEPS} sweeps of {_duration(matching)}, and "
        f"{_duration(writing)} to read and write the tensors",
        f"disk: {in_words(work.output)} for {output}, {in_words(free)} free"
        + (", and the labels of each visit until it is written" if resume else ""),
    ]
    console = Console(markup=False, highlight=False, emoji=False, width=200)
    for line in lines:
        console.print(line)


def _grouped(steps: Sequence[Step]) -> list[tuple[str, list[Step]]]:
    """Steps that differ only in the number of their layer, together."""
    found: dict[tuple[Any, ...], list[Step]] = {}
    for step in steps:
        pattern = ", ".join(re.sub(r"\d+", "*", name) for name in step.spaces)
        found.setdefault((pattern, step.width, step.way, step.memory), []).append(step)
    return [(key[0] if len(group) > 1 else ", ".join(group[0].spaces), group) for key, group in found.items()]


def _table(rows: Sequence[tuple[str, list[Step]]], flops: float, bytes_read: float) -> Table:
    from rich.table import Table

    from mudsc_fast.workplan import in_words

    table = Table(title="Work of one sweep", title_justify="left")
    table.add_column("spaces", overflow="fold")
    for heading in ("steps", "widest", "tensors", "memory", "Gflop", "read", "time"):
        table.add_column(heading, justify="right")
    for name, steps in rows:
        step = steps[0]
        ways = {
            "joint": "together",
            "streamed": f"one by one, {in_words(step.piece)} at most",
            "rows": f"rows of the similarity, {in_words(step.piece)} at a time",
            "blocks": f"rows of a block of the similarity, {in_words(step.piece)} at a time",
        }
        way = ways.get(step.way, f"lists of {in_words(step.piece)}, proven or refused")
        each = _visit_seconds(step, flops, bytes_read)
        cells = [str(len(steps)), str(step.width), way, in_words(step.memory), f"{step.flops / 1e9:.0f}"]
        table.add_row(name, *cells, in_words(step.read), f"{len(steps)} x {_duration(each)}")
    return table


def _visit_seconds(step: Step, flops: float, bytes_read: float) -> float:
    # An assignment of n units takes about as long as this on one core (docs/performance.md, row "uniform").
    return step.flops / flops + step.read / bytes_read + 0.02 * float((step.width / 2048) ** 2.5)


def _rates(files: Sequence[Path]) -> tuple[float, float]:
    """Floating-point operations and bytes read a second, tried for a fraction of a second."""
    import torch

    from mudsc_fast.similarity import weight_similarity

    terms = [[torch.randn(512, 4096) for _ in range(2)]]
    weight_similarity(terms)
    start = time.perf_counter()
    weight_similarity(terms)
    flops = 2.0 * 512 * 512 * 4096 / (time.perf_counter() - start)
    start, done = time.perf_counter(), 0
    for path in files[:2]:
        with path.open("rb", buffering=0) as file:
            done += len(file.read(32 * 2**20))
    return flops, max(done, 1) / max(time.perf_counter() - start, 1e-6)


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
