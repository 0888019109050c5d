"""The match of all spaces: the activation start and the sweeps, exactly as docs/method.md rule 8 tells them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .assignment import Assignment, assign_blocks
from .covariance import cross_blocks
from .merging import MergePlan
from .similarity import dual_similarity
from .weights import StateDict, row_matrices
from .zipping import zip_units

Width = int | float | Mapping[str, int | float]


@dataclass(frozen=True)
class _Problem:
    """What a match of any space needs, apart from the labels."""

    state_dicts: Sequence[StateDict] | None
    spec: Any
    models: int
    activations: Mapping[str, Any]
    method: str
    width: Width | None
    attenuation: float
    budget: float

    def merged_width(self, space: Any) -> int:
        """Return the width asked for: a share counts in every block and is rounded there."""
        width = self.width.get(space.name) if isinstance(self.width, Mapping) else self.width
        if width is None:
            return int(space.width)
        if isinstance(width, int):
            return width
        inner = max(1, round(int(space.width) // int(space.blocks) * width))
        return inner * int(space.blocks)

    def aligned(self, space: Any) -> bool:
        """Whether a space is aligned: all of an align plan, and in a zip plan those whose units keep their place."""
        return self.method == "align" or space.within == "fixed"

    def similarity(self, space: Any, labels: Mapping[str, Tensor], balance: float) -> Tensor:
        """Compare a space's units (rules 2 and 3): cross blocks where it is aligned, else all pairs."""
        terms = []
        if balance > 0 and self.state_dicts is not None:
            for axis in space.axes:
                if axis.compare:
                    tensors = [state_dict[axis.tensor] for state_dict in self.state_dicts]
                    terms.append(row_matrices(self.spec, space, axis, tensors, labels))
        scope = "cross" if self.aligned(space) else "full"
        try:
            return dual_similarity(terms, self.activations.get(space.name), balance, scope)
        except ValueError as error:
            raise ValueError(f"space {space.name!r}: {error}") from error

    def rematch(
        self, tie: Sequence[Any], labels: Mapping[str, Tensor], balance: float
    ) -> dict[str, tuple[Tensor, float]]:
        """Match the spaces of one tie anew; return {space: (labels, value)}."""
        similarities = [self.similarity(space, labels, balance) for space in tie]
        aligned = [self.aligned(space) for space in tie]
        matches: list[Assignment] | list[None] = [None] * len(tie)
        if any(aligned) or tie[0].blocks > 1:
            cross = [s if a else cross_blocks(s, self.models) for s, a in zip(similarities, aligned, strict=True)]
            matches = assign_blocks(cross, tie[0].blocks, [space.within for space in tie])
        result = {}
        for space, s, match in zip(tie, similarities, matches, strict=True):
            if match is not None and self.aligned(space):
                result[space.name] = (align_labels(match.indices), float(match.value.mean()))
            else:
                result[space.name] = self.zipped(space, s, None if match is None else match.block_indices)
        return result

    def zipped(self, space: Any, similarity: Tensor, blocks: Tensor | None) -> tuple[Tensor, float]:
        """Zip one space; blocks: (models-1, blocks), the pairing of rule 7, or None where there is one block."""
        pairing = None if blocks is None else torch.cat([torch.arange(space.blocks)[None], blocks.cpu()])
        width = self.merged_width(space)
        try:
            found = zip_units(similarity, self.models, width, self.attenuation, self.budget, space.blocks, pairing)
        except ValueError as error:
            raise ValueError(f"space {space.name!r}: {error}") from error
        return found.labels.cpu(), float(found.value)


def align_labels(indices: Tensor) -> Tensor:
    """Turn indices, (models-1, width), into labels, (models, width): labels[m, indices[m-1, i]] = i."""
    rows = [torch.arange(indices.shape[1])]
    for row in indices.cpu():
        labels = torch.empty_like(row)
        labels[row] = torch.arange(len(row))
        rows.append(labels)
    return torch.stack(rows)


def tie_of(spec: Any, space: Any) -> list[Any]:
    """Return the spaces that are matched together with one, in spec order."""
    return [s for s in spec.spaces if s is space or (space.tie is not None and s.tie == space.tie)]


