"""assign against the best linear assignment codes in Python, over families of matrices."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mudsc_fast as mf
from mudsc_fast import _core

from . import recorded, refusal, second_core
from .families import FAMILIES, make
from .harness import OURS, Contender, Result, Row
from .peers import ASSIGNMENT_PEERS

COLD = "its own cold start"
# Seconds that one run of a peer may take, and of the one that was the quickest at the size before. What takes longer,
# as its own growth predicts, is left out.
LONGEST = 3.0
LONGEST_OF_QUICKEST = 15.0
# Beyond this size only the peer that was the quickest at half of it.
LARGEST_FOR_ALL = 8192

# Where NaN and infinities are looked for; of related features the first pass is nearly all there is.
REFUSED = [(name, n) for name in ("unrelated", "related") for n in (64, 256, 1024, 4096, 8192)]

# What a peer in float32 may lose against the optimum, relative to the sum taken.
TOLERANCE = 1e-5


class _Best:
    """The best mean value seen for a row: all contenders must reach it."""

    def __init__(self) -> None:
        self.value = -float("inf")

    def error(self, value: float) -> float:
        short = max(0.0, self.value - value) / max(abs(self.value), 1e-30) if self.value > -float("inf") else 0.0
        self.value = max(self.value, value)
        return short


def _taken(similarity: Tensor, indices: Tensor) -> float:
    return float(similarity.gather(-1, indices[..., None]).double().mean())


def _read(result: mf.Assignment) -> mf.Assignment:
    """A small problem's tensors are made when they are read: what the peers return counts for us too."""
    _ = result.indices
    return result


class _Family:
    """The rows of one family by rising size; which peers run at a size is told by their times at smaller ones."""

    def __init__(self, name: str) -> None:
        self.name = name
        # Of each peer, by size: seconds of its first run.
        self.seen: dict[str, dict[int, float]] = {peer: {} for peer in ASSIGNMENT_PEERS}

    def predicted(self, peer: str, n: int) -> float:
        """Seconds at n: as the peer's time grew between the last two sizes, or as the cube after one."""
        *before, (size, taken) = self.seen[peer].items()
        power = 3.0
        if before:
            smaller, less = before[-1]
            power = min(max(math.log(taken / less) / math.log(size / smaller), 2.0), 4.0)
        return taken * (n / size) ** power

    def row(self, n: int) -> Row:
        """One size. Where no peer is run, ours may take what the quickest took at a smaller size."""
        best = _Best()
        held: dict[str, Tensor] = {}
        last = {peer: max(seen) for peer, seen in self.seen.items() if seen}
        why_not = {peer: self._why_not(peer, n) for peer in ASSIGNMENT_PEERS} if last else {}
        none_runs = bool(why_not) and all(why_not.values())
        # Every solver reads every entry, so that its time grows as the square at the least.
        bounds = {peer: self.seen[peer][size] * (n / size) ** 2 for peer, size in last.items()}
        quickest = min(bounds, key=lambda peer: bounds[peer]) if none_runs else ""

        def contenders() -> list[Contender]:
            similarity = FAMILIES[self.name](n, torch.Generator().manual_seed(n))
            held["similarity"] = similarity
            return [Contender(OURS, lambda: _read(mf.assign(similarity))), *self._peers(similarity, why_not)]

        def error(name: str, result: Any) -> float:
            if name == OURS:
                # The duality gap is our own proof; it must be small whatever the peers say.
                size = max(float(result.value.abs()) * n, 1e-30)
                return max(best.error(_taken(held["similarity"], result.indices)), float(result.gap) / size)
            return best.error(_taken(held["similarity"], torch.as_tensor(result).long()))

        return Row(
            "assign",
            self.name,
            n,
            contenders,
            error,
            TOLERANCE,
            target=None if none_runs else 1.0,
            against="best",
            rounds=3 if n >= 4096 else 5,
            at_most=bounds[quickest] if none_runs else None,
            note=f"target: what {quickest} took at {last[quickest]}, grown as the square" if none_runs else "",
        )

    def _peers(self, similarity: Tensor, why_not: dict[str, str | None]) -> list[Contender]:
        found = []
        for name, peer in ASSIGNMENT_PEERS.items():
            reason = why_not.get(name)
            contender = peer(similarity[:1, :1] if reason else similarity)
            run = contender.run
            if run is None:  # not installed
                found.append(contender)
            else:
                found.append(
                    Contender(name, None, reason)
                    if reason
                    else Contender(name, self._timed(name, similarity.shape[0], run))
                )
        return found

    def _timed(self, name: str, n: int, run: Callable[[], Any]) -> Callable[[], Any]:
        def timed() -> Any:
            start = time.perf_counter()
            result = run()
            self.seen[name].setdefault(n, time.perf_counter() - start)
            return result

        return timed

    def _why_not(self, peer: str, n: int) -> str | None:
        before = max(size for seen in self.seen.values() for size in seen)  # the last size at which any ran
        if before not in self.seen[peer]:
            return f"left out: already at {before}"
        taken = {other: seen[before] for other, seen in self.seen.items() if before in seen}
        quickest = taken[peer] == min(taken.values())
        predicted = self.predicted(peer, n)
        if predicted > (LONGEST_OF_QUICKEST if quickest else LONGEST):
            return f"left out: predicted {predicted:.3g} s, {taken[peer]:.3g} s at {before}"
        if n > LARGEST_FOR_ALL and not quickest:
            return f"left out: {taken[peer]:.3g} s at {before}, where another was quicker"
        return None


