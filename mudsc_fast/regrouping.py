"""Regrouping: a labelling applied to one axis of a tensor. A permutation is a gather, a zip is a segment sum."""

from __future__ import annotations

import torch
from torch import Tensor

from mudsc_fast import _core, backends
from mudsc_fast.scalars import check_dim, integer

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_SUMMABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def regroup(
    tensor: Tensor,
    labels: Tensor,
    dim: int,
    size: int,
    scale: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Sum the members of each merged unit along one axis.

    ``out[.., j, ..] = scale[j] * sum of tensor[.., i, ..] over labels[i] == j``; 0 where a unit has no member.

    Args:
        tensor: any shape and strides, CPU or CUDA. float64/32/16 and bfloat16 can be summed (in float64 for float64,
            else in float32) and scaled; other types (integers, bool, float8) only moved: at most one member a unit and
            no scale. A tensor that requires grad is detached.
        labels: (tensor.shape[dim],), integers in [0, size).
        dim: the unit axis; negative counts from the end.
        size: number of merged units.
        scale: (size,), real, or None for 1.
        out: where to write: the result's shape, the tensor's dtype and device, no element shared with another or
            with ``tensor``. None: a new tensor whose axes lie in memory in the order of ``tensor``'s.
        backend: "auto" or a name of ``mudsc_fast.backends``.

    Returns:
        ``out``, or the new tensor.

    Raises:
        TypeError: not tensors, or a sum or scale asked of a type that is only moved.
        ValueError: shapes, labels or ``out`` do not fit.

    Source: docs/method.md rule 9.
    """
    if backend == "auto":  # the usual call is checked and made in one step; what that refuses gets a closer look
        quick = _dense(tensor, dim, size) if out is None else out
        if quick is not None and _core.regroup_plain(tensor, labels, dim, size, scale, quick):
            return quick
    if not isinstance(tensor, Tensor):
        raise TypeError(f"tensor: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"tensor: expected a dense tensor, got {tensor.layout}")
    dim = check_dim("dim", dim)
    if tensor.dim() == 0:
        raise ValueError("tensor: expected at least one axis, got a 0-dimensional tensor")
    if not -tensor.dim() <= dim < tensor.dim():
        raise ValueError(f"dim: expected {-tensor.dim()}..{tensor.dim() - 1} for a {tensor.dim()}-d tensor, got {dim}")
    tensor = tensor.detach()
    dim %= tensor.dim()
    units = integer(size)
    if units is None or units < 0:
        raise ValueError(f"size: expected a number of units >= 0, got {size!r}")
    size = units
    ptr, members, longest = segments(labels, tensor.shape[dim], size)
    scale64 = _checked_scale(scale, size)
    summable = tensor.dtype in _SUMMABLE
    if not summable and (scale64 is not None or longest > 1):
        raise TypeError(
            f"tensor: {tensor.dtype} can only be moved: expected at most one member for each unit and no scale"
        )
    shape = [*tensor.shape[:dim], size, *tensor.shape[dim + 1 :]]
    if out is None:
        out = _empty_in_order_of(tensor, shape)
    else:
        _check_out(out, tensor, shape)
    chosen = backends.pick("regroup", tensor.device, backend)
    chosen.module.regroup(tensor.resolve_conj().resolve_neg(), out, dim, ptr, members, scale64)
    return out


def _dense(tensor: Tensor, dim: int, size: int) -> Tensor | None:
    """Where the result of the usual call goes; None for all that wants a closer look."""
    if type(tensor) is not Tensor or type(dim) is not int or type(size) is not int or size < 0:
        return None
    if not tensor.is_cpu or not tensor.is_contiguous() or not -tensor.dim() <= dim < tensor.dim():
        return None
    shape = list(tensor.shape)
    shape[dim] = size
    return torch.empty(shape, dtype=tensor.dtype)


def segments(labels: Tensor, length: int, size: int) -> tuple[Tensor, Tensor, int]:
    """Turn labels into segments: ``members[ptr[j] : ptr[j + 1]]`` are the positions labelled j, rising; on the CPU.

    Also returns the length of the longest one.
    """
    if not isinstance(labels, Tensor) or labels.dtype not in _INTEGERS:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels: expected an integer tensor, got {got}")
    if labels.shape != (length,):
        raise ValueError(f"labels: expected shape ({length},), one label for each unit, got {tuple(labels.shape)}")
    labels = labels.detach().to("cpu", torch.int64).contiguous()
    ptr, members = torch.empty(size + 1, dtype=torch.int64), torch.empty(length, dtype=torch.int64)
    longest = _core.segments(labels, ptr, members)
    if longest < 0:
        raise ValueError(f"labels: expected 0 <= label < {size}, got {int(labels.min())}..{int(labels.max())}")
    return ptr, members, longest


def _checked_scale(scale: Tensor | None, size: int) -> Tensor | None:
    if scale is None:
        return None
    if not isinstance(scale, Tensor) or scale.is_complex():
        got = scale.dtype if isinstance(scale, Tensor) else type(scale).__name__
        raise TypeError(f"scale: expected a real tensor, got {got}")
    if scale.shape != (size,):
        raise ValueError(f"scale: expected shape ({size},), got {tuple(scale.shape)}")
    return scale.detach().to("cpu", torch.float64).contiguous()


def _empty_in_order_of(tensor: Tensor, shape: list[int]) -> Tensor:
    """A dense tensor of ``shape`` whose axes are laid out in the same order as those of ``tensor``."""
    order = sorted(range(tensor.dim()), key=lambda d: tensor.stride(d), reverse=True)
    dense = torch.empty([shape[d] for d in order], dtype=tensor.dtype, device=tensor.device)
    inverse = [0] * len(order)
    for place, d in enumerate(order):
        inverse[d] = place
    return dense.permute(inverse)


def _check_out(out: Tensor, tensor: Tensor, shape: list[int]) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"out: expected a torch.Tensor, got {type(out).__name__}")
    if list(out.shape) != shape or out.dtype != tensor.dtype or out.device != tensor.device:
        raise ValueError(
            f"out: expected shape {tuple(shape)}, {tensor.dtype} on {tensor.device}, "
            f"got {tuple(out.shape)}, {out.dtype} on {out.device}"
        )
    if out.requires_grad:
        raise ValueError("out: expected a tensor that does not require grad; pass out.detach()")
    steps = sorted((stride, length) for stride, length in zip(out.stride(), out.shape, strict=True) if length > 1)
    reach = 0
    for stride, length in steps:
        if stride <= reach:
            raise ValueError("out: expected every element at an address of its own, got overlapping strides")
        reach += stride * (length - 1)
    if out.numel() and tensor.numel() and _span(out)[0] <= _span(tensor)[1] and _span(tensor)[0] <= _span(out)[1]:
        raise ValueError("out: expected memory apart from tensor's")


def _span(tensor: Tensor) -> tuple[int, int]:
    """First and last byte that the tensor touches."""
    last = sum(stride * (length - 1) for stride, length in zip(tensor.stride(), tensor.shape, strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + last * tensor.element_size() + tensor.element_size() - 1
