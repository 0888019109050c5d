"""Mean and covariance matrix of one set of variables, streamed through the covariance kernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mudsc_fast import backends
from mudsc_fast.covariance import Covariance


class Moments:
    """Mean and population covariance of `width` variables over all samples given; nothing else is kept.

    width: variables. device: where the samples are. Samples are multiplied in float32 about a shift near their mean and
    added up in float64, as in `Covariance`, of which this is the case of one model.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu", backend: str = "auto") -> None:
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ValueError(f"width: expected an integer of at least 1, got {width!r}")
        self.width, self.device = width, torch.device(device)
        chosen = backends.pick("covariance", self.device, backend)
        self._sums = chosen.module.covariance(width, 1, False, self.device)

    def update(self, samples: Tensor, dim: int = -1) -> None:
        """Add samples: any floating dtype and strides, `width` entries along `dim`, all other dims are samples."""
        if samples.shape[dim] != self.width:
            raise ValueError(f"samples: expected {self.width} along dim {dim}, got shape {tuple(samples.shape)}")
        if samples.numel():
            if samples.dtype == torch.float64:
                self._sums.widen()
            self._sums.update([samples.detach()], dim % samples.dim())

    @property
    def count(self) -> int:
        """Samples seen."""
        return int(self._sums.count)

    @property
    def mean(self) -> Tensor:
        """(width,) float64."""
        shift, scale, total, _ = self._sums.vectors[:, self._sums.positions[0].to(self.device)]
        mean: Tensor = shift + total / (scale * max(self.count, 1))
        return mean

    def covariance(self) -> Tensor:
        """(width, width) float64, population covariance, exactly symmetric. ValueError without samples."""
        return self.lower(mirrored=True)

    def lower(self, centred: bool = True, mirrored: bool = False) -> Tensor:
        """(width, width) float64: the covariance in its lower triangle, zeros or, `mirrored`, the same above it.

        centred: False for the mean products of the variables as they are. Columns lie together in memory, as LAPACK has
        it, and nothing of this size is made beside it. ValueError without samples.
        """
        if self.count == 0:
            raise ValueError("covariance: expected at least one sample, got none; call update first")
        self._sums.flush()
        offset = None if centred else self.mean
        sums = self._sums
        return _dense(sums.gram, sums.vectors, self.width, sums.block, self.count, offset, mirrored).T


def joint_covariance(statistics: Covariance) -> tuple[Tensor, Tensor]:
    """Mean (models * width,) and covariance (models * width, models * width) of all models' units, float64.

    statistics: of scope "full"; ValueError for "cross" and without samples.
    """
    if statistics.scope != "full":
        raise ValueError('statistics: expected scope "full", got "cross"; calibrate with scope="full"')
    mean = statistics.mean.reshape(-1).double()
    state = statistics.state_dict()
    units, block = statistics.width * statistics.models, state["block"]
    return mean, _dense(state["gram"], state["vectors"], units, block, statistics.count, None, True)


def _dense(
    gram: Tensor, vectors: Tensor, units: int, block: int, count: int, mean: Tensor | None, mirrored: bool
) -> Tensor:
    """(units, units) float64, rows together: covariances, plus the products of `mean`, above the diagonal or all."""
    vectors = vectors[:, :units]
    result = torch.zeros(units, units, dtype=torch.float64, device=gram.device)
    for first, sums in _bands(gram, units, block):
        last = first + len(sums)
        totals = vectors[2] / count
        band = sums.double() / count - torch.outer(totals[first:last], totals[first:])
        band /= torch.outer(vectors[1, first:last], vectors[1, first:])
        if mean is not None:
            band += torch.outer(mean[first:last], mean[first:])
        square = band[:, : len(sums)]
        square.copy_(square.triu() + square.triu(1).T if mirrored else square.triu())
        result[first:last, first:] = band
        if mirrored:
            result[last:, first:last] = band[:, len(sums) :].T
    return result


def _bands(gram: Tensor, units: int, block: int) -> Iterator[tuple[int, Tensor]]:
    """(first row, sums of some rows from that column on) of accumulators in blocks, or of a dense matrix (block 0)."""
    size, at = block or 512, 0
    for first in range(0, units, size):
        rows = min(size, units - first)
        if not block:
            yield first, gram[first : first + rows, first:units]
            continue
        blocks = -(-(units - first) // size)
        band = gram[at : at + blocks].permute(1, 0, 2).reshape(size, -1)
        at += blocks
        yield first, band[:rows, : units - first]
