"""Rules of products that sum over axes: linear layers, matrix products, attention, convolutions, recurrences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mudsc_fast.tracing.layouts import Layout, concatenate, fresh, size_of
from mudsc_fast.tracing.pointwise import broadcast
from mudsc_fast.tracing.state import NOWHERE, Origins, State, Value
from mudsc_fast.tracing.table import Result, Shapes, rule


def _combined(state: State, axes: tuple[Layout, ...], origins: tuple[Origins, ...], *values: Value) -> Value:
    dynamic = any(v.dynamic for v in values)
    return Value(axes, dynamic, () if dynamic else origins)


def _add(state: State, value: Value, bias: Value | None) -> Value:
    if bias is None or not bias.dims:
        return value
    return broadcast(state, [value, bias], [size_of(axis) for axis in value.axes])


@rule("linear")
def linear(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """x (..., in), weight (out, in), bias (out)."""
    x, weight = args["input"], args["weight"]
    state.contract(x, weight, [(x.dims - 1, 1)], [])
    origins = (*(x.origin(d) for d in range(x.dims - 1)), weight.origin(0))
    return _add(state, _combined(state, (*x.axes[:-1], weight.axes[0]), origins, x, weight), args["bias"])


def matrix_product(state: State, a: Value, b: Value) -> Value:
    """torch.matmul: the last dim of a with the last but one of b, the others side by side, broadcast."""
    if a.dims == 1 or b.dims == 1:
        state.contract(a, b, [(a.dims - 1, max(b.dims - 2, 0))], [])
        rest_a, rest_b = list(range(a.dims - 1)), [d for d in range(b.dims) if d != max(b.dims - 2, 0)]
        origins = tuple(a.origin(d) for d in rest_a) + tuple(b.origin(d) for d in rest_b)
        return _combined(state, tuple(a.axes[d] for d in rest_a) + tuple(b.axes[d] for d in rest_b), origins, a, b)
    shared = min(a.dims, b.dims)
    batch = [(a.dims - k, b.dims - k) for k in range(3, shared + 1)]
    state.contract(a, b, [(a.dims - 1, b.dims - 2)], batch)
    axes: list[Layout] = []
    origins_: list[Origins] = []
    for k in range(max(a.dims, b.dims), 2, -1):
        i, j = a.dims - k, b.dims - k
        mine, other = (a.axes[i] if i >= 0 else ()), (b.axes[j] if j >= 0 else ())
        axes.append(mine or other)
        origins_.append((a.origin(i) if i >= 0 else NOWHERE) | (b.origin(j) if j >= 0 else NOWHERE))
    if a.dynamic and b.dynamic:
        state.name_product(a, b)
    ends = (a.origin(a.dims - 2), b.origin(b.dims - 1))
    return _combined(state, (*axes, a.axes[-2], b.axes[-1]), (*origins_, *ends), a, b)


@rule("matmul", "mm", "bmm", "mv", "dot")
def matmul(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """Matrix products of any dims."""
    a, b = (v for v in args.values() if isinstance(v, Value))
    return matrix_product(state, a, b)


@rule("addmm", "addbmm", "baddbmm")
def addmm(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """A matrix product with something added."""
    bias, a, b = (v for v in args.values() if isinstance(v, Value))
    product = matrix_product(state, a, b)
    if product.dims != len(shapes[0]):  # addbmm sums over the batch
        product = product.pick(range(1, product.dims))
    return broadcast(state, [product, bias], shapes[0])


@rule("einsum")
def einsum(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """Letters only, each once an operand; else frozen. Of more than two operands the first two are multiplied first."""
    equation, values = args["equation"].replace(" ", ""), args["tensors"]
    left, _, right = equation.partition("->")
    terms = left.split(",")
    plain = all(len(set(t)) == len(t) == v.dims for t, v in zip(terms, values, strict=True)) and "->" in equation
    if not plain or "." in equation:
        for value in values:
            state.freeze_value(value)
        return Value(tuple(state.fixed(s) for s in shapes[0]))
    while len(values) > 2:
        kept = "".join(x for x in dict.fromkeys(terms[0] + terms[1]) if any(x in t for t in [*terms[2:], right]))
        values = [_contracted(state, terms[:2], kept, values[:2]), *values[2:]]
        terms = [kept, *terms[2:]]
    return _contracted(state, terms, right, values)


def _contracted(state: State, terms: Sequence[str], right: str, values: Sequence[Value]) -> Value:
    """The einsum of one or two operands."""
    layouts: dict[str, Layout] = {}
    for term, value in zip(terms, values, strict=True):
        for letter, axis in zip(term, value.axes, strict=True):
            layouts[letter] = layouts.get(letter) or axis
    if len(values) == 1:
        only: Value = values[0]
        summed = [d for d, letter in enumerate(terms[0]) if letter not in right]
        state.mix(only, *summed)
        return only.pick([terms[0].index(letter) for letter in right])
    a, b = values
    both = [(terms[0].index(x), terms[1].index(x), x) for x in terms[0] if x in terms[1]]
    state.contract(a, b, [(i, j) for i, j, x in both if x not in right], [(i, j) for i, j, x in both if x in right])
    dynamic = a.dynamic or b.dynamic
    origins = tuple(
        NOWHERE.union(*(v.origin(t.index(x)) for t, v in zip(terms, values, strict=True) if x in t)) for x in right
    )
    return Value(tuple(layouts[x] for x in right), dynamic, () if dynamic else origins)


@rule("scaled_dot_product_attention")
def attention(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """query (..., heads, t, d), key (..., kv heads, s, d), value (..., kv heads, s, e), mask (..., t, s)."""
    q, k, v, mask = args["query"], args["key"], args["value"], args["attn_mask"]
    if args["enable_gqa"] and q.dims > 2:
        k, v = (x.with_axis(x.dims - 3, _grouped(q.axes[-3], x.axes[-3])) for x in (k, v))
    batch = [(d, d) for d in range(q.dims - 2)]
    state.contract(q, k, [(q.dims - 1, k.dims - 1)], batch)
    state.kinds += [(q.axes[-1], "qk"), (v.axes[-1], "v")]
    state.kinds += [(k.axes[-3], "heads")] if k.dims > 2 else []
    weights = Value((*q.axes[:-1], k.axes[-2]))
    if mask is not None:
        broadcast(state, [weights, mask], [size_of(axis) for axis in weights.axes])
    if args["is_causal"]:
        state.freeze(weights.axes[-1], weights.axes[-2])
    state.record(weights.axes)
    state.mix(weights, -1)
    state.contract(weights, v, [(q.dims - 1, v.dims - 2)], batch)
    return Value((*q.axes[:-1], v.axes[-1]))


def _grouped(heads: Layout, kv: Layout) -> Layout:
    return kv + fresh(size_of(heads) // max(size_of(kv), 1))


@rule("_weight_norm")
def weight_norm(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """v times g over v's norm along all dims but one (all of them: -1); g has size 1 on the others."""
    v, g, dim = args["v"], args["g"], args["dim"]
    state.mix(v, *(d for d in range(v.dims) if d != dim))
    return broadcast(state, [v, g], shapes[0])


