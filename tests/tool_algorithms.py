"""The algorithms of other tools, restated plainly from their papers and recorded behaviour: dense, slow, in numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def covariance(batches: Sequence[Sequence[Tensor]]) -> np.ndarray:
    """Population covariance of all models' channels over all samples; a batch: (channels, samples) a model."""
    x = np.concatenate(
        [np.concatenate([np.nan_to_num(f.double().numpy(), posinf=0, neginf=0) for f in b]) for b in batches], 1
    )
    return np.cov(x, bias=True)


def correlation(cov: np.ndarray) -> np.ndarray:
    deviation = np.sqrt(np.diagonal(cov))
    return cov / np.maximum(np.outer(deviation, deviation), 1e-7)


def zip_greedily(similarity: np.ndarray, models: int, width: int, a: float, b: float) -> np.ndarray:
    """The indicator (models * d, width) of ZipIt's greedy matching: clusters in a list, the matrix searched whole."""
    total = len(similarity)
    d = total // models
    s = similarity.astype(np.float64).copy()
    np.fill_diagonal(s, -np.inf)
    members = {k: [k] for k in range(total)}
    owner = {k: k // d for k in range(total)}
    budget = [int(((total - width) // models) * b + 1e-4)] * models
    while len(members) > width:
        left = sorted(members)
        block = s[np.ix_(left, left)]
        i, j = sorted(left[k] for k in divmod(int(block.argmax()), len(left)))
        members[i] += members.pop(j)
        merged = np.minimum(s[i], s[j]) * a
        s[i], s[:, i] = merged, merged
        s[i, i] = -np.inf
        if owner[i] == owner[j]:
            budget[owner[i]] -= 1
            if budget[owner[i]] <= 0:
                own = [k for k in members if owner[k] == owner[i]]
                s[np.ix_(own, own)] = -np.inf
    unmerge = np.zeros((total, width))
    for column, k in enumerate(sorted(members)):
        unmerge[members[k], column] = 1
    return unmerge


def permute(similarity: np.ndarray, models: int) -> np.ndarray:
    """The indicator of every model's best permutation to the first."""
    d = len(similarity) // models
    blocks = [np.eye(d)]
    for m in range(1, models):
        _, columns = linear_sum_assignment(similarity[:d, m * d : (m + 1) * d], maximize=True)
        block = np.zeros((d, d))
        block[columns, np.arange(d)] = 1
        blocks.append(block)
    return np.concatenate(blocks)


def weight_matching(
    axes_to_perm: Mapping[str, Sequence[str | None]],
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    iterations: int = 100,
) -> dict[str, np.ndarray]:
    """git-re-basin's algorithm 1, with one order of visits an iteration from torch's global generator."""
    uses: dict[str, list[tuple[str, int]]] = {}
    for name, permutations in axes_to_perm.items():
        for axis, p in enumerate(permutations):
            if p is not None:
                uses.setdefault(p, []).append((name, axis))
    perm = {p: np.arange(a[axes[0][0]].shape[axes[0][1]]) for p, axes in uses.items()}
    names = list(perm)
    for _ in range(iterations):
        gained = False
        for k in torch.randperm(len(names)):
            p = names[int(k)]
            gain = np.zeros((len(perm[p]), len(perm[p])))
            for name, axis in uses[p]:
                w_b = b[name].double().numpy()
                for other, q in enumerate(axes_to_perm[name]):
                    if q is not None and other != axis:
                        w_b = w_b.take(perm[q], axis=other)
                rows = [np.moveaxis(w, axis, 0).reshape(len(perm[p]), -1) for w in (a[name].double().numpy(), w_b)]
                gain += rows[0] @ rows[1].T
            order, found = linear_sum_assignment(gain, maximize=True)
            gained = gained or gain[order, found].sum() > gain[order, perm[p]].sum() + 1e-12
            perm[p] = found
        if not gained:
            break
    return perm


def expert_permutations(ups: Tensor, downs: Tensor, gates: Tensor | None, reference: int) -> np.ndarray:
    """One scipy assignment an expert, on squared distances between the units' weights."""
    parts = [ups, downs.transpose(1, 2)] + ([] if gates is None else [gates])
    units = torch.cat(parts, 2).double().numpy()
    result = []
    for own in units:
        distance = ((units[reference][:, None] - own[None]) ** 2).sum(-1)
        result.append(linear_sum_assignment(distance)[1])
    return np.stack(result)
