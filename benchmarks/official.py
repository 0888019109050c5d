"""The published pipeline, re-stated plainly: dense merge matrices, a full correlation a visit, no shortcuts.

It knows just what the benchmark's networks need: one view on an axis at most, and spaces without ties.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

import mudsc_fast as mf

from .peers import official_zip


class OfficialMatch:
    """Labels of every space by the published sweeps, for two models."""

    def __init__(
        self,
        states: Sequence[Mapping[str, Tensor]],
        spec: mf.PermutationSpec,
        activations: Mapping[str, Tensor],
        method: str,
        balance: float,
    ) -> None:
        self.spec, self.activations, self.method, self.balance = spec, activations, method, balance
        self.states = [_split(state, spec) for state in states]
        # Every axis by the tensors that it is on: an axis of a fused tensor is one of each of its parts.
        self.axes = {space.name: [(n, a) for a in space.axes for n in _parts(a, spec)] for space in spec.spaces}
        self.labels: dict[str, Tensor] = {}
        self.matrices: dict[str, tuple[Tensor, Tensor]] = {}

    def run(self, sweeps: int, patience: int = 5, seed: int = 0) -> dict[str, Tensor]:
        """Match on activations, then sweep; returns labels (2, width) by space."""
        spaces = self.spec.spaces
        for space in spaces:
            self._rematch(space, self.activations[space.name])
        generator = torch.Generator().manual_seed(seed)
        best, best_value, worse = (dict(self.labels), dict(self.matrices)), -float("inf"), 0
        values = dict.fromkeys((space.name for space in spaces), 0.0)
        for _ in range(sweeps):
            for k in torch.randperm(len(spaces), generator=generator):
                space = spaces[int(k)]
                similarity = self.balance * self._weights(space) + (1 - self.balance) * self.activations[space.name]
                values[space.name] = self._rematch(space, similarity)
            value = sum(values.values()) / len(values)
            if value > best_value:
                best, best_value, worse = (dict(self.labels), dict(self.matrices)), value, 0
            else:
                self.labels, self.matrices = dict(best[0]), dict(best[1])
                worse += 1
                if worse >= patience:
                    break
        self.labels, self.matrices = best
        return best[0]

    def merge(self) -> dict[str, Tensor]:
        """The mean of both models' tensors, each multiplied by the dense matrices of its axes."""
        on: dict[str, list[tuple[str, mf.Axis]]] = {}
        for space_name, axes in self.axes.items():
            for name, axis in axes:
                on.setdefault(name, []).append((space_name, axis))
        merged = {}
        for name in self.states[0]:
            tensors = [state[name] for state in self.states]
            for space_name, axis in on.get(name, ()):
                matrix = self.matrices[space_name][0 if axis.role == "out" else 1]
                tensors = [_times(t, m, axis.dim) for t, m in zip(tensors, matrix.chunk(2), strict=True)]
            merged[name] = sum(tensors[1:], tensors[0]) / len(tensors)
        return merged

    def _weights(self, space: mf.Space) -> Tensor:
        rows: list[list[Tensor]] = [[], []]
        for name, axis in self.axes[space.name]:
            if not axis.compare:
                continue
            tensors = [state[name] for state in self.states]
            for other, axes in self.axes.items():
                for near_name, near in axes:
                    if near_name == name and near.dim != axis.dim and other in self.matrices:
                        matrix = self.matrices[other][0 if near.role == "in" else 1]
                        tensors = [_times(t, m, near.dim) for t, m in zip(tensors, matrix.chunk(2), strict=True)]
            for m, tensor in enumerate(tensors):
                rows[m].append(tensor.transpose(axis.dim, 0).reshape(tensor.shape[axis.dim], -1))
        stacked = torch.cat([torch.cat(parts, dim=1) for parts in rows])
        mean = stacked.mean(1)
        covariance = stacked @ stacked.T / stacked.shape[1] - torch.outer(mean, mean)
        deviation = covariance.diagonal().sqrt()
        return covariance / torch.outer(deviation, deviation).clamp(min=1e-7)

    def _rematch(self, space: mf.Space, similarity: Tensor) -> float:
        d = space.width
        if self.method == "zip":
            pairing = None
            if space.blocks > 1:
                partners = _paired(similarity[:d, d:], space.blocks)[1]
                pairing = torch.stack([torch.arange(space.blocks), partners])
            labels = official_zip(similarity, d, pairing=pairing)
            value = _mean_taken(similarity, labels)
        else:
            columns = _paired(similarity[:d, d:], space.blocks)[0]
            labels = torch.arange(d).repeat(2, 1)
            labels[1, columns] = torch.arange(d)
            value = float(similarity[torch.arange(d), d + columns].mean())
        unmerge = torch.eye(d)[labels.flatten()]
        self.labels[space.name] = labels
        self.matrices[space.name] = (2 * unmerge / (unmerge.sum(0, keepdim=True) + 1e-5), unmerge)
        return value


def _name(axis: mf.Axis) -> str:
    return axis.tensor if axis.pick is None else f"{axis.tensor}_{axis.pick[1]}"


def _parts(axis: mf.Axis, spec: mf.PermutationSpec) -> list[str]:
    """The tensors that an axis is on, after fused ones were cut."""
    if axis.pick is not None:
        return [_name(axis)]
    picked = [other for space in spec.spaces for other in space.axes if other.tensor == axis.tensor and other.pick]
    return list(dict.fromkeys(_name(other) for other in picked)) or [axis.tensor]


def _split(state: Mapping[str, Tensor], spec: mf.PermutationSpec) -> dict[str, Tensor]:
    """Fused tensors cut into their parts, as the published code does before it starts."""
    parts = dict(state)
    for space in spec.spaces:
        for axis in space.axes:
            if axis.pick is not None and axis.view is not None:
                whole = state[axis.tensor]
                parts[_name(axis)] = whole.chunk(axis.view[0], dim=0)[axis.pick[1]]
                parts.pop(axis.tensor, None)
    return parts


def _times(tensor: Tensor, matrix: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    moved = tensor.transpose(dim, 0)
    product = matrix.T @ moved.reshape(moved.shape[0], -1)
    return product.reshape(-1, *moved.shape[1:]).transpose(0, dim)


def _paired(cross: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Columns of the best assignment inside the best pairing of blocks, by scipy; and the pairing."""
    from scipy.optimize import linear_sum_assignment

    size = cross.shape[0] // blocks
    tiles = cross.reshape(blocks, size, blocks, size).permute(0, 2, 1, 3).numpy()
    scores, columns = torch.empty(blocks, blocks), torch.empty(blocks, blocks, size, dtype=torch.int64)
    for j in range(blocks):
        for k in range(blocks):
            rows, found = linear_sum_assignment(tiles[j, k], maximize=True)
            scores[j, k] = float(tiles[j, k][rows, found].mean())
            columns[j, k] = torch.from_numpy(found) + k * size
    rows, partners = linear_sum_assignment(scores.numpy(), maximize=True)
    return columns[rows, partners].reshape(-1), torch.from_numpy(partners)


def _mean_taken(similarity: Tensor, labels: Tensor) -> float:
    """Similarity inside merged units; stands in for the mean of the entries taken, which decides only when to stop."""
    same = labels.flatten()[:, None] == labels.flatten()[None, :]
    same.fill_diagonal_(False)
    return float(similarity[same].mean())
