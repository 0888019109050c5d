"""Where the positions of a tensor go under a plan in which some merged units are produced by a leader alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mudsc_fast.axes import AxisMap, axis_labels, rows
from mudsc_fast.layout import dims_of

if TYPE_CHECKING:
    from mudsc_fast.plan import MergePlan
    from mudsc_fast.spec import PermutationSpec


def axis_labels_of(plan: MergePlan, name: str, shape: Sequence[int]) -> list[AxisMap]:
    """Where every position of this tensor goes under a plan; see `led`."""
    maps = axis_labels(plan.spec, name, shape, plan.labels, plan.widths)
    return led(plan.spec, name, shape, maps, plan.leaders)


def led(
    spec: PermutationSpec, name: str, shape: Sequence[int], maps: Sequence[AxisMap], leaders: Mapping[str, Tensor]
) -> list[AxisMap]:
    """The maps, with members of out axes that do not lead sent to the position past the last, which is nowhere."""
    return [
        replace(axis, labels=torch.where(_leading(spec, name, shape, axis, leaders), axis.labels, axis.size))
        if axis.role == "out" and any(space.name in leaders for space, _ in spec.entries[name])
        else axis
        for axis in maps
    ]


def _leading(
    spec: PermutationSpec, name: str, shape: Sequence[int], axis: AxisMap, leaders: Mapping[str, Tensor]
) -> Tensor:
    """(models, positions) bool: which positions of an out axis belong to leaders in every space with leaders."""
    models = axis.labels.shape[0]
    inside = [shape[d] if d in axis.dims else 1 for d in range(len(shape))]
    result = torch.ones(models, *inside, dtype=torch.bool)
    for space, place in spec.entries[name]:
        if space.name in leaders and set(dims_of(place)) <= set(axis.dims):
            leads = torch.zeros(models * space.width, dtype=torch.bool)
            leads[leaders[space.name]] = True
            for m, mine in enumerate(leads.reshape(models, space.width)):
                view, dims = rows(result[m], place)
                sizes = [view.shape[d] for d in dims]
                view = view.movedim(dims, tuple(range(len(dims))))
                view &= mine.reshape(*sizes, *[1] * (view.dim() - len(dims)))
    return result.reshape(models, -1)
