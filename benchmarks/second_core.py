"""What a second core is worth: one call on two threads against two processes that each run the same call on one.

The machine's two cores may share execution units, caches and memory, so the fair limit is not twice the speed of one
but what two independent processes reach together in the same run. Where a virtual machine's host puts the two cores far
apart, threads that share data pay for it and processes do not, so each row notes the way between them.
"""

from __future__ import annotations

import multiprocessing
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from mudsc_fast import _core

from .harness import OURS, Contender, Row, as_time

TARGET = 0.85
PROCESSES = "two processes"


def _serve(pipe: Connection, make: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    run = make(*arguments)
    run()
    pipe.send("ready")
    while pipe.recv() == "go":
        run()
        pipe.send("done")


class _Pair:
    """Two processes that wait for a word and then run once each."""

    def __init__(self, make: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]) -> None:
        context = multiprocessing.get_context("spawn")
        ends = [context.Pipe() for _ in range(2)]
        self.pipes = [near for near, _ in ends]
        self.processes = [context.Process(target=_serve, args=(far, make, arguments), daemon=True) for _, far in ends]
        for process in self.processes:
            process.start()
        self._wait()
        self.close = weakref.finalize(self, _stop, self.pipes, self.processes)

    def _wait(self) -> None:
        for pipe in self.pipes:
            pipe.recv()

    def run(self) -> None:
        for pipe in self.pipes:
            pipe.send("go")
        self._wait()


def _stop(pipes: list[Connection], processes: list[Any]) -> None:
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send("end")
        process.join()


def _way() -> str:
    return f"a cache line takes {as_time(_core.round_trip())} from one core to the other and back"


def row(
    op: str, case: str, size: int, make: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...], rounds: int = 5
) -> Row:
    """A row of the suite: two calls on two threads against one call in each of two processes.

    Args:
        make: a function of a module (the processes import it), called with ``arguments``: prepares the input and
            returns the call to be timed.
    """

    def contenders() -> list[Contender]:
        call = make(*arguments)
        pair = _Pair(make, arguments)

        def twice() -> None:
            call()
            call()

        return [Contender(OURS, twice), Contender(PROCESSES, pair.run)]

    return Row(
        op,
        f"{case}, second core",
        size,
        contenders,
        lambda name, result: 0.0,  # that threads change no result is for the tests to show
        0.0,
        target=TARGET,
        against=PROCESSES,
        threads=2,
        rounds=rounds,
        remark=_way,
    )
