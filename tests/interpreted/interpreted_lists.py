"""Lists of candidates in Triton's interpreter, and whole assignments whose tiles, lists and proof are the kernels'."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from interpreted_setup import (
    BLENDED,
    LISTED,
    SMALL,
    USUAL,
    Case,
    Error,
    cut_as,
    distance,
    few_columns,
    matrices,
)

import mudsc_fast as mf
from mudsc_fast.backends.triton import candidates


def _listed(kind: str, n: int, room: int) -> Error:
    """Lists of a tile against all worths: the best columns up to float32's rounding, and bounds that hold exactly."""

    def error(seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        store = torch.randn(3, n + 7, generator=generator)
        prices = torch.rand(n, generator=generator, dtype=torch.float64)
        if kind == "ties":
            store, prices = (3 * store).round(), (2 * prices).round()
        if kind == "equal":
            store[:], prices[:] = 0.1, 0.3
            store[1:, n // 2] = 0.7
        if kind == "close":  # what is left of the entries cannot be told apart in float32 before the difference
            prices = 0.5 + 1e-10 * torch.randn(n, generator=generator, dtype=torch.float64)
            store[:] = 0.5
        if kind == "first":  # the column that is met last where a row's turn begins at the second
            store[:, 0] += 10
        if kind == "clumped":  # the best columns fall into few groups
            store[:, 3 :: candidates.BLOCK] += 10
        tile = store.double()[:, :n] if kind == "float64" else store[:, :n]
        worth = tile.double() - prices
        columns, values, threshold, maxima = candidates.assign_tile(tile, seed, prices, room)
        if columns.shape != (3, room) or not torch.equal(maxima, worth.amax(dim=1)):
            return float("inf")
        if room == 0:
            return float(len(threshold))
        index = columns.long()
        distinct = bool((index.sort(dim=1).values.diff(dim=1) > 0).all()) and 0 <= int(index.min()) < n
        left = worth.scatter(1, index, -torch.inf).amax(dim=1)
        if not distinct or not torch.equal(values, tile.double().gather(1, index)) or bool((threshold < left).any()):
            return float("inf")
        if kind == "clumped":  # a bound that is not tight is the price of a kernel that keeps few columns
            return 0.0
        if not torch.equal(threshold, left):
            return float("inf")
        kept = worth.gather(1, index)
        best = worth.topk(room, dim=1).values
        scale = best.abs().amax(dim=1, keepdim=True)
        return float(((kept.sort(dim=1, descending=True).values - best).abs() / scale).max())

    return error


def _spread(seed: int) -> float:
    """Equal columns go to different rows: together the lists of a constant tile have most columns in them."""
    n = 40
    columns = candidates.assign_tile(torch.zeros(n, n), seed, torch.zeros(n, dtype=torch.float64), 4)[0]
    return 0.0 if len(columns.unique()) > n // 2 else float("inf")


def _hybrid(kind: str) -> Error:
    """An assignment whose tiles, lists and proof are the kernels', against the whole similarity's optimum."""

    def error(seed: int) -> float:
        width = 37
        weights = matrices(width, 70, 2, seed)
        if kind == "dead units":
            for w in weights:
                w[::3] = 0.0
        terms = [[w.float() for w in weights]]
        seen = None
        if kind == "both spaces":
            seen = [torch.randn(50, width, generator=torch.Generator().manual_seed(seed + m)) for m in range(2)]
        with cut_as(SMALL), few_columns():
            source = mf.SimilarityTiles(terms, seen, 0.5, backend="triton")
            found = mf.assign_tiled(source, candidates=3, tile_bytes=4 * width * 20, backend="triton")
        whole = mf.SimilarityTiles(terms, seen, 0.5, backend="cpu").tile(torch.arange(width))
        wanted = mf.reference.assign(whole)
        taken = whole.double()[torch.arange(width), found.indices]
        if len(found.indices.unique()) != width or float(found.gap) > 1e-6 * width:
            return float("inf")
        return max(float((wanted.value - taken.mean()).abs()), distance(found.value, wanted.value))

    return error


def _in_blocks(error: Error) -> Error:
    def inner(seed: int) -> float:
        with few_columns():
            return error(seed)

    return inner


def cases() -> Iterator[Case]:
    """Every comparison of lists and assignments."""
    for kind, n, room in (
        ("any", 1, 1), ("any", 31, 31), ("any", 32, 5), ("any", 33, 16), ("any", 65, 17), ("any", 200, 30),
        ("ties", 97, 9), ("equal", 70, 8), ("close", 64, 7), ("clumped", 1700, 16), ("first", 33, 4), ("any", 150, 0),
    ):  # fmt: skip
        error = _in_blocks(_listed(kind, n, room))
        kernels = LISTED if room else LISTED[:1]
        yield Case(f"lists of a tile, {kind}, {n} columns, {room} kept", kernels, error, USUAL)
    yield Case("lists of a tile, any, 1100 columns, 128 kept", LISTED, _listed("any", 1100, 128), USUAL)
    yield Case("lists of a tile, float64, by torch", (), _listed("float64", 40, 6), 0.0)
    yield Case("lists of a tile, any, longer than the kernel's, by torch", (), _listed("any", 300, 129), 0.0)
    yield Case("lists of a tile, equal columns go to different rows", LISTED, _in_blocks(_spread), 0.0)
    for kind in ("weights", "both spaces", "dead units"):
        yield Case(f"assignment, {kind}", (*BLENDED, *LISTED), _hybrid(kind), extra=kind == "weights")
