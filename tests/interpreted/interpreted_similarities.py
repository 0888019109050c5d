"""Similarities in Triton's interpreter: by weights of any layout, blended, in pieces, and what keeps less than all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from interpreted_setup import (
    BLENDED,
    CPU,
    DTYPES,
    LISTED,
    SMALL,
    Case,
    Error,
    cut_as,
    distance,
    few_columns,
    matrices,
)
from torch import Tensor

import mudsc_fast as mf
from mudsc_fast.backends.triton import similarity_tiles
from mudsc_fast.similarity import checked_tables


def similarity_error(
    terms: list[list[Any]],
    scope: str = "cross",
    activation: list[Tensor] | None = None,
    balance: float = 1.0,
    kept: str = "full",
) -> float:
    """Error of a similarity under the configuration in force."""

    def theirs(entry: Any) -> Any:
        if isinstance(entry, Tensor):
            return entry
        return mf.reference.Term(entry.tensor, entry.dim, entry.labels, entry.scale)

    other = [[theirs(entry) for entry in row] for row in terms]
    if activation is None:
        found = mf.weight_similarity(terms, scope, backend="triton")
        return distance(found, mf.reference.weight_similarity(other, scope))
    models, width = len(activation), activation[0].shape[1]
    seen = mf.Covariance(width, models, kept, backend="triton")
    truth = mf.reference.Covariance(width, models, kept)
    seen.update(activation)
    truth.update(activation)
    found = mf.dual_similarity(terms, seen, balance, scope, backend="triton")
    if scope == "full" and not torch.equal(found, found.T):
        return float("inf")
    return distance(found, mf.reference.dual_similarity(other, truth, balance, scope))


def _weights(width: int, columns: int, dtype: str, scope: str, models: int = 2) -> Error:
    def error(seed: int) -> float:
        with cut_as(SMALL):
            return similarity_error([[w.to(DTYPES[dtype]) for w in matrices(width, columns, models, seed)]], scope)

    return error


def labelled_terms(seed: int) -> list[list[Any]]:
    """Terms whose other axes are in merged coordinates: permuted, zipped, scaled, by factors, and one that lacks a
    unit."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[list[Any]] = [[], [], [], []]
    scale = torch.rand(20, generator=generator) + 0.5
    for m in range(2):
        labels = torch.randint(0, 20 - m, (26,), generator=generator)
        linear = torch.randn(37, 26, generator=generator)
        rows[0].append(mf.Term(linear, 0, {1: torch.randperm(26, generator=generator)}))
        rows[1].append(mf.Term(torch.randn(26, 37, 3, generator=generator), 1, {0: labels}, scale))
        viewed = torch.randn(37, 2, 13, 5, generator=generator).bfloat16()
        rows[2].append(mf.Term(viewed, 0, {(1, 2): labels}))
        heads, inner = torch.tensor([0, 2, 1, 1]), torch.randint(0, 5, (6,), generator=generator)
        rows[3].append(mf.Term(torch.randn(37, 4, 6, generator=generator), 0, {1: heads, -1: inner}))
    return rows


def _labelled(seed: int) -> float:
    with cut_as(SMALL):
        return similarity_error(labelled_terms(seed))


def weight_layouts(dtype: torch.dtype, seed: int) -> dict[str, list[Any]]:
    """Ways in which a space's tensors lie in memory; 33 units each."""
    generator = torch.Generator().manual_seed(seed)

    def two(*shape: int) -> list[Tensor]:
        return [torch.randn(*shape, generator=generator).to(dtype) for _ in range(2)]

    return {
        "rows": list(two(33, 50)),
        "bias": list(two(33)),
        "in axis": [mf.Term(w, 1) for w in two(50, 33)],
        "conv out": [mf.Term(w, 0) for w in two(33, 6, 3, 3)],
        "conv in": [mf.Term(w, 1) for w in two(6, 33, 3, 3)],
        "channels last": [mf.Term(w.contiguous(memory_format=torch.channels_last), -3) for w in two(6, 33, 3, 3)],
        "fused": [mf.Term(w.view(3, 3, 11, 40)[1], (0, 1)) for w in two(99, 40)],
        "two row dims": [mf.Term(w, (2, 0)) for w in two(3, 40, 11)],
        "every second": [w[:, ::2] for w in two(33, 50)],
        "stride 0": [mf.Term(w[:, None].expand(33, 4, 20), 0) for w in two(33, 20)],
        "different strides": [two(33, 20)[0], two(20, 33)[0].T],
    }


