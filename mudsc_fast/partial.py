"""Partial merges: the first spaces merged into one trunk, the rest kept for every model, in one module."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from mudsc_fast.arguments import check_plan
from mudsc_fast.axes import axis_labels
from mudsc_fast.installing import installed
from mudsc_fast.regrouping import regroup
from mudsc_fast.spec import PermutationSpec

if TYPE_CHECKING:
    from mudsc_fast.plan import MergePlan


def shared_spec(spec: PermutationSpec, state_dicts: Sequence[Mapping[str, Tensor]]) -> PermutationSpec:
    """The spec without the tensors that are not of one shape in all models, or that some lack: the tasks' own heads.

    With it models of different tasks can be matched. Raises ValueError if a space has nothing left that produces it.
    """
    shapes = [{name: tuple(state[name].shape) for name in state} for state in state_dicts]
    own = {name for name in spec.entries if len({s.get(name) for s in shapes}) > 1}
    spaces = []
    for space in spec.spaces:
        axes = tuple(axis for axis in space.axes if axis.tensor not in own)
        if not any(axis.role == "out" for axis in axes):
            raise ValueError(f"spec: nothing that all models have produces space {space.name!r}")
        spaces.append(replace(space, axes=axes))
    return PermutationSpec(tuple(spaces))


def merge_partially(
    models: Sequence[nn.Module],
    plan: MergePlan,
    spec: PermutationSpec | None = None,
    spaces: int | Sequence[str] | None = None,
) -> fx.GraphModule:
    """One module with the merged spaces as a common trunk and everything behind them once a model: a tuple of outputs.

    models: the parents, in the plan's order. plan: what `match` gave, perhaps for a `shared_spec`.
    spec: the spec of one model with its own head, by which that head reads the trunk; None: the plan's.
    spaces: how many of the plan's spaces are merged, counted from the first, or their names; None: all.

    A tensor is common if it produces merged spaces only; a step of the forward pass is common if all that it reads is.
    Layers that read merged spaces are kept for each model, in merged coordinates. The result is an ordinary module,
    traced with torch.fx: `torch.save` and its state dict work as for any other.

    Raises ValueError for models that torch.fx cannot trace, unknown spaces, and a cut through a layer that makes a
    merged space from one that is not: it names the layer and the cuts that are possible.
    """
    models = list(models)
    check_plan(plan)
    if len(models) != plan.models:
        raise ValueError(f"models: expected {plan.models}, one a model of the plan, got {len(models)}")
    full = plan.spec if spec is None else spec
    merged = _chosen(plan, spaces)
    common = _common(plan, merged)
    states = [model.state_dict() for model in models]
    everything = plan.merge([{n: s[n] for n in s if _everywhere(n, states)} for s in states])
    own = [_expressed(full, plan, merged, state, m) for m, state in enumerate(states)]
    for mine in own:
        mine.update({name: everything[name] for name in common})
    networks = [installed(model, state) for model, state in zip(models, own, strict=True)]
    try:
        graphs = [fx.symbolic_trace(net.eval()) for net in networks]
    except Exception as error:
        raise ValueError(f"models: torch.fx cannot trace {type(models[0]).__name__}: {error}") from error
    return _joined(graphs, common)


def _everywhere(name: str, states: Sequence[Mapping[str, Tensor]]) -> bool:
    return len({tuple(s[name].shape) if name in s else None for s in states}) == 1


def _chosen(plan: MergePlan, spaces: int | Sequence[str] | None) -> set[str]:
    names = [space.name for space in plan.spec.spaces]
    if spaces is None:
        return set(names)
    if isinstance(spaces, int):
        if isinstance(spaces, bool) or not 0 <= spaces <= len(names):
            raise ValueError(f"spaces: expected 0..{len(names)}, got {spaces!r}")
        return set(names[:spaces])
    unknown = set(spaces) - set(names)
    if unknown:
        raise ValueError(f"spaces: the plan has no space {sorted(unknown)[0]!r}; there are {', '.join(names)}")
    return set(spaces)


def _common(plan: MergePlan, merged: set[str]) -> set[str]:
    """Names of the tensors that produce merged spaces."""
    bad = _crossing(plan.spec, merged)
    if bad is not None:
        names = [space.name for space in plan.spec.spaces]
        cuts = [k for k in range(len(names) + 1) if _crossing(plan.spec, set(names[:k])) is None]
        raise ValueError(
            f"spaces: {bad} produces a merged space from one that is not merged; the first k spaces can be merged for "
            f"k in {', '.join(map(str, cuts))}"
        )
    return {
        name
        for name, entries in plan.spec.entries.items()
        if any(axis.role == "out" and space.name in merged for space, axis in entries)
    }


def _crossing(spec: PermutationSpec, merged: set[str]) -> str | None:
    for name, entries in spec.entries.items():
        out = any(axis.role == "out" and space.name in merged for space, axis in entries)
        if out and any(space.name not in merged for space, axis in entries):
            return name
    return None


def _expressed(
    spec: PermutationSpec, plan: MergePlan, merged: set[str], state: Mapping[str, Tensor], model: int
) -> dict[str, Tensor]:
    """One model's tensors, with the axes that read merged spaces in merged coordinates."""
    labels = {name: plan.labels[name][model] for name in merged}
    result = {}
    for name in state:
        x = state[name].detach()
        for axis in axis_labels(spec, name, x.shape, labels, plan.widths) if name in spec.entries else []:
            if axis.role == "in" and len(axis.dims) == 1:
                x = regroup(x, axis.labels.to(x.device), axis.dims[0], axis.size)
        result[name] = x
    return result


