"""X^T Y over samples, tile by tile: added to a float32 matrix, or blended into similarities without leaving the
registers.

Both kernels share one main loop. Units are adjacent in memory ("rows": a sample's units side by side), so that both
operands enter the tensor cores transposed, straight from shared memory; or samples are (channel-first images). float32
is multiplied as
planes of bfloat16 that lie under one another: plane p of sample t is row p * plane_rows + t.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mudsc_fast.backends.triton.configs import ProductConfig
from mudsc_fast.backends.triton.launching import launching, programs, tile_order

# Which planes are multiplied, small ones first, two bits each: pairs whose product is below 2**-24 are left out.
LEFT_PLANES = {1: 0b00, 2: 0b00_00_01, 3: 0b00_00_01_01_00_10}
RIGHT_PLANES = {1: 0b00, 2: 0b00_01_00, 3: 0b00_01_00_01_10_00}
PRODUCTS = {1: 1, 2: 3, 3: 6}


@triton.jit
def _load(
    tensor, row, unit, rows_left, units, pitch, image, DESCRIPTORS: tl.constexpr, CHANNELS: tl.constexpr,
    UNITS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """DEPTH samples of UNITS units, [DEPTH, UNITS]."""
    if CHANNELS:
        found = tensor.load([image, unit, row]).reshape(UNITS, DEPTH).T
    elif DESCRIPTORS:
        found = tensor.load([row, unit])
    else:
        t = tl.arange(0, DEPTH)
        u = unit + tl.arange(0, UNITS)
        inside = (t < rows_left)[:, None] & (u < units)[None, :]
        # The row's base is 64-bit; inside a step int32 is enough: DEPTH times the pitch.
        base = tensor + row.to(tl.int64) * pitch
        found = tl.load(base + t[:, None] * pitch + u[None, :], mask=inside, other=0.0)
    return found


@triton.jit
def _multiply(
    left, right, i, j, first, count, samples, image_steps, plane_rows,
    left_units, right_units, left_pitch, right_pitch,
    DESCRIPTORS: tl.constexpr, CHANNELS: tl.constexpr, PRODUCTS: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Tile (i, j) of the product over steps [first, first + count) of every pair of planes, [ROWS, COLUMNS]."""
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for at in tl.range(0, PRODUCTS * count, num_stages=STAGES):
        pair = at // count if PRODUCTS > 1 else 0
        step = first + at - pair * count
        image = step // image_steps if CHANNELS else 0
        row = (step - image * image_steps) * DEPTH if CHANNELS else step * DEPTH
        left_row = row + ((LEFT >> (2 * pair)) & 3) * plane_rows if PRODUCTS > 1 else row
        right_row = row + ((RIGHT >> (2 * pair)) & 3) * plane_rows if PRODUCTS > 1 else row
        x = _load(
            left, left_row, i * ROWS, samples - row, left_units, left_pitch, image, DESCRIPTORS, CHANNELS, ROWS, DEPTH
        )
        y = _load(
            right, right_row, j * COLUMNS, samples - row, right_units, right_pitch, image, DESCRIPTORS, CHANNELS,
            COLUMNS, DEPTH,
        )  # fmt: skip
        acc = tl.dot(x.T, y, acc)
    return acc


