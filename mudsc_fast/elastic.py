"""Elastic widths: the merged width of every space chosen so that all together hold a given number of parameters."""

from __future__ import annotations

import sys
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Mapping, Sequence
from math import ceil
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mudsc_fast.arguments import check_activations, check_share, check_spec, two_or_more
from mudsc_fast.assignment import assign_blocks
from mudsc_fast.counts import Counts, can_resize
from mudsc_fast.moments import joint_covariance
from mudsc_fast.progress import Progress, bar, wanted
from mudsc_fast.rematch import Matcher, cross_of
from mudsc_fast.selection import unexplained
from mudsc_fast.weights import Weights
from mudsc_fast.zipping import zip_units

if TYPE_CHECKING:
    from mudsc_fast.covariance import Covariance
    from mudsc_fast.spaces import Space
    from mudsc_fast.spec import PermutationSpec

METHODS = ("select", "zip")
_STEPS = {"select": 64, "zip": 16}  # widths that are looked at up to a space's own; between them losses are straight
_NOTHING = 1e-6  # of what one layer reads: gains below it are rounding
_RIDGE = 1e-6  # of the means' variance: what it takes away stays below _NOTHING
_STARTS = 64  # uniform shares that are tried up to a network's own size
_ROUNDS = 32  # of exchanges; a few are enough


def elastic_widths(
    state_dicts: Sequence[Mapping[str, Tensor]],
    spec: PermutationSpec,
    activations: Mapping[str, Covariance],
    budget: float = 1.0,
    method: str = "select",
    spaces: Collection[str] | None = None,
    attenuation: float = 0.5,
    progress: Progress = True,
) -> dict[str, int]:
    """{space: merged width} for `match(width=...)`: parameters go from spaces that merge well to those that do not.

    state_dicts: one mapping from names to tensors a model, two or more. spec: their spaces. activations: what
        `calibrate` gave, of scope "full".
    budget: numbers in the merged state dict, as a share of one model's, never exceeded. 1.0 keeps the size and moves
        units between spaces; twice the units of every space are about four times the numbers.
    method: "select" or "zip", what `match` will be asked for.
    spaces: those whose width may change; None: all that the spec lets change but tied ones (attention heads, whose size
        most modules know). `resizable_spaces` finds them by trying a module.
    attenuation: of the zip, as for `match`, but > 0.

    A space's loss at a width is the share of what its layers read (variance, by the norms of their weights) that cannot
    be told, linearly, from the units that a selection keeps, or from the means that a zip by activations makes; every
    layer that reads the space counts once. The sum of all losses is made small: units are added where they lower it
    most for each parameter that they cost beside the widths so far, and then moved from space to space as long as that
    helps. What is left when no unit is missed brings spaces back to their own width. Spaces that may not change, or
    have no statistics, keep theirs.

    Raises ValueError or TypeError, naming the argument: a budget below what the smallest widths take, unknown spaces or
    such that have to keep their width, statistics of scope "cross", and what `match` refuses. Source: docs/quality.md.
    """
    check_spec(spec)
    check_share("budget", budget, top=None)
    wanted(progress)
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if method == "zip" and attenuation <= 0:
        raise ValueError(
            "attenuation: expected a factor > 0: with others merged units are not merged again, which leaves narrow "
            f"widths out, got {attenuation!r}"
        )
    states = two_or_more(state_dicts)
    if not activations:
        raise ValueError("activations: widths are chosen by activations, but none were given")
    models = check_activations(activations, spec, len(states), full=True)
    weights = Weights(states, spec)
    shapes = {name: weights.info(0, name)[0] for name in states[0]}
    counts = Counts(spec, shapes)
    own = {space.name: space.width for space in spec.spaces}
    matcher = Matcher(spec, models, method, weights, activations, 0.0, own, attenuation, 1.0, None)
    curves: dict[str, _Curve] = {}
    chosen = _changing(spec, shapes, spaces, activations)
    with bar("losses by width", len(chosen), progress) as steps:
        for space in chosen:
            curves[space.name] = _curve(matcher, space)
            steps.advance()
    return _Widths(counts, spec, curves, own, budget).found()


def _changing(
    spec: PermutationSpec,
    shapes: Mapping[str, Sequence[int]],
    spaces: Collection[str] | None,
    activations: Mapping[str, Covariance],
) -> list[Space]:
    """The spaces whose width is chosen."""
    able = [space for space in spec.spaces if space.name in activations and can_resize(space, spec, shapes)]
    if spaces is None:
        return [space for space in able if space.tie is None]
    if isinstance(spaces, str) or not isinstance(spaces, Collection):
        raise TypeError(f"spaces: expected a collection of names, got {spaces!r}")
    names = {space.name for space in able}
    for name in spaces:
        if name not in spec:
            raise ValueError(f"spaces: the spec has no space {name!r}")
        if name not in names:
            reason = "has no statistics" if name not in activations else "has to keep its width"
            raise ValueError(f"spaces: space {name!r} {reason}")
    return [space for space in able if space.name in set(spaces)]


