"""Similarity of units by their weights, and its blend with their similarity by activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mudsc_fast import backends
from mudsc_fast.covariance import Covariance

Dims = int | tuple[int, ...]
# (tensor, offsets of units, offsets of members, segments of members by column or None, factors of columns or None)
Table = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Term:
    """One model's tensor as it enters the weight similarity of a space, read in place.

    tensor: floating, any shape and strides.
    dim: the dim, or dims, whose flattened indices are the units, in that order.
    labels: {dim or tuple of dims: int64 (product of their sizes,)}: this model's labels of other spaces, in whose
        merged coordinates those dims are expressed. All other dims are columns as they are.
    scale: {the same key: (merged width,) floating}, factors of the merged units; or the bare tensor where one key has
        labels; None is 1 everywhere.
    """

    tensor: Tensor
    dim: Dims
    labels: Mapping[Dims, Tensor] | None = None
    scale: Mapping[Dims, Tensor] | Tensor | None = None


Entry = Tensor | Term


def weight_similarity(terms: Sequence[Sequence[Entry]], scope: str = "cross", backend: str = "auto") -> Tensor:
    """Correlate units over all the weight columns that touch them.

    Args:
        terms: for each tensor of the space one entry a model: a (width, k) matrix or a ``Term``. Any floating dtype
            and strides, CPU or CUDA; nothing is concatenated, permuted or copied.
        scope: "cross" or "full".
        backend: "auto" or a name of ``mudsc_fast.backends``.

    Returns:
        float32 (float64 if an entry is); "cross": (models-1, width, width), [m-1, i, j] belonging to unit i of model 0
        and unit j of model m; "full": (models*width, models*width), exactly symmetric, diagonal 1. A dead unit (its row
        has a deviation <= 1e-7 of its root mean square) has 0 with all others.

    Raises:
        TypeError: entries that are not floating tensors or Terms.
        ValueError: no terms, widths, columns or numbers of models that disagree, NaN or infinity in a weight.

    Source: docs/method.md rule 2.
    """
    if not terms:
        raise ValueError("terms: expected at least one tensor, got none")
    return dual_similarity(terms, None, 1.0, scope, backend)


def dual_similarity(
    terms: Sequence[Sequence[Entry]],
    activation: Covariance | None,
    balance: float,
    scope: str = "cross",
    backend: str = "auto",
) -> Tensor:
    """Blend similarities: ``balance * by weights + (1 - balance) * by activations``, in one pass over the result.

    Args:
        terms: as in ``weight_similarity``; may be empty.
        activation: a Covariance of the space's units, or None for weights alone.
        balance: share of the weights, 0..1. 0, or no terms: activations alone.
        scope: "cross" or "full"; "full" needs a Covariance of scope "full".
        backend: "auto" or a name of ``mudsc_fast.backends``.

    Returns:
        As ``weight_similarity``; float64 if an entry or an activation was.

    Raises:
        TypeError: entries that are not floating tensors or Terms.
        ValueError: as ``weight_similarity``; balance outside 0..1; nothing to compare; an activation without samples,
            of another width or number of models, or of too small a scope.

    Source: docs/method.md rule 3.
    """
    if scope not in ("full", "cross"):
        raise ValueError(f'scope: expected "full" or "cross", got {scope!r}')
    if not 0.0 <= balance <= 1.0:
        raise ValueError(f"balance: expected a number in 0..1, got {balance}")
    if activation is None:
        if not terms:
            raise ValueError("terms: expected at least one tensor where no activation is given, got none")
    else:
        _check_activation(activation, scope)
    use_weights = bool(terms) and (activation is None or balance > 0.0)
    if not use_weights and activation is not None:
        return activation.correlation_blocks(scope)
    tables, device = _tables(terms)
    models, width = len(tables[0]), int(tables[0][0][1].numel())
    if activation is not None and (activation.models, activation.width) != (models, width):
        raise ValueError(
            f"activation: expected {models} models of {width} units as the terms have, "
            f"got {activation.models} of {activation.width}"
        )
    chosen = backends.pick("similarity", device, backend)
    blended = activation if activation is not None and balance < 1.0 else None
    result: Tensor = chosen.module.similarity(tables, width, models, scope == "cross", balance, blended, device)
    return result


def _check_activation(activation: Covariance, scope: str) -> None:
    if not isinstance(activation, Covariance):
        raise TypeError(f"activation: expected a Covariance or None, got {type(activation).__name__}")
    if activation.count == 0:
        raise ValueError("activation: expected a Covariance with samples, got an empty one")
    if scope == "full" and activation.scope == "cross":
        raise ValueError('activation: scope "full" needs a Covariance of scope "full", got "cross"')


def _tables(terms: Sequence[Sequence[Entry]]) -> tuple[list[list[Table]], torch.device]:
    """Describe every entry by offsets into its tensor, checked against the others."""
    tables: list[list[Table]] = []
    device = None
    for t, entries in enumerate(terms):
        if isinstance(entries, (Tensor, Term)):
            raise TypeError(f"terms[{t}]: expected one entry a model, got a single {type(entries).__name__}")
        checked = [_checked(entry, f"terms[{t}][{m}]") for m, entry in enumerate(entries)]
        if len(checked) != len(terms[0]) or len(checked) < 2:
            raise ValueError(
                f"terms[{t}]: expected one entry for each of {max(len(terms[0]), 2)} models, got {len(checked)}"
            )
        row = [_table(term, sizes) for term, sizes in zip(checked, _merged_sizes(checked, t), strict=True)]
        for m, (term, table) in enumerate(zip(checked, row, strict=True)):
            first = tables[0][0] if tables else row[0]
            if table[1].numel() != first[1].numel():
                raise ValueError(f"terms[{t}][{m}]: expected {first[1].numel()} units, got {table[1].numel()}")
            if _columns(table) != _columns(row[0]):
                raise ValueError(
                    f"terms[{t}][{m}]: expected {_columns(row[0])} columns as model 0 has, got {_columns(table)} "
                    f"from shape {tuple(term.tensor.shape)}"
                )
            device = device or term.tensor.device
            if term.tensor.device != device:
                raise ValueError(f"terms[{t}][{m}]: expected a tensor on {device}, got one on {term.tensor.device}")
        tables.append(row)
    if device is None or tables[0][0][1].numel() == 0:
        raise ValueError("terms: expected at least one unit, got none")
    return tables, device


def _columns(table: Table) -> int:
    return int(table[2].numel()) if table[3] is None else int(table[3].numel()) - 1


def _dims(key: Dims, ndim: int, name: str) -> tuple[int, ...]:
    dims = key if isinstance(key, tuple) else (key,)
    if not dims or any(not -ndim <= d < ndim for d in dims):
        raise ValueError(f"{name}: expected dims of a {ndim}-d tensor, got {key}")
    return tuple(d % ndim for d in dims)


@dataclass(frozen=True)
class _Checked:
    """A Term with its dims resolved: rows, and {dims: (labels, scale)}."""

    tensor: Tensor
    rows: tuple[int, ...]
    labels: dict[tuple[int, ...], tuple[Tensor, Tensor | None]]
    name: str


def _checked(entry: Entry, name: str) -> _Checked:
    term = Term(entry, 0) if isinstance(entry, Tensor) else entry
    tensor = getattr(term, "tensor", None)
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor or a Term, got {type(entry).__name__}")
    if not tensor.is_floating_point() or tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense floating tensor, got {tensor.dtype}, {tensor.layout}")
    if isinstance(entry, Tensor) and tensor.dim() not in (1, 2):
        raise ValueError(f"{name}: expected a (width, columns) matrix, got shape {tuple(tensor.shape)}; use Term")
    ndim = tensor.dim()
    rows = _dims(term.dim, ndim, f"{name}.dim")
    scales: dict[Any, Tensor] = {}
    if isinstance(term.scale, Tensor):
        if len(term.labels or {}) != 1:
            raise ValueError(
                f"{name}.scale: a bare tensor needs exactly one labelled dim, got {len(term.labels or {})}"
            )
        scales = {_dims(next(iter(term.labels or {})), ndim, f"{name}.labels"): term.scale}
    elif term.scale is not None:
        scales = {_dims(key, ndim, f"{name}.scale"): scale for key, scale in term.scale.items()}
    labelled = {}
    for key, labels in (term.labels or {}).items():
        dims = _dims(key, ndim, f"{name}.labels")
        labelled[dims] = (_checked_labels(labels, [tensor.shape[d] for d in dims], name), scales.pop(dims, None))
    if scales:
        raise ValueError(f"{name}.scale: expected the keys of labels, got {sorted(scales)}")
    used = [*rows, *(d for dims in labelled for d in dims)]
    if len(set(used)) != len(used):
        raise ValueError(f"{name}: a dim is named twice among rows {rows} and labels {sorted(labelled)}")
    tensor = tensor.detach().resolve_neg()
    return _Checked(tensor if tensor.dtype in _FLOATS else tensor.float(), rows, labelled, name)


def _checked_labels(labels: Tensor, sizes: list[int], name: str) -> Tensor:
    if not isinstance(labels, Tensor) or labels.dtype not in (torch.int64, torch.int32):
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{name}.labels: expected an int64 tensor, got {got}")
    expected = 1
    for size in sizes:
        expected *= size
    if labels.shape != (expected,):
        raise ValueError(f"{name}.labels: expected shape ({expected},), got {tuple(labels.shape)}")
    labels = labels.detach().to("cpu", torch.int64)
    if expected and int(labels.min()) < 0:
        raise ValueError(f"{name}.labels: expected labels of at least 0, got {int(labels.min())}")
    return labels


def _merged_sizes(terms: list[_Checked], t: int) -> list[dict[tuple[int, ...], int]]:
    """Merged width of each labelled axis: the largest over all models, the k-th key of each model being one axis."""
    if len({len(term.labels) for term in terms}) > 1:
        raise ValueError(f"terms[{t}]: expected labels for the same dims in every model")
    sizes: list[dict[tuple[int, ...], int]] = []
    for term in terms:
        own = {}
        for dims, (labels, scale) in term.labels.items():
            needed = int(labels.max()) + 1 if labels.numel() else 0
            own[dims] = needed if scale is None else int(scale.numel())
            if scale is not None and (scale.dim() != 1 or scale.numel() < needed):
                raise ValueError(f"{term.name}.scale: expected shape ({needed},) or longer, got {tuple(scale.shape)}")
        sizes.append(own)
    keys = list(sizes[0])
    if any(set(own) != set(keys) for own in sizes):
        raise ValueError(f"terms[{t}]: expected labels for the same dims in every model")
    return [{key: max(own[key] for own in sizes) for key in keys} for _ in sizes]


def _offsets(tensor: Tensor, dims: Sequence[int]) -> Tensor:
    """Offsets of all indices of some dims, row-major, flattened."""
    offsets = torch.zeros(1, dtype=torch.int64)
    for d in dims:
        offsets = (offsets[:, None] + torch.arange(tensor.shape[d]) * tensor.stride(d)).flatten()
    return offsets


def _table(term: _Checked, sizes: Mapping[tuple[int, ...], int]) -> Table:
    """Offsets of units and columns. Labelled axes come last, in the order of the labels."""
    tensor = term.tensor
    used = {*term.rows, *(d for dims in term.labels for d in dims)}
    units = _offsets(tensor, term.rows)
    plain = _offsets(tensor, [d for d in range(tensor.dim()) if d not in used])
    if not term.labels:
        return tensor, units, plain, None, None
    members, columns, total = plain, torch.arange(plain.numel()), plain.numel()
    scale: Tensor | None = None
    for dims, (labels, factors) in ((key, term.labels[key]) for key in sizes):
        size = sizes[dims]
        members = (members[:, None] + _offsets(tensor, dims)).flatten()
        columns = (columns[:, None] * size + labels).flatten()
        if scale is not None or factors is not None:
            padded = torch.ones(size, dtype=torch.float64)
            if factors is not None:
                padded[: factors.numel()] = factors.detach().to("cpu", torch.float64)
            scale = ((torch.ones(total, dtype=torch.float64) if scale is None else scale)[:, None] * padded).flatten()
        total *= size
    order = columns.argsort(stable=True)
    counts = columns.bincount(minlength=total)
    members = members[order]
    if scale is not None and bool((scale == 1.0).all()):
        scale = None
    if bool((counts == 1).all()):
        return tensor, units, members, None, scale
    return tensor, units, members, torch.cat((counts.new_zeros(1), counts.cumsum(0))), scale
