"""Where each position of a tensor goes when its spaces are regrouped: the spec algebra as plain index arithmetic.

The dims of a tensor fall into *groups*: one dim, or several that an axis flattens. The positions of a group that the
same axes touch form a *region* (the whole dim, one pick of a fused qkv, one part of a concatenation). A region is
split into the smallest *factors* that all views on it agree on; labels then move coordinates factor by factor.
Specs are read by attributes alone: spec.spaces, and those of Space, Axis and Tap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor

Labels = Mapping[str, Tensor]  # {space: (models, width), int64}


@dataclass(frozen=True)
class Member:
    """One axis of one space on a region: the factors of its blocks, and those of its units inside a block."""

    space: Any
    axis: Any
    block: tuple[int, ...]
    inner: tuple[int, ...]


@dataclass(frozen=True)
class Region:
    """Positions (row-major over factors) inside a group, in `runs` contiguous runs of equal length."""

    positions: Tensor
    runs: int
    factors: tuple[int, ...]
    members: tuple[Member, ...]


@dataclass(frozen=True)
class Group:
    """Dims of one tensor that are regrouped as one flattened dim; role "out" or "in"."""

    dims: tuple[int, ...]
    sizes: tuple[int, ...]
    role: str
    regions: tuple[Region, ...]


def as_tuple(value: Any, default: tuple[int, ...] = (0,)) -> tuple[int, ...]:
    """Read an int, a tuple or None as a tuple."""
    if value is None:
        return default
    return (value,) if isinstance(value, int) else tuple(value)


def split_view(view: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Deal the factors of a view out to the dims that they factor."""
    rest, dealt = list(view), []
    for size in sizes:
        mine: list[int] = []
        while rest and prod(mine) < size:
            mine.append(rest.pop(0))
        dealt.append(mine or [1])
    dealt[-1] += rest
    if [prod(mine) for mine in dealt] != list(sizes):
        raise ValueError(f"view {tuple(view)} does not factor the sizes {tuple(sizes)}")
    return dealt


def tap_units(activation: Tensor, tap: Any, width: int) -> Tensor:
    """Return the units of a tap as (samples, width); factors that the tap does not index are samples."""
    x = activation.movedim(tap.dim, -1)
    part = getattr(tap, "part", None)
    if part is not None:
        x = x.narrow(-1, *part)
    view, at = tap.view or (x.shape[-1],), list(as_tuple(tap.at))
    if prod(view) != x.shape[-1]:
        raise ValueError(f"tap {tap.module!r}: view {tuple(view)} does not factor the size {x.shape[-1]}")
    lead = x.ndim - 1
    x = x.reshape(*x.shape[:-1], *view)
    if tap.pick is not None:
        x = x.select(lead + tap.pick[0], tap.pick[1])
        at = [f - (f > tap.pick[0]) for f in at]
    x = x.movedim([lead + f for f in at], list(range(-len(at), 0)))
    if prod(x.shape[x.ndim - len(at) :]) != width:
        raise ValueError(f"tap {tap.module!r}: expected {width} units, got shape {tuple(activation.shape)}")
    return x.reshape(-1, width)


