"""The finished match applied to checkpoints (docs/method.md rule 9)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .axes import groups_of, targets
from .weights import StateDict, merge_tensors, regroup_dims


class MergePlan:
    """The labels of every space: labels[space][m, i] = j puts unit i of model m into merged unit j.

    Args:
        spec: the spaces.
        labels: {space: (models, width), int64}.
        method: "align" or "zip".
        values: {space: mean similarity of what was matched}.
        history: mean value of every sweep.
    """

    def __init__(
        self,
        spec: Any,
        labels: Mapping[str, Tensor],
        method: str,
        values: Mapping[str, float] | None = None,
        history: Sequence[float] = (),
    ) -> None:
        self.spec, self.method = spec, method
        self.labels = {space.name: labels[space.name] for space in spec.spaces}
        self.values = dict(values or {})
        self.history = list(history)

    def merge(self, state_dicts: Sequence[StateDict], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
        """Return the merged state dict.

        Args:
            state_dicts: one mapping a model, with the same names and shapes.
            weights: one share >= 0 a model, or None for all alike: "out" axes take the weighted mean over a unit's
                members, everything else the weighted mean over models.

        Returns:
            Tensors of model 0's dtypes; integer and bool tensors are model 0's.

        Raises:
            ValueError: names or shapes that disagree, or shares that are negative or all 0.

        Source: docs/method.md rule 9.
        """
        shares = [1.0] * len(state_dicts) if weights is None else [float(w) for w in weights]
        if len(shares) != len(state_dicts) or min(shares) < 0 or sum(shares) <= 0:
            raise ValueError(f"weights: expected one share >= 0 a model ({len(state_dicts)}), got {shares}")
        merged = {}
        for name in state_dicts[0]:
            if any(name not in other or other[name].shape != state_dicts[0][name].shape for other in state_dicts):
                raise ValueError(f"state_dicts: {name!r} is missing or has another shape in one model")
            merged[name] = merge_tensors(self.spec, name, [s[name] for s in state_dicts], self.labels, shares)
        return merged

    def align(self, state_dict: StateDict, model: int = 1) -> dict[str, Tensor]:
        """Return this model's own function in model 0's unit order.

        Args:
            model: which of the plan's models state_dict is.

        Raises:
            ValueError: a zip plan.
        """
        if self.method != "align":
            raise ValueError(f'align: expected a plan of method "align", got {self.method!r}')
        own = {name: rows[model : model + 1] for name, rows in self.labels.items()}
        aligned = {}
        for name, tensor in state_dict.items():
            x = tensor.detach()
            for group in groups_of(self.spec, name, x.shape):
                where, sizes = targets(group, own, 1)
                x = regroup_dims(x, group, where[0], sizes)
            aligned[name] = x.to(tensor.dtype, copy=True)
        return aligned
