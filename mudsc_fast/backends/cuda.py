"""Thin calls into the CUDA C++ kernels, on the current stream of the tensors' device."""

from __future__ import annotations

import torch
from torch import Tensor

from mudsc_fast import _core

_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def regroup(tensor: Tensor, out: Tensor, dim: int, ptr: Tensor, members: Tensor, scale: Tensor | None) -> None:
    """Fill ``out`` with the regrouped ``tensor``; see ``mudsc_fast.regroup``."""
    device = tensor.device
    if not (tensor.is_floating_point() and tensor.element_size() > 1):
        moved = _SAME_SIZE[tensor.element_size()]
        tensor, out = tensor.view(moved), out.view(moved)
    moved_scale = None if scale is None else scale.to(device)
    stream = torch.cuda.current_stream(device).cuda_stream
    _core.regroup_cuda(tensor, out, dim, ptr.to(device), members.to(device), moved_scale, stream)