def _on(isa: str, family: str, n: int) -> Row:
    """What users of older processors get; the peers as they are."""
    best = _Best()
    held: dict[str, Tensor] = {}

    def contenders() -> list[Contender]:
        similarity = held["similarity"] = FAMILIES[family](n, torch.Generator().manual_seed(n))

        def ours() -> mf.Assignment:
            _core.use_isa(isa)
            found = _read(mf.assign(similarity))
            _core.use_isa(None)
            return found

        return [Contender(OURS, ours), *(peer(similarity) for peer in ASSIGNMENT_PEERS.values())]

    def error(name: str, result: Any) -> float:
        indices = result.indices if name == OURS else torch.as_tensor(result).long()
        return best.error(_taken(held["similarity"], indices))

    return Row("assign", f"{family}, {isa}", n, contenders, error, TOLERANCE, rounds=5)


def _warm(width: int) -> Row:
    """All revisits of a match of two trained networks of this width: with the duals of the last visit, and without."""
    best: dict[int, _Best] = {}
    held: list[recorded.Visit] = []

    def contenders() -> list[Contender]:
        held.extend(visit for visit in recorded.visits(width) if visit.duals is not None)
        return [
            Contender(OURS, lambda: [mf.assign(v.similarity, duals=v.duals) for v in held]),
            Contender(COLD, lambda: [mf.assign(v.similarity) for v in held]),
        ]

    def error(name: str, results: Any) -> float:
        each = enumerate(zip(held, results, strict=True))
        return max(best.setdefault(k, _Best()).error(_taken(v.similarity, r.indices)) for k, (v, r) in each)

    case = "all revisits of a match, warm"
    return Row("assign", case, width, contenders, error, 1e-6, target=3.0, against=COLD, rounds=5)


def prepared(family: str, n: int, problems: int) -> Callable[[], Any]:
    """One call, for the second core's processes."""
    generator = torch.Generator().manual_seed(n)
    each = [FAMILIES[family](n, generator) for _ in range(problems)]
    similarity = each[0] if problems == 1 else torch.stack(each)
    return lambda: _read(mf.assign(similarity))


def _batch(count: int, n: int) -> Row:
    best = _Best()
    held: dict[str, Tensor] = {}

    def contenders() -> list[Contender]:
        generator = torch.Generator().manual_seed(n)
        similarity = torch.stack([FAMILIES["unrelated"](n, generator) for _ in range(count)])
        held["similarity"] = similarity
        looped = []
        for peer in ASSIGNMENT_PEERS.values():
            each = [peer(s) for s in similarity]
            runs = [c.run for c in each if c.run is not None]
            looped.append(
                Contender(
                    f"{each[0].name} in a loop",
                    (lambda runs=runs: [run() for run in runs]) if runs else None,
                    each[0].why_missing,
                )
            )
        return [Contender(OURS, lambda: mf.assign(similarity)), *looped]

    def error(name: str, result: Any) -> float:
        if name == OURS:
            return best.error(_taken(held["similarity"], result.indices))
        return best.error(_taken(held["similarity"], torch.stack([torch.as_tensor(r).long() for r in result])))

    case = f"{count} problems in a batch"
    return Row("assign", case, n, contenders, error, TOLERANCE, target=2.5, against="best", rounds=5)


def rows(quick: bool) -> Iterator[Row]:
    """The rows of the suite. They have to be run in this order: one size tells what to run at the next."""
    sizes = (64, 256, 1024, 2048) if quick else (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
    for name in ("uniform", "unrelated", "related", "low_rank") if quick else tuple(FAMILIES):
        family = _Family(name)
        for n in sizes:
            yield family.row(n)
    for name, n in (("unrelated", 256),) if quick else REFUSED:
        yield refusal.row("assign", name, n, partial(make, name, n))
    for width in (512,) if quick else (512, 1024):
        yield _warm(width)
    yield _batch(128 if quick else 1024, 128)
    if quick:
        return
    for isa in _core.build_info()["isas_usable"][:-1]:
        for n in (64, 1024):
            yield _on(isa, "unrelated", n)
    yield second_core.row("assign", "1024 problems in a batch", 128, prepared, ("unrelated", 128, 1024))
    yield second_core.row("assign", "unrelated", 8192, prepared, ("unrelated", 8192, 1), rounds=3)


def summaries(results: Sequence[Result]) -> Iterator[Result]:
    """Rows made of others: all cells of 4096 units and more together."""
    cells = [r for r in results if r.case in FAMILIES and r.size >= 4096 and r.measured is not None]
    if not cells:
        return
    case = f"geometric mean of {len(cells)} cells"
    found = Result("assign", case, min(r.size for r in cells), 1, target=5.0, against="best")
    found.measured = statistics.geometric_mean(r.measured for r in cells if r.measured is not None)
    found.seconds[OURS] = statistics.geometric_mean(r.seconds[OURS] for r in cells)
    found.spread[OURS] = 0.0
    yield found
