"""Progress on stderr: bars on a terminal; elsewhere nothing, or for the command line plain lines or JSON lines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

# True: a bar where stderr is a terminal; "always": also in a log file; False: never.
Progress = bool | Literal["always"]

# bar: on a terminal alone. lines: elsewhere a line now and then. json: a JSON object a line, on a terminal too.
Style = Literal["bar", "lines", "json"]

_style: ContextVar[Style] = ContextVar("style", default="bar")
_SECONDS_BETWEEN = {"lines": 10.0, "json": 1.0}


@contextmanager
def styled(style: Style) -> Iterator[None]:
    """Show progress in this style while the block runs."""
    token = _style.set(style)
    try:
        yield
    finally:
        _style.reset(token)


class _Lines:
    """Progress as lines: the first after a while, and then one now and then, with the time that is left."""

    def __init__(self, description: str, total: int | None, style: Style) -> None:
        self._what, self._total, self._style = description, total, style
        self._done = 0
        self._start = time.monotonic()
        self._last = self._start
        if style == "json":
            self._show(self._start)

    def advance(self, task: Any, steps: int) -> None:
        self._done += steps
        now = time.monotonic()
        if now - self._last >= _SECONDS_BETWEEN[self._style]:
            self._show(now)

    def update(self, task: Any, description: str) -> None:
        self._what = description

    def finish(self) -> None:
        """The last line, where there have been some."""
        if self._style == "json" or self._last > self._start:
            self._show(time.monotonic())

    def _show(self, now: float) -> None:
        self._last = now
        seconds = now - self._start
        left = None
        if self._total is not None and 0 < self._done <= self._total:
            left = seconds / self._done * (self._total - self._done)
        if self._style == "json":
            line = json.dumps(
                {
                    "event": "progress",
                    "what": self._what,
                    "done": self._done,
                    "total": self._total,
                    "seconds": round(seconds, 3),
                    "seconds_left": None if left is None else round(left, 3),
                }
            )
        else:
            count = str(self._done) if self._total is None else f"{self._done} of {self._total}"
            line = f"{self._what}: {count}, {duration(seconds)}"
            line += "" if left is None else f", about {duration(left)} left"
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


def duration(seconds: float) -> str:
    """A time span for people: "42 s", "7 min", "2 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


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
    return progress == "always" or (bool(progress) and (sys.stderr.isatty() or _style.get() != "bar"))


@contextmanager
def bar(description: str, total: int | None, progress: Progress) -> Iterator[Bar]:
    """A bar of `total` steps (None: unknown) that disappears when the block ends."""
    if not wanted(progress):
        yield Bar()
        return
    style = _style.get()
    if style == "json" or (style == "lines" and not sys.stderr.isatty()):
        lines = _Lines(description, total, style)
        yield Bar(lines)
        lines.finish()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Display

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Display(*columns, console=Console(stderr=True), transient=progress != "always") as display:
        yield Bar(display, display.add_task(description, total=total))
