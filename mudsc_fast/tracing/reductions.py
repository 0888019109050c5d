"""Rules of norms, sums, softmax, pooling and other operations that mix what lies along some dims."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mudsc_fast.tracing.layouts import fresh, size_of, slice_of
from mudsc_fast.tracing.pointwise import each_position
from mudsc_fast.tracing.state import State, Value
from mudsc_fast.tracing.table import Result, Shapes, rule


def _dims(value: Value, dim: Any) -> list[int]:
    if dim is None or dim == []:
        return list(range(value.dims))
    return [d % value.dims for d in (dim if isinstance(dim, (list, tuple)) else [dim])] if value.dims else []


def _reduced(value: Value, dims: list[int], keep: bool) -> Value:
    if not keep:
        return value.pick([d for d in range(value.dims) if d not in dims])
    for d in dims:
        value = value.with_axis(d, ())
    return value


@rule(
    "sum",
    "mean",
    "amax",
    "amin",
    "var",
    "std",
    "prod",
    "any",
    "all",
    "logsumexp",
    "linalg_vector_norm",
    "norm",
    "nansum",
    "count_nonzero",
    "var_mean",
    "std_mean",
)
def reduce(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """A symmetric function of all positions along some dims."""
    value: Value = args["self"]
    dims = _dims(value, args.get("dim"))
    result = _reduced(value, dims, len(shapes[0]) == value.dims)
    return [result] * len(shapes) if len(shapes) > 1 else result


@rule("max", "min", "argmax", "argmin", "median", "mode")
def extreme(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """The extreme along a dim and where it is; of two values, position by position."""
    if isinstance(args.get("other"), Value):
        return each_position(state, args, shapes)
    value: Value = args["self"]
    dims = _dims(value, args.get("dim"))
    result = _reduced(value, dims, len(shapes[0]) == value.dims)
    if args.get("dim") is None:
        state.freeze(*(value.axes[d] for d in dims))  # the place in all positions together, where one is asked for
        return result
    place = Value(result.axes, value.dynamic, index_of=value.axes[dims[0]] or None)
    return [result, place] if len(shapes) > 1 else (place if "dtype" not in args and _is_place(args) else result)


def _is_place(args: Mapping[str, Any]) -> bool:
    return "keepdim" in args


@rule("softmax", "log_softmax", "_softmax", "_log_softmax")
def softmax(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """Each position over a sum along the dim."""
    value: Value = args.get("self", args.get("input"))
    state.mix(value, args["dim"])
    state.name_softmax(value.axes[args["dim"]])
    return value


@rule("glu")
def glu(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """The first half of a dim times a function of the second."""
    value: Value = args["self"]
    dim = args["dim"] % value.dims
    size = size_of(value.axes[dim])
    halves = [slice_of(value.axes[dim], a, b, state.reason) for a, b in ((0, size // 2), (size // 2, size))]
    state.unify(*halves)
    return value.with_axis(dim, halves[0])


@rule("cumsum", "cumprod", "cummax", "logcumsumexp", "diff", "sort", "argsort", "msort")
def ordered(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """Operations in the order of a dim, which is frozen."""
    value: Value = args["self"]
    dim = args.get("dim", -1) % max(value.dims, 1)
    if value.dims:
        state.freeze(value.axes[dim])
        state.mix(value, dim)
    results = [value.with_axis(dim, state.fixed(shape[dim])) if value.dims else value for shape in shapes]
    return results if len(shapes) > 1 else results[0]


@rule("layer_norm", "rms_norm", "native_layer_norm")
def layer_norm(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """The last dims are normed together; weight and bias of their shape."""
    x: Value = args["input"]
    last = len(args["normalized_shape"])
    state.mix(x, *range(x.dims - last, x.dims))
    for part in (args["weight"], args.get("bias")):
        if part is not None:
            for d in range(-last, 0):
                state.unify(x.axes[d], part.axes[d])
    if len(shapes) > 1:
        rest = Value(tuple(x.axes[:-last]) + ((),) * last)
        return [x, rest, rest]
    return x


@rule("batch_norm", "_native_batch_norm_legit_no_training", "native_batch_norm", "instance_norm", "cudnn_batch_norm")
def batch_norm(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """A weight, bias, mean and variance a channel (dim 1); positions and batch may be normed over."""
    x: Value = args["input"]
    state.mix(x, *(d for d in range(x.dims) if d != 1))
    for key in ("weight", "bias", "running_mean", "running_var"):
        part = args.get(key)
        if part is not None:
            state.unify(x.axes[1], part.axes[0])
    return [x] + [Value(tuple(state.fixed(s) for s in shape)) for shape in shapes[1:]] if len(shapes) > 1 else x


@rule("group_norm", "native_group_norm")
def group_norm(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """Groups of channels (dim 1) and all positions are normed together."""
    x: Value = args["input"]
    groups = args["num_groups"] if "num_groups" in args else args["group"]
    for part in (args["weight"], args["bias"]):
        if part is not None:
            state.unify(x.axes[1], part.axes[0])
    group = fresh(groups)
    state.unify(x.axes[1], group + fresh(size_of(x.axes[1]) // groups))
    state.record((x.axes[0], group))
    return [x] + [Value((x.axes[0], group))] * (len(shapes) - 1) if len(shapes) > 1 else x


_POOLS = [f"{kind}_pool{n}d" for kind in ("avg", "max", "adaptive_avg", "adaptive_max", "lp") for n in (1, 2, 3)]
_SCALED = [
    f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "bilinear2d", "bicubic2d", "linear1d", "trilinear3d")
]


@rule(
    *_POOLS,
    *_SCALED,
    "max_pool2d_with_indices",
    "reflection_pad1d",
    "reflection_pad2d",
    "replication_pad2d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
    "upsample_nearest_exact2d",
    "unfold",
)
def over_positions(state: State, args: Mapping[str, Any], shapes: Shapes) -> Result:
    """Pooling, interpolation: the positions (dims that change or lie behind the channels) are frozen."""
    x: Value = args.get("self", args.get("input"))
    first = x.dims - min(2, max(1, x.dims - 2))
    if len(shapes[0]) != x.dims:  # unfold
        state.freeze_value(x)
        return Value(tuple(state.fixed(s) for s in shapes[0]))
    spatial = range(min(first, 2) if x.dims > 3 else first, x.dims)
    state.freeze(*(x.axes[d] for d in spatial))
    state.mix(x, *spatial)
    result = Value((*x.axes[: spatial.start], *(state.fixed(s) for s in shapes[0][spatial.start :])))
    return [result] * len(shapes) if len(shapes) > 1 else result
