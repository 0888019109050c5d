"""Merged and aligned tensors, one name at a time (docs/method.md rule 9)."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mudsc_fast.axes import AxisMap, axis_labels
from mudsc_fast.leading import led
from mudsc_fast.network import Merging, merging_of
from mudsc_fast.regrouping import regroup
from mudsc_fast.weights import Weights, is_finite

if TYPE_CHECKING:
    from mudsc_fast.spec import PermutationSpec


def check_weights(weights: Sequence[float] | None, models: int) -> list[float]:
    """The share of every model, validated; all alike for None."""
    if weights is None:
        return [1.0] * models
    try:
        shares = [float(w) for w in weights]
    except (TypeError, ValueError):
        raise TypeError(f"weights: expected one number a model, got {weights!r}") from None
    if len(shares) != models:
        raise ValueError(f"weights: expected {models}, one a model, got {len(shares)}")
    if not all(math.isfinite(w) and w >= 0 for w in shares) or sum(shares) <= 0:
        raise ValueError(f"weights: expected finite numbers >= 0 that do not all vanish, got {shares}")
    return shares


class Piece(NamedTuple):
    """Some rows of a result: those of dim 0 from `start` on; `whole` says that there are no others."""

    name: str
    start: int
    tensor: Tensor
    whole: bool


def merge_tensors(
    spec: PermutationSpec,
    labels: Mapping[str, Tensor],
    widths: Mapping[str, int],
    state_dicts: Sequence[Mapping[str, Tensor]],
    shares: Sequence[float],
    only: Container[str] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """(name, merged tensor) in model 0's order, of all names or those in `only`.

    Arguments as checked by `MergePlan.merge_tensors`.
    """
    for piece in merge_pieces(spec, labels, widths, state_dicts, shares, None, only):
        yield piece.name, piece.tensor


def merge_pieces(
    spec: PermutationSpec,
    labels: Mapping[str, Tensor],
    widths: Mapping[str, int],
    state_dicts: Sequence[Mapping[str, Tensor]],
    shares: Sequence[float],
    limit: int | None = None,
    only: Container[str] | None = None,
    leaders: Mapping[str, Tensor] | None = None,
) -> Iterator[Piece]:
    """The same in pieces: tensors of more than `limit` bytes some rows at a time, where the spec allows it."""
    weights = Weights(state_dicts, spec, whole=True)
    ready = None
    if limit is None and only is None and not leaders:
        ready = merging_of(spec, labels, widths, weights.state_dicts, shares)
    yield from _pieces(spec, labels, widths, weights, shares, limit, only, leaders, ready)


def merge_all(
    spec: PermutationSpec,
    labels: Mapping[str, Tensor],
    widths: Mapping[str, int],
    state_dicts: Sequence[Mapping[str, Tensor]],
    shares: Sequence[float],
    leaders: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The same, all at once and whole."""
    weights = Weights(state_dicts, spec, whole=True)
    ready = None if leaders else merging_of(spec, labels, widths, weights.state_dicts, shares)
    made = (ready.take_all() if ready is not None else None) or {}
    if len(made) == len(weights.names):
        return made
    left = set(weights.names) - made.keys()
    pieces = _pieces(spec, labels, widths, weights, shares, None, left, leaders, None)
    made |= {piece.name: piece.tensor for piece in pieces}
    return {name: made[name] for name in weights.names}


