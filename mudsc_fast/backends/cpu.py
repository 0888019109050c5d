"""Thin calls into the compiled CPU kernels. Arguments are checked by the public functions above."""

from __future__ import annotations

import torch
from torch import Tensor

from mudsc_fast import _core

# Types that DLPack or the kernels do not know are moved as integers of the same size.
_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def regroup(tensor: Tensor, out: Tensor, dim: int, ptr: Tensor, members: Tensor, scale: Tensor | None) -> None:
    """Fill ``out`` with the regrouped ``tensor``; see ``mudsc_fast.regroup``."""
    if not (tensor.is_floating_point() and tensor.element_size() > 1):
        if tensor.is_complex():
            tensor, out = torch.view_as_real(tensor.resolve_conj()), torch.view_as_real(out)
        else:
            moved = _SAME_SIZE[tensor.element_size()]
            tensor, out = tensor.view(moved), out.view(moved)
    _core.regroup(tensor, out, dim, ptr, members, scale, torch.get_num_threads())


def zip(
    similarity: Tensor,
    units: Tensor,
    model_of: Tensor,
    merges: int,
    attenuation: float,
    budget: Tensor,
    block_budget: Tensor,
    owner: Tensor,
) -> tuple[float, int]:
    """Zip some units of a similarity; returns the sum of the entries taken and the number of merges made."""
    threads = torch.get_num_threads()
    return _core.zip(similarity, units, model_of, merges, attenuation, budget, block_budget, owner, threads)


def assign(similarity: Tensor, start: Tensor | None, indices: Tensor, out: Tensor) -> None:
    """Solve a batch of assignments; ``out`` takes values, gaps and duals. See ``mudsc_fast.assign``."""
    _core.assign(similarity, start, indices, out, torch.get_num_threads())
