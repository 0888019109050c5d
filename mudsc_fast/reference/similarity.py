"""Similarity of units by their weights, and its blend with that by activations (docs/method.md rules 2 and 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .covariance import correlation_from_moments, cross_blocks
from .regroup import regroup

Dims = int | tuple[int, ...]


@dataclass(frozen=True)
class Term:
    """One model's tensor as it enters the weight similarity of a space.

    tensor: floating, any shape.
    dim: the dims whose flattened indices are the units, in that order.
    labels: {dim or tuple of dims: int64 (product of their sizes,)}: this model's labels of other spaces, in whose
        merged coordinates those dims are expressed. All dims not named are columns as they are.
    scale: {same key: (merged width,) floating}, factors of the merged units; or the bare tensor where one key has
        labels; None is 1 everywhere.
    """

    tensor: Tensor
    dim: Dims
    labels: Mapping[Dims, Tensor] | None = None
    scale: Mapping[Dims, Tensor] | Tensor | None = None


Entry = Tensor | Term


def _dims(key: Dims, ndim: int) -> tuple[int, ...]:
    return tuple(d % ndim for d in (key if isinstance(key, tuple) else (key,)))


def _scales(term: Term) -> dict[Dims, Tensor]:
    if term.scale is None:
        return {}
    if isinstance(term.scale, Tensor):
        keys = list(term.labels or {})
        if len(keys) != 1:
            raise ValueError(f"scale: a bare tensor needs exactly one labelled dim, got {len(keys)}")
        return {keys[0]: term.scale}
    return dict(term.scale)


def _matrices(entries: Sequence[Entry]) -> list[Tensor]:
    """Return one tensor of the space as a (width, k) float64 matrix for every model."""
    terms = [Term(e, 0) if isinstance(e, Tensor) else Term(e.tensor, e.dim, e.labels, e.scale) for e in entries]
    # A merged unit that one model lacks is still a column of that model's matrix.
    sizes: dict[tuple[int, ...], int] = {}
    for term in terms:
        scales = _scales(term)
        for key, labels in (term.labels or {}).items():
            size = int(scales[key].numel()) if key in scales else int(labels.max()) + 1
            dims = _dims(key, term.tensor.ndim)
            sizes[dims] = max(size, sizes.get(dims, 0))
    return [_matrix(term, sizes) for term in terms]


def _matrix(term: Term, sizes: Mapping[tuple[int, ...], int]) -> Tensor:
    if not term.tensor.is_floating_point():
        raise TypeError(f"terms: expected floating tensors, got {term.tensor.dtype}")
    ndim = term.tensor.ndim
    rows = _dims(term.dim, ndim)
    labelled = {_dims(key, ndim): labels for key, labels in (term.labels or {}).items()}
    scales = {_dims(key, ndim): scale for key, scale in _scales(term).items()}
    used = [*rows, *(d for dims in labelled for d in dims)]
    if len(set(used)) != len(used):
        raise ValueError(f"terms: a dim is named twice among rows {rows} and labels {sorted(labelled)}")
    plain = tuple(d for d in range(ndim) if d not in used)
    x = term.tensor.detach().to(torch.float64)
    x = x.permute(*rows, *plain, *(d for dims in labelled for d in dims))
    shape = [term.tensor.shape[d] for d in (*rows, *plain)]
    lengths = [labels.numel() for labels in labelled.values()]
    x = x.reshape(*shape, *lengths)
    for k, (dims, labels) in enumerate(labelled.items()):
        x = regroup(x, labels, len(shape) + k, sizes[dims], scales.get(dims))
    width = 1
    for d in rows:
        width *= term.tensor.shape[d]
    return x.reshape(width, -1)


def weight_similarity(terms: Sequence[Sequence[Entry]], scope: str = "cross") -> Tensor:
    """Correlate units over all the weight columns that touch them.

    Args:
        terms: for each tensor of the space one entry a model: a (width, k) matrix or a Term (mudsc_fast.Term too).
        scope: "cross" or "full", as in Covariance.correlation.

    Returns:
        float64, (models-1, width, width) or (models*width, models*width). A dead unit, of standard deviation
        <= 1e-7 of its root mean square, has 0 with all others and 1 with itself.

    Raises:
        ValueError: no terms, widths or numbers of columns that disagree, NaN or inf in a weight.

    Source: docs/method.md rule 2.
    """
    if scope not in ("full", "cross"):
        raise ValueError(f'scope: expected "full" or "cross", got {scope!r}')
    if not terms:
        raise ValueError("terms: expected at least one tensor, got none")
    per_tensor = [_matrices(entries) for entries in terms]
    models = len(per_tensor[0])
    for t, matrices in enumerate(per_tensor):
        shapes = {tuple(matrix.shape) for matrix in matrices}
        if len(matrices) != models or len(shapes) != 1 or matrices[0].shape[0] != per_tensor[0][0].shape[0]:
            raise ValueError(f"terms[{t}]: expected {models} matrices of one shape, got {sorted(shapes)}")
    stacked = torch.cat([torch.cat([matrices[m] for matrices in per_tensor], dim=1) for m in range(models)], dim=0)
    if not bool(torch.isfinite(stacked).all()):
        raise ValueError("terms: expected finite weights, got NaN or inf")
    mean = stacked.mean(dim=1)
    centred = stacked - mean[:, None]
    full = correlation_from_moments(centred @ centred.T / stacked.shape[1], mean)
    return full if scope == "full" else cross_blocks(full, models)


def dual_similarity(terms: Sequence[Sequence[Entry]], activation: Any, balance: float, scope: str = "cross") -> Tensor:
    """Blend the similarities by weights and by activations.

    Args:
        terms: as in weight_similarity; may be empty.
        activation: a Covariance, or None for weights alone.
        balance: share of the weights, 0..1; 0 means activations alone.
        scope: "cross" or "full", as in Covariance.correlation.

    Returns:
        float64, shaped as in weight_similarity: balance * weights + (1 - balance) * activations.

    Raises:
        ValueError: balance outside 0..1, nothing to compare, or "full" asked of a "cross" Covariance.

    Source: docs/method.md rule 3.
    """
    if not 0.0 <= balance <= 1.0:
        raise ValueError(f"balance: expected a number in 0..1, got {balance}")
    if activation is None:
        return weight_similarity(terms, scope)
    if scope == "full" and activation.scope == "cross":
        raise ValueError('activation: scope "full" needs a Covariance of scope "full", got "cross"')
    by_activation: Tensor = activation.correlation().to(torch.float64)
    if scope == "cross" and activation.scope == "full":
        by_activation = cross_blocks(by_activation, activation.models)
    if balance == 0.0 or not terms:
        return by_activation
    by_weight = weight_similarity(terms, scope).to(by_activation.device)
    if by_weight.shape != by_activation.shape:
        raise ValueError(
            f"activation: expected a correlation of shape {tuple(by_weight.shape)} as the weights have, "
            f"got {tuple(by_activation.shape)}"
        )
    return balance * by_weight + (1.0 - balance) * by_activation
