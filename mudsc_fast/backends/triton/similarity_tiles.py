"""Dual-space similarities: weight columns stream through planes into the product, whose last step blends them with
activations.

The columns of all terms are read in place, shifted by each unit's mean over all of them, scaled, and split into planes
of a bounded workspace (``split``); whenever it is full, the products go to the result's own memory, and the last one
ends in ``blend_kernel``. So nothing of the result's size exists but the result, and for the forms that keep less
(``candidates``, ``largest``), nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mudsc_fast.backends.cpu_covariance import similarity_shape
from mudsc_fast.backends.torch_device import DEAD, TorchCovariance
from mudsc_fast.backends.triton.candidates import MOST, worth_most
from mudsc_fast.backends.triton.configs import product_config
from mudsc_fast.backends.triton.covariance_sums import FEW, HALF, HUGE, RAW_RATIO, TINY
from mudsc_fast.backends.triton.launching import allocate, capability
from mudsc_fast.backends.triton.product import Operand, add_product, blend_products, lengthening
from mudsc_fast.backends.triton.split import Source, split, strided
from mudsc_fast.backends.triton.wide import wide_similarity

if TYPE_CHECKING:
    from mudsc_fast.covariance import Covariance
    from mudsc_fast.similarity import Labelled, Table

WORKSPACE = 2**30  # bytes of planes at a time
STRIP = 1024  # rows of similarities that exist at a time where the whole is not wanted


def similarity(
    tables: list[list[Table]],
    width: int,
    models: int,
    cross: bool,
    balance: float,
    activation: Covariance | None,
    device: torch.device,
) -> Tensor:
    """Blend the similarities by weights and by activations; see ``mudsc_fast.dual_similarity``."""
    sums = None if activation is None else activation._sums
    apart = activation is not None and not (
        isinstance(sums, TorchCovariance) and sums.gram.dtype == torch.float32 and sums.device == device
    )
    if any(table[0].dtype == torch.float64 for row in tables for table in row):
        found = wide_similarity(tables, width, models, cross)
        apart = activation is not None
    else:
        found = Similarities(tables, width, models, balance, None if apart else activation, device).matrix(cross)
    if activation is not None and apart:
        active = activation.correlation_blocks("cross" if cross else "full").to(device)
        dtype = torch.promote_types(found.dtype, active.dtype)
        found = found.to(dtype).mul_(balance).add_(active, alpha=1.0 - balance)
    return found


class Similarities:
    """Similarities of one space's units that have yet to be computed: whole, or only what a caller needs of them.

    Attributes:
        planes: 1 where 16-bit weights are multiplied as they are, 2 for others of them, 3 where a weight is float32.
        columns: weight columns in all.

    Raises:
        ValueError: NaN or infinity in a weight.
    """

    def __init__(
        self,
        tables: list[list[Table]],
        width: int,
        models: int,
        balance: float,
        activation: Covariance | None,
        device: torch.device,
        name: str = "terms",
    ) -> None:
        self.width, self.models, self.balance, self.device = width, models, balance, device
        self._name = name
        self.config = product_config("blend", capability(device))
        self._terms = [_sources(row) for row in tables]
        self.columns = sum(term[0].samples for term in self._terms)
        dtypes = {table[0].dtype for row in tables for table in row}
        plain = not any(table[2] for row in tables for table in row)
        self._choose_planes(dtypes, plain)
        self._sums = activation._sums if activation is not None else None
        seen = torch.zeros(2, models * width, device=device)
        if isinstance(self._sums, TorchCovariance):
            if self._sums.block == 0 and hasattr(self._sums, "_require_usable"):
                self._sums._require_usable()
            from mudsc_fast.backends.triton.correlation import moments_of

            seen = moments_of(self._sums.vectors, self._sums.count, DEAD)
        self._active = seen
        self._kept: tuple[list[Operand], Tensor] | None = None

    def _choose_planes(self, dtypes: set[torch.dtype], plain: bool) -> None:
        """A first pass over the weights: means, deviations, and whether anything is not finite."""
        zero = torch.zeros(self.width, device=self.device)
        found = [torch.cat([split(source, zero, zero + 1.0) for source in term], dim=1) for term in self._terms]
        sums, squares, _ = torch.stack(found).sum(dim=0)
        mean, square = sums / self.columns, squares / self.columns
        variance = square - mean.square()
        fits = (square == 0.0) | ((square >= TINY) & (square <= HUGE))
        dead = variance <= DEAD**2 * square
        ratio = torch.where(dead, 0.0, mean.abs() / variance.clamp(min=0.0).sqrt())
        largest = torch.where(fits, ratio, torch.inf).max()
        flags = torch.cat((torch.stack([moments[2].sum() for moments in found]), largest[None])).tolist()
        for t, bad in enumerate(flags[:-1]):
            if bad:
                raise ValueError(f"{self._name}[{t}]: expected finite values, got NaN or infinity")
        self._shift = torch.zeros(self.models, self.width, device=self.device)
        self._scale = torch.ones(self.models, self.width, device=self.device)
        self._lengthen = lengthening(0.0)  # about the means
        if len(dtypes) == 1 and dtypes <= set(HALF) and plain and flags[-1] <= RAW_RATIO:
            self.planes, self._dtype = 1, next(iter(dtypes))
            self._lengthen = lengthening(flags[-1])
            return
        two = dtypes <= set(HALF) and plain and self.columns >= FEW
        self.planes, self._dtype = 2 if two else 3, torch.bfloat16
        deviation = variance.clamp(min=0.0).sqrt()
        _, exponent = torch.frexp(deviation)
        scale = torch.where(deviation > 0.0, torch.ldexp(torch.ones_like(deviation), -exponent), 1.0)
        self._scale = scale.clamp(2.0**-100, 2.0**100).float().reshape(self.models, self.width)
        self._shift = mean.float().reshape(self.models, self.width)

    # ---- planes ----

    def _pieces(self) -> list[list[list[Source]]]:
        """Slabs of all terms, one list of a source a model each, in groups that fill the workspace."""
        pitch = -(-self.width // 8) * 8
        depth = self.config.depth
        most = max(self.config.chunk, WORKSPACE // (2 * self.planes * pitch * self.models) // depth * depth)
        pieces: list[list[list[Source]]] = []
        filled = most
        for term in self._terms:
            for slab in zip(*(source.slabs(most) for source in term), strict=True):
                if filled + slab[0].samples > most:
                    pieces.append([])
                    filled = 0
                pieces[-1].append(list(slab))
                filled += slab[0].samples
        return pieces

    def _packed(self) -> Iterator[tuple[list[Operand], bool]]:
        """Operands of all models, piece by piece, and whether a piece is the last; moments are complete with that."""
        if self._kept is not None:
            yield self._kept[0], True
            return
        pieces = self._pieces()
        depth = self.config.depth
        rows = max(sum(slab[0].samples for slab in piece) for piece in pieces)
        rows = -(-rows // depth) * depth
        shape = (self.models, self.planes, rows, -(-self.width // 8) * 8)
        store = allocate(
            shape, self._dtype, self.device, "similarity: planes of weights", "split the space into blocks"
        )
        total = torch.zeros(3, self.models * self.width, dtype=torch.float64, device=self.device)
        for k, piece in enumerate(pieces):
            at = 0
            for slab in piece:
                made = [split(s, self._shift[m], self._scale[m], store[m], at) for m, s in enumerate(slab)]
                total += torch.cat(made, dim=1)
                at += slab[0].samples
            padded = -(-at // depth) * depth
            store[:, :, at:padded].zero_()
            operands = [
                Operand(store[m].reshape(-1, shape[3])[:, : self.width], self.planes, rows, padded)
                for m in range(self.models)
            ]
            last = k == len(pieces) - 1
            if last:
                self._moments = self._finished(total)
            if last and len(pieces) == 1:
                self._kept = operands, store
            yield operands, last

    def _finished(self, total: Tensor) -> Tensor:
        """(4, models * width), float32: mean and inverse deviation by weights (about the shift), then by
        activations."""
        shift, scale = self._shift.double().flatten(), self._scale.double().flatten()
        mean, square = total[0] / self.columns, total[1] / self.columns
        variance = square - mean.square()
        size = torch.maximum(variance + (shift * scale + mean).square(), mean.square())
        inverse = torch.where(variance > DEAD**2 * size, variance.rsqrt(), 0.0)
        return torch.cat((torch.stack((mean, inverse)).float(), self._active))

    # ---- what can be had ----

    def matrix(self, cross: bool) -> Tensor:
        """All similarities, float32: (models - 1, width, width) or (models * width, models * width)."""
        d = self.width
        shape = similarity_shape(d, self.models, cross)
        instead = 'scope="cross" needs less' if not cross else "candidates of each row need less"
        out = allocate(shape, torch.float32, self.device, "similarity: the result", instead)
        pairs = [(0, m) for m in range(1, self.models)]
        if not cross:
            pairs = [(m, other) for m in range(self.models) for other in range(m, self.models)]
        for k, (operands, last) in enumerate(self._packed()):
            for m, other in pairs:
                block = out[other - 1] if cross else out[m * d : (m + 1) * d, other * d : (other + 1) * d]
                if last:
                    across = None if cross else out[other * d : (other + 1) * d, m * d : (m + 1) * d]
                    self._blend(operands, m, other, block, continued=k > 0, mirror=across, triangle=m == other)
                    continue
                if k == 0:
                    block.zero_()
                add_product(operands[m], operands[other], block, m == other, self.config, lengthen=self._lengthen)
        return out

    def _blend(
        self,
        operands: list[Operand],
        m: int,
        other: int,
        out: Tensor,
        *,
        continued: bool,
        mirror: Tensor | None = None,
        triangle: bool = False,
        partial: Tensor | None = None,
        prices: Tensor | None = None,
        largest: bool = False,
        rows: tuple[int, int] | None = None,
    ) -> None:
        d = self.width
        moments = self._moments[:, m * d : (m + 1) * d], self._moments[:, other * d : (other + 1) * d]
        activation = None
        if isinstance(self._sums, TorchCovariance):
            column = other * d - (d if self._sums.cross else 0)
            activation = self._sums.gram[m * d : (m + 1) * d, column : column + d], self._sums.count
        blend_products(
            operands[m], operands[other], out, moments, self.columns, activation, self.balance, self.config,
            partial=partial, continued=continued, triangle=triangle, mirror=mirror, prices=prices, largest=largest,
            rows=rows, lengthen=self._lengthen, repeatable=rows is not None,
        )  # fmt: skip

    def _add_strip(self, operands: list[Operand], m: int, strip: Tensor, first: int, last: int) -> None:
        add_product(
            operands[0], operands[m], strip, False, self.config, rows=(first, last), lengthen=self._lengthen,
            repeatable=True,
        )  # fmt: skip

    def _strips(self, m: int, prices: Tensor | None, largest: bool) -> Iterator[tuple[int, int, Tensor]]:
        """Strips of the similarities of models 0 and m: first row, one past the last, (rows, width) or (rows,)."""
        tall = self.config.rows
        size = min(max(STRIP // tall, 1) * tall, -(-self.width // tall) * tall)
        scratch = self._rows_of_memory(size)
        for first in range(0, self.width, size):
            last = min(first + size, self.width)
            strip = scratch[: last - first]
            best = torch.full((last - first,), float("-inf"), device=self.device)
            for k, (operands, final) in enumerate(self._packed()):
                if final:
                    self._blend(
                        operands, 0, m, best if largest else strip, continued=k > 0, partial=strip, prices=prices,
                        largest=largest, rows=(first, last),
                    )  # fmt: skip
                    continue
                if k == 0:
                    strip.zero_()
                self._add_strip(operands, m, strip, first, last)
            yield first, last, best if largest else strip

    def candidates(self, k: int, prices: Tensor | None = None, m: int = 1) -> tuple[Tensor, Tensor]:
        """The k best columns of each row, without the matrix.

        Args:
            k: how many, at most 128 and at most the width.
            prices: (width,), floating: columns are compared by s_ij - prices_j.
            m: the model whose units are the columns; the rows are model 0's.

        Returns:
            (indices, values): (width, k), int64, best first, and float32 similarities without the prices.

        Raises:
            ValueError: k or m out of range, prices of another shape.
        """
        if not 1 <= k <= min(MOST, self.width):
            raise ValueError(f"k: expected 1..{min(MOST, self.width)}, got {k}")
        self._checked(prices, m)
        indices = torch.empty(self.width, k, dtype=torch.int64, device=self.device)
        values = torch.empty(self.width, k, device=self.device)
        less = torch.zeros(self.width) if prices is None else prices
        less = less.to(self.device, torch.float64)
        for first, last, strip in self._strips(m, None, False):
            indices[first:last], values[first:last], _, _ = worth_most(strip, first, less, k)
        return indices, values

    def largest(self, u: Tensor, v: Tensor, m: int = 1) -> Tensor:
        """The largest reduced cost of each row: max over j of s_ij - u_i - v_j, (width,), float64.

        Duals are feasible, and an assignment that is tight under them is proven best, where none is above 0. Neither
        duals nor differences are kept in full: v is rounded to float32, then s - v. So a result may be wrong by
        2**-24 (2 |v| + |s|) for the largest v and s; ``assign_tiled`` takes exact maxima of tiles instead.

        Args:
            u, v: (width,), floating: duals of the rows and of the columns.
            m: the model whose units are the columns.

        Raises:
            ValueError: m out of range, duals of another shape.
        """
        self._checked(u, m)
        prices = self._checked(v, m)
        found = torch.cat([best.clone() for _, _, best in self._strips(m, prices, True)])
        return found.double() - u.to(self.device, torch.float64)

    def rows(self, wanted: Tensor, m: int = 1) -> Tensor:
        """Some rows in full: (rows, width), float32; the same whenever they are asked for, and with whatever others.

        Args:
            wanted: (rows,), int64: units of model 0, in any order.
            m: the model whose units are the columns.

        Raises:
            ValueError: m or a row out of range.
        """
        self._checked(None, m)
        wanted = wanted.to(self.device, torch.int64)
        if wanted.dim() != 1 or not len(wanted) or int(wanted.min()) < 0 or int(wanted.max()) >= self.width:
            raise ValueError(f"wanted: expected units 0..{self.width - 1}, got {tuple(wanted.shape)} of them")
        out = self._rows_of_memory(len(wanted))
        for strips in _strips_of(wanted, self.config.rows, self.width):
            parts = [self._rows_of_memory(last - first) for first, last in strips]
            for k, (operands, final) in enumerate(self._packed()):
                for (first, last), part in zip(strips, parts, strict=True):
                    if final:
                        self._blend(operands, 0, m, part, continued=k > 0, rows=(first, last))
                        continue
                    if k == 0:
                        part.zero_()
                    self._add_strip(operands, m, part, first, last)
            for (first, last), part in zip(strips, parts, strict=True):
                here = (wanted >= first) & (wanted < last)
                out[here] = part[wanted[here] - first]
        return out

    def _rows_of_memory(self, count: int) -> Tensor:
        shape = count, self.width
        return allocate(shape, torch.float32, self.device, "similarity: some rows", "fewer rows at a time need less")

    def tile(self, rows: Tensor) -> Tensor:
        """``rows`` of models 0 and 1, as solvers that see a few rows at a time ask for them."""
        return self.rows(rows)

    def _checked(self, vector: Tensor | None, m: int) -> Tensor | None:
        if not 1 <= m < self.models:
            raise ValueError(f"m: expected 1..{self.models - 1}, got {m}")
        if vector is None:
            return None
        if vector.shape != (self.width,):
            raise ValueError(f"prices: expected shape ({self.width},), got {tuple(vector.shape)}")
        return vector.to(self.device, torch.float32).contiguous()


def _strips_of(wanted: Tensor, tall: int, width: int) -> Iterator[list[tuple[int, int]]]:
    """Strips of whole tile rows that hold the wanted rows, first row and one past the last, neighbours joined.

    Those of one list are computed together; they have no more rows than are wanted, or than STRIP.
    """
    most = max(len(wanted), STRIP) // tall
    strips: list[tuple[int, int]] = []
    used = 0
    for block in (wanted // tall).unique().tolist():
        if strips and used >= most:
            yield strips
            strips, used = [], 0
        start = block * tall
        if strips and strips[-1][1] == start:
            start = strips.pop()[0]
        strips.append((start, min((block + 1) * tall, width)))
        used += 1
    yield strips


def _sources(row: list[Table]) -> list[Source]:
    """One term's tensors, a source a model: by strides where two levels do for all models, else by tables of
    offsets."""
    if not any(labelled for _, _, labelled in row):
        found = [strided(tensor, dims) for tensor, dims, _ in row]
        if all(source is not None for source in found):
            inner = min(source.inner for source in found if source is not None)
            cut = [strided(tensor, dims, inner) for tensor, dims, _ in row]
            if all(source is not None for source in cut):
                return [source for source in cut if source is not None]
    return [_tabled(*table) for table in row]


def _offsets(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Offsets of all indices of some dims, row-major, int64."""
    found = torch.zeros(1, dtype=torch.int64)
    for d in dims:
        found = (found[:, None] + torch.arange(tensor.shape[d]) * tensor.stride(d)).flatten()
    return found


