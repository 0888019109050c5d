"""Specs found by tracing: torch.export, layouts of axes followed through the graph, spaces of what stays free.

See docs/tracing.md. The way of the data: graph (export, walk) -> table of rules (pointwise, shapes, products,
reductions, indexing) on layouts -> nesting -> drafts -> taps and names -> PermutationSpec.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from mudsc_fast.spaces import Axis, Frozen, Space
from mudsc_fast.spec import PermutationSpec
from mudsc_fast.tracing.drafts import Builder, Draft, order_of
from mudsc_fast.tracing.graph import Walk, export
from mudsc_fast.tracing.layouts import leaves
from mudsc_fast.tracing.names import Namer
from mudsc_fast.tracing.taps import Ports

__all__ = ["trace"]


def trace(
    model: nn.Module,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    select: Callable[[Any], Any] | None = None,
) -> PermutationSpec:
    """The spec of any model that torch.export can read (see PermutationSpec.trace)."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")
    given = tuple(args) if isinstance(args, (tuple, list)) else (args,)
    exported = export(model, given, kwargs or {}, select)
    walk = Walk(model, exported)
    builder = Builder(walk.state, {name: value.axes for name, value in walk.parameters.items()})
    names = list(model.state_dict())
    drafts = order_of(list(builder.drafts.values()), names)
    trained = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    rank = {name: value.dims for name, value in walk.parameters.items()}
    namer = Namer(walk.state, drafts, lambda name: rank[name] > 1)
    ports = Ports(walk, exported, builder.parents)
    spaces = []
    for draft in drafts:
        axes = tuple(a for axis in draft.axes for a in _named(axis, walk.aliases[axis.tensor], trained))
        key = draft.key
        spaces.append(
            Space(namer.name(draft), key.width, axes, ports.taps(draft), blocks=key.blocks, tie=namer.tie(draft))
        )
    return PermutationSpec(tuple(spaces), tuple(_frozen(model, walk, drafts)))


def _named(axis: Axis, aliases: Sequence[str], trained: set[str]) -> list[Axis]:
    """An axis under each name of its tensor; what is not trained moves, but is not compared."""
    return [replace(axis, tensor=name, compare=name in trained) for name in aliases]


def _frozen(model: nn.Module, walk: Walk, drafts: Sequence[Draft]) -> list[Frozen]:
    """Each dim that is left alone, in whole or in part, and why."""
    found = []
    moved = {
        (a.tensor, d) for draft in drafts for a in draft.axes for d in ([a.dim] if isinstance(a.dim, int) else a.dim)
    }
    first = {alias: name for name, aliases in walk.aliases.items() for alias in aliases}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor) or not tensor.dim():
            continue
        if name not in first:
            found += [Frozen(name, d, "not used in this forward pass") for d in range(tensor.dim())]
            continue
        for dim, axis in enumerate(walk.parameters[first[name]].axes):
            reasons = list(dict.fromkeys(a.frozen for a in leaves(axis) if a.frozen is not None))
            if reasons:
                part = "in part: " if (first[name], dim) in moved else ""
                found.append(Frozen(name, dim, part + reasons[0]))
    return found
