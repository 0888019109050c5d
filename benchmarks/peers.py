"""What mudsc_fast is measured against: each peer behind one small function.

A peer whose package is missing is reported with the reason, never skipped silently. The official algorithms are
re-stated plainly from the paper and from what its code computes; none of its code is here.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from .harness import Contender


def why_missing(module: str) -> str | None:
    """None if the module can be imported, else the reason and how to get it."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{error}; pip install 'mudsc-fast[bench]'"
    return None


# ---- linear assignment ----


def _scipy(similarity: Tensor) -> Contender:
    reason = why_missing("scipy.optimize")
    if reason:
        return Contender("scipy", None, reason)
    from scipy.optimize import linear_sum_assignment

    matrix = similarity.numpy()
    return Contender("scipy", lambda: linear_sum_assignment(matrix, maximize=True)[1])


def _lapjv(similarity: Tensor) -> Contender:
    reason = why_missing("lapjv")
    if reason:
        return Contender("lapjv", None, reason)
    from lapjv import lapjv

    cost = (-similarity).numpy()
    return Contender("lapjv", lambda: lapjv(cost)[0])


def _lapcpp(similarity: Tensor) -> Contender:
    reason = why_missing("lapcpp")
    if reason:
        return Contender("lapcpp", None, reason)
    import lapcpp

    cost = (-similarity).numpy()
    return Contender("lapcpp", lambda: lapcpp.lapjv(cost, return_cost=False)[1])


# lapx's solvers, and where each has the columns among its results. The older two solve in float64.
_LAPX = {"lapjv": 0, "lapjvc": 1, "lapjvh": 1, "lapjvr": 1}


def _lapx(solver: str, similarity: Tensor) -> Contender:
    name = f"lapx {solver}"
    reason = why_missing("lap")
    if reason:
        return Contender(name, None, reason)
    import lap

    solve, columns = getattr(lap, solver, None), _LAPX[solver]
    if solve is None:
        return Contender(name, None, f"lapx {lap.__version__} has no {solver}; pip install 'mudsc-fast[bench]'")
    cost = (-similarity).numpy() if solver in ("lapjvh", "lapjvr") else (-similarity).double().numpy()
    return Contender(name, lambda: solve(cost, return_cost=False)[columns])


ASSIGNMENT_PEERS: dict[str, Callable[[Tensor], Contender]] = {
    "scipy": _scipy,
    "lapjv": _lapjv,
    "lapcpp": _lapcpp,
    **{f"lapx {solver}": partial(_lapx, solver) for solver in _LAPX},
}


# ---- covariance and similarity ----


def openblas_ssyrk(together: Tensor) -> Contender:
    """OpenBLAS's symmetric product through scipy, adding to a running sum as a streaming update does."""
    name = "OpenBLAS ssyrk"
    reason = why_missing("scipy.linalg")
    if reason:
        return Contender(name, None, reason)
    import numpy as np
    from scipy.linalg.blas import ssyrk

    matrix = np.asfortranarray(together.numpy().T)  # (width, samples)
    total = np.zeros((matrix.shape[0], matrix.shape[0]), dtype=np.float32, order="F")
    return Contender(name, lambda: ssyrk(1.0, matrix, beta=1.0, c=total, overwrite_c=True))


def official_covariance(features: Sequence[Tensor], dim: int) -> Callable[[], Tensor]:
    """The published update: float32, units to the front, stacked, squares and sums of everything."""
    width = features[0].shape[dim] * len(features)
    outer, mean, total = torch.zeros(width, width), torch.zeros(width), torch.zeros(width)

    def update() -> Tensor:
        rows = [x.float().movedim(dim, 0).flatten(1) for x in features]
        stacked = torch.cat(rows, dim=0)
        stacked = torch.where(torch.isfinite(stacked), stacked, torch.zeros(()))
        mean.add_(stacked.mean(1))
        total.add_(stacked.std(1))
        product: Tensor = stacked @ stacked.T
        outer.add_(product / stacked.shape[1])
        return product

    return update


def official_similarity(out: Sequence[Tensor], read: Sequence[Tensor], activation: Tensor, balance: float) -> Tensor:
    """The published similarity: concatenated columns, correlation of all models with all, then the blend."""
    rows = torch.cat([torch.cat([a, b.T], dim=1) for a, b in zip(out, read, strict=True)]).float()
    rows = rows - rows.mean(1, keepdim=True)
    deviation = rows.norm(dim=1)
    correlation = rows @ rows.T / (deviation[:, None] * deviation[None, :] + 1e-7)
    return balance * correlation + (1 - balance) * activation


# ---- zip ----


def _without(matrix: Tensor, column: int) -> Tensor:
    return torch.cat([matrix[:, :column], matrix[:, column + 1 :]], dim=1)


def official_zip(
    similarity: Tensor,
    width: int,
    attenuation: float = 0.5,
    models: int = 2,
    pairing: Tensor | None = None,
    most_merges: int | None = None,
) -> Tensor:
    """The greedy rule as published: search the whole matrix for every merge, then cut a row and a column out of it.

    With a pairing of blocks, (models, blocks), the whole matrix is searched through a mask that leaves one union of
    blocks open at a time. Returns labels (models, units of a model), numbered by lowest member. ``most_merges``: stop
    after so many merges.
    """
    sims = similarity.clone().fill_diagonal_(-math.inf)
    total = sims.shape[0]
    blocks = 1 if pairing is None else pairing.shape[1]
    indicator = torch.eye(total)
    model_of = torch.arange(total) * models // total
    block_of = torch.arange(total) * models * blocks // total
    left = torch.full((models,), (total - width) // models)
    left_in_block = torch.full((models * blocks,), (total - width) // (models * blocks))
    for b in range(blocks):
        mask = None
        if pairing is not None:
            own = torch.isin(block_of, pairing[:, b] + torch.arange(models) * blocks)
            mask = torch.full_like(sims, -math.inf)
            mask[own[:, None] & own[None, :]] = 0.0
        for _ in range((total - width) // blocks):
            if most_merges is not None and total - sims.shape[0] >= most_merges:
                return indicator.argmax(dim=1).reshape(models, -1)
            searched = sims if mask is None else sims + mask
            i, j = sorted(divmod(int(searched.reshape(-1).argmax()), sims.shape[0]))
            indicator[:, i] += indicator[:, j]
            indicator = _without(indicator, j)
            sims[:, i] = torch.minimum(sims[:, i], sims[:, j]) * attenuation
            sims = _without(_without(sims, j).T, j).T
            sims[i, :] = sims[:, i]
            sims[i, i] = -math.inf
            if mask is not None:
                mask = _without(_without(mask, j).T, j).T
            same_model, same_block = bool(model_of[i] == model_of[j]), bool(block_of[i] == block_of[j])
            model_of, block_of = _without(model_of[None], j)[0], _without(block_of[None], j)[0]
            for same, origin, budget in ((same_model, model_of, left), (same_block, block_of, left_in_block)):
                if same:
                    budget[origin[i]] -= 1
                    if budget[origin[i]] <= 0:
                        own = origin == origin[i]
                        sims[own[:, None] & own[None, :]] = -math.inf
    return indicator.argmax(dim=1).reshape(models, -1)