def _tabled(tensor: Tensor, dims: tuple[int, ...], labelled: list[Labelled]) -> Source:
    """A tensor with some axes in merged coordinates: the members of each column, plain columns varying slowest."""
    used = {*dims, *(d for axes in labelled for d in axes[0])}
    members = _offsets(tensor, tuple(d for d in range(tensor.dim()) if d not in used))
    columns, factor = torch.arange(len(members)), torch.ones(len(members), dtype=torch.float64)
    for axes, labels, size, scale in labelled:
        steps = _offsets(tensor, axes)
        members = (members[:, None] + steps).flatten()
        columns = (columns[:, None] * size + labels).flatten()
        times = torch.ones(size, dtype=torch.float64) if scale is None else scale
        factor = (factor[:, None] * times).flatten()
    member_at = torch.zeros(len(factor) + 1, dtype=torch.int64)
    counts = columns.bincount(minlength=len(factor))
    torch.cumsum(counts, 0, out=member_at[1:])
    members = members[columns.argsort(stable=True)]
    unit_at = _offsets(tensor, dims)
    moved = [x.to(tensor.device) for x in (unit_at, member_at, members, factor.float())]
    tables = moved[0], moved[1], moved[2], moved[3], max(1, int(counts.max()))
    return Source(tensor, len(unit_at), 1, len(factor), 0, 0, 0, tables)
