"""What it costs that NaN and infinities are refused.

Both kernels look for them in the pass in which they first read the matrix. A row compares a call with the same one that
is told that all entries are finite, which nothing in the package ever says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mudsc_fast import _core

from .harness import OURS, Contender, Row

UNCHECKED = "the same without looking"
# Of the whole call, at the most.
SHARE = 0.03


def _assigning(similarity: Tensor) -> Callable[[Tensor, bool], Tensor]:
    n = len(similarity)
    indices, out = torch.empty(n, dtype=torch.int64), torch.empty(2 * n + 2, dtype=torch.float64)

    def run(matrix: Tensor, trusted: bool) -> Tensor:
        _core.assign(matrix, None, indices, out, 1, trusted)
        return indices

    return run


def _zipping(similarity: Tensor) -> Callable[[Tensor, bool], Tensor]:
    n = len(similarity)
    units, owner = torch.arange(n), torch.empty(n, dtype=torch.int64)
    models = (units * 2 // n).to(torch.int32)

    def run(matrix: Tensor, trusted: bool) -> Tensor:
        left, here = torch.full((2,), n // 4), torch.full((2,), n // 2)
        _core.zip(matrix, units, models, n // 2, 0.5, left, here, owner, 1, trusted)
        return owner

    return run


_OPS = {"assign": _assigning, "zip": _zipping}


def _refused(run: Callable[[Tensor, bool], Tensor], similarity: Tensor, entry: float) -> bool:
    spoiled = similarity.clone()
    spoiled[-1, -2] = spoiled[-2, -1] = entry
    try:
        run(spoiled, False)
    except ValueError:
        return True
    return False


def row(op: str, kind: str, size: int, make: Callable[[], Tensor]) -> Row:
    """A row of an op's suite; ``make`` gives the similarity."""
    held: dict[str, Any] = {}

    def contenders() -> list[Contender]:
        similarity = held["similarity"] = make()
        run = held["run"] = _OPS[op](similarity)
        return [Contender(OURS, lambda: run(similarity, False)), Contender(UNCHECKED, lambda: run(similarity, True))]

    def error(name: str, result: Tensor) -> float:
        """Ours refuses what is not finite; the results are the same."""
        if name != OURS:
            return float((result != held["found"]).any())
        held["found"] = result.clone()
        bad = float("nan"), float("inf"), -float("inf")
        return 0.0 if all(_refused(held["run"], held["similarity"], entry) for entry in bad) else 1.0

    return Row(
        op,
        f"NaN and infinities refused, {kind}",
        size,
        contenders,
        error,
        0.0,
        target=1 - SHARE,
        against=UNCHECKED,
        rounds=41,
        note=f"looked for in the first pass, at most {SHARE:.0%} of the call",
    )
