"""Similarities of float64 weights: multiplied by torch, since no kernel here would be faster than its float64
product."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mudsc_fast.backends.cpu_covariance import similarity_shape
from mudsc_fast.backends.torch_device import DEAD

if TYPE_CHECKING:
    from mudsc_fast.similarity import Table


def wide_similarity(tables: list[list[Table]], width: int, models: int, cross: bool) -> Tensor:
    """Correlations over all weight columns, float64; see ``mudsc_fast.weight_similarity``."""
    rows = []
    for m in range(models):
        rows.append(torch.cat([_matrix(*row[m]) for row in tables], dim=1))
    x = torch.cat(rows)
    for t, row in enumerate(tables):
        if not all(bool(torch.isfinite(tensor).all()) for tensor, _, _ in row):
            raise ValueError(f"terms[{t}]: expected finite weights, got NaN or infinity")
    mean = x.mean(dim=1)
    y = x - mean[:, None]
    variance = y.square().mean(dim=1)
    dead = variance <= DEAD**2 * (variance + mean.square())
    y *= torch.where(dead, 0.0, (variance * x.shape[1]).rsqrt())[:, None]
    if not cross:
        upper = (y @ y.T).clamp_(-1.0, 1.0).triu_(1)
        return (upper + upper.T).fill_diagonal_(1.0)
    found = (y[:width] @ y[width:].T).clamp_(-1.0, 1.0)
    return found.reshape(width, models - 1, width).permute(1, 0, 2).reshape(similarity_shape(width, models, True))


def _matrix(
    tensor: Tensor, dims: tuple[int, ...], labelled: list[tuple[tuple[int, ...], Tensor, int, Tensor | None]]
) -> Tensor:
    used = [*dims, *(d for axes in labelled for d in axes[0])]
    plain = [d for d in range(tensor.dim()) if d not in used]
    sizes = [[tensor.shape[d] for d in group] for group in (dims, plain, *(axes[0] for axes in labelled))]
    lengths = [torch.Size(size).numel() for size in sizes]
    x = tensor.double().permute(*dims, *plain, *used[len(dims) :]).reshape(lengths)
    for k, (_, labels, size, scale) in enumerate(labelled):
        merged = x.new_zeros([*x.shape[: k + 2], size, *x.shape[k + 3 :]])
        merged.index_add_(k + 2, labels.to(x.device), x)
        if scale is not None:
            merged *= scale.to(x.device).reshape([size, *[1] * (x.dim() - k - 3)])
        x = merged
    return x.reshape(lengths[0], -1)
