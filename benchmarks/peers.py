"""What mudsc_fast is measured against: each peer behind one small function.

A peer whose package is missing is reported with the reason, never skipped silently. The official algorithms are
re-stated plainly from the paper and from what its code computes; none of its code is here.
"""

from __future__ import annotations

import importlib
import math

import torch
from torch import Tensor


def why_missing(module: str) -> str | None:
    """None if the module can be imported, else the reason and how to get it."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{error}; pip install 'mudsc-fast[bench]'"
    return None


# ---- zip ----


def _without(matrix: Tensor, column: int) -> Tensor:
    return torch.cat([matrix[:, :column], matrix[:, column + 1 :]], dim=1)


def official_zip(similarity: Tensor, width: int, attenuation: float = 0.5, models: int = 2) -> Tensor:
    """The greedy rule as published: search the whole matrix for every merge, then cut a row and a column out of it.

    Returns labels (models, units of a model), numbered by lowest member.
    """
    sims = similarity.clone().fill_diagonal_(-math.inf)
    total = sims.shape[0]
    indicator = torch.eye(total)
    model_of = [i * models // total for i in range(total)]
    left = [(total - width) // models] * models
    while sims.shape[0] > width:
        i, j = sorted(divmod(int(sims.reshape(-1).argmax()), sims.shape[0]))
        indicator[:, i] += indicator[:, j]
        indicator = _without(indicator, j)
        sims[:, i] = torch.minimum(sims[:, i], sims[:, j]) * attenuation
        sims = _without(sims, j)
        sims = _without(sims.T, j).T
        sims[i, :] = sims[:, i]
        sims[i, i] = -math.inf
        owner, other = model_of[i], model_of.pop(j)
        if owner == other:
            left[owner] -= 1
            if left[owner] == 0:
                own = torch.tensor([m == owner for m in model_of])
                sims[own[:, None] & own[None, :]] = -math.inf
    return indicator.argmax(dim=1).reshape(models, -1)

