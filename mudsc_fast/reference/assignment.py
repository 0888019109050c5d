"""Linear assignment by shortest augmenting paths, plain and blockwise (docs/method.md rules 4 and 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Assignment:
    """A best one-to-one match; all tensors have a leading batch dim where the similarity had one.

    indices: (n,), int64: row i takes column indices[i].
    value: 0-dim, float64: mean of the entries taken.
    duals: (u, v), (n,) float64 each, u_i + v_j >= s_ij. Blockwise: of the assignment between the blocks.
    gap: 0-dim, float64: sum(u) + sum(v) - sum of the entries taken; 0 up to rounding.
    block_indices: (blocks,), int64, or None: block b of the rows takes block block_indices[b] of the columns.
    """

    indices: Tensor
    value: Tensor
    duals: tuple[Tensor, Tensor]
    gap: Tensor
    block_indices: Tensor | None = None


def _solve(similarity: Floats, v_start: Floats | None = None) -> tuple[Ints, Floats, Floats]:
    """Maximise one (n, n) matrix; return (column of each row, u, v).

    Works on cost = -similarity with potentials u_i + v_j <= cost_ij, tight on every pair taken. Rows enter one at a
    time; each is joined to a free column by the shortest path in reduced costs, found as Dijkstra does.
    """
    cost = -similarity
    n = cost.shape[0]
    u = np.zeros(n)
    v = np.zeros(n) if v_start is None else v_start.copy()
    column_of = np.full(n, -1, dtype=np.int64)
    row_of = np.full(n, -1, dtype=np.int64)
    for start in range(n):
        distance = cost[start] - v
        previous = np.full(n, start, dtype=np.int64)
        done = np.zeros(n, dtype=bool)
        while True:
            end = int(np.argmin(np.where(done, np.inf, distance)))
            shortest = distance[end]
            done[end] = True
            row = int(row_of[end])
            if row < 0:
                break
            through = shortest + (cost[row] - u[row] - v)
            closer = ~done & (through < distance)
            distance[closer] = through[closer]
            previous[closer] = row
        # Keeps every path edge tight and every other reduced cost non-negative.
        slack = np.where(done, shortest - distance, 0.0)
        matched = done & (row_of >= 0)
        u[row_of[matched]] += slack[matched]
        v -= slack
        u[start] = shortest
        while True:
            row = int(previous[end])
            row_of[end] = row
            end, column_of[row] = int(column_of[row]), end
            if row == start:
                break
    return column_of, -u, -v


def _array(similarity: Tensor) -> Floats:
    if similarity.ndim not in (2, 3) or similarity.shape[-1] != similarity.shape[-2]:
        raise ValueError(f"similarity: expected a square matrix, got shape {tuple(similarity.shape)}")
    if not similarity.is_floating_point():
        raise TypeError(f"similarity: expected a floating dtype, got {similarity.dtype}")
    array: Floats = similarity.detach().to("cpu", torch.float64).numpy()
    if not np.isfinite(array).all():
        raise ValueError("similarity: expected finite entries, got NaN or inf")
    return array


def _taken(array: Floats, indices: Ints) -> Floats:
    taken: Floats = array[np.arange(len(indices)), indices]
    return taken


def _mean(values: Floats) -> float:
    return float(values.mean()) if values.size else 0.0


def _result(array: Floats, indices: Ints, u: Floats, v: Floats, device: torch.device) -> Assignment:
    taken = _taken(array, indices)
    return Assignment(
        indices=torch.from_numpy(indices).to(device),
        value=torch.tensor(_mean(taken), dtype=torch.float64, device=device),
        duals=(torch.from_numpy(u).to(device), torch.from_numpy(v).to(device)),
        gap=torch.tensor(float(u.sum() + v.sum() - taken.sum()), dtype=torch.float64, device=device),
    )


def _stack(parts: Sequence[Assignment]) -> Assignment:
    blocks = [part.block_indices for part in parts]
    return Assignment(
        indices=torch.stack([part.indices for part in parts]),
        value=torch.stack([part.value for part in parts]),
        duals=(torch.stack([part.duals[0] for part in parts]), torch.stack([part.duals[1] for part in parts])),
        gap=torch.stack([part.gap for part in parts]),
        block_indices=None if blocks[0] is None else torch.stack([b for b in blocks if b is not None]),
    )


def assign(similarity: Tensor, duals: tuple[Tensor, Tensor] | None = None) -> Assignment:
    """Find the one-to-one match of rows to columns with the largest sum.

    Args:
        similarity: (n, n) or (batch, n, n), floating. Among equal optima any may be returned.
        duals: (u, v) of an earlier Assignment; its v starts the search, which changes no value.

    Returns:
        Assignment, on similarity's device.

    Raises:
        ValueError: not square, NaN or inf.
        TypeError: not floating.

    Source: docs/method.md rule 4.
    """
    array = _array(similarity)
    if similarity.ndim == 3:
        starts = [None] * len(array) if duals is None else list(zip(duals[0], duals[1], strict=True))
        if not starts:
            raise ValueError("similarity: expected at least one matrix in the batch, got none")
        return _stack([assign(s, start) for s, start in zip(similarity, starts, strict=True)])
    v_start = None if duals is None else -duals[1].detach().to("cpu", torch.float64).numpy()
    if v_start is not None and v_start.shape != (array.shape[0],):
        raise ValueError(f"duals: expected vectors of {array.shape[0]}, got {v_start.shape}")
    return _result(array, *_solve(array, v_start), similarity.device)


def _block_scores(array: Floats, blocks: int, within: str) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Match every pair of blocks on its own; return the mean of each pair and its inner match."""
    inner = array.shape[0] // blocks
    scores = np.zeros((blocks, blocks))
    matches = np.zeros((blocks, blocks, inner), dtype=np.int64)
    for a in range(blocks):
        for b in range(blocks):
            pair = array[a * inner : (a + 1) * inner, b * inner : (b + 1) * inner]
            matches[a, b] = np.arange(inner) if within == "fixed" else _solve(pair)[0]
            scores[a, b] = _mean(_taken(pair, matches[a, b]))
    return scores, matches


