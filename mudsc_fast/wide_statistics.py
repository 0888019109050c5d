"""Statistics of a space that do not fit in memory: recorded some rows at a time, and read some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mudsc_fast.backends.cpu_covariance import unit_positions
from mudsc_fast.backends.torch_device import DEAD
from mudsc_fast.covariance import Covariance
from mudsc_fast.tiles import Tiles

# Products that are read at once.
PRODUCT_BYTES = 1 << 24
# Above, sums of squares have overflowed: in float32, in float64.
_LARGEST = (1e38, 1e300)


class Band:
    """Some rows of a "cross" covariance: the products of a few units of model 0 with all units of the other models.

    It is a `Covariance` of more models with fewer units: the rows, and the other models' units in pieces as high as
    they are, of which the last one overlaps the one before. Each product is added up as in the whole covariance.

    width, models: of the space. first, height: which units of model 0. device, backend: as in `Covariance`.
    """

    def __init__(
        self, width: int, models: int, first: int, height: int, device: torch.device | str, backend: str = "auto"
    ) -> None:
        self.width, self.models, self.first, self.height = width, models, first, height
        self._starts = [min(at, width - height) for at in range(0, width, height)]
        self._sums = Covariance(height, 1 + (models - 1) * len(self._starts), "cross", device, backend)

    def update(self, features: Sequence[Tensor], dim: int) -> None:
        """Add a batch, checked as `Covariance.update` does."""
        pieces = [x.narrow(dim, at, self.height) for x in features[1:] for at in self._starts]
        self._sums.update([features[0].narrow(dim, self.first, self.height), *pieces], dim)

    def all_reduce(self, group: Any = None) -> None:
        """Pool the samples of all processes."""
        self._sums.all_reduce(group)

    def vectors(self) -> Tensor:
        """(4, models, width): shift, scale, sums and sums of squares; of model 0 only this band's units count."""
        state = self._sums.state_dict(copy=False)
        positions = unit_positions(self.height, self._sums.models, True, max(state["block"], 1))
        found = state["vectors"].cpu()[:, positions]
        vectors = torch.zeros(4, self.models, self.width, dtype=torch.float64)
        vectors[:, 0, self.first : self.first + self.height] = found[:, 0]
        for m in range(1, self.models):
            for k, at in enumerate(self._starts):
                vectors[:, m, at : at + self.height] = found[:, 1 + (m - 1) * len(self._starts) + k]
        return vectors

    def rebase(self, vectors: Tensor) -> None:
        """Express the products about the shift and scale that the other models' units have in `vectors`."""
        sums = self._sums._sums
        sums.flush()
        base = sums.vectors[:2].clone()
        positions = sums.positions.to(base.device)
        for m in range(1, self.models):
            for k, at in enumerate(self._starts):
                place = positions[1 + (m - 1) * len(self._starts) + k]
                base[:, place] = vectors[:2, m, at : at + self.height].to(base.device)
        sums.rebase(base[0], base[1])

    def rows(self, skip: int) -> Iterator[tuple[int, Tensor]]:
        """(first row, products (some rows, (models - 1) * width) float64) of the rows from `skip` on."""
        sums = Sums.of(self._sums)
        step = max(sums.block, 1)
        order = torch.cat([torch.arange(at, at + self.height) for at in self._starts])
        for first in range(skip, self.height, step):
            products = sums.products(first, min(first + step, self.height)).reshape(-1, self.models - 1, len(order))
            made = torch.empty(len(products), self.models - 1, self.width, dtype=torch.float64)
            made[:, :, order] = products.double().cpu()  # what overlaps is the same twice
            yield self.first + first, made.reshape(len(products), -1)

    @property
    def plain(self) -> dict[str, int]:
        """The integers that the statistics of the whole space have beside their tensors."""
        state = {"width": self.width, "models": self.models, "cross": 1, "block": 0, "count": self._sums.count}
        return {**state, "wide": int(self._sums._sums.dtype == torch.float64)}


def bands(width: int, height: int) -> list[tuple[int, int]]:
    """(first, skip) of the bands of `height` rows that cover `width`: the last one skips what it has in common."""
    firsts = range(0, width, height)
    return [(min(at, width - height), max(0, at - (width - height))) for at in firsts]


