"""assign_tiled against the dense solver and scipy, its pieces against plain torch, and sources that misbehave."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from assignment_cases import KINDS, check, make
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import mudsc_fast as mf
from mudsc_fast import backends
from mudsc_fast.tiled_assignment import TiledRound


@pytest.mark.parametrize("kind", KINDS)
def test_random_problems(isa: str, kind: str) -> None:
    for seed in range(3):
        n = int(np.random.default_rng(seed).integers(0, 40))
        similarity = make(kind, n, seed, (torch.float32, torch.float64)[seed % 2])
        source = mf.MatrixTiles(similarity)
        for candidates, tile_bytes in ((1, 1), (3, 4 * n * 5 + 1), (64, 1 << 20)):
            check(similarity, mf.assign_tiled(source, candidates, tile_bytes))


@pytest.mark.parametrize("kind", ["uniform", "low rank", "few values", "dead rows and columns", "sparse", "equal rows"])
def test_the_dense_solvers_value(kind: str) -> None:
    similarity = make(kind, 500, 1)
    found = mf.assign_tiled(mf.MatrixTiles(similarity), candidates=12, tile_bytes=1 << 17)
    check(similarity, found)
    torch.testing.assert_close(found.value, mf.assign(similarity).value, rtol=1e-12, atol=1e-300)


def test_few_rows_are_read_where_lists_are_long_enough() -> None:
    n = 400
    similarity = 0.1 * make("uniform", n, 0)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    similarity[torch.arange(n), order] += 1
    rounds: list[TiledRound] = []
    found = mf.assign_tiled(mf.MatrixTiles(similarity), candidates=8, watch=rounds.append)
    assert torch.equal(found.indices, order)
    assert [r.rounds for r in rounds] == [1]
    assert rounds[-1].rows_read == n
    assert rounds[-1].free_rows == 0
    assert rounds[-1].candidates == 8 * n


def test_terms_and_features_of_two_devices_are_refused() -> None:
    terms = [[torch.randn(4, 6), torch.randn(4, 6)]]
    here, elsewhere = torch.randn(9, 4), torch.empty(9, 4, device="meta")
    for features, place in (([elsewhere, here], 0), ([here, elsewhere], 1)):
        with pytest.raises(ValueError, match=rf"features\[{place}\]: expected a tensor on cpu, got one on meta"):
            mf.SimilarityTiles(terms, features)
    with pytest.raises(ValueError, match=r"features\[1\]: expected a tensor on cpu"):
        mf.SimilarityTiles((), [here, elsewhere])
    with pytest.raises(ValueError, match="'triton' does not run 'similarity' on 'cpu' tensors"):
        mf.SimilarityTiles(terms, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_candidates_are_the_best_columns(isa: str, threads: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    cpu = backends.pick("assign_tile", "cpu").module
    for n, room in ((1, 1), (5, 5), (63, 4), (64, 64), (300, 1), (777, 200), (1000, 64)):
        tile = torch.randn(7, n, generator=generator).to(dtype)
        tile[3] = (2 * tile[3]).round()
        tile[4] = 1.5
        prices = torch.randn(n, generator=generator, dtype=torch.float64) * torch.tensor([0.0, 1.0])[room % 2]
        columns, values, threshold, maxima = cpu.assign_tile(tile, 0, prices, room)
        reduced = tile.double() - prices
        assert torch.equal(values, tile.double().gather(1, columns.long()))
        assert torch.equal(maxima, reduced.amax(1))
        for i in range(len(tile)):
            chosen = set(columns[i].tolist())
            assert len(chosen) == room
            listed = reduced[i, columns[i].long()].sort(descending=True).values
            assert torch.equal(listed, reduced[i].topk(room).values)
            others = [float(reduced[i, j]) for j in range(n) if j not in chosen]
            assert max(others, default=-np.inf) <= float(threshold[i])
            assert float(threshold[i]) <= float(listed[-1])


def _models(n: int, samples: int) -> tuple[list[list[Tensor | mf.Term]], list[Tensor]]:
    generator = torch.Generator().manual_seed(n)

    def pair(*shape: int) -> list[Tensor]:
        return [torch.randn(*shape, generator=generator) for _ in range(2)]

    labels = torch.randperm(6, generator=generator)
    scale = torch.rand(6, generator=generator)
    dead, plain, other = pair(n, 5), pair(n, 600), pair(2, 3, n, 4)
    dead[0][1] = plain[0][1] = other[0][:, :, 1] = 0.25
    terms: list[list[mf.Term | Tensor]] = [
        [*plain],
        [*dead],
        [mf.Term(other[0], 2, {(0, 1): torch.arange(6)}), mf.Term(other[1], 2, {(0, 1): labels}, {(0, 1): scale})],
    ]
    return terms, [x + 3 for x in pair(samples, n)]


@pytest.mark.parametrize("balance", [0.0, 0.3, 1.0])
def test_tiles_are_the_rows_of_the_similarity(balance: float) -> None:
    n = 37
    terms, features = _models(n, 50)
    cov = mf.Covariance(n, models=2, scope="cross")
    cov.update(features)
    expected = mf.dual_similarity(terms, cov, balance)[0]
    source = mf.SimilarityTiles(terms, features, balance)
    assert source.width == n
    rows = torch.tensor([0, 1, 5, 36])
    torch.testing.assert_close(source.tile(rows), expected[rows], rtol=0, atol=2e-6)
    torch.testing.assert_close(source.tile(torch.arange(n)), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(
        mf.SimilarityTiles(terms).tile(rows), mf.weight_similarity(terms)[0][rows], rtol=0, atol=2e-6
    )
    alone = mf.SimilarityTiles(features=[x.bfloat16() for x in features]).tile(rows)
    torch.testing.assert_close(alone, cov.correlation()[0][rows], rtol=0, atol=2e-2)


def test_a_similarity_in_tiles_is_matched_as_the_whole_one() -> None:
    n = 300
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(n, 40, generator=generator)
    order = torch.randperm(n, generator=generator)
    second = first[order] + 0.5 * torch.randn(n, 40, generator=generator)
    features = [torch.randn(64, n, generator=generator) for _ in range(2)]
    source = mf.SimilarityTiles([[first, second]], features, 0.7)
    cov = mf.Covariance(n, models=2, scope="cross")
    cov.update(features)
    whole = mf.assign(mf.dual_similarity([[first, second]], cov, 0.7)[0])
    found = mf.assign_tiled(source, candidates=4, tile_bytes=50000)
    assert torch.equal(found.indices, whole.indices)
    assert float(found.gap) <= 1e-6 * n
    assert float(found.value) == pytest.approx(float(whole.value), abs=1e-6)


class Noisy:
    """A source whose rows come out a little different at every call, by more than rounding."""

    def __init__(self, matrix: Tensor, noise: float) -> None:
        self.width, self.matrix, self.noise = len(matrix), matrix, noise
        self.generator = torch.Generator().manual_seed(0)

    def tile(self, rows: Tensor) -> Tensor:
        part = self.matrix[rows]
        return part + self.noise * torch.rand(part.shape, generator=self.generator)


def test_what_is_left_of_the_gap_is_reported() -> None:
    similarity = make("uniform", 60, 0)
    best = similarity.double().numpy()
    rows, columns = linear_sum_assignment(best, maximize=True)
    for noise in (1e-8, 1e-3):
        found = mf.assign_tiled(Noisy(similarity, noise), candidates=6, proofs=3)
        taken = best[np.arange(60), found.indices.numpy()].sum()
        assert best[rows, columns].sum() - taken <= float(found.gap) + 60 * noise
        assert (float(found.gap) > 1e-6 * 60) == (noise == 1e-3)


class Wrong:
    width = 5

    def tile(self, rows: Tensor) -> Tensor:
        return torch.zeros(len(rows), 4)


S = torch.rand(4, 4)
BAD: list[tuple[str, Callable[[], object], type[Exception], str]] = [
    ("matrix", lambda: mf.assign_tiled(S), TypeError, "source: .*tile"),  # type: ignore[arg-type]
    ("candidates", lambda: mf.assign_tiled(mf.MatrixTiles(S), 0), ValueError, "candidates: .*got 0"),
    ("proofs", lambda: mf.assign_tiled(mf.MatrixTiles(S), proofs=0), ValueError, "proofs: .*got 0"),
    ("tile", lambda: mf.assign_tiled(Wrong()), ValueError, r"source: .*\(5, 5\), got \(5, 4\)"),
    ("NaN", lambda: mf.assign_tiled(mf.MatrixTiles(S / 0 * 0)), ValueError, "tile: expected finite"),
    ("shape", lambda: mf.MatrixTiles(torch.rand(3, 4)), ValueError, r"matrix: .*\(3, 4\)"),
    ("dtype", lambda: mf.MatrixTiles(torch.ones(3, 3, dtype=torch.int64)), TypeError, "matrix: .*floating"),
    ("nothing", lambda: mf.SimilarityTiles(), ValueError, "terms: .*at least one"),
    ("three", lambda: mf.SimilarityTiles([[S, S, S]]), ValueError, "terms: .*2 models, got 3"),
    ("balance", lambda: mf.SimilarityTiles([[S, S]], balance=2), ValueError, "balance: .*got 2"),
    ("one feature", lambda: mf.SimilarityTiles(features=[S]), TypeError, "features: .*pair"),
    ("features", lambda: mf.SimilarityTiles(features=[S, S[:3]]), ValueError, r"features: .*\(4, 4\) and \(3, 4\)"),
    ("width", lambda: mf.SimilarityTiles([[S, S]], [S[:, :3], S[:, :3]]), ValueError, "features: .*4 units.*got 3"),
    ("weights", lambda: mf.SimilarityTiles([[S, S / 0]]), ValueError, "terms: expected finite"),
]


@pytest.mark.parametrize(("call", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("kind", ["permutation", "scaled", "zip"])
def test_tiles_of_tensors_with_labels(kind: str) -> None:
    generator = torch.Generator().manual_seed(2)
    n, k = 21, 17

    def term(shape: tuple[int, ...], dim: int, other: int) -> mf.Term:
        size = shape[other]
        labels = torch.randperm(size, generator=generator)
        scale = torch.ones(size)
        if kind == "zip":
            labels = torch.cat([torch.arange(size - 4), torch.randint(size - 4, (4,), generator=generator)])
            scale = torch.rand(size - 4, generator=generator) + 0.5
        if kind == "scaled":
            scale = torch.rand(size, generator=generator) + 0.5
        return mf.Term(torch.randn(shape, generator=generator), dim, {other: labels}, {other: scale})

    # Rows side by side, columns side by side, kernels of 3 x 3, and dims that do not lie one behind the other.
    shapes = [((n, k), 0, 1), ((k, n), 1, 0), ((n, k, 3, 3), 0, 1), ((k, n, 3, 3), 1, 0), ((6, n, k), 1, 0)]
    terms = [[term(*shape) for _ in range(2)] for shape in shapes]
    expected = mf.weight_similarity(terms)[0]
    rows = torch.tensor([0, 3, 4, 20])
    source = mf.SimilarityTiles(terms)
    torch.testing.assert_close(source.tile(rows), expected[rows], rtol=0, atol=2e-6)
    torch.testing.assert_close(source.tile(torch.arange(n)), expected, rtol=0, atol=2e-6)
