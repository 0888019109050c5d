"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch

from mudsc_fast import _core

ISAS = _core.build_info()["isas_usable"]
THREADS = (1, 2, 3)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once for every instruction set that this machine can execute."""
    _core.use_isa(request.param)
    yield request.param
    _core.use_isa(None)


@pytest.fixture(params=THREADS)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs the test with 1, 2 and 3 threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def pytest_configure() -> None:
    # A shell lets what it runs in the background ignore Ctrl-C, and children inherit that; tests of it need it back.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    share_cores(int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def share_cores(workers: int) -> None:
    """Workers side by side, and the processes that they start, have an equal share of the cores each.

    OpenMP's threads spin while they wait for each other: two workers of two threads on two cores made tests of small
    networks fifty times slower. What depends on threads is tested with numbers of its own (fixture `threads`).
    """
    if workers > 1 and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        share = max(1, cores // workers)
        os.environ["OMP_NUM_THREADS"] = str(share)
        torch.set_num_threads(share)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files with slow tests first: what workers steal from each other at the end is short then, and none waits for long.
    long = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in long)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device on this machine")
    for item in items:
        if item.get_closest_marker("cuda") is not None:  # not keywords: those hold folder names too
            item.add_marker(skip)
