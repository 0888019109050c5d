"""Mean and covariance matrix of one set of variables, streamed through the covariance kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from mudsc_fast import backends
from mudsc_fast.covariance import Covariance, relayout


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
        if self.count == 0:
            raise ValueError("covariance: expected at least one sample, got none; call update first")
        self._sums.flush()
        return _dense(self._sums.gram, self._sums.vectors, self.width, 1, self._sums.block, self.count)


def joint_covariance(statistics: Covariance) -> tuple[Tensor, Tensor]:
    """Mean (models * width,) and covariance (models * width, models * width) of all models' units, float64.

    statistics: of scope "full"; ValueError for "cross" and without samples.
    """
    if statistics.scope != "full":
        raise ValueError('statistics: expected scope "full", got "cross"; calibrate with scope="full"')
    mean = statistics.mean.reshape(-1).double()
    state = statistics.state_dict()
    matrix = _dense(
        state["gram"], state["vectors"], statistics.width, statistics.models, state["block"], statistics.count
    )
    return mean, matrix


def _dense(gram: Tensor, vectors: Tensor, width: int, models: int, block: int, count: int) -> Tensor:
    if block:
        gram, vectors = relayout(gram, vectors, width, models, False, block, 0)
    totals = vectors[2] / count
    upper = gram.double() / count
    upper = (upper - torch.outer(totals, totals)) / torch.outer(vectors[1], vectors[1])
    # Of the blocks only those on and above the diagonal are summed.
    return upper.triu() + upper.triu(1).T
