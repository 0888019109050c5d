"""Zip without the whole similarity: on lists of the pairs that are alike enough to matter, with a proof or a refusal.

The greedy rule takes the largest entry, and a merged unit's entries are `min(row i, row j) * attenuation`. So with a
threshold t >= 0 and an attenuation of at most 1, a pair that is not above t stays not above t whatever is merged. As
long as the largest known entry is above t it is the largest of all: the lists of pairs above t give the merges of the
whole matrix, one by one; entries that sink to t or below are dropped. Where the lists run out, nothing is proven and
nothing is returned.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mudsc_fast.zipping import Zip, check_zip_options, numbered

# Bytes of a pair in the lists: two entries of dicts, one of the heap.
PAIR_BYTES = 320
TILE_ROWS = 1024


class Rows(Protocol):
    """A symmetric similarity of which some rows are made when they are asked for."""

    width: int

    def tile(self, rows: Tensor) -> Tensor:
        """(len(rows), width), floating, of some rows, int64; the same row gives the same entries every time."""
        ...


@dataclass(frozen=True)
class ZipProof:
    """threshold: all pairs above it were listed. least: the smallest similarity that was merged. pairs: listed."""

    threshold: float
    least: float
    pairs: int


def zip_tiled(
    source: Rows,
    models: int = 2,
    width: int | None = None,
    attenuation: float = 0.5,
    budget: float = 1.0,
    max_pairs: int = 4_000_000,
    tile_rows: int = TILE_ROWS,
) -> tuple[Zip, ZipProof]:
    """Merge as ``zip_units`` does, without blocks, reading the similarity once, some rows at a time.

    Args:
        source: the rows of the (models * d, models * d) similarity; only entries right of the diagonal are looked at.
        models, width, attenuation, budget: as in ``zip_units``.
        max_pairs: pairs kept, about 320 bytes each: the most alike ones. tile_rows: rows made at a time.

    Returns:
        What ``zip_units`` gives for the whole matrix, the same labels and value, and the proof.

    Raises:
        TypeError, ValueError: as ``zip_units``; ValueError also if the kept pairs cannot prove the result, which says
            how far they did.

    Source: docs/method.md rule 5.
    """
    total = int(source.width)
    if isinstance(models, bool) or not isinstance(models, int) or models < 1 or total < 1 or total % models:
        raise ValueError(f"models: expected a divisor of {total} units, got {models!r}")
    d = total // models
    width = d if width is None else width
    check_zip_options(d, models, width, attenuation, budget, 1)
    if max_pairs < 1 or tile_rows < 1:
        raise ValueError(f"max_pairs, tile_rows: expected at least 1, got {max_pairs}, {tile_rows}")
    pairs, values, threshold = _candidates(source, total, max_pairs, tile_rows)
    merges = total - width
    left = [int((merges // models) * budget + 1e-4)] * models
    lists = _Lists(pairs, values, d, attenuation, left, threshold)
    owner = torch.arange(total)
    taken, least = 0.0, float("inf")
    for done in range(merges):
        found = lists.largest()
        if found is None:
            why = (
                f"the rest is among pairs at most {threshold:.4g} alike, beyond max_pairs={max_pairs}. Give more "
                f"pairs, or a larger width than {width}"
                if threshold > 0.0
                else "no allowed pair above 0 is left, and below 0 lists prove nothing. Give a larger width than "
                f"{width}, or a larger budget than {budget:g}"
            )
            raise ValueError(f"zip_tiled: {done} of {merges} merges are proven; {why}")
        value, i, j = found
        taken, least = taken + value, min(least, value)
        owner[j] = i
        lists.merge(i, j)
    labels = numbered(owner)
    result = Zip(
        labels.view(models, d),
        labels.bincount(minlength=width),
        torch.tensor(taken / merges if merges else 0.0, dtype=torch.float64),
    )
    return result, ZipProof(threshold, least, len(values))


def _candidates(source: Rows, total: int, max_pairs: int, tile_rows: int) -> tuple[Tensor, Tensor, float]:
    """(pairs, 2) int64 with i < j, their values, and the threshold that all of them and no others are above."""
    threshold = 0.0
    kept: list[tuple[Tensor, Tensor]] = []
    count = 0
    for start in range(0, total, tile_rows):
        rows = torch.arange(start, min(start + tile_rows, total))
        tile = source.tile(rows)
        if tile.shape != (len(rows), total) or not tile.is_floating_point():
            raise ValueError(f"source: expected a floating tile of shape {(len(rows), total)}, got {tuple(tile.shape)}")
        if not bool(torch.isfinite(tile).all()):
            raise ValueError("similarity: expected finite entries, got NaN or infinity")
        tile = tile.detach().cpu()
        above = (tile > threshold) & (torch.arange(total) > rows[:, None])
        at = above.nonzero()
        values = tile[above]
        at[:, 0] += start
        kept.append((at, values if values.dtype == torch.float64 else values.float()))
        count += len(values)
        if count > max_pairs:
            pairs, values = torch.cat([p for p, _ in kept]), torch.cat([v for _, v in kept])
            # A third is dropped at once, so that this is rare; equal values go or stay together.
            room = max(1, 2 * max_pairs // 3)
            threshold = max(threshold, float(values.kthvalue(len(values) - room + 1).values))
            above = values > threshold
            kept, count = [(pairs[above], values[above])], int(above.sum())
    return torch.cat([p for p, _ in kept]), torch.cat([v for _, v in kept]), threshold


class _Lists:
    """Each unit's known pairs, and the largest of all."""

    def __init__(
        self, pairs: Tensor, values: Tensor, d: int, attenuation: float, left: list[int], threshold: float
    ) -> None:
        total = d * len(left)
        self.rows: list[dict[int, float]] = [{} for _ in range(total)]
        self.model = [unit // d for unit in range(total)]
        # Products are rounded as the matrix would hold them, by a factor that no type rounds to 0.
        self.by = torch.tensor(max(attenuation, torch.finfo(values.dtype).tiny), dtype=values.dtype)
        self.attenuation, self.left, self.threshold = attenuation, left, threshold
        self.heap: list[tuple[float, int, int]] = []
        spent = {m for m, count in enumerate(left) if count <= 0}
        for (i, j), value in zip(pairs.tolist(), values.tolist(), strict=True):
            if self.model[i] == self.model[j] and self.model[i] in spent:
                continue
            self.rows[i][j] = self.rows[j][i] = value
            self.heap.append((-value, i, j))
        heapq.heapify(self.heap)

    def largest(self) -> tuple[float, int, int] | None:
        """The largest pair, (value, i, j) with i < j; of equal ones the first in row-major order."""
        while self.heap:
            value, i, j = self.heap[0]
            if self.rows[i].get(j) == -value:
                return -value, i, j
            heapq.heappop(self.heap)
        return None

    def merge(self, i: int, j: int) -> None:
        """Unit j joins unit i."""
        mine, theirs = self.rows[i], self.rows[j]
        self._forget(i)
        self._forget(j)
        if self.attenuation > 0:
            common = sorted((mine.keys() & theirs.keys()) - {i, j})
            least = torch.tensor([min(mine[k], theirs[k]) for k in common], dtype=self.by.dtype)
            for k, value in zip(common, (least * self.by).tolist(), strict=True):
                if value <= self.threshold:
                    continue
                self.rows[i][k] = self.rows[k][i] = value
                heapq.heappush(self.heap, (-value, min(i, k), max(i, k)))
        m = self.model[i]
        if m == self.model[j]:
            self.left[m] -= 1
            if self.left[m] <= 0:
                self._bar(m)

    def _forget(self, unit: int) -> None:
        for k in self.rows[unit]:
            self.rows[k].pop(unit, None)
        self.rows[unit] = {}

    def _bar(self, m: int) -> None:
        """No more pairs inside model m."""
        for unit, row in enumerate(self.rows):
            if self.model[unit] == m:
                for k in [k for k in row if self.model[k] == m]:
                    del row[k]
