"""Weight similarity of a space whose tensors do not fit in memory together: one tensor of each model at a time.

The columns of all tensors are samples, so a Covariance adds them up (docs/method.md rule 2 is the same correlation as
rule 1). Two of these tensors are in memory, or, where dim 0 holds columns that no space touches (an embedding's
vocabulary), a slab of their rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mudsc_fast.axes import Columns, columns
from mudsc_fast.covariance import Covariance
from mudsc_fast.distributed import World, owners
from mudsc_fast.layout import dims_of
from mudsc_fast.regrouping import regroup
from mudsc_fast.weights import Weights

# Columns that UnitTiles multiplies at a time.
_BLOCK = 512

if TYPE_CHECKING:
    from mudsc_fast.spaces import Axis, Space
    from mudsc_fast.spec import PermutationSpec


def streamed_similarity(
    spec: PermutationSpec,
    space: Space,
    weights: Weights,
    labels: Mapping[str, Tensor],
    widths: Mapping[str, int],
    activation: Covariance | None,
    balance: float,
    scope: str,
    piece: int,
    device: torch.device | None = None,
    world: World | None = None,
) -> Tensor:
    """The similarity that `dual_similarity` gives for the space's tensors, up to rounding.

    labels, widths: of the spaces that are matched already, (models, width) and merged units. activation: of the space,
        or None for the weights alone. scope: "cross" or "full". piece: bytes of the models' rows that are read at once,
        where rows can be read apart. device: where to compute; None: where the tensors are.
    world: processes that make this call together: each adds up its share of the tensors, and all get the whole.
    Errors as `dual_similarity`; a space without tensors to compare must not be given.
    """
    compared = [axis for axis in space.axes if axis.compare]
    if not compared:
        raise ValueError(f"terms: space {space.name!r} has no tensors to compare")
    if world is None:
        sums = _summed(spec, space, compared, weights, labels, widths, scope, piece, device)
    else:
        sizes = {k: float(torch.Size(weights.info(0, axis.tensor)[0]).numel()) for k, axis in enumerate(compared)}
        rank_of = owners(sizes, {k: set() for k in sizes}, world.size)
        own = [axis for k, axis in enumerate(compared) if rank_of[k] == world.rank]
        found: list[Covariance] = []
        # An error in one process's tensors has to reach the others before they wait for its sums.
        world.exchange(lambda: found.append(_summed(spec, space, own, weights, labels, widths, scope, piece, device)))
        sums = found[0]
        sums.all_reduce(world.group)
    result = sums.correlation_blocks(scope)
    del sums
    if activation is None or balance >= 1.0:
        return result
    by_activation = activation.correlation_blocks(scope).to(result.device)
    result = result.to(by_activation.dtype)
    return result.mul_(balance).add_(by_activation, alpha=1.0 - balance)


def _summed(
    spec: PermutationSpec,
    space: Space,
    axes: Sequence[Axis],
    weights: Weights,
    labels: Mapping[str, Tensor],
    widths: Mapping[str, int],
    scope: str,
    piece: int,
    device: torch.device | None,
) -> Covariance:
    """The columns of some axes' tensors, added up."""
    sums: Covariance | None = None
    for axis in axes:
        for tensors in _pieces(spec, axis, weights, piece):
            here = [x if device is None else x.to(device) for x in tensors]
            seen = columns(spec, space.name, axis, here, labels, widths)
            del here, tensors
            if sums is None:
                sums = Covariance(space.width, weights.models, scope, seen[0].tensor.device)
            sums.update([_samples(c) for c in seen], dim=0)
            del seen
    return Covariance(space.width, weights.models, scope, device or "cpu") if sums is None else sums


