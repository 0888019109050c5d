"""How many numbers a merged network holds, by the widths of its spaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mudsc_fast.arguments import check_spec
from mudsc_fast.axes import axis_labels
from mudsc_fast.spec import shape_of

if TYPE_CHECKING:
    from mudsc_fast.layout import Group
    from mudsc_fast.spaces import Space
    from mudsc_fast.spec import PermutationSpec


class _Sum(NamedTuple):
    """The merged size of some dims of a tensor: `still` positions that no space moves, and one product a piece.

    parts: (positions a unit, the spaces of which each block's units count) of every piece.
    """

    still: int
    parts: tuple[tuple[int, tuple[Space, ...]], ...]

    def size(self, widths: Mapping[str, int]) -> int:
        total = self.still
        for factor, spaces in self.parts:
            for space in spaces:
                factor *= widths[space.name] // space.blocks
            total += factor
        return total


class Counts:
    """The numbers in a merged state dict, for any widths of the spaces; exact.

    spec: the spaces. shapes: {tensor: a tensor or its shape} of one model. Every tensor of the state dict counts, the
    running statistics of a batch norm too.
    """

    def __init__(self, spec: PermutationSpec, shapes: Mapping[str, Any]) -> None:
        spec.check(shapes)
        self._still = 0
        self._tensors: list[tuple[int, tuple[_Sum, ...]]] = []
        self._of_space: dict[str, list[int]] = {space.name: [] for space in spec.spaces}
        for name, value in shapes.items():
            shape = shape_of(value)
            if name not in spec.entries:
                self._still += prod(shape)
                continue
            groups = spec.groups(name, shape)
            moved = {d for group in groups for d in group.dims}
            for space in {space.name for space, _ in spec.entries[name]}:
                self._of_space[space].append(len(self._tensors))
            factor = prod(size for d, size in enumerate(shape) if d not in moved)
            self._tensors.append((factor, tuple(_sum_of(group) for group in groups)))

    def total(self, widths: Mapping[str, int]) -> int:
        """Of the whole network; widths: of every space."""
        return self._still + sum(self._size(k, widths) for k in range(len(self._tensors)))

    def of(self, space: str, widths: Mapping[str, int]) -> int:
        """Of the tensors that a space indexes."""
        return sum(self._size(k, widths) for k in self._of_space[space])

    def near(self, space: str, spec: PermutationSpec) -> set[str]:
        """The spaces that share a tensor with this one, itself among them."""
        return {other.name for axis in spec[space].axes for other, _ in spec.entries[axis.tensor]}

    def _size(self, k: int, widths: Mapping[str, int]) -> int:
        factor, groups = self._tensors[k]
        for group in groups:
            factor *= group.size(widths)
        return factor


def merged_parameters(state_dict: Mapping[str, Any], spec: PermutationSpec, widths: Mapping[str, int]) -> int:
    """The numbers in the state dict that a merge to these widths gives.

    state_dict: of one model, or {tensor: shape}. spec: its spaces. widths: {space: merged units}, not shares; spaces
    left out keep theirs. ValueError for a space that the spec has not, for widths that are no whole units of its
    blocks, and for a spec that does not fit the tensors; TypeError for what is no spec or no mapping.
    """
    check_spec(spec)
    if not isinstance(widths, Mapping):
        raise TypeError(f"widths: expected a mapping from spaces to units, got {widths!r}")
    full = {space.name: space.width for space in spec.spaces}
    for name, width in widths.items():
        if name not in full:
            raise ValueError(f"widths: the spec has no space {name!r}")
        if isinstance(width, bool) or not isinstance(width, int) or width < 1 or width % spec[name].blocks:
            blocks = spec[name].blocks
            raise ValueError(f"widths: expected units in {blocks} blocks for space {name!r}, got {width!r}")
        full[name] = width
    return Counts(spec, state_dict).total(full)


def can_resize(space: Space, spec: PermutationSpec, shapes: Mapping[str, Any]) -> bool:
    """Whether the spec lets the space change its width on all its tensors."""
    if space.within == "fixed":
        return False
    labels = doubled(space, 2)[:1]
    try:
        for name in {axis.tensor for axis in space.axes}:
            axis_labels(spec, name, shape_of(shapes[name]), {space.name: labels}, {space.name: 2 * space.width})
    except ValueError:
        return False
    return True


def doubled(space: Space, models: int) -> torch.Tensor:
    """(models, width) int64: labels under which every unit of every model stays itself, block by block."""
    each = space.width // space.blocks
    place = torch.arange(models)[:, None] * each + torch.arange(each)
    block = torch.arange(space.blocks)[:, None] * (models * each)
    return (block + place[:, None]).reshape(models, -1)


def _sum_of(group: Group) -> _Sum:
    parts: list[tuple[int, tuple[Space, ...]]] = []
    covered = 0
    for piece in group.pieces:
        positions = prod(piece.factors)
        covered += positions
        spaces: Sequence[Space] = [m.space for m in piece.members if m.inner]
        inner = prod(piece.factors[f] for m in piece.members for f in m.inner)
        parts.append((positions // inner, tuple(spaces)))
    return _Sum(prod(group.sizes) - covered, tuple(parts))
