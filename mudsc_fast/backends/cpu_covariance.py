"""Accumulators of a covariance on the CPU kernels. Python owns the memory; the kernels only borrow it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mudsc_fast import _core

PANEL: int = _core.gram_panel  # units side by side in the accumulators
DEPTH: int = _core.gram_depth  # samples of a unit that wait there to be multiplied


def unit_positions(width: int, models: int, cross: bool, panel: int) -> Tensor:
    """Where units lie in the vectors of the accumulators: (models, width), int64.

    "full" stacks all units; "cross" starts the units of models 1.. at a new panel.
    """
    positions = torch.arange(models * width).reshape(models, width)
    if cross:
        positions[1:] += -width % panel
    return positions


def _zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros in huge pages where the system gives them: the kernels go through them again and again."""
    made = torch.empty(*shape, dtype=dtype)
    _core.prefer_huge_pages(made.data_ptr(), made.nbytes)
    return made.zero_()


class CpuCovariance:
    """Products of units, in blocks of 48 x 48, and their float64 sums.

    gram: (blocks, 48, 48), float64: sums of y_i y_j with y = (x - shift) * scale by unit; "full": blocks on
        and above the diagonal; "cross": model 0 x the other models.
    vectors: (4, units rounded up), float64: shift, scale, sum of y, sum of y squared.
    """

    block = PANEL

    def __init__(self, width: int, models: int, cross: bool, device: torch.device) -> None:
        self.width, self.models, self.cross, self.device = width, models, cross, device
        panels, blocks = _core.covariance_sizes(width, models, cross)
        self.positions = unit_positions(width, models, cross, PANEL)
        self.dtype = torch.float32
        self.gram = _zeros(blocks, PANEL, PANEL, dtype=torch.float64)
        self.vectors = torch.zeros(4, panels * PANEL, dtype=torch.float64)
        self.vectors[1] = 1.0
        self._panels = torch.zeros(0)
        self._raw = torch.zeros(panels, dtype=torch.uint8)
        self._counts = torch.zeros(2, dtype=torch.int64)
        self._buffers: _core.CovarianceBuffers | None = None

    @property
    def count(self) -> int:
        """Samples seen."""
        return self._seen()[0]

    def _seen(self) -> tuple[int, int]:
        """Samples, and those of them that wait in the panels."""
        if self._buffers is not None:
            return self._buffers.counts()
        return int(self._counts[0]), int(self._counts[1])

    @property
    def buffers(self) -> _core.CovarianceBuffers:
        """The accumulators as the kernels see them."""
        if self._buffers is None:
            self._panels = _zeros(self.vectors.shape[1], DEPTH, dtype=self.dtype)
            self._buffers = _core.CovarianceBuffers(
                self.width,
                self.models,
                self.cross,
                self.gram,
                self._panels,
                self.vectors,
                self._raw,
                self._counts,
            )
        return self._buffers

    def update(self, features: list[Tensor], dim: int) -> None:
        """Add one batch, checked by the caller."""
        self.buffers.update(features, dim, torch.get_num_threads())

    def update_plain(self, features: Sequence[Tensor], dim: int) -> bool:
        """Check a batch as it came and add it, all in one step; False, with nothing added, if it is not a usual one."""
        return self.buffers.update_plain(features, dim, torch.get_num_threads())

    def flush(self) -> None:
        """Multiply the samples that wait in the panels."""
        if self._seen()[1]:
            self.buffers.flush(torch.get_num_threads())

    def widen(self) -> None:
        """Multiply in float64 from now on."""
        if self.dtype != torch.float64:
            self.flush()
            self.dtype = torch.float64
            self._buffers = None

    def merge(self, other: CpuCovariance) -> None:
        """Add another's samples; neither has any waiting, and both have one dtype."""
        self.buffers.merge(other.buffers, torch.get_num_threads())

    def rebase(self, shift: Tensor, scale: Tensor) -> None:
        """Express the accumulators about another shift and scale."""
        self.buffers.rebase(shift.contiguous(), scale.contiguous(), torch.get_num_threads())

    def load(self, gram: Tensor, vectors: Tensor, count: int, dtype: torch.dtype) -> None:
        """Take over copies of recorded accumulators."""
        self.dtype = dtype
        self.gram = gram.to("cpu", torch.float64, copy=True).contiguous()
        self.vectors = vectors.to("cpu", torch.float64, copy=True).contiguous()
        self._counts[0] = count
        self._buffers = None

    def correlation(self, cross: bool) -> Tensor:
        """Correlations of the units: (models - 1, width, width) or all of them."""
        self.flush()
        out = torch.empty(similarity_shape(self.width, self.models, cross), dtype=self.dtype)
        bad = _core.similarity([], self.width, self.models, cross, 0.0, self.buffers, out, torch.get_num_threads())
        if bad is not None:
            raise ValueError(
                "features: expected magnitudes whose squares float32 can sum, got larger ones; use float64"
            )
        return out


def similarity_shape(width: int, models: int, cross: bool) -> tuple[int, ...]:
    """Shape of a similarity of ``models`` times ``width`` units."""
    return (models - 1, width, width) if cross else (models * width, models * width)