def _joined(graphs: Sequence[fx.GraphModule], common: set[str]) -> fx.GraphModule:
    """One graph: the steps that read common tensors and steps alone once, all others for every model."""
    root, graph = nn.Module(), fx.Graph()
    trunk: dict[str, fx.Node] = {}
    outputs: list[Any] = []
    kept = _tensor_users(graphs[0], common)
    for m, traced in enumerate(graphs):
        places: dict[fx.Node, fx.Node] = {}
        for node in traced.graph.nodes:
            if node.op == "output":
                outputs.append(fx.map_arg(node.args[0], lambda n: places[n]))  # noqa: B023 - used at once
                continue
            shared = node.name in kept
            if shared and m > 0:
                places[node] = trunk[node.name]
                continue
            new = graph.node_copy(node, lambda n: places[n])  # noqa: B023 - used at once
            new.type = None  # an annotation, which may be text that cannot be saved
            places[node] = new
            if shared:
                trunk[node.name] = new
            if node.op in ("call_module", "get_attr"):
                prefix = "trunk" if shared else f"branch{m}"
                new.target = f"{prefix}.{node.target}"
                _place(root, str(new.target), _found(traced, str(node.target)))
    graph.output(tuple(outputs))
    graph.lint()
    return fx.GraphModule(root, graph, "PartialMerge")


def _tensor_users(traced: fx.GraphModule, common: set[str]) -> set[str]:
    """Names of the steps that read nothing of a model's own."""
    kept: set[str] = set()
    for node in traced.graph.nodes:
        if node.op == "output":
            continue
        target = str(node.target)
        tensors: set[str] = set()
        if node.op == "call_module":
            tensors = {f"{target}.{name}" for name in traced.get_submodule(target).state_dict()}
        elif node.op == "get_attr":
            tensors = {target}
        counters = {name for name in tensors if name.endswith("num_batches_tracked")}
        if tensors - counters <= common and all(n.name in kept for n in node.all_input_nodes):
            kept.add(node.name)
    return kept


def _found(module: nn.Module, target: str) -> Any:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _place(root: nn.Module, target: str, value: Any) -> None:
    *parents, last = target.split(".")
    at = root
    for part in parents:
        if not hasattr(at, part):
            at.add_module(part, nn.Module())
        at = getattr(at, part)
    if isinstance(value, nn.Module):
        at.add_module(last, copy.deepcopy(value))
    elif isinstance(value, nn.Parameter):
        at.register_parameter(last, copy.deepcopy(value))
    elif isinstance(value, torch.Tensor):
        at.register_buffer(last, value.clone())
    else:
        setattr(at, last, value)