class UnitTiles:
    """Rows of the "full" similarity by weights of a space, whose square does not fit in memory; its tensors do.

    Arguments as `streamed_similarity`. width: the units of all models.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        space: Space,
        weights: Weights,
        labels: Mapping[str, Tensor],
        widths: Mapping[str, int],
        device: torch.device | None = None,
    ) -> None:
        self._terms: list[list[Tensor]] = []
        for axis in space.axes:
            if axis.compare:
                tensors = [weights.finite(m, axis.tensor) for m in range(weights.models)]
                here = [x if device is None else x.to(device) for x in tensors]
                seen = columns(spec, space.name, axis, here, labels, widths)
                self._terms.append([_samples(c).reshape(space.width, -1) for c in seen])
        self.width = space.width * weights.models
        count = sum(matrices[0].shape[1] for matrices in self._terms)
        mean = sum((self._block(t, at).sum(dim=1) for t, at in self._places()), torch.zeros(1)) / count
        squares = sum(
            ((self._block(t, at) - mean[:, None]).square().sum(dim=1) for t, at in self._places()), torch.zeros(1)
        )
        # The rule for dead units of the other ways: a deviation of at most 1e-7 of the root mean square.
        dead = squares / count <= 1e-14 * (squares / count + mean.square())
        self._mean, self._scale = mean.float()[:, None], torch.where(dead, 0.0, squares.rsqrt()).float()[:, None]

    def tile(self, rows: Tensor) -> Tensor:
        """(len(rows), width) float32: these rows of the similarity."""
        result = torch.zeros(len(rows), self.width, device=self._mean.device)
        for t, at in self._places():
            block = self._block(t, at, torch.float32).sub_(self._mean).mul_(self._scale)
            result.addmm_(block[rows.to(block.device)], block.T)
        return result.clamp_(-1.0, 1.0)

    def _places(self) -> Iterator[tuple[int, int]]:
        for t, matrices in enumerate(self._terms):
            for at in range(0, matrices[0].shape[1], _BLOCK):
                yield t, at

    def _block(self, term: int, at: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Some columns of all models' units, in memory of its own."""
        return torch.cat([x[:, at : at + _BLOCK].to(dtype, copy=True) for x in self._terms[term]])


def rows_apart(spec: PermutationSpec, name: str) -> bool:
    """Whether no space touches dim 0 of a tensor, so that its rows can be compared piece by piece."""
    return not any(0 in dims_of(axis) for _, axis in spec.entries[name])


def _pieces(spec: PermutationSpec, axis: Axis, weights: Weights, piece: int) -> Iterator[list[Tensor]]:
    """The tensor of every model, whole or a slab of rows at a time."""
    name, models = axis.tensor, range(weights.models)
    shape, dtype = weights.info(0, name)
    for m in models:
        weights.info(m, name)
    row = torch.Size(shape[1:]).numel() * dtype.itemsize * weights.models
    if not shape or row * shape[0] <= piece or not rows_apart(spec, name):
        yield [weights.finite(m, name) for m in models]
        return
    step = max(1, piece // row)
    for start in range(0, shape[0], step):
        slabs = [weights.rows(m, name, slice(start, start + step)) for m in models]
        for m, slab in enumerate(slabs):
            weights.require_finite(slab, m, name)
        yield slabs


def _samples(seen: Columns) -> Tensor:
    """(units, ...): the tensor with its units first and its other dims in merged coordinates."""
    x = seen.tensor
    for dims, labels in seen.labels.items():
        x = _merged(x, dims, labels, seen.sizes[dims], seen.scale.get(dims))
    front = tuple(range(len(seen.rows)))
    x = x.movedim(seen.rows, front)
    return x if len(front) == 1 else x.flatten(0, len(front) - 1)


def _merged(x: Tensor, dims: Sequence[int], labels: Tensor, size: int, scale: Tensor | None) -> Tensor:
    order = torch.arange(labels.numel())
    one = scale is None or bool((scale == 1).all())
    if one and size == labels.numel() and torch.equal(labels, order):
        return x
    if not one or size != labels.numel() or not torch.equal(labels.sort().values, order):
        # Sums and factors do not fit in 16 bits.
        x = x.to(torch.promote_types(x.dtype, torch.float32))
    elif x.element_size() == 1:
        x = x.to(torch.float32)
    labels, scale = labels.to(x.device), None if one else scale
    if len(dims) == 1:
        return regroup(x, labels, dims[0], size, scale)
    front = tuple(range(len(dims)))
    moved = x.movedim(tuple(dims), front)
    merged = regroup(moved.flatten(0, len(dims) - 1), labels, 0, size, scale)
    # The merged units take the place of the first of the dims; the others keep one entry each.
    return merged.reshape(size, *[1] * (len(dims) - 1), *moved.shape[len(dims) :]).movedim(front, tuple(dims))