def _pieces(
    spec: PermutationSpec,
    labels: Mapping[str, Tensor],
    widths: Mapping[str, int],
    weights: Weights,
    shares: Sequence[float],
    limit: int | None,
    only: Container[str] | None,
    leaders: Mapping[str, Tensor] | None,
    ready: Merging | None,
) -> Iterator[Piece]:
    for name in weights.names:
        if only is not None and name not in only:
            continue
        found = ready.take(name) if ready is not None and name in ready else None
        if found is not None:
            if not found[1]:
                _Reader(weights, name, None).require_finite()
            yield Piece(name, 0, found[0], True)
            continue
        shape, dtype = weights.info(0, name)
        for m in range(1, weights.models):
            weights.info(m, name)
        maps = axis_labels(spec, name, shape, labels, widths) if name in weights.in_spec else []
        maps = led(spec, name, shape, maps, leaders) if leaders else maps
        scale = _out_scale(maps, shares, len(shape))
        for start, rows, here in _slabs(maps, shape, dtype, limit):
            read = _Reader(weights, name, rows)
            if name in weights.in_spec:
                part = None if scale is None or rows is None else _rows_of(scale, start, rows.height)
                merged = _merge_one(read, here, shares, scale if rows is None else part)
            elif dtype.is_floating_point:
                merged = _average(read, shares)
            else:
                merged = read.raw(0).clone()
            yield Piece(name, start, merged, rows is None)


def expressed_tensors(
    spec: PermutationSpec,
    labels: Mapping[str, Tensor],
    widths: Mapping[str, int],
    state_dicts: Sequence[Mapping[str, Tensor]],
    name: str,
) -> list[Tensor]:
    """The tensor `name` of every model in merged coordinates, scaled such that their mean is the merged tensor."""
    weights = Weights(state_dicts, spec)
    maps = axis_labels(spec, name, weights.raw(0, name).shape, labels, widths)
    scale = _out_scale(maps, [1.0] * weights.models, weights.raw(0, name).ndim)
    result = []
    for m in range(weights.models):
        x = _working(weights.finite(m, name))
        for axis in maps:
            x = _regrouped(x, axis, axis.labels[m])
        result.append((x if scale is None else x * scale.to(x)).to(weights.raw(m, name).dtype))
    return result


