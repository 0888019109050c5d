"""Progress bars on stderr: rich ones on a terminal, nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

# True: a bar where stderr is a terminal; "always": also in a log file; False: never.
Progress = bool | Literal["always"]


class Bar:
    """One running bar; without a display every call is free."""

    def __init__(self, display: Any = None, task: Any = None) -> None:
        self._display = display
        self._task = task

    def advance(self, steps: int = 1) -> None:
        if self._display is not None:
            self._display.advance(self._task, steps)

    def describe(self, text: str) -> None:
        if self._display is not None:
            self._display.update(self._task, description=text)


def wanted(progress: Progress) -> bool:
    """Whether a bar is to be drawn; raises ValueError for anything but True, False and "always"."""
    if progress not in (True, False, "always"):
        raise ValueError(f'progress: expected True, False or "always", got {progress!r}')
    return progress == "always" or (bool(progress) and sys.stderr.isatty())


@contextmanager
def bar(description: str, total: int | None, progress: Progress) -> Iterator[Bar]:
    """A bar of `total` steps (None: unknown) that disappears when the block ends."""
    if not wanted(progress):
        yield Bar()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Display

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Display(*columns, console=Console(stderr=True), transient=progress != "always") as display:
        yield Bar(display, display.add_task(description, total=total))
