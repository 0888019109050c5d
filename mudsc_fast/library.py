"""The ops as ``torch.ops.mudsc_fast.*``, with shapes known without running them, so that they can sit in compiled
graphs.

Importing this module registers them. Each takes and returns tensors and numbers only, has a fake kernel, and runs
wherever its public function does. ``covariance_update`` never waits for the device, so that it can be captured in a
CUDA graph; the others read a status or index vectors on the host, and ``torch.compile`` keeps them outside of its
graphs. None has a gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mudsc_fast import assignment, backends, regrouping, similarity, zipping

# torch.compile leaves ops with this tag out of CUDA graphs; versions of torch that lack it let them fail there.
_TAKES_TAGS = "tags" in inspect.signature(torch.library.custom_op).parameters
_UNSAFE = getattr(torch.Tag, "cudagraph_unsafe", None) if _TAKES_TAGS else None


def _op(schema: str, fake: Callable[..., Any], writes: Sequence[str] = (), waits: bool = True) -> Callable[..., Any]:
    """Register a function as the op of its name, with what its results look like.

    writes: arguments that are changed. waits: it waits for the device, so that no CUDA graph can capture it.
    """
    tags = {"tags": (_UNSAFE,)} if waits and _UNSAFE is not None else {}

    def register(run: Callable[..., Any]) -> Any:
        name = f"mudsc_fast::{run.__name__}"
        made = torch.library.custom_op(name, run, mutates_args=tuple(writes), schema=schema, **tags)
        made.register_fake(fake)
        return made

    return register


# ---- what results look like; arguments that say nothing about that are left to `*_` ----


def _like_regroup(tensor: Tensor, labels: Tensor, dim: int, size: int, *_: object) -> Tensor:
    dim %= tensor.dim()
    return regrouping._empty_in_order_of(tensor, [*tensor.shape[:dim], size, *tensor.shape[dim + 1 :]])


def _like_assign(similarity: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, n = similarity.shape[:-2], similarity.shape[-1]
    value = similarity.new_empty(batch, dtype=torch.float64)
    dual = similarity.new_empty((*batch, n), dtype=torch.float64)
    indices = similarity.new_empty((*batch, n), dtype=torch.int64)
    return indices, value, dual, torch.empty_like(dual), torch.empty_like(value)


def _like_assign_blocks(similarity: Tensor, blocks: int, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    indices, value, *_rest = _like_assign(similarity)
    return indices, value, similarity.new_empty((*similarity.shape[:-2], blocks), dtype=torch.int64)


def _like_zip_units(similarity: Tensor, models: int, width: int, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    labels = similarity.new_empty((models, similarity.shape[0] // models), dtype=torch.int64)
    sizes = similarity.new_empty((width,), dtype=torch.int64)
    return labels, sizes, similarity.new_empty((), dtype=torch.float64)


def _like_dual_similarity(
    weights: Sequence[Tensor],
    dims: Sequence[int],
    models: int,
    active: Tensor | None = None,
    balance: float = 1.0,
    scope: str = "cross",
) -> Tensor:
    width = weights[0].shape[dims[0]]
    wide = any(tensor.dtype == torch.float64 for tensor in weights)
    dtype = torch.float64 if wide else torch.float32
    dtype = dtype if active is None else torch.promote_types(dtype, active.dtype)
    shape = (models - 1, width, width) if scope == "cross" else (models * width, models * width)
    return weights[0].new_empty(shape, dtype=dtype)


def _like_covariance_update(
    gram: Tensor, vectors: Tensor, features: Sequence[Tensor], dim: int = -1, planes: int = 3
) -> None:
    _checked_sums(gram, vectors, features, dim, planes)


# ---- the ops ----


@_op(
    "(Tensor tensor, Tensor labels, int dim, int size, Tensor? scale=None) -> Tensor",
    _like_regroup,
)
def regroup(tensor: Tensor, labels: Tensor, dim: int, size: int, scale: Tensor | None = None) -> Tensor:
    """``mudsc_fast.regroup`` into a new tensor."""
    return regrouping.regroup(tensor, labels, dim, size, scale)


@_op(
    "(Tensor similarity, Tensor? u=None, Tensor? v=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _like_assign,
)
def assign(
    similarity: Tensor, u: Tensor | None = None, v: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``mudsc_fast.assign``: indices, value, u, v, gap; u and v given: where the search starts."""
    found = assignment.assign(similarity, None if u is None or v is None else (u, v))
    indices, value, gap = found.indices.clone(), found.value.clone(), found.gap.clone()
    return indices, value, found.duals[0].clone(), found.duals[1].clone(), gap


@_op(
    '(Tensor similarity, int blocks, str within="free") -> (Tensor, Tensor, Tensor)',
    _like_assign_blocks,
)
def assign_blocks(similarity: Tensor, blocks: int, within: str = "free") -> tuple[Tensor, Tensor, Tensor]:
    """``mudsc_fast.assign_blocks``: indices, value, block indices."""
    found = assignment.assign_blocks(similarity, blocks, within)
    if found.block_indices is None:
        raise RuntimeError("assign_blocks: found no match of blocks")
    return found.indices.clone(), found.value.clone(), found.block_indices.clone()