def match(
    state_dicts: Sequence[StateDict] | None,
    spec: Any,
    activations: Mapping[str, Any] | None = None,
    method: str = "align",
    balance: float = 0.5,
    width: Width | None = None,
    attenuation: float = 0.5,
    budget: float = 1.0,
    seed: int = 0,
    max_sweeps: int = 100,
    patience: int = 5,
    start: Any = None,
    progress: Any = True,
) -> MergePlan:
    """Find the labels of every space by coordinate descent, with every sweep run in full.

    Args:
        state_dicts: one mapping a model; not read at balance 0.
        spec: the spaces of the architecture.
        activations: {space: Covariance}, or None for weights alone.
        method: "align" or "zip".
        balance: share of the weights in the similarity, 0..1.
        width: merged units of a space: an int, a float share of its width, or {space: either}; None is its width.
        attenuation, budget: as in zip_units.
        seed: of the order of visits.
        max_sweeps, patience: limits of all sweeps, and of sweeps in a row that do not raise the mean value.
        start: a plan whose labels the sweeps begin with, instead of the match by activations.
        progress: accepted for the signature only.

    Returns:
        MergePlan, history being the mean value of every sweep. At balance 0 a space without activations keeps its
        order (and follows the blocks of its tie).

    Raises:
        ValueError: fewer than two models, nothing to compare, an impossible width or budget, NaN.

    Source: docs/method.md rule 8.
    """
    if method not in ("align", "zip"):
        raise ValueError(f'method: expected "align" or "zip", got {method!r}')
    stats = dict(activations or {})
    if balance == 0 and not stats:
        raise ValueError("activations: balance 0 compares activations alone, but none were given")
    if balance > 0 and not state_dicts:
        raise ValueError("state_dicts: expected one mapping a model, got none")
    models = len(state_dicts) if state_dicts else next(iter(stats.values())).models
    if models < 2:
        raise ValueError(f"state_dicts: expected two models or more, got {models}")
    problem = _Problem(state_dicts, spec, models, stats, method, width, attenuation, budget)
    labels: dict[str, Tensor] = {}
    values: dict[str, float] = {}

    def visit(tie: Sequence[Any], share: float) -> None:
        for name, (new_labels, value) in problem.rematch(tie, labels, share).items():
            labels[name], values[name] = new_labels, value

    # Start: every space that has a tap, on activations alone.
    if start is not None and balance > 0:
        labels.update(start.labels)
    else:
        for space in spec.spaces:
            if space.name in stats and space.name not in labels:
                visit([s for s in tie_of(spec, space) if s.name in stats], 0.0)

    # Sweeps. The start does not count as the best.
    history: list[float] = []
    best, best_labels, best_values, strikes = -float("inf"), dict(labels), dict(values), 0
    generator = torch.Generator().manual_seed(seed)
    while balance > 0 and len(history) < max_sweeps and strikes < patience:
        for k in torch.randperm(len(spec.spaces), generator=generator).tolist():
            visit(tie_of(spec, spec.spaces[k]), balance)
        history.append(sum(values[space.name] for space in spec.spaces) / len(spec.spaces))
        if history[-1] > best:
            best, best_labels, best_values, strikes = history[-1], dict(labels), dict(values), 0
        else:
            labels.update(best_labels)
            values.update(best_values)
            strikes += 1

    for space in spec.spaces:
        if space.name not in labels:
            labels[space.name] = _kept(spec, space, models, labels)
    return MergePlan(spec, labels, method, values, history)


def _kept(spec: Any, space: Any, models: int, labels: Mapping[str, Tensor]) -> Tensor:
    """Return the labels of a space with nothing to compare: its own order, in the blocks that its tie goes to."""
    own = torch.arange(space.width).repeat(models, 1)
    n = space.width // space.blocks
    for other in tie_of(spec, space):
        if other.name in labels:
            theirs = labels[other.name]
            size = (int(theirs.max()) + 1) // space.blocks
            to_block = theirs.reshape(models, space.blocks, -1)[:, :, 0] // size
            own = to_block.repeat_interleave(n, dim=1) * n + own % n
            break
    return own
