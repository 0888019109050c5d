"""Thin calls into the CUDA C++ kernels, on the current stream of the tensors' device."""

from __future__ import annotations

import torch
from torch import Tensor

from mudsc_fast import _core
from mudsc_fast.backends.cpu import as_known

# Statuses of the kernels, as csrc/cuda/launch.h numbers them.
_OK, _NOT_FINITE, _NOT_SYMMETRIC, _INFEASIBLE = range(4)


def regroup(tensor: Tensor, out: Tensor, dim: int, ptr: Tensor, members: Tensor, scale: Tensor | None) -> None:
    """Fill ``out`` with the regrouped ``tensor``; see ``mudsc_fast.regroup``."""
    device = tensor.device
    tensor, out = as_known(tensor, out)
    moved_scale = None if scale is None else scale.to(device)
    single = bool((ptr.diff() == 1).all())
    _core.regroup_cuda(tensor, out, dim, ptr.to(device), members.to(device), moved_scale, single, _stream(device))


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
    """Zip each union of units, all side by side; see ``backends.cpu.zip``.

    The budget that unions share is spent in their order. A launch gives every union all that is left, so the first is
    right, and each further one is for as long as it would not have come to the end of what those before it leave. The
    others are run again. With a budget of 1 or more the unions' own budgets end first, and one launch is enough.
    """
    results: list[tuple[float, int]] = []
    while len(results) < len(units):
        first = len(results)
        taken, made, spent, owners = _zip_side_by_side(
            similarity, units[first:], model_of[first:], merges, attenuation, budget, block_budget
        )
        given = budget.clamp(max=block_budget)
        for k in range(len(units) - first):
            in_truth = budget.clamp(max=block_budget)
            if bool(((given != in_truth) & (spent[k] >= in_truth)).any()):
                break
            budget -= spent[k]
            owner[first + k] = owners[k]
            results.append((float(taken[k]), int(made[k])))
            if int(made[k]) < merges:
                return results
    return results


def _zip_side_by_side(
    similarity: Tensor,
    units: Tensor,
    model_of: Tensor,
    merges: int,
    attenuation: float,
    budget: Tensor,
    block_budget: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum of the entries taken, merges made, merges spent inside each model, owners: a row a union, on the CPU."""
    device, problems, n = similarity.device, *units.shape
    wide = similarity.dtype == torch.float64
    needed = _core.zip_scratch_cuda(n, problems, len(budget), wide)
    scratch = _scratch(needed, device, f"zip of {problems} x {n} units")
    left = budget.expand(problems, -1).contiguous().to(device)
    left_here = torch.full_like(left, block_budget)
    owner = torch.empty(problems, n, dtype=torch.int64, device=device)
    total = torch.empty(problems, dtype=torch.float64, device=device)
    made = torch.empty(problems, dtype=torch.int64, device=device)
    status = torch.empty(problems, dtype=torch.int32, device=device)
    _core.zip_cuda(
        similarity,
        units.to(device),
        model_of.to(device),
        merges,
        attenuation,
        left,
        left_here,
        owner,
        total,
        made,
        status,
        scratch,
        _stream(device),
    )
    found = status.cpu()
    if bool((found == _NOT_FINITE).any()):
        raise ValueError("similarity: expected finite values, got NaN or infinity")
    if bool((found == _NOT_SYMMETRIC).any()):
        raise ValueError("similarity: expected a symmetric matrix")
    return total.cpu(), made.cpu(), budget - left.cpu(), owner.cpu()


def assign(similarity: Tensor, start: Tensor | None, indices: Tensor, out: Tensor) -> None:
    """Solve a batch of assignments of at most 256 rows; ``indices`` and ``out`` are on the similarity's device."""
    device = similarity.device
    problems = similarity.shape[:-2].numel()
    status = torch.zeros(problems, dtype=torch.int32, device=device)
    moved = None if start is None else start.to(device)
    _core.assign_cuda(similarity, moved, indices, out, status, _stream(device))
    worst = int(status.max()) if problems else _OK
    if bool((status == 1).any()):
        raise ValueError("similarity: expected finite values, got NaN or infinity")
    if worst != _OK:
        raise RuntimeError("similarity: the result could not be proven optimal")


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _scratch(needed: int, device: torch.device, what: str) -> Tensor:
    """Memory of torch's own allocator, so that it is reused from call to call."""
    try:
        return torch.empty(needed, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"{what} needs {needed / 2**30:.2f} GiB of scratch memory on {device}, more than is free; "
            "backend='host' uses the memory of the CPU instead"
        ) from error
