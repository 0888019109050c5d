"""A layer with the batch norm behind it, as one affine map that can be changed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mudsc_fast.repairs.walking import Call

_DEAD = 1e-3  # of the median scale of a batch norm: below it, a correction is not divided by the scale but replaces it


def can_shift(call: Call) -> bool:
    """Whether the layer has a place for a constant: a bias, or a batch norm behind it."""
    return call.bias is not None or call.norm is not None


def change(
    net: nn.Module, call: Call, scale: Tensor, shift: Tensor, extra: Tensor | None, statistics: tuple[Tensor, Tensor]
) -> None:
    """Rewrite the layer's parameters in `net` so that its output y becomes `scale * y + shift + extra x`.

    scale, shift: (outputs,) float64. extra: the weight's shape, float64, or None. statistics: mean and variance of the
    new output; with them a batch norm's running statistics are made true, so that recomputing them changes nothing.
    Without a batch norm or a bias, `shift` must be 0.
    """
    weight = net.get_parameter(call.weight)
    column = (-1,) + (1,) * (weight.dim() - 1)
    if call.norm is None:
        change_rows(net, call, 0, scale, shift, extra)
        return
    w = weight.data.double()
    norm = net.get_submodule(call.norm)
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.running_var is None:
        raise TypeError(f"{call.norm}: expected a batch norm with running statistics, got {type(norm).__name__}")
    gain = norm.weight.data.double() / (norm.running_var.double() + norm.eps).sqrt()
    offset = 0.0 if call.bias is None else net.get_parameter(call.bias).data.double()
    constant = scale * (norm.bias.data.double() + gain * (offset - norm.running_mean.double())) + shift
    new_gain = scale * gain
    if extra is not None:
        floor = _DEAD * new_gain.abs().median().clamp(min=torch.finfo(torch.float32).tiny)
        new_gain = torch.where(new_gain.abs() < floor, torch.ones_like(new_gain), new_gain)
        w = ((scale * gain).reshape(column) * w + extra) / new_gain.reshape(column)
    mean, variance = statistics
    used = torch.where(new_gain == 0, torch.ones_like(new_gain), new_gain)
    plain_mean = (mean - constant) / used + offset
    plain_variance = variance / used.square()
    weight.data.copy_(w)
    norm.running_mean.copy_(plain_mean)
    norm.running_var.copy_(plain_variance)
    norm.weight.data.copy_(new_gain * (plain_variance + norm.eps).sqrt())
    norm.bias.data.copy_(constant + new_gain * (plain_mean - offset))


def change_rows(
    net: nn.Module, call: Call, first: int, scale: Tensor, shift: Tensor, extra: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`change` of the rows from `first` on, as many as `scale` has, without a batch norm; gives them and their bias."""
    weight = net.get_parameter(call.weight).data[first : first + len(scale)]
    column = (-1,) + (1,) * (weight.dim() - 1)
    weight.copy_(weight.double() * scale.reshape(column) + (0 if extra is None else extra))
    if call.bias is None:
        return weight, None
    bias = net.get_parameter(call.bias).data[first : first + len(scale)]
    bias.copy_(bias.double() * scale + shift)
    return weight, bias