def _weight_layouts(dtype: str) -> Error:
    def error(seed: int) -> float:
        with cut_as(SMALL):
            return similarity_error(list(weight_layouts(DTYPES[dtype], seed).values()), "cross")

    return error


def _blend(dtype: str, kept: str, scope: str, balance: float, pieces: bool = False) -> Error:
    def error(seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        seen = [torch.randn(60, 45, generator=generator) for _ in range(3)]
        seen[0][:, 2] = 5.0
        terms: list[list[Any]] = [
            [w.to(DTYPES[dtype]) for w in matrices(45, 150, 3, seed)],
            [w[:, 0].float() for w in seen_like(seed)],
        ]
        before = similarity_tiles.WORKSPACE
        try:
            similarity_tiles.WORKSPACE = 1 if pieces else before
            with cut_as(SMALL):
                return similarity_error(terms, scope, seen, balance, kept)
        finally:
            similarity_tiles.WORKSPACE = before

    return error


def seen_like(seed: int) -> list[Tensor]:
    """Biases of three models."""
    return matrices(45, 1, 3, seed)


def _kept_only(pieces: bool) -> Error:
    """Candidates, reduced costs and single rows of a similarity that is never whole, against the whole."""

    def error(seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        width, k = 75, 9
        seen = [torch.randn(60, width, generator=generator) for _ in range(2)]
        activation = mf.Covariance(width, 2, "cross", backend="triton")
        truth = mf.reference.Covariance(width, 2, "cross")
        activation.update(seen)
        truth.update(seen)
        terms = [[w.float() for w in matrices(width, 150, 2, seed)]]
        wanted = mf.reference.dual_similarity(terms, truth, 0.4, "cross")[0].float()
        u, v = torch.rand(width, generator=generator), torch.rand(width, generator=generator)
        before = similarity_tiles.WORKSPACE, similarity_tiles.STRIP
        try:
            similarity_tiles.WORKSPACE = 1 if pieces else before[0]
            similarity_tiles.STRIP = 32
            with cut_as(SMALL), few_columns():
                tiles = similarity_tiles.Similarities(checked_tables(terms)[0], width, 2, 0.4, activation, CPU)
                indices, values = tiles.candidates(k, v)
                best = tiles.largest(u, v)
                some = torch.tensor([70, 3, 3, 40, 33])
                rows = tiles.rows(some)
        finally:
            similarity_tiles.WORKSPACE, similarity_tiles.STRIP = before
        priced = wanted - v
        return max(
            distance(priced.gather(1, indices), priced.topk(k, dim=1).values),
            distance(values, wanted.gather(1, indices)),
            distance(best, (priced - u[:, None]).amax(dim=1)),
            distance(rows, wanted[some]),
        )

    return error


def cases() -> Iterator[Case]:
    """Every comparison of similarities."""
    for dtype in DTYPES:
        for width, columns in ((1, 40), (31, 32), (33, 65), (65, 31)):
            extra = dtype != "float32" and width != 33
            error = _weights(width, columns, dtype, "full", 3)
            yield Case(f"similarity, {dtype}, {width} x {columns}", BLENDED, error, extra=extra)
        half = dtype == "float16"
        yield Case(f"similarity, {dtype}, 40 x 300, in chunks", BLENDED, _weights(40, 300, dtype, "cross"), extra=half)
        yield Case(f"similarity, {dtype}, 9 x 2", BLENDED, _weights(9, 2, dtype, "cross"))
        yield Case(f"similarity, {dtype}, layouts", BLENDED, _weight_layouts(dtype), extra=half)
    yield Case("similarity, labelled", BLENDED, _labelled)
    for kept, scope, balance in (("full", "full", 0.5), ("full", "cross", 0.25), ("cross", "cross", 0.75)):
        yield Case(f"similarity, blend {kept} into {scope}", BLENDED, _blend("float32", kept, scope, balance))
    yield Case("similarity, blend in pieces", BLENDED, _blend("bfloat16", "full", "full", 0.5, True))
    kept = (*BLENDED, *LISTED)
    yield Case("candidates, reduced costs and rows", kept, _kept_only(False))
    yield Case("candidates, reduced costs and rows, in pieces", (*kept, "product.add_kernel"), _kept_only(True))
