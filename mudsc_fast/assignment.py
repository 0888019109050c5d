"""Linear assignment, plain and blockwise: exact, with dual variables in and out and a proof of every result."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from mudsc_fast import backends
from mudsc_fast.backends.cpu import assign_lone
from mudsc_fast.scalars import integer

# A float64 matrix whose duals leave the range of float64 is solved again with all entries times this.
_DOWN = 2.0**-200


@dataclass(frozen=True, eq=False)
class Assignment:
    """A best one-to-one match of rows to columns; every tensor begins with the batch dims of the similarity.

    Attributes:
        indices: (n,), int64: row i takes column indices[i].
        value: 0-dim, float64: mean of the entries taken; 0 for an empty matrix.
        duals: (u, v), (n,) float64 each, with u_i + v_j >= s_ij up to float64 rounding. Blockwise: those of the
            assignment between the blocks.
        gap: 0-dim, float64: sum(u) + sum(v) - sum of the entries taken, which bounds the distance to the optimum.
        block_indices: (blocks,), int64, or None: block b of the rows takes block block_indices[b] of the columns.
    """

    indices: Tensor
    value: Tensor
    duals: tuple[Tensor, Tensor]
    gap: Tensor
    block_indices: Tensor | None = None


class _Lazily:
    """An attribute of a small problem's result, which is solved in less time than its tensors take to make.

    Instances made in the usual way keep theirs in ``__dict__``, which comes first.
    """

    def __init__(self, name: str, make: Callable[[bytearray], Tensor | tuple[Tensor, ...]]) -> None:
        self._name, self._make = name, make

    def __get__(self, found: Assignment | None, _owner: type) -> Any:
        if found is None:
            return self
        packed = found.__dict__["_packed"]
        made = found.__dict__[self._name] = self._make(packed)
        return made


def _of_packed(name: str, make: Callable[[bytearray], Tensor | tuple[Tensor, ...]]) -> None:
    setattr(Assignment, name, _Lazily(name, make))


def _duals(packed: bytearray) -> tuple[Tensor, ...]:
    return torch.frombuffer(packed, dtype=torch.float64, offset=16).view(2, -1).unbind()


# As assign_lone packs them.
_of_packed("value", lambda packed: torch.frombuffer(packed, dtype=torch.float64, count=1)[0])
_of_packed("gap", lambda packed: torch.frombuffer(packed, dtype=torch.float64, count=1, offset=8)[0])
_of_packed("duals", _duals)


def assign(similarity: Tensor, duals: tuple[Tensor, Tensor] | None = None, backend: str = "auto") -> Assignment:
    """Find the one-to-one match of rows to columns with the largest sum.

    Args:
        similarity: (n, n) or (..., n, n), floating, CPU or CUDA, any strides; float32 and float64 are read in place.
            A tensor that requires grad is detached. Among equal optima any may be returned, always the same one.
        duals: (u, v) of an :class:`Assignment` of the same shape, finite: where the search starts. Duals of a slightly
            different similarity save most of the work; any others cost time but do not change the value.

    Returns:
        An :class:`Assignment` on the similarity's device. The result is proven: gap is at most 1e-6 of the sum of the
        magnitudes taken (plus 1e-13 of the sum of the duals' magnitudes, where entries cancel or vanish).

    Raises:
        TypeError: not a tensor, not floating.
        ValueError: not square; NaN or infinity in similarity or duals; duals of another shape.
        RuntimeError: no proof within that tolerance.

    Source: docs/method.md rule 4.
    """
    if duals is None and backend == "auto":
        found = assign_lone(similarity, Assignment)
        if found is not None:
            return found
    matrix = _checked_similarity(similarity)
    n = matrix.shape[-1]
    batch = matrix.shape[:-2]
    problems = math.prod(batch)
    if matrix.dim() > 4 or (matrix.dim() == 4 and backend != "auto"):
        matrix = matrix.reshape(problems, n, n)
    start = None if duals is None else _checked_duals(duals, batch, n)
    indices = torch.empty(problems * n, dtype=torch.int64, device=matrix.device)
    out = torch.empty(problems * (2 * n + 2), dtype=torch.float64, device=matrix.device)
    solve = _solver(matrix.device, backend, n)
    scale = 1.0
    try:
        solve(matrix, start, indices, out)
    except RuntimeError:
        if matrix.dtype != torch.float64:
            raise
        scale = _DOWN
        solve(matrix * scale, None, indices, out)
    if n == 0:
        out.zero_()
    value, gap, u, v = torch.split_with_sizes(out, (problems, problems, problems * n, problems * n))
    if scale != 1.0:
        out /= scale
    if not batch:
        result = indices, value[0], (u, v), gap[0]
    else:
        shape = (*batch, n)
        result = indices.view(shape), value.view(batch), (u.view(shape), v.view(shape)), gap.view(batch)
    if matrix.device.type == "cpu":
        return Assignment(*result)
    return _moved(Assignment(*result), matrix.device)


_solvers: dict[tuple[str, str, bool], Callable[[Tensor, Tensor | None, Tensor, Tensor], None]] = {}


def _solver(device: torch.device, backend: str, n: int) -> Callable[[Tensor, Tensor | None, Tensor, Tensor], None]:
    """The backend's function, remembered: small problems take less time than finding it."""
    key = device.type, backend, n <= backends.SMALL_ASSIGN
    if key not in _solvers:
        op = "assign_small" if key[2] else "assign"
        _solvers[key] = backends.pick(op, device, backend).module.assign
    return _solvers[key]


@overload
def assign_blocks(similarity: Tensor, blocks: int, within: str = "free", backend: str = "auto") -> Assignment: ...


@overload
def assign_blocks(
    similarity: Sequence[Tensor], blocks: int, within: str | Sequence[str] = "free", backend: str = "auto"
) -> list[Assignment]: ...


def assign_blocks(
    similarity: Tensor | Sequence[Tensor], blocks: int, within: str | Sequence[str] = "free", backend: str = "auto"
) -> Assignment | list[Assignment]:
    """Match blocks as wholes, and units inside matched blocks.

    Args:
        similarity: (n, n) or (..., n, n), floating, CPU or CUDA, any strides, not copied; or a sequence of such, one a
            tied space, whose n may differ: one block match for all, by the sum of their scores of each pair of blocks.
            The score of a pair is the mean of its own best assignment.
        blocks: number of blocks; unit = block * (n / blocks) + inner.
        within: "free", or "fixed" where units keep their place inside the block; one for all, or one a tied space.

    Returns:
        An :class:`Assignment` with block_indices, or a list of them for a sequence. Its duals and gap are those of the
        assignment between the blocks, (blocks,) each.

    Raises:
        TypeError: not a tensor, not floating.
        ValueError: not square; NaN or infinity; blocks that do not divide n; an unknown ``within``.

    Source: docs/method.md rule 6.
    """
    if isinstance(similarity, Tensor):
        if not isinstance(within, str):
            raise ValueError("within: expected one string for one similarity, got a sequence")
        return assign_blocks([similarity], blocks, [within], backend)[0]
    if not isinstance(similarity, Sequence):
        raise TypeError(f"similarity: expected a tensor or a sequence of them, got {type(similarity).__name__}")
    matrices = [_checked_similarity(s) for s in similarity]
    if not isinstance(within, Sequence):
        raise TypeError(f'within: expected "free" or "fixed", or one of them a tied space, got {within!r}')
    kinds = [within] * len(matrices) if isinstance(within, str) else list(within)
    blocks = _check_block_options(matrices, blocks, kinds)
    views = [_block_view(m, blocks) for m in matrices]
    matches = [_match_pairs(view, kind, backend) for view, kind in zip(views, kinds, strict=True)]
    total = torch.stack([scores.to(matrices[0].device) for _, scores in matches]).sum(dim=0)
    between = assign(total, backend=backend)
    return [_inside(matrix, inner, between, blocks) for matrix, (inner, _) in zip(matrices, matches, strict=True)]


def _block_view(matrix: Tensor, blocks: int) -> Tensor:
    """(..., n, n) as (..., blocks, blocks, n / blocks, n / blocks), in place."""
    inner = matrix.shape[-1] // blocks
    split = matrix.view(*matrix.shape[:-2], blocks, inner, blocks, inner)
    return split.transpose(-3, -2)


def _match_pairs(view: Tensor, within: str, backend: str) -> tuple[Tensor | None, Tensor]:
    """Inner match (..., blocks, blocks, inner), or None where units keep their place, and score of each block pair."""
    if within == "fixed":
        if not bool(torch.isfinite(view).all()):
            raise ValueError("similarity: expected finite values, got NaN or infinity")
        kept = view.diagonal(dim1=-2, dim2=-1)
        scores = kept.mean(dim=-1, dtype=torch.float64) if kept.shape[-1] else kept.new_zeros(kept.shape[:-1]).double()
        return None, scores
    if view.dim() == 4:
        found = assign(view, backend=backend)
        return found.indices, found.value
    parts = [_match_pairs(v, within, backend) for v in view]
    if not parts:
        return view.new_zeros(view.shape[:-1], dtype=torch.int64), view.new_zeros(view.shape[:-2], dtype=torch.float64)
    return torch.stack([p[0] for p in parts if p[0] is not None]), torch.stack([p[1] for p in parts])


def match_block_rows(
    tile: Callable[[Tensor], Tensor], width: int, blocks: int, within: str, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """What ``assign_blocks`` finds inside each pair of blocks, from a source that makes some rows at a time.

    Args:
        tile: gives rows, (r,) int64, of the (width, width) similarity.
        width, blocks, within, backend: as in ``assign_blocks``.

    Returns:
        The match inside each pair, (blocks, blocks, width / blocks) int64, and its score, (blocks, blocks), on the CPU.

    Source: docs/method.md rule 6.
    """
    inner = width // blocks
    order = torch.arange(inner)
    found = order.repeat(blocks, blocks, 1)
    scores = torch.empty(blocks, blocks, dtype=torch.float64)
    for block in range(blocks):
        view = tile(block * inner + order).view(inner, blocks, inner).transpose(0, 1)[None]
        indices, values = _match_pairs(view, within, backend)
        scores[block] = values[0]
        if indices is not None:
            found[block] = indices[0]
    return found, scores


def _inside(matrix: Tensor, inner: Tensor | None, between: Assignment, blocks: int) -> Assignment:
    """The unit-level match that a block match and the matches inside block pairs make."""
    n = matrix.shape[-1]
    batch = matrix.shape[:-2]
    pairing = between.indices.to(matrix.device)
    if inner is None:
        offset = torch.arange(n // blocks, device=matrix.device).expand(*batch, blocks, n // blocks)
    else:
        chosen = pairing[..., None, None].expand(*batch, blocks, 1, n // blocks)
        offset = inner.gather(-2, chosen).squeeze(-2)
    indices = (pairing[..., None] * (n // blocks) + offset).reshape(*batch, n)
    taken = matrix.gather(-1, indices[..., None]).squeeze(-1)
    value = taken.mean(dim=-1, dtype=torch.float64) if n else torch.zeros(batch, dtype=torch.float64)
    moved = _moved(between, matrix.device)
    return Assignment(indices, value.to(matrix.device), moved.duals, moved.gap, pairing)


def _moved(result: Assignment, device: torch.device) -> Assignment:
    u, v = result.duals
    return Assignment(
        result.indices.to(device), result.value.to(device), (u.to(device), v.to(device)), result.gap.to(device)
    )


def _checked_similarity(similarity: Tensor) -> Tensor:
    if not isinstance(similarity, Tensor):
        raise TypeError(f"similarity: expected a torch.Tensor, got {type(similarity).__name__}")
    shape = similarity.shape
    if len(shape) < 2 or shape[-1] != shape[-2]:
        rows_differ = len(shape) >= 2 and shape[-1] != shape[-2]
        hint = "; pad a rectangular problem with entries below all others" if rows_differ else ""
        raise ValueError(f"similarity: expected a square matrix, got shape {tuple(shape)}{hint}")
    dtype = similarity.dtype
    if not dtype.is_floating_point or similarity.layout != torch.strided:
        raise TypeError(f"similarity: expected a dense tensor of a floating dtype, got {dtype}, {similarity.layout}")
    if similarity.requires_grad:
        similarity = similarity.detach()
    return similarity if dtype in (torch.float32, torch.float64) else similarity.to(torch.float32)


def _checked_duals(duals: tuple[Tensor, Tensor], batch: torch.Size, n: int) -> Tensor:
    """One vector: u and v of the first problem, then of the next."""
    if not isinstance(duals, (tuple, list)) or len(duals) != 2 or not all(isinstance(d, Tensor) for d in duals):
        raise TypeError("duals: expected a pair of tensors (u, v), as in Assignment.duals")
    for name, dual in zip("uv", duals, strict=True):
        if dual.shape != (*batch, n):
            raise ValueError(f"duals: expected {name} of shape {(*batch, n)}, got {tuple(dual.shape)}")
        if not dual.is_floating_point():
            raise TypeError(f"duals: expected a floating dtype, got {dual.dtype}")
    start = torch.stack([d.detach().to("cpu", torch.float64) for d in duals], dim=-2)
    if not bool(torch.isfinite(start).all()):
        raise ValueError("duals: expected finite values, got NaN or infinity")
    return start.reshape(-1)


def _check_block_options(matrices: list[Tensor], blocks: int, kinds: list[str]) -> int:
    count = integer(blocks)
    if not matrices or len(kinds) != len(matrices):
        raise ValueError(f"within: expected one a similarity ({len(matrices)}), got {len(kinds)}")
    for kind in kinds:
        if kind not in ("free", "fixed"):
            raise ValueError(f'within: expected "free" or "fixed", got {kind!r}')
    for matrix in matrices:
        n = matrix.shape[-1]
        if count is None or count < 1 or n % count:
            raise ValueError(f"blocks: expected a divisor of {n} units, got {blocks!r}")
        if matrix.shape[:-2] != matrices[0].shape[:-2]:
            raise ValueError(
                f"similarity: expected one batch shape for all tied spaces, got {tuple(matrices[0].shape[:-2])} "
                f"and {tuple(matrix.shape[:-2])}"
            )
    return int(blocks)
