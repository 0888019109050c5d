"""Feeding calibration batches to models without leaving a trace on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def check_models(models: Sequence[nn.Module]) -> list[nn.Module]:
    """`models` as a list, if they are two or more modules."""
    if isinstance(models, nn.Module) or not isinstance(models, Iterable):
        # A Sequential would be taken for the list of its layers.
        raise TypeError(f"models: expected a sequence of modules, got one {type(models).__name__}")
    models = list(models)
    if len(models) < 2:
        raise ValueError(f"models: expected two or more, got {len(models)}")
    for m, model in enumerate(models):
        if not isinstance(model, nn.Module):
            raise TypeError(f"models: expected torch modules, got {type(model).__name__} for model {m}")
    return models


def check_batches(batches: Any) -> Iterable[Any]:
    """`batches` itself, if it is an iterable of batches and not one batch."""
    if isinstance(batches, Tensor | Mapping):
        # Iterating a tensor would feed single samples without their batch dimension, a dict its key names.
        raise TypeError(f"batches: expected an iterable of batches, got one {type(batches).__name__}; put it in a list")
    if isinstance(batches, str) or not isinstance(batches, Iterable):
        raise TypeError(f"batches: expected an iterable of batches, got {type(batches).__name__}")
    return batches


def length_of(batches: Iterable[Any]) -> int | None:
    """The number of batches where it is known without reading them."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None


def home(model: nn.Module) -> torch.device:
    """The device a model's input goes to: that of its first parameter or buffer."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def moved(value: Any, device: torch.device) -> Any:
    """All tensors in a batch on a device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(item, device) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(moved(item, device) for item in value)
    return value


def feed(model: nn.Module, batch: Any, device: torch.device) -> None:
    """Run `model` on a tensor, the first item of a tuple or list, or a mapping of keyword arguments."""
    if isinstance(batch, Mapping):
        if not batch:
            raise ValueError("batches: a mapping of keyword arguments is empty")
        model(**moved(batch, device))
        return
    if isinstance(batch, list | tuple):
        if not batch:
            raise ValueError("batches: a tuple or list without an input")
        batch = batch[0]
        if isinstance(batch, Mapping):
            feed(model, batch, device)
            return
    if not isinstance(batch, Tensor):
        raise TypeError(
            "batches: expected tensors, tuples whose first item is the input, or mappings of keyword arguments, "
            f"got {type(batch).__name__}"
        )
    if batch.numel() == 0:
        raise ValueError(f"batches: empty batch of shape {tuple(batch.shape)}")
    model(batch.to(device, non_blocking=True))


@contextmanager
def evaluation(models: Sequence[nn.Module]) -> Iterator[None]:
    """Eval mode and no gradients inside; every module's own training flag afterwards, also after an error."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def placed(models: Sequence[nn.Module], device: torch.device | None) -> Iterator[list[torch.device]]:
    """The models on `device` (None: left where they are) and back where they were afterwards; gives their devices."""
    if device is None:
        yield [home(model) for model in models]
        return
    origins = []
    for m, model in enumerate(models):
        devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
        if len(devices) > 1:
            names = ", ".join(sorted(map(str, devices)))
            raise ValueError(f"device: model {m} is spread over {names}; give device=None to leave it there")
        origins.append(devices.pop() if devices else device)
    try:
        for model in models:
            model.to(device)
        yield [device] * len(models)
    finally:
        for model, origin in zip(models, origins, strict=True):
            model.to(origin)
