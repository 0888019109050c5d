"""An alignment of large checkpoints for a tool that holds little itself: tensors one by one, no visit for nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mudsc_fast.covariance import Covariance
from mudsc_fast.matching import match
from mudsc_fast.plan import MergePlan
from mudsc_fast.spec import PermutationSpec
from mudsc_fast.weights import Weights
from mudsc_fast.workplan import TensorShape, least_memory

# Room beyond the least memory of a match: slabs of this size read well, and less is not worth slower steps.
_ROOM = 2**27

# Mean similarity from which on the residual stream's own tensors are taken at their word. Of models trained apart they
# tell little, and a wrong start would draw all other spaces after it.
_CLEAR = 0.8


def frugal_match(
    states: Sequence[Mapping[str, Tensor]],
    spec: PermutationSpec,
    stats: Mapping[str, Covariance] | None,
    balance: float,
    seed: int,
    max_sweeps: int,
    progress: bool,
    device: str,
) -> MergePlan:
    """An align plan of two or more checkpoints; arguments and errors of ``mudsc_fast.match``.

    On the CPU the tensors of a space are compared one by one, whatever the size of the models. By weights alone, the
    space that most others read is matched first, by its own tensors.
    """
    how: dict[str, Any] = {"balance": balance, "device": device, "progress": progress}
    if device == "cpu":
        how["max_memory"] = _least(states, spec, balance)
    start = None if stats is not None else _residual_first(states, spec, how)
    if start is not None:
        (residual,) = start.values
        seed = _seed_with_last(spec, residual, seed)
    return match(states, spec, stats, "align", seed=seed, max_sweeps=max_sweeps, start=start, **how)


def _least(states: Sequence[Mapping[str, Tensor]], spec: PermutationSpec, balance: float) -> int:
    """A limit that makes the match read its tensors one by one, as mergekit does, but never refuses."""
    weights = Weights(states, spec)
    layout = {name: TensorShape(*weights.info(0, name)) for name in weights.in_spec}
    return least_memory(spec, layout, len(states), balance) + _ROOM


def _residual_first(
    states: Sequence[Mapping[str, Tensor]], spec: PermutationSpec, how: Mapping[str, Any]
) -> MergePlan | None:
    """A start with the match of the space that most others read, by the tensors that no other space touches.

    In a random order about half of the spaces are compared before it is known, by noise and for nothing. Embeddings and
    norms are right from the start, while tensors of other spaces compare what is not matched yet. None without such a
    space, without two-dimensional tensors of its own, or where these are not clear.
    """
    hub = max(spec.spaces, key=lambda space: len(spec.neighbours(space.name)))
    if hub.tie is not None or 2 * len(spec.neighbours(hub.name)) <= len(spec.spaces):
        return None
    own = tuple(axis for axis in hub.axes if {other.name for other, _ in spec.entries[axis.tensor]} == {hub.name})
    weights = Weights(states, spec)
    if not any(axis.compare and len(weights.info(0, axis.tensor)[0]) > 1 for axis in own):
        return None
    found = match(states, PermutationSpec((replace(hub, axes=own),)), None, "align", max_sweeps=1, **how)
    if found.values[hub.name] < _CLEAR:
        return None
    raw = {space.name: torch.arange(space.width).repeat(len(states), 1) for space in spec.spaces}
    return MergePlan(spec, {**raw, **found.labels}, "align", found.values)


def _seed_with_last(spec: PermutationSpec, name: str, seed: int) -> int:
    """The first seed from this one on whose first sweep comes to a space last, when all that it reads is matched."""
    names = [space.name for space in spec.spaces]
    while names[int(torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))[-1])] != name:
        seed += 1
    return seed
