"""The exported graph of a model, and the walk along it that applies the rules."""

from __future__ import annotations

import operator
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from mudsc_fast.law import primary
from mudsc_fast.tracing import indexing, pointwise, products, reductions  # noqa: F401  (they fill the table)
from mudsc_fast.tracing.layouts import fresh, size_of
from mudsc_fast.tracing.shapes import stacked
from mudsc_fast.tracing.state import OPAQUE, Origin, State, Value
from mudsc_fast.tracing.table import apply_rule, values_in

_PREFIX = "model"
_RESHAPES = {"view", "reshape", "unflatten", "_unsafe_view"}
_FOLLOWED = {"permute", "transpose", "contiguous", "clone", "squeeze", "unsqueeze"}


class _Wrapped(nn.Module):
    """The model with only those outputs that count."""

    def __init__(self, model: nn.Module, select: Callable[[Any], Any]) -> None:
        super().__init__()
        self.model = model
        self._select = select

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._select(self.model(*args, **kwargs))


@dataclass
class Exported:
    """A graph and what is known of its model.

    calls: how often each module was called. ports: the shape of the first tensor at (module, "input" or "output").
    """

    program: torch.export.ExportedProgram
    calls: Counter[str] = field(default_factory=Counter)
    ports: dict[tuple[str, str], tuple[int, ...]] = field(default_factory=dict)


# Settings of Hugging Face configs while a model is exported: no cache among the outputs, and experts as plain products
# of weights picked by token. Their default sorts tokens by expert, in which the expert axis cannot be followed.
_SETTINGS = {"use_cache": False, "_experts_implementation": "batched_mm"}


@contextmanager
def _set_up(model: nn.Module) -> Iterator[None]:
    """Eval mode, settings under which a graph can be read, no grad; all as before afterwards."""
    modes = {m: m.training for m in model.modules()}
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before = [(c, k, getattr(c, k)) for c in configs.values() for k in _SETTINGS if getattr(c, k, None) is not None]
    model.eval()
    try:
        for config, key, _ in before:
            setattr(config, key, _SETTINGS[key])
        with torch.no_grad():
            yield
    finally:
        for config, key, value in before:
            setattr(config, key, value)
        for module, training in modes.items():
            module.training = training


