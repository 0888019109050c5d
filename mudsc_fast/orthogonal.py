"""Orthogonal maps of a space's units: the best one, and tensors written in the coordinates it gives."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mudsc_fast.axes import rows
from mudsc_fast.spaces import Axis, Tap

# What may be done inside a block of units: any orthogonal map; one that keeps the vector of ones, and so the mean over
# the units, which a layer norm takes away; or turns of the planes that a rotary embedding turns, units i and i + n / 2
# (as Llama has them) or 2 i and 2 i + 1.
KINDS = ("any", "mean", "halves", "neighbours")


@dataclass(frozen=True)
class Map:
    """Units that may be rotated: `blocks` times the same number, each block by an orthogonal map of its own.

    axes: where the units stand in tensors; they are flattened in block order. taps: where they are seen. kind: one of
    KINDS. tie: that of the spaces whose blocks these are.
    """

    name: str
    width: int
    blocks: int
    axes: tuple[Axis, ...]
    taps: tuple[Tap, ...]
    kind: str = "any"
    tie: str | None = None

    @property
    def each(self) -> int:
        """Units of a block."""
        return self.width // self.blocks


def nearest(crossed: Tensor, kind: str = "any") -> Tensor:
    """The orthogonal maps R of a kind that make the sum of R * crossed greatest (orthogonal Procrustes).

    crossed: (..., n, n) float64, [..., i, j]: the product of unit i of the first model and unit j of the second. With R
    applied to the second model's units they come nearest to the first's. Returns (..., n, n).
    """
    if kind in ("halves", "neighbours"):
        return _turns(crossed, kind)
    if kind == "mean":
        basis = without_mean(crossed.shape[-1]).to(crossed)
        kept: Tensor = basis @ nearest(basis.T @ crossed @ basis) @ basis.T + 1 / crossed.shape[-1]
        return kept
    u, _, v = torch.linalg.svd(crossed)
    best: Tensor = u @ v
    return best


def without_mean(n: int) -> Tensor:
    """(n, n - 1) float64: an orthonormal basis of the vectors whose entries sum to 0."""
    k = torch.arange(1, n, dtype=torch.float64)
    basis = torch.ones(n, n - 1, dtype=torch.float64).triu()
    basis[1:].diagonal().copy_(-k)
    scaled: Tensor = basis / (k * (k + 1)).sqrt()
    return scaled


def _planes(n: int, kind: str) -> tuple[Tensor, Tensor]:
    units = torch.arange(n)
    return (units[: n // 2], units[n // 2 :]) if kind == "halves" else (units[::2], units[1::2])


def _turns(crossed: Tensor, kind: str) -> Tensor:
    a, b = _planes(crossed.shape[-1], kind)
    angle = torch.atan2(crossed[..., b, a] - crossed[..., a, b], crossed[..., a, a] + crossed[..., b, b])
    result = torch.zeros_like(crossed)
    result[..., a, a] = result[..., b, b] = angle.cos()
    result[..., b, a] = angle.sin()
    result[..., a, b] = -angle.sin()
    return result


def unfolded(tensor: Tensor, axis: Axis, blocks: int) -> Tensor:
    """(blocks, units a block, rest): a copy of the tensor with the axis' units in front."""
    view, dims = rows(tensor, axis)
    front = view.movedim(dims, tuple(range(len(dims))))
    units = front.shape[: len(dims)].numel()
    return front.reshape(blocks, units // blocks, -1)


def rotate_(state: MutableMapping[str, Tensor], part: Map, rotation: Tensor) -> None:
    """Every tensor of the map in the rotated coordinates, in place; rotation: (blocks, n, n)."""
    for axis in part.axes:
        view, dims = rows(state[axis.tensor], axis)
        front = view.movedim(dims, tuple(range(len(dims))))
        front.copy_((rotation.to(front) @ unfolded(state[axis.tensor], axis, part.blocks)).reshape(front.shape))


def crossed_weights(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], part: Map, all_blocks: bool = False
) -> Tensor:
    """(blocks, n, n) float64: products of both models' weights at each pair of units, as a share of their lengths.

    The sum of the blocks' traces is the cosine between all weights that touch the units. all_blocks: also of each block
    with each other, (blocks, blocks, n, n).
    """
    total, lengths = torch.zeros((), dtype=torch.float64), [0.0, 0.0]
    for axis in part.axes:
        a, b = (unfolded(state[axis.tensor], axis, part.blocks).double() for state in (first, second))
        total = total + ((a[:, None] if all_blocks else a) @ b.mT).cpu()
        lengths = [lengths[0] + float(a.square().sum()), lengths[1] + float(b.square().sum())]
    cosines: Tensor = total / max((lengths[0] * lengths[1]) ** 0.5, 1e-300)
    return cosines
