"""Tensors of several checkpoints, read when needed and checked as they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mudsc_fast.spec import PermutationSpec


class Weights:
    """The tensors of one state dict a model, with errors that name the model and the tensor.

    state_dicts: mappings from names to tensors; a value is read again at every use and never kept, so that a lazy
        mapping holds no more than the tensors in use. Tensors that require grad are detached.
    spec: its tensors must be in every state dict, and be floating where `floating` reads them.
    whole: all state dicts must have the same names, also outside the spec.
    """

    def __init__(self, state_dicts: Sequence[Mapping[str, Tensor]], spec: PermutationSpec, whole: bool = False) -> None:
        for m, state_dict in enumerate(state_dicts):
            if not isinstance(state_dict, Mapping):
                raise TypeError(
                    f"state_dicts: expected mappings of tensors, got {type(state_dict).__name__} for model {m}"
                )
        self._state_dicts = list(state_dicts)
        self._shapes: dict[str, torch.Size] = {}
        self._finite: set[tuple[int, str]] = set()
        self.names = list(self._state_dicts[0])
        self.in_spec = spec.entries.keys()
        every = set(self.names)
        for m, state_dict in enumerate(self._state_dicts):
            # Not `name in state_dict`: a Mapping may answer that by reading the tensor.
            present = set(state_dict)
            if not self.in_spec <= present:
                name = sorted(self.in_spec - present)[0]
                raise ValueError(f"state_dicts: model {m} has no tensor {name!r}, which the spec names")
            if whole and present != every:
                name = sorted(present ^ every)[0]
                has, lacks = (m, 0) if name in present else (0, m)
                raise ValueError(f"state_dicts: model {has} has a tensor {name!r} that model {lacks} lacks")

    @property
    def state_dicts(self) -> list[Mapping[str, Tensor]]:
        """The mappings, one a model."""
        return self._state_dicts

    @property
    def models(self) -> int:
        """Number of state dicts."""
        return len(self._state_dicts)

    def raw(self, model: int, name: str) -> Tensor:
        """The tensor, of any dtype; ValueError if its shape is not that of the same tensor read before."""
        x = self._state_dicts[model][name]
        if not isinstance(x, Tensor):
            raise TypeError(f"state_dicts: {name!r} of model {model} is no tensor but {type(x).__name__}")
        shape = self._shapes.setdefault(name, x.shape)
        if x.shape != shape:
            raise ValueError(
                f"state_dicts: {name!r} has shape {tuple(x.shape)} in model {model}, but {tuple(shape)} in another"
            )
        return x.detach()

    def info(self, model: int, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype; not read where the mapping has a `layout` (as a `Checkpoint` has)."""
        layout = getattr(self._state_dicts[model], "layout", None)
        if layout is None:
            x = self.raw(model, name)
            return tuple(x.shape), x.dtype
        shape = self._shapes.setdefault(name, torch.Size(layout[name].shape))
        if tuple(layout[name].shape) != tuple(shape):
            raise ValueError(
                f"state_dicts: {name!r} has shape {tuple(layout[name].shape)} in model {model}, but {tuple(shape)} in "
                "another"
            )
        return tuple(shape), layout[name].dtype

    def rows(self, model: int, name: str, rows: slice | Tensor) -> Tensor:
        """Some rows (indices of dim 0) of a tensor; the others are not read where the mapping can do without."""
        read = getattr(self._state_dicts[model], "rows", None)
        x = self.raw(model, name)[rows] if read is None else read(name, rows)
        return x.detach()

    def floating(self, model: int, name: str) -> Tensor:
        """The tensor, which must be real and floating, else TypeError."""
        x = self.raw(model, name)
        self.require_floating(x, model, name)
        return x

    def finite(self, model: int, name: str) -> Tensor:
        """The floating tensor without NaN or inf, else ValueError; looked at on the first reading only."""
        x = self.floating(model, name)
        if (model, name) not in self._finite:
            self.require_finite(x, model, name)
            self._finite.add((model, name))
        return x

    def require_floating(self, x: Tensor, model: int, name: str) -> None:
        """TypeError, naming the tensor that `x` is of, unless it is floating."""
        if not x.is_floating_point():
            raise TypeError(f"state_dicts: {name!r} of model {model} must be floating to be merged, got {x.dtype}")

    def require_finite(self, x: Tensor, model: int, name: str) -> None:
        """TypeError or ValueError, naming the tensor that `x` is of, unless it is floating and without NaN or inf."""
        self.require_floating(x, model, name)
        if not is_finite(x):
            raise ValueError(f"state_dicts: {name!r} of model {model} holds NaN or inf")


def is_finite(x: Tensor) -> bool:
    """Whether a floating tensor holds neither NaN nor inf."""
    if x.numel() == 0:
        return True
    if x.element_size() == 1:
        x = x.to(torch.float32)
    # The extremes carry NaN and inf along; isfinite().all() would write a mask as large as the tensor.
    low, high = torch.aminmax(x)
    return bool(torch.isfinite(low) & torch.isfinite(high))
