"""How a row of the suite is checked, timed and judged.

Times drift on shared machines, so a row's contenders take turns (A B B A A B ...) and the ratio is the median over
rounds of each round's own ratio. Who goes first is drawn anew each round: a contender finds in the caches what the one
before it left there. A row counts only if every contender's result was right.
"""

from __future__ import annotations

import math
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

OURS = "mudsc_fast"

# Seconds. What takes longer than the first is repeated only where the row's verdict hangs on it; what takes longer than
# the second never is: it has averaged over seconds already.
LONG = 0.3
LONGEST = 4.0
# Seconds. Calls that are shorter are repeated for about so long.
SHORT = 2e-3
# Bytes that are written before a cold call, at least.
LEAST_OTHER = 80 << 20
# A ratio this many times its target does not hang on noise: what takes long then keeps its first time.
CLEAR = 2.0
# Rounds at the least for two contenders that take turns.
TURNS = 3
# Contenders on which the verdict hangs go on taking turns for so long, in seconds and as a share of the row's budget,
# and at most for so many rounds: what else runs on the machine comes and goes within tenths of a second.
STEADY = 1.0, 1 / 6
MOST_ROUNDS = 101
# MiB. A first run that takes more memory than this from the system waits for it for seconds, where the machine is a
# virtual one whose host gives pages on first touch: ours is then timed in further runs, however long they are.
FRESH_MEMORY = 1024.0


@dataclass(frozen=True)
class Contender:
    """One way to compute a row's result. ``why_missing`` is set instead of ``run`` when it cannot run here."""

    name: str
    run: Callable[[], Any] | None
    why_missing: str | None = None


@dataclass(frozen=True)
class Row:
    """One line of the suite.

    Attributes:
        op, case, size: what is measured; rows of one op and case differ in size only and give a growth exponent.
        contenders: made when the row is run, so that a row costs nothing before; ours is named ``OURS``.
        error: from a contender's name and result to its error; the row fails above ``tolerance``.
        target: the least ratio of ``against``'s time to ours; None: reported, not judged.
        against: a contender's name, or "best" for the fastest of the others.
        work: floating-point operations or bytes that the result needs, with ``unit`` "flop" or "byte".
        work_of: the same of contenders that do more.
        at_most: instead of a ratio, seconds that ours may take.
        memory_at_most: besides, MiB of extra memory that ours may take.
        also: further verdicts on the same times, (case, against, target) each; each is a result of its own.
        cold: other memory is written before each call that is timed, so that no contender finds tensors in the caches.
        remark: what is to be said of the machine after the row was timed; it becomes the note.
    """

    op: str
    case: str
    size: int
    contenders: Callable[[], Sequence[Contender]]
    error: Callable[[str, Any], float]
    tolerance: float
    target: float | None = None
    against: str = "best"
    work: float = 0.0
    unit: str = ""
    threads: int = 1
    rounds: int = 7
    at_most: float | None = None
    memory_at_most: float | None = None
    note: str = ""
    also: tuple[tuple[str, str, float], ...] = ()
    work_of: Mapping[str, float] = field(default_factory=dict)
    cold: bool = False
    remark: Callable[[], str] | None = None


@dataclass
class Result:
    """What a row gave; seconds are medians."""

    op: str
    case: str
    size: int
    threads: int
    seconds: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)  # interquartile range over the median
    ratios: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    extra_mib: float | None = None
    rate: float | None = None  # work per second
    unit: str = ""
    ceiling_share: float | None = None
    shares: dict[str, float] = field(default_factory=dict)  # of the ceiling, by what each contender of work_of does
    target: float | None = None
    against: str = ""
    measured: float | None = None
    at_most: float | None = None
    memory_at_most: float | None = None
    note: str = ""
    wall: dict[str, float] = field(default_factory=dict)  # seconds that the row took: "prepare", "check", "time"

    @property
    def met(self) -> bool | None:
        """Whether the target was met; None without one."""
        if self.memory_at_most is not None and (self.extra_mib is None or self.extra_mib > self.memory_at_most):
            return False
        if self.at_most is not None:
            return self.seconds.get(OURS, math.inf) <= self.at_most
        if self.target is None:
            return None if self.memory_at_most is None else True
        return self.measured is not None and self.measured >= self.target

    def to_json(self) -> dict[str, Any]:
        """Plain data, with whether the target was met."""
        return {**asdict(self), "met": self.met}