def _place(space: Any, axis: Any, dims: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[Tensor, int, list[int], Any]:
    """Return an axis's positions in its group, their runs, their view, and (block factor or None, inner factors)."""
    own = as_tuple(axis.dim)
    own_sizes = [sizes[dims.index(d)] for d in own]
    part = getattr(axis, "part", None)
    grid = torch.arange(prod(sizes)).reshape(sizes)
    if part is not None:
        grid = grid.narrow(dims.index(own[0]), *part)
        own_sizes = [part[1]]
    dealt = split_view(axis.view or own_sizes, own_sizes)
    view: list[int] = []
    place: list[int] = []  # of the axis's own factors in the group's view
    for d, size in zip(dims, grid.shape, strict=True):
        factors = dealt[own.index(d)] if d in own else [size]
        place += range(len(view), len(view) + len(factors)) if d in own else ()
        view += factors
    grid = grid.reshape(view)
    at, runs = [place[f] for f in as_tuple(axis.at)], 1
    if axis.pick is not None:
        picked = place[axis.pick[0]]
        grid = grid.select(picked, axis.pick[1])
        runs = prod(view[:picked])
        del view[picked]
        at = [f - (f > picked) for f in at]
    if prod(view[f] for f in at) != space.width:
        raise ValueError(f"expected {space.width} units, got {prod(view[f] for f in at)}")
    if space.blocks == 1:
        return grid.reshape(-1), runs, view, (None, at)
    if len(at) == 1:
        view[at[0] : at[0] + 1] = [space.blocks, view[at[0]] // space.blocks]
        return grid.reshape(-1), runs, view, (at[0], [at[0] + 1])
    if view[at[0]] != space.blocks:
        raise ValueError(f"the first factor of at={axis.at} has size {view[at[0]]}, expected {space.blocks} blocks")
    return grid.reshape(-1), runs, view, (at[0], at[1:])


def _region(placed: Sequence[tuple[Any, Any, tuple[Tensor, int, list[int], Any]]]) -> Region:
    """Refine the views of the axes of one region to common factors."""
    positions, runs = placed[0][2][:2]
    views = [view for _, _, (_, _, view, _) in placed]
    # A view is the chain of the products of its last factors; the union of the chains is the finest common view.
    cuts = sorted({prod(view[f:]) for view in views for f in range(len(view) + 1)}, reverse=True)
    if any(big % small for big, small in pairwise(cuts)):
        raise ValueError(f"the views {views} of one axis do not fit together")

    def refined(view: list[int], factor: int) -> list[int]:
        return list(range(cuts.index(prod(view[factor:])), cuts.index(prod(view[factor + 1 :]))))

    members: list[Member] = []
    for space, axis, (_, _, view, (block, inner)) in placed:
        member = Member(
            space,
            axis,
            tuple(refined(view, block)) if block is not None else (),
            tuple(f for factor in inner for f in refined(view, factor)),
        )
        for other in members:
            _refuse_double(member, other)
        members.append(member)
    return Region(positions, runs, tuple(a // b for a, b in pairwise(cuts)) or (1,), tuple(members))


def _refuse_double(a: Member, b: Member) -> None:
    """Allow two axes on one region only if no factor moves twice; tied spaces may share their block factor."""
    mine, shared = {*a.block, *a.inner}, {*a.block, *a.inner} & {*b.block, *b.inner}
    tied = a.space.name != b.space.name and a.space.tie is not None and a.space.tie == b.space.tie
    if tied and a.block == b.block and shared == {*a.block}:
        return
    if shared or (a.space.name == b.space.name and not mine):
        raise ValueError(f"a factor is covered twice, by spaces {b.space.name!r} and {a.space.name!r}")


def groups_of(spec: Any, name: str, shape: Sequence[int]) -> list[Group]:
    """Return the groups that a spec touches on the tensor `name`.

    Raises:
        ValueError: naming the tensor, where shapes, views or blocks do not fit, or a factor is covered twice.
    """
    entries = [(space, axis) for space in spec.spaces for axis in space.axes if axis.tensor == name]
    sets: list[set[int]] = []
    for _, axis in entries:
        dims = set(as_tuple(axis.dim))
        if not all(0 <= d < len(shape) for d in dims):
            raise ValueError(f"{name}: the spec names dim {axis.dim}, but the shape is {tuple(shape)}")
        touching = [s for s in sets if s & dims]
        sets = [s for s in sets if s not in touching] + [dims.union(*touching)]
    result = []
    for dims in sets:
        order = tuple(sorted(dims))
        sizes = tuple(shape[d] for d in order)
        own = [(space, axis) for space, axis in entries if as_tuple(axis.dim)[0] in dims]
        try:
            found: dict[tuple[int, ...], list[Any]] = {}
            for space, axis in own:
                placed = _place(space, axis, order, sizes)
                found.setdefault(tuple(placed[0].tolist()), []).append((space, axis, placed))
            if len({axis.role for _, axis in own}) > 1:
                raise ValueError("has role 'out' in one axis and 'in' in another")
            every = [p for positions in found for p in positions]
            if len(set(every)) != len(every):
                raise ValueError("positions are covered twice, by axes that overlap in part")
            regions = tuple(_region(placed) for placed in found.values())
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{name} dim {order}, spaces {[space.name for space, _ in own]}: {error}") from error
        result.append(Group(order, sizes, own[0][1].role, regions))
    return result


def ravel(coordinates: Sequence[Tensor], sizes: Sequence[int], length: int) -> Tensor:
    """Turn coordinates, (length,) each, into row-major indices."""
    index = torch.zeros(length, dtype=torch.int64)
    for c, size in zip(coordinates, sizes, strict=True):
        index = index * size + c
    return index


def unravel(index: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Turn row-major indices into coordinates, one tensor a size."""
    result = []
    for k in range(len(sizes)):
        result.append(index // prod(sizes[k + 1 :]) % sizes[k])
    return result


def move(region: Region, members: Sequence[Member], labels: Labels, m: int) -> tuple[list[Tensor], list[int]]:
    """Return the merged coordinates of every position of a region in model m, and the merged factor sizes.

    Every member reads its unit from the coordinates as they were, so the order of members is free, and a block factor
    shared by tied spaces moves once.
    """
    total = prod(region.factors)
    old = unravel(torch.arange(total), region.factors)
    new, sizes = list(old), list(region.factors)
    blocks_moved: set[tuple[int, ...]] = set()
    for member in members:
        name, blocks = member.space.name, member.space.blocks
        every = [*member.block, *member.inner]
        unit = ravel([old[f] for f in every], [region.factors[f] for f in every], total)
        width = int(labels[name].max()) + 1
        if width % blocks:
            raise ValueError(f"labels of space {name!r}: {blocks} blocks do not divide the merged width {width}")
        n = width // blocks
        goes_to = labels[name][m].to("cpu")
        of_block = (goes_to // n).reshape(blocks, -1)
        if not bool((of_block == of_block[:, :1]).all()):
            raise ValueError(f"labels of space {name!r}: units of one block go to different blocks")
        merged = goes_to[unit]
        to_block = unravel(merged // n, [region.factors[f] for f in member.block])
        if member.block in blocks_moved and any(
            not torch.equal(new[f], c) for f, c in zip(member.block, to_block, strict=True)
        ):
            raise ValueError(f"labels of tied space {name!r}: its blocks move unlike the others of its tie")
        blocks_moved.add(member.block)
        inner = member.inner if total > 1 else tuple(range(len(region.factors)))  # one unit indexes no factor
        inner_sizes = [region.factors[f] for f in inner]
        if prod(inner_sizes) != n:
            if not inner or list(inner) != list(range(inner[0], inner[-1] + 1)):
                raise ValueError(f"space {name!r}: its units are spread over an axis, so its width cannot change")
            inner_sizes = [n] + [1] * (len(inner_sizes) - 1)
        to_inner = unravel(merged % n, inner_sizes)
        for f, c in zip(member.block, to_block, strict=True):
            new[f] = c
        for f, c, size in zip(inner, to_inner, inner_sizes, strict=True):
            new[f], sizes[f] = c, size
    return new, sizes


def targets(group: Group, labels: Labels, models: int) -> tuple[Tensor, tuple[int, ...]]:
    """Return where every position of a group goes.

    Args:
        labels: of the spaces that move; others stay where they are.

    Returns:
        (models, positions), int64, and the merged size of each dim of the group.
    """
    result = torch.arange(prod(group.sizes)).repeat(models, 1)
    local, merged = [], []
    for region in group.regions:
        moving = [member for member in region.members if member.space.name in labels]
        moved = [move(region, moving, labels, m) for m in range(models)]
        merged.append(moved[0][1])
        local.append(torch.stack([ravel(c, sizes, prod(region.factors)) for c, sizes in moved]))
    if all(tuple(sizes) == region.factors for region, sizes in zip(group.regions, merged, strict=True)):
        for region, where in zip(group.regions, local, strict=True):
            result[:, region.positions] = region.positions[where]
        return result, group.sizes
    if len(group.dims) > 1:
        if len(group.regions) > 1:
            raise ValueError(f"dims {group.dims}: picks of flattened dims cannot change their width")
        return local[0], _dim_sizes(group, merged[0])
    return _relaid(group, local, merged)


def _dim_sizes(group: Group, merged: Sequence[int]) -> tuple[int, ...]:
    """Deal merged factors out to the dims as the factors before were."""
    result, k = [], 0
    for size in group.sizes:
        old = new = 1
        while old < size:
            old, new, k = old * group.regions[0].factors[k], new * merged[k], k + 1
        result.append(new)
    return tuple(result)


def _relaid(group: Group, local: Sequence[Tensor], merged: Sequence[list[int]]) -> tuple[Tensor, tuple[int, ...]]:
    """Lay regions of changed size out anew: runs, and positions in no region, keep their order along the dim."""
    total = prod(group.sizes)
    length_at = dict.fromkeys(range(total), 1)  # merged length of the run that begins at a position
    for region, sizes in zip(group.regions, merged, strict=True):
        run = len(region.positions) // region.runs
        for p in region.positions.tolist():
            del length_at[p]
        for p in region.positions[::run].tolist():
            length_at[p] = prod(sizes) // region.runs
    begins, at = {}, 0
    for p in sorted(length_at):
        begins[p] = at
        at += length_at[p]
    result = torch.tensor([begins.get(p, 0) for p in range(total)]).repeat(local[0].shape[0], 1)
    for region, where, sizes in zip(group.regions, local, merged, strict=True):
        run = len(region.positions) // region.runs
        length = prod(sizes) // region.runs
        starts = torch.tensor([begins[p] for p in region.positions[::run].tolist()])
        result[:, region.positions] = starts[where // length] + where % length
    return result, (at,)
