"""Rules of operations that act on each position alone, make constants, or change nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mudsc_fast.tracing.layouts import Layout, fresh
from mudsc_fast.tracing.state import NOWHERE, Origins, State, Value
from mudsc_fast.tracing.table import Result, Shapes, rule, values_in


def broadcast(state: State, values: Sequence[Value], shape: Sequence[int]) -> Value:
    """Values combined position by position."""
    axes: list[Layout] = []
    origins: list[Origins] = []
    dynamic = any(v.dynamic for v in values)
    for d in range(-len(shape), 0):
        layout: Layout | None = None
        source: Origins = NOWHERE
        for value in values:
            if value.dims >= -d and value.axes[d]:
                source |= value.origin(d)
                if layout is None:
                    layout = value.axes[d]
                else:
                    state.unify(layout, value.axes[d])
        axes.append(layout if layout is not None else fresh(shape[d]))
        origins.append(source)
    return Value(tuple(axes), dynamic, () if dynamic else tuple(origins))


def pointwise(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """Any operation that torch tags as pointwise."""
    return broadcast(state, list(values_in(args)), shapes[0])


@rule(
    "where",
    "masked_fill",
    "dropout",
    "feature_dropout",
    "fill",
    "zero",
    "copy",
    "rrelu",
    "threshold",
    "lerp",
    "nan_to_num",
    "__and__",
    "__or__",
    "__xor__",
    "isnan",
    "isinf",
    "isfinite",
    "softplus",
    "log_sigmoid",
    "square",
    "selu",
    "relu6",
    "hardswish",
    "hardsigmoid",
    "celu",
    "erf",
    "float_power",
    "clamp",
    "clip",
    "rsub",
    "divide",
    "multiply",
    "subtract",
    "true_divide",
    "silu",
    "mish",
    "gelu",
    "logaddexp",
    "absolute",
    "negative",
    "softsign",
    "special_expit",
    "special_erf",
    "logical_and",
    "logical_or",
    "logical_not",
    "less",
    "greater",
    "greater_equal",
    "less_equal",
    "not_equal",
    "feature_alpha_dropout",
    "alpha_dropout",
)
def each_position(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """Pointwise operations that do not have torch's tag."""
    return broadcast(state, list(values_in(args)), shapes[0])


@rule(
    "clone",
    "contiguous",
    "alias",
    "detach",
    "detach_",
    "lift_fresh_copy",
    "lift_fresh",
    "type_as",
    "to",
    "_to_copy",
    "positive",
    "resolve_conj",
    "resolve_neg",
    "requires_grad_",
    "float",
    "int",
    "long",
    stack=True,
    index=True,
)
def same(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """Operations that keep every number where it is."""
    return next(values_in(args))


@rule("prelu")
def prelu(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """A slope a channel (dim 1), or one for all."""
    x: Value = args["self"]
    weight: Value = args["weight"]
    if weight.dims and weight.axes[0] and x.dims > 1:
        state.unify(x.axes[1], weight.axes[0])
    return x


@rule(
    "zeros",
    "ones",
    "full",
    "empty",
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "scalar_tensor",
)
def filled(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """Constants that are the same everywhere may be reordered at will."""
    return Value(tuple(fresh(s) for s in shapes[0]), dynamic=False, uniform=True)


@rule("arange", "linspace", "eye", "tril_indices", "triu_indices", "hann_window", "logspace")
def counted(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """Constants that depend on the position."""
    return Value(tuple(state.fixed(s) for s in shapes[0]), dynamic=False)


@rule("tril", "triu", "diagonal", "diag_embed", "trace", "diag")
def by_position(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """Operations that depend on where in the last two dims a number stands."""
    x: Value = args["self"]
    state.freeze(*x.axes[-2:])
    if x.dims > 2:
        state.mix(x, -1, -2)
    if len(shapes[0]) == x.dims:
        return x
    state.freeze(*x.axes)
    return Value(tuple(state.fixed(s) for s in shapes[0]))


@rule(
    "_assert_tensor_metadata",
    "_assert_async",
    "_assert_scalar",
    "sym_constrain_range_for_size",
    "sym_constrain_range",
    index=True,
    stack=True,
)
def nothing(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """Checks."""
    return None