def as_time(seconds: float) -> str:
    """Three digits, and the unit that suits them."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


class WrongResult(RuntimeError):
    """A contender's result differs from the reference by more than its row allows."""


@contextmanager
def threads_set(count: int) -> Iterator[None]:
    """Run with this many torch (and so mudsc_fast) threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_row(row: Row, ceilings: dict[str, float] | None = None, budget: float = 20.0) -> Result:
    """Check every contender of a row, then time them in turns for at most about ``budget`` seconds."""
    result = Result(row.op, row.case, row.size, row.threads, target=row.target, against=row.against, note=row.note)
    result.at_most, result.memory_at_most = row.at_most, row.memory_at_most
    started = time.perf_counter()
    contenders = row.contenders()  # on all cores, as the checks are
    prepared = time.perf_counter()
    result.missing = {c.name: c.why_missing or "" for c in contenders if c.run is None}
    running = [c for c in contenders if c.run is not None]
    first = {c.name: _checked(row, c, result) for c in running}
    checked = time.perf_counter()
    with threads_set(row.threads):
        times = _take_turns(row, running, first, budget, fresh=(result.extra_mib or 0.0) > FRESH_MEMORY)
    timed = time.perf_counter()
    result.note = row.remark() if row.remark is not None else result.note
    # A first run is both: what it took counts as timing.
    result.wall = {
        "prepare": prepared - started,
        "check": checked - prepared - sum(first.values()),
        "time": timed - checked + sum(first.values()),
    }
    for name, taken in times.items():
        result.seconds[name] = statistics.median(taken)
        result.spread[name] = _spread(taken)
    _judge(row, result, times)
    if row.work:
        result.rate, result.unit = row.work / result.seconds[OURS], row.unit
        ceiling = (ceilings or {}).get(row.unit)
        if ceiling:
            ceiling *= row.threads if row.unit == "flop" else 1
            result.ceiling_share = result.rate / ceiling
            done = {name: work for name, work in row.work_of.items() if name in result.seconds}
            result.shares = {name: work / result.seconds[name] / ceiling for name, work in done.items()}
    return result


def _checked(row: Row, contender: Contender, result: Result) -> float:
    """Run once, check the result, and return the seconds it took; ours also notes its peak of extra memory."""
    run = contender.run
    if run is None:
        return math.inf
    with threads_set(row.threads), _peak_memory() as peak:
        start = time.perf_counter()
        value = run()
        taken = time.perf_counter() - start
    if contender.name == OURS:
        result.extra_mib = peak[0]
    error = row.error(contender.name, value)
    result.errors[contender.name] = error
    if not error <= row.tolerance:
        raise WrongResult(
            f"{row.op} {row.case} {row.size}: {contender.name} is off by {error:.3g} > {row.tolerance:.3g}"
        )
    return taken


@contextmanager
def _peak_memory() -> Iterator[list[float]]:
    """MiB by which the process's peak rose above what it held before (Linux; elsewhere None stays 0)."""
    found = [0.0]
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = _resident()
        yield found
        found[0] = max(0.0, _high_water() - before)
    except OSError:
        yield found


def _status(key: str) -> float:
    with open("/proc/self/status") as file:
        return next(float(line.split()[1]) / 1024 for line in file if line.startswith(key))


def _resident() -> float:
    return _status("VmRSS:")


def _high_water() -> float:
    return _status("VmHWM:")


def _decisive(row: Row, first: dict[str, float]) -> set[str]:
    """The contenders on whose times the row's verdict hangs: those named, or the quickest and what comes near it."""
    aims = [(row.against, row.target), *((against, target) for _, against, target in row.also)]
    others = {name: taken for name, taken in first.items() if name != OURS}
    quickest = min(others.values(), default=math.inf)

    def hangs_on(name: str) -> bool:
        least = [
            target
            for against, target in aims
            if target is not None and (against == name or (against == "best" and others[name] <= 2 * quickest))
        ]
        return bool(least) and others[name] < CLEAR * max(least) * first[OURS]

    return {name for name in others if hangs_on(name)}


