"""The sequential closed-form least-squares refit: every layer solved for what the parents do there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mudsc_fast.arguments import check_share
from mudsc_fast.moments import Moments
from mudsc_fast.progress import Progress
from mudsc_fast.repairs.affine import can_shift, change
from mudsc_fast.repairs.lockstep import Layer, walk_layers
from mudsc_fast.repairs.rescaling import rescale, spread
from mudsc_fast.repairs.samples import as_weight, samples
from mudsc_fast.repairs.targets import Target, last_target

if TYPE_CHECKING:
    from mudsc_fast.plan import MergePlan

PARTS = ("all", "inner", "last")
_NEGLIGIBLE = 2e-5  # of the output's size: what rounding leaves between two nets that are the same


def refit(
    merged: nn.Module,
    models: Sequence[nn.Module],
    batches: Iterable[Any],
    plan: MergePlan,
    heads: Sequence[Tensor] | None = None,
    output: str = "mean",
    ridge: float = 0.01,
    token_weight: int = 10,
    part: str = "all",
    progress: Progress = False,
) -> int:
    """Solve every linear layer and convolution of the merged net for the parents' outputs there, in place; no labels.

    merged: a module that holds what `plan.merge` gave. models: the parents, in the plan's order. batches: calibration
        inputs as for `calibrate`, all read at once; activations at one layer of all nets are held, and one Gram matrix.
    plan: which units belong together. heads: one (classes, features) matrix a model, for output "heads".
    output: what the model's own outputs are solved for: "mean" of the parents'; "unit", their mean at unit length,
    times their mean
        length; or "heads", the outputs in which every head reads what it reads in its own parent, at unit length.
    ridge: share of the inputs' mean variance that is added to the Gram matrix. token_weight: how often the token counts
        that a model goes on with alone (the class token). part: "all", "last" (the
        model's own outputs alone) or "inner" (all but these).

    Layers are taken in order: T is the mean of the members' outputs in the parents, R = T - (W X + b), X what the
    merged net's solved layers give; W grows by <R X'> (<X X'> + ridge)^-1. Before that a layer is rescaled as in
    `repair`. If the output is added to a stream, T contains the stream's error so far. Only means and covariances are
    kept. Because the correction is solved for and not W, a net merged with itself stays as it is (not with output
    "heads"). A batch norm is solved together with the layer before it; its running statistics are made true. Group and
    layer norms have every unit's factor and shift solved by themselves.

    Returns the number of layers solved. Raises ValueError for no batches, activations that are not finite, models that
    run different layers, heads that do not fit the model's output. Source: docs/quality.md.
    """
    check_share("ridge", ridge, top=None)
    if isinstance(token_weight, bool) or not isinstance(token_weight, int) or token_weight < 1:
        raise ValueError(f"token_weight: expected an integer >= 1, got {token_weight!r}")
    if part not in PARTS:
        raise ValueError(f"part: expected one of {', '.join(PARTS)}, got {part!r}")
    target = last_target(output, heads, len(list(models)))
    solved = 0

    def work(layer: Layer) -> None:
        nonlocal solved
        if layer.last and part != "inner":
            solved += _solve(layer, ridge, token_weight, target)
        elif not layer.last and part != "last":
            changed = rescale(layer)
            solve = _solve if layer.calls[0].each is None else _solve_each
            solved += solve(layer, ridge, token_weight, None) or changed

    walk_layers(merged, models, batches, plan, work, "refitting", progress)
    return solved


def _solve(layer: Layer, ridge: float, token_weight: int, target: Target | None) -> bool:
    call = layer.calls[0]
    if call.groups != 1 or call.padding is None:
        return False
    if target is not None:
        layer = target.applied(layer)
    weight = layer.merged.get_parameter(call.weight)
    outputs, inputs = weight.shape[0], weight[0].numel()
    moments = Moments(inputs + outputs, call.y.device)
    missing, count = 0.0, 0
    for x, r in samples(layer, inputs + outputs, token_weight, seed=outputs):
        moments.update(torch.cat((x, r.to(x.dtype)), 1))
        missing += float(r.double().square().sum())
        count += r.numel()
    if not math.isfinite(missing):
        raise ValueError(f"batches: inputs or outputs of {call.weight!r} are NaN or infinite")
    size = sum(float(c.y.double().square().mean()) for c in layer.calls) / len(layer.calls)
    if missing / max(count, 1) <= _NEGLIGIBLE**2 * max(size, 1e-30):
        return False
    extra, shift = _regression(moments, inputs, ridge, can_shift(call))
    step = as_weight(extra, weight)
    narrow, constant = step.to(weight.dtype), shift.to(weight.dtype)
    for each in layer.calls:
        each.y += each.apply(each.x, narrow, constant)
    statistics = spread([c.y for c in layer.calls], call.dim)
    change(layer.merged, call, torch.ones_like(shift), shift, step, statistics)
    return True


def _solve_each(layer: Layer, ridge: float, token_weight: int, target: Target | None) -> bool:
    """The same for a norm's own parameters: every unit's factor and shift by themselves."""
    call = layer.calls[0]
    count, sums = 0, torch.zeros(4, call.y.shape[call.dim], dtype=torch.float64, device=call.y.device)
    for each, wanted in layer.targets():
        y, missing = (z.movedim(each.dim, 0).flatten(1) for z in (each.y, wanted - each.y))
        sums += torch.stack([z.sum(1, dtype=torch.float64) for z in (y, missing, y * y, y * missing)])
        count += y.shape[1]
    y, missing, squares, products = sums / count
    variance = squares - y * y
    factor = (products - y * missing) / (variance + ridge * variance.mean() + 1e-30)
    shift = missing - factor * y
    if not bool(torch.isfinite(shift).all()):
        raise ValueError(f"batches: inputs or outputs of {call.weight!r} are NaN or infinite")
    size = float(squares.mean().clamp(min=1e-30).sqrt())
    if float(factor.abs().max()) < _NEGLIGIBLE and float(shift.abs().max()) < _NEGLIGIBLE * size:
        return False
    shape = [1] * call.y.dim()
    shape[call.dim] = -1
    for each in layer.calls:
        each.y.mul_((1 + factor).to(each.y).reshape(shape)).add_(shift.to(each.y).reshape(shape))
    change(layer.merged, call, 1 + factor, shift, None, (y, variance))
    return True


def _regression(moments: Moments, inputs: int, ridge: float, constant: bool) -> tuple[Tensor, Tensor]:
    """(outputs, inputs) and (outputs,) float64: the ridge regression of the last variables on the first `inputs`."""
    covariance, mean = moments.covariance(), moments.mean
    if not constant:
        covariance = covariance + torch.outer(mean, mean)
    gram = covariance[:inputs, :inputs]
    level = float(gram.diagonal().mean())
    # A layer whose inputs are all constant has nothing to regress on; its mean can still be set.
    gram = gram + torch.eye(inputs, dtype=gram.dtype, device=gram.device) * (ridge * level + 1e-12 * max(level, 1e-30))
    factor = torch.linalg.cholesky(gram) if level > 0 else torch.eye(inputs, dtype=gram.dtype, device=gram.device)
    slope = (
        torch.cholesky_solve(covariance[:inputs, inputs:], factor).T if level > 0 else covariance[inputs:, :inputs] * 0
    )
    shift = mean[inputs:] - slope @ mean[:inputs] if constant else torch.zeros_like(mean[inputs:])
    return slope, shift
