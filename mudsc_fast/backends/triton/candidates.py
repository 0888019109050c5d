"""Each row's best columns at some prices, and the largest of what is left out: what a solver on lists asks of a tile.

Worths s - price are compared as float32, which keeps their relative precision however small the differences are; the
bounds are exact maxima in float64. Equal worths go to a place that differs from row to row, as on the CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mudsc_fast.backends.triton.launching import launching

MOST = 128  # columns a row; longer lists are torch.topk's
BLOCK = 1024  # columns at a time: 8 a thread, and as many groups whose largest bound the level
WARPS = 4


@triton.jit
def _worth(row, prices, c, inside):
    """s - price of some columns: float64, -inf outside; and as float32 without a negative zero."""
    wide = tl.load(row + c, mask=inside, other=0.0).to(tl.float64) - tl.load(prices + c, mask=inside, other=0.0)
    narrow = wide.to(tl.float32)
    narrow = tl.where(narrow == 0.0, 0.0, narrow)
    return tl.where(inside, wide, float("-inf")), tl.where(inside, narrow, float("-inf"))


@triton.jit
def _packed(worth, c, n, turn):
    """Worths and, below them, places from column `turn` on, the first largest: one order of all columns in int64."""
    bits = worth.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    place = tl.where(c >= turn, c - turn, c - turn + n)
    return (ordered.to(tl.int64) << 32) | (n - 1 - place).to(tl.int64)


@triton.jit(do_not_specialize=["first_row", "room"])
def collect_kernel(
    tile, pitch, n, prices, maxima, bad, found, overflow, first_row, room,
    LISTS: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program: its largest worth, whether it is finite, and all columns above a level that `room` reach.

    found: [rows, 4 * KEPT], the smallest int64 to begin with: columns above the level from the left, at most 3 * KEPT
    (more is an overflow), and those at the level from the right, at most KEPT.
    """
    i = tl.program_id(0)
    row = tile + i.to(tl.int64) * pitch
    lane = tl.arange(0, BLOCK)
    # The level: of the largest worths of BLOCK groups of columns, the room-th. As many columns reach it.
    largest = tl.full((BLOCK,), float("-inf"), tl.float64)
    groups = tl.full((BLOCK,), float("-inf"), tl.float32)
    wrong = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, n, BLOCK):
        inside = start + lane < n
        wide, narrow = _worth(row, prices, start + lane, inside)
        wrong = tl.where(inside & (tl.abs(wide) < float("inf")), wrong, tl.where(inside, 1, wrong))
        largest = tl.maximum(largest, wide)
        groups = tl.maximum(groups, narrow)
    tl.store(maxima + i, tl.max(largest, axis=0))
    tl.store(bad + i, tl.max(wrong, axis=0))
    if LISTS:
        best = tl.topk(groups, KEPT)
        level = tl.max(tl.where(tl.arange(0, KEPT) == room - 1, best, float("-inf")), axis=0)
        turn = ((first_row + i).to(tl.int64) * 40503 % n).to(tl.int32)
        into = found + i.to(tl.int64) * 4 * KEPT
        above = 0
        equal = 0
        for start in range(0, n, BLOCK):
            inside = start + lane < n
            c = start + lane + turn
            c = tl.where(c >= n, c - n, c)
            _, narrow = _worth(row, prices, c, inside)
            packed = _packed(narrow, c, n, turn)
            higher = (narrow > level).to(tl.int32)
            same = (inside & (narrow == level)).to(tl.int32)
            at = above + tl.cumsum(higher, axis=0) - 1
            tl.store(into + at, packed, mask=(higher > 0) & (at < 3 * KEPT))
            at = equal + tl.cumsum(same, axis=0) - 1
            tl.store(into + 4 * KEPT - 1 - at, packed, mask=(same > 0) & (at < KEPT))
            above += tl.sum(higher, axis=0)
            equal += tl.sum(same, axis=0)
        tl.store(overflow + i, (above > 3 * KEPT).to(tl.int32))


