"""A whole network on the CPU, said to the kernels once: then a sweep is one call, and so is a merge.

A small network is matched in less time than Python takes to find its axes and make its views. So these are resolved
into integers (which tensor, which dims, which factors), kept with the spec for tensors of the same shapes and strides,
and a match only adds pointers. Labels of neighbours, similarities, assignments and zips are then one call a sweep
(csrc/cpu/network.h), with the results of ``rematch``, which does the same for everything that this file leaves out:
tensors that are read on demand or lie on a GPU, spaces that share an axis with a tied one factor by factor.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterator, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mudsc_fast import _core
from mudsc_fast.axes import spread
from mudsc_fast.backends.cpu_covariance import CpuCovariance
from mudsc_fast.layout import Group, dims_of

if TYPE_CHECKING:
    from mudsc_fast.covariance import Covariance
    from mudsc_fast.spaces import Axis, Space
    from mudsc_fast.spec import PermutationSpec

# Types whose tensors are in memory already; any other mapping may read them when asked.
_IN_MEMORY = (dict, OrderedDict)
_FLOATS = {torch.float64: "float64", torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class Network:
    """The visits of one match. Holds the tensors that its pointers point into."""

    def __init__(
        self,
        core: _core.Network,
        index: Mapping[str, int],
        models: int,
        keep: Sequence[Any],
    ) -> None:
        self._core, self._index, self._models, self._keep = core, index, models, keep
        self._held: dict[str, Tensor | None] = dict.fromkeys(index)  # the labels that it goes by

    def visit(
        self, ties: Sequence[Sequence[str]], current: Mapping[str, Any], balance: float
    ) -> list[list[tuple[Tensor, float]] | None]:
        """[(labels (models, width), value)] of the spaces of each tie, visited one after another; at least one entry.

        current: {space: a match with `labels` and `width`}, before the first visit. The list ends early after a while,
        and with a None for a tie that has to be visited the plain way. Labels that stay are the tensor that they were.
        """
        if balance > 0:
            for name, held in self._held.items():
                found = current.get(name)
                labels = None if found is None else found.labels
                if held is not labels:
                    self._core.set_labels(self._index[name], labels, 0 if found is None else found.width)
                    self._held[name] = labels
        numbers = [[self._index[name] for name in tie] for tie in ties]
        made = self._core.visit(numbers, balance, torch.get_num_threads(), _AT_A_CALL)
        return [
            None
            if found is None
            else [(self._labels(name, packed), value) for name, (packed, value) in zip(tie, found, strict=True)]
            for tie, found in zip(ties, made, strict=False)
        ]

    def _labels(self, name: str, packed: bytearray | None) -> Tensor:
        """A space's labels after a visit; packed: None where they are those from before."""
        held = self._held[name]
        if packed is None and held is not None:
            return held
        labels = torch.frombuffer(packed, dtype=torch.int64).view(self._models, -1)
        self._held[name] = labels
        return labels


def network_of(
    spec: PermutationSpec,
    state_dicts: Sequence[Mapping[str, Tensor]] | None,
    activations: Mapping[str, Covariance],
    models: int,
    zipped: bool,
    widths: Mapping[str, int],
    attenuation: float,
    budget: float,
) -> Network | None:
    """The visits of a match of these models as single calls, or None where that cannot be.

    state_dicts: None where weights are not compared. Arguments are those of ``match``, checked.
    """
    if state_dicts is not None and any(type(state_dict) not in _IN_MEMORY for state_dict in state_dicts):
        return None
    tensors = [state_dict[name] for name in spec.compared for state_dict in state_dicts or ()]
    described = _core.describe(tensors, 0)
    if described is None:
        return None
    if getattr(activations, "info", None) is not None:  # statistics on disk
        return None
    seen: list[_core.CovarianceBuffers | None] = []
    for space in spec.spaces:
        covariance = activations.get(space.name)
        sums = None if covariance is None else covariance._sums
        if sums is not None:
            if not isinstance(sums, CpuCovariance) or sums.count == 0:
                return None
            sums.flush()
        seen.append(None if sums is None else sums.buffers)
    kinds = (models, described[0])
    layout = spec.resolved.get(kinds)
    if layout is None:
        layout = spec.resolved[kinds] = _resolve(spec, tensors, models)
        while len(spec.resolved) > _KEPT:
            spec.resolved.popitem(last=False)
    order = [widths[space.name] for space in spec.spaces]
    core = _core.Network(layout, described[1], zipped, order, attenuation, budget, seen)
    return Network(core, spec.index, models, (tensors, seen))


# Milliseconds after which a call visits no further tie: the bar of a match moves on.
_AT_A_CALL = 50

