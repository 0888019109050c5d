"""From products of activations to correlations, and the mirror image of a triangle: each entry is read and written
once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mudsc_fast.backends.triton.launching import launching
from mudsc_fast.backends.triton.product import correlate

BLOCK = 64  # 16 KiB a block: 16-byte accesses both ways, the transposed ones through shared memory


@triton.jit
def correlation_kernel(
    gram, out, row_moments, column_moments, over_count, rows, columns, gram_pitch, out_pitch, row_pitch, column_pitch,
    TRIANGLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Block (i, j) of the correlations; TRIANGLE: of those on or above the diagonal, with its mirror image."""
    i = tl.program_id(0)
    j = tl.program_id(1)
    if TRIANGLE:  # noqa: SIM102 (a constant, and a condition of the program)
        if j < i:
            return
    r = i * BLOCK + tl.arange(0, BLOCK)
    c = j * BLOCK + tl.arange(0, BLOCK)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    products = tl.load(gram + r.to(tl.int64)[:, None] * gram_pitch + c[None, :], mask=inside, other=0.0)
    found = correlate(
        products,
        over_count,
        tl.load(row_moments + r, mask=r < rows, other=0.0),
        tl.load(row_moments + row_pitch + r, mask=r < rows, other=0.0),
        tl.load(column_moments + c, mask=c < columns, other=0.0),
        tl.load(column_moments + column_pitch + c, mask=c < columns, other=0.0),
    )
    if TRIANGLE:
        found = tl.where(r[:, None] == c[None, :], 1.0, found)
        inside = inside & (r[:, None] <= c[None, :])
        below = (r < rows)[None, :] & (c < columns)[:, None] & (r[None, :] < c[:, None])
        tl.store(out + c.to(tl.int64)[:, None] * out_pitch + r[None, :], found.T, mask=below)
    tl.store(out + r.to(tl.int64)[:, None] * out_pitch + c[None, :], found, mask=inside)


@triton.jit
def mirror_kernel(square, units, pitch, BLOCK: tl.constexpr):
    """Copy block (i, j) above the diagonal to its mirror image below."""
    i = tl.program_id(0)
    j = tl.program_id(1)
    if j < i:
        return
    r = i * BLOCK + tl.arange(0, BLOCK)
    c = j * BLOCK + tl.arange(0, BLOCK)
    above = (r < units)[:, None] & (c < units)[None, :] & (r[:, None] < c[None, :])
    found = tl.load(square + r.to(tl.int64)[:, None] * pitch + c[None, :], mask=above, other=0.0)
    below = (r < units)[None, :] & (c < units)[:, None] & (r[None, :] < c[:, None])
    tl.store(square + c.to(tl.int64)[:, None] * pitch + r[None, :], found.T, mask=below)


def correlations(gram: Tensor, out: Tensor, moments: tuple[Tensor, Tensor], count: int, triangle: bool) -> None:
    """Fill ``out`` with correlations.

    Args:
        gram, out: (rows, columns), float32, columns adjacent; triangle: square, and ``gram`` is read on and above the
            diagonal.
        moments: (2, rows) and (2, columns), float32: mean about the shift, inverse deviation (0 for a dead unit).
        count: samples.
        triangle: rows and columns are the same units: ``out`` is exactly symmetric with a diagonal of 1.
    """
    rows, columns = gram.shape
    grid = (-(-rows // BLOCK), -(-columns // BLOCK))
    with launching("correlation.correlation_kernel", gram.device):
        correlation_kernel[grid](
            gram, out, moments[0], moments[1], 1.0 / count, rows, columns, gram.stride(0), out.stride(0),
            moments[0].stride(0), moments[1].stride(0), TRIANGLE=triangle, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip


def mirror(square: Tensor) -> None:
    """Write what lies above the diagonal below it, in place: (units, units), float32, columns adjacent."""
    side = -(-square.shape[0] // BLOCK)
    with launching("correlation.mirror_kernel", square.device):
        mirror_kernel[(side, side)](square, square.shape[0], square.stride(0), BLOCK=BLOCK, num_warps=4)


def moments_of(vectors: Tensor, count: int, dead: float) -> Tensor:
    """(2, units), float32: mean about the shift and inverse deviation of accumulators (4, units), float64."""
    shift, scale, sums, squares = vectors
    mean = sums / count
    variance = squares / count - mean.square()
    square = torch.maximum(variance + (shift * scale + mean).square(), mean.square())
    inverse = torch.where(variance > dead**2 * square, variance.rsqrt(), 0.0)
    return torch.stack((mean, inverse)).float()