@triton.jit(do_not_specialize=["first_row", "room"])
def order_kernel(
    tile, pitch, n, prices, maxima, found, overflow, columns, values, threshold, first_row, room,
    KEPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program: the best `room` of the columns found, best first, and the largest worth of all others."""
    i = tl.program_id(0)
    row = tile + i.to(tl.int64) * pitch
    turn = ((first_row + i).to(tl.int64) * 40503 % n).to(tl.int32)
    best = tl.topk(tl.load(found + i.to(tl.int64) * 4 * KEPT + tl.arange(0, 4 * KEPT)), KEPT)
    k = tl.arange(0, KEPT)
    place = n - 1 - (best & 0x7FFFFFFF).to(tl.int32)
    c = tl.where(turn + place >= n, turn + place - n, turn + place)
    out = i.to(tl.int64) * room + k
    tl.store(columns + out, c, mask=k < room)
    tl.store(values + out, tl.load(row + c, mask=k < room, other=0.0), mask=k < room)
    last = tl.min(tl.where(k < room, best, 0x7FFFFFFFFFFFFFFF), axis=0)
    lane = tl.arange(0, BLOCK)
    left = tl.full((BLOCK,), float("-inf"), tl.float64)
    for start in range(0, n, BLOCK):
        other = start + lane
        inside = other < n
        wide, narrow = _worth(row, prices, other, inside)
        left = tl.maximum(left, tl.where(inside & (_packed(narrow, other, n, turn) < last), wide, float("-inf")))
    # Where columns above the level were dropped, nothing is known of the others but the largest of the whole row.
    bound = tl.where(tl.load(overflow + i) > 0, tl.load(maxima + i), tl.max(left, axis=0))
    tl.store(threshold + i, bound)


def assign_tile(tile: Tensor, first_row: int, prices: Tensor, room: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The ``room`` columns of each row of a tile that are worth most at some prices, found where the tile lies.

    float32 tiles with ``room`` up to 128 by kernels that write nothing but the lists; others by ``torch.topk`` of the
    worths in float64, on the same device.

    Args:
        tile: (rows, width), float32 or float64, columns adjacent.
        first_row: number of the tile's first row, for messages and for who gets which of equal columns.
        prices: (width,), float64, on any device.
        room: how many columns, at most the width; 0: the largest alone.

    Returns:
        On the CPU: columns (rows, room), int32; their entries (rows, room), float64; thresholds (rows,), float64: the
        largest s - price of the columns left out (or more, see ``order_kernel``), -inf where there are none; and the
        largest s - price of each row (rows,), float64.

    Raises:
        ValueError: NaN or infinity in the tile.
    """
    prices = prices.to(tile.device, torch.float64)
    columns, values, threshold, maxima = worth_most(tile, first_row, prices, room)
    return columns.cpu(), values.double().cpu(), threshold.cpu(), maxima.cpu()


def worth_most(tile: Tensor, first_row: int, prices: Tensor, room: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``assign_tile`` whose results stay on the device, values in the tile's type."""
    rows, n = tile.shape
    if tile.dtype != torch.float32 or room > MOST or n >= 2**30:
        return _by_torch(tile, first_row, prices, room)
    device = tile.device
    kept = max(16, 1 << max(room - 1, 0).bit_length())
    maxima = torch.empty(rows, dtype=torch.float64, device=device)
    bad = torch.empty(2, rows, dtype=torch.int32, device=device)
    columns = torch.empty(rows, room, dtype=torch.int32, device=device)
    values = torch.empty(rows, room, device=device)
    threshold = torch.empty(rows if room else 0, dtype=torch.float64, device=device)
    lowest = torch.iinfo(torch.int64).min
    found = torch.full((rows if room else 0, 4 * kept), lowest, dtype=torch.int64, device=device)
    with launching("candidates.collect_kernel", device):
        collect_kernel[(rows,)](
            tile, tile.stride(0), n, prices, maxima, bad[0], found, bad[1], first_row, room,
            LISTS=room > 0, KEPT=kept, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    _require_finite(bad[0] == 0, first_row)
    if room:
        with launching("candidates.order_kernel", device):
            order_kernel[(rows,)](
                tile, tile.stride(0), n, prices, maxima, found, bad[1], columns, values, threshold, first_row, room,
                KEPT=kept, BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
    return columns, values, threshold, maxima


def _by_torch(tile: Tensor, first_row: int, prices: Tensor, room: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    worth = tile.double() - prices
    _require_finite(torch.isfinite(worth).all(dim=1), first_row)
    if room == 0:
        nothing = torch.empty(len(tile), 0, device=tile.device)
        return nothing.int(), nothing.to(tile.dtype), nothing.new_empty(0).double(), worth.amax(dim=1)
    # One more than is kept, where there is one: the largest that is left out.
    best = worth.topk(min(room + 1, tile.shape[1]), dim=1)
    columns, maxima = best.indices[:, :room], best.values[:, 0]
    left_out = best.values[:, room] if room < tile.shape[1] else torch.full_like(maxima, -torch.inf)
    return columns.int(), tile.gather(1, columns), left_out, maxima


def _require_finite(finite: Tensor, first_row: int) -> None:
    if not bool(finite.all()):
        row = first_row + int(finite.logical_not().nonzero()[0, 0])
        raise ValueError(f"similarity: expected finite values, got NaN or infinity in row {row}")
