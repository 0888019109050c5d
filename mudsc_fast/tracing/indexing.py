"""Rules of operations that read or write at places told by integers.

Integers that come from a top-k over a free axis (an expert, say) are indices into that axis: they move with it, so
reading by them keeps the axis free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mudsc_fast.tracing.layouts import Layout, size_of
from mudsc_fast.tracing.pointwise import broadcast
from mudsc_fast.tracing.state import NOWHERE, State, Tag, Value
from mudsc_fast.tracing.table import Result, Shapes, rule


def _plain(state: State, *values: Any) -> None:
    """Integers that are indices themselves, where this is not followed: what they are indices into is frozen."""
    for value in values:
        if isinstance(value, Value) and value.index_of is not None:
            state.freeze(value.index_of)


def _index_into(state: State, layout: Layout, index: Value) -> None:
    """The layout is read at these indices: it is what they are indices into, or it is frozen."""
    if index.index_of is not None:
        state.unify(layout, index.index_of)
    else:
        state.freeze(layout)


@rule("embedding", index=True)
def embedding(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """Rows of a weight."""
    weight, index = args["weight"], args["indices"]
    _index_into(state, weight.axes[0], index)
    state.mix(weight, 0)
    for origin in weight.origin(1):
        state.roles[origin].add("out")
    return Value((*index.axes, *weight.axes[1:]))


@rule("topk", index=True)
def topk(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """The largest along a dim, in the order of their values, and where they are."""
    value: Value = args["self"]
    _plain(state, value)
    dim = args["dim"] % value.dims
    state.mix(value, dim)
    if value.axes[dim]:
        state.kinds.append((value.axes[dim], "experts"))
    largest = value.with_axis(dim, state.fixed(shapes[0][dim]))
    return [largest, Value(largest.axes, value.dynamic, index_of=value.axes[dim] or None)]


@rule("one_hot", index=True)
def one_hot(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """A new last axis, on which the integers are places."""
    index: Value = args["self"]
    size = shapes[0][-1]
    if index.index_of is not None and size_of(index.index_of) == size:
        return Value((*index.axes, index.index_of))
    state.freeze_value(index)
    return Value((*index.axes, state.fixed(size)))


@rule("index_select", index=True)
def index_select(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """Some positions of a dim."""
    value: Value = args["self"]
    _plain(state, value)
    dim, index = args["dim"] % value.dims, args["index"]
    _index_into(state, value.axes[dim], index)
    state.mix(value, dim)
    return value.with_axis(dim, index.axes[0])


@rule("gather", "take_along_dim", index=True)
def gather(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """Along a dim, the positions that an index of the same dims names."""
    value, index = args["self"], args.get("index", args.get("indices"))
    _plain(state, value)
    dim = args["dim"] % value.dims
    _index_into(state, value.axes[dim], index)
    state.mix(value, dim)
    for d in range(value.dims):
        if d != dim:
            if size_of(value.axes[d]) == size_of(index.axes[d]):
                state.unify(value.axes[d], index.axes[d])
            else:
                state.freeze(value.axes[d], index.axes[d])
    return Value(index.axes, value.dynamic or index.dynamic)


@rule("index", index=True)
def index(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """value[i, j, ...] with integer tensors (or None: the whole dim)."""
    value: Value = args["self"]
    state_of = _index_axes(state, value, args["indices"], shapes)
    return state_of if state_of is not None else _frozen(state, value, shapes)


def _frozen(state: State, value: Value, shapes: Shapes) -> Value:
    state.freeze_value(value)
    return Value(tuple(state.fixed(s) for s in shapes[0]))


def _index_axes(state: State, value: Value, indices: list[Value | None], shapes: Shapes) -> Value | None:
    indices = [*indices, *[None] * (value.dims - len(indices))]
    places = [d for d, i in enumerate(indices) if i is not None]
    given = [i for i in indices if i is not None]
    wide = max(i.dims for i in given)
    if wide + value.dims - len(places) != len(shapes[0]):
        return None  # a mask: the number of results depends on it
    for d in places:
        item = indices[d]
        if item is not None:
            _index_into(state, value.axes[d], item)
    told = given[0].index_of if len(given) == 1 and given[0].dims == 1 else None
    if told is None:
        state.mix(value, *places)
    together = places == list(range(places[0], places[-1] + 1))
    start = places[0] if together else 0
    shape = shapes[0][start : start + wide]
    read = broadcast(state, [replace(i, index_of=None) for i in given], shape)
    rest = [d for d in range(value.dims) if d not in places]
    before = [d for d in rest if d < places[0]] if together else []
    after = [d for d in rest if d not in before]
    axes = (*(value.axes[d] for d in before), *read.axes, *(value.axes[d] for d in after))
    dynamic = value.dynamic or read.dynamic
    tags = (Tag(told, id(given[0]), start),) if told is not None else ()
    if dynamic and not value.dynamic:
        # Weights picked by tokens: what remains of them still consumes or produces units.
        origins = (*(value.origin(d) for d in before), *[NOWHERE] * wide, *(value.origin(d) for d in after))
        return Value(axes, True, origins, value.index_of, tags=tags)
    return Value(axes, dynamic, index_of=value.index_of, tags=tags)


@rule("index_put", "_index_put_impl", index=True)
def index_put(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """Numbers written at places: as reading there, position by position."""
    value: Value = args["self"]
    put: Value = args["values"]
    _plain(state, value, put)
    places = [i for i in args["indices"] if i is not None]
    if any(i.dims != 1 for i in places) or len(places) != 1:
        state.freeze_value(put)
        for item in places:
            state.freeze_value(item)
        return _frozen(state, value, shapes)
    dim = next(d for d, i in enumerate(args["indices"]) if i is not None)
    _index_into(state, value.axes[dim], places[0])
    state.mix(value, dim)
    target = value.with_axis(dim, places[0].axes[0])
    broadcast(state, [target, put], [size_of(axis) for axis in target.axes])
    return value


@rule("scatter", "scatter_add", "index_add", "masked_scatter", "scatter_reduce", index=True)
def scatter(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """Numbers written at places along a dim: by indices of a top-k over that axis it stays free."""
    value: Value = args["self"]
    where = args.get("index")
    source = args.get("src", args.get("source"))
    _plain(state, value, source)
    if where is None or "dim" not in args or where.dims != value.dims:
        for item in (value, where, source):
            if isinstance(item, Value):
                state.freeze_value(item)
        return Value(tuple(state.fixed(s) for s in shapes[0]))
    dim = args["dim"] % value.dims
    _index_into(state, value.axes[dim], where)
    state.mix(value, dim)
    for d in range(value.dims):
        if d != dim:
            state.unify(value.axes[d], where.axes[d])
    if isinstance(source, Value) and source.dims:
        for a, b in zip(source.axes, where.axes, strict=True):
            state.unify(a, b)
    return value
