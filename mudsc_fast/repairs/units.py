"""What the merged net's units should be, by the parents': the means of their members, or their leaders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mudsc_fast.leading import axis_labels_of
from mudsc_fast.regrouping import regroup

if TYPE_CHECKING:
    from mudsc_fast.plan import MergePlan


@dataclass(frozen=True)
class Rows:
    """How the outputs of one layer of every parent become the merged layer's.

    labels: (models, outputs) int64: the merged output of each output; `size` for one that counts for nothing. None:
        outputs correspond one to one. scale: (size,), what each member counts for.
    free: no space owns the outputs; they are the model's own.
    """

    labels: Tensor | None
    scale: Tensor
    size: int
    free: bool

    def expected(self, outputs: Sequence[Tensor], dim: int) -> Tensor:
        """The merged layer's output by the parents': one tensor each, with the units on `dim`."""
        dim %= outputs[0].dim()
        if self.labels is None:
            return torch.stack(list(outputs)).mean(0)
        scale = torch.cat((self.scale, self.scale.new_zeros(1)))
        total = regroup(outputs[0], self.labels[0], dim, self.size + 1, scale)
        for m in range(1, len(outputs)):
            total += regroup(outputs[m], self.labels[m], dim, self.size + 1, scale)
        return total.narrow(dim, 0, self.size)

    def mean_of(self, values: Tensor) -> Tensor:
        """The same for one number an output: (models, outputs) to (size,), float64."""
        return self.expected(list(values.double()), 0)


def rows_of(plan: MergePlan, weight: str, shape: Sequence[int]) -> Rows | None:
    """The Rows of the layer with this weight name and shape in the parents; None where dim 0 is not its own axis."""
    outputs = shape[0]
    if weight in plan.spec.entries:
        for axis in axis_labels_of(plan, weight, shape):
            if 0 in axis.dims:
                if axis.dims != (0,):
                    return None
                members = axis.labels.reshape(-1).bincount(minlength=axis.size)[: axis.size]
                return Rows(axis.labels, members.clamp(min=1).double().reciprocal(), axis.size, False)
    return Rows(None, torch.ones(outputs, dtype=torch.float64), outputs, True)
