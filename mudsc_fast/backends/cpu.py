"""Thin calls into the compiled CPU kernels. Arguments are checked by the public functions above."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from mudsc_fast import _core
from mudsc_fast.backends.cpu_covariance import CpuCovariance, similarity_shape

if TYPE_CHECKING:
    from mudsc_fast.covariance import Covariance
    from mudsc_fast.similarity import Table


class Lists(Protocol):
    """Columns of each row, row after row from ptr[i] on, by falling key (s - price when the list was made)."""

    ptr: Tensor
    columns: Tensor
    values: Tensor
    keys: Tensor
    threshold: Tensor


# Types that DLPack or the kernels do not know are moved as integers of the same size.
_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_known(tensor: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Both as types that the kernels know: complex ones as pairs, others that are only moved as integers."""
    if tensor.is_floating_point() and tensor.element_size() > 1:
        return tensor, out
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj()), torch.view_as_real(out)
    moved = _SAME_SIZE[tensor.element_size()]
    return tensor.view(moved), out.view(moved)


def regroup(tensor: Tensor, out: Tensor, dim: int, ptr: Tensor, members: Tensor, scale: Tensor | None) -> None:
    """Fill ``out`` with the regrouped ``tensor``; see ``mudsc_fast.regroup``."""
    tensor, out = as_known(tensor, out)
    _core.regroup(tensor, out, dim, ptr, members, scale, torch.get_num_threads())


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
    """Zip each union of units; one (sum of the entries taken, merges made) a union, none after one that falls short.

    Args:
        similarity: the matrix, float32 or float64.
        units: (unions, n), int64: rows of the similarity. This and what follows is host memory on every backend.
        model_of: (unions, n), int32.
        merges: how many to make in each union.
        attenuation: factor on a merged unit's similarities.
        budget: (models,), int64: merges left inside each model, which the unions share in their order; lowered.
        block_budget: the same for one union alone.
        owner: (unions, n), int64, written: the unit that each joined, an index into its union.

    Unions run side by side on several threads; results are those of one after another.
    """
    threads = torch.get_num_threads()
    return _core.zip_unions(similarity, units, model_of, merges, attenuation, budget, block_budget, owner, threads)


def assign(similarity: Tensor, start: Tensor | None, indices: Tensor, out: Tensor) -> None:
    """Solve a batch of assignments; ``out`` takes values, gaps and duals. See ``mudsc_fast.assign``."""
    _core.assign(similarity, start, indices, out, torch.get_num_threads())


def assign_tile(tile: Tensor, first_row: int, prices: Tensor, room: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find the ``room`` columns of each row of a tile that are worth most at some prices.

    Returns:
        columns: (rows, room) int32, in any order; values: (rows, room) float64, their entries; threshold: (rows,)
        float64, no column left out has a larger s - price; maxima: (rows,) float64, the largest s - price. CPU tensors.
    """
    rows = len(tile)
    columns = torch.empty(rows * room, dtype=torch.int32)
    values = torch.empty(rows * room, dtype=torch.float64)
    threshold = torch.empty(rows if room else 0, dtype=torch.float64)
    maxima = torch.empty(rows, dtype=torch.float64)
    _core.assign_tile(tile, first_row, prices, room, columns, values, threshold, maxima, torch.get_num_threads())
    return columns.view(rows, room), values.view(rows, room), threshold, maxima


def assign_lists(lists: Lists, prices: Tensor, column_of: Tensor) -> tuple[int, Tensor]:
    """Match rows on their lists as far as they can tell; writes prices and column_of.

    Returns:
        How many rows have no column, and which rows need a longer list.
    """
    wanted = torch.empty(len(prices), dtype=torch.uint8)
    free = _core.assign_lists(
        lists.ptr, lists.columns, lists.values, lists.keys, lists.threshold, prices, column_of, wanted
    )
    return free, wanted.nonzero()[:, 0]


# The Assignment of one small matrix, or None for anything that ``assign`` has to see.
assign_lone = _core.assign_lone


def covariance(width: int, models: int, cross: bool, device: torch.device) -> CpuCovariance:
    """Make the empty accumulators of a ``mudsc_fast.Covariance``."""
    return CpuCovariance(width, models, cross, device)


def similarity(
    tables: list[list[Table]],
    width: int,
    models: int,
    cross: bool,
    balance: float,
    activation: Covariance | None,
    device: torch.device,
) -> Tensor:
    """Blend the similarities by weights and by activations; see ``mudsc_fast.dual_similarity``."""
    sums = None
    wide = any(table[0].dtype == torch.float64 for row in tables for table in row)
    if activation is not None and isinstance(activation._sums, CpuCovariance):
        sums = activation._sums
        sums.flush()
        wide = wide or sums.dtype == torch.float64
    out = torch.empty(similarity_shape(width, models, cross), dtype=torch.float64 if wide else torch.float32)
    buffers = None if sums is None else sums.buffers
    bad = _core.similarity(tables, width, models, cross, balance, buffers, out, torch.get_num_threads())
    if bad == -1:
        raise ValueError("activation: expected magnitudes whose squares float32 can sum, got larger ones; use float64")
    if bad is not None:
        raise ValueError(f"terms[{bad}]: expected finite weights, got NaN or infinity")
    if activation is not None and sums is None:
        by_activation = activation.correlation_blocks("cross" if cross else "full").to(out.device)
        out = out.to(by_activation.dtype).mul_(balance).add_(by_activation, alpha=1.0 - balance)
    return out.to(device)