def export(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], select: Callable[[Any], Any] | None
) -> Exported:
    """The model's graph; ValueError, with what torch.export said, if it cannot be exported."""
    wrapped = _Wrapped(model, select or primary)
    found: dict[str, Any] = {"calls": Counter(), "ports": {}}
    handles = []

    def watch(name: str) -> None:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            found["calls"][name] += 1
            for port, value in (("input", (args, kwargs)), ("output", output)):
                tensor = _first_tensor(value)
                if tensor is not None:
                    found["ports"][name, port] = tuple(tensor.shape)

        handles.append(model.get_submodule(name).register_forward_hook(hook, with_kwargs=True))

    for name, _ in model.named_modules():
        watch(name)
    try:
        with _set_up(model), warnings.catch_warnings():
            # Recurrent layers keep a list of their own weights, which export sees change.
            warnings.filterwarnings("ignore", "The tensor attributes .* were assigned during export")
            program = torch.export.export(wrapped, args, dict(kwargs), strict=False)
    except Exception as error:  # torch.export raises errors of many kinds, its own and the model's
        raise ValueError(
            f"trace: torch.export cannot export this model ({type(error).__name__}: {_first_line(error)}); "
            "write its spec by hand (docs/tracing.md)"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return Exported(program, **found)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")[:300]


def _first_tensor(value: Any) -> Tensor | None:
    """What a hook takes for a module's input or output."""
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    if isinstance(value, Tensor):
        return value
    return next((t for item in items if (t := _first_tensor(item)) is not None), None)


def module_path(node: fx.Node) -> str:
    """The innermost module in which a node was made."""
    scopes = scopes_of(node)
    return scopes[-1] if scopes else ""


def scopes_of(node: fx.Node) -> list[str]:
    """Names of the modules in which a node was made, outermost first."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    names = [str(path).partition("@")[0] for path, _ in stack]
    return [name.removeprefix(_PREFIX).removeprefix(".") for name in names if name.startswith(_PREFIX)]


def _shapes(value: Any) -> list[tuple[int, ...]] | None:
    """Shapes of a node's results; None if one depends on data."""
    items = value if isinstance(value, (list, tuple)) else [value]
    shapes = []
    for item in items:
        if isinstance(item, Tensor):
            if not all(isinstance(s, int) for s in item.shape):
                return None
            shapes.append(tuple(item.shape))
    return shapes


class Walk:
    """The rules applied to a whole graph: the value of every node, and the state that they leave behind."""

    def __init__(self, model: nn.Module, exported: Exported) -> None:
        self.state = State()
        self.values: dict[fx.Node, Any] = {}
        self.parameters: dict[str, Value] = {}
        self.aliases: dict[str, list[str]] = {}
        self._model = model
        self._stacks = _stack_dims(exported.program.graph_module)
        self._inputs(exported.program)
        graph = exported.program.graph
        outputs = self._run(exported.program.graph_module, {})
        self.state.reason = "an output of the model"
        for value in values_in(outputs):
            self.state.freeze_value(value)
        self.graph = graph

    def _inputs(self, program: torch.export.ExportedProgram) -> None:
        """Values of the placeholders: parameters and moving statistics may be reordered, all else is frozen."""
        by_id: dict[int, list[str]] = defaultdict(list)
        for name, tensor in self._model.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor):
                by_id[id(tensor)].append(name)
        live = _live(program.graph_module)
        kept = {name: names for names in by_id.values() for name in names}
        nodes = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
        specs = [(s, str(getattr(s.arg, "name", "")), str(s.target or "")) for s in program.graph_signature.input_specs]
        used = {target.removeprefix(_PREFIX + ".") for _, name, target in specs if nodes.get(name) in live}
        for spec in program.graph_signature.input_specs:
            name = str(getattr(spec.arg, "name", ""))
            target = str(spec.target or "").removeprefix(_PREFIX + ".")
            node = nodes.get(name)
            if node is None:
                continue
            shapes = _shapes(node.meta.get("val"))
            if not shapes:
                self.values[node] = node.meta.get("val") if shapes is not None else OPAQUE
                continue
            names = kept.get(target)
            if names is not None and names[0] in self.parameters:
                self.values[node] = self.parameters[names[0]]
                continue
            fixed = _why_fixed(self._model, spec.kind.name, target, name, node.meta["val"], names)
            if fixed is None and not used & set(names or ()):
                fixed = "not used in this forward pass"
            value = Value(
                tuple(fresh(s, fixed) for s in shapes[0]),
                spec.kind.name == "USER_INPUT",
                tuple(frozenset([Origin(names[0], d)]) if names else frozenset() for d in range(len(shapes[0]))),
            )
            self.values[node] = value
            self.state.record(value.axes)
            if names is not None:
                self.parameters[names[0]] = value
                self.aliases[names[0]] = names

    def _run(self, module: fx.GraphModule, given: Mapping[fx.Node, Any]) -> Any:
        self.values.update(given)
        live = _live(module)
        for node in module.graph.nodes:
            if node.op == "output":
                return fx.node.map_arg(node.args[0], self._value)
            if node.op == "call_function" and node in live:
                where = module_path(node)
                self.state.reason = f"{_short(node)}{f' in {where}' if where else ''}"
                self.values[node] = self._call(module, node)
                for value in values_in(self.values[node]):
                    for axes in value.stack[1] if value.stack else (value.axes,):
                        self.state.record(axes + value.beside())
            elif node.op == "get_attr" and node not in self.values:
                self.values[node] = self._attribute(module, node)
        return ()

    def _attribute(self, module: fx.GraphModule, node: fx.Node) -> Any:
        found: Any = module
        for part in str(node.target).split("."):
            found = getattr(found, part)
        if isinstance(found, Tensor):
            return Value(tuple(fresh(s, "a constant of the model") for s in found.shape), dynamic=False)
        return found

    def _value(self, node: fx.Node) -> Any:
        return self.values.get(node, node.meta.get("val"))

    def _call(self, module: fx.GraphModule, node: fx.Node) -> Any:
        args: Any = fx.node.map_arg(node.args, self._value)
        kwargs: Any = fx.node.map_arg(node.kwargs, self._value)
        if node.target is operator.getitem:
            return args[0][args[1]] if isinstance(args[0], (list, tuple)) else args[0]
        if isinstance(node.target, torch._ops.OpOverload):
            return self._operation(node, args, kwargs)
        inner = [a for a in args if isinstance(a, fx.GraphModule)]
        if len(inner) == 1 and str(node.target).startswith("wrap_with_"):
            places = [n for n in inner[0].graph.nodes if n.op == "placeholder"]
            given = list(args[args.index(inner[0]) + 1 :])
            return self._run(inner[0], dict(zip(places, given, strict=True)))
        if not list(values_in([args, kwargs])):
            return node.meta.get("val")
        return self._unknown(node, [args, kwargs])

    def _operation(self, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        shapes = _shapes(node.meta.get("val"))
        dim = self._stacks.get(node)
        if dim is not None and shapes and isinstance(args[0], Value) and not args[0].opaque:
            return stacked(self.state, self.state.collapse(args[0]), shapes[0], dim)
        try:
            result = apply_rule(self.state, node.target, args, kwargs, shapes)  # type: ignore[arg-type]
        except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
            self.state.reason += f" (used in an unknown way: {type(error).__name__})"
            return self._unknown(node, [args, kwargs])
        if not self._fits(result, shapes):
            return self._unknown(node, [args, kwargs])
        if isinstance(result, list) and len(result) == 1 and isinstance(node.meta.get("val"), Tensor):
            return result[0]
        return result

    def _fits(self, result: Any, shapes: list[tuple[int, ...]] | None) -> bool:
        found = [v for v in values_in(result) if not v.opaque]
        if shapes is None or not found:
            return True
        return [_sizes(v) for v in found] == [list(s) for s in shapes[: len(found)]]

    def _unknown(self, node: fx.Node, used: Any) -> Any:
        for value in values_in(used):
            self.state.freeze_value(value)
        shapes = _shapes(node.meta.get("val"))
        if shapes is None:
            return OPAQUE
        results = [Value(tuple(self.state.fixed(s) for s in shape)) for shape in shapes]
        return results if isinstance(node.meta.get("val"), (list, tuple)) else (results[0] if results else None)


def _sizes(value: Value) -> list[int]:
    return [size_of(axis) for axis in value.axes]


def _live(module: fx.GraphModule) -> set[fx.Node]:
    """The nodes on which the outputs depend, and all that may write in place."""
    todo = [n for n in module.graph.nodes if n.op == "output" or _writes(n)]
    live = set(todo)
    while todo:
        new = [n for n in todo.pop().all_input_nodes if n not in live]
        live.update(new)
        todo += new
    return live


def _writes(node: fx.Node) -> bool:
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable)
    return node.op == "call_function" and node.target is not operator.getitem