class _Curve:
    """The loss of one space by its width.

    losses: {width: loss} at the widths that were looked at, from no unit to all of all models; straight between them.
    """

    def __init__(self, losses: Mapping[int, float]) -> None:
        self._points = sorted(losses.items())
        self._widths = [width for width, _ in self._points]
        self._hull: list[tuple[int, float]] = []
        for here in self._points:
            while len(self._hull) > 1 and _slope(self._hull[-2], self._hull[-1]) >= _slope(self._hull[-1], here):
                self._hull.pop()
            self._hull.append(here)

    def at(self, width: int) -> float:
        """The loss at any width."""
        return _between(self._points, width)

    def hope(self, width: int) -> float:
        """The same made convex, so that a good unit behind a bad one is seen."""
        return _between(self._hull, width)

    def after(self, width: int) -> int:
        """The next width that was looked at; the width itself at the end."""
        k = bisect_right(self._widths, width)
        return self._widths[k] if k < len(self._widths) else width

    def before(self, width: int) -> int:
        """The one before; 0 at the beginning."""
        k = bisect_left(self._widths, width)
        return self._widths[k - 1] if k else 0

    @property
    def top(self) -> int:
        """The width at which all units of all models are kept."""
        return self._widths[-1]


def _between(points: Sequence[tuple[int, float]], width: int) -> float:
    k = bisect_right(points, width, key=lambda point: point[0])
    if k == len(points):
        return points[-1][1]
    return points[k - 1][1] + _slope(points[k - 1], points[k]) * (width - points[k - 1][0])


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def _curve(matcher: Matcher, space: Space) -> _Curve:
    """The loss of a space at some widths: whole units of every block, its own width among them."""
    covariance = joint_covariance(matcher.activations[space.name])[1].cpu()
    reads = matcher.reads(space)
    if reads is not None:
        covariance = covariance * torch.outer(reads, reads)
    each = space.width // space.blocks
    step = max(1, each // _STEPS[matcher.method])
    units = sorted({*range(step, matcher.models * each + 1, step), each, matcher.models * each})
    similarity, pairing = _paired(matcher, space)
    total = float(covariance.diagonal().sum())
    losses = {0: 1.0 if total > 0 else 0.0}
    if matcher.method == "select":
        shares = unexplained(covariance, matcher.models, similarity, space.blocks, pairing)
        losses.update({k * space.blocks: float(shares[k]) for k in units})
    else:
        for k in units:
            width = k * space.blocks
            found = zip_units(similarity, matcher.models, width, matcher.attenuation, 1.0, space.blocks, pairing)
            labels = found.labels.reshape(-1).cpu()
            losses[width] = _untold(covariance, labels, width, reads) / total if total > 0 else 0.0
    layers = max(1, sum(axis.role == "in" for axis in space.axes))
    return _Curve({width: layers * loss for width, loss in losses.items()})


def _untold(covariance: Tensor, labels: Tensor, width: int, reads: Tensor | None) -> float:
    """The variance that the merged units' means do not tell of all units, both weighted by what is read of them."""
    members = torch.bincount(labels, minlength=width).to(covariance)
    plain = covariance.new_ones(len(labels)) if reads is None else reads.clamp(min=1e-12 * float(reads.max()))
    share = 1 / (members[labels] * plain)  # the means are those of the units as they are
    sums = torch.zeros_like(covariance[:width]).index_add_(0, labels, covariance * share[:, None])
    inner = torch.zeros_like(sums[:, :width]).index_add_(1, labels, sums * share)
    ridge = _RIDGE * float(inner.diagonal().mean()) + 1e-300
    inner.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(inner)
    while int(failed):  # more units than samples, whose covariance is exact to float32 only
        inner.diagonal().add_(9 * ridge)
        ridge *= 10
        factor, failed = torch.linalg.cholesky_ex(inner)
    told = torch.linalg.solve_triangular(factor, sums, upper=False)
    return float(covariance.diagonal().sum() - told.square().sum())


def _paired(matcher: Matcher, space: Space) -> tuple[Tensor, Tensor | None]:
    """The similarity of all units by activations, and which blocks of the models belong together (of a tie: in all)."""
    similarity = matcher.similarity(space, {}, 0.0)
    if space.blocks == 1:
        return similarity, None
    tie = [s for s in matcher.spec.spaces if s is space or (space.tie is not None and s.tie == space.tie)]
    tie = [s for s in tie if s.name in matcher.activations]
    each = [similarity if other is space else matcher.similarity(other, {}, 0.0) for other in tie]
    cross = [
        part if other.within == "fixed" else cross_of(part, matcher.models)
        for other, part in zip(tie, each, strict=True)
    ]
    found = assign_blocks(cross, space.blocks, [s.within for s in tie])[0].block_indices
    if found is None:
        return similarity, None
    return similarity, torch.cat([torch.arange(space.blocks, device=found.device)[None], found])


class _Widths:
    """The search: from the smallest widths up, then exchanges; and the same from uniform widths, if that ends better.

    A tensor's size is a product of its spaces' widths, so that what a unit costs depends on the other spaces: costs are
    always those beside the widths at hand, and a unit that was cheap when it was added can be given back later.
    """

    def __init__(
        self, counts: Counts, spec: PermutationSpec, curves: Mapping[str, _Curve], own: Mapping[str, int], budget: float
    ) -> None:
        self._counts, self._curves, self._own = counts, curves, own
        self._unit = {name: spec[name].blocks for name in curves}
        self._near = {name: [n for n in curves if n in counts.near(name, spec)] for name in curves}
        self._widths, self._used = dict(own), counts.total(own)
        self._limit = int(min(budget * self._used, sys.maxsize))
        smallest = counts.total(self._uniform(0))
        if smallest > self._limit:
            least = ceil(1e4 * smallest / self._used) / 1e4  # what is printed is enough
            raise ValueError(f"budget: expected at least {least:g}, which the smallest widths take, got {budget:g}")

    def found(self) -> dict[str, int]:
        """The widths of all spaces."""
        starts = [self._uniform(k / _STARTS) for k in range(2 * _STARTS + 1)]
        fitting = [widths for widths in starts if self._counts.total(widths) <= self._limit]
        ends: list[tuple[float, dict[str, int]]] = []
        for start in (fitting[0], fitting[-1]):
            self._widths, self._used = dict(start), self._counts.total(start)
            self._grow()
            self._exchange()
            self._trim()
            self._grow(fine=True)
            self._return()
            ends.append((self._loss(), self._widths))
        return ends[0][1] if ends[0][0] <= ends[1][0] + _NOTHING else ends[1][1]

    def _uniform(self, share: float) -> dict[str, int]:
        """The same share of all widths that may change."""
        return {
            **self._own,
            **{name: max(1, int(share * (self._own[name] // unit))) * unit for name, unit in self._unit.items()},
        }

    def _cost(self, name: str, width: int) -> int:
        """What the network would grow by if this space had another width."""
        return self._counts.of(name, {**self._widths, name: width}) - self._counts.of(name, self._widths)

    def _put(self, name: str, width: int) -> None:
        self._used += self._cost(name, width)
        self._widths[name] = width

    def _next(self, name: str, fine: bool) -> tuple[float, int, int] | None:
        """(loss saved for each parameter, parameters, width) of a space's next width; None if that saves nothing."""
        curve, width = self._curves[name], self._widths[name]
        wider = min(width + self._unit[name], curve.top) if fine else curve.after(width)
        gain = curve.hope(width) - curve.hope(wider)
        if wider == width or gain <= _NOTHING:
            return None
        cost = self._cost(name, wider)
        return gain / max(cost, 1), cost, wider

    def _grow(self, fine: bool = False) -> None:
        """Take the best step that fits, again and again; fine: a unit of every block at a time."""
        known = {name: self._next(name, fine) for name in self._curves}
        while True:
            able = [
                (found[0], name, found[2])
                for name, found in known.items()
                if found is not None and self._used + found[1] <= self._limit
            ]
            if not able:
                return
            _, name, width = max(able)
            self._put(name, width)
            for other in self._near[name]:
                known[other] = self._next(other, fine)

    def _exchange(self) -> None:
        """Give units of one space back and spend them elsewhere, as long as the sum of all losses falls."""
        best = self._loss()
        for _ in range(_ROUNDS):
            moved = False
            for name, curve in self._curves.items():
                kept, used = dict(self._widths), self._used
                narrower = curve.before(kept[name])
                if narrower < self._unit[name]:
                    continue
                self._put(name, narrower)
                self._grow()
                now = self._loss()
                if now < best - _NOTHING:
                    best, moved = now, True
                else:
                    self._widths, self._used = kept, used
            if not moved:
                return

    def _loss(self) -> float:
        return sum(curve.at(self._widths[name]) for name, curve in self._curves.items())

    def _trim(self) -> None:
        """Spaces above their own width give back units that nobody misses."""
        for name, curve in self._curves.items():
            width = self._widths[name] - self._unit[name]
            while width >= self._own[name] and curve.at(width) <= curve.at(self._widths[name]) + _NOTHING:
                self._put(name, width)
                width -= self._unit[name]

    def _return(self) -> None:
        """Spaces below their own width grow back towards it, the nearest first, while there is room."""
        for name in sorted(self._curves, key=lambda n: self._own[n] - self._widths[n]):
            width = self._widths[name] + self._unit[name]
            while width <= self._own[name] and self._used + self._cost(name, width) <= self._limit:
                self._put(name, width)
                width += self._unit[name]