def _take_turns(
    row: Row, running: Sequence[Contender], first: dict[str, float], budget: float, fresh: bool = False
) -> dict[str, list[float]]:
    """Times of each contender. What takes long and decides nothing keeps its first time, that of its check; ``fresh``:
    ours does not, since that went into fetching memory. Rounds beyond the row's own are of those that decide."""
    times: dict[str, list[float]] = {c.name: [] for c in running}
    repeated = {OURS, *_decisive(row, first)}
    once = {name for name, taken in first.items() if taken > (LONGEST if name in repeated else LONG)}
    if fresh:
        once.discard(OURS)
    turns = [c for c in running if c.name not in once]
    # A call shorter than the clock and the scheduler resolve is repeated within a turn, unless it is to be cold; how
    # often is told by its second run, since the first also brought its code and data into the caches.
    again = {c.name: _seconds(c) if first[c.name] < 2e-2 else first[c.name] for c in turns}
    repeats = {c.name: 1 if row.cold else max(1, min(1000, int(SHORT / max(again[c.name], 1e-7)))) for c in turns}
    least = TURNS if len(turns) > 1 else 1
    steady = min(STEADY[0], STEADY[1] * budget)
    start = time.perf_counter()
    decided = [c for c in turns if c.name in repeated]
    order = random.Random(0)
    for done in range(MOST_ROUNDS if turns else 0):
        passed = time.perf_counter() - start
        if done >= least and passed * (done + 1) / done > budget:
            break
        if done >= row.rounds and (len(decided) < 2 or passed > steady):
            break
        playing = turns if done < row.rounds else decided
        for c in order.sample(playing, len(playing)):
            if c.run is None:
                continue
            if row.cold:
                _fill_caches()
            begin = time.perf_counter()
            for _ in range(repeats[c.name]):
                c.run()
            times[c.name].append((time.perf_counter() - begin) / repeats[c.name])
    for name in once:
        times[name] = [first[name]]
    return times


@cache
def _other_memory() -> torch.Tensor:
    """More than twice what the last cache holds, as far as the system tells."""
    last = 0
    with suppress(OSError, ValueError):  # "32768K"
        last = int(Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip().rstrip("K")) << 10
    return torch.zeros(max(LEAST_OTHER, 5 * last // 2), dtype=torch.uint8)


def _fill_caches() -> None:
    _other_memory().add_(1)


def _seconds(contender: Contender) -> float:
    start = time.perf_counter()
    if contender.run is not None:
        contender.run()
    return time.perf_counter() - start


def _spread(taken: Sequence[float]) -> float:
    if len(taken) < 3:
        return 0.0
    low, _, high = statistics.quantiles(taken, n=4)
    return (high - low) / statistics.median(taken)


def _judge(row: Row, result: Result, times: dict[str, list[float]]) -> None:
    ours = times[OURS]
    for name, taken in times.items():
        if name == OURS:
            continue
        if 1 < len(taken) <= len(ours):  # what decides nothing was in the first rounds alone
            result.ratios[name] = statistics.median(t / o for t, o in zip(taken, ours, strict=False))
        else:
            result.ratios[name] = statistics.median(taken) / statistics.median(ours)
    if row.against == "best":
        result.measured = min(result.ratios.values(), default=None)
    else:
        result.measured = result.ratios.get(row.against)


def further(row: Row, result: Result) -> Iterator[Result]:
    """The row's other verdicts, on the same times."""
    for case, against, target in row.also:
        if against in result.ratios:
            measured = result.ratios[against]
            yield replace(result, case=case, against=against, target=target, measured=measured, wall={})


def growth(
    results: Iterable[Result], largest: Mapping[tuple[str, str], int] | None = None
) -> dict[tuple[str, str, int], tuple[float, int, int]]:
    """Our time's fitted exponent against size, and the least and largest size of the fit.

    One for each op, case and thread count with three sizes or more; ``largest``: sizes above it are not in the fit of
    that op and case.
    """
    most = largest or {}
    groups: dict[tuple[str, str, int], list[tuple[int, float]]] = {}
    for r in results:
        if OURS in r.seconds and 0 < r.size <= most.get((r.op, r.case), r.size):
            groups.setdefault((r.op, r.case, r.threads), []).append((r.size, r.seconds[OURS]))
    fitted = {}
    for key, points in groups.items():
        sizes, seconds = zip(*points, strict=True)
        if len(set(sizes)) >= 3:
            slope = statistics.linear_regression([math.log(n) for n in sizes], [math.log(t) for t in seconds]).slope
            fitted[key] = (slope, min(sizes), max(sizes))
    return fitted


def peak_rss_mib() -> float:
    """The process's highest resident memory so far, MiB."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (1 << 20 if sys.platform == "darwin" else 1 << 10)