# Layouts kept with a spec: one or two kinds of checkpoints are matched with it.
_KEPT = 6


class _Maps:
    """How axes go with their spaces, each kind once."""

    def __init__(self, index: Mapping[str, int]) -> None:
        self.index = index
        self.made: list[Any] = []
        self._known: dict[Any, int] = {}

    def of(self, group: Group) -> int:
        pieces = tuple(
            (*p.where, p.factors, tuple((self.index[m.space.name], m.block, m.inner) for m in p.members))
            for p in group.pieces
        )
        found = prod(group.sizes), group.role == "in", pieces
        if found not in self._known:
            self._known[found] = len(self.made)
            self.made.append(found)
        return self._known[found]


def _resolve(spec: PermutationSpec, tensors: Sequence[Tensor], models: int) -> _core.NetworkLayout:
    """The integers of a spec for tensors of these shapes, strides and types; tensors: model by model, name by name."""
    at = {name: k * models for k, name in enumerate(spec.compared)} if tensors else {}
    maps = _Maps(spec.index)
    spaces, terms = [], []
    for space in spec.spaces:
        own = []
        supported = bool(tensors)
        for axis in space.axes:
            if not axis.compare or not tensors:
                continue
            first = at[axis.tensor]
            shapes = {tensors[first + m].shape for m in range(models)}
            term = None if len(shapes) > 1 else _term(spec, space, axis, tensors, first, models, maps)
            if term is None:
                supported = False
                break
            own.append(term)
        near = [spec.index[other] for other in spec.neighbours(space.name)]
        spaces.append((space.width, space.blocks, space.within == "fixed", supported, near))
        terms.append(own if supported else [])
    return _core.NetworkLayout(models, spaces, maps.made, terms, [])


def _term(
    spec: PermutationSpec,
    space: Space,
    axis: Axis,
    tensors: Sequence[Tensor],
    first: int,
    models: int,
    maps: _Maps,
) -> Any | None:
    """One axis: (dims of the units, [(dims, map)], a view a model), as ``axes.columns`` sees it; None: not here.

    Left out are axes on which other spaces index factors of their own beside the units (grouped queries).
    """
    groups = spec.groups(axis.tensor, tensors[first].shape)
    group = next(g for g in groups if dims_of(axis)[0] in g.dims)
    piece, own = next((p, m) for p in group.pieces for m in p.members if m.axis == axis and m.space.name == space.name)
    if any(m is not own and (m.block or m.inner) for m in piece.members):
        return None
    views = []
    units: tuple[int, ...] = ()
    others: list[tuple[list[int], int]] = []
    for m in range(models):
        tensor = tensors[first + m].detach()
        seen = spread(tensor, group, piece, axis)
        view, shift = seen.tensor, 0
        units = tuple(seen.factor_dims[f] for f in (*own.block, *own.inner))
        if not units:  # a space of width 1 indexes no factor: it gets a dim of its own
            view, shift, units = view.unsqueeze(0), 1, (0,)
        others = [([seen.other_dims[d] + shift for d in g.dims], maps.of(g)) for g in groups if g.dims != group.dims]
        offset = view.storage_offset() - tensor.storage_offset()
        if offset < 0 or view.dim() > _MOST_DIMS:
            return None
        views.append((_FLOATS[view.dtype], first + m, offset, list(view.shape), list(view.stride())))
    return list(units), others, views


_MOST_DIMS = 12  # of the kernels


class Merging:
    """Merged tensors of models in memory, many at a call, in the order in which they are asked for."""

    def __init__(
        self,
        core: _core.Network,
        names: Sequence[str],
        firsts: Sequence[Tensor],
        shares: list[float],
        own: Container[str],
    ) -> None:
        self._core, self._names, self._firsts, self._shares, self._own = core, names, firsts, shares, own
        self._place = {name: k for k, name in enumerate(names)}
        self._done = 0  # names
        self._made: dict[str, tuple[Tensor, bool]] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._place

    def take(self, name: str) -> tuple[Tensor, bool] | None:
        """The merged tensor and whether it is finite; None where the plain way has to be taken. Once for each name."""
        while self._done <= self._place[name]:
            self._made.update((each, (out, good)) for each, out, good in self._next())
        return self._made.pop(name, None)

    def take_all(self) -> dict[str, Tensor] | None:
        """All that can be merged, where nothing was taken yet; None where something is not finite."""
        made: dict[str, Tensor] = {}
        while self._done < len(self._names):
            for name, out, good in self._next():
                if not good:
                    return None
                made[name] = out
        return made

    def _next(self) -> Iterator[tuple[str, Tensor, bool]]:
        """The next tensors, merged by one call, but for those to be merged the plain way; whether each is finite."""
        start, size = self._done, 0
        outs: list[Tensor] = []
        while self._done < len(self._names) and size < _AT_ONCE:
            out = torch.empty_like(self._firsts[self._done])
            outs.append(out)
            size += out.nbytes
            self._done += 1
        pointers = [out.data_ptr() for out in outs]
        found = self._core.merge(self._shares, start, pointers, torch.get_num_threads())
        for name, out, status in zip(self._names[start:], outs, found, strict=False):
            # What no space is on need not be finite: masks hold infinities.
            if status == 0 or (status == 1 and name in self._own):
                yield name, out, status == 0


