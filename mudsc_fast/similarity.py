"""Similarity of units by their weights, and its blend with their similarity by activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mudsc_fast import backends
from mudsc_fast.covariance import Covariance
from mudsc_fast.scalars import check_dim, check_number

Dims = int | tuple[int, ...]
# Axes in merged coordinates: (dims, labels, merged width, factors of the merged units or None), on the CPU.
Labelled = tuple[tuple[int, ...], Tensor, int, Tensor | None]
# What the kernels take of a term: (tensor, dims of the units, labelled axes).
Table = tuple[Tensor, tuple[int, ...], list[Labelled]]

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
        activation: a Covariance of the space's units on any device, or None for weights alone.
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
    balance = check_number("balance", balance)
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
    tables, width, device = checked_tables(terms)
    models = len(tables[0])
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


def checked_tables(terms: Sequence[Sequence[Entry]]) -> tuple[list[list[Table]], int, torch.device]:
    """Check the entries against each other; returns them with the number of units and the device."""
    tables: list[list[Table]] = []
    models, width, device = 0, 0, None
    if not isinstance(terms, Sequence):
        raise TypeError(f"terms: expected a sequence, one entry a tensor, got {type(terms).__name__}")
    for t, entries in enumerate(terms):
        if not isinstance(entries, Sequence):
            raise TypeError(f"terms[{t}]: expected one entry a model, got a single {type(entries).__name__}")
        row = [_table(entry, f"terms[{t}][{m}]") for m, entry in enumerate(entries)]
        models = models or len(row)
        if len(row) != models or models < 2:
            raise ValueError(f"terms[{t}]: expected one entry for each of {max(models, 2)} models, got {len(row)}")
        _share_merged_widths(row, t)
        columns = _columns(row[0])
        for m, table in enumerate(row):
            tensor = table[0]
            units = _product(tensor, table[1])
            width, device = width or units, device or tensor.device
            if units != width:
                raise ValueError(
                    f"terms[{t}][{m}]: expected {width} units, got {units} from shape {tuple(tensor.shape)}"
                )
            if _columns(table) != columns:
                raise ValueError(
                    f"terms[{t}][{m}]: expected {columns} columns as model 0 has, got {_columns(table)} "
                    f"from shape {tuple(tensor.shape)}"
                )
            if tensor.device != device:
                raise ValueError(f"terms[{t}][{m}]: expected a tensor on {device}, got one on {tensor.device}")
        tables.append(row)
    if device is None or width == 0:
        raise ValueError("terms: expected at least one unit, got none")
    return tables, width, device


def _product(tensor: Tensor, dims: tuple[int, ...]) -> int:
    size = 1
    for d in dims:
        size *= tensor.shape[d]
    return size


def _columns(table: Table) -> int:
    tensor, rows, labelled = table
    columns = tensor.numel() // max(_product(tensor, rows), 1)
    for dims, _, size, _ in labelled:
        columns = columns // max(_product(tensor, dims), 1) * size
    return columns


def _dims(key: Dims, ndim: int, name: str) -> tuple[int, ...]:
    dims = tuple([check_dim(name, d) for d in (key if isinstance(key, tuple) else (key,))])
    for d in dims:
        if not -ndim <= d < ndim:
            raise ValueError(f"{name}: expected dims of a {ndim}-d tensor, got {key}")
    return tuple([d % ndim for d in dims])


def _table(entry: Entry, name: str) -> Table:
    term = Term(entry, 0) if isinstance(entry, Tensor) else entry
    tensor = getattr(term, "tensor", None)
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor or a Term, got {type(entry).__name__}")
    if not tensor.is_floating_point() or tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense floating tensor, got {tensor.dtype}, {tensor.layout}")
    ndim = tensor.dim()
    if term is not entry and ndim not in (1, 2):
        raise ValueError(f"{name}: expected a (width, columns) matrix, got shape {tuple(tensor.shape)}; use Term")
    rows = _dims(term.dim, ndim, f"{name}.dim")
    if not rows:
        raise ValueError(f"{name}.dim: expected at least one dim, got none")
    if term.labels is not None and not isinstance(term.labels, Mapping):
        raise TypeError(f"{name}.labels: expected a mapping from dims to labels, got {type(term.labels).__name__}")
    labelled = _labelled(term, tensor, name) if term.labels or term.scale is not None else []
    used = [*rows, *(d for axes in labelled for d in axes[0])]
    if len(set(used)) != len(used):
        raise ValueError(f"{name}: a dim is named twice among rows {rows} and labels {[axes[0] for axes in labelled]}")
    tensor = tensor.detach().resolve_neg()
    return tensor if tensor.dtype in _FLOATS else tensor.float(), rows, labelled


def _labelled(term: Term, tensor: Tensor, name: str) -> list[Labelled]:
    """The labelled axes of one term; the merged width is that of this model alone."""
    ndim = tensor.dim()
    keys = {_dims(key, ndim, f"{name}.labels"): labels for key, labels in (term.labels or {}).items()}
    scales: dict[tuple[int, ...], Tensor] = {}
    if isinstance(term.scale, Tensor):
        if len(keys) != 1:
            raise ValueError(f"{name}.scale: a bare tensor needs exactly one labelled dim, got {len(keys)}")
        scales = dict.fromkeys(keys, term.scale)
    elif isinstance(term.scale, Mapping):
        scales = {_dims(key, ndim, f"{name}.scale"): scale for key, scale in term.scale.items()}
        if not scales.keys() <= keys.keys():
            raise ValueError(f"{name}.scale: expected keys of labels {list(keys)}, got {list(scales)}")
    elif term.scale is not None:
        raise TypeError(f"{name}.scale: expected a tensor or a mapping of them, got {type(term.scale).__name__}")
    made = []
    for dims, labels in keys.items():
        if not isinstance(labels, Tensor) or labels.dtype not in (torch.int64, torch.int32):
            got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(f"{name}.labels: expected an int64 tensor, got {got}")
        expected = _product(tensor, dims)
        if labels.shape != (expected,):
            raise ValueError(f"{name}.labels: expected shape ({expected},), got {tuple(labels.shape)}")
        labels = labels.detach().to("cpu", torch.int64).contiguous()
        size = 0
        if expected:
            least, most = labels.aminmax()
            size = int(most) + 1
            if int(least) < 0:
                raise ValueError(f"{name}.labels: expected labels of at least 0, got {int(least)}")
        scale = scales.get(dims)
        if scale is not None:
            if not isinstance(scale, Tensor) or scale.is_complex():
                got = scale.dtype if isinstance(scale, Tensor) else type(scale).__name__
                raise TypeError(f"{name}.scale: expected a real tensor, got {got}")
            if scale.dim() != 1 or scale.numel() < size:
                raise ValueError(f"{name}.scale: expected shape ({size},) or longer, got {tuple(scale.shape)}")
            scale = scale.detach().to("cpu", torch.float64).contiguous()
            size = scale.numel()
        made.append((dims, labels, size, scale))
    return made


def _share_merged_widths(row: list[Table], t: int) -> None:
    """A merged unit that one model lacks is still a column of it: the widths of an axis become the largest."""
    if not any(labelled for _, _, labelled in row):
        return
    sizes: dict[tuple[int, ...], int] = {}
    for _, _, labelled in row:
        for dims, _, size, _ in labelled:
            sizes[dims] = max(size, sizes.get(dims, 0))
    for _, _, labelled in row:
        own = {axes[0]: axes for axes in labelled}
        if own.keys() != sizes.keys():
            raise ValueError(
                f"terms[{t}]: expected labels for the same dims in every model, got {list(own)} of {list(sizes)}"
            )
        labelled.clear()
        for dims, size in sizes.items():
            _, labels, _, scale = own[dims]
            if scale is not None and scale.numel() < size:
                scale = torch.cat((scale, scale.new_ones(size - scale.numel())))
            labelled.append((dims, labels, size, scale))
