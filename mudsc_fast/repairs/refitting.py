"""The sequential closed-form least-squares refit: every layer solved for what the parents do there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mudsc_fast.arguments import check_plan, check_share
from mudsc_fast.progress import Progress
from mudsc_fast.repairs.affine import can_shift, change, change_rows
from mudsc_fast.repairs.lockstep import Layer, check_networks, walk_layers
from mudsc_fast.repairs.regression import PRODUCTS, Inputs, Products
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
    spill: str | Path | None = None,
) -> int:
    """Solve every linear layer and convolution of the merged net for the parents' outputs there, in place; no labels.

    merged: a module that holds what `plan.merge` gave. models: the parents, in the plan's order. batches: calibration
        inputs as for `calibrate`, all read at once; activations at one layer of all nets are held, and one Gram matrix.
    plan: which units belong together. heads: one (classes, features) matrix a model, for output "heads".
    output: what the model's own outputs are solved for: "mean" of the parents'; "unit", their mean at unit length,
        times their mean length; or "heads", the outputs in which every head reads what it reads in its own parent, at
        unit length.
    ridge: share of the inputs' mean variance that is added to the Gram matrix. token_weight: how often the token counts
        that a model goes on with alone (the class token). part: "all", "last" (the model's own outputs alone) or
        "inner" (all but these).
    spill: a folder for a file in which activations lie while no pass needs them: memory then holds one batch's beside
        the models and one layer's matrices. The file has no name there and is gone with the process. Give one on a
        disk: what lies in a file system in memory is not saved.

    Layers are taken in order: T is the mean of the members' outputs in the parents, R = T - (W X + b), X what the
    merged net's solved layers give; W grows by <R X'> (<X X'> + ridge)^-1. Before that a layer is rescaled as in
    `repair`. If the output is added to a stream, T contains the stream's error so far. Only means and covariances are
    kept; layers that read the same tensor share one factor. Because the correction is solved for and not W, a net
    merged with itself stays as it is (not with output "heads"). A batch norm is solved together with the layer before
    it; its running statistics are made true. Group and layer norms have every unit's factor and shift solved by
    themselves.

    Returns the number of layers solved. Raises ValueError for no batches, activations that are not finite, models that
    are not the plan's or run different layers, a merged net that shares tensors with one of them, heads that do not fit
    the model's output, a ridge too small for so few inputs; OSError if the file cannot grow. After an error in the
    middle the layers before it are solved. Source: docs/quality.md.
    """
    check_share("ridge", ridge, top=None)
    if isinstance(token_weight, bool) or not isinstance(token_weight, int) or token_weight < 1:
        raise ValueError(f"token_weight: expected an integer >= 1, got {token_weight!r}")
    if part not in PARTS:
        raise ValueError(f"part: expected one of {', '.join(PARTS)}, got {part!r}")
    models = list(models)
    check_plan(plan)
    check_networks(merged, models, None if part == "last" else plan)
    solver = _Solver(ridge, token_weight, last_target(output, heads, len(models)))
    solved = 0

    def work(layer: Layer) -> None:
        nonlocal solved
        if layer.last and part != "inner":
            solved += solver.solve(layer)
        elif not layer.last and part != "last":
            changed = rescale(layer)
            solved += (solver.solve(layer) if layer.calls[0].each is None else _solve_each(layer, ridge)) or changed

    walk_layers(merged, models, batches, plan, work, "refitting", progress, spill)
    return solved


class _Solver:
    """Solves layers one after another, and keeps the factor of their inputs for those that read the same."""

    def __init__(self, ridge: float, token_weight: int, target: Target) -> None:
        self._ridge, self._token_weight, self._target = ridge, token_weight, target
        self._inputs: Inputs | None = None

    def solve(self, layer: Layer) -> bool:
        """Whether the layer was changed."""
        call = layer.calls[0]
        if call.groups != 1 or call.padding is None:
            return False
        if layer.last:
            layer = self._target.applied(layer)
        weight = layer.merged.get_parameter(call.weight)
        outputs, width = weight.shape[0], weight[0].numel()
        about = (width, can_shift(call))
        if self._inputs is None or not self._inputs.fit(layer, about):
            self._inputs = None  # the old one is not kept beside the new one
            known = None if call.kernel or layer.token is not None else sum(c.x.numel() // width for c in layer.calls)
            self._inputs = Inputs(*about, call.y.device, known)
        # A batch norm is changed with all outputs at once; its layers are convolutions, and small.
        block = outputs if call.norm is not None else min(outputs, max(1, PRODUCTS // width))
        for first in range(0, outputs, block):
            products = self._products(layer, first, min(block, outputs - first), first == 0)
            if products is None:
                return False
            extra, shift = self._inputs.solve(products)
            _change(layer, first, as_weight(extra, weight), shift)
        return True

    def _products(self, layer: Layer, first: int, count: int, check: bool) -> Products | None:
        """<R X'> of some outputs, and the inputs' factor where it is not there yet; None if nothing is missing."""
        call, known = layer.calls[0], self._inputs
        if known is None:
            return None
        outputs = layer.merged.get_parameter(call.weight).shape[0]
        products = Products(count, known, call.y.device)
        missing, rows, size = 0.0, 0, 0.0
        for x, r in samples(layer, known.width + outputs, self._token_weight, seed=outputs):
            known.add(x)
            products.add(x, r[:, first : first + count])
            missing += float(torch.linalg.vector_norm(r, dtype=torch.float64)) ** 2 if check else 0.0
            rows += r.numel()
        if check:
            if not math.isfinite(missing):
                raise ValueError(f"batches: inputs or outputs of {call.weight!r} are NaN or infinite")
            norms = (float(torch.linalg.vector_norm(y, dtype=torch.float64)) ** 2 / y.numel() for y in layer.outputs())
            size = sum(norms) / len(layer.calls)
            if missing / max(rows, 1) <= _NEGLIGIBLE**2 * max(size, 1e-30):
                self._inputs = None
                return None
        if not known.ready:
            known.factorise(self._ridge)
            known.remember(layer, (known.width, known.constant))
        return products


def _change(layer: Layer, first: int, step: Tensor, shift: Tensor) -> None:
    """Add the step to the weight's rows from `first` on, and what it gives to the layer's outputs of every batch."""
    call, count = layer.calls[0], len(step)
    weight = layer.merged.get_parameter(call.weight)
    rows: tuple[Tensor, Tensor | None] | None = None
    if call.norm is None:
        rows = change_rows(layer.merged, call, first, torch.ones_like(shift), shift, step)
    narrow, constant = step.to(weight.dtype), shift.to(weight.dtype)
    exact = weight.dtype in (torch.float32, torch.float64)
    for each, _ in layer.each(change=True):
        y = each.y.narrow(each.dim, first, count)
        if rows is None or exact:
            y += each.apply(each.x, narrow, constant)
        else:
            # Half precision rounds the changed weights: go on with what they really give.
            y.copy_(each.apply(each.x, *rows))
    if call.norm is not None:
        change(layer.merged, call, torch.ones_like(shift), shift, step, spread(layer.outputs(), call.dim))


def _solve_each(layer: Layer, ridge: float) -> bool:
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
    for each, _ in layer.each(change=True):
        each.y.mul_((1 + factor).to(each.y).reshape(shape)).add_(shift.to(each.y).reshape(shape))
    change(layer.merged, call, 1 + factor, shift, None, (y, variance))
    return True