@overload
def assign_blocks(similarity: Tensor, blocks: int, within: str = "free") -> Assignment: ...


@overload
def assign_blocks(
    similarity: Sequence[Tensor], blocks: int, within: str | Sequence[str] = "free"
) -> list[Assignment]: ...


def assign_blocks(
    similarity: Tensor | Sequence[Tensor], blocks: int, within: str | Sequence[str] = "free"
) -> Assignment | list[Assignment]:
    """Match blocks as wholes, and units inside matched blocks.

    Args:
        similarity: (n, n) or (batch, n, n), floating; or a sequence of such, one a tied space, whose inner widths may
            differ: one block match for all, by the sum of their pair scores.
        blocks: number of blocks; unit = block * (n / blocks) + inner.
        within: "free", or "fixed" where units keep their place inside the block; one, or one a tied space.

    Returns:
        Assignment with block_indices, or a list of them for a sequence. duals and gap are those of the assignment
        between the blocks, whose score of a pair is the mean of the pair's own assignment, added over the tie.

    Raises:
        ValueError: not square, NaN or inf, or blocks that do not divide n.

    Source: docs/method.md rule 6.
    """
    if isinstance(similarity, Tensor):
        if not isinstance(within, str):
            raise ValueError("within: expected one string for one similarity")
        return assign_blocks([similarity], blocks, [within])[0]
    kinds = [within] * len(similarity) if isinstance(within, str) else list(within)
    if not similarity or len(kinds) != len(similarity):
        raise ValueError(f"within: expected one a similarity ({len(similarity)}), got {len(kinds)}")
    for kind in kinds:
        if kind not in ("free", "fixed"):
            raise ValueError(f'within: expected "free" or "fixed", got {kind!r}')
    arrays = [_array(s) for s in similarity]
    if arrays[0].ndim == 3:
        batches = {len(array) for array in arrays}
        if len(batches) != 1 or 0 in batches:
            raise ValueError(f"similarity: expected one batch size above 0, got {sorted(batches)}")
        each = [assign_blocks([s[k] for s in similarity], blocks, kinds) for k in range(len(arrays[0]))]
        return [_stack([parts[t] for parts in each]) for t in range(len(arrays))]
    for array in arrays:
        if blocks < 1 or array.shape[0] % blocks:
            raise ValueError(f"blocks: expected a divisor of {array.shape[0]} units, got {blocks}")
    found = [_block_scores(array, blocks, kind) for array, kind in zip(arrays, kinds, strict=True)]
    total = np.sum([scores for scores, _ in found], axis=0)
    block_of, u, v = _solve(total)
    results = []
    for source, array, (_, matches) in zip(similarity, arrays, found, strict=True):
        inner = array.shape[0] // blocks
        indices = np.concatenate([block_of[a] * inner + matches[a, block_of[a]] for a in range(blocks)])
        between = _result(total, block_of, u, v, source.device)
        results.append(
            Assignment(
                indices=torch.from_numpy(indices).to(source.device),
                value=torch.tensor(_mean(_taken(array, indices)), dtype=torch.float64, device=source.device),
                duals=between.duals,
                gap=between.gap,
                block_indices=between.indices,
            )
        )
    return results
