"""The part of a product X^T Y that lies near its diagonal, and with it the sums of every column, in one main loop.

Tiles near the diagonal read every column of both operands, so they can give all sums, and they have to be multiplied
in any case. They are made first and apart from the matrix that they belong to: their sums decide whether a batch may be
added as it is (``covariance_sums``), and until then nothing was added.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mudsc_fast.backends.triton.configs import ProductConfig
from mudsc_fast.backends.triton.launching import allocate, launching, programs
from mudsc_fast.backends.triton.product import Operand, _add_slices, _load, readable, shares


@triton.jit
def _count_in(x, sums, squares):
    """Add a block to the running sums of its entries and of their squares, [DEPTH, SIDE], a place each.

    A square too small for float32 counts as 1e-37, so that only zeros give 0. What is not finite shows in the sums.
    """
    wide = x.to(tl.float32)
    return sums + wide, squares + tl.maximum(wide * wide, tl.where(wide != 0.0, 1e-37, 0.0))


@triton.jit
def diagonal_kernel(
    left, right, out, partial, tiles, tile_count, splits, chunk_steps, steps, samples, image_steps,
    units, left_pitch, right_pitch,
    DESCRIPTORS: tl.constexpr, CHANNELS: tl.constexpr, BOTH: tl.constexpr, BAND: tl.constexpr,
    SIDE: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """out += X^T Y for the listed tiles of SIDE x SIDE, all within squares of BAND along the diagonal.

    out: [units, BAND], row i of the product, from its square's first column.
    partial: [chunks, 4 if BOTH else 2, units]: sums of y and of its squares over each chunk, then those of x. Tiles on
    the diagonal write them, each entry once.
    """
    for item in range(tl.program_id(0), tile_count * splits, tl.num_programs(0)):
        tile = item // splits
        part = item - tile * splits
        i = tl.load(tiles + 2 * tile)
        j = tl.load(tiles + 2 * tile + 1)
        for first in range(part * chunk_steps, steps, splits * chunk_steps):
            acc = tl.zeros((SIDE, SIDE), tl.float32)
            sums = tl.zeros((DEPTH, SIDE), tl.float32)
            squares = tl.zeros((DEPTH, SIDE), tl.float32)
            if BOTH:
                left_sums = tl.zeros((DEPTH, SIDE), tl.float32)
                left_squares = tl.zeros((DEPTH, SIDE), tl.float32)
            for step in tl.range(first, tl.minimum(steps, first + chunk_steps), num_stages=STAGES):
                image = step // image_steps if CHANNELS else 0
                row = (step - image * image_steps) * DEPTH if CHANNELS else step * DEPTH
                x = _load(
                    left, row, i * SIDE, samples - row, units, left_pitch, image, DESCRIPTORS, CHANNELS, SIDE, DEPTH
                )
                y = _load(
                    right, row, j * SIDE, samples - row, units, right_pitch, image, DESCRIPTORS, CHANNELS, SIDE, DEPTH
                )
                acc = tl.dot(x.T, y, acc)
                sums, squares = _count_in(y, sums, squares)
                if BOTH:
                    left_sums, left_squares = _count_in(x, left_sums, left_squares)
            r = i * SIDE + tl.arange(0, SIDE)
            rows_at = out + r.to(tl.int64) * BAND
            _add_slices(acc, rows_at, r < units, j * SIDE - i * SIDE // BAND * BAND, BAND, SIDE, SIDE, SLICES)
            # The rows of a tile on the diagonal are its columns.
            counted = (r < units) & (r == j * SIDE + tl.arange(0, SIDE))
            chunk = (first // chunk_steps).to(tl.int64)
            at = partial + chunk * ((4 if BOTH else 2) * units) + r
            tl.store(at, tl.sum(sums, axis=0), mask=counted)
            tl.store(at + units, tl.sum(squares, axis=0), mask=counted)
            if BOTH:
                tl.store(at + 2 * units, tl.sum(left_sums, axis=0), mask=counted)
                tl.store(at + 3 * units, tl.sum(left_squares, axis=0), mask=counted)


def diagonal_products(
    left: Operand,
    right: Operand,
    config: ProductConfig,
    band: int,
    triangle: bool,
    both: bool,
    lengthen: int = 1,
) -> tuple[Tensor, Tensor]:
    """The squares of X^T Y along its diagonal, and the sums of its operands' columns.

    Args:
        left, right: as many units each, over the same samples, in one plane.
        config: how to cut it, in square tiles.
        band: side of the squares, a multiple of a tile's.
        triangle: only tiles that reach above the diagonal; the others are 0.
        both: count the left operand's columns as well.
        lengthen: as in ``product.add_product``.

    Returns:
        (units, band), float32: entry (i, c) belongs to row i and column i // band * band + c, columns past the last
        unit are 0. (2, units), float64: sums of the right operand's columns and of their squares (a square too small
        for float32 counts as 1e-37); with `both`, (4, units), the left operand's after them. A column with an entry
        that is not finite has a sum that is not.
    """
    device, units, side = right.tensor.device, right.units, config.rows
    if side != config.columns or band % side or not (readable(left, config) and readable(right, config)):
        raise ValueError(f"config: expected square tiles that divide {band} and can read both operands, got {config}")
    use = config.descriptors and left.aligned and right.aligned
    x, y = (one.descriptor(side, config.depth) if use else one.tensor for one in (left, right))
    tiles = _tiles_near(units, side, band, triangle, device)
    steps, chunk_steps = left.steps(config.depth), config.chunk * lengthen // config.depth
    chunks = -(-steps // chunk_steps)
    splits = shares(len(tiles), chunks, device)
    what, instead = "Covariance.update: products near the diagonal", "give smaller batches"
    out = allocate((units, band), torch.float32, device, what, instead).zero_()
    partial = allocate((chunks, 4 if both else 2, units), torch.float32, device, what, instead)
    with launching("diagonal.diagonal_kernel", device):
        diagonal_kernel[(min(programs(device), len(tiles) * splits),)](
            x, y, out, partial, tiles, len(tiles), splits, chunk_steps, steps, left.samples,
            max(1, -(-left.samples // config.depth)), units, left.pitch, right.pitch,
            DESCRIPTORS=use, CHANNELS=bool(left.images), BOTH=both, BAND=band, SIDE=side, DEPTH=config.depth,
            STAGES=config.stages, SLICES=config.slices, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return out, partial.sum(dim=0, dtype=torch.float64)


def add_squares(products: Tensor, out: Tensor) -> None:
    """Add what ``diagonal_products`` made to the matrix it belongs to: (units, units), columns adjacent."""
    units, band = products.shape
    whole, pitch = units // band, out.stride(0)
    if whole:
        squares = out.as_strided((whole, band, band), ((pitch + 1) * band, pitch, 1), out.storage_offset())
        squares += products[: whole * band].reshape(whole, band, band)
    rest = whole * band
    if rest < units:
        out[rest:, rest:] += products[rest:, : units - rest]


@lru_cache(maxsize=64)
def _tiles_near(units: int, side: int, band: int, triangle: bool, device: torch.device) -> Tensor:
    """Tiles of the squares along the diagonal, a square after the other: (tiles, 2), int32."""
    number, each = -(-units // side), band // side
    pairs = [
        (i, j)
        for i in range(number)
        for j in range(i if triangle else i // each * each, min(number, (i // each + 1) * each))
    ]
    return torch.tensor(pairs, dtype=torch.int32).to(device)
