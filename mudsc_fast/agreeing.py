"""How far a merged net does what its parents do, told without labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mudsc_fast.batches import check_batches, evaluation, feed, home
from mudsc_fast.hooks import first_tensor
from mudsc_fast.installing import installed
from mudsc_fast.repairs.targets import check_heads


def agreement(
    models: Sequence[nn.Module],
    batches: Iterable[Any],
    heads: Sequence[Tensor] | None = None,
    prepare: Callable[[nn.Module], Any] | None = None,
) -> Callable[[nn.Module | Mapping[str, Tensor]], list[float]]:
    """A function that tells how far a merged net, a module or a state dict, agrees with each of the parents.

    models: the parents. batches: inputs as for `calibrate`; read once, the parents' outputs on them are kept.
    heads: one (classes, features) matrix a model: agreement is the share of inputs for which the merged net's decision
        among a parent's classes is the parent's own. None: the mean cosine of the merged net's output with the
        parent's, both less their mean over the inputs.
    prepare: what to do to the merged module first, such as resetting its batch norm.

    Each number is at most 1. Meant for `search_balance`, as its `evaluate`. Raises ValueError for no batches, and heads
    that are not one finite matrix a model or do not fit its outputs.
    """
    batches = list(check_batches(batches))
    if not batches:
        raise ValueError("batches: expected at least one batch, got none")
    models = list(models)
    if heads is not None:
        heads = check_heads(heads, len(models))
    wanted = [outputs(model, batches) for model in models]
    for m, (z, h) in enumerate(zip(wanted, heads or (), strict=heads is not None)):
        if h.shape[1] != z.shape[1]:
            raise ValueError(f"heads: model {m} gives {z.shape[1]} features, its matrix has shape {tuple(h.shape)}")

    def judge(merged: nn.Module | Mapping[str, Tensor]) -> list[float]:
        net = merged if isinstance(merged, nn.Module) else installed(models[0], merged)
        if prepare is not None:
            prepare(net)
        own = outputs(net, batches)
        if heads is None:
            return [_cosine(own, z) for z in wanted]
        return [
            float(((own @ h.T.to(own)).argmax(-1) == (z @ h.T.to(z)).argmax(-1)).double().mean())
            for z, h in zip(wanted, heads, strict=True)
        ]

    return judge


def outputs(model: nn.Module, batches: Iterable[Any]) -> Tensor:
    """(samples, features) float32: the model's first floating output on all batches, every position a sample."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        x = first_tensor(getattr(output, "logits", output))
        if x is None or not x.is_floating_point():
            raise TypeError("models: expected a floating tensor as the first output")
        found.append(x.detach().reshape(-1, x.shape[-1]).float())

    handle = model.register_forward_hook(keep)
    try:
        with evaluation([model]):
            for batch in batches:
                feed(model, batch, home(model))
    finally:
        handle.remove()
    return torch.cat(found)


def _cosine(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(0), b - b.mean(0)
    return float(torch.nn.functional.cosine_similarity(a, b, dim=-1).double().mean())
