"""Accumulators of a covariance in plain torch, for devices that have no kernels of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from mudsc_fast.backends.cpu_covariance import similarity_shape

DRIFT = 1.0  # largest |mean - shift| / deviation kept; rounding errors grow with 1 + its square
DEAD = 1e-7


def covariance(width: int, models: int, cross: bool, device: torch.device) -> TorchCovariance:
    """Make empty accumulators."""
    return TorchCovariance(width, models, cross, device)


class TorchCovariance:
    """The accumulators of ``CpuCovariance`` with dense products: (units, units), or model 0 x the others."""

    block = 0

    def __init__(self, width: int, models: int, cross: bool, device: torch.device) -> None:
        self.width, self.models, self.cross, self.device = width, models, cross, device
        units = width * models
        self.positions = torch.arange(units).reshape(models, width)
        self._rows = slice(0, width if cross else units)
        self._columns = slice(width if cross else 0, units)
        shape = (width, units - width) if cross else (units, units)
        self.dtype = torch.float32
        self.gram = self._zeros(shape)
        self.vectors = torch.zeros(4, units, dtype=torch.float64, device=device)
        self.vectors[1] = 1.0
        self.count = 0

    def _zeros(self, shape: tuple[int, int]) -> Tensor:
        return torch.zeros(shape, device=self.device)

    def update(self, features: list[Tensor], dim: int) -> None:
        """Add one batch, checked by the caller."""
        columns = [x.movedim(dim, -1).reshape(-1, self.width).to(self.gram.dtype) for x in features]
        x = torch.cat(columns, dim=1).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        if self.count == 0:
            self.vectors[0] = x.mean(dim=0, dtype=torch.float64).to(x.dtype)
        y = (x - self.vectors[0].to(x.dtype)).mul_(self.vectors[1].to(x.dtype))
        self.vectors[2] += y.sum(dim=0, dtype=torch.float64)
        self.vectors[3] += y.double().square().sum(dim=0)
        self.gram.addmm_(y[:, self._rows].T, y[:, self._columns])
        self.count += len(y)
        self._recentre()

    def flush(self) -> None:
        """Nothing waits."""

    def widen(self) -> None:
        """Accumulate in float64 from now on."""
        self.dtype = torch.float64
        self.gram = self.gram.double()

    def merge(self, other: TorchCovariance) -> None:
        """Add another's samples; ``other`` is left at this one's shift."""
        other.rebase(self.vectors[0], self.vectors[1])
        self.gram += other.gram
        self.vectors[2:] += other.vectors[2:]
        self.count += other.count
        self._recentre()

    def rebase(self, shift: Tensor, scale: Tensor) -> None:
        """Express the accumulators about another shift and scale."""
        step, ratio, n = (shift - self.vectors[0]) * self.vectors[1], scale / self.vectors[1], self.count
        sums = self.vectors[2].clone()
        rows, columns, dtype = self._rows, self._columns, self.gram.dtype
        self.gram.addr_((n * step - sums)[rows].to(dtype), step[columns].to(dtype))
        self.gram.addr_(step[rows].to(dtype), sums[columns].to(dtype), alpha=-1)
        self.gram *= ratio[rows, None].to(dtype)
        self.gram *= ratio[columns].to(dtype)
        self.vectors[3] = (self.vectors[3] + step * (n * step - 2 * sums)) * ratio.square()
        self.vectors[2] = (sums - n * step) * ratio
        self.vectors[0], self.vectors[1] = shift.clone(), scale.clone()

    def _recentre(self) -> None:
        mean = self.vectors[2] / self.count
        variance = (self.vectors[3] / self.count - mean.square()).clamp_(min=0.0)
        moves = mean.square() > DRIFT**2 * variance
        if bool(moves.any()):
            target = (self.vectors[0] + mean / self.vectors[1]).to(self.gram.dtype).double()
            self.rebase(torch.where(moves, target, self.vectors[0]), self.vectors[1].clone())

    def load(self, gram: Tensor, vectors: Tensor, count: int, dtype: torch.dtype) -> None:
        """Take over copies of recorded accumulators."""
        self.dtype = dtype
        self.gram = gram.to(self.device, dtype, copy=True)
        self.vectors = vectors.to(self.device, torch.float64, copy=True)
        self.count = count

    def correlation(self, cross: bool) -> Tensor:
        """Correlations of the units: (models - 1, width, width) or all of them."""
        shift, scale, sums, squares = self.vectors
        mean = sums / self.count
        variance = squares / self.count - mean.square()
        square = torch.maximum(variance + (shift * scale + mean).square(), mean.square())
        inverse = torch.where(variance > DEAD**2 * square, variance.rsqrt(), 0.0)
        out = torch.empty(similarity_shape(self.width, self.models, cross), dtype=self.gram.dtype, device=self.device)
        flat = out if not cross else out.permute(1, 0, 2)
        rows = slice(0, self.width) if cross else self._rows
        columns = slice(self.width, None) if cross else self._columns
        products = self.gram if cross == self.cross else self.gram[rows, columns]
        for start in range(0, products.shape[0], 1024):  # float64 for a band of rows at a time
            stop = min(start + 1024, products.shape[0])
            band = products[start:stop].double() / self.count
            band -= mean[rows][start:stop, None] * mean[columns]
            band *= inverse[rows][start:stop, None] * inverse[columns]
            flat[start:stop] = band.clamp_(-1.0, 1.0).reshape(flat[start:stop].shape).to(out.dtype)
        if not cross:
            upper = out.triu(1)
            out = upper + upper.T
            out.fill_diagonal_(1.0)
        return out
