"""ZipIt's matching functions and metrics, by their names and arguments, for its ModelMerge.

``transform_fn(metric, reduce_ratio, **kw)`` is called as ZipIt calls it and returns what its ModelMerge multiplies:
the merge matrix transposed, and the unmerge matrix. What differs is in docs/adapters.md; ``eps=1e-5`` brings back the
published normalisation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mudsc_fast.adapters.matrices import correlation_of, inverse_deviation, merge_and_unmerge, require_square
from mudsc_fast.assignment import assign
from mudsc_fast.covariance import Covariance
from mudsc_fast.zipping import zip_units

Matched = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]

_METRICS = ("covariance", "correlation", "cossim")


def match_tensors_zipit(
    metric: Mapping[str, Tensor],
    r: float = 0.5,
    a: float = 0.3,
    b: float = 0.125,
    print_merges: bool = False,
    get_merge_value: bool = False,
    add_bias: bool = False,
    eps: float = 0.0,
    **kwargs: Any,
) -> Matched:
    """Greedy zip of the units of all models: (merge.T, unmerge), or with the mean similarity taken as a third.

    metric: {"covariance": (N * n, N * n)}, or "correlation" or "cossim"; not changed.
    r: share of the N * n units to be merged away; the number of models N is 1 / (1 - r).
    a, b: attenuation and budget (ZipIt section 4.3). print_merges: accepted, prints nothing. eps: added to the number
        of members in merge; ZipIt adds 1e-5. kwargs: ignored, as ZipIt does.

    Returns merge.T (width, N * n) and unmerge (N * n, width) on the metric's device. Raises ValueError for a metric
    without a known name, and where the budget leaves no allowed pair (ZipIt loses units there).
    """
    models = _models(r)
    similarity = _similarity(metric, models)
    width = int(similarity.shape[0] * (1 - r) + 1e-4)
    found = zip_units(similarity, models, width, attenuation=a, budget=b)
    merge, unmerge = merge_and_unmerge(found.labels, width, similarity.device, eps, add_bias)
    return (merge.T, unmerge, found.value.float()) if get_merge_value else (merge.T, unmerge)


def match_tensors_permute(
    metric: Mapping[str, Tensor],
    r: float = 0.5,
    get_merge_value: bool = False,
    add_bias: bool = False,
    eps: float = 0.0,
    **kwargs: Any,
) -> Matched:
    """Every model permuted to the order of the first: (merge.T, unmerge), or with the mean matched similarity too.

    Arguments and result as in ``match_tensors_zipit``; the value counts every model, ZipIt's only the last.
    """
    models = _models(r)
    name, matrix = _chosen(metric)
    similarity = require_square(f"metric[{name!r}]", matrix, models)
    d = similarity.shape[0] // models
    scale = inverse_deviation(similarity).reshape(models, d) if name == "covariance" else None
    labels = torch.arange(d).repeat(models, 1)
    values = []
    for m in range(1, models):
        cross = similarity[:d, m * d : (m + 1) * d]
        found = assign(cross if scale is None else cross * scale[0][:, None] * scale[m])
        labels[m, found.indices.cpu()] = torch.arange(d)
        values.append(found.value.float())
    merge, unmerge = merge_and_unmerge(labels, d, similarity.device, eps, add_bias)
    return (merge.T, unmerge, torch.stack(values).mean()) if get_merge_value else (merge.T, unmerge)


def match_tensors_identity(
    metric: Mapping[str, Tensor], r: float = 0.5, add_bias: bool = False, eps: float = 0.0, **kwargs: Any
) -> Matched:
    """Unit i with unit i: plain averaging. Arguments and result as in ``match_tensors_zipit``."""
    models = _models(r)
    similarity = require_square(*_chosen(metric), models)
    d = similarity.shape[0] // models
    merge, unmerge = merge_and_unmerge(torch.arange(d).repeat(models, 1), d, similarity.device, eps, add_bias)
    return merge.T, unmerge


def _models(r: float) -> int:
    if not isinstance(r, int | float) or not 0 < r < 1:
        raise ValueError(f"r: expected a share between 0 and 1, such as 0.5 for two models, got {r!r}")
    return int(1 / (1 - r) + 0.5)


def _chosen(metric: Mapping[str, Tensor]) -> tuple[str, Tensor]:
    if not isinstance(metric, Mapping):
        raise TypeError(f"metric: expected a dictionary with one of {', '.join(_METRICS)}, got {type(metric).__name__}")
    for name in _METRICS:
        if name in metric:
            return name, metric[name]
    raise ValueError(f"metric: expected one of the keys {', '.join(_METRICS)}, got {', '.join(map(str, metric))}")


def _similarity(metric: Mapping[str, Tensor], models: int) -> Tensor:
    name, matrix = _chosen(metric)
    matrix = require_square(f"metric[{name!r}]", matrix, models)
    return correlation_of(matrix) if name == "covariance" else matrix


class CovarianceMetric:
    """ZipIt's streaming metric: ``update(batch_size, *feats)``, one (channels, samples) tensor a model."""

    name = "covariance"

    def __init__(self) -> None:
        self._sums: Covariance | None = None

    def update(self, batch_size: int, *feats: Tensor, **aux_params: Any) -> None:
        """Add a batch. batch_size is not used: every sample counts once, whatever batch it came in."""
        if self._sums is None:
            if len(feats) < 2:
                raise ValueError(f"feats: expected one tensor a model, two or more, got {len(feats)}")
            self._sums = Covariance(feats[0].shape[0], models=len(feats), device=feats[0].device)
        self._sums.update([f if f.is_floating_point() else f.float() for f in feats], dim=0)

    def finalize(self, numel: int | None = None, eps: float = 0.0) -> Tensor:
        """The (N * channels, N * channels) covariance; may be called again. numel and eps are not used."""
        correlation = self._seen().correlation()
        deviation = self._seen().variance.reshape(-1).sqrt().to(correlation.dtype)
        return correlation * torch.outer(deviation, deviation)

    def _seen(self) -> Covariance:
        if self._sums is None:
            raise ValueError(f"{type(self).__name__}: finalize needs at least one update")
        return self._sums


class CorrelationMetric(CovarianceMetric):
    """The same, finalised to a correlation. ``update(batch_size, dx, *feats)`` of older ZipIt is accepted too."""

    name = "correlation"

    def update(self, batch_size: int, *feats: Any, **aux_params: Any) -> None:
        """Add a batch; a number between batch_size and the features is ZipIt's weight dx, which is not used."""
        super().update(batch_size, *(feats if isinstance(feats[0], Tensor) else feats[1:]))

    def finalize(self, numel: int | None = None, eps: float = 0.0) -> Tensor:
        """The (N * channels, N * channels) correlation; may be called again."""
        return self._seen().correlation()


def get_metric_fns(names: list[str]) -> dict[str, type[CovarianceMetric]]:
    """{name: metric class} for ZipIt's configurations; ValueError for a metric that is not offered."""
    known = {"covariance": CovarianceMetric, "correlation": CorrelationMetric}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"names: expected {', '.join(known)}, got {unknown[0]!r}")
    return {name: known[name] for name in names}
