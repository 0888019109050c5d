"""Rules of operations that move, split, join or repeat axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mudsc_fast.tracing.layouts import Layout, concatenate, fresh, reshape, size_of, slice_of, split
from mudsc_fast.tracing.state import NOWHERE, Axes, Origins, State, Value
from mudsc_fast.tracing.table import Result, Shapes, rule


def _runs(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Old and new dims that a reshape turns into each other, run by run."""
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        mine: list[int] = []
        other: list[int] = []
        a = b = 1
        if i < len(old):
            mine.append(i)
            a, i = old[i], i + 1
        while a != b or not other:
            if b < a or (not other and j < len(new) and a == 1):
                if j == len(new):
                    break
                other.append(j)
                b, j = b * new[j], j + 1
            elif a < b and i < len(old):
                mine.append(i)
                a, i = a * old[i], i + 1
            else:
                break
        if not mine:
            other, j = list(range(j, len(new))), len(new)
        found.append((mine, other))
    return found


def reshaped(state: State, value: Value, shape: Sequence[int]) -> Value:
    """A value in another shape, row-major."""
    old = [size_of(axis) for axis in value.axes]
    if 0 in old:
        return Value(tuple(fresh(s) for s in shape), value.dynamic)
    axes: list[Layout] = [()] * len(shape)
    origins: list[Origins] = [NOWHERE] * len(shape)
    for mine, other in _runs(old, shape):
        source = frozenset(o for d in mine for o in value.origin(d))
        made = reshape([value.axes[d] for d in mine], [shape[d] for d in other], state.reason)
        for d, layout in zip(other, made, strict=True):
            axes[d], origins[d] = layout, source
    return replace(value, axes=tuple(axes), origins=tuple(origins) if value.origins else (), stack=None)


