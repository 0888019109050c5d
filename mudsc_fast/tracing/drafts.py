"""Spaces in the making: which atoms of the parameters make a space, and the axes that they stand on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from mudsc_fast import layout as spec_layout
from mudsc_fast.spaces import Axis, Space
from mudsc_fast.tracing.layouts import Atom, freeze, leaves
from mudsc_fast.tracing.lines import Line, lines_of, narrowed, place, visible
from mudsc_fast.tracing.nesting import parents
from mudsc_fast.tracing.state import Axes, Origin, State


@dataclass(frozen=True)
class Key:
    """The atoms of a space: one, alone or inside each index of a block atom, or inside one index of a frozen one.

    A block atom's own space (inner None) holds the axes on which nothing inside its blocks moves.
    """

    inner: Atom | None
    block: Atom | None = None
    index: int | None = None

    @property
    def blocks(self) -> int:
        """The number of blocks of the space."""
        return self.block.size if self.block is not None and self.index is None else 1

    @property
    def width(self) -> int:
        """The number of units of the space."""
        return self.blocks * (self.inner.size if self.inner is not None else 1)


@dataclass
class Draft:
    """A space without a name: its key and its axes, in the order of the parameters."""

    key: Key
    axes: list[Axis] = field(default_factory=list)


def find(key: Key, line: Line) -> list[tuple[Line, tuple[int, ...]]]:
    """Where the units of a space are on a line: the line (narrowed to an index) and the factors that they index."""
    inner = [k for k, (_, a) in enumerate(line.factors) if a is key.inner and a is not None]
    if key.block is None:
        return [(line, (k,)) for k in inner]
    block = [k for k, (_, a) in enumerate(line.factors) if a is key.block]
    if len(block) != 1:
        return []
    if key.index is not None:
        less = narrowed(line, block[0], key.index)
        if less is None:
            return []
        shift = len(line.factors) - len(less.factors)
        return [(less, (k - shift,)) for k in inner if k >= shift]
    if key.inner is None:
        return [(line, (block[0],))]
    return [(line, (block[0], k)) for k in inner]


class Builder:
    """Drafts of all spaces. Atoms whose place a spec cannot say are frozen, blocks that it cannot say are given up."""

    def __init__(self, state: State, parameters: Mapping[str, Axes]) -> None:
        self._state = state
        self._parameters = parameters
        self._flat: set[Atom] = set()
        self._lines: dict[str, list[list[Line]]] = {}
        self.parents: dict[Atom, Atom] = {}
        self.drafts: dict[Key, Draft] = {}
        while not self._built():
            pass

    def role(self, name: str, dim: int) -> str:
        """How a parameter's dim is used."""
        return "in" if self._state.roles.get(Origin(name, dim)) == {"in"} else "out"

    def _built(self) -> bool:
        """One try; False if something had to be given up."""
        for name, axes in self._parameters.items():
            self._lines[name] = [lines_of(axis) for axis in axes]
            for axis, lines in zip(axes, self._lines[name], strict=True):
                hidden = [a for a in leaves(axis) if a.frozen is None and a not in visible(lines)]
                for atom in hidden:
                    freeze((atom,), f"a spec cannot say where these units stand in {name}")
                if hidden:
                    return False
        found = parents(self._state.tensors, self._parameters)
        self.parents = {d: p for d, p in found.items() if d not in self._flat}
        self.drafts = {}
        return all(self._add(name) for name in self._parameters) and self._fit()

    def _add(self, name: str) -> bool:
        covered: set[tuple[int, Atom]] = set()
        blocks = set(self.parents.values())
        waiting: list[tuple[int, int, Atom]] = []
        for dim, lines in enumerate(self._lines[name]):
            for number, line in enumerate(lines):
                for atom in dict.fromkeys(a for _, a in line.factors if a is not None and a.frozen is None):
                    parent = self.parents.get(atom)
                    if parent is None and atom in blocks:
                        waiting.append((dim, number, atom))
                    elif parent is None:
                        self._axes(name, dim, line, Key(atom))
                    elif not self._nested(name, dim, line, atom, parent, covered):
                        self._flat.add(atom)
                        return False
        for dim, number, atom in waiting:
            line = self._lines[name][dim][number]
            inside = any(self.parents.get(a) is atom for _, a in line.factors if a is not None)
            if not inside and (dim, atom) not in covered:
                for k, (_, a) in enumerate(line.factors):
                    if a is atom:
                        self._axis(Key(None, atom), self._placed(name, dim, line, (k,)))
        return True

    def _axes(self, name: str, dim: int, line: Line, key: Key) -> bool:
        found = find(key, line)
        for less, at in found:
            self._axis(key, self._placed(name, dim, less, at))
        return bool(found)

    def _placed(self, name: str, dim: int, line: Line, at: tuple[int, ...]) -> Axis:
        view, where, pick, part = place(line, at)
        return Axis(name, dim, self.role(name, dim), view, where, pick, part=part)

    def _axis(self, key: Key, axis: Axis) -> None:
        self.drafts.setdefault(key, Draft(key)).axes.append(axis)

    def _nested(
        self, name: str, dim: int, line: Line, atom: Atom, parent: Atom, covered: set[tuple[int, Atom]]
    ) -> bool:
        """Axes of an atom inside another, on the same dim or on another one of the tensor; False if there are none."""
        keys = [Key(atom, parent)] if parent.frozen is None else [Key(atom, parent, i) for i in range(parent.size)]
        if any(a is parent for _, a in line.factors):
            placed = [self._axes(name, dim, line, key) for key in keys]
            return all(placed)
        for other, lines in enumerate(self._lines[name]):
            if other == dim or parent not in visible(lines):
                continue
            alone = all(a is parent or a is None or a.frozen is not None for _, a in lines[0].factors)
            same = alone or self.role(name, dim) == self.role(name, other)
            if len(lines) > 1 or lines[0].pick or line.part or not same:
                return False
            halves = [lines[0], line] if other < dim else [line, lines[0]]
            shift = len(halves[0].factors)
            pick = line.pick if line is halves[0] or line.pick is None else (line.pick[0] + shift, line.pick[1])
            whole = Line(None, halves[0].factors + halves[1].factors, pick)
            covered.add((other, parent))
            for key in keys:
                places = find(key, whole)
                if not places or any(less.part is not None for less, _ in places):
                    return False
                for less, at in places:
                    # Each dim keeps factors of its own: the view has to respect the dims.
                    sizes = tuple(size for size, _ in less.factors)
                    where = at[0] if len(at) == 1 else at
                    dims = (min(dim, other), max(dim, other))
                    self._axis(key, Axis(name, dims, self.role(name, dim), sizes, where, less.pick))
            return True
        return False

    def _fit(self) -> bool:
        """Do the axes on each tensor fit each other? If not, the atoms inside others on it are given up."""
        on: dict[str, list[tuple[Space, Axis]]] = {}
        for number, draft in enumerate(self.drafts.values()):
            key = draft.key
            tie = None if key.block is None or key.index is not None else str(id(key.block))
            space = Space(str(number), key.width, tuple(draft.axes), blocks=key.blocks, tie=tie)
            for axis in draft.axes:
                on.setdefault(axis.tensor, []).append((space, axis))
        for name, entries in on.items():
            shape = [
                prod(size for size, _ in ls[0].factors) if not ls[0].part else sum(ls[-1].part or ())
                for ls in self._lines[name]
            ]
            try:
                spec_layout.groups(name, entries, dict(enumerate(shape)))
            except ValueError as error:
                return self._give_up(name, str(error))
        return True

    def _give_up(self, name: str, why: str) -> bool:
        atoms = [a for lines in self._lines[name] for a in visible(lines) if a.frozen is None]
        nested = [a for a in atoms if a in self.parents]
        self._flat.update(nested)
        if not nested:
            for atom in atoms:
                freeze((atom,), f"a spec cannot say where these units stand: {why}")
        return False


def order_of(drafts: Sequence[Draft], names: Sequence[str]) -> list[Draft]:
    """Drafts in the order of the first parameter of each."""
    place_of = {name: k for k, name in enumerate(names)}
    return sorted(drafts, key=lambda d: place_of[d.axes[0].tensor])