@_op(
    "(Tensor similarity, int models, int width, float attenuation=0.5, float budget=1.0, int blocks=1, "
    "Tensor? block_indices=None) -> (Tensor, Tensor, Tensor)",
    _like_zip_units,
)
def zip_units(
    similarity: Tensor,
    models: int,
    width: int,
    attenuation: float = 0.5,
    budget: float = 1.0,
    blocks: int = 1,
    block_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``mudsc_fast.zip_units``: labels, sizes, value."""
    found = zipping.zip_units(similarity, models, width, attenuation, budget, blocks, block_indices)
    return found.labels, found.sizes, found.value


@_op(
    '(Tensor[] weights, int[] dims, int models, Tensor? active=None, float balance=1.0, str scope="cross") -> Tensor',
    _like_dual_similarity,
)
def dual_similarity(
    weights: Sequence[Tensor],
    dims: Sequence[int],
    models: int,
    active: Tensor | None = None,
    balance: float = 1.0,
    scope: str = "cross",
) -> Tensor:
    """``mudsc_fast.dual_similarity`` of plain tensors.

    Args:
        weights: a tensor a model of the first term, then of the second, and so on.
        dims: the unit axis of each term.
        models: number of models.
        active: correlations by activations in the scope's shape, or None.
        balance: share of the weights.
        scope: "cross" or "full".
    """
    terms = [
        [similarity.Term(tensor, dim) for tensor in weights[k * models : (k + 1) * models]]
        for k, dim in enumerate(dims)
    ]
    found = similarity.weight_similarity(terms, scope)
    if active is None:
        return found
    dtype = torch.promote_types(found.dtype, active.dtype)
    return found.to(dtype).mul_(balance).add_(active, alpha=1.0 - balance)


@_op(
    "(Tensor(a!) gram, Tensor(b!) vectors, Tensor[] features, int dim=-1, int planes=3) -> ()",
    _like_covariance_update,
    ("gram", "vectors"),
    waits=False,
)
def covariance_update(
    gram: Tensor, vectors: Tensor, features: Sequence[Tensor], dim: int = -1, planes: int = 3
) -> None:
    """Add a batch to the sums of a covariance, in place.

    Args:
        gram: float32, columns adjacent: (units, units) for all pairs of models, of which what lies on and above the
            diagonal is kept up, or (width, units - width) for model 0 with the others.
        vectors: (4, units), float64: shift, scale (powers of two), and the sums of y and of its squares, y = (x -
            shift) * scale.
        features: one tensor a model, as for ``Covariance.update``; samples are the caller's to count.
        dim: the unit axis.
        planes: on CUDA, how many planes of bfloat16 stand for y: 3 for float32, 2 for 16-bit features, 1 for 16-bit
            features of one dtype, finite, with shift 0 and scale 1, that are multiplied as they are. Elsewhere products
            are float32.

    Raises:
        ValueError: shapes or planes that do not fit.
    """
    width, models, cross = _checked_sums(gram, vectors, features, dim, planes)
    if gram.device.type == "cuda":
        backends.pick("covariance", gram.device, "triton").module.add_to(
            gram, vectors, list(features), dim, planes, width, models, cross
        )
        return
    columns = [x.movedim(dim, -1).reshape(-1, width).float() for x in features]
    x = torch.cat(columns, dim=1).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    y = (x - vectors[0].float()) * vectors[1].float()
    vectors[2] += y.sum(dim=0, dtype=torch.float64)
    vectors[3] += y.double().square().sum(dim=0)
    rows, others = (y[:, :width], y[:, width:]) if cross else (y, y)
    gram.addmm_(rows.T, others)


def _checked_sums(
    gram: Tensor, vectors: Tensor, features: Sequence[Tensor], dim: int, planes: int
) -> tuple[int, int, bool]:
    """Width, models, and whether only model 0's pairs are kept."""
    if len(features) < 2:
        raise ValueError(f"features: expected one tensor a model, two or more, got {len(features)}")
    width, models = features[0].shape[dim], len(features)
    units = width * models
    cross = gram.shape[0] != units
    if tuple(gram.shape) != ((width, units - width) if cross else (units, units)) or gram.dtype != torch.float32:
        raise ValueError(
            f"gram: expected float32 sums of {models} x {width} units, got {tuple(gram.shape)}, {gram.dtype}"
        )
    if tuple(vectors.shape) != (4, units) or vectors.dtype != torch.float64:
        raise ValueError(
            f"vectors: expected float64 of shape {(4, units)}, got {tuple(vectors.shape)}, {vectors.dtype}"
        )
    for name, tensor in (("vectors", vectors), *((f"features[{m}]", x) for m, x in enumerate(features))):
        if tensor.device != gram.device:
            raise ValueError(f"{name}: expected a tensor on {gram.device} as gram is, got one on {tensor.device}")
    if planes not in (1, 2, 3):
        raise ValueError(f"planes: expected 1, 2 or 3, got {planes}")
    return width, models, cross
