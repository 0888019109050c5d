"""assign and assign_blocks against scipy, the float64 reference and their own proof, on every instruction set."""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch_versions
from assignment_cases import KINDS, check, make
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import mudsc_fast as mf


@pytest.mark.parametrize("kind", KINDS)
def test_random_problems(isa: str, kind: str) -> None:
    for seed in range(60):
        n = int(np.random.default_rng(seed).integers(0, 24))
        dtype = (torch.float32, torch.float64, torch.float32)[seed % 3]
        similarity = make(kind, n, seed, dtype)
        check(similarity, mf.assign(similarity))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [63, 64, 65, 97, 128, 200, 256, 257, 320])  # rows whole to 256, lists above
def test_sizes_around_the_runs_of_a_scan(isa: str, kind: str, n: int) -> None:
    for dtype in (torch.float32, torch.float64):
        similarity = make(kind, n, n, dtype)
        check(similarity, mf.assign(similarity))


@pytest.mark.parametrize(
    "kind",
    [
        "uniform",
        "low rank",
        "few values",
        "dead rows and columns",
        "product",
        "columns to scale",
        "equal rows",
        "sparse",
    ],
)
@pytest.mark.parametrize("n", [600, 1100])
def test_larger_problems(kind: str, n: int) -> None:
    similarity = make(kind, n, 0)
    check(similarity, mf.assign(similarity))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(isa: str, dtype: torch.dtype) -> None:
    for n in (1, 30, 77):
        similarity = make("normal", n, n).to(dtype)
        check(similarity, mf.assign(similarity))


def test_thresholds_beside_rounded_keys(isa: str) -> None:
    """A list scanned in float32 may hold keys below its threshold; a path must then look past the list's end."""
    for n, seeds in ((80, (80, 392)), (257, range(6)), (300, range(6))):
        for seed in seeds:
            similarity = make("line", n, seed)
            check(similarity, mf.assign(similarity))


def test_unique_optimum_is_scipys(isa: str) -> None:
    for n in (5, 40, 90, 300):
        similarity = make("normal", n, n)
        assert np.array_equal(mf.assign(similarity).indices, linear_sum_assignment(similarity, maximize=True)[1])


def strided(similarity: Tensor, layout: str) -> Tensor:
    n = similarity.shape[0]
    if layout == "transposed":
        return similarity.T.contiguous().T
    if layout == "rows apart":
        return torch.full((n, n + 5), float("nan")).to(similarity)[:, 2 : n + 2].copy_(similarity)
    if layout == "columns apart":
        return torch.full((n, 3 * n), float("nan")).to(similarity)[:, 1::3].copy_(similarity)
    if layout == "transposed, apart":
        return torch.full((n + 1, 2 * n), float("nan")).to(similarity)[:n, ::2].T.copy_(similarity)
    return similarity


