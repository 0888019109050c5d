"""Linear assignment of a similarity that does not fit in memory: lists of candidates, a solver on lists, and a proof.

Every row keeps the columns that were worth most to it, and a bound on all others, at the prices of that time. Prices
only rise, so the bound stays true: while a row's best candidate is above it, the list tells what the whole row would.
The solver matches rows on their lists until some list can no longer tell; those rows alone are read again, at the
prices of now and with longer lists. When all rows are matched, one pass over the whole similarity gives the row duals
and with them the duality gap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mudsc_fast import backends
from mudsc_fast.assignment import Assignment
from mudsc_fast.tiles import Tiles

# Columns on a row's first list.
CANDIDATES = 64
# The largest gap that counts as optimal, as in the dense solver: relative to the magnitudes taken, and what rounding in
# float64 leaves where those cancel.
UNPROVEN = 1e-6
_ROUNDING = 1e-13


@dataclass(frozen=True)
class TiledRound:
    """What has happened so far: rounds of the list solver, rows read from the source, rows without a column."""

    rounds: int
    rows_read: int
    free_rows: int
    candidates: int


def assign_tiled(
    source: Tiles,
    candidates: int = CANDIDATES,
    tile_bytes: int = 1 << 28,
    proofs: int = 4,
    watch: Callable[[TiledRound], None] | None = None,
    backend: str = "auto",
) -> Assignment:
    """Find the one-to-one match of rows to columns with the largest sum, seeing a few rows of the matrix at a time.

    Args:
        source: gives rows of the (width, width) similarity: ``SimilarityTiles``, ``MatrixTiles`` or any other with a
            width and a method ``tile(rows)``. Every row is read at least twice, hard ones more often.
        candidates: columns on a row's first list; doubled whenever it turns out too short.
        tile_bytes: how large a tile may be, as float32; at least one row is read.
        proofs: passes over the whole similarity that may be spent on the proof. A source whose rows come out
            differently from one call to the next, by rounding, may need more than one.
        watch: called after every round.
        backend: which backend makes the lists from a tile: "auto" or a name of ``mudsc_fast.backends``.

    Returns:
        An :class:`Assignment` on the CPU. Its gap is measured in the last pass and bounds the distance to the optimum;
        at most 1e-6 of the sum of the magnitudes taken counts as proven, and ends the search. Anything above that is
        what was left after ``proofs`` passes, and the caller's to judge.

    Memory: one tile and what the source needs to make it; 20 bytes a candidate, and twice that while lists change; 100
    bytes a row. At width 57,344 and 64 candidates that is 0.26 GB for the tile and about 0.15 GB for the lists.

    Raises:
        TypeError, ValueError: bad arguments; NaN or infinity in a tile, tiles of another shape.
        RuntimeError: the duals left the range of float64.

    Source: docs/design.md, "Wide spaces".
    """
    _check(source, candidates, tile_bytes, proofs)
    return _Search(source, candidates, tile_bytes, proofs, watch, backend).run()


def _check(source: Tiles, candidates: int, tile_bytes: int, proofs: int) -> None:
    width = getattr(source, "width", None)
    if not isinstance(width, int) or not callable(getattr(source, "tile", None)):
        raise TypeError(f"source: expected a width and a method tile(rows), got {type(source).__name__}")
    for name, number in (("candidates", candidates), ("tile_bytes", tile_bytes), ("proofs", proofs)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name}: expected a number >= 1, got {number!r}")


class _Lists:
    """The candidates of all rows, one row behind the other."""

    def __init__(self, width: int) -> None:
        self.ptr = torch.zeros(width + 1, dtype=torch.int64)
        self.columns = torch.empty(0, dtype=torch.int32)
        self.values = torch.empty(0, dtype=torch.float64)
        self.keys = torch.empty(0, dtype=torch.float64)
        self.threshold = torch.full((width,), -torch.inf, dtype=torch.float64)

    def replace(self, rows: Tensor, columns: Tensor, values: Tensor, keys: Tensor, threshold: Tensor) -> None:
        """New lists for some rows (sorted); columns, values and keys: (rows, room)."""
        before = self.ptr.diff()
        after = before.clone()
        after[rows] = columns.shape[1]
        renewed = torch.zeros(len(before), dtype=torch.bool)
        renewed[rows] = True
        kept = (~renewed).repeat_interleave(before)
        new = renewed.repeat_interleave(after)
        for name, added in (("columns", columns), ("values", values), ("keys", keys)):
            old = getattr(self, name)
            merged = old.new_empty(len(new))
            merged[~new] = old[kept]
            merged[new] = added.reshape(-1)
            setattr(self, name, merged)
        torch.cumsum(after, 0, out=self.ptr[1:])
        self.threshold[rows] = threshold


class _Search:
    """The state of one problem: prices, the match, the lists, and how long the next list of each row is to be."""

    def __init__(
        self,
        source: Tiles,
        candidates: int,
        tile_bytes: int,
        proofs: int,
        watch: Callable[[TiledRound], None] | None,
        backend: str,
    ) -> None:
        self.source, self.proofs, self.watch, self.backend = source, proofs, watch, backend
        n = self.n = source.width
        self.rows_a_tile = max(1, tile_bytes // (4 * max(n, 1)))
        self.lists = _Lists(n)
        self.room = torch.full((n,), min(candidates, n), dtype=torch.int64)
        self.prices = torch.zeros(n, dtype=torch.float64)
        self.column_of = torch.full((n,), -1, dtype=torch.int64)
        self.rounds = self.rows_read = 0

    def run(self) -> Assignment:
        wanted = torch.arange(self.n)
        solve = backends.pick("assign_lists", "cpu").module.assign_lists
        proof = self.prove() if self.n == 0 else None
        while proof is None:
            self.make_lists(wanted)
            free, wanted = solve(self.lists, self.prices, self.column_of)
            self.rounds += 1
            if self.watch is not None:
                self.watch(TiledRound(self.rounds, self.rows_read, free, len(self.lists.columns)))
            if free > 0:
                if len(wanted) == 0 or bool((self.room[wanted] >= self.n).all()):
                    raise RuntimeError("similarity: the duals left the range of float64")
            else:
                proof = self.prove()
                self.proofs -= 1
                wanted = proof.open_rows
                if self.proofs > 0 and not proof.proven and len(wanted) > 0:
                    self.column_of[wanted] = -1
                    proof = None
            self.room[wanted] = (2 * self.room[wanted]).clamp_(max=self.n)
        value = proof.taken.mean() if self.n else proof.taken.sum()
        return Assignment(self.column_of, value, (proof.u, self.prices), proof.gap)

    def tiles(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for part in torch.split(rows, self.rows_a_tile):
            tile = self.source.tile(part)
            if tile.shape != (len(part), self.n):
                raise ValueError(f"source: expected a tile of shape {(len(part), self.n)}, got {tuple(tile.shape)}")
            self.rows_read += len(part)
            yield part, tile

    def make_lists(self, wanted: Tensor) -> None:
        """New lists at the present prices, for rows of one room after the other."""
        for room in sorted(set(self.room[wanted].tolist())):
            rows = wanted[self.room[wanted] == room]
            made = [self.candidates(part, tile, room) for part, tile in self.tiles(rows)]
            columns, values, threshold = (torch.cat(parts) for parts in zip(*made, strict=True))
            keys, order = (values - self.prices[columns.long()]).sort(dim=1, descending=True)
            self.lists.replace(rows, columns.gather(1, order), values.gather(1, order), keys, threshold)

    def candidates(self, rows: Tensor, tile: Tensor, room: int) -> tuple[Tensor, Tensor, Tensor]:
        make = backends.pick("assign_tile", tile.device, self.backend).module.assign_tile
        columns, values, threshold, _ = make(tile, int(rows[0]), self.prices, room)
        # Among many equal columns the one that a row has may be left out; it stays, in the place of the last.
        own = self.column_of[rows]
        lost = ((columns != own[:, None]).all(dim=1) & (own >= 0)).nonzero()[:, 0]
        if len(lost) > 0:
            columns[lost, -1] = own[lost].int()
            values[lost, -1] = tile[lost.to(tile.device), own[lost].to(tile.device)].double().cpu()
        return columns, values, threshold

    def prove(self) -> _Proof:
        """One pass over the whole similarity: row duals, the entries taken, and the gap."""
        maxima, taken = [], []
        for rows, tile in self.tiles(torch.arange(self.n)):
            price = backends.pick("assign_tile", tile.device, self.backend).module.assign_tile
            maxima.append(price(tile, int(rows[0]), self.prices, 0)[3])
            own = self.column_of[rows].to(tile.device)
            taken.append(tile.gather(1, own[:, None])[:, 0].double().cpu())
        empty = torch.empty(0, dtype=torch.float64)
        return _proof(torch.cat([empty, *maxima]), torch.cat([empty, *taken]), self.prices, self.column_of)


@dataclass(frozen=True)
class _Proof:
    u: Tensor
    taken: Tensor
    gap: Tensor
    proven: bool
    open_rows: Tensor  # whose column is not their best


def _proof(u: Tensor, taken: Tensor, prices: Tensor, column_of: Tensor) -> _Proof:
    short = u - (taken - prices[column_of])
    gap = short.sum()
    duals = u.abs().sum() + prices.abs().sum()
    allowed = UNPROVEN * taken.abs().sum() + _ROUNDING * duals
    open_rows = (short > allowed / max(2 * len(u), 1)).nonzero()[:, 0]
    return _Proof(u, taken, gap, bool(gap <= allowed), open_rows)