# Bytes of merged tensors that are made by one call: a merge holds little beside what it has handed out.
_AT_ONCE = 32 * 2**20


def merging_of(
    spec: PermutationSpec,
    labels: Mapping[str, Tensor],
    widths: Mapping[str, int],
    state_dicts: Sequence[Mapping[str, Tensor]],
    shares: Sequence[float],
) -> Merging | None:
    """The merged tensors of these models that can be made at once, or None. Arguments are those of a plan, checked."""
    if any(widths[space.name] != space.width for space in spec.spaces):
        return None
    if any(type(state_dict) not in _IN_MEMORY for state_dict in state_dicts):
        return None
    models = len(state_dicts)
    first = state_dicts[0]
    names = [name for name in first if name in spec.entries or _is_floating(first[name])]
    flat = [state_dict[name] for name in names for state_dict in state_dicts]
    described = _core.describe(flat, models)
    if described is None:  # at least one that has to be merged the plain way; the others are not
        each = {name: [state_dict[name] for state_dict in state_dicts] for name in names}
        names = [name for name in names if _core.describe(each[name], models) is not None]
        flat = [x for name in names for x in each[name]]
        described = _core.describe(flat, models)
        if described is None:
            return None
    kinds = ("merge", models, tuple(names), described[0])
    known = spec.resolved.get(kinds)
    if known is None:
        known = spec.resolved[kinds] = _resolve_merge(spec, dict(zip(names, flat[::models], strict=True)), models)
        while len(spec.resolved) > _KEPT:
            spec.resolved.popitem(last=False)
    layout, within = known
    pointers = described[1]
    if len(within) < len(names):
        pointers = [p for k in within for p in pointers[k * models : (k + 1) * models]]
        names, flat = [names[k] for k in within], [x for k in within for x in flat[k * models : (k + 1) * models]]
    order = [space.width for space in spec.spaces]
    core = _core.Network(layout, pointers, False, order, 0.5, 1.0, [None] * len(order))
    for k, space in enumerate(spec.spaces):
        core.set_labels(k, labels[space.name], space.width)
    return Merging(core, names, flat[::models], list(shares), spec.entries)


def _is_floating(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _resolve_merge(
    spec: PermutationSpec, tensors: Mapping[str, Tensor], models: int
) -> tuple[_core.NetworkLayout, list[int]]:
    """The integers of a merge, and which tensors are in it: those on which at most two single dims are relabelled.

    tensors: the first model's.
    """
    maps = _Maps(spec.index)
    made: list[tuple[str, tuple[int, int, int, int, int], int, int]] = []
    within: list[int] = []
    for k, (name, tensor) in enumerate(tensors.items()):
        shape = tuple(tensor.shape)
        groups = spec.groups(name, shape)
        if len(groups) > 2 or any(len(g.dims) > 1 for g in groups):
            continue
        within.append(k)
        if not groups:
            made.append((_FLOATS[tensor.dtype], (prod(shape[:-1]), 1, 1, 1, prod(shape[-1:])), -1, -1))
            continue
        places = [g.dims[0] for g in groups]
        numbers = [maps.of(g) for g in groups]
        inner = prod(shape[places[-1] + 1 :])
        if len(groups) == 2:
            a, b = places
            sizes = prod(shape[:a]), shape[a], prod(shape[a + 1 : b]), shape[b], inner
            first, second = numbers
        elif inner < _SHORT:
            sizes = prod(shape[: places[0]]), 1, 1, shape[places[0]], inner
            first, second = -1, numbers[0]
        else:
            sizes = prod(shape[: places[0]]), shape[places[0]], 1, 1, inner
            first, second = numbers[0], -1
        made.append((_FLOATS[tensor.dtype], sizes, first, second))
    spaces: list[Any] = [(space.width, space.blocks, space.within == "fixed", False, []) for space in spec.spaces]
    return _core.NetworkLayout(models, spaces, maps.made, [[] for _ in spaces], made), within


_SHORT = 16  # elements below which a row is gathered piece by piece instead of being one
