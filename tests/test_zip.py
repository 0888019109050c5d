"""zip_units against the float64 reference and the recorded outputs, on every instruction set."""

from __future__ import annotations

import golden_cases
import pytest
import torch
from torch import Tensor

import mudsc_fast as mf

# The value is a mean of float32 entries, added up in float64; after m merges an entry has m roundings of its factor.
VALUE_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def similarity_of(d: int, models: int, seed: int, samples: int = 40, noise: float = 0.5) -> Tensor:
    """Correlation of noisy permuted copies of the same features, float64, exactly symmetric."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(samples, d, generator=generator, dtype=torch.float64)
    parts = [
        shared[:, torch.randperm(d, generator=generator)]
        + noise * torch.randn(samples, d, generator=generator, dtype=torch.float64)
        for _ in range(models)
    ]
    result = torch.corrcoef(torch.cat(parts, dim=1).T).reshape(models * d, models * d)
    return (result + result.T) / 2


GOLDENS = {name: (inputs, expected) for name, inputs, expected in golden_cases.zip_cases()}


@pytest.mark.parametrize("dtype", list(VALUE_TOLERANCE), ids=str)
def test_goldens(isa: str, dtype: torch.dtype) -> None:
    compared = 0
    for name, (inputs, expected) in GOLDENS.items():
        arguments = {**inputs, "similarity": inputs["similarity"].to(dtype)}
        if expected["labels"] is None:
            with pytest.raises(ValueError, match="budget"):
                mf.zip_units(**arguments)
            continue
        got = mf.zip_units(**arguments)
        assert torch.equal(got.labels, expected["labels"]), name
        assert float(got.value) == pytest.approx(expected["value"], abs=2e-6), name
        compared += 1
    assert compared > 20


@pytest.mark.parametrize("dtype", list(VALUE_TOLERANCE), ids=str)
def test_random_problems_agree_with_the_reference(isa: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    for seed in range(60):
        models = (1, 2, 2, 3, 4)[seed % 5]
        blocks = (1, 1, 2, 3)[seed % 4]
        d = blocks * int(torch.randint(1, 14, (1,), generator=generator))
        similarity = similarity_of(d, models, seed, samples=12).to(dtype)
        if seed % 3 == 0:  # many equal entries: the order of ties decides
            similarity = (similarity * 4).round() / 4
        width = blocks * int(torch.randint(1, max(2, models * d // blocks + 1), (1,), generator=generator))
        options = {
            "models": models,
            "width": min(width, models * d),
            "attenuation": (0.5, 0.25, 1.0, 0.0)[seed % 4],
            "budget": (1.0, 0.5, 10.0)[seed % 3],
            "blocks": blocks,
        }
        try:
            want = mf.reference.zip_units(similarity, **options)
        except ValueError:
            with pytest.raises(ValueError, match="no allowed pair is left"):
                mf.zip_units(similarity, **options)
            continue
        got = mf.zip_units(similarity, **options)
        assert torch.equal(got.labels, want.labels), (seed, options)
        assert torch.equal(got.sizes, want.sizes)
        assert float(got.value) == pytest.approx(float(want.value), abs=VALUE_TOLERANCE[dtype])


@pytest.mark.parametrize(("n", "seed"), [(6, 70), (6, 425), (14, 483), (14, 528), (20, 209), (20, 379)])
def test_ties_with_entries_that_a_merge_raised(isa: str, n: int, seed: int) -> None:
    # An attenuation raises what is below 0, to the row's largest entry at times: the first place of these counts.
    generator = torch.Generator().manual_seed(seed)
    similarity = -(2.0 ** torch.randint(-3, 2, (n, n), generator=generator))
    similarity = torch.maximum(similarity, similarity.T)
    want = mf.reference.zip_units(similarity, width=2)
    assert torch.equal(mf.zip_units(similarity, width=2).labels, want.labels)


@pytest.mark.parametrize("d", [1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 129, 255, 257])
def test_sizes_around_the_kernels_steps(isa: str, d: int) -> None:
    similarity = similarity_of(d, 2, d)
    got, want = mf.zip_units(similarity), mf.reference.zip_units(similarity)
    assert torch.equal(got.labels, want.labels)
    assert torch.equal(got.sizes, want.sizes)


def test_strides_and_half_types(isa: str) -> None:
    similarity = similarity_of(20, 2, 5)
    want = mf.zip_units(similarity)
    wide = torch.zeros(40, 120, dtype=torch.float64)[:, ::3]
    wide.copy_(similarity)
    assert torch.equal(mf.zip_units(wide).labels, want.labels)
    assert torch.equal(mf.zip_units(similarity.t()).labels, want.labels)
    for dtype in (torch.float16, torch.bfloat16):
        rounded = similarity.to(dtype)
        assert torch.equal(mf.zip_units(rounded).labels, mf.zip_units(rounded.float()).labels)


def test_the_input_is_not_changed_and_its_diagonal_not_read(isa: str) -> None:
    similarity = similarity_of(12, 2, 6)
    with_inf = similarity.clone().fill_diagonal_(-torch.inf)
    before = with_inf.clone()
    assert torch.equal(mf.zip_units(with_inf).labels, mf.zip_units(similarity).labels)
    assert torch.equal(with_inf, before)
    assert torch.equal(
        mf.zip_units(similarity.clone().fill_diagonal_(torch.nan)).labels, mf.zip_units(similarity).labels
    )


def test_threads_change_nothing(isa: str) -> None:
    similarity = similarity_of(300, 2, 7).float()
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(mf.zip_units(similarity, blocks=4))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(results[0].labels, other.labels)
        assert torch.equal(results[0].value, other.value)


@pytest.mark.parametrize("dtype", list(VALUE_TOLERANCE), ids=str)
@pytest.mark.parametrize(("attenuation", "budget"), [(0.5, 1.0), (0.5, 0.3), (1.0, 10.0), (0.0, 1.0)])
def test_threads_that_share_a_merge_change_nothing(
    isa: str, dtype: torch.dtype, attenuation: float, budget: float
) -> None:
    similarity = similarity_of(1100, 2, 5, samples=150).to(dtype)  # 2200 units: enough columns for two threads
    similarity = (similarity * 50).round() / 50  # ties, within a thread's columns and between two of them
    options = {"attenuation": attenuation, "budget": budget, "width": 1200}
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(mf.zip_units(similarity, **options))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(results[0].labels, other.labels)
        assert torch.equal(results[0].value, other.value)


def test_blocks_side_by_side_share_a_budget_as_if_one_came_after_the_other(threads: int) -> None:
    infeasible = ended = 0
    for seed in range(60):
        models, blocks, n = 2 + seed % 2, 2 + seed % 5, 2 + seed % 4
        similarity = similarity_of(blocks * n, models, seed, samples=12)
        options = {
            "models": models,
            "blocks": blocks,
            "width": blocks * (n + (0, 0, -1, 1)[seed % 4]),
            "budget": (0.0, 0.2, 0.5, 0.8, 1.0)[seed % 5],
            "attenuation": (0.5, 1.0)[seed % 2],
        }
        try:
            want = mf.reference.zip_units(similarity, **options)
        except ValueError:
            with pytest.raises(ValueError, match="no allowed pair is left"):
                mf.zip_units(similarity, **options)
            infeasible += 1
            continue
        got = mf.zip_units(similarity, **options)
        assert torch.equal(got.labels, want.labels), (seed, options)
        ended += not torch.equal(got.labels, mf.zip_units(similarity, **{**options, "budget": 1.0}).labels)
    assert infeasible > 0
    assert ended > 0  # budgets that changed what was merged


def test_block_pairing_from_outside(isa: str) -> None:
    similarity = similarity_of(12, 2, 8)
    pairing = torch.tensor([[0, 1, 2], [2, 0, 1]])
    got = mf.zip_units(similarity, blocks=3, block_indices=pairing)
    want = mf.reference.zip_units(similarity, blocks=3, block_indices=pairing)
    assert torch.equal(got.labels, want.labels)
    for k in range(3):  # merged units 4k..4k+3 hold block k of model 0 and block pairing[1, k] of model 1, nothing else
        held = (got.labels // 4) == k
        assert held[0].nonzero().flatten().tolist() == list(range(4 * k, 4 * k + 4))
        first = 4 * int(pairing[1, k])
        assert held[1].nonzero().flatten().tolist() == list(range(first, first + 4))


def test_budget_zero_merges_only_across_models(isa: str) -> None:
    similarity = similarity_of(16, 2, 9, noise=3.0)
    got = mf.zip_units(similarity, budget=0.0)
    for m in range(2):
        assert len(got.labels[m].unique()) == 16
    assert (mf.zip_units(similarity).sizes > 2).any()


@pytest.mark.parametrize(("n", "budget"), [(5, 0.6), (17, 0.3), (70, 0.3), (70, 0.6)])
def test_an_attenuation_that_float32_does_not_have_keeps_pairs_barred(isa: str, n: int, budget: float) -> None:
    # 1e-50 is 0 in float32, and 0 times a barred entry's -inf is NaN.
    similarity = similarity_of(n, 2, seed=n, noise=3.0).float()
    got = mf.zip_units(similarity, attenuation=1e-50, budget=budget)
    same = mf.zip_units(similarity, attenuation=1e-30, budget=budget)
    assert torch.equal(got.labels, same.labels)


def test_full_width_merges_nothing(isa: str) -> None:
    got = mf.zip_units(similarity_of(6, 2, 10), width=12)
    assert torch.equal(got.labels, torch.arange(12).view(2, 6))
    assert float(got.value) == 0


def test_matched_units_stay_when_attenuation_is_not_positive(isa: str) -> None:
    got = mf.zip_units(similarity_of(16, 2, 11), attenuation=-1.0)
    assert int(got.sizes.max()) == 2


S = torch.eye(8)
NAN = torch.zeros(8, 8).index_put_((torch.tensor(2), torch.tensor(5)), torch.tensor(torch.nan))
SKEW = torch.zeros(8, 8).index_put_((torch.tensor(2), torch.tensor(5)), torch.tensor(1.0))
BAD = {
    "not a tensor": (TypeError, "similarity: expected a torch.Tensor", ([[1.0]],), {}),
    "integers": (TypeError, "similarity: expected a dense tensor of a floating dtype", (S.int(),), {}),
    "complex": (TypeError, "similarity: expected a dense tensor of a floating dtype", (S.cfloat(),), {}),
    "sparse": (TypeError, "similarity: expected a dense tensor", (S.to_sparse(),), {}),
    "not square": (ValueError, r"similarity: expected a square matrix, got shape \(8, 7\)", (S[:, :7],), {}),
    "empty": (ValueError, "expected 2 x d rows, got 0", (S[:0, :0],), {}),
    "models": (ValueError, "models: expected", (S,), {"models": 0}),
    "models that do not divide": (ValueError, "expected 3 x d rows, got 8", (S,), {"models": 3}),
    "NaN": (ValueError, "similarity: expected finite", (NAN,), {}),
    "infinity": (ValueError, "finite", (NAN.nan_to_num(nan=torch.inf),), {}),
    "barred pair": (ValueError, "finite", (NAN.nan_to_num(nan=-torch.inf),), {}),
    "asymmetric": (ValueError, "symmetric", (SKEW,), {}),
    "width 0": (ValueError, "width: expected 1..8", (S,), {"width": 0}),
    "width 9": (ValueError, "width: expected 1..8", (S,), {"width": 9}),
    "width not shared": (ValueError, "multiple of the 2 blocks", (S,), {"width": 3, "blocks": 2}),
    "blocks": (ValueError, "blocks: expected a divisor of the 4 units", (S,), {"blocks": 3}),
    "attenuation": (ValueError, "attenuation: expected", (S,), {"attenuation": float("nan")}),
    "no attenuation": (TypeError, "attenuation: expected a number, got None", (S,), {"attenuation": None}),
    "budget in words": (TypeError, "budget: expected a number, got 'all'", (S,), {"budget": "all"}),
    "budget": (ValueError, "budget: expected", (S,), {"budget": -0.5}),
    "infeasible": (ValueError, "budget 0 is too small for width 2", (S,), {"width": 2, "budget": 0.0}),
    "pairing shape": (
        ValueError,
        r"block_indices: expected shape \(2, 2\)",
        (S,),
        {"blocks": 2, "block_indices": [0, 1]},
    ),
    "pairing of floats": (
        TypeError,
        "block_indices: expected an integer tensor",
        (S,),
        {"blocks": 2, "block_indices": torch.eye(2)},
    ),
    "pairing": (ValueError, "permutation of 0..1", (S,), {"blocks": 2, "block_indices": [[0, 1], [1, 1]]}),
    "backend": (ValueError, "backend: 'gpu' does not run 'zip'", (S,), {"backend": "gpu"}),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_named(isa: str, case: str) -> None:
    error, message, args, kwargs = BAD[case]
    with pytest.raises(error, match=message):
        mf.zip_units(*args, **kwargs)