def align_tensors(
    spec: PermutationSpec,
    labels: Mapping[str, Tensor],
    state_dict: Mapping[str, Tensor],
    only: Container[str] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """(name, aligned tensor) in the state dict's order, by one model's (width,) labels; all, or `only` these names."""
    for piece in align_pieces(spec, labels, state_dict, None, only):
        yield piece.name, piece.tensor


def align_pieces(
    spec: PermutationSpec,
    labels: Mapping[str, Tensor],
    state_dict: Mapping[str, Tensor],
    limit: int | None = None,
    only: Container[str] | None = None,
) -> Iterator[Piece]:
    """The same in pieces, as `merge_pieces`."""
    weights = Weights([state_dict], spec)
    for name in weights.names:
        if only is not None and name not in only:
            continue
        shape, dtype = weights.info(0, name)
        maps = axis_labels(spec, name, shape, labels) if name in weights.in_spec else []
        maps = [AxisMap(a.dims, a.labels[None], a.sizes, a.role) for a in maps]
        for start, rows, here in _slabs(maps, shape, dtype, limit):
            x = _Reader(weights, name, rows).raw(0)
            aligned = x
            for axis in here:
                aligned = _regrouped(aligned, axis, axis.of(0))
            yield Piece(name, start, aligned.clone() if aligned is x else aligned, rows is None)


def align_tensor(spec: PermutationSpec, labels: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """The tensor `name` of one model, aligned by its (width,) labels; `x` itself where they change nothing."""
    if name not in spec.entries:
        return x
    for axis in axis_labels(spec, name, x.shape, labels):
        x = _regrouped(x, axis, axis.labels)
    return x


def align_block(
    spec: PermutationSpec,
    labels: Mapping[str, Tensor],
    name: str,
    shape: Sequence[int],
    block: Sequence[tuple[int, int]],
    rows: Callable[[Tensor], Tensor],
) -> Tensor:
    """A part of the tensor `name` of one model, aligned by its (width,) labels, without reading all of the tensor.

    shape: of the tensor. block: the range of each of its dims that the part has. rows: gives rows of dim 0 (int64).
    """
    maps = axis_labels(spec, name, shape, labels) if name in spec.entries else []
    # Dims that a map flattens go together; dim 0 comes first, since it says which rows are read.
    groups = [axis.dims for axis in maps]
    groups += [(d,) for d in range(len(shape)) if not any(d in axis.dims for axis in maps)]
    x: Tensor | None = None
    for dims in sorted(groups, key=lambda dims: 0 not in dims):
        sizes = [shape[d] for d in dims]
        places = torch.arange(math.prod(sizes))
        moved = next((axis.labels for axis in maps if axis.dims == dims), None)
        if moved is not None:
            places = torch.argsort(moved)
        places = places.reshape(sizes)[tuple(slice(*block[d]) for d in dims)].flatten()
        if x is None:
            # Only the rows that the block is made of are read, and counted among themselves.
            at = list(torch.unravel_index(places, sizes))
            wanted, at[dims.index(0)] = torch.unique(at[dims.index(0)], return_inverse=True)
            x = rows(wanted)
            sizes[dims.index(0)] = len(wanted)
            places = torch.zeros_like(places)
            for size, coordinate in zip(sizes, at, strict=True):
                places = places * size + coordinate
        front = tuple(range(len(dims)))
        flat = x.movedim(dims, front).flatten(0, len(dims) - 1)[places]
        x = flat.reshape(*[block[d][1] - block[d][0] for d in dims], *flat.shape[1:]).movedim(front, dims)
    return rows(torch.arange(0)) if x is None else x


class _Rows(NamedTuple):
    """Some merged rows, how many, and what each model reads for them."""

    height: int
    read: Sequence[slice | Tensor]


class _SlabMap(NamedTuple):
    """The axis map of dim 0 for some merged rows: each model's rows have labels of their own."""

    dims: tuple[int, ...]
    each: Sequence[Tensor]
    sizes: tuple[int, ...]

    @property
    def size(self) -> int:
        return self.sizes[0]

    def of(self, m: int) -> Tensor:
        return self.each[m]


_Map = AxisMap | _SlabMap


def _slabs(
    maps: Sequence[AxisMap], shape: Sequence[int], dtype: torch.dtype, limit: int | None
) -> Iterator[tuple[int, _Rows | None, list[_Map]]]:
    """(first merged row, rows or None for all, maps to use) of each slab of a tensor."""
    models = max((axis.labels.shape[0] for axis in maps), default=0)
    first = next((axis for axis in maps if 0 in axis.dims), None)
    size = math.prod(shape) * dtype.itemsize
    count = shape[0] if first is None and shape else 1 if first is None or len(first.dims) > 1 else first.size
    step = max(1, count * limit // size) if limit is not None and size > 0 else count
    if step >= count:
        yield 0, None, list(maps)
        return
    orders = [] if first is None else [torch.argsort(row, stable=True) for row in first.labels]
    ends = [] if first is None else [torch.bincount(row, minlength=count).cumsum(0) for row in first.labels]
    others: list[_Map] = [axis for axis in maps if axis is not first]
    for start in range(0, count, step):
        stop = min(start + step, count)
        if first is None:
            # Models that no map counts read the same rows.
            yield start, _Rows(stop - start, [slice(start, stop)] * max(models, 1)), others
            continue
        read: list[slice | Tensor] = []
        for order, end in zip(orders, ends, strict=True):
            read.append(order[int(end[start - 1]) if start else 0 : int(end[stop - 1])].sort().values)
        each = [row[r] - start for row, r in zip(first.labels, read, strict=True)]
        yield start, _Rows(stop - start, read), [_SlabMap((0,), each, (stop - start,)), *others]


class _Reader:
    """One tensor of every model, or some rows of it."""

    def __init__(self, weights: Weights, name: str, rows: _Rows | None) -> None:
        self.weights, self.name, self.rows, self.models = weights, name, rows, weights.models
        self.dtype = weights.info(0, name)[1]

    def raw(self, m: int) -> Tensor:
        if self.rows is None:
            return self.weights.raw(m, self.name)
        read = self.rows.read
        return self.weights.rows(m, self.name, read[m] if m < len(read) else read[0])

    def floating(self, m: int) -> Tensor:
        if self.rows is None:
            return self.weights.floating(m, self.name)
        x = self.raw(m)
        self.weights.require_floating(x, m, self.name)
        return x

    def require_finite(self) -> None:
        for m in range(self.models):
            self.weights.require_finite(self.floating(m), m, self.name)


def _rows_of(scale: Tensor, start: int, count: int) -> Tensor:
    """The rows of a factor that may have one row for all."""
    return scale if scale.dim() == 0 or scale.shape[0] == 1 else scale[start : start + count]


def _regrouped(x: Tensor, axis: _Map, labels: Tensor) -> Tensor:
    """`x` with one group of dims in merged coordinates; `x` itself where the labels change nothing."""
    if axis.size == labels.numel() and torch.equal(labels, torch.arange(axis.size)):
        return x
    labels = labels.to(x.device)
    if len(axis.dims) == 1:
        nowhere = int(bool((labels == axis.size).any()))
        return regroup(x, labels, axis.dims[0], axis.size + nowhere).narrow(axis.dims[0], 0, axis.size)
    first, count = axis.dims[0], len(axis.dims)
    places = tuple(range(first, first + count))
    flat = x.movedim(axis.dims, places).flatten(first, first + count - 1)
    merged = regroup(flat, labels, first, axis.size)
    return merged.reshape(*flat.shape[:first], *axis.sizes, *flat.shape[first + 1 :]).movedim(places, axis.dims)


def _merge_one(read: _Reader, maps: Sequence[_Map], shares: Sequence[float], scale: Tensor | None) -> Tensor:
    def expressed(m: int) -> Tensor:
        x = _working(read.floating(m))
        for axis in maps:
            x = _regrouped(x, axis, axis.of(m))
        return x

    device = None if shares[0] > 0 else read.floating(0).device
    merged = _mean(expressed, shares, device)
    if scale is not None:
        merged *= scale.to(merged)
    if not is_finite(merged):
        read.require_finite()
    return merged.to(read.dtype)


def _average(read: _Reader, shares: Sequence[float]) -> Tensor:
    first = read.raw(0)
    # Masks hold -inf, and a mean by differences would make NaN of it.
    if all(torch.equal(first, read.floating(m).to(first)) for m in range(1, read.models)):
        return first.clone()
    dtype, device = first.dtype, first.device
    del first
    return _mean(lambda m: _working(read.floating(m)), shares, device).to(dtype)


def _working(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _mean(tensor_of: Callable[[int], Tensor], shares: Sequence[float], device: torch.device | None) -> Tensor:
    """The mean of the models' tensors by share, in memory of its own; device None: where the first of them is.

    By differences (`lerp`), so that equal tensors give back their own bits whatever the shares.
    """
    mean: Tensor | None = None
    total = 0.0
    for m, share in enumerate(shares):
        if share == 0:
            continue
        x = tensor_of(m)
        device = x.device if device is None else device
        x = x.to(device)
        total += share
        mean = x.clone() if mean is None else mean.lerp_(x.to(mean.dtype), share / total)
    if mean is None:
        raise ValueError("weights: all vanish")
    return mean


def _out_scale(maps: Sequence[AxisMap], shares: Sequence[float], ndim: int) -> Tensor | None:
    """float64, broadcastable to the merged tensor: sum of shares over the shares of the members of each entry.

    None where it is 1 everywhere. An entry whose members all have share 0 gets 0: no in axis reads it.
    """
    outs = [axis for axis in maps if axis.role == "out"]
    if not outs:
        return None
    members = torch.zeros((), dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for m, share in enumerate(shares):
        count = torch.ones((), dtype=torch.float64)
        for axis in outs:
            # Two out axes of one tensor: an entry has as many members as the product says.
            shape = [1] * ndim
            for dim, size in zip(axis.dims, axis.sizes, strict=True):
                shape[dim] = size
            found = torch.bincount(axis.labels[m], minlength=axis.size)[: axis.size]
            count = count * found.to(torch.float64).reshape(shape)
        # `total` is summed like `members`: one member in every model gives a scale of exactly 1.
        members = members + share * count
        total = total + share
    if bool((members == total).all()):
        return None
    return torch.where(members > 0, total / members, torch.zeros_like(members))
