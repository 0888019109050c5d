"""RegMean as a baseline: linear layers merged by the Gram matrices of what they read in each parent.

Source: Jin et al., Dataless Knowledge Fusion by Merging Weights of Language Models, arXiv 2212.09849.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import mudsc_fast as mf


@torch.no_grad()
def grams(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """{weight of a linear layer: mean of x x' over all positions it reads, float64}."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    sums = {name: mf.Moments(module.in_features) for name, module in layers.items()}

    def hook(name: str) -> Any:
        return lambda module, given: sums[name].update(given[0])

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in layers.items()]
    for batch in batches:
        model(**batch)
    for handle in handles:
        handle.remove()
    return {f"{name}.weight": s.lower(centred=False, mirrored=True) for name, s in sums.items()}


def regmean(models: Sequence[nn.Module], batches: Sequence[Mapping[str, Any]], alpha: float = 0.9) -> dict[str, Tensor]:
    """W = sum of W_m G_m times the inverse of sum of G_m for linear layers, with G_m's off-diagonal times alpha.

    models: in one unit order. All other tensors are averaged.
    """
    each = [grams(model, batches) for model in models]
    states = [model.state_dict() for model in models]
    merged = {name: torch.stack([s[name].double() for s in states]).mean(0).to(x) for name, x in states[0].items()}
    for name in each[0]:
        shrunk = [alpha * g[name] + (1 - alpha) * g[name].diagonal().diag() for g in each]
        right = sum(s[name].double() @ g for s, g in zip(states, shrunk, strict=True))
        whole = sum(shrunk[1:], shrunk[0])
        ridge = 1e-9 * whole.diagonal().mean() * torch.eye(len(whole), dtype=whole.dtype)
        merged[name] = torch.linalg.solve(whole + ridge, right.T).T.to(merged[name])
    return merged