@dataclass(frozen=True)
class Sums:
    """A covariance whose products are read when they are asked for.

    width, models, cross, block, count, wide, vectors: as in `Covariance.state_dict`. read: (start, stop) along the
    first dim of its gram.
    """

    width: int
    models: int
    cross: bool
    block: int
    count: int
    wide: bool
    vectors: Tensor
    read: Callable[[int, int], Tensor]

    @classmethod
    def of(cls, covariance: Covariance) -> Sums:
        """Of one that is in memory."""
        sums = covariance._sums
        sums.flush()
        cross, wide = covariance.scope == "cross", sums.dtype == torch.float64
        given = (covariance.width, covariance.models, cross, sums.block, covariance.count, wide)
        return cls(*given, sums.vectors, lambda start, stop: sums.gram[start:stop])

    def products(self, first: int, stop: int) -> Tensor:
        """(stop - first, (models - 1) * width): sums of the products of these units of model 0 with all others'."""
        columns = (self.models - 1) * self.width
        if self.block == 0:
            found = self.read(first, stop)
            return found if self.cross else found[:, self.width :]
        size, units = self.block, columns if self.cross else self.models * self.width
        across, panels = -(-units // size), range(first // size, -(-stop // size))

        def starts(i: int) -> int:  # the blocks of the rows of panels before i
            return i * across if self.cross else i * across - i * (i - 1) // 2

        blocks = self.read(starts(panels.start), starts(panels.stop))
        made = blocks.new_empty(len(panels) * size, columns)
        for k, i in enumerate(panels):
            band = blocks[starts(i) - starts(panels.start) : starts(i + 1) - starts(panels.start)]
            left = 0 if self.cross else self.width - i * size
            made[k * size : (k + 1) * size] = band.transpose(0, 1).reshape(size, -1)[:, left : left + columns]
        return made[first - panels.start * size : stop - panels.start * size]


def sums_of(statistics: Mapping[str, Covariance], name: str) -> Sums:
    """A space's sums: from a file some rows at a time, where the statistics are in one, or as they are in memory."""
    stored: Callable[[str], Sums] | None = getattr(statistics, "sums", None)
    return Sums.of(statistics[name]) if stored is None else stored(name)


class StatisticsTiles:
    """Rows of the correlation of model 0's units with those of one other model, from sums that stay where they are.

    sums: with at least one sample. model: the other one. piece: bytes of products that are read at once.
    ValueError for sums that have overflowed.
    """

    def __init__(self, sums: Sums, model: int, piece: int = PRODUCT_BYTES) -> None:
        self.width, self._sums = sums.width, sums
        self._columns = slice((model - 1) * sums.width, model * sums.width)
        self._step = max(1, piece // (8 * sums.models * sums.width))
        if sums.block:
            self._step = max(sums.block, self._step // sums.block * sums.block)
        positions = unit_positions(sums.width, sums.models, sums.cross, max(sums.block, 1))
        shift, scale, total, squares = sums.vectors.double().cpu()[:, positions[[0, model]]]
        if not bool((squares <= _LARGEST[sums.wide]).all()):
            raise ValueError(
                "features: expected magnitudes whose squares float32 can sum, got larger ones; use float64"
            )
        self._mean = total / sums.count
        variance = squares / sums.count - self._mean.square()
        square = torch.maximum(variance + (shift * scale + self._mean).square(), self._mean.square())
        self._inverse = torch.where(variance > DEAD**2 * square, variance.rsqrt(), 0.0)

    def tile(self, rows: Tensor) -> Tensor:
        """The rows asked for, (len(rows), width), float32, or float64 if an activation was."""
        made = torch.empty(len(rows), self.width, dtype=torch.float64 if self._sums.wide else torch.float32)
        for at, first, stop in self._runs(rows.tolist()):
            band = self._sums.products(first, stop)[:, self._columns].double().cpu() / self._sums.count
            band.addr_(self._mean[0, first:stop], self._mean[1], alpha=-1.0)
            band.mul_(self._inverse[0, first:stop, None]).mul_(self._inverse[1])
            made[at : at + stop - first] = band.clamp_(-1.0, 1.0)
        return made

    def _runs(self, rows: list[int]) -> Iterator[tuple[int, int, int]]:
        """(place, first, stop) of runs of rows that follow one another, each within one piece."""
        start = 0
        for k in range(1, len(rows) + 1):
            if k == len(rows) or rows[k] != rows[k - 1] + 1 or rows[k] % self._step == 0:
                yield start, rows[start], rows[k - 1] + 1
                start = k


class BlendedTiles:
    """`share` of one similarity and the rest of another, row by row."""

    def __init__(self, first: Tiles, second: Tiles, share: float) -> None:
        self.width, self._first, self._second, self._share = first.width, first, second, share

    def tile(self, rows: Tensor) -> Tensor:
        """The rows asked for, (len(rows), width)."""
        made, other = self._first.tile(rows), self._second.tile(rows)
        made = made.to(torch.promote_types(made.dtype, other.dtype))
        return made.mul_(self._share).add_(other.to(made.device), alpha=1.0 - self._share)
