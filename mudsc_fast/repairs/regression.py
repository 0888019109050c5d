"""Ridge regression of what a layer misses on what it reads, of any widths: only <X'X> and <R X'> are ever made.

Products of samples are taken in float32 and added up in float64, those of the inputs in the covariance kernels. The
matrix of the inputs is factorised in place, in float64, and what layers that read the same tensor need of it is kept.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from mudsc_fast.moments import Moments
from mudsc_fast.repairs.lockstep import Layer

# Entries of <R X'> that are made at once: 256 MiB in float64, and half of it beside them.
PRODUCTS = 2**25
_SAMPLES = 512  # multiplied in float32 before they are added up


def matrix_bytes(shape: Sequence[int]) -> int:
    """Most memory that the regression of a layer with a weight of this shape takes, beside its activations."""
    width = math.prod(shape[1:])
    # Sums of the upper half and the whole matrix; products in float64 and in float32.
    return 12 * width * width + 12 * min(shape[0] * width, max(PRODUCTS, width))


class Inputs:
    """What a layer reads: its moments while they are added up, then the factor of their matrix.

    width: inputs. constant: whether a constant is solved for too, so that only deviations from the mean count.
    samples: how many there will be, if known. Where they are at most half as many as the inputs, they are kept
    themselves and X (X'X)^-1 = (XX')^-1 X, with the ridge in both, makes the smaller matrix do.
    """

    def __init__(self, width: int, constant: bool, device: torch.device, samples: int | None = None) -> None:
        self.width, self.constant, self.ready = width, constant, False
        self.few = samples is not None and 2 * samples <= width
        self._moments = None if self.few else Moments(width, device)
        self._kept: list[Tensor] = []
        self._factor: Tensor | None = None
        self._mean = torch.zeros(0)
        self._read: tuple[weakref.ref[Tensor], ...] = ()
        self._about: tuple[object, ...] = ()

    def add(self, x: Tensor) -> None:
        """x: (samples, width)."""
        if self._moments is not None:
            self._moments.update(x)
        elif not self.ready:
            self._kept.append(x.to(_multiplied(x), copy=True))

    def factorise(self, ridge: float) -> None:
        """All samples are in. ridge: share of the mean variance that is added to the diagonal."""
        if self.ready:
            return
        self.ready = True
        if self._moments is None:
            gram, self._mean = self._between_samples()
        else:
            gram, self._mean = self._moments.lower(self.constant), self._moments.mean
            self._moments = None
        diagonal = gram.diagonal()
        level = float(diagonal.sum()) / self.width
        # A layer whose inputs are all constant has nothing to regress on; its mean can still be set.
        if level > 0:
            diagonal += ridge * level + 1e-12 * max(level, 1e-30)
            failed = torch.empty(0, dtype=torch.int32, device=gram.device)
            torch.linalg.cholesky_ex(gram, out=(gram, failed))
            if int(failed):
                raise ValueError(
                    f"ridge: {ridge:g} is too small for a layer of {self.width} inputs on so few samples; "
                    "give a larger one, such as 0.01, or more batches"
                )
            self._factor = gram

    def _between_samples(self) -> tuple[Tensor, Tensor]:
        """Lower triangle of XX' over the number of samples, and the mean of X; only X less its mean is kept."""
        rows = torch.cat(self._kept)
        mean = rows.mean(0, dtype=torch.float64)
        if self.constant:
            rows -= mean.to(rows.dtype)
        self._kept = [rows]
        moments = Moments(len(rows), rows.device)
        moments.update(rows, 0)
        return moments.lower(centred=False).mul_(self.width / len(rows)), mean

    def solve(self, products: Products) -> tuple[Tensor, Tensor]:
        """(outputs, width) and (outputs,) float64: weights and constants. Takes the products' memory."""
        slope, mean = products.finish(self._mean)
        if self._factor is None:
            slope = torch.zeros(len(mean), self.width, dtype=torch.float64, device=mean.device)
        else:
            columns = slope.T
            torch.linalg.solve_triangular(self._factor, columns, upper=False, out=columns)
            torch.linalg.solve_triangular(self._factor.T, columns, upper=True, out=columns)
            if self.few:
                slope = (slope.to(self._kept[0].dtype) @ self._kept[0]).double()
        return slope, mean - slope @ self._mean if self.constant else torch.zeros_like(mean)

    def remember(self, layer: Layer, about: tuple[object, ...]) -> None:
        """Note whose inputs these are; about: what else they depend on."""
        self._read = tuple(weakref.ref(call.x) for call in layer.calls)
        self._about = (*about, layer.token, layer.alone, *(call.x._version for call in layer.calls))

    def fit(self, layer: Layer, about: tuple[object, ...]) -> bool:
        """Whether the layer reads the very tensors that these are of."""
        wanted = (*about, layer.token, layer.alone, *(call.x._version for call in layer.calls))
        if self._about != wanted or layer.calls[0].kernel or len(self._read) != len(layer.calls):
            return False
        return all(ref() is call.x for ref, call in zip(self._read, layer.calls, strict=True))


class Products:
    """<R X'> of some outputs' R and all inputs X, over samples that come in pieces; of `few` samples R itself.

    outputs: how many. inputs: X's. With a constant both are taken about their means in the first piece.
    """

    def __init__(self, outputs: int, inputs: Inputs, device: torch.device) -> None:
        self._constant, self._few = inputs.constant, inputs.few
        width = 0 if self._few else inputs.width
        self._sums = torch.zeros(outputs, width, dtype=torch.float64, device=device)
        self._product = torch.empty(0, dtype=torch.bfloat16, device=device)  # made with the samples' dtype
        self._rows: list[Tensor] = []
        self._count = 0
        self._shift_x, self._shift_r = (torch.zeros(n, dtype=torch.float64, device=device) for n in (width, outputs))
        self._total_r = torch.zeros_like(self._shift_r)

    def add(self, x: Tensor, r: Tensor) -> None:
        """x: (samples, width), r: (samples, outputs); any floating dtype."""
        self._count += len(x)
        if self._few:
            self._rows.append(r.to(_multiplied(r), copy=True))
            return
        dtype = _multiplied(x, r)
        if self._constant and self._count == len(x):
            self._shift_x, self._shift_r = (z.mean(0, dtype=torch.float64).to(dtype).double() for z in (x, r))
        near, far = self._shift_x.to(dtype), self._shift_r.to(dtype)
        for first in range(0, len(x), _SAMPLES):
            a, b = (z[first : first + _SAMPLES].to(dtype) for z in (x, r))
            if self._constant:
                a, b = a - near, b - far
            if self._product.dtype != dtype:
                self._product = torch.empty_like(self._sums, dtype=dtype)
            self._sums += torch.mm(b.T, a, out=self._product)
            self._total_r += b.sum(0, dtype=torch.float64)

    def finish(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Covariances, or mean products without a constant (or R' over the samples), and R's mean; mean: of X."""
        count = max(self._count, 1)
        if self._few:
            rows = torch.cat(self._rows).double()
            self._rows.clear()
            average = rows.mean(0)
            if self._constant:
                rows -= average
            return (rows / count).T.contiguous(), average
        self._product = self._product.new_empty(0)
        self._sums /= count
        average = self._total_r / count
        if self._constant:
            self._sums.addr_(average, mean - self._shift_x, alpha=-1)
        return self._sums, average + self._shift_r


def _multiplied(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
