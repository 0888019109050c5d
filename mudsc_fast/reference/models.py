"""From models to a merged state dict in one call, and the batch-norm reset that ends it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .calibration import calibrate, run
from .matching import match


def reset_batchnorm(model: nn.Module, batches: Iterable[Any]) -> int:
    """Replace the running statistics of every batch-norm layer by their average over batches, in place.

    Those layers normalise by each batch's own statistics meanwhile; all else is in eval mode. Returns their number.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm) and layer.running_mean is not None]
    if not layers:
        return 0
    training = {module: module.training for module in model.modules()}
    momenta = [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # torch's cumulative average
        layer.train()
    with torch.no_grad():
        for batch in batches:
            run(model, batch)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    for module, mode in training.items():
        module.training = mode
    return len(layers)


def merge_models(
    models: Sequence[nn.Module],
    batches: Iterable[Any] | None = None,
    spec: Any = None,
    method: str = "zip",
    heads: Sequence[Tensor] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Calibrate, match, merge and reset batch norm; return the merged state dict.

    Args:
        models: modules of one architecture.
        batches: calibration data, or None for weights alone.
        spec: required here; the reference finds none itself.
        method: "align" or "zip".
        heads: accepted for the signature only.
        options: further arguments of match.
    """
    if spec is None:
        raise ValueError("spec: expected a spec, got None")
    held = None if batches is None else list(batches)
    stats = None if held is None else calibrate(models, held, spec)
    state_dicts = [model.state_dict() for model in models]
    merged = match(state_dicts, spec, stats, method, **options).merge(state_dicts)
    first = models[0].state_dict()
    if held is None or any(merged[name].shape != first[name].shape for name in first):
        return merged
    model = copy.deepcopy(models[0])
    model.load_state_dict(merged)
    reset_batchnorm(model, held)
    return model.state_dict()
