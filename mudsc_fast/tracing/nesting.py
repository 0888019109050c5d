"""Which atoms may be reordered on their own inside each index of another: the dims of a head, the units of an expert.

If every tensor that has an atom `d` has a certain atom `p` beside it, then `d` may be reordered in another way for
each index of `p`. This includes tensors hidden inside operations (see State.tensors): a sum over `p` that leaves `d`
shows up as a tensor with `d` and without `p`, a product of two values with `p` apart as one with `p` twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product

from mudsc_fast.tracing.layouts import Atom, Layout, leaves, resolve
from mudsc_fast.tracing.state import Axes

Monomial = tuple[Atom, ...]
_MOST = 256  # indices of a frozen atom, each of which gives its inner atoms a space of its own


def monomials(layout: Layout) -> list[Monomial]:
    """The products of atoms whose concatenation the layout is."""
    choices: list[list[Monomial]] = []
    for factor in resolve(layout):
        if isinstance(factor, Atom):
            choices.append([(factor,)])
        else:
            choices.append([m for part in factor.parts for m in monomials(part)])
    return [tuple(a for m in combination for a in m) for combination in product(*choices)]


def companions(tensors: Iterable[Axes]) -> dict[Atom, set[Atom]]:
    """{atom: the atoms that stand beside it, once, wherever it occurs}."""
    found: dict[Atom, set[Atom]] = {}
    seen: set[tuple[tuple[Monomial, ...], ...]] = set()
    for axes in tensors:
        split = tuple(tuple(monomials(axis)) for axis in axes)
        if split in seen:
            continue
        seen.add(split)
        for atom, beside in _beside(split):
            found[atom] = found[atom] & beside if atom in found else beside
    return found


def _beside(split: Sequence[Sequence[Monomial]]) -> Iterable[tuple[Atom, set[Atom]]]:
    once = [set.intersection(*({a for a in m if m.count(a) == 1} for m in axis)) if axis else set() for axis in split]
    some = [{a for m in axis for a in m} for axis in split]
    for k, axis in enumerate(split):
        others = [j for j in range(len(split)) if j != k]
        apart = {
            a for j in others for a in once[j] if sum(a in some[i] for i in others) == 1
        }  # once on exactly one of the other axes
        for m in axis:
            near = {a for a in m if m.count(a) == 1}
            for atom in set(m):
                yield atom, (near | (apart - set(m))) - {atom}


def parents(tensors: Iterable[Axes], parameters: Mapping[str, Axes]) -> dict[Atom, Atom]:
    """{atom: the atom in each index of which it moves on its own}, two levels at most, for atoms of parameters."""
    order: dict[Atom, int] = {}
    for axes in parameters.values():
        for axis in axes:
            for atom in leaves(axis):
                order.setdefault(atom, len(order))
    beside = companions(tensors)
    able = {
        d: [
            p
            for p in sorted(beside.get(d, ()) & order.keys(), key=order.__getitem__)
            # Of two that only occur together the first is the block.
            if not (d in beside.get(p, ()) and order[d] < order[p])
        ]
        for d in order
        if d.frozen is None
    }
    free = {d: [p for p in found if p.frozen is None] for d, found in able.items()}
    chosen: dict[Atom, Atom] = {}
    for d, found in able.items():
        roots = [p for p in free[d] if not free[p]]
        fixed = [p for p in found if p.frozen is not None and p.size <= _MOST]
        if roots:
            chosen[d] = roots[0]
        elif fixed and not free[d]:
            chosen[d] = fixed[0]
    return chosen