def _convolution(state: State, args: Mapping[str, Any], shapes: Shapes, transposed: bool) -> Result:
    x, weight, groups = args["input"], args["weight"], args["groups"]
    kernel, spatial = range(2, weight.dims), range(2, x.dims)
    if x.dims != weight.dims:
        for value in (x, weight):
            state.freeze_value(value)
        return Value(tuple(state.fixed(s) for s in shapes[0]))
    state.freeze(*(x.axes[d] for d in spatial), *(weight.axes[d] for d in kernel))
    group = fresh(groups)
    # A convolution's weight is (out, in / groups), a transposed one's (in, out / groups).
    inputs = weight.axes[0] if transposed else group + weight.axes[1]
    state.unify(x.axes[1], inputs)
    if transposed:
        outputs = group + weight.axes[1]
        state.unify(weight.axes[0], group + fresh(size_of(weight.axes[0]) // groups))
    else:
        outputs = weight.axes[0]
        state.unify(outputs, group + fresh(size_of(outputs) // groups))
    if x.dynamic and size_of(weight.axes[0 if transposed else 1]) > 1:
        state.read_by(weight, [0 if transposed else 1])
    state.record((x.axes[0], *weight.axes, *(x.axes[d] for d in spatial)))
    # Inside, the positions and one group's inputs are summed over.
    state.record((x.axes[0], group))
    state.record((outputs,) if not transposed else (group, weight.axes[1]))
    result = Value((x.axes[0], outputs, *(state.fixed(s) for s in shapes[0][2:])))
    if args["bias"] is not None:
        state.unify(outputs, args["bias"].axes[0])
    return result


@rule("conv1d", "conv2d", "conv3d")
def convolution(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """x (batch, in, positions), weight (out, in / groups, kernel); positions and kernel are frozen."""
    return _convolution(state, args, shapes, transposed=False)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """x (batch, in, positions), weight (in, out / groups, kernel)."""
    return _convolution(state, args, shapes, transposed=True)


@rule("convolution", "_convolution")
def any_convolution(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """The general form of both."""
    return _convolution(state, args, shapes, args["transposed"])


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrence(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """Layers of weights (gates x hidden, in), (gates x hidden, hidden) and biases; units move alike in all gates.

    Results: the last layer's output, then the last state (and the cell's), both directions one after the other.
    """
    x: Value = args["input"]
    states, weights = args["hx"], args["params"]
    states = [states] if isinstance(states, Value) else states
    directions = 2 if args["bidirectional"] else 1
    each = 4 if args["has_biases"] else 2
    hidden = size_of(weights[1].axes[1])
    if len(weights) != args["num_layers"] * directions * each:  # projections
        for value in (x, *states, *weights):
            state.freeze_value(value)
        return [Value(tuple(state.fixed(s) for s in shape)) for shape in shapes]
    time, batch = (1, 0) if args["batch_first"] else (0, 1)
    state.freeze(x.axes[time])
    state.mix(x, time, x.dims - 1)
    below = x.axes[-1]
    units: list[Layout] = []
    for k in range(0, len(weights), each):
        if k % (directions * each) == 0 and k:
            below = _joined(units[-directions:])
        w_ih, w_hh, *biases = weights[k : k + each]
        unit = fresh(hidden)
        gates = (*fresh(size_of(w_ih.axes[0]) // hidden, "gates of a recurrent layer"), *unit)
        for w in (w_ih, w_hh, *biases):
            state.unify(w.axes[0], gates)
        state.unify(w_ih.axes[1], below)
        state.unify(w_hh.axes[1], unit)
        state.read_by(w_ih, [1])
        state.read_by(w_hh, [1])
        state.record((x.axes[batch], unit))
        state.record((x.axes[batch], below))
        units.append(unit)
    output = replace(x, axes=(*x.axes[:-1], _joined(units[-directions:])))
    for value in states:
        for unit in () if value.uniform and not state.written else units:
            state.unify(value.axes[-1], unit)  # one axis for all layers: their units cannot move apart
    pieces = tuple((state.fixed(len(units)), x.axes[batch], unit) for unit in units)
    return [output, *(Value(pieces[0], stack=(0, pieces)) for _ in shapes[1:])]


def _joined(units: list[Layout]) -> Layout:
    return units[0] if len(units) == 1 else concatenate(units)
