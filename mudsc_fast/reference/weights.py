"""Tensors in merged coordinates, and a space's tensors as rows of weights (docs/method.md rules 2 and 9)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from .axes import Group, Labels, as_tuple, groups_of, move, ravel, targets
from .regroup import regroup

StateDict = Mapping[str, Tensor]


def regroup_dims(x: Tensor, group: Group, where: Tensor, sizes: tuple[int, ...], scale: Tensor | None = None) -> Tensor:
    """Regroup the dims of a group, flattened, by where: (positions,), int64."""
    front = list(range(len(group.dims)))
    moved = x.movedim(group.dims, front)
    flat = regroup(moved.flatten(0, len(front) - 1), where, 0, prod(sizes), scale)
    return flat.reshape(*sizes, *moved.shape[len(front) :]).movedim(front, group.dims)


def members_of(where: Tensor, size: int) -> Tensor:
    """Count the members of every merged position; where: any shape, int64; (size,), float64."""
    return torch.bincount(where.reshape(-1), minlength=size).to(torch.float64)


def _share(members: Tensor, models: int) -> Tensor:
    """Return N / members: M*N is the mean over members, times the number of models."""
    return torch.where(members > 0, models / members.clamp(min=1.0), torch.zeros_like(members))


def row_matrices(spec: Any, space: Any, axis: Any, tensors: Sequence[Tensor], labels: Labels) -> list[Tensor]:
    """Return one tensor of a space, for every model, as the weights that touch each unit.

    Args:
        tensors: the axis's tensor, one a model.
        labels: of all spaces that are matched already, the space itself included.

    Returns:
        (width, k), float64, one a model. Every other axis of the tensor whose space has labels is in merged
        coordinates: by M*N where its role is "in", by U where it is "out".

    Source: docs/method.md rule 2.
    """
    models = len(tensors)
    groups = groups_of(spec, axis.tensor, tensors[0].shape)
    own_group = next(g for g in groups if as_tuple(axis.dim)[0] in g.dims)
    region, own = next((r, m) for r in own_group.regions for m in r.members if m.axis is axis and m.space is space)
    columns = [x.detach().to(torch.float64) for x in tensors]
    for group in groups:
        if group is own_group or not any(m.space.name in labels for r in group.regions for m in r.members):
            continue
        where, sizes = targets(group, labels, models)
        scale = _share(members_of(where, prod(sizes)), models) if group.role == "in" else None
        columns = [regroup_dims(x, group, where[m], sizes, scale) for m, x in enumerate(columns)]

    total = prod(region.factors)
    units = [*own.block, *own.inner]
    here = [
        torch.arange(total) // prod(region.factors[f + 1 :]) % region.factors[f] for f in range(len(region.factors))
    ]
    unit = ravel([here[f] for f in units], [region.factors[f] for f in units], total)
    # Other spaces on this very axis (GQA) move their own factors. The rows stay where they are, so where a tie shares
    # the block factor, the others move inside each block only.
    others = [m for m in region.members if m is not own and m.space.name in labels]
    moved = [move(region, others, labels, m) for m in range(models)]
    rest = [f for f in range(len(region.factors)) if f not in units]
    rest_sizes = [moved[0][1][f] for f in rest]
    column = [ravel([c[f] for f in rest], rest_sizes, total) for c, _ in moved]
    # A merged column is one of a merged block, so its members are counted with the block that its rows go to.
    key = [
        ravel(
            [*(c[f] for f in own.block), column[m]], [*(region.factors[f] for f in own.block), prod(rest_sizes)], total
        )
        for m, (c, _) in enumerate(moved)
    ]
    counts = members_of(torch.stack(key), int(torch.stack(key).max()) + 1) / prod(region.factors[f] for f in own.inner)
    result = []
    for m, x in enumerate(columns):
        front = list(range(len(own_group.dims)))
        flat = x.movedim(own_group.dims, front).flatten(0, len(front) - 1)[region.positions].reshape(total, -1)
        if others and own_group.role == "in":
            flat = flat * _share(counts, models)[key[m]].to(flat)[:, None]
        out = flat.new_zeros(space.width, prod(rest_sizes), flat.shape[1])
        out.index_put_((unit.to(flat.device), column[m].to(flat.device)), flat, accumulate=True)
        result.append(out.reshape(space.width, -1))
    return result


def merge_tensors(spec: Any, name: str, tensors: Sequence[Tensor], labels: Labels, shares: Sequence[float]) -> Tensor:
    """Return one merged tensor, in the first model's dtype.

    Each entry is the sum over models of share times the regrouped tensor, over the sum of share times the number of
    entries that met there along "out" axes: the weighted mean over members on "out" axes, over models elsewhere.

    Source: docs/method.md rule 9.
    """
    first = tensors[0]
    if not first.is_floating_point():
        return first.detach().clone()
    groups = groups_of(spec, name, first.shape)
    maps = [(group, *targets(group, labels, len(tensors))) for group in groups]
    sums: Tensor | None = None
    weight: Tensor | None = None
    for m, share in enumerate(shares):
        x = tensors[m].detach().to(first.device, torch.float64)
        members = torch.ones([1] * x.ndim, dtype=torch.float64, device=first.device)
        for group, where, sizes in maps:
            x = regroup_dims(x, group, where[m], sizes)
            if group.role == "out":
                shape = [1] * x.ndim
                for d, size in zip(group.dims, sizes, strict=True):
                    shape[d] = size
                members = members * members_of(where[m], prod(sizes)).to(first.device).reshape(shape)
        sums = share * x if sums is None else sums + share * x
        weight = share * members if weight is None else weight + share * members
    if sums is None or weight is None:
        raise ValueError("shares: expected one a model, got none")
    # An entry without members: two "out" axes whose merged units never meet in one model, or all shares 0.
    return torch.where(weight > 0, sums / weight, torch.zeros_like(sums)).to(first.dtype)
