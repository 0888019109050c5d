"""git-re-basin as its PyTorch forks have it: permutations come back as float32, and are used through ``.int()``."""

from __future__ import annotations

from typing import Any, NamedTuple

import tool_algorithms as restated
import torch
from torch import Tensor


class PermutationSpec(NamedTuple):
    perm_to_axes: dict[str, list[tuple[str, int]]]
    axes_to_perm: dict[str, tuple[str | None, ...]]


def weight_matching(
    ps: Any, params_a: dict[str, Tensor], params_b: dict[str, Tensor], max_iter: int = 100, init_perm: None = None
) -> dict[str, Tensor]:
    found = restated.weight_matching(ps.axes_to_perm, params_a, params_b, max_iter)
    return {p: torch.from_numpy(indices).float() for p, indices in found.items()}


def apply_permutation(ps: Any, perm: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
    result = {}
    for name, tensor in params.items():
        for axis, p in enumerate(ps.axes_to_perm[name]):
            if p is not None:
                tensor = tensor.index_select(axis, perm[p].int())
        result[name] = tensor
    return result
