"""What tracing knows: the layout of every value of the graph, and the facts that the rules of operations add."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from mudsc_fast.tracing.layouts import Layout, freeze, fresh, resolve, unify

Axes = tuple[Layout, ...]


class Origin(NamedTuple):
    """A dim of a parameter, from which an axis of a value comes unchanged."""

    tensor: str
    dim: int


Origins = frozenset[Origin]
NOWHERE: Origins = frozenset()
_RECENT = 4  # products of activations before a softmax that may have made its scores


class Tag(NamedTuple):
    """Each position along a dim stands for an index of a layout (a token for its expert).

    What moves inside each index of the layout moves, on this value, inside each position. key: the integers that say
    which; only values told by the same ones fit together.
    """

    layout: Layout
    key: int
    dim: int


@dataclass(frozen=True)
class Value:
    """A tensor of the graph.

    axes: the layout of each dim. dynamic: it depends on the model's inputs. origins: the parameter dims that each axis
    comes from, for values made of parameters alone. index_of: the layout that its integers are indices into. stack:
    (dim, axes of each index along it): the axes differ along a dim that will be taken apart, such as the 3 of a fused
    qkv. opaque: nothing is known, not even its shape. uniform: the same number everywhere. tags: see Tag; carried on
    by apply_rule.
    """

    axes: Axes
    dynamic: bool = True
    origins: tuple[Origins, ...] = ()
    index_of: Layout | None = None
    stack: tuple[int, tuple[Axes, ...]] | None = None
    opaque: bool = False
    uniform: bool = False
    tags: tuple[Tag, ...] = ()

    @property
    def dims(self) -> int:
        """The number of dims."""
        return len(self.axes)

    def origin(self, dim: int) -> Origins:
        """The parameter dims that an axis comes from."""
        return self.origins[dim] if self.origins else NOWHERE

    def beside(self, gone: Iterable[int] = ()) -> Axes:
        """The layouts of its tags, but for those on these dims: they count as axes of the value."""
        less = set(gone)
        return tuple(tag.layout for tag in self.tags if tag.dim not in less)

    def pick(self, dims: Iterable[int], **changes: Any) -> Value:
        """The value with these of its axes, in this order."""
        order = list(dims)
        origins = tuple(self.origins[d] for d in order) if self.origins else ()
        return replace(self, axes=tuple(self.axes[d] for d in order), origins=origins, **changes)

    def with_axis(self, dim: int, layout: Layout, origins: Origins = NOWHERE) -> Value:
        """The value with another layout on one dim."""
        axes = (*self.axes[:dim], layout, *self.axes[dim + 1 :])
        kept = (*self.origins[:dim], origins, *self.origins[dim + 1 :]) if self.origins else ()
        return replace(self, axes=axes, origins=kept)


OPAQUE = Value((), opaque=True)


class State:
    """Facts gathered along the graph.

    tensors: the axes of every value, and of every hidden intermediate that an operation has (the sums of a softmax,
    say): whatever permutation is applied has to act on each of them. written: some value was changed in place.
    roles: how each parameter dim is used.
    kinds: what a layout is in attention, for names. reason: the operation in hand, for what it freezes.
    """

    def __init__(self) -> None:
        self.reason = ""
        self.tensors: list[Axes] = []
        self.roles: dict[Origin, set[str]] = defaultdict(set)
        self.kinds: list[tuple[Layout, str]] = []
        self.written = False
        self._products: list[tuple[Layout, Layout, Layout]] = []
        self._weights: list[Layout] = []

    def freeze(self, *layouts: Layout) -> None:
        """Freeze layouts because of the operation in hand."""
        for layout in layouts:
            freeze(layout, self.reason)

    def freeze_value(self, value: Value) -> None:
        """Freeze all that a value carries."""
        self.freeze(*value.axes)
        if value.index_of is not None:
            self.freeze(value.index_of)
        for axes in value.stack[1] if value.stack else ():
            self.freeze(*axes)

    def unify(self, a: Layout, b: Layout) -> None:
        """Make two layouts equal because of the operation in hand."""
        unify(a, b, self.reason)

    def fixed(self, size: int) -> Layout:
        """A new axis that nothing may reorder."""
        return fresh(size, self.reason)

    def record(self, axes: Axes) -> None:
        """Note a tensor that exists or is hidden inside an operation."""
        self.tensors.append(axes)

    def mix(self, value: Value, *dims: int) -> None:
        """Note that an operation mixes what lies along these dims: inside it, there is a tensor without them."""
        gone = {d % value.dims for d in dims}
        self.record(tuple(axis for d, axis in enumerate(value.axes) if d not in gone) + value.beside(gone))

    def collapse(self, value: Value) -> Value:
        """A value whose axes no longer differ along its stack."""
        if value.stack is None:
            return value
        _, pieces = value.stack
        for axes in pieces[1:]:
            for a, b in zip(pieces[0], axes, strict=True):
                self.unify(a, b)
        return replace(value, stack=None)

    def name_product(self, a: Value, b: Value) -> None:
        """Note a product of activations: scores, if a softmax follows, or the reading of values after one."""
        if not any(a.origins) and not any(b.origins):
            if any(resolve(axis) == resolve(a.axes[-1]) for axis in self._weights[-_RECENT:]):
                self.kinds.append((b.axes[-1], "v"))
            heads = b.axes[-3] if b.dims > 2 else ()
            self._products.append((b.axes[-1], a.axes[-1], heads))

    def name_softmax(self, layout: Layout) -> None:
        """Note a softmax: the last product on this axis made scores of queries and keys."""
        for axis, dims, heads in self._products[-_RECENT:]:
            if resolve(axis) == resolve(layout):
                self.kinds += [(dims, "qk"), (heads, "heads")]
                self._weights.append(layout)

    def read_by(self, value: Value, dims: Sequence[int]) -> None:
        """Note that the parameter dims behind these axes are summed over: they consume units."""
        for d in dims:
            for origin in value.origin(d):
                self.roles[origin].add("in")

    def contract(self, a: Value, b: Value, pairs: Sequence[tuple[int, int]], batch: Sequence[tuple[int, int]]) -> None:
        """A product of two values, summed over paired axes, side by side over batch axes."""
        for i, j in [*pairs, *batch]:
            if a.axes[i] and b.axes[j]:  # a batch axis of size 1 is broadcast
                self.unify(a.axes[i], b.axes[j])
        of_a, of_b = [i for i, _ in pairs], [j for _, j in pairs]
        if a.dynamic or not b.dynamic:
            self.read_by(b, of_b)
        if b.dynamic:
            self.read_by(a, of_a)
        shared = {j for i, j in [*pairs, *batch] if a.axes[i]}
        tags = {(tag.layout, tag.key) for tag in a.tags + b.tags}
        self.record(
            a.axes
            + tuple(axis for j, axis in enumerate(b.axes) if j not in shared)
            + tuple(layout for layout, _ in tags)
        )
        self.mix(a, *of_a)
        self.mix(b, *of_b)
