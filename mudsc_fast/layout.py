"""Where the axes of a spec lie on a tensor: groups of dims, pieces of groups, and their common factors.

A tensor's dims fall into *groups* (one dim, or several that one Axis flattens). A group falls into *pieces*: the
positions that the same spaces touch (the whole axis; one pick of a fused qkv; one part of a concatenation). The views
of all axes on a piece are refined to one common factorisation, on which labels act factor by factor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mudsc_fast.spaces import Axis, Space, Tap

Entry = tuple["Space", "Axis"]


class Stretches(NamedTuple):
    """Positions start + r * period + [0, length) for r < runs, in this order."""

    start: int
    runs: int
    period: int
    length: int

    def positions(self) -> Tensor:
        """(runs * length,) int64."""
        run = torch.arange(self.runs) * self.period + self.start
        return (run[:, None] + torch.arange(self.length)).reshape(-1)


class Member(NamedTuple):
    """One axis of one space on a piece: the common factors that hold its blocks and, in unit order, its units."""

    space: Space
    axis: Axis
    block: tuple[int, ...]
    inner: tuple[int, ...]


class Piece(NamedTuple):
    """Positions of a group that the same spaces touch, row-major over `factors`."""

    where: Stretches
    factors: tuple[int, ...]
    members: tuple[Member, ...]


class Group(NamedTuple):
    """Dims of one tensor that are regrouped together, flattened in this order."""

    dims: tuple[int, ...]
    sizes: tuple[int, ...]
    role: str
    pieces: tuple[Piece, ...]


def dims_of(axis: Axis | Tap) -> tuple[int, ...]:
    """The dims of an axis as a tuple."""
    return (axis.dim,) if isinstance(axis.dim, int) else axis.dim


def factors_at(axis: Axis | Tap) -> tuple[int, ...]:
    """The factors that the units index, as a tuple (block factor first)."""
    if axis.at is None:
        return (0,)
    return (axis.at,) if isinstance(axis.at, int) else axis.at


def _split_view(view: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, ...]] | None:
    """The factors of each dim, or None if the view does not respect the dims."""
    if len(view) == len(sizes):
        return [(v,) for v in view] if list(view) == list(sizes) else None
    split, rest = [], list(view)
    for i, size in enumerate(sizes):
        taken: list[int] = []
        last = i == len(sizes) - 1
        while rest and (last or prod(taken) < size):
            taken.append(rest.pop(0))
        if prod(taken) != size:
            return None
        split.append(tuple(taken) or (1,))
    return split if len([f for part in split for f in part]) == len(view) else None


class _Placed(NamedTuple):
    """An axis on its group, with the blocks split off: its stretches, its own view and the factors it indexes."""

    space: Space
    axis: Axis
    where: Stretches
    view: tuple[int, ...]
    block: int | None
    inner: tuple[int, ...]


def _place(name: str, space: Space, axis: Axis, dims: tuple[int, ...], sizes: tuple[int, ...]) -> _Placed:
    own, total, start, before = dims_of(axis), prod(sizes), 0, 0
    own_sizes = [sizes[dims.index(d)] for d in own]
    label = f"{name} dim {axis.dim} (space {space.name!r})"
    if axis.part is not None:
        start, length = axis.part
        if start + length > own_sizes[0]:
            raise ValueError(f"{label}: part {axis.part} goes past the size {own_sizes[0]}")
        if len(dims) > 1:
            raise ValueError(f"{label}: a part cannot be taken of a dim that another axis flattens with others")
        total, own_sizes = length, [length]
    own_view = axis.view or (tuple(own_sizes) if len(own) == 1 else (space.width,))
    split = _split_view(own_view, own_sizes)
    if split is None:
        raise ValueError(f"{label}: view {own_view} does not factor the sizes {tuple(own_sizes)}")
    view: list[int] = []
    shift: list[int] = []  # place of each of the axis's own factors in the group's view
    for d, size in zip(dims, sizes, strict=True):
        if d in own:
            factors = split[own.index(d)]
            shift += range(len(view), len(view) + len(factors))
            view += factors
        else:
            view.append(size)
    at = [shift[f] for f in factors_at(axis)]
    where = Stretches(start, 1, total, total)
    if axis.pick is not None:
        factor, index = shift[axis.pick[0]], axis.pick[1]
        before, after = prod(view[:factor]), prod(view[factor + 1 :])
        period = view[factor] * after
        where = Stretches(start + index * after, before, period, after)
        if before == 1:
            where = Stretches(where.start, 1, after, after)
        del view[factor]
        at = [f - (f > factor) for f in at]
    if len(at) > 1 and view[at[0]] == space.blocks:
        return _Placed(space, axis, where, tuple(view), at[0], tuple(at[1:]))
    if space.blocks == 1:
        return _Placed(space, axis, where, tuple(view), None, tuple(at))
    if len(at) > 1:
        raise ValueError(
            f"{label}: the first factor in at={axis.at} has size {view[at[0]]}, expected the space's "
            f"{space.blocks} blocks"
        )
    factor = at[0]
    view[factor : factor + 1] = [space.blocks, view[factor] // space.blocks]
    return _Placed(space, axis, where, tuple(view), factor, (factor + 1,))


def _refine(name: str, placed: Sequence[_Placed]) -> Piece:
    """One factorisation that refines the views of all axes on a piece."""
    total = prod(placed[0].view)
    cuts = sorted({prod(p.view[i:]) for p in placed for i in range(len(p.view) + 1)}, reverse=True)
    for big, small in pairwise(cuts):
        if big % small:
            views = " and ".join(str(v) for v in dict.fromkeys(p.view for p in placed))
            raise ValueError(f"{name}: the views {views} of one axis do not fit together")
    factors = tuple(big // small for big, small in pairwise(cuts)) or (total,)

    def span(view: tuple[int, ...], factor: int) -> tuple[int, ...]:
        if view[factor] == 1:
            return ()
        return tuple(range(cuts.index(prod(view[factor:])), cuts.index(prod(view[factor + 1 :]))))

    members = []
    for p in placed:
        block = () if p.block is None else span(p.view, p.block)
        inner = tuple(f for at in p.inner for f in span(p.view, at))
        members.append(Member(p.space, p.axis, block, inner))
    _check_cover(name, members)
    return Piece(placed[0].where, factors, tuple(members))


def _check_cover(name: str, members: Sequence[Member]) -> None:
    for i, a in enumerate(members):
        covered = {*a.block, *a.inner}
        for b in members[:i]:
            shared = covered & {*b.block, *b.inner}
            if a.space.name == b.space.name:
                twice = bool(shared) or not covered  # a width of 1 covers no factor at all
            else:
                tied = a.space.tie is not None and a.space.tie == b.space.tie
                twice = bool(shared) and not (tied and a.block == b.block and shared == {*a.block})
            if twice:
                raise ValueError(
                    f"{name} dim {a.axis.dim}: a factor is covered twice, by space {b.space.name!r} and by "
                    f"space {a.space.name!r}"
                )


def groups(name: str, entries: Sequence[Entry], sizes: Mapping[int, int]) -> list[Group]:
    """The groups of dims that a spec touches on the tensor `name`.

    entries: the (space, axis) pairs of this tensor; sizes: the size of each dim they name. ValueError if their views
    do not fit together or a factor is covered twice.
    """
    sets: list[set[int]] = []
    for _, axis in entries:
        touching = [s for s in sets if s & set(dims_of(axis))]
        sets = [s for s in sets if s not in touching] + [set(dims_of(axis)).union(*touching)]
    found = []
    for dims in sorted(tuple(sorted(s)) for s in sets):
        own = [(s, a) for s, a in entries if dims_of(a)[0] in dims]
        roles = {a.role for _, a in own}
        if len(roles) > 1:
            raise ValueError(f"{name} dim {own[0][1].dim}: has role 'out' in one axis and 'in' in another")
        shape = tuple(sizes[d] for d in dims)
        placed: dict[Stretches, list[_Placed]] = {}
        for space, axis in own:
            p = _place(name, space, axis, dims, shape)
            placed.setdefault(p.where, []).append(p)
        pieces = tuple(_refine(name, ps) for ps in placed.values())
        if len(pieces) > 1:
            _check_disjoint(name, pieces, prod(shape))
        found.append(Group(dims, shape, roles.pop(), pieces))
    return found


def _check_disjoint(name: str, pieces: Sequence[Piece], total: int) -> None:
    owner = torch.full((total,), -1)
    for i, piece in enumerate(pieces):
        where = piece.where.positions()
        other = int(owner[where].max())
        if other >= 0:
            a, b = pieces[other].members[0], piece.members[0]
            raise ValueError(
                f"{name} dim {b.axis.dim}: the positions of space {b.space.name!r} are covered twice, in part by "
                f"space {a.space.name!r}"
            )
        owner[where] = i


def split_dim(tensor: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """A view whose dim is split into the sizes, row-major; works for any strides."""
    split: Tensor = torch.unflatten(tensor, dim, tuple(sizes))
    return split


def rows(tensor: Tensor, axis: Axis | Tap) -> tuple[Tensor, tuple[int, ...]]:
    """A view of the tensor (or activation) in which the units are whole dims, and these dims in unit order.

    Flattening the dims in the order given makes the unit index; all other dims are features or samples. No copy.
    ValueError if the view does not fit the tensor.
    """
    own = tuple(d % tensor.dim() if -tensor.dim() <= d < tensor.dim() else -1 for d in dims_of(axis))
    if -1 in own:
        raise ValueError(f"dim {axis.dim} of an axis does not exist in a tensor of shape {tuple(tensor.shape)}")
    if axis.part is not None:
        start, length = axis.part
        if start + length > tensor.shape[own[0]]:
            raise ValueError(f"part {axis.part} of an axis goes past the size {tensor.shape[own[0]]}")
        tensor = tensor.narrow(own[0], start, length)
    sizes = [tensor.shape[d] for d in own]
    split = _split_view(axis.view or sizes, sizes)
    if split is None:
        raise ValueError(f"view {axis.view} of an axis does not factor the sizes {tuple(sizes)}")
    place: list[int] = []
    for k, d in enumerate(own):
        shift = sum(len(f) - 1 for f in split[:k])
        tensor = split_dim(tensor, d + shift, split[k])
        place += range(d + shift, d + shift + len(split[k]))
    at = [place[f] for f in factors_at(axis)]
    if axis.pick is not None:
        picked = place[axis.pick[0]]
        tensor = tensor.select(picked, axis.pick[1])
        at = [d - (d > picked) for d in at]
    return tensor, tuple(at)
