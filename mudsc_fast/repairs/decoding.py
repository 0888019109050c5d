"""The linear decoder: readers of merged units get the best linear guess of each parent's units, instead of a copy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mudsc_fast.arguments import check_plan, check_share
from mudsc_fast.axes import rows
from mudsc_fast.calibration import ActivationStats, calibrate
from mudsc_fast.moments import joint_covariance
from mudsc_fast.progress import Progress
from mudsc_fast.repairs.units import rows_of
from mudsc_fast.spaces import Space, Tap
from mudsc_fast.spec import PermutationSpec

if TYPE_CHECKING:
    from mudsc_fast.covariance import Covariance
    from mudsc_fast.plan import MergePlan
    from mudsc_fast.spaces import Axis

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def calibrate_readers(
    models: Sequence[nn.Module],
    batches: Iterable[Any],
    spec: PermutationSpec,
    device: torch.device | str | None = None,
    progress: Progress = False,
) -> ActivationStats:
    """The covariance of all models' units where each linear layer and convolution reads them; by the weight's name.

    Arguments and errors as for `calibrate`. Layers whose input axis belongs to no space, or to several, are left out.
    """
    spaces = []
    modules = dict(models[0].named_modules()) if models else {}
    for tensor, entries in spec.entries.items():
        inputs = [(space, axis) for space, axis in entries if axis.role == "in"]
        module = modules.get(tensor.removesuffix(".weight"))
        if len(inputs) != 1 or not tensor.endswith(".weight") or not _plain(inputs[0][1], module):
            continue
        space, axis = inputs[0]
        tap = Tap(
            tensor.removesuffix(".weight"), "input", -1 if isinstance(module, nn.Linear) else 1, axis.view, axis.at
        )
        spaces.append(Space(tensor, space.width, (axis,), (tap,)))
    if not spaces:
        raise ValueError("spec: no linear layer or convolution reads one of its spaces")
    return calibrate(models, batches, PermutationSpec(tuple(spaces)), "full", device, progress=progress)


def _plain(axis: Axis, module: nn.Module | None) -> bool:
    layer = isinstance(module, nn.Linear) or (isinstance(module, _CONVOLUTIONS) and module.groups == 1)
    at = (axis.at,) if isinstance(axis.at, int) else axis.at or (0,)
    together = list(at) == list(range(at[0], at[0] + len(at)))
    return layer and axis.dim == 1 and axis.pick is None and axis.part is None and together


def decode(
    plan: MergePlan,
    state_dicts: Sequence[Mapping[str, Tensor]],
    readers: Mapping[str, Covariance],
    ridge: float = 1e-3,
) -> dict[str, Tensor]:
    """The merged state dict, with every reader's weight made for what the merged units tell of each parent's units.

    A merged unit is a mean, and a plain merge reads it as if it were each of its members. With V the means' matrix
    and K the covariance of all units, the best guess of the units by the means is D = K V' (V K V' + ridge)^-1; the
    merged weight is the members' mean of W_m D_m, and their bias takes up the means.

    plan, state_dicts: as for `plan.merge`. readers: what `calibrate_readers` gave. ridge: share of the mean variance of
    the merged units.

    A net merged with itself stays as it is. Rescale it afterwards (`repair`): guesses vary less than what they guess.
    Raises ValueError as `plan.merge`, and for no readers or readers of other widths. Source: docs/quality.md.
    """
    check_plan(plan)
    check_share("ridge", ridge, top=None)
    if not readers:
        raise ValueError("readers: expected what calibrate_readers gave, got nothing")
    merged = plan.merge(state_dicts)
    for weight, statistics in readers.items():
        entry = next(((s, a) for s, a in plan.spec.entries.get(weight, ()) if a.role == "in"), None)
        if entry is None or statistics.width != entry[0].width:
            raise ValueError(f"readers: {weight!r} reads no space of {statistics.width} units in the plan's spec")
        space, axis = entry
        tensors = [state_dict[weight] for state_dict in state_dicts]
        found = rows_of(plan, weight, tensors[0].shape)
        if found is None:
            continue
        decoder, constant = _decoder(plan, space, statistics, ridge)
        parts = decoder.reshape(plan.models, space.width, -1)
        decoded = [_read(x, axis, part) for x, part in zip(tensors, parts, strict=True)]
        merged[weight] = found.expected(decoded, 0).reshape(merged[weight].shape).to(merged[weight])
        bias = weight.removesuffix("weight") + "bias"
        if bias in merged:
            constants = constant.reshape(plan.models, -1, 1)
            shifts = [_read(x, axis, c).flatten(1).sum(1) for x, c in zip(tensors, constants, strict=True)]
            merged[bias] = (merged[bias].double() + found.expected(shifts, 0)).to(merged[bias])
    return merged


def _decoder(plan: MergePlan, space: Space, statistics: Covariance, ridge: float) -> tuple[Tensor, Tensor]:
    """D (models * width, merged width), and what the means miss (models * width,), float64."""
    mean, covariance = joint_covariance(statistics)
    mean, covariance = mean.cpu(), covariance.cpu()
    labels, size = plan.labels[space.name].reshape(-1), plan.widths[space.name]
    units = torch.arange(len(labels))
    copies = torch.zeros(len(labels), size, dtype=torch.float64)
    copies[units, labels] = 1.0
    leaders = plan.leaders.get(space.name)
    if leaders is None:
        means = (copies / copies.sum(0)).T
    else:
        means = torch.zeros(size, len(labels), dtype=torch.float64)
        means[torch.arange(size), leaders] = 1.0
    across = covariance @ means.T
    inside = means @ across
    # Solved for the difference to the plain copies, so that nothing changes where these are right.
    wrong = across - copies @ inside
    level = float(inside.diagonal().mean())
    factor = torch.linalg.cholesky(inside + (ridge * level + 1e-300) * torch.eye(size, dtype=inside.dtype))
    decoder = copies + torch.cholesky_solve(wrong.T, factor).T
    return decoder, mean - decoder @ (means @ mean)


def _read(weight: Tensor, axis: Axis, decoder: Tensor) -> Tensor:
    """The weight with its units' input axis multiplied by the decoder (units, merged), float64."""
    view, dims = rows(weight.double().cpu(), axis)
    moved = view.movedim(dims, tuple(range(-len(dims), 0))).flatten(-len(dims))
    result = (moved @ decoder).movedim(-1, dims[0])
    extra = result.dim() - weight.dim()
    return result.flatten(1, 1 + extra) if extra > 0 else result
