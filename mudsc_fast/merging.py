"""All steps of a merge in one call."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mudsc_fast.batches import check_batches, check_models
from mudsc_fast.batchnorm import reset_batchnorm, tracked_batchnorms
from mudsc_fast.calibration import calibrate
from mudsc_fast.elastic import elastic_widths
from mudsc_fast.installing import installed
from mudsc_fast.matching import match
from mudsc_fast.plan import METHODS
from mudsc_fast.progress import Progress
from mudsc_fast.resizing import resizable_spaces

if TYPE_CHECKING:
    from mudsc_fast.spec import PermutationSpec


def merge_models(
    models: Sequence[nn.Module],
    batches: Iterable[Any] | None = None,
    spec: PermutationSpec | None = None,
    method: str = "zip",
    heads: Sequence[Tensor] | None = None,
    weights: Sequence[float] | None = None,
    balance: float = 0.5,
    reset_bn: bool = True,
    rotate: bool = False,
    device: torch.device | str | None = None,
    progress: Progress = True,
    width_budget: float | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Calibrate, match, merge, and recompute batch-norm statistics; the models stay as they are.

    models: two or more modules of one architecture.
    batches: calibration inputs as for `calibrate`; None: units are compared by their weights alone.
    spec: None: the one `spec_for` finds for the first model, by its first batch where it has to be traced.
    method: "zip", "align" or "select", or "best": matched in several ways, decoded and refitted, the net chosen that
        agrees best with its parents (see `merge_best`, which takes further options). "best" needs batches and holds
        them.
    heads: for "best": known class vectors (classes, features), one a model, that read the models' outputs.
    weights: share of every model in the averages. balance and further options: as for `match`.
    reset_bn: False leaves batch-norm statistics averaged. Without batches that is all that can be done, and a warning
        says so: a network whose statistics are only averaged is usually at chance.
    rotate: True first writes all models in model 0's coordinates as far as their functions allow, its norms folded: an
        align match at this balance, then `align_rotations`. For transformers; needs batches.
    device: where to calibrate and compare; None: where the models are.
    width_budget: "zip", "select" and "best": the size of the merged network, as a share of one model's; the widths of
        the spaces that the first model can have in other widths are chosen for it (`elastic_widths`). The result goes
        into a module with `installed`.

    Returns the merged state dict, with model 0's names, dtypes and devices. Raises ValueError or TypeError as the
    single steps do.
    """
    if method not in (*METHODS, "best"):
        raise ValueError(f"method: expected one of {', '.join((*METHODS, 'best'))}, got {method!r}")
    models = check_models(models)
    if width_budget is not None and (method == "align" or batches is None or "width" in options):
        raise ValueError(
            "width_budget: expected batches, a method that changes widths and no width beside it, got "
            f"{width_budget!r} with method {method!r}"
        )
    if rotate:
        models, batches, spec = _rotated(models, batches, spec, balance, device, progress)
    if method == "best":
        return _best(models, batches, spec, heads, weights, device, progress, {**options, "width_budget": width_budget})
    reset = reset_bn and bool(tracked_batchnorms(models[0]))
    if batches is None:
        if reset:
            warnings.warn(
                "batch-norm statistics are only averaged, because no batches were given to recompute them from; such a "
                "network is usually at chance. Give batches, or call reset_batchnorm on the merged model",
                stacklevel=2,
            )
        if balance == 0:
            raise ValueError("batches: balance 0 compares activations alone, but no batches were given")
    elif isinstance(check_batches(batches), Iterator):
        # Two passes: calibration and batch norm.
        batches = list(batches)
    if spec is None:
        from mudsc_fast.specs import spec_for

        spec = spec_for(models[0], inputs=None if batches is None else _first_inputs(batches))
    state_dicts = [model.state_dict() for model in models]
    activations = None
    if batches is not None and (balance < 1 or width_budget is not None):
        scope = "cross" if method == "align" else "full"
        activations = calibrate(models, batches, spec, scope, device=device, progress=progress)
        if width_budget is not None:
            able = resizable_spaces(models[0], spec, next(iter(batches)))
            options["width"] = elastic_widths(
                state_dicts, spec, activations, width_budget, method, able, options.get("attenuation", 0.5), progress
            )
    plan = match(state_dicts, spec, activations, method, balance=balance, progress=progress, device=device, **options)
    merged = plan.merge(state_dicts, weights)
    if reset and batches is not None:
        network = installed(models[0], merged)
        reset_batchnorm(network, batches, device=device, progress=progress)
        merged = {name: tensor.to(merged[name].device) for name, tensor in network.state_dict().items()}
    return merged


def _rotated(
    models: Sequence[nn.Module],
    batches: Iterable[Any] | None,
    spec: PermutationSpec | None,
    balance: float,
    device: torch.device | str | None,
    progress: Progress,
) -> tuple[list[nn.Module], list[Any], PermutationSpec]:
    from mudsc_fast.rotations import align_rotations

    if batches is None:
        raise ValueError("batches: rotate=True compares activations and tries what may be rotated; give batches")
    batches = list(check_batches(batches))
    if spec is None:
        from mudsc_fast.specs import spec_for

        spec = spec_for(models[0], inputs=_first_inputs(batches))
    states = [model.state_dict() for model in models]
    activations = None
    if balance < 1:
        activations = calibrate(models, batches, spec, "cross", device=device, progress=progress)
    plan = match(states, spec, activations, "align", balance=balance, progress=progress, device=device)
    aligned = [models[0], *(installed(model, plan.align(states[m], m)) for m, model in enumerate(models) if m > 0)]
    found = align_rotations(aligned, batches, spec, balance, device=device, progress=progress)
    rotated = [installed(model, state) for model, state in zip(models, found.state_dicts, strict=True)]
    return rotated, batches, spec


def _first_inputs(batches: Iterable[Any]) -> Any:
    """The model's arguments in the first batch, as `calibrate` would give them to it."""
    first = next(iter(batches), None)
    if isinstance(first, list | tuple):
        first = first[0] if first else None
    return dict(first) if isinstance(first, Mapping) else first


def _best(
    models: Sequence[nn.Module],
    batches: Iterable[Any] | None,
    spec: PermutationSpec | None,
    heads: Sequence[Tensor] | None,
    weights: Sequence[float] | None,
    device: torch.device | str | None,
    progress: Progress,
    options: Mapping[str, Any],
) -> dict[str, Tensor]:
    from mudsc_fast.best import merge_best

    if batches is None:
        raise ValueError("batches: method 'best' refits on calibration inputs, but none were given")
    if weights is not None:
        raise ValueError("weights: method 'best' solves for the mean of the models; leave weights out")
    if isinstance(check_batches(batches), Iterator):
        batches = list(batches)
    if spec is None:
        from mudsc_fast.specs import spec_for

        spec = spec_for(models[0], inputs=_first_inputs(batches))
    return merge_best(models, batches, spec, heads, device=device, progress=progress, **options).state_dict