@pytest.mark.parametrize("layout", ["transposed", "rows apart", "columns apart", "transposed, apart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strides(isa: str, layout: str, dtype: torch.dtype) -> None:
    for n in (1, 2, 7, 70):
        similarity = make("normal", n, n, dtype)
        view = strided(similarity, layout)
        assert torch.equal(view, similarity)
        check(similarity, mf.assign(view))
        check(similarity, mf.assign(view, duals=mf.assign(similarity).duals))


def test_expanded_matrix() -> None:
    row = torch.rand(33)
    check(row.expand(33, 33), mf.assign(row.expand(33, 33)))
    check(row[:, None].expand(33, 33), mf.assign(row[:, None].expand(33, 33)))


def piece(result: mf.Assignment, at: tuple[int, ...]) -> mf.Assignment:
    u, v = result.duals
    return mf.Assignment(result.indices[at], result.value[at], (u[at], v[at]), result.gap[at])


@pytest.mark.parametrize("batch", [(1,), (5,), (2, 3), (2, 1, 3)])
def test_batches(isa: str, batch: tuple[int, ...]) -> None:
    for n in (0, 1, 9, 66):
        similarity = torch.rand(*batch, n, n, generator=torch.Generator().manual_seed(n))
        result = mf.assign(similarity)
        assert result.indices.shape == result.duals[0].shape == result.duals[1].shape == (*batch, n)
        assert result.value.shape == result.gap.shape == batch
        again = mf.assign(similarity, duals=result.duals)
        for at in np.ndindex(*batch):
            check(similarity[at], piece(result, at))
            check(similarity[at], piece(again, at))
            assert torch.equal(result.indices[at], mf.assign(similarity[at]).indices)


def test_empty_batch() -> None:
    result = mf.assign(torch.rand(0, 4, 4))
    assert result.indices.shape == (0, 4)
    assert result.value.shape == result.gap.shape == (0,)


def test_a_batch_of_strided_views_is_not_copied() -> None:
    similarity = make("normal", 60, 1)
    view = similarity.view(4, 15, 4, 15).transpose(1, 2)
    result = mf.assign(view)
    for a in range(4):
        for b in range(4):
            check(similarity[15 * a : 15 * a + 15, 15 * b : 15 * b + 15], piece(result, (a, b)))


@pytest.mark.parametrize("kind", KINDS)
def test_starting_duals_do_not_change_the_value(isa: str, kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for n in (1, 2, 20, 80, 260):
        similarity = make(kind, n, n)
        size = float(similarity.abs().max())
        u, v = mf.assign(similarity).duals
        noise = torch.randn(n, generator=generator, dtype=torch.float64)
        starts = [
            (u, v),
            (u, v + 0.01 * size * noise),
            (u, size * noise),
            (u, 1e6 * size * noise),
            (noise, 1e30 * noise),
        ]
        for start in [*starts, (u, v + 0.01 * size * noise), (noise, 1e30 * noise), (noise * 1e300, noise * 1e300)]:
            check(similarity, mf.assign(similarity, duals=start))
            check(similarity.T, mf.assign(similarity.T, duals=start[::-1]))


def test_duals_of_a_similar_problem(isa: str) -> None:
    similarity = make("low rank", 150, 0)
    duals = mf.assign(similarity).duals
    moved = similarity + 0.01 * make("normal", 150, 1)
    check(moved, mf.assign(moved, duals=duals))
    check(moved, mf.assign(moved, duals=tuple(d.float() for d in duals)))


@pytest.mark.parametrize("n", [40, 200, 600])
def test_duals_of_another_problem_are_left_behind(isa: str, n: int) -> None:
    similarity = make("normal", n, 0)
    # All rows want the same few columns at these prices.
    v = torch.linspace(0, 5, n, dtype=torch.float64)
    started = mf.assign(similarity, duals=(torch.zeros(n, dtype=torch.float64), v))
    check(similarity, started)
    alone = mf.assign(similarity)
    assert torch.equal(started.indices, alone.indices)
    assert torch.equal(started.duals[1], alone.duals[1])


def test_the_result_does_not_depend_on_threads(threads: int) -> None:
    for n, kind in ((200, "low rank"), (1100, "uniform"), (1100, "few values")):
        similarity = make(kind, n, 0)
        result = mf.assign(similarity)
        batch = mf.assign(similarity[:192, :192].reshape(3, 64, 3, 64).transpose(1, 2))
        torch.set_num_threads(1)
        alone = mf.assign(similarity)
        batch_alone = mf.assign(similarity[:192, :192].reshape(3, 64, 3, 64).transpose(1, 2))
        torch.set_num_threads(threads)
        for got, expected in ((result, alone), (batch, batch_alone)):
            assert torch.equal(got.indices, expected.indices)
            assert torch.equal(got.duals[0], expected.duals[0])
            assert torch.equal(got.duals[1], expected.duals[1])
            assert torch.equal(got.value, expected.value)
            assert torch.equal(got.gap, expected.gap)


def test_float64_at_the_ends_of_its_range(isa: str) -> None:
    for scale in (1e-310, 1e-290, 1e290, 1.7e308):
        similarity = make("uniform", 30, 3, torch.float64)
        expected = linear_sum_assignment(similarity, maximize=True)[1]
        result = mf.assign((2 * similarity - 1) * scale)
        if scale > 1e-300:  # subnormal entries round
            assert np.array_equal(result.indices, expected)
        assert bool(torch.isfinite(result.value))


def test_float32_at_the_ends_of_its_range(isa: str) -> None:
    for scale in (1e-40, 1e-36, 3e38):
        similarity = ((2 * make("uniform", 70, 3, torch.float64) - 1) * scale).float()
        check(similarity, mf.assign(similarity))


@pytest.mark.parametrize("n", [1, 5, 64, 256, 257])
def test_results_are_whole_however_they_are_read(n: int) -> None:
    similarity = make("normal", n, n)
    for read in (copy.deepcopy, copy.copy, lambda found: pickle.loads(pickle.dumps(found))):
        found = mf.assign(similarity)
        check(similarity, read(found))
        check(similarity, found)
        assert found.indices is found.indices
    found = mf.assign(similarity)
    u, v = found.duals
    assert u.shape == v.shape == (n,)
    assert found.block_indices is None
    assert repr(found).startswith("Assignment(indices=tensor(")
    with pytest.raises(AttributeError, match="'Assignment' object has no attribute 'index'"):
        found.index  # noqa: B018
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.gap = found.value  # type: ignore[misc]


def test_results_own_their_memory() -> None:
    """Indices stay when all else is gone, and their memory goes when they do."""
    similarity = make("normal", 200, 0)
    kept = mf.assign(similarity.clone()).indices
    before, zeros = kept.clone(), torch.zeros(200, 200)
    references = sys.getrefcount(zeros), sys.getrefcount(mf.Assignment), sys.getrefcount(None)
    places = {mf.assign(zeros).indices.data_ptr() for _ in range(2000)}
    after = sys.getrefcount(zeros), sys.getrefcount(mf.Assignment), sys.getrefcount(None)
    assert all(abs(a - b) < 100 for a, b in zip(references, after, strict=True))
    assert kept.data_ptr() not in places
    if "asan" not in os.environ.get("LD_PRELOAD", ""):  # which is slow to use a place again
        assert len(places) < 100
    assert torch.equal(kept, before)
    kept.add_(1)  # writable
    assert kept.storage_offset() == 0
    assert kept.untyped_storage().nbytes() == 8 * 200


def test_a_torch_that_makes_no_tensors_of_memory() -> None:
    # Older ones have no exchange table, or a number in its place; results are the same.
    code = (
        "similarity = torch.sin(torch.arange(4900.0)).view(70, 70)\n"
        "print([mf.assign(similarity[:n, :n]) for n in (1, 5, 64, 70)])\n"
        "print(mf.assign(torch.complex(similarity, similarity).conj().imag))\n"
        "for bad in (similarity.to_sparse(), similarity[:5], similarity.long(), similarity / 0, 'a'):\n"
        "    try: mf.assign(bad)\n"
        "    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error: print(type(error), error)\n"
    )
    shown = torch_versions.printed(code)
    assert "expected finite values" in shown[0]
    assert shown[1] == shown[2] == shown[0]


def test_ordinary_calls_under_modes_and_transforms() -> None:
    similarity = make("normal", 20, 0)
    want = mf.assign(similarity)
    with torch.inference_mode():
        assert torch.equal(mf.assign(similarity).indices, want.indices)
    with torch.device("meta"):
        assert torch.equal(mf.assign(similarity).indices, want.indices)
    parameter = torch.nn.Parameter(similarity)
    assert torch.equal(mf.assign(parameter).indices, want.indices)
    assert not mf.assign(parameter).indices.requires_grad
    with pytest.raises(ValueError, match="has no memory of its own"):
        torch.func.functionalize(lambda s: mf.assign(s).indices)(similarity)


def test_tensors_marked_negative(isa: str) -> None:
    """The imaginary part of a conjugate is a view whose elements are to be read with the other sign."""
    for n in (5, 300):
        numbers = torch.complex(torch.zeros(n, n), make("normal", n, 0))
        view = numbers.conj().imag
        assert view.is_neg()
        check(view.resolve_neg(), mf.assign(view))


def test_inputs_are_not_changed_and_gradients_are_detached() -> None:
    similarity = make("normal", 40, 0).requires_grad_()
    before = similarity.detach().clone()
    result = mf.assign(similarity, duals=(torch.zeros(40), torch.zeros(40)))
    assert torch.equal(similarity.detach(), before)
    assert not result.value.requires_grad


@pytest.mark.parametrize("entry", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("n", [1, 3, 64, 70, 200])
def test_non_finite_entries_are_refused(isa: str, entry: float, n: int) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for at in {0, n // 2, n - 1}:
            similarity = torch.rand(n, n).to(dtype)
            similarity[n - 1 - at, at] = entry
            for view in (similarity, similarity.T, similarity.expand(2, n, n)):
                with pytest.raises(ValueError, match="similarity: expected finite values, got NaN or infinity"):
                    mf.assign(view)


@pytest.mark.parametrize("entry", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("others", [0.0, 1e-30, 3e38, -3e38])
def test_non_finite_entries_are_seen_beside_any_others(isa: str, entry: float, others: float) -> None:
    """Products of neighbours tell them, in large problems sums of whole rows, which vanish or overflow here."""
    for n in (2, 33, 64, 129, 300):
        similarity = torch.full((n, n), others)
        check(similarity, mf.assign(similarity))
        for column in range(0, n, 1 if n < 300 else 7):
            spoiled = similarity.clone()
            spoiled[n // 2, column] = entry
            with pytest.raises(ValueError, match="similarity: expected finite values, got NaN or infinity"):
                mf.assign(spoiled)


S = torch.zeros(3, 3)
V = torch.zeros(3)
BAD: list[tuple[str, Callable[[], object], type[Exception], str]] = [
    ("rectangular", lambda: mf.assign(torch.zeros(3, 4)), ValueError, r"similarity: .*square.*\(3, 4\)"),
    ("vector", lambda: mf.assign(V), ValueError, r"similarity: .*square.*\(3,\)"),
    ("integers", lambda: mf.assign(S.long()), TypeError, "similarity: .*floating.*int64"),
    ("complex", lambda: mf.assign(S.to(torch.complex64)), TypeError, "similarity: .*floating.*complex64"),
    ("list", lambda: mf.assign([[1.0]]), TypeError, "similarity: .*Tensor.*list"),  # type: ignore[arg-type]
    ("sparse", lambda: mf.assign(S.to_sparse()), TypeError, "similarity: .*dense.*sparse"),
    ("nothing", lambda: mf.assign_blocks(None, 3), TypeError, "similarity: .*sequence"),  # type: ignore[call-overload]
    ("within nothing", lambda: mf.assign_blocks([S], 3, None), TypeError, "within: .*None"),  # type: ignore[call-overload]
    ("one dual", lambda: mf.assign(S, duals=V), TypeError, r"duals: .*pair"),  # type: ignore[arg-type]
    ("short duals", lambda: mf.assign(S, duals=(V, V[:2])), ValueError, r"duals: .*v of shape \(3,\), got \(2,\)"),
    ("batch duals", lambda: mf.assign(S[None], duals=(V, V)), ValueError, r"duals: .*\(1, 3\), got \(3,\)"),
    ("integer duals", lambda: mf.assign(S, duals=(V.long(), V)), TypeError, "duals: .*floating"),
    ("NaN duals", lambda: mf.assign(S, duals=(V, V / 0)), ValueError, "duals: .*finite"),
    ("backend", lambda: mf.assign(S, backend="abacus"), ValueError, "backend: .*abacus"),
    ("blocks", lambda: mf.assign_blocks(S, 2), ValueError, "blocks: .*divisor of 3 units, got 2"),
    ("no blocks", lambda: mf.assign_blocks(S, 0), ValueError, "blocks: .*got 0"),
    ("within", lambda: mf.assign_blocks(S, 3, within="loose"), ValueError, "within: .*loose"),
    ("within list", lambda: mf.assign_blocks([S], 3, within=["free", "free"]), ValueError, r"within: .*\(1\), got 2"),
    ("no spaces", lambda: mf.assign_blocks([], 3), ValueError, "within|similarity"),
    ("tied batches", lambda: mf.assign_blocks([S, S[None]], 3), ValueError, "similarity: .*batch"),
    ("NaN, free", lambda: mf.assign_blocks(S / 0, 3), ValueError, "similarity: .*finite"),
    ("NaN, fixed", lambda: mf.assign_blocks(S / 0, 3, within="fixed"), ValueError, "similarity: .*finite"),
]


@pytest.mark.parametrize(("call", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