@rule(
    "view",
    "reshape",
    "_unsafe_view",
    "flatten",
    "unflatten",
    "view_as",
    "reshape_as",
    "_reshape_alias",
    "atleast_1d",
    index=True,
)
def shape_only(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """All reshapes; the new shape says everything."""
    value: Value = args["self"]
    if "dtype" in args and "size" not in args:
        return value
    return reshaped(state, value, shapes[0])


@rule("squeeze", "unsqueeze", stack=True, index=True)
def ones(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """Dims of size 1 that come or go."""
    value: Value = args["self"]
    if value.stack is None or not isinstance(args.get("dim"), int):
        return reshaped(state, state.collapse(value), shapes[0])
    along, pieces = value.stack
    dim = args["dim"] % max(value.dims, len(shapes[0]))
    if len(shapes[0]) > value.dims:
        pieces = tuple((*axes[:dim], (), *axes[dim:]) for axes in pieces)
        along += dim <= along
    elif len(shapes[0]) < value.dims:
        pieces = tuple((*axes[:dim], *axes[dim + 1 :]) for axes in pieces)
        along -= dim < along
    return Value(pieces[0], value.dynamic, stack=(along, pieces))


def stacked(state: State, value: Value, shape: Sequence[int], dim: int) -> Value:
    """A reshape after which one new dim will be taken apart: the layouts may differ along it.

    The reshaped axis becomes (what is before) x (the concatenation of its pieces), as with a fused qkv.
    """
    old = [size_of(axis) for axis in value.axes]
    plain: list[Layout] = [()] * len(shape)
    pieces: list[list[Layout]] = [[] for _ in range(shape[dim])]
    for mine, other in _runs(old, shape):
        if dim not in other:
            made = reshape([value.axes[d] for d in mine], [shape[d] for d in other], state.reason)
            for d, layout in zip(other, made, strict=True):
                plain[d] = layout
            continue
        lead = [fresh(shape[d]) for d in other if d < dim]
        tails = [[fresh(shape[d]) for d in other if d > dim] for _ in pieces]
        parts = [tuple(f for layout in tail for f in layout) for tail in tails]
        whole = (*(f for layout in lead for f in layout), *concatenate(parts))
        state.unify(tuple(f for d in mine for f in value.axes[d]), whole)
        for d, layout in zip([d for d in other if d < dim], lead, strict=True):
            plain[d] = layout
        for piece, tail in zip(pieces, tails, strict=True):
            piece += tail
        after = [d for d in other if d > dim]
    plain[dim] = fresh(shape[dim], state.reason)
    axes: list[Axes] = []
    for piece in pieces:
        made = list(plain)
        for d, layout in zip(after, piece, strict=True):
            made[d] = layout
        axes.append(tuple(made))
    return Value(axes[0], value.dynamic, (), stack=(dim, tuple(axes)))


def permuted(value: Value, order: Sequence[int]) -> Value:
    """The dims in another order."""
    if value.stack is None:
        return value.pick(order)
    dim, pieces = value.stack
    moved = tuple(tuple(axes[d] for d in order) for axes in pieces)
    return replace(value.pick(order), stack=(list(order).index(dim), moved))


@rule("permute", stack=True, index=True)
def permute(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """Dims in a given order."""
    value: Value = args["self"]
    return permuted(value, [d % value.dims for d in args["dims"]])


@rule("transpose", "swapaxes", "swapdims", stack=True, index=True)
def transpose(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """Two dims swapped."""
    value: Value = args["self"]
    if value.dims == 0:
        return value
    a, b = (args[k] % value.dims for k in args if k in ("dim0", "dim1", "axis0", "axis1"))
    order = list(range(value.dims))
    order[a], order[b] = order[b], order[a]
    return permuted(value, order)


@rule("t", "numpy_T", "mT", "adjoint", stack=True, index=True)
def transposed(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """The last two dims swapped (numpy_T: all dims reversed, the same for two)."""
    value: Value = args["self"]
    if value.dims < 2:
        return value
    order = list(range(value.dims))
    if value.dims > 2 and len(set(shapes[0])) > 1 and [size_of(a) for a in value.axes][::-1] == list(shapes[0]):
        return permuted(value, order[::-1])
    return permuted(value, [*order[:-2], order[-1], order[-2]])


@rule("movedim", "moveaxis", stack=True, index=True)
def movedim(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """Some dims moved, the others in order."""
    value: Value = args["self"]

    def dims(given: Any) -> list[int]:
        return [d % value.dims for d in (given if isinstance(given, (list, tuple)) else [given])]

    source, target = dims(args["source"]), dims(args["destination"])
    rest = iter(d for d in range(value.dims) if d not in source)
    order = [source[target.index(d)] if d in target else next(rest) for d in range(value.dims)]
    return permuted(value, order)


@rule("expand", "expand_as", "broadcast_to", index=True)
def expand(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """Copies along new dims or dims of size 1 are alike: they may be reordered at will."""
    value: Value = args["self"]
    new = len(shapes[0]) - value.dims
    axes = [fresh(s) for s in shapes[0][:new]]
    for axis, size in zip(value.axes, shapes[0][new:], strict=True):
        axes.append(fresh(size) if not axis and size != 1 else axis)
    origins = (NOWHERE,) * new + value.origins if value.origins else ()
    return replace(value, axes=tuple(axes), origins=origins)


@rule("repeat", "tile", index=True)
def repeat(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """Copies of a whole axis one after the other."""
    value: Value = args["self"]
    new = len(shapes[0]) - value.dims
    axes = [fresh(s) for s in shapes[0][:new]]
    for axis, size in zip(value.axes, shapes[0][new:], strict=True):
        axes.append(fresh(size // size_of(axis)) + axis)
    return replace(value, axes=tuple(axes), origins=())


@rule("repeat_interleave", index=True)
def repeat_interleave(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """Copies of each position one after the other."""
    value: Value = args["self"]
    dim = args.get("dim")
    if not isinstance(args.get("repeats"), int) or dim is None:
        state.freeze_value(value)
        return Value(tuple(state.fixed(s) for s in shapes[0]))
    return value.with_axis(dim % value.dims, value.axes[dim] + fresh(args["repeats"]))


@rule("select", stack=True, index=True)
def select(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """One position of a dim."""
    value: Value = args["self"]
    return taken(state, value, args["dim"], args["index"])


def taken(state: State, value: Value, dim: int, index: int) -> Value:
    """The value at one index of a dim."""
    dim %= value.dims
    rest = [d for d in range(value.dims) if d != dim]
    if value.stack is not None:
        along, pieces = value.stack
        if along == dim:
            axes = pieces[index % len(pieces)]
            return Value(tuple(axes[d] for d in rest), value.dynamic)
        value = state.collapse(value)
    state.freeze(value.axes[dim])
    return value.pick(rest)


@rule("unbind", stack=True, index=True)
def unbind(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """Each position of a dim."""
    return [taken(state, args["self"], args["dim"], i) for i in range(len(shapes))]


def _piece(state: State, value: Value, dim: int, start: int, stop: int) -> Value:
    return value.with_axis(dim, slice_of(value.axes[dim], start, stop, state.reason), value.origin(dim))


@rule("slice", "narrow", index=True)
def slice_(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """Contiguous positions of a dim; with a step, the axis is frozen."""
    value: Value = args["self"]
    dim = args["dim"] % value.dims
    size = size_of(value.axes[dim])
    length = shapes[0][dim]
    if args.get("step", 1) != 1:
        state.freeze(value.axes[dim])
        return value.with_axis(dim, state.fixed(length))
    start = args["start"] or 0
    start = min(max(start + size if start < 0 else start, 0), size)
    return value if length == size else _piece(state, value, dim, start, start + length)


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk")
def split_(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """Contiguous pieces of a dim."""
    value: Value = args["self"]
    dim = args["dim"] % value.dims
    pieces = split(value.axes[dim], [shape[dim] for shape in shapes], state.reason)
    return [value.with_axis(dim, piece, value.origin(dim)) for piece in pieces]


@rule("cat", "concat", "concatenate")
def cat(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """Values one after the other along a dim, alike along the others."""
    values: list[Value] = [v for v in args["tensors"] if v.dims == len(shapes[0])]
    dim = args["dim"] % len(shapes[0])
    first = values[0]
    for value in values[1:]:
        for d in range(first.dims):
            if d != dim:
                state.unify(first.axes[d], value.axes[d])
    dynamic = any(v.dynamic for v in values)
    origins = tuple(frozenset().union(*(v.origin(d) for v in values)) for d in range(first.dims))
    axes = list(first.axes)
    axes[dim] = concatenate([v.axes[dim] for v in values])
    return Value(tuple(axes), dynamic, () if dynamic else origins)


@rule("stack")
def stack(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """Values side by side along a new dim, which is then fixed."""
    values: list[Value] = args["tensors"]
    for value in values[1:]:
        for a, b in zip(values[0].axes, value.axes, strict=True):
            state.unify(a, b)
    dim = args["dim"] % len(shapes[0])
    axes = values[0].axes
    return Value((*axes[:dim], state.fixed(len(values)), *axes[dim:]), any(v.dynamic for v in values))


@rule("constant_pad_nd", "pad")
def pad(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """Constants put before and behind an axis may be reordered at will; padding by copies freezes it."""
    value: Value = args["self"]
    sizes = list(args["pad"])
    for k in range(0, len(sizes), 2):
        dim = value.dims - 1 - k // 2
        before, after = sizes[k], sizes[k + 1]
        if (before, after) == (0, 0):
            continue
        if args.get("mode", "constant") != "constant" or min(before, after) < 0:
            state.freeze(value.axes[dim])
            state.mix(value, dim)
            value = value.with_axis(dim, state.fixed(shapes[0][dim]))
        else:
            value = value.with_axis(dim, concatenate([fresh(before), value.axes[dim], fresh(after)]))
    return replace(value, origins=(), uniform=False)


@rule("roll", "flip", "fliplr", "rot90", index=True)
def moved(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """Positions moved along dims, which are frozen."""
    value: Value = args["self"]
    dims = args.get("dims") or range(value.dims)
    state.freeze(*(value.axes[d] for d in dims))
    state.mix(value, *dims)
    return value


@rule("channel_shuffle")
def channel_shuffle(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """Channels (dim 1) as groups x others, dealt out again as others x groups."""
    x: Value = args["self"]
    batch, channels, *rest = shapes[0]
    groups = args["groups"]
    apart = reshaped(state, x, (batch, groups, channels // groups, *rest))
    return reshaped(state, apart.pick([0, 2, 1, *range(3, apart.dims)]), shapes[0])


@rule("pixel_shuffle", "pixel_unshuffle")
def pixel_shuffle(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """Channels (dim -3) x places in a square become positions, or the other way round; both are frozen."""
    x: Value = args["self"]
    state.freeze(*x.axes[-2:])
    positions = tuple(state.fixed(s) for s in shapes[0][-2:])
    if "upscale_factor" in args:
        inner = fresh(args["upscale_factor"] ** 2, state.reason)
        channels = fresh(shapes[0][-3])
        state.unify(x.axes[-3], channels + inner)
    else:
        channels = x.axes[-3] + fresh(args["downscale_factor"] ** 2, state.reason)
    return Value((*x.axes[:-3], channels, *positions), x.dynamic)
