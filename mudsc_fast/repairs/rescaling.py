"""REPAIR: every unit's mean and deviation set to the mean over its members, in the order of the forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mudsc_fast.arguments import check_plan
from mudsc_fast.progress import Progress
from mudsc_fast.repairs.affine import can_shift, change
from mudsc_fast.repairs.lockstep import Layer, check_networks, walk_layers

if TYPE_CHECKING:
    from mudsc_fast.plan import MergePlan

_NEGLIGIBLE = 2e-6  # relative: smaller differences are rounding, and a net merged with itself is left as it is
_POSITIONS = 20_000  # of one batch's feature maps: enough for a deviation to half a percent
_DEAD = 1e-7  # a deviation below this share of the root mean square is rounding


def repair(
    merged: nn.Module,
    models: Sequence[nn.Module],
    batches: Iterable[Any],
    plan: MergePlan,
    progress: Progress = False,
) -> int:
    """Set the mean and deviation of every layer's outputs to the mean over their members, in place; no labels needed.

    merged: a module that holds what `plan.merge` gave. models: the parents, in the plan's order. batches: as for
    `calibrate`; read at once, and their activations at one layer are held. plan: which units belong together.

    Layers are taken in order, each on what the repaired layers before it give; group and layer norms are layers too,
    by their own parameters. An output that is added to a stream keeps its deviation and has the mean of the sum set.
    Layers without a bias or batch norm behind them, and the model's own outputs, are left alone. Running statistics of
    batch norms are made true on the way: they need no reset.

    Returns the number of layers worked on. Raises ValueError for no batches, for activations that are not finite, and
    if the models are not the plan's, run different layers, or share tensors with the merged net.
    Source: Jordan et al., REPAIR, arXiv 2211.08403; docs/method.md.
    """

    def work(layer: Layer) -> None:
        if not layer.last:
            rescale(layer)

    models = list(models)
    check_plan(plan)
    check_networks(merged, models, plan)
    return walk_layers(merged, models, batches, plan, work, "rescaling", progress)


def rescale(layer: Layer) -> bool:
    """Do it for one layer; whether anything was changed."""
    call = layer.calls[0]
    if not can_shift(call):
        return False
    scale, shift = _factors(layer)
    if scale is None or shift is None:
        return False
    shape = [1] * call.y.dim()
    shape[call.dim] = -1
    for each, _ in layer.each(change=True):
        each.y.mul_(scale.to(each.y).reshape(shape)).add_(shift.to(each.y).reshape(shape))
    change(layer.merged, call, scale, shift, None, spread(layer.outputs(), call.dim))
    return True


def _factors(layer: Layer) -> tuple[Tensor | None, Tensor | None]:
    call = layer.calls[0]
    mean, variance = spread(layer.outputs(), call.dim)
    added = call.skip is not None
    if added:
        wanted = _mean((t for _, t in layer.targets()), call.dim)
        scale = torch.ones_like(mean)
    else:
        each = [spread(layer.outputs(m), call.dim) for m in range(len(layer.parents[0]))]
        wanted = layer.rows.mean_of(torch.stack([m for m, _ in each]))
        deviation = layer.rows.mean_of(torch.stack([v.sqrt() for _, v in each]))
        dead = variance.sqrt() <= _DEAD * (variance + mean.square()).sqrt()
        scale = torch.where(dead, torch.ones_like(mean), deviation / variance.sqrt().clamp(min=1e-300))
    shift = wanted - scale * mean
    if not bool(torch.isfinite(shift).all()):
        raise ValueError(f"batches: inputs or outputs of {call.weight!r} are NaN or infinite")
    size = (variance + mean.square()).mean().sqrt().clamp(min=1e-30)
    if float((scale - 1).abs().max()) < _NEGLIGIBLE and float((shift.abs() / size).max()) < _NEGLIGIBLE:
        return None, None
    return scale, shift


def spread(outputs: Iterable[Tensor], dim: int) -> tuple[Tensor, Tensor]:
    """Mean and population variance of every unit over all other dims of all tensors, float64.

    Of feature maps with very many positions every k-th is taken, the same ones whatever the net.
    """
    count, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for y in outputs:
        if dim == 1 and y.dim() > 2:
            flat = y.flatten(2)
            step = max(1, flat.shape[2] * len(y) // _POSITIONS)
            rows = flat[:, :, count % step :: step].transpose(0, 1).reshape(y.shape[1], -1).contiguous()
        else:
            rows = y.movedim(dim, 0).reshape(y.shape[dim], -1)
        n = rows.shape[1]
        mean_here = rows.mean(1, dtype=torch.float64)
        # Chan's update: no difference of large sums.
        delta = mean_here - mean
        total = count + n
        squares = (
            squares
            + (rows - mean_here[:, None].to(rows)).square().sum(1, dtype=torch.float64)
            + delta.square() * (count * n / total)
        )
        mean = mean + delta * (n / total)
        count = total
    return mean, squares / max(count, 1)


def _mean(outputs: Iterable[Tensor], dim: int) -> Tensor:
    return spread(outputs, dim)[0]
