"""Similarities that are never whole in memory: some of their rows, whenever they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mudsc_fast import backends
from mudsc_fast.regrouping import regroup
from mudsc_fast.similarity import Entry, Table, checked_tables

# Columns that are centred and multiplied at a time: (width, _DEPTH) is the largest temporary beside the tile itself.
_DEPTH = 512
# A unit whose deviation is at most this share of its root mean square is dead: it correlates with nothing.
_DEAD = 1e-7


class Tiles(Protocol):
    """Rows of a (width, width) similarity, made on demand; a row that is asked for twice should be the same."""

    width: int

    def tile(self, rows: Tensor) -> Tensor:
        """Return (len(rows), width), float32 or float64, CPU or CUDA, rows contiguous; rows: (r,), int64, CPU."""
        ...


class MatrixTiles:
    """The rows of a matrix that is there: for tests, or for one that is mapped from a file."""

    def __init__(self, matrix: Tensor) -> None:
        if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
            raise TypeError("matrix: expected a floating tensor")
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"matrix: expected a square matrix, got shape {tuple(matrix.shape)}")
        self.width = matrix.shape[0]
        self._matrix = matrix.detach()

    def tile(self, rows: Tensor) -> Tensor:
        """The rows asked for, (len(rows), width); a view where they follow each other."""
        first, last = int(rows[0]), int(rows[-1])
        part = self._matrix[first : last + 1] if last - first + 1 == len(rows) else self._matrix[rows]
        part = part if part.dtype in (torch.float32, torch.float64) else part.float()
        return part if part.stride(-1) == 1 else part.contiguous()


class SimilarityTiles:
    """The similarity of two models' units, as ``dual_similarity`` gives it whole, from what it is made of.

    Args:
        terms: for each tensor of the space a pair of entries, model 0's and model 1's: (width, k) matrices or ``Term``.
            Nothing is copied, except tensors whose labels do more than reorder one of their dims: those are regrouped
            once.
        features: a pair of (samples, width) activations, paired by sample, or None. Their covariance would be as large
            as the similarity, so they are kept as they are; any floating dtype, mapped from files if need be.
        balance: share of the weights, 0..1, where both are given.
        backend: "auto" or a name of ``mudsc_fast.backends`` that serves "similarity".

    Memory: beside the tile, two float32 blocks of (width, 512) and one more tile where both terms and features count.
    CUDA tensors where Triton runs: bfloat16 planes of the inputs, at most 1 GiB, and two more tiles; nothing is copied.

    Raises:
        TypeError, ValueError: as ``dual_similarity``; features that disagree in shape or device, or with the terms'.

    Source: docs/method.md rules 2 and 3.
    """

    def __init__(
        self,
        terms: Sequence[Sequence[Entry]] = (),
        features: Sequence[Tensor] | None = None,
        balance: float = 0.5,
        backend: str = "auto",
    ) -> None:
        if not 0.0 <= balance <= 1.0:
            raise ValueError(f"balance: expected a number in 0..1, got {balance}")
        self._parts: list[tuple[float, _Rows]] = []
        self.width = 0
        use_weights = bool(terms) and (features is None or balance > 0.0)
        use_features = features is not None and (not terms or balance < 1.0)
        if not use_weights and not use_features:
            raise ValueError("terms: expected at least one tensor where no features are given, got none")
        if use_weights:
            tables, self.width, _ = checked_tables(terms)
            if len(tables[0]) != 2:
                raise ValueError(f"terms: expected one entry for each of 2 models, got {len(tables[0])}")
            made = _correlation(tables, self.width, "terms", backend)
            self._parts.append((balance if use_features else 1.0, made))
        if use_features and features is not None:
            device = tables[0][0][0].device if use_weights else None
            pair = _checked_features(features, self.width, device)
            self.width = pair[0].shape[1]
            made = _correlation([[(x, (1,), []) for x in pair]], self.width, "features", backend)
            self._parts.append((1.0 - balance if use_weights else 1.0, made))

    def tile(self, rows: Tensor) -> Tensor:
        """The rows asked for, (len(rows), width), float32."""
        (share, part), *others = self._parts
        out = part.rows(rows)
        if others:
            out.mul_(share)
            for other_share, other in others:
                out.add_(other.rows(rows), alpha=other_share)
        return out


def _correlation(tables: list[list[Table]], width: int, name: str, backend: str) -> _Rows:
    """Rows of a correlation over all columns of some tables, by the backend that serves "similarity" there."""
    device = tables[0][0][0].device
    chosen = backends.pick("similarity", device, backend)
    if chosen.name != "triton" or any(table[0].dtype == torch.float64 for row in tables for table in row):
        return _Correlation([_pair(first, second) for first, second in tables], name)
    made: _Rows = chosen.module.Similarities(tables, width, 2, 1.0, None, device, name)
    return made


def _checked_features(features: Sequence[Tensor], width: int, device: torch.device | None) -> tuple[Tensor, Tensor]:
    if isinstance(features, Tensor) or len(features) != 2 or not all(isinstance(x, Tensor) for x in features):
        raise TypeError("features: expected a pair of (samples, width) tensors")
    first, second = features
    if first.dim() != 2 or first.shape != second.shape or not first.is_floating_point():
        raise ValueError(
            f"features: expected two floating tensors of one shape (samples, width), got {tuple(first.shape)} and "
            f"{tuple(second.shape)}"
        )
    if width and first.shape[1] != width:
        raise ValueError(f"features: expected {width} units as the terms have, got {first.shape[1]}")
    if first.numel() == 0:
        raise ValueError("features: expected at least one sample and one unit, got none")
    for m, x in enumerate((first, second)):
        if x.device != (device or first.device):
            raise ValueError(f"features[{m}]: expected a tensor on {device or first.device}, got one on {x.device}")
    return first.detach(), second.detach()


@dataclass(frozen=True)
class _Matrix:
    """One model's tensor as (width, groups, rest); the columns are its groups in an order, each with its rest."""

    tensor: Tensor
    order: Tensor | None

    @property
    def columns(self) -> int:
        return self.tensor.shape[1] * self.tensor.shape[2]

    @property
    def places(self) -> range:
        """Where blocks of about _DEPTH columns begin, in groups."""
        return range(0, self.tensor.shape[1], self._step)

    @property
    def _step(self) -> int:
        return max(1, _DEPTH // max(self.tensor.shape[2], 1))

    def block(self, at: int, rows: Tensor | None = None) -> Tensor:
        """(rows, columns of a block), of the tensor's type; a view where it can be one."""
        stop = at + self._step
        if self.order is None:
            found = self.tensor[:, at:stop] if rows is None else self.tensor[rows, at:stop]
        elif rows is None:
            found = self.tensor.index_select(1, self.order[at:stop])
        else:
            found = self.tensor[rows[:, None], self.order[at:stop]]
        return found.reshape(found.shape[0], -1)


def _pair(first: Table, second: Table) -> tuple[_Matrix, _Matrix]:
    """Both models' tensors in merged coordinates, their columns side by side."""
    reordered = _reordered(first), _reordered(second)
    if reordered[0] is not None and reordered[1] is not None:
        return reordered[0], reordered[1]
    return _Matrix(_matrix(first)[:, :, None], None), _Matrix(_matrix(second)[:, :, None], None)


def _reordered(table: Table) -> _Matrix | None:
    """The tensor as it is, where its labels only put the positions of one dim in another order."""
    tensor, rows, labelled = table
    if len(labelled) != 1:
        return None
    dims, labels, size, scale = labelled[0]
    if size != len(labels) or (scale is not None and not bool((scale == 1).all())):
        return None
    order = torch.argsort(labels)
    if not torch.equal(labels[order], torch.arange(size)):
        return None
    rest = [d for d in range(tensor.dim()) if d not in rows and d not in dims]
    moved = tensor.permute(*rows, *dims, *rest)
    sizes = (_size(tensor, rows), _size(tensor, dims), _size(tensor, rest))
    if sizes[2] > _DEPTH:
        return None
    try:
        return _Matrix(moved.view(sizes), order.to(tensor.device))
    except RuntimeError:  # these dims do not lie one behind the other
        return None


def _matrix(table: Table) -> Tensor:
    """(width, columns) of one model's tensor, in merged coordinates where it has labels; a view if it can be one."""
    tensor, rows, labelled = table
    grouped = [d for dims, *_ in labelled for d in dims]
    rest = [d for d in range(tensor.dim()) if d not in rows and d not in grouped]
    sizes = [_size(tensor, rows), *(_size(tensor, dims) for dims, *_ in labelled), _size(tensor, rest)]
    moved = tensor.permute(*rows, *grouped, *rest).reshape(sizes)
    for dim, (_, labels, size, scale) in enumerate(labelled, start=1):
        moved = regroup(moved, labels, dim, size, scale)
    return moved.reshape(moved.shape[0], -1)


def _size(tensor: Tensor, dims: Sequence[int]) -> int:
    size = 1
    for d in dims:
        size *= tensor.shape[d]
    return size


class _Rows(Protocol):
    """Some rows of a (width, width) similarity, float32."""

    def rows(self, wanted: Tensor) -> Tensor: ...


class _Correlation:
    """Rows of the correlation of two models' units over all columns of some pairs of matrices."""

    def __init__(self, pairs: Sequence[tuple[_Matrix, _Matrix]], name: str) -> None:
        self._pairs = pairs
        self._moments = [_moments([pair[m] for pair in pairs], name) for m in range(2)]

    def rows(self, rows: Tensor) -> Tensor:
        (mean, inverse), (other_mean, other_inverse) = self._moments
        rows = rows.to(mean.device)
        mean, inverse = mean[rows, None], inverse[rows, None]
        out = mean.new_zeros(len(rows), len(other_mean))
        for first, second in self._pairs:
            for at in first.places:
                mine = first.block(at, rows).float().sub_(mean).mul_(inverse)
                theirs = second.block(at).to(torch.float32, copy=True)
                theirs.sub_(other_mean[:, None]).mul_(other_inverse[:, None])
                out.addmm_(mine, theirs.T)
        return out.clamp_(-1.0, 1.0)


def _moments(matrices: Sequence[_Matrix], name: str) -> tuple[Tensor, Tensor]:
    """Mean of every unit and one over the norm of what is left without it, float32; 0 for dead units."""
    count = sum(x.columns for x in matrices)
    total = sum(_chunked(matrices, lambda x: x.sum(dim=1)), matrices[0].tensor.new_zeros(()).double())
    mean = total / count
    squares = sum(_chunked(matrices, lambda x: (x - mean[:, None]).square_().sum(dim=1)), mean.new_zeros(()))
    if not bool(torch.isfinite(squares).all()):
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")
    variance = squares / count
    dead = variance <= _DEAD**2 * (variance + mean.square())
    return mean.float(), torch.where(dead, 0.0, squares.rsqrt()).float()


def _chunked(matrices: Sequence[_Matrix], reduced: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    for x in matrices:
        for at in x.places:
            yield reduced(x.block(at).double())
