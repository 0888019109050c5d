"""Activation statistics of every space from one pass of all models over the same batches (docs/method.md rule 1)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .axes import tap_units
from .covariance import Covariance


class ActivationStats(Mapping[str, Covariance]):
    """The Covariance of every space that has a tap, by the space's name."""

    def __init__(self, covariances: Mapping[str, Covariance]) -> None:
        self._covariances = dict(covariances)

    def __getitem__(self, space: str) -> Covariance:
        return self._covariances[space]

    def __iter__(self) -> Iterator[str]:
        return iter(self._covariances)

    def __len__(self) -> int:
        return len(self._covariances)


def run(model: nn.Module, batch: Any) -> None:
    """Run a model on a tensor, on the first item of a tuple or list, or on a mapping of keyword arguments."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(batch, list | tuple):
        batch = batch[0]
    if isinstance(batch, Mapping):
        model(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()})
    else:
        model(batch.to(device))


def first_tensor(value: Any) -> Tensor | None:
    """Return the first tensor in a tensor, tuple, list or mapping, however deep; None if there is none."""
    if isinstance(value, Tensor):
        return value
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return next((found for item in items if (found := first_tensor(item)) is not None), None)


def _record(model: nn.Module, batch: Any, ports: Iterable[tuple[str, str]]) -> dict[tuple[str, str], list[Tensor]]:
    """Run one model; return what each port saw, one tensor a call of its module."""
    seen: dict[tuple[str, str], list[Tensor]] = {}
    handles = []
    for port in ports:
        module = model.get_submodule(port[0])
        kept = seen.setdefault(port, [])

        def keep(value: Any, port: tuple[str, str] = port, kept: list[Tensor] = kept) -> None:
            x = first_tensor(value)
            if x is None:
                raise TypeError(f"tap {port[0]!r} ({port[1]}): expected a tensor, got none")
            # A copy, because a later in-place operation would change the activation.
            kept.append(x.detach().clone())

        if port[1] == "input":
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, kw, keep=keep: keep([*args, *kw.values()]), with_kwargs=True
                )
            )
        else:
            handles.append(module.register_forward_hook(lambda _, args, output, keep=keep: keep(output)))
    try:
        run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def calibrate(
    models: Sequence[nn.Module],
    batches: Iterable[Any],
    spec: Any,
    scope: str = "full",
    device: torch.device | str | None = None,
) -> ActivationStats:
    """Run all models in eval mode over the same batches and pool what the taps see.

    Args:
        models: two or more modules of one architecture, left where they are.
        batches: tensors, tuples whose first item is the input, or mappings of keyword arguments.
        spec: its taps say where to look; several taps of a space add their samples.
        scope: as in Covariance.
        device: where the statistics live.

    Raises:
        ValueError: no batches, a tap that was never reached, or a width that disagrees.
    """
    stats = {
        space.name: Covariance(space.width, len(models), scope, device or "cpu") for space in spec.spaces if space.taps
    }
    ports = list(dict.fromkeys((tap.module, tap.port) for space in spec.spaces for tap in space.taps))
    training = [(module, module.training) for model in models for module in model.modules()]
    count = 0
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            for batch in batches:
                count += 1
                seen = [_record(model, batch, ports) for model in models]
                for space in spec.spaces:
                    for tap in space.taps:
                        port = (tap.module, tap.port)
                        for activations in zip(*(s[port] for s in seen), strict=True):
                            stats[space.name].update([tap_units(x, tap, space.width) for x in activations])
    finally:
        for module, mode in training:
            module.training = mode
    if count == 0:
        raise ValueError("batches: expected at least one batch, got none")
    for name, covariance in stats.items():
        if covariance.count == 0:
            raise ValueError(f"space {name!r}: none of its taps was reached")
    return ActivationStats(stats)
