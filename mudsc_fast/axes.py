"""Index arithmetic of the spec algebra: which merged position does each position of a tensor's axis go to?

Labels act factor by factor on the pieces that mudsc_fast.layout finds: tied spaces that share a block factor move it
once, then each space moves its own factors inside the block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mudsc_fast.layout import Group, Member, Piece, dims_of, rows, split_dim

if TYPE_CHECKING:
    from mudsc_fast.spaces import Axis, Space
    from mudsc_fast.spec import PermutationSpec

__all__ = ["AxisMap", "Columns", "axis_labels", "columns", "rows", "split_blocks", "spread", "take"]


@dataclass(frozen=True)
class AxisMap:
    """Where the positions of some dims of a tensor go.

    dims: the dims, flattened in this order (almost always one).
    labels: (positions,) or (models, positions) int64, the merged position of each position.
    sizes: the merged size of each dim; size: their product.
    role: "out" or "in".
    """

    dims: tuple[int, ...]
    labels: Tensor
    sizes: tuple[int, ...]
    role: str

    @property
    def size(self) -> int:
        """The number of merged positions."""
        return prod(self.sizes)

    def of(self, model: int) -> Tensor:
        """(positions,) labels of one model, where there are several."""
        return self.labels[model]


class _Moved(NamedTuple):
    """Merged coordinate (broadcastable to the factors) and merged size of each factor."""

    coordinates: list[Tensor]
    sizes: list[int]


def _unravel(index: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    parts: list[Tensor] = []
    for size in reversed(sizes):
        parts.insert(0, index % size)
        index = index // size
    return parts


def _ravel(coordinates: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    index = torch.zeros((), dtype=torch.int64)
    for c, size in zip(coordinates, sizes, strict=True):
        index = index * size + c
    return index


def split_blocks(space: Space, labels: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Labels as block labels (blocks,) and labels inside the block (blocks, units a block), both int64.

    labels: (space.width,) int64 of one model; width: the merged width. ValueError if they do not keep blocks.
    """
    if labels.shape != (space.width,):
        raise ValueError(f"labels of space {space.name!r}: expected {space.width}, got shape {tuple(labels.shape)}")
    if width % space.blocks:
        raise ValueError(f"space {space.name!r}: {space.blocks} blocks do not divide the merged width {width}")
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= width):
        raise ValueError(f"labels of space {space.name!r}: expected 0..{width - 1}")
    inner = width // space.blocks
    grid = labels.reshape(space.blocks, -1)
    block = grid[:, 0] // inner
    if bool((grid // inner != block[:, None]).any()):
        raise ValueError(f"labels of space {space.name!r}: units of one block go to different blocks")
    return block, grid % inner


def _move(
    piece: Piece,
    members: Iterable[Member],
    factors: Sequence[int],
    labels: Mapping[str, Tensor],
    widths: Mapping[str, int],
    name: str,
) -> _Moved:
    """The action of one model's labels on some factors of a piece."""
    shape = [piece.factors[f] for f in factors]
    coordinates = [
        torch.arange(size).reshape([-1 if i == k else 1 for k in range(len(shape))]) for i, size in enumerate(shape)
    ]
    moved = _Moved(list(coordinates), list(shape))
    blocks_set: dict[tuple[int, ...], Tensor] = {}
    for m in members:
        if m.space.name not in labels:
            continue
        width = widths.get(m.space.name, m.space.width)
        block_map, inner_map = split_blocks(m.space, labels[m.space.name].cpu(), width)
        block = [factors.index(f) for f in m.block]
        inner = [factors.index(f) for f in m.inner]
        b = _ravel([coordinates[f] for f in block], [shape[f] for f in block])
        i = _ravel([coordinates[f] for f in inner], [shape[f] for f in inner])
        known = blocks_set.setdefault(m.block, block_map)
        if m.block and not torch.equal(known, block_map):
            raise ValueError(f"{name}: tied space {m.space.name!r} moves its blocks unlike the others of its tie")
        for f, c in zip(block, _unravel(block_map[b], [shape[f] for f in block]), strict=True):
            moved.coordinates[f] = c
        inner_sizes = [shape[f] for f in inner]
        if width != m.space.width and inner:
            if inner != list(range(inner[0], inner[0] + len(inner))):
                raise ValueError(f"{name}: units of space {m.space.name!r} are spread over the axis: width is fixed")
            inner_sizes = [width // m.space.blocks] + [1] * (len(inner) - 1)
        elif width != m.space.width and m.space.width // m.space.blocks != width // m.space.blocks:
            raise ValueError(f"{name}: space {m.space.name!r} of one unit a block cannot grow")
        for f, c, size in zip(inner, _unravel(inner_map[b, i], inner_sizes), inner_sizes, strict=True):
            moved.coordinates[f], moved.sizes[f] = c, size
    return moved


def _piece_labels(
    piece: Piece, labels: Mapping[str, Tensor], widths: Mapping[str, int], name: str
) -> tuple[Tensor, list[int]]:
    """(positions of the piece,) int64 merged positions inside the piece, and the merged factor sizes."""
    moved = _move(piece, piece.members, range(len(piece.factors)), labels, widths, name)
    local = _ravel(moved.coordinates, moved.sizes).expand(piece.factors).reshape(-1)
    return local, moved.sizes


def _group_labels(
    group: Group, labels: Mapping[str, Tensor], widths: Mapping[str, int], name: str
) -> tuple[Tensor, tuple[int, ...]]:
    total = prod(group.sizes)
    result = torch.arange(total)
    parts = [(p, *_piece_labels(p, labels, widths, name)) for p in group.pieces]
    if all(list(p.factors) == sizes for p, _, sizes in parts):
        for p, local, _ in parts:
            where = p.where.positions()
            result[where] = where[local]
        return result, group.sizes
    if len(group.dims) > 1:
        (piece, local, sizes), *others = parts
        if others:
            raise ValueError(f"{name} dims {group.dims}: picks of flattened dims cannot change their width")
        return local, _dim_sizes(group, piece, sizes, name)
    return _relayout(total, parts, name)


def _dim_sizes(group: Group, piece: Piece, sizes: Sequence[int], name: str) -> tuple[int, ...]:
    merged, k = [], 0
    for size in group.sizes:
        old = new = 1
        while k < len(sizes) and old < size:
            old, new, k = old * piece.factors[k], new * sizes[k], k + 1
        merged.append(new)
    if prod(merged) != prod(sizes):
        raise ValueError(f"{name} dims {group.dims}: the merged widths do not fit the dims")
    return tuple(merged)


def _relayout(total: int, parts: Sequence[tuple[Piece, Tensor, list[int]]], name: str) -> tuple[Tensor, tuple[int]]:
    """Labels of an axis whose pieces change size: every stretch keeps its place in the order of stretches."""
    owner = torch.full((total,), -1)
    lengths = torch.ones(total, dtype=torch.int64)  # merged length, at the first position of a stretch; 0 elsewhere
    for piece, _, sizes in parts:
        w, outer = piece.where, 1
        for factor, size in zip(piece.factors, sizes, strict=True):
            if outer >= w.runs:
                break
            if factor != size:
                raise ValueError(f"{name}: a factor outside the pick cannot change its size")
            outer *= factor
        where = w.positions()
        owner[where] = 1
        lengths[where] = 0
        lengths[where[:: w.length]] = prod(sizes) // w.runs
    starts = lengths.cumsum(0) - lengths
    result = starts.clone()
    for piece, local, sizes in parts:
        w = piece.where
        length = prod(sizes) // w.runs
        new = starts[w.positions()[:: w.length]][:, None] + torch.arange(length)
        result[w.positions()] = new.reshape(-1)[local]
    return result, (int(lengths.sum()),)


def _whole(group: Group, spaces: set[str]) -> Space | None:
    """The space without blocks whose units are all of a group's one dim, in order: its labels are the axis's labels."""
    if len(group.dims) != 1 or len(group.pieces) != 1 or len(spaces) != 1 or len(group.pieces[0].members) != 1:
        return None
    piece, member = group.pieces[0], group.pieces[0].members[0]
    covers = prod(piece.factors) == group.sizes[0] and (
        member.inner == tuple(range(len(piece.factors))) or group.sizes[0] == 1  # one unit indexes no factor
    )
    return member.space if covers and not member.block and member.space.blocks == 1 else None


def _in_range(space: Space, labels: Tensor, width: int) -> Tensor:
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= width):
        raise ValueError(f"labels of space {space.name!r}: expected 0..{width - 1}")
    return labels


def axis_labels(
    spec: PermutationSpec,
    name: str,
    shape: Sequence[int],
    labels: Mapping[str, Tensor],
    widths: Mapping[str, int] | None = None,
) -> list[AxisMap]:
    """Where every position of the tensor's touched dims goes; dims that no space with labels touches are left out.

    shape: the tensor's shape in the models. labels: {space: (width,) int64} of one model, or (models, width) of
    several (all alike); spaces left out stay as they are. widths: {space: merged width}, by default the width.
    ValueError, naming the tensor, if the shape does not fit or tied spaces disagree.
    """
    widths = widths or {}
    maps = []
    for group in spec.groups(name, shape):
        spaces = {m.space.name for p in group.pieces for m in p.members if m.space.name in labels}
        if not spaces:
            continue
        depth = {labels[s].dim() for s in spaces}
        whole = _whole(group, spaces)
        if whole is not None and labels[whole.name].shape[-1] == whole.width:
            width = widths.get(whole.name, whole.width)
            maps.append(AxisMap(group.dims, _in_range(whole, labels[whole.name].cpu(), width), (width,), group.role))
            continue
        if depth == {1}:
            merged, sizes = _group_labels(group, labels, widths, name)
        elif depth == {2}:
            counts = {labels[s].shape[0] for s in spaces}
            if len(counts) > 1:
                raise ValueError(f"{name}: labels of different numbers of models, {sorted(counts)}")
            each = [_group_labels(group, {s: labels[s][m] for s in spaces}, widths, name) for m in range(counts.pop())]
            merged, sizes = torch.stack([e[0] for e in each]), each[0][1]
        else:
            raise ValueError(f"{name}: labels must be (width,) or (models, width) for all spaces")
        maps.append(AxisMap(group.dims, merged, sizes, group.role))
    return maps


def take(tensor: Tensor, dims: tuple[int, ...], index: Tensor) -> Tensor:
    """A new tensor whose position p along the dims (flattened in this order) is position index[p] of the old one."""
    index = index.to(tensor.device)
    if tensor.dtype.is_floating_point and tensor.element_size() == 1:  # float8 has no index_select
        return take(tensor.view(torch.uint8), dims, index).view(tensor.dtype)
    if len(dims) == 1:
        return tensor.index_select(dims[0], index)
    front = tuple(range(len(dims)))
    moved = tensor.movedim(dims, front)
    flat = moved.flatten(0, len(dims) - 1).index_select(0, index)
    return flat.reshape(moved.shape).movedim(front, dims).contiguous()


@dataclass(frozen=True)
class Columns:
    """One model's tensor as a space sees it: rows are its units, the other dims are columns, some of them labelled.

    tensor: a view of the model's tensor (a copy only where a tied space shares the block factor of the rows).
    rows: the dims that are the units, in unit order. labels: {dims: (positions,) int64}, the merged column of each
    position of these dims (flattened in this order). sizes: {dims: merged size}. scale: {dims: (merged size,)
    float64}, N / members for axes of role "in"; none for "out" (docs/method.md rule 2).
    """

    tensor: Tensor
    rows: tuple[int, ...]
    labels: dict[tuple[int, ...], Tensor]
    sizes: dict[tuple[int, ...], int]
    scale: dict[tuple[int, ...], Tensor]


class Spread(NamedTuple):
    """A tensor whose own piece is split into the common factors: their dims, and where the other dims went."""

    tensor: Tensor
    factor_dims: tuple[int, ...]
    other_dims: dict[int, int]


def spread(tensor: Tensor, group: Group, piece: Piece, axis: Axis) -> Spread:
    """Split the dims of a group into the factors of one piece, without copying."""
    origin: list[int | None] = [None if d in group.dims else d for d in range(tensor.dim())]
    own = dims_of(axis)
    if axis.part is not None:
        tensor = tensor.narrow(own[0], *axis.part)
    if axis.pick is not None and axis.view is not None:
        seen, d = 1, 0
        for d in own:  # the dim in which the picked factor lies
            if prod(axis.view[: axis.pick[0]]) < seen * tensor.shape[d]:
                break
            seen *= tensor.shape[d]
        picked = axis.view[axis.pick[0]]
        before = prod(axis.view[: axis.pick[0]]) // seen
        tensor = split_dim(tensor, d, (before, picked, tensor.shape[d] // (before * picked))).select(
            d + 1, axis.pick[1]
        )
        origin.insert(d, None)
    left = list(range(len(piece.factors)))
    place: list[int] = []
    shift = 0
    for k, old in enumerate(list(origin)):
        if old is not None:
            continue
        size, taken = tensor.shape[k + shift], 1
        mine: list[int] = []
        while left and taken < size:
            mine.append(left.pop(0))
            taken *= piece.factors[mine[-1]]
        place += range(k + shift, k + shift + len(mine))
        if len(mine) > 1:
            tensor = split_dim(tensor, k + shift, [piece.factors[f] for f in mine])
            origin[k + shift : k + shift + 1] = [None] * len(mine)
            shift += len(mine) - 1
    return Spread(tensor, tuple(place), {old: new for new, old in enumerate(origin) if old is not None})


def _members(labels: Sequence[Tensor], size: int) -> Tensor:
    """(size,) float64: how many positions of all models went to each merged position."""
    return torch.bincount(torch.cat(list(labels)), minlength=size).to(torch.float64)


def _share(members: Tensor, models: int) -> Tensor:
    """models / members, and 0 where there is none."""
    return torch.where(members > 0, models / members.clamp(min=1), 0.0)


def _localise(parts: Spread, piece: Piece, member: Member, maps: Sequence[Tensor], inner: int, m: int) -> Spread:
    """Regroup a tied space's own factors inside each block of the rows, whose blocks stay where they are.

    maps: (blocks * units a block,) int64 labels of every model, inner units a merged block.
    """
    tensor, place, others = parts
    dims = [place[f] for f in (*member.block, *member.inner)]
    front = list(range(len(dims)))
    moved = tensor.movedim(dims, front)
    flat = moved.flatten(0, len(dims) - 1)
    blocks = member.space.blocks
    each = flat.shape[0] // blocks
    local = torch.arange(blocks).repeat_interleave(each) * inner + maps[m] % inner
    total = len(maps)
    if inner == each and torch.equal(local.sort().values, torch.arange(flat.shape[0])):
        flat = flat.index_select(0, torch.argsort(local).to(flat.device))
    else:
        wide = flat.to(torch.promote_types(flat.dtype, torch.float32))
        flat = torch.zeros((blocks * inner, *flat.shape[1:]), dtype=wide.dtype, device=flat.device)
        flat.index_add_(0, local.to(flat.device), wide)
    if member.axis.role == "in":
        members = _members(maps, blocks * inner).reshape(blocks, inner)
        goes_to = maps[m].reshape(blocks, each)[:, 0] // inner
        scale = _share(members, total)[goes_to].reshape(-1, *[1] * (flat.dim() - 1))
        if not bool((scale == 1).all()):
            flat = flat * scale.to(flat)
    shape = [*[piece.factors[f] for f in member.block], inner, *[1] * (len(member.inner) - 1)]
    return Spread(flat.reshape(*shape, *moved.shape[len(dims) :]).movedim(front, dims), place, others)


def columns(
    spec: PermutationSpec,
    space: str,
    axis: Axis,
    tensors: Sequence[Tensor],
    labels: Mapping[str, Tensor],
    widths: Mapping[str, int] | None = None,
) -> list[Columns]:
    """One axis of a space in every model, as rows and labelled columns: what its weight similarity compares.

    tensors: the axis's tensor in each model, same shapes. labels: {space: (models, width) int64} of the spaces that
    are matched already; the columns of others stay raw. widths: {space: merged width}, by default the width.
    Source: docs/method.md rule 2.
    """
    widths, name, n = widths or {}, axis.tensor, len(tensors)
    found = spec.groups(name, tensors[0].shape)
    group = next(g for g in found if dims_of(axis)[0] in g.dims)
    piece, own = next((p, m) for p in group.pieces for m in p.members if m.axis == axis and m.space.name == space)
    others = [m for m in piece.members if m is not own and m.space.name in labels and (m.block or m.inner)]
    shared = [m for m in others if own.block and m.block == own.block]
    moving = [m for m in shared if m.inner]  # the only unit of a block is where its block is
    clusters: dict[object, list[Member]] = {}
    for m in others:
        if m not in shared:
            clusters.setdefault(m.block or m.space.name, []).append(m)
    maps = axis_labels(spec, name, tensors[0].shape, labels, widths)
    maps = [a for a in maps if a.dims != group.dims]
    result = []
    for i, tensor in enumerate(tensors):
        parts = spread(tensor.detach(), group, piece, axis)
        for m in moving:
            each = widths.get(m.space.name, m.space.width) // m.space.blocks
            parts = _localise(parts, piece, m, list(labels[m.space.name].cpu()), each, i)
        out = Columns(parts.tensor, tuple(parts.factor_dims[f] for f in (*own.block, *own.inner)), {}, {}, {})
        for cluster in clusters.values():
            factors = sorted({f for m in cluster for f in (*m.block, *m.inner)})
            each_model = [
                _cluster_labels(piece, cluster, factors, {s: x[k] for s, x in labels.items()}, widths, name)
                for k in range(n)
            ]
            key = tuple(parts.factor_dims[f] for f in factors)
            _put(out, key, [e[0] for e in each_model], each_model[0][1], cluster[0].axis.role, i)
        for a in maps:
            key = tuple(parts.other_dims[d] for d in a.dims)
            _put(out, key, list(a.labels), a.size, a.role, i)
        result.append(out if out.rows else _with_row(out))
    return result


def _cluster_labels(
    piece: Piece,
    cluster: Sequence[Member],
    factors: Sequence[int],
    labels: Mapping[str, Tensor],
    widths: Mapping[str, int],
    name: str,
) -> tuple[Tensor, int]:
    moved = _move(piece, cluster, factors, labels, widths, name)
    shape = [piece.factors[f] for f in factors]
    return _ravel(moved.coordinates, moved.sizes).expand(shape).reshape(-1), prod(moved.sizes)


def _put(out: Columns, key: tuple[int, ...], labels: Sequence[Tensor], size: int, role: str, model: int) -> None:
    out.labels[key], out.sizes[key] = labels[model], size
    if role == "in":
        out.scale[key] = _share(_members(labels, size), len(labels))


def _with_row(out: Columns) -> Columns:
    """A space of width 1 indexes no factor: give it a dim of its own."""

    def later(keys: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(k + 1 for k in keys)

    return Columns(
        out.tensor.unsqueeze(0),
        (0,),
        {later(k): v for k, v in out.labels.items()},
        {later(k): v for k, v in out.sizes.items()},
        {later(k): v for k, v in out.scale.items()},
    )
