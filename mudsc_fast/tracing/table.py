"""The table of rules: for each ATen operation, how the layouts of its results follow from those of its arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from mudsc_fast.tracing.state import NOWHERE, OPAQUE, State, Value

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
    if not any(v.dynamic for v in values) or name == "index":  # weights picked by tokens keep their origins
        return result
    return _as_dynamic(result)


def _as_dynamic(result: Result) -> Result:
    if isinstance(result, Value):
        return result if result.dynamic and not result.origins else _dynamic(result)
    return [_dynamic(v) if isinstance(v, Value) else v for v in result] if result is not None else None


def _dynamic(value: Value) -> Value:
    return replace(value, dynamic=True, origins=())


__all__ = ["NOWHERE", "RULES", "Result", "Rule", "Shapes", "apply_rule", "frozen_result", "rule", "values_in"]
