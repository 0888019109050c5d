"""CUDA tensors on the CPU kernels: inputs are copied to the host, results back. For ops without a GPU kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mudsc_fast.backends import cpu

if TYPE_CHECKING:
    from mudsc_fast.covariance import Covariance
    from mudsc_fast.similarity import Table


def regroup(tensor: Tensor, out: Tensor, dim: int, ptr: Tensor, members: Tensor, scale: Tensor | None) -> None:
    """Fill ``out`` with the regrouped ``tensor``; see ``mudsc_fast.regroup``."""
    result = out.cpu()
    cpu.regroup(tensor.cpu(), result, dim, ptr, members, scale)
    out.copy_(result)


def zip(
    similarity: Tensor,
    units: Tensor,
    model_of: Tensor,
    merges: int,
    attenuation: float,
    budget: Tensor,
    block_budget: int,
    owner: Tensor,
) -> list[tuple[float, int]]:
    """Zip unions of units of a similarity; the index vectors are host memory already."""
    return cpu.zip(similarity.cpu(), units, model_of, merges, attenuation, budget, block_budget, owner)


def assign(similarity: Tensor, start: Tensor | None, indices: Tensor, out: Tensor) -> None:
    """Solve a batch of assignments."""
    found, written = indices.cpu(), out.cpu()
    cpu.assign(similarity.cpu(), start, found, written)
    indices.copy_(found)
    out.copy_(written)


def assign_tile(tile: Tensor, first_row: int, prices: Tensor, room: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find the best columns of some rows; see ``mudsc_fast.backends.cpu``."""
    return cpu.assign_tile(tile.cpu(), first_row, prices, room)


def similarity(
    tables: list[list[Table]],
    width: int,
    models: int,
    cross: bool,
    balance: float,
    activation: Covariance | None,
    device: torch.device,
) -> Tensor:
    """Similarity of CUDA tensors; labels are host memory already, the result goes to ``device``."""
    moved = [[(tensor.cpu(), rows, labelled) for tensor, rows, labelled in row] for row in tables]
    return cpu.similarity(moved, width, models, cross, balance, activation, device)
