"""Regrouping a tensor by labels: the one operation that every merge is made of (docs/method.md rule 9)."""

from __future__ import annotations

import torch
from torch import Tensor


def regroup(
    tensor: Tensor,
    labels: Tensor,
    dim: int,
    size: int,
    scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Sum the members of each merged unit along dim, times scale.

    Args:
        tensor: any shape; floating tensors are summed in float64, integers as int64.
        labels: (tensor.shape[dim],), int64, in 0..size-1: the merged unit of every entry along dim.
        dim: the axis to regroup.
        size: number of merged units.
        scale: (size,), floating, or None for 1; floating tensors only.
        out: written to and returned where given.

    Returns:
        tensor's shape with `size` along dim; float64 for floating tensors, else tensor's dtype.

    Raises:
        ValueError: a length that disagrees with dim, or a label outside 0..size-1.
        TypeError: a complex tensor, or a scale for integers.
    """
    if tensor.is_complex():
        raise TypeError(f"tensor: expected a real dtype, got {tensor.dtype}")
    length = tensor.shape[dim]
    if labels.shape != (length,):
        raise ValueError(f"labels: expected shape ({length},), got {tuple(labels.shape)}")
    if length and (int(labels.min()) < 0 or int(labels.max()) >= size):
        raise ValueError(f"labels: expected 0..{size - 1}, got {int(labels.min())}..{int(labels.max())}")
    if scale is not None and scale.shape != (size,):
        raise ValueError(f"scale: expected shape ({size},), got {tuple(scale.shape)}")
    floating = tensor.is_floating_point()
    if scale is not None and not floating:
        raise TypeError(f"scale: expected None for {tensor.dtype}")
    source = tensor.detach().to(torch.float64 if floating else torch.int64).movedim(dim, 0)
    result = source.new_zeros(size, *source.shape[1:]).index_add_(0, labels.to(source.device, torch.int64), source)
    if scale is not None:
        result = result * scale.to(result).reshape(-1, *[1] * (result.ndim - 1))
    result = result.movedim(0, dim)
    if not floating:
        result = result.to(tensor.dtype)
    if out is None:
        return result.contiguous()
    out.copy_(result)
    return out