@triton.jit
def add_kernel(
    left, right, out, tiles, tile_count, splits, chunk_steps, steps, samples, image_steps, plane_rows,
    left_units, right_units, left_pitch, right_pitch, out_pitch, first_row,
    DESCRIPTORS: tl.constexpr, CHANNELS: tl.constexpr, ADD_DESCRIPTORS: tl.constexpr, PRODUCTS: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr, SLICES: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """out += X^T Y for the listed tiles; a tile's chunks are shared out among `splits` programs.

    HELD: as many chunks are added up in registers, rounded to nearest, before they go to memory.
    """
    for item in range(tl.program_id(0), tile_count * splits, tl.num_programs(0)):
        tile = item // splits
        part = item - tile * splits
        i = tl.load(tiles + 2 * tile)
        j = tl.load(tiles + 2 * tile + 1)
        for first in range(part * chunk_steps * HELD, steps, splits * chunk_steps * HELD):
            if HELD == 1:
                acc = _multiply(
                    left, right, i, j, first, tl.minimum(steps - first, chunk_steps), samples, image_steps, plane_rows,
                    left_units, right_units, left_pitch, right_pitch,
                    DESCRIPTORS, CHANNELS, PRODUCTS, LEFT, RIGHT, ROWS, COLUMNS, DEPTH, STAGES,
                )  # fmt: skip
            else:
                acc = tl.zeros((ROWS, COLUMNS), tl.float32)
                for at in range(first, tl.minimum(steps, first + chunk_steps * HELD), chunk_steps):
                    acc += _multiply(
                        left, right, i, j, at, tl.minimum(steps - at, chunk_steps), samples, image_steps, plane_rows,
                        left_units, right_units, left_pitch, right_pitch,
                        DESCRIPTORS, CHANNELS, PRODUCTS, LEFT, RIGHT, ROWS, COLUMNS, DEPTH, STAGES,
                    )  # fmt: skip
            if ADD_DESCRIPTORS:
                out.atomic_add([i * ROWS - first_row, j * COLUMNS], acc)
            else:
                r = i * ROWS + tl.arange(0, ROWS)
                rows_at = out + (r - first_row).to(tl.int64) * out_pitch
                _add_slices(acc, rows_at, r < left_units, j * COLUMNS, right_units, ROWS, COLUMNS, SLICES)


@triton.jit
def _halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of the columns, without leaving the registers."""
    return x.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()


@triton.jit
def _add_slices(
    x, at, row_in, column, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SLICES: tl.constexpr
):  # fmt: skip
    """Add a tile to memory, some columns at a time: addresses of all of them at once would not fit the registers."""
    if SLICES > 1:
        a, b = _halves(x, ROWS, COLUMNS)
        _add_slices(a, at, row_in, column, columns, ROWS, COLUMNS // 2, SLICES // 2)
        _add_slices(b, at, row_in, column + COLUMNS // 2, columns, ROWS, COLUMNS // 2, SLICES // 2)
    else:
        c = column + tl.arange(0, COLUMNS)
        tl.atomic_add(at[:, None] + c[None, :], x, mask=row_in[:, None] & (c < columns)[None, :], sem="relaxed")


@triton.jit
def correlate(products, over, row_mean, row_inverse, column_mean, column_inverse):
    """Correlations from products about a shift: (products / samples - means) * inverse deviations, within -1..1."""
    centred = products * over - row_mean[:, None] * column_mean[None, :]
    found = centred * row_inverse[:, None] * column_inverse[None, :]
    return tl.minimum(tl.maximum(found, -1.0), 1.0)


@triton.jit
def blend_kernel(
    left, right, out, partial, tiles, tile_count, first_step, steps, samples, plane_rows,
    left_units, right_units, left_pitch, right_pitch, out_pitch,
    left_moments, right_moments, moments_pitch,  # each [4, units]: mean, inverse deviation by weights; by activations
    gram, gram_pitch, over_columns, over_count, balance, prices, first_row, mirrored,
    DESCRIPTORS: tl.constexpr, PRODUCTS: tl.constexpr,
    PARTIAL: tl.constexpr, ACTIVATION: tl.constexpr, TRIANGLE: tl.constexpr, MIRROR: tl.constexpr,
    PRICES: tl.constexpr, LARGEST: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Similarities of the listed tiles: the product, means, norms, the activations' block and the blend in one pass.

    PARTIAL: `partial` holds the products of columns before `first_step`. PRICES: minus a price a column. LARGEST: the
    largest of each row goes to `out` ([rows], float32), and nothing else is written. Row `first_row` is the first that
    `out` has.
    """
    for tile in range(tl.program_id(0), tile_count, tl.num_programs(0)):
        i = tl.load(tiles + 2 * tile)
        j = tl.load(tiles + 2 * tile + 1)
        acc = _multiply(
            left, right, i, j, first_step, steps, samples, 1, plane_rows,
            left_units, right_units, left_pitch, right_pitch,
            DESCRIPTORS, False, PRODUCTS, LEFT, RIGHT, ROWS, COLUMNS, DEPTH, STAGES,
        )  # fmt: skip
        _finish(
            acc, i * ROWS, j * COLUMNS, out, partial, left_units, right_units, out_pitch,
            left_moments, right_moments, moments_pitch, gram, gram_pitch, over_columns, over_count, balance, prices,
            first_row, mirrored, PARTIAL, ACTIVATION, TRIANGLE, MIRROR, PRICES, LARGEST, ROWS, COLUMNS, SLICES,
        )  # fmt: skip


@triton.jit
def _finish(
    acc, row, column, out, partial, left_units, right_units, out_pitch,
    left_moments, right_moments, moments_pitch, gram, gram_pitch, over_columns, over_count, balance, prices,
    first_row, mirrored,
    PARTIAL: tl.constexpr, ACTIVATION: tl.constexpr, TRIANGLE: tl.constexpr, MIRROR: tl.constexpr,
    PRICES: tl.constexpr, LARGEST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """The end of a tile, some columns at a time (all at once would not fit the registers); returns each row's
    largest."""
    if SLICES > 1:
        a, b = _halves(acc, ROWS, COLUMNS)
        _finish(
            a, row, column, out, partial, left_units, right_units, out_pitch,
            left_moments, right_moments, moments_pitch, gram, gram_pitch, over_columns, over_count, balance, prices,
            first_row, mirrored, PARTIAL, ACTIVATION, TRIANGLE, MIRROR, PRICES, LARGEST,
            ROWS, COLUMNS // 2, SLICES // 2,
        )  # fmt: skip
        _finish(
            b, row, column + COLUMNS // 2, out, partial, left_units, right_units, out_pitch,
            left_moments, right_moments, moments_pitch, gram, gram_pitch, over_columns, over_count, balance, prices,
            first_row, mirrored, PARTIAL, ACTIVATION, TRIANGLE, MIRROR, PRICES, LARGEST,
            ROWS, COLUMNS // 2, SLICES // 2,
        )  # fmt: skip
    else:
        r = row + tl.arange(0, ROWS)
        c = column + tl.arange(0, COLUMNS)
        row_in = r < left_units
        column_in = c < right_units
        inside = row_in[:, None] & column_in[None, :]
        if TRIANGLE:
            inside = inside & (r[:, None] <= c[None, :])
        at = (r - first_row).to(tl.int64)[:, None] * out_pitch + c[None, :]
        if PARTIAL:
            acc += tl.load(partial + at, mask=inside, other=0.0)
        row_at = left_moments + r
        column_at = right_moments + c
        found = correlate(
            acc,
            over_columns,
            tl.load(row_at, mask=row_in, other=0.0),
            tl.load(row_at + moments_pitch, mask=row_in, other=0.0),
            tl.load(column_at, mask=column_in, other=0.0),
            tl.load(column_at + moments_pitch, mask=column_in, other=0.0),
        )
        if ACTIVATION:
            seen = tl.load(gram + r.to(tl.int64)[:, None] * gram_pitch + c[None, :], mask=inside, other=0.0)
            active = correlate(
                seen,
                over_count,
                tl.load(row_at + 2 * moments_pitch, mask=row_in, other=0.0),
                tl.load(row_at + 3 * moments_pitch, mask=row_in, other=0.0),
                tl.load(column_at + 2 * moments_pitch, mask=column_in, other=0.0),
                tl.load(column_at + 3 * moments_pitch, mask=column_in, other=0.0),
            )
            found = balance * found + (1.0 - balance) * active
        if TRIANGLE:
            found = tl.where(r[:, None] == c[None, :], 1.0, found)
        if PRICES:
            found -= tl.load(prices + c, mask=column_in, other=0.0)[None, :]
        if LARGEST:
            best = tl.max(tl.where(inside, found, float("-inf")), axis=1)
            tl.atomic_max(out + r - first_row, best, mask=row_in, sem="relaxed")
        else:
            tl.store(out + at, found, mask=inside)
            if MIRROR:
                across = mirrored + c.to(tl.int64)[:, None] * out_pitch + r[None, :]
                below = column_in[:, None] & row_in[None, :]
                if TRIANGLE:
                    below = below & (r[None, :] < c[:, None])
                tl.store(across, found.T, mask=below)


def readable(operand: Operand, config: ProductConfig) -> bool:
    """Whether a configuration can read this operand where it lies: by bulk loads, or by offsets of 32 bits in a
    step."""
    if config.descriptors and operand.aligned:
        return True
    return not operand.images and operand.pitch * config.depth < 2**31


def _common(left: Operand, right: Operand, config: ProductConfig) -> tuple[Any, Any, dict[str, Any]]:
    use = config.descriptors and left.aligned and right.aligned
    if not (readable(left, config) and readable(right, config)):
        raise ValueError(f"left, right: expected operands that {config.name} can read, see product.readable")
    meta = {
        "DESCRIPTORS": use,
        "PRODUCTS": PRODUCTS[left.planes],
        "LEFT": LEFT_PLANES[left.planes],
        "RIGHT": RIGHT_PLANES[left.planes],
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "DEPTH": config.depth,
        "STAGES": config.stages,
        "SLICES": config.slices,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
    if not use:
        return left.tensor, right.tensor, meta
    return left.descriptor(config.rows, config.depth), right.descriptor(config.columns, config.depth), meta


def shares(tiles: int, chunks: int, device: torch.device) -> int:
    """Among how many programs a tile's chunks are shared out, where tiles are too few to go round.

    The order of additions is then left to chance, which ``torch.use_deterministic_algorithms(True)`` forbids.
    """
    if torch.are_deterministic_algorithms_enabled():
        return 1
    return max(1, min(programs(device) // tiles, chunks))


def lengthening(ratio: float) -> int:
    """How many times a configuration's chunk may be lengthened at this |mean - shift| / deviation.

    A chunk of 1024 samples loses up to 1.4e-6 of its sum, which is up to 1 + ratio^2 times the covariance; twice the
    samples lose twice that, and go to memory half as often. Kept below 7e-6: 4 times up to 0.5, twice up to 1.2, once
    up to 2.
    """
    spread = 1.0 + ratio * ratio
    return 4 if spread <= 1.3 else 2 if spread <= 2.6 else 1


class Operand:
    """One side of a product: units of one model over samples, in planes of rows or as channel-first images.

    tensor: rows: (planes * plane_rows, units), units adjacent; images: (images, units, samples an image), samples
    adjacent.
    samples: rows of a plane that count; rows from there to a multiple of `depth` are zero or not there.
    """

    def __init__(self, tensor: Tensor, planes: int = 1, plane_rows: int = 0, samples: int = 0) -> None:
        self.tensor, self.planes, self.plane_rows = tensor, planes, plane_rows
        self.images = tensor.shape[0] if tensor.dim() == 3 else 0
        self.units = tensor.shape[1]
        self.samples = tensor.shape[2] if self.images else samples or tensor.shape[0]
        self.pitch = tensor.stride(0)
        steps = [tensor.stride(d) * tensor.element_size() for d in range(tensor.dim() - 1)]
        self.aligned = tensor.data_ptr() % 16 == 0 and all(0 < s < 2**40 and s % 16 == 0 for s in steps)

    def descriptor(self, units: int, depth: int) -> TensorDescriptor:
        """The tensor map of blocks of `depth` samples and `units` units."""
        block = [1, units, depth] if self.images else [depth, units]
        return TensorDescriptor(self.tensor, list(self.tensor.shape), list(self.tensor.stride()), block)

    def steps(self, depth: int) -> int:
        """Steps of one plane."""
        return -(-self.samples // depth) * max(self.images, 1)


def add_product(
    left: Operand,
    right: Operand,
    out: Tensor,
    triangle: bool,
    config: ProductConfig,
    steps: int | None = None,
    rows: tuple[int, int] | None = None,
    lengthen: int = 1,
    repeatable: bool = False,
    beyond: int = 0,
) -> None:
    """Add X^T Y to ``out``.

    Args:
        left, right: two sets of units over the same samples, one dtype (float16 or bfloat16), as many planes.
        out: (left units, right units), float32, columns adjacent.
        triangle: only tiles that reach above the diagonal; the rest of ``out`` keeps what it has.
        config: how to cut it.
        steps: how many steps of ``config.depth`` samples, from the first; None: all.
        rows: the strip of left units that ``out`` has; it starts at a tile's edge.
        lengthen: chunks are as many times ``config.chunk`` samples long (``lengthening``).
        repeatable: never share a tile's chunks out, so that its sums come out the same in any strip.
        beyond: only tiles outside of the squares of this side along the diagonal (``diagonal``).
    """
    x, y, meta = _common(left, right, config)
    first, last = rows or (0, left.units)
    reduce = config.add_descriptors and out.data_ptr() % 16 == 0 and out.stride(0) % 4 == 0
    tiles = tile_order(left.units, right.units, config, triangle, out.device, (first, last), beyond)
    if not len(tiles):
        return
    steps = left.steps(config.depth) if steps is None else steps
    chunk_steps = config.chunk * lengthen // config.depth
    splits = 1 if repeatable else shares(len(tiles), -(-steps // (chunk_steps * config.held)), out.device)
    into = out
    if reduce:
        block = [config.rows, config.columns]
        into = TensorDescriptor(out, list(out.shape), list(out.stride()), block)
    with launching("product.add_kernel", out.device):
        add_kernel[(min(programs(out.device), len(tiles) * splits),)](
            x, y, into, tiles, len(tiles), splits, chunk_steps, steps, left.samples,
            max(1, -(-left.samples // config.depth)),
            left.plane_rows, min(last, left.units), right.units, left.pitch, right.pitch, out.stride(0), first,
            CHANNELS=bool(left.images), ADD_DESCRIPTORS=reduce, HELD=config.held, **meta,
        )  # fmt: skip


def blend_products(
    left: Operand,
    right: Operand,
    out: Tensor,
    moments: tuple[Tensor, Tensor],
    columns: int,
    activation: tuple[Tensor, int] | None,
    balance: float,
    config: ProductConfig,
    *,
    partial: Tensor | None = None,
    continued: bool = False,
    triangle: bool = False,
    mirror: Tensor | None = None,
    prices: Tensor | None = None,
    largest: bool = False,
    rows: tuple[int, int] | None = None,
    lengthen: int = 1,
    repeatable: bool = False,
) -> None:
    """Finish similarities: see ``blend_kernel``.

    Args:
        left, right: units over (the last of) the weight columns, as in ``add_product``.
        out: float32: (left units, right units), columns adjacent; for a strip (rows given) its rows alone; with
            ``largest`` one entry a row, -inf to begin with.
        moments: (4, left units), (4, right units), float32, one pitch: mean and inverse deviation by weights, about the
            planes' shift and in their scale; and by activations.
        columns: weight columns in all.
        activation: products of activations (left units, right units) and their number of samples; None: weights alone.
        balance: share of the weights.
        config: how to cut it.
        partial: where products of earlier columns are kept, float32, shaped as ``out`` is without ``largest``; None:
            ``out``.
        continued: there are such products already.
        triangle: both sides are the same units, and ``out`` starts at their diagonal block.
        mirror: (right units, left units), of ``out``'s pitch: takes the transpose. For a triangle it is ``out`` itself.
        prices: (right units,), float32, taken off every row.
        largest: keep only the largest of each row.
        rows: the strip of left units to compute, a multiple of the tile's rows at its start.
        lengthen, repeatable: as in ``add_product``.
    """
    x, y, meta = _common(left, right, config)
    first, last = rows or (0, left.units)
    tiles = tile_order(left.units, right.units, config, triangle, out.device, (first, last))
    gram, count = activation or (out, 1)
    steps, most = left.steps(config.depth), config.chunk * lengthen // config.depth
    before = (steps - 1) // most * most
    held = out if partial is None else partial
    if before:
        # What is added up in tensor cores stays short (``configs``): all but the last chunk goes through memory.
        if not continued:
            held.zero_()
        add_product(left, right, held, triangle, config, before, (first, last), lengthen, repeatable)
    workers = programs(out.device)
    with launching("product.blend_kernel", out.device):
        blend_kernel[(min(workers, len(tiles)),)](
            x, y, out, held, tiles, len(tiles), before, steps - before, left.samples, left.plane_rows,
            min(last, left.units), right.units, left.pitch, right.pitch, held.stride(0),
            moments[0], moments[1], moments[0].stride(0), gram, gram.stride(0), 1.0 / columns, 1.0 / count, balance,
            out if prices is None else prices, first, out if mirror is None else mirror,
            PARTIAL=continued or before > 0, ACTIVATION=activation is not None, TRIANGLE=triangle,
            MIRROR=mirror is not None, PRICES=prices is not None, LARGEST=largest, **meta,
        )  # fmt: skip
