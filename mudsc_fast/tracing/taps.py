"""Module ports where the units of traced spaces are seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple

from torch import fx

from mudsc_fast.spaces import Tap
from mudsc_fast.tracing.drafts import Draft, Key, find
from mudsc_fast.tracing.graph import Exported, Walk, scopes_of
from mudsc_fast.tracing.layouts import Atom, size_of
from mudsc_fast.tracing.lines import Line, lines_of, place, visible
from mudsc_fast.tracing.state import Value
from mudsc_fast.tracing.table import values_in

_ENOUGH = 4  # a layer's input is the tap if it has a quarter of the samples there are: a pooling takes no more


class _Port(NamedTuple):
    module: str
    port: str


class Ports:
    """The ports of every node, and the taps of spaces."""

    def __init__(self, walk: Walk, exported: Exported, parents: Mapping[Atom, Atom]) -> None:
        self._walk = walk
        self._exported = exported
        self._parents = parents
        self._order = {node: k for k, node in enumerate(walk.graph.nodes)}
        self._ports: dict[fx.Node, list[_Port]] = {}
        self._inside: dict[str, list[fx.Node]] = {}
        for node in walk.graph.nodes:
            if node.op == "call_function":
                for scope in scopes_of(node):
                    self._inside.setdefault(scope, []).append(node)
        for name, nodes in self._inside.items():
            if exported.calls[name] == 1:
                self._add(name, nodes)

    def _add(self, name: str, nodes: Sequence[fx.Node]) -> None:
        inner = set(nodes)
        entering = [n for node in nodes for n in node.all_input_nodes if n not in inner and self._activation(n)]
        leaving = [node for node in nodes if any(user not in inner for user in node.users)]
        for port, found in (("input", entering), ("output", leaving)):
            if len(set(found)) == 1 and self._shape(found[0]) == self._exported.ports.get((name, port)):
                self._ports.setdefault(found[0], []).append(_Port(name, port))

    def _activation(self, node: fx.Node) -> bool:
        value = self._walk.values.get(node)
        return isinstance(value, Value) and value.dynamic

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        value = self._walk.values.get(node)
        return tuple(size_of(axis) for axis in value.axes) if isinstance(value, Value) else ()

    def taps(self, draft: Draft) -> tuple[Tap, ...]:
        """The input of the layer that reads the units, or where they are seen last with the most samples; for units
        that no layer reads, the outputs of the layers that make them. Rather where nothing else moves beside them:
        samples are paired by position, which other units of two models are not.
        """
        readers = {a.tensor.rpartition(".")[0] for a in draft.axes if a.role == "in"}
        if not readers:
            return self._made(draft)
        carrying = {n: tap for n in self._ports if (tap := self._seen(draft.key, n)) is not None}
        if not carrying:
            return ()
        carrying = {n: tap for n, tap in carrying.items() if self._paired(draft.key, n)} or carrying
        samples = {n: prod(self._shape(n)) for n in carrying}
        most = max(samples.values())
        read = [n for n in carrying if any(p.module in readers and p.port == "input" for p in self._ports[n])]
        if len(read) == 1 and samples[read[0]] * _ENOUGH >= most:
            port = next(p for p in self._ports[read[0]] if p.module in readers and p.port == "input")
            return (_at(carrying[read[0]], port),)
        last = max((n for n in carrying if samples[n] == most), key=self._order.__getitem__)
        outputs = [p for p in self._ports[last] if p.port == "output"]
        port = max(outputs or self._ports[last], key=lambda p: p.module.count(".") + bool(p.module))
        return (_at(carrying[last], port),)

    def _made(self, draft: Draft) -> tuple[Tap, ...]:
        """The outputs of the layers that make the units, of each chain of them the last."""
        makers = {a.tensor.rpartition(".")[0] for a in draft.axes}
        found: dict[fx.Node, list[Tap]] = {}
        for node, ports in self._ports.items():
            for port in ports:
                if port.module in makers and port.port == "output":
                    found[node] = [_at(tap, port) for tap in self._several(draft.key, node)]
        late = [n for n in found if not self._reaches(draft.key, n, set(found) - {n})]
        return tuple(tap for node in sorted(late, key=self._order.__getitem__) for tap in found[node])

    def _seen(self, key: Key, node: fx.Node) -> Tap | None:
        """Where the units are on a node's value, if in one place; a tap without a module."""
        found = self._several(key, node)
        return found[0] if len(found) == 1 else None

    def _several(self, key: Key, node: fx.Node) -> list[Tap]:
        """All places of the units on a node's value (of queries and keys on a fused layer's)."""
        value = self._walk.values.get(node)
        if not isinstance(value, Value) or not value.dynamic or value.opaque or value.stack is not None:
            return []
        return [
            Tap("", "output", -1 if dim == value.dims - 1 else dim, *place(*hit))
            for dim, axis in enumerate(value.axes)
            for line in lines_of(axis)
            if key.inner is not None or not self._filled(key, line)
            for hit in find(key, line)
        ]

    def _paired(self, key: Key, node: fx.Node) -> bool:
        """Are the units seen with no other space's units among their samples?"""
        value = self._walk.values[node]
        if not isinstance(value, Value):
            return False
        lines = [lines_of(axis) for axis in value.axes]
        beside: set[Atom] = set()
        for dim, own in enumerate(lines):
            hits = [hit for line in own for hit in find(key, line)]
            if hits:
                beside |= visible([less for less, _ in hits])
                beside |= visible([line for k, other in enumerate(lines) if k != dim for line in other])
        return all(a.frozen is not None for a in beside - {key.inner, key.block})

    def _filled(self, key: Key, line: Line) -> bool:
        """Does something move inside the blocks here? Then another space moves these blocks."""
        return any(self._parents.get(a) is key.block for _, a in line.factors if a is not None)

    def _reaches(self, key: Key, node: fx.Node, others: set[fx.Node]) -> bool:
        """Do the units flow from a node to another of these?"""
        todo, seen = list(node.users), set(node.users)
        while todo:
            user = todo.pop()
            if user in others:
                return True
            if any(self._carries(key, value) for value in values_in(self._walk.values.get(user))):
                new = [u for u in user.users if u not in seen]
                seen.update(new)
                todo += new
        return False

    def _carries(self, key: Key, value: Value) -> bool:
        atom = key.inner or key.block
        return any(a is atom for axis in value.axes for line in lines_of(axis) for _, a in line.factors)


def _at(tap: Tap, port: _Port) -> Tap:
    return Tap(port.module, port.port, tap.dim, tap.view, tap.at, tap.pick, tap.part)
