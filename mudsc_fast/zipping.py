"""Zip: greedy agglomeration of units across and inside models, O(n^2) for n units in all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from mudsc_fast import backends
from mudsc_fast.scalars import check_number, integer


@dataclass(frozen=True)
class Zip:
    """Which merged unit every unit of every model joined.

    Attributes:
        labels: (models, width of a model), int64: unit i of model m belongs to merged unit labels[m, i].
        sizes: (merged width,), int64: members of each merged unit, over all models.
        value: 0-dim float64: mean of the similarities at which units were merged; 0 when nothing was merged.
    """

    labels: Tensor
    sizes: Tensor
    value: Tensor


def zip_units(
    similarity: Tensor,
    models: int = 2,
    width: int | None = None,
    attenuation: float = 0.5,
    budget: float = 1.0,
    blocks: int = 1,
    block_indices: Tensor | None = None,
    backend: str = "auto",
) -> Zip:
    """Merge the most similar pair of units again and again until ``width`` merged units are left.

    Args:
        similarity: (models * d, models * d), symmetric, floating, CPU or CUDA, any strides; row m * d + i is unit i of
            model m. The diagonal is not looked at. Not changed; one working copy is made.
        models: number of models.
        width: merged units to keep; None keeps d.
        attenuation: factor on a merged unit's similarities; <= 0: a merged unit is not matched again.
        budget: share of the merges that each model may spend on pairs of its own units; 0 allows none.
        blocks: number of blocks of d / blocks units in each model; units merge inside paired blocks only.
        block_indices: (models, blocks), int64: block ``block_indices[m, k]`` of each model m form one union. None:
            blocks of each model are paired with model 0's by their mean best similarity (``assign_blocks``).

    Returns:
        A :class:`Zip` on the similarity's device. Merged units are numbered by their first member; with blocks, in the
        order of model 0's blocks.

    Raises:
        TypeError: an integer or complex similarity.
        ValueError: a shape, width or number of blocks that does not fit; NaN, infinite or asymmetric entries; a
            budget that leaves no allowed pair before ``width`` is reached.

    Source: docs/method.md rules 5 and 7; arXiv 2403.01753 section 3.
    """
    similarity = _checked_similarity(similarity, models)
    total = similarity.shape[0]
    models = int(models)
    d = total // models
    width = d if width is None else width
    check_zip_options(d, models, width, attenuation, budget, blocks)
    width, blocks, attenuation, budget = int(width), int(blocks), float(attenuation), float(budget)
    to_remove = total - width
    unions = unions_of(similarity, d, models, blocks, block_indices)
    left = torch.full((models,), int((to_remove // models) * budget + 1e-4), dtype=torch.int64)
    block_budget = to_remove if blocks == 1 else to_remove // (models * blocks)

    chosen = backends.pick("zip", similarity.device, backend)
    labels = torch.empty(total, dtype=torch.int64)
    value = 0.0
    merges = unions.shape[1] - width // blocks
    owners = torch.empty_like(unions)
    model_of = (unions // d).to(torch.int32)
    results = chosen.module.zip(similarity, unions, model_of, merges, attenuation, left, block_budget, owners)
    for k, (taken, made) in enumerate(results):
        units, owner = unions[k], owners[k]
        if made < merges:
            raise ValueError(
                f"zip_units: no allowed pair is left after {made} of {merges} merges"
                f"{f' in block {k}' if blocks > 1 else ''}: budget {budget:g} is too small for width {width} "
                f"of {models} x {d} units{f' with attenuation {attenuation:g}' if attenuation <= 0 else ''}"
            )
        value += taken
        labels[units] = numbered(owner) + k * (width // blocks)
    device = similarity.device
    return Zip(
        labels.view(models, d).to(device),
        labels.bincount(minlength=width).to(device),
        torch.tensor(value / to_remove if to_remove else 0.0, dtype=torch.float64, device=device),
    )


def _checked_similarity(similarity: Tensor, models: int) -> Tensor:
    if not isinstance(similarity, Tensor):
        raise TypeError(f"similarity: expected a torch.Tensor, got {type(similarity).__name__}")
    if not similarity.is_floating_point() or similarity.layout != torch.strided:
        raise TypeError(
            f"similarity: expected a dense tensor of a floating dtype, got {similarity.dtype}, {similarity.layout}"
        )
    if similarity.dim() != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(f"similarity: expected a square matrix, got shape {tuple(similarity.shape)}")
    if (integer(models) or 0) < 1:
        raise ValueError(f"models: expected a number >= 1, got {models!r}")
    if similarity.shape[0] == 0 or similarity.shape[0] % models:
        raise ValueError(f"similarity: expected {models} x d rows, got {similarity.shape[0]}")
    similarity = similarity.detach()
    return similarity if similarity.dtype == torch.float64 else similarity.to(torch.float32)


def check_attenuation(attenuation: float) -> float:
    """The factor as a float; TypeError or ValueError unless it can be one."""
    factor = check_number("attenuation", attenuation)
    if not math.isfinite(factor) or factor > 1:
        raise ValueError(f"attenuation: expected a finite factor <= 1, got {attenuation!r}")
    return factor


def check_zip_options(d: int, models: int, width: int, attenuation: float, budget: float, blocks: int) -> None:
    """ValueError, naming the argument, for options of a zip that do not fit `models` times `d` units."""
    if not 1 <= (integer(width) or 0) <= models * d:
        raise ValueError(f"width: expected 1..{models * d} merged units for {models} x {d} units, got {width!r}")
    check_attenuation(attenuation)
    check_number("budget", budget)
    if not math.isfinite(budget) or budget < 0:
        raise ValueError(f"budget: expected a finite share >= 0, got {budget!r}")
    if (integer(blocks) or 0) < 1 or d % blocks:
        raise ValueError(f"blocks: expected a divisor of the {d} units of a model, got {blocks!r}")
    if width % blocks:
        raise ValueError(f"width: expected a multiple of the {blocks} blocks, got {width}")


def unions_of(similarity: Tensor, d: int, models: int, blocks: int, block_indices: Tensor | None) -> Tensor:
    """The units that may merge with each other, (blocks, n): a block of model 0, and its partners of the others."""
    if block_indices is None:
        if blocks == 1:
            return torch.arange(models * d)[None]
        from mudsc_fast.assignment import assign_blocks

        pairing = torch.empty(models, blocks, dtype=torch.int64)
        pairing[0] = torch.arange(blocks)
        for m in range(1, models):
            found = assign_blocks(similarity[:d, m * d : (m + 1) * d], blocks).block_indices
            pairing[m] = torch.as_tensor(found)
    else:
        pairing = _checked_pairing(block_indices, models, blocks)
    size = d // blocks
    first = pairing * size + torch.arange(models)[:, None] * d  # (models, blocks)
    units = first[:, :, None] + torch.arange(size)  # (models, blocks, size)
    return units.transpose(0, 1).reshape(blocks, -1).contiguous()


def _checked_pairing(block_indices: Tensor, models: int, blocks: int) -> Tensor:
    try:
        given = torch.as_tensor(block_indices).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        given = torch.empty(0)
    if given.dtype.is_floating_point or given.dtype.is_complex or given.dtype == torch.bool:
        raise TypeError(f"block_indices: expected an integer tensor, got {block_indices!r}")
    pairing = given.to(torch.int64)
    if pairing.shape != (models, blocks):
        raise ValueError(f"block_indices: expected shape ({models}, {blocks}), got {tuple(pairing.shape)}")
    if not bool((pairing.sort(dim=1).values == torch.arange(blocks)).all()):
        raise ValueError(f"block_indices: expected each row to be a permutation of 0..{blocks - 1}")
    return pairing[:, pairing[0].argsort()]


def numbered(owner: Tensor) -> Tensor:
    """Each unit's final survivor, survivors numbered in rising order."""
    while True:
        higher = owner[owner]
        if bool((higher == owner).all()):
            break
        owner = higher
    _, numbers = torch.unique(owner, return_inverse=True)
    return cast(Tensor, numbers)
