"""Running statistics of batch normalisation, recomputed from data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mudsc_fast.batches import check_batches, evaluation, feed, length_of, placed
from mudsc_fast.progress import Progress, bar

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def tracked_batchnorms(model: nn.Module) -> list[_BatchNorm]:
    """The batch-norm layers of `model` that keep running statistics."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]


def reset_batchnorm(
    model: nn.Module,
    batches: Iterable[Any],
    device: torch.device | str | None = None,
    progress: Progress = False,
) -> int:
    """Replace the running mean and variance of every batch-norm layer by their average over `batches`, in place.

    model: its batch-norm layers run in training mode, all others in eval mode (dropout stays off); flags and momentum
        are restored. Without such layers nothing happens and `batches` is not read.
    batches: as for `calibrate`. Every batch counts the same (torch's cumulative average), so give batches of one size.

    Returns the number of layers. Raises ValueError if there are no batches; after any error the old statistics stand.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch module, got {type(model).__name__}")
    batches = check_batches(batches)
    layers = tracked_batchnorms(model)
    if not layers:
        return 0
    momenta = [layer.momentum for layer in layers]
    before: list[dict[str, Tensor]] = [
        {name: getattr(layer, name).clone() for name in _STATISTICS if getattr(layer, name) is not None}
        for layer in layers
    ]
    where = None if device is None else torch.device(device)
    count = 0
    try:
        with placed([model], where) as homes, evaluation([model]):
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None  # torch's way to ask for a cumulative average
                layer.train()
            with bar("resetting batch norm", length_of(batches), progress) as steps:
                for batch in batches:
                    feed(model, batch, homes[0])
                    count += 1
                    steps.advance()
        if count == 0:
            raise ValueError("batches: expected at least one batch, got none")
    except BaseException:
        for layer, statistics in zip(layers, before, strict=True):
            for name, tensor in statistics.items():
                getattr(layer, name).copy_(tensor)
        raise
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
    return len(layers)
