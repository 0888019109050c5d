"""How a layout reads as data of a spec: lines of positions, each with its view, and places of atoms on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

from mudsc_fast.tracing.layouts import Atom, Layout, Sum, leaves, resolve, size_of

Seen = tuple[int, "Atom | None"]  # size of a factor, and its atom if it is one


class Line(NamedTuple):
    """Positions of a dim: a part of it (start, length) or all, its factors, and a factor fixed at an index."""

    part: tuple[int, int] | None
    factors: tuple[Seen, ...]
    pick: tuple[int, int] | None


def lines_of(layout: Layout) -> list[Line]:
    """The lines of a dim: disjoint, together all of it. What a spec cannot say about it is a factor without an atom."""
    layout = resolve(layout)
    if len(layout) == 1 and isinstance(layout[0], Sum):
        return list(_concatenation(layout[0]))
    for k, factor in enumerate(layout):
        if isinstance(factor, Sum) and _moves(factor):
            parts = _pieces(factor)
            if _equal(parts):
                before, after = _plain(layout[:k]), _plain(layout[k + 1 :])
                count = (len(parts), None)
                return [Line(None, (*before, count, *_plain(part), *after), (k, i)) for i, part in enumerate(parts)]
    return [Line(None, _plain(layout), None)]


def _moves(factor: Sum) -> bool:
    return any(a.frozen is None for part in factor.parts for a in leaves(part))


def _equal(parts: Sequence[Layout]) -> bool:
    return len({size_of(p) for p in parts}) == 1


def _pieces(factor: Sum) -> Sequence[Layout]:
    """The parts, and the parts of parts unless the outer ones alone are of one size."""
    flat = [piece for part in factor.parts for piece in _inner(part)]
    return factor.parts if _equal(factor.parts) and not _equal(flat) else flat


def _inner(part: Layout) -> Sequence[Layout]:
    part = resolve(part)
    return _pieces(part[0]) if len(part) == 1 and isinstance(part[0], Sum) else [part]


def _plain(layout: Layout) -> tuple[Seen, ...]:
    return tuple((f.size, f if isinstance(f, Atom) else None) for f in resolve(layout))


def _concatenation(factor: Sum) -> Iterator[Line]:
    parts = _pieces(factor)
    if _equal(parts) and all(len(lines_of(p)) == 1 for p in parts):
        for k, part in enumerate(parts):
            yield Line(None, ((len(parts), None), *_plain(part)), (0, k))
        return
    start = 0
    for part in parts:
        size = size_of(part)
        for line in lines_of(part):
            offset, length = line.part or (0, size)
            yield Line((start + offset, length), line.factors, line.pick)
        start += size


def visible(lines: Sequence[Line]) -> set[Atom]:
    """The atoms that lines show."""
    return {a for line in lines for _, a in line.factors if a is not None}


class Place(NamedTuple):
    """What an Axis or a Tap says about a dim: view, at, pick and part."""

    view: tuple[int, ...] | None
    at: int | tuple[int, ...] | None
    pick: tuple[int, int] | None
    part: tuple[int, int] | None


def place(line: Line, at: Sequence[int]) -> Place:
    """The shortest way to say that units are at these factors: neighbours that are not are one factor."""
    part, factors, pick = line
    kept = {*at, *([pick[0]] if pick else [])}
    sizes: list[int] = []
    moved: dict[int, int] = {}
    for k, (size, _) in enumerate(factors):
        if k in kept or k == 0 or k - 1 in kept:
            moved[k] = len(sizes)
            sizes.append(size)
        else:
            moved[k] = len(sizes) - 1
            sizes[-1] *= size
    where = tuple(moved[k] for k in at)
    fixed = (moved[pick[0]], pick[1]) if pick else None
    if where == tuple(range(len(sizes))):
        return Place(None, None, None, part)
    return Place(tuple(sizes), where[0] if len(where) == 1 else where, fixed, part)


def narrowed(line: Line, factor: int, index: int) -> Line | None:
    """The positions of a line at one index of a factor; None if a spec cannot say so."""
    if line.pick is None:
        return line._replace(pick=(factor, index))
    first = max(factor, line.pick[0])
    if {factor, line.pick[0]} != set(range(first + 1)) or first != 1:
        return None
    chosen = {factor: index, line.pick[0]: line.pick[1]}
    start, length = line.part or (0, prod(size for size, _ in line.factors))
    for k in range(2):
        length //= line.factors[k][0]
        start += chosen[k] * length
    return Line((start, length), line.factors[2:], None)
