"""The table of rules: for each ATen operation, how the layouts of its results follow from those of its arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from mudsc_fast.tracing.layouts import Layout
from mudsc_fast.tracing.state import NOWHERE, OPAQUE, State, Tag, Value

Shapes = list[tuple[int, ...]]
Result = Value | Sequence[Value | None] | None
Rule = Callable[[State, Mapping[str, Any], Shapes], Result]

RULES: dict[str, Rule] = {}
STACK_AWARE: set[str] = set()
INDEX_AWARE: set[str] = set()


def rule(*names: str, stack: bool = False, index: bool = False) -> Callable[[Rule], Rule]:
    """Enter a rule for operations by name, without overload (`aten::` is understood).

    The rule gets the state, the arguments by their names in the schema (tensors as Values) and the shapes of the
    results. stack: it understands values with a stack; index: values that are indices into a layout.
    """

    def enter(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise ValueError(f"two rules for {name!r}")
            RULES[name] = function
        STACK_AWARE.update(names if stack else ())
        INDEX_AWARE.update(names if index else ())
        return function

    return enter


def values_in(args: Any) -> Iterator[Value]:
    """All values in nested arguments."""
    if isinstance(args, Value):
        yield args
    elif isinstance(args, Mapping):
        for item in args.values():
            yield from values_in(item)
    elif isinstance(args, (list, tuple)):
        for item in args:
            yield from values_in(item)


def frozen_result(state: State, shapes: Shapes) -> list[Value | None]:
    """Results of which nothing may be reordered."""
    return [Value(tuple(state.fixed(s) for s in shape)) for shape in shapes]


def _prepare(state: State, name: str, args: Any) -> Any:
    if isinstance(args, Value):
        if args.index_of is not None and name not in INDEX_AWARE:
            state.freeze(args.index_of)
        return args if name in STACK_AWARE else state.collapse(args)
    if isinstance(args, (list, tuple)):
        return [_prepare(state, name, item) for item in args]
    return args


def apply_rule(
    state: State, op: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], shapes: Shapes | None
) -> Result:
    """The results of one operation. shapes: of its results; None if one is not known.

    An operation without a rule, of unknown shapes or on opaque values freezes all that it touches.
    """
    from mudsc_fast.tracing.pointwise import pointwise

    name = op._schema.name.removeprefix("aten::")
    named: dict[str, Any] = {a.name: a.default_value for a in op._schema.arguments if a.has_default_value()}
    named.update(zip((a.name for a in op._schema.arguments), args, strict=False))
    named.update(kwargs)
    values = list(values_in(named))
    found = RULES.get(name) or RULES.get(name.removesuffix("_"))
    if found is None and torch.Tag.pointwise in op.tags:
        found = pointwise
    if shapes is None or found is None or any(v.opaque for v in values):
        for value in values:
            state.freeze_value(value)
        return OPAQUE if shapes is None else frozen_result(state, shapes)
    result = found(state, {key: _prepare(state, name, value) for key, value in named.items()}, shapes)
    state.written |= op._schema.is_mutable
    if any(v.dynamic for v in values) and name != "index":  # weights picked by tokens keep their origins
        result = _as_dynamic(result)
    return _tagged(name, torch.Tag.pointwise in op.tags, values, named, result)


def _as_dynamic(result: Result) -> Result:
    if isinstance(result, Value):
        return result if result.dynamic and not result.origins else _dynamic(result)
    return [_dynamic(v) if isinstance(v, Value) else v for v in result] if result is not None else None


_SIDE_BY_SIDE = {"to", "clone", "contiguous", "dropout", "softmax", "chunk", "split", "split_with_sizes", "_to_copy"}


def _tagged(name: str, pointwise: bool, values: Sequence[Value], args: Mapping[str, Any], result: Result) -> Result:
    """The results with the tags of the arguments, where an operation keeps each position of the tagged dim in place.

    Nothing more than a freedom is lost where they are dropped.
    """
    if name == "index" or not any(v.tags for v in values):
        return result
    kept: dict[tuple[Layout, int], set[int]] = {}
    for value in values:
        for tag in value.tags:
            kept.setdefault((tag.layout, tag.key), set()).add(_from_end(name, pointwise, value, tag.dim, args))

    def tagged(item: Value | None) -> Value | None:
        if item is None:
            return None
        places = {key: next(iter(ends)) for key, ends in kept.items() if len(ends) == 1}
        tags = tuple(Tag(*key, item.dims - end) for key, end in places.items() if 0 < end <= item.dims)
        return replace(item, tags=tags)

    return tagged(result) if isinstance(result, Value) or result is None else [tagged(item) for item in result]


def _from_end(name: str, pointwise: bool, value: Value, dim: int, args: Mapping[str, Any]) -> int:
    """Where a tagged dim of an argument lies in the results, counted from their end; 0 if it is lost."""
    end = value.dims - dim
    along = args.get("dim")
    if pointwise or name in _SIDE_BY_SIDE:
        return 0 if isinstance(along, int) and along % value.dims == dim else end
    if name == "squeeze" and isinstance(along, int):
        return end - int(along % value.dims > dim)
    if name == "unsqueeze":
        return end + int(args["dim"] % (value.dims + 1) > dim)
    if name in ("bmm", "matmul"):
        return end if end > 2 else 0
    if name == "permute":
        return value.dims - [d % value.dims for d in args["dims"]].index(dim)
    if name == "transpose" and isinstance(args.get("dim0"), int):
        a, b = args["dim0"] % value.dims, args["dim1"] % value.dims
        return value.dims - (b if dim == a else a if dim == b else dim)
    return 0


def _dynamic(value: Value) -> Value:
    return replace(value, dynamic=True, origins=())


__all__ = ["NOWHERE", "RULES", "Result", "Rule", "Shapes", "apply_rule", "frozen_result", "rule", "values_in"]