def _short(node: fx.Node) -> str:
    name = getattr(getattr(node.target, "_schema", None), "name", str(node.target))
    return str(name).removeprefix("aten::")


def _why_fixed(
    model: nn.Module, kind: str, target: str, name: str, tensor: Tensor, names: Sequence[str] | None
) -> str | None:
    """Why a placeholder's axes are frozen; None for parameters, and for buffers of norms with running statistics."""
    if kind == "USER_INPUT":
        return f"input {name} of the model"
    if not tensor.dtype.is_floating_point:
        return f"{target}: integers"
    if kind == "PARAMETER":
        return None
    if names is None:
        return f"a constant, {target or name}"
    owner = model.get_submodule(target.rpartition(".")[0])
    return None if hasattr(owner, "running_mean") else f"a buffer, {target}"


def _stack_dims(module: fx.GraphModule) -> dict[fx.Node, int]:
    """Reshapes that make a dim which is then only taken apart, index by index, and that dim."""
    found = {}
    for node in module.graph.nodes:
        if node.op != "call_function" or _short(node) not in _RESHAPES:
            continue
        shape = node.meta["val"].shape
        source = node.args[0].meta["val"].shape
        if len(shape) <= len(source):
            continue
        dims = [d for d in range(len(shape)) if isinstance(shape[d], int) and 2 <= shape[d] <= 8 and _apart(node, d)]
        if len(dims) == 1:
            found[node] = dims[0]
    return found


def _apart(node: fx.Node, dim: int) -> bool:
    """Is a dim of a node only ever selected from?"""
    if not node.users:
        return False
    rank = len(node.meta["val"].shape)
    for user in node.users:
        name = _short(user)
        if name in ("select", "unbind"):
            if int(user.args[1] if len(user.args) > 1 else user.kwargs.get("dim", 0)) % rank != dim:  # type: ignore[arg-type]
                return False
        elif name in _FOLLOWED:
            if not _apart(user, _moved_to(user, dim, rank)):
                return False
        else:
            return False
    return True


def _moved_to(node: fx.Node, dim: int, rank: int) -> int:
    """Where a dim goes when a node moves dims; -1 if it cannot be told."""
    name = _short(node)
    if name in ("contiguous", "clone"):
        return dim
    if name == "permute":
        return [int(d) % rank for d in node.args[1]].index(dim)  # type: ignore[union-attr, arg-type]
    if name in ("squeeze", "unsqueeze"):
        after = len(node.meta["val"].shape)
        at = node.args[1] if len(node.args) > 1 else None
        if not isinstance(at, int):
            return -1
        at %= max(rank, after)
        return dim + (at <= dim) if after > rank else dim - (at < dim) if after < rank else dim
    if name == "transpose":
        a, b = (int(d) % rank for d in node.args[1:3])  # type: ignore[arg-type]
        return b if dim == a else a if dim == b else dim
    return -1


__all__ = ["Exported", "Walk", "export", "module_path", "scopes_of"]
