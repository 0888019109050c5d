"""Merged and aligned tensors, one name at a time (docs/method.md rule 9)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mudsc_fast.axes import AxisMap, axis_labels
from mudsc_fast.regrouping import regroup
from mudsc_fast.weights import Weights, is_finite

if TYPE_CHECKING:
    from mudsc_fast.spec import PermutationSpec


def check_weights(weights: Sequence[float] | None, models: int) -> list[float]:
    """The share of every model, validated; all alike for None."""
    if weights is None:
        return [1.0] * models
    shares = [float(w) for w in weights]
    if len(shares) != models:
        raise ValueError(f"weights: expected {models}, one a model, got {len(shares)}")
    if not all(math.isfinite(w) and w >= 0 for w in shares) or sum(shares) <= 0:
        raise ValueError(f"weights: expected finite numbers >= 0 that do not all vanish, got {shares}")
    return shares


def merge_tensors(
    spec: PermutationSpec,
    labels: Mapping[str, Tensor],
    widths: Mapping[str, int],
    state_dicts: Sequence[Mapping[str, Tensor]],
    shares: Sequence[float],
) -> Iterator[tuple[str, Tensor]]:
    """(name, merged tensor) in model 0's order; arguments as checked by `MergePlan.merge_tensors`."""
    weights = Weights(state_dicts, spec, whole=True)
    for name in weights.names:
        first = weights.raw(0, name)
        if name in weights.in_spec:
            maps = axis_labels(spec, name, first.shape, labels, widths)
            yield name, _merge_one(weights, name, maps, shares)
        elif first.is_floating_point():
            yield name, _average(weights, name, shares)
        else:
            yield name, first.clone()


def align_tensors(
    spec: PermutationSpec, labels: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """(name, aligned tensor) in the state dict's order, by one model's (width,) labels."""
    weights = Weights([state_dict], spec)
    for name in weights.names:
        x = weights.raw(0, name)
        aligned = align_tensor(spec, labels, name, x)
        yield name, aligned.clone() if aligned is x else aligned


def align_tensor(spec: PermutationSpec, labels: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """The tensor `name` of one model, aligned by its (width,) labels; `x` itself where they change nothing."""
    if name not in spec.entries:
        return x
    for axis in axis_labels(spec, name, x.shape, labels):
        x = _regrouped(x, axis, axis.labels)
    return x


def _regrouped(x: Tensor, axis: AxisMap, labels: Tensor) -> Tensor:
    """`x` with one group of dims in merged coordinates; `x` itself where the labels change nothing."""
    if axis.size == labels.numel() and torch.equal(labels, torch.arange(axis.size)):
        return x
    labels = labels.to(x.device)
    if len(axis.dims) == 1:
        return regroup(x, labels, axis.dims[0], axis.size)
    first, count = axis.dims[0], len(axis.dims)
    places = tuple(range(first, first + count))
    flat = x.movedim(axis.dims, places).flatten(first, first + count - 1)
    merged = regroup(flat, labels, first, axis.size)
    return merged.reshape(*flat.shape[:first], *axis.sizes, *flat.shape[first + 1 :]).movedim(places, axis.dims)


def _merge_one(weights: Weights, name: str, maps: Sequence[AxisMap], shares: Sequence[float]) -> Tensor:
    def expressed(m: int) -> Tensor:
        x = _working(weights.floating(m, name))
        for axis in maps:
            x = _regrouped(x, axis, axis.labels[m])
        return x

    first = weights.floating(0, name)
    merged = _mean(expressed, shares, first.device)
    scale = _out_scale(maps, shares, merged.ndim)
    if scale is not None:
        merged *= scale.to(merged)
    if not is_finite(merged):
        for m in range(weights.models):
            weights.finite(m, name)
    return merged.to(first.dtype)


def _average(weights: Weights, name: str, shares: Sequence[float]) -> Tensor:
    first = weights.raw(0, name)
    others = [weights.floating(m, name) for m in range(1, weights.models)]
    # Masks hold -inf, and a mean by differences would make NaN of it.
    if all(torch.equal(first, x.to(first)) for x in others):
        return first.clone()
    return _mean(lambda m: _working(weights.floating(m, name)), shares, first.device).to(first.dtype)


def _working(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _mean(tensor_of: Callable[[int], Tensor], shares: Sequence[float], device: torch.device) -> Tensor:
    """The mean of the models' tensors by share, in memory of its own.

    By differences (`lerp`), so that equal tensors give back their own bits whatever the shares.
    """
    mean: Tensor | None = None
    total = 0.0
    for m, share in enumerate(shares):
        if share == 0:
            continue
        x = tensor_of(m).to(device)
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
    members = torch.zeros((), dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for m, share in enumerate(shares):
        count = torch.ones((), dtype=torch.float64)
        for axis in outs:
            # Two out axes of one tensor: an entry has as many members as the product says.
            shape = [1] * ndim
            for dim, size in zip(axis.dims, axis.sizes, strict=True):
                shape[dim] = size
            count = count * torch.bincount(axis.labels[m], minlength=axis.size).to(torch.float64).reshape(shape)
        # `total` is summed like `members`: one member in every model gives a scale of exactly 1.
        members = members + share * count
        total = total + share
    if bool((members == total).all()):
        return None
    return torch.where(members > 0, total / members, torch.zeros_like(members))
