"""assign against the best linear assignment codes in Python, over families of matrices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import mudsc_fast as mf

from .families import FAMILIES
from .harness import OURS, Contender, Row
from .peers import ASSIGNMENT_PEERS

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
    return float(similarity.double().gather(-1, indices[..., None]).mean())


def _read(result: mf.Assignment) -> mf.Assignment:
    """A small problem's tensors are made when they are read: what the peers return counts for us too."""
    _ = result.indices
    return result


def _single(family: str, n: int, target: float, rounds: int = 5) -> Row:
    best = _Best()
    held: dict[str, Tensor] = {}

    def contenders() -> list[Contender]:
        similarity = FAMILIES[family](n, torch.Generator().manual_seed(n))
        held["similarity"] = similarity
        found = [Contender(OURS, lambda: _read(mf.assign(similarity)))]
        return found + [peer(similarity) for peer in ASSIGNMENT_PEERS]

    def error(name: str, result: Any) -> float:
        if name == OURS:
            # The duality gap is our own proof; it must be small whatever the peers say.
            size = max(float(result.value.abs()) * n, 1e-30)
            return max(best.error(_taken(held["similarity"], result.indices)), float(result.gap) / size)
        return best.error(_taken(held["similarity"], torch.as_tensor(result).long()))

    return Row("assign", family, n, contenders, error, TOLERANCE, target=target, against="best", rounds=rounds)


def _warm(n: int) -> Row:
    """A similarity that moved as it does between two sweeps: a third of its columns changed by a little."""
    best = _Best()
    held: dict[str, Tensor] = {}

    def contenders() -> list[Contender]:
        generator = torch.Generator().manual_seed(n)
        before = FAMILIES["related"](n, generator)
        after = before.clone()
        moved = torch.randperm(n, generator=generator)[: n // 3]
        after[:, moved] += 0.02 * torch.randn(n, len(moved), generator=generator)
        held["similarity"] = after
        duals = mf.assign(before).duals
        return [
            Contender(OURS, lambda: mf.assign(after, duals=duals)),
            Contender("its own cold start", lambda: mf.assign(after)),
        ]

    def error(name: str, result: Any) -> float:
        return best.error(_taken(held["similarity"], result.indices))

    return Row("assign", "warm start", n, contenders, error, 1e-6, target=3.0, against="its own cold start")


def _batch(count: int, n: int) -> Row:
    best = _Best()
    held: dict[str, Tensor] = {}

    def contenders() -> list[Contender]:
        generator = torch.Generator().manual_seed(n)
        similarity = torch.stack([FAMILIES["unrelated"](n, generator) for _ in range(count)])
        held["similarity"] = similarity
        looped = []
        for peer in ASSIGNMENT_PEERS:
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
    """The rows of the suite."""
    sizes = (64, 256, 1024, 2048) if quick else (64, 128, 256, 512, 1024, 2048, 4096, 8192)
    families = ("uniform", "unrelated", "related", "low_rank") if quick else tuple(FAMILIES)
    for family in families:
        for n in sizes:
            yield _single(family, n, 5.0 if n >= 4096 else 1.0, rounds=3 if n >= 4096 else 5)
    for n in (1024,) if quick else (1024, 2048, 4096):
        yield _warm(n)
    yield _batch(128 if quick else 1024, 128)
