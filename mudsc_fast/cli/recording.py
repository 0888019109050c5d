"""The record of a merge, kept up to date while it runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mudsc_fast.cli.origins import ORIGINS, digests

if TYPE_CHECKING:
    from mudsc_fast.checkpoints import Checkpoint
    from mudsc_fast.plan import MergePlan

# Called once the match is known, with what the output's header says about it, and the checkpoints.
Note = Callable[[Mapping[str, str], "MergePlan | None", "Sequence[Checkpoint]"], None]


class Recorded(Protocol):
    """What of a request goes into its record."""

    @property
    def checkpoints(self) -> tuple[Path, ...]: ...
    @property
    def output(self) -> Path: ...
    @property
    def stats(self) -> Path | None: ...
    @property
    def record(self) -> Path | None: ...


def check_run_folder(folder: Path, force: bool) -> None:
    """Refuse a folder that holds another run's record, unless it may be replaced."""
    from mudsc_fast.evaluation.run_record import RUN_FILE

    if not folder.parent.is_dir():
        raise FileNotFoundError(f"--record: the folder {folder.parent} does not exist")
    if (folder / RUN_FILE).exists() and not force:
        raise FileExistsError(f"--record: {folder} holds the record of a run already (--force replaces it)")


@contextmanager
def recorded(request: Recorded) -> Iterator[Note]:
    """Keep the request's record: written as running, then with the match, then as done or failed."""
    if request.record is None:
        yield lambda about, plan, opened: None
        return
    import torch

    import mudsc_fast
    from mudsc_fast.evaluation.run_record import PLAN_FILE, RunRecord, write_run

    folder = request.record
    folder.mkdir(exist_ok=True)
    (folder / PLAN_FILE).unlink(missing_ok=True)
    record = RunRecord(
        command=["mudsc-fast", *sys.argv[1:]],
        folder=str(Path.cwd()),
        inputs=[str(path) for path in request.checkpoints],
        output=str(request.output),
        options={},
        stats=None if request.stats is None else str(request.stats),
        version=mudsc_fast.__version__,
        torch=torch.__version__,
    )
    start = time.perf_counter()

    def note(about: Mapping[str, str], plan: MergePlan | None, opened: Sequence[Checkpoint]) -> None:
        record.options = dict(about)
        write_run(folder, record, plan, {ORIGINS: digests(opened)})

    write_run(folder, record)
    try:
        yield note
    except BaseException as error:
        record.status, record.error = "failed", f"{type(error).__name__}: {error}"
        raise
    else:
        record.status = "done"
    finally:
        record.seconds = time.perf_counter() - start
        write_run(folder, record)
