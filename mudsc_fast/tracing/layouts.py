"""Layouts of axes: products and concatenations of atoms, made equal to each other by union-find.

An *atom* is a set of indices that one permutation reorders. A *layout* is a row-major product of factors, each an atom
or a concatenation (a Sum) of layouts; the empty product has size 1. While a graph is read, atoms are found to be
products or concatenations themselves, equal to others, or frozen: then nothing may reorder them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import prod


class Atom:
    """A leaf, until it is bound to a layout of the same size; frozen: why nothing may reorder it."""

    __slots__ = ("bound", "frozen", "size")

    def __init__(self, size: int, frozen: str | None = None) -> None:
        self.size = size
        self.frozen = frozen
        self.bound: Layout | None = None


class Sum:
    """Layouts one after the other on one axis."""

    __slots__ = ("parts", "size")

    def __init__(self, parts: Iterable[Layout]) -> None:
        self.parts = tuple(parts)
        self.size = sum(size_of(p) for p in self.parts)


Factor = Atom | Sum
Layout = tuple[Factor, ...]


def size_of(layout: Layout) -> int:
    """The number of positions."""
    return prod(f.size for f in layout)


def fresh(size: int, frozen: str | None = None) -> Layout:
    """A new atom of this size; nothing for size 1, which cannot be reordered."""
    return () if size == 1 else (Atom(size, frozen),)


def resolve(layout: Layout) -> Layout:
    """The layout down to its leaves and concatenations of them."""
    if len(layout) == 1 and isinstance(layout[0], Atom) and layout[0].bound is None:
        return layout if layout[0].size != 1 else ()
    found: list[Factor] = []
    for factor in layout:
        if isinstance(factor, Sum):
            found += _resolve_sum(factor)
        elif factor.bound is not None:
            factor.bound = resolve(factor.bound)
            found += factor.bound
        elif factor.size != 1:
            found.append(factor)
    return tuple(found)


def _resolve_sum(factor: Sum) -> Layout:
    parts = [(p, resolve(p)) for p in factor.parts if size_of(p)]
    if len(parts) == 1:
        return parts[0][1]
    if len(parts) == len(factor.parts) and all(old is new for old, new in parts):
        return (factor,)
    return (Sum(new for _, new in parts),)


def leaves(layout: Layout) -> Iterator[Atom]:
    """All atoms of a layout, as often as they occur."""
    for factor in resolve(layout):
        if isinstance(factor, Atom):
            yield factor
        else:
            for part in factor.parts:
                yield from leaves(part)


def freeze(layout: Layout, reason: str) -> None:
    """Freeze all atoms; the first reason given to an atom stays."""
    for atom in leaves(layout):
        if atom.frozen is None:
            atom.frozen = reason


def _bind(atom: Atom, layout: Layout) -> None:
    if atom.frozen is not None:
        freeze(layout, atom.frozen)
    atom.bound = layout


def split_atom(atom: Atom, sizes: Sequence[int]) -> Layout:
    """Make an atom the product of new atoms of these sizes."""
    made = tuple(f for size in sizes for f in fresh(size, atom.frozen))
    atom.bound = made
    return made


def unify(a: Layout, b: Layout, reason: str) -> None:
    """Make two layouts of one size equal; where they do not fit together, all their atoms are frozen."""
    a, b = resolve(a), resolve(b)
    if a == b:
        return
    if size_of(a) != size_of(b) or not _unify(a, b, reason):
        freeze(a, reason)
        freeze(b, reason)


def _unify(a: Layout, b: Layout, reason: str) -> bool:
    while a and b:
        if a[0].size == b[0].size:
            _unify_factor(a[0], b[0], reason)
            a, b = resolve(a[1:]), resolve(b[1:])
            continue
        if a[0].size < b[0].size:
            a, b = b, a
        lead = lead_of(a, b[0].size, reason)
        if lead is None:
            return False
        unify(lead[0], b[:1], reason)
        a, b = resolve(lead[1]), resolve(b[1:])
    return True


def _unify_factor(x: Factor, y: Factor, reason: str) -> None:
    if x is y:
        return
    if isinstance(x, Atom):
        _bind(x, (y,))
    elif isinstance(y, Atom):
        _bind(y, (x,))
    else:
        _unify_sums(x, y, reason)


def _unify_sums(x: Sum, y: Sum, reason: str) -> None:
    mine, other = list(x.parts), list(y.parts)
    while mine and other:
        a, b = mine.pop(0), other.pop(0)
        left, right = size_of(a), size_of(b)
        if left > right:
            a, rest = cut(a, right, reason)
            mine.insert(0, rest)
        elif right > left:
            b, rest = cut(b, left, reason)
            other.insert(0, rest)
        unify(a, b, reason)


def lead_of(layout: Layout, size: int, reason: str) -> tuple[Layout, Layout] | None:
    """The layout as a product of a leading layout of this size and the rest; None if it is no such product."""
    rest = resolve(layout)
    lead: list[Factor] = []
    while size > 1:
        if not rest:
            return None
        first = rest[0]
        if size % first.size == 0:
            lead.append(first)
            size //= first.size
            rest = rest[1:]
            continue
        if first.size % size:
            return None
        if isinstance(first, Atom):
            rest = split_atom(first, (size, first.size // size)) + rest[1:]
            continue
        made = _sum_as_product(first, first.size // size, reason)
        if made is None:
            return None
        rest = made + rest[1:]
    return tuple(lead), rest


def _sum_as_product(factor: Sum, inner: int, reason: str) -> Layout | None:
    """A concatenation whose parts are all (something x one common inner layout), as such a product."""
    if any(size_of(p) % inner for p in factor.parts):
        return None
    common = fresh(inner)
    outer = [fresh(size_of(p) // inner) for p in factor.parts]
    for part, o in zip(factor.parts, outer, strict=True):
        unify(part, o + common, reason)
    return (Sum(outer), *common)


def cut(layout: Layout, at: int, reason: str) -> tuple[Layout, Layout]:
    """The layout as the concatenation of its first `at` positions and the others; frozen if it is none."""
    layout = resolve(layout)
    total = size_of(layout)
    if at == 0:
        return (Sum(()),), layout
    if at == total:
        return layout, (Sum(()),)
    first, rest = layout[0], layout[1:]
    inner = size_of(rest)
    if at % inner:
        freeze(layout, reason)
        return fresh(at, reason), fresh(total - at, reason)
    place = at // inner
    if isinstance(first, Atom):
        left, right = fresh(place, first.frozen), fresh(first.size - place, first.frozen)
        first.bound = (Sum((left, right)),)
        return left + rest, right + rest
    before: list[Layout] = []
    after: list[Layout] = []
    seen = 0
    for part in first.parts:
        size = size_of(part)
        if seen + size <= place:
            before.append(part)
        elif seen >= place:
            after.append(part)
        else:
            left, right = cut(part, place - seen, reason)
            before.append(left)
            after.append(right)
        seen += size
    return resolve((Sum(before), *rest)), resolve((Sum(after), *rest))


def split(layout: Layout, sizes: Sequence[int], reason: str) -> list[Layout]:
    """Pieces of these sizes, one after the other."""
    layout = resolve(layout)
    if len(layout) == 1 and isinstance(layout[0], Atom):
        made = [fresh(size, layout[0].frozen) for size in sizes]
        layout[0].bound = (Sum(made),)
        return made
    pieces = []
    for size in sizes:
        piece, layout = cut(layout, size, reason)
        pieces.append(piece)
    return pieces


def slice_of(layout: Layout, start: int, stop: int, reason: str) -> Layout:
    """Positions start..stop of a layout."""
    if stop <= start:
        return (Sum(()),)
    _, tail = cut(layout, start, reason)
    return resolve(cut(tail, stop - start, reason)[0])


def concatenate(parts: Sequence[Layout]) -> Layout:
    """Layouts one after the other."""
    return resolve((Sum(parts),))


def reshape(layouts: Sequence[Layout], sizes: Sequence[int], reason: str) -> list[Layout]:
    """The layouts of a row-major array after a reshape; what does not split at the new sizes is frozen."""
    rest = resolve(tuple(f for layout in layouts for f in layout))
    found: list[Layout] = []
    for k, size in enumerate(sizes):
        split = lead_of(rest, size, reason)
        if split is None:
            whole = resolve(rest)
            freeze(whole, reason)
            return found + [fresh(s, reason) for s in sizes[k:]]
        lead, rest = resolve(split[0]), resolve(split[1])
        found.append(lead)
    return found
