"""weight_similarity and dual_similarity against the float64 reference and the recorded outputs."""

from __future__ import annotations

import golden_cases
import pytest
import torch
from torch import Tensor

import mudsc_fast as mf
from mudsc_fast import _core

# float32: rows are centred and normalised in float32 (6e-8 an entry) and summed over up to 1000 columns.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 3e-6, torch.bfloat16: 3e-6, torch.float64: 1e-12}

Terms = list[list["mf.Term | Tensor"]]


def matrices(width: int, columns: int, models: int = 2, seed: int = 0, mean: float = 0.0) -> list[Tensor]:
    """Weights of related models, float64."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(width, columns, generator=generator, dtype=torch.float64)
    return [
        shared.roll(m, 0) + 0.5 * torch.randn(width, columns, generator=generator, dtype=torch.float64) + mean
        for m in range(models)
    ]


def largest_error(terms: Terms, scope: str = "cross") -> float:
    got = mf.weight_similarity(terms, scope)
    want = mf.reference.weight_similarity(terms, scope)
    assert got.shape == want.shape
    return float((got - want).abs().max())


@pytest.mark.parametrize("scope", ["full", "cross"])
def test_goldens(isa: str, scope: str) -> None:
    for name, inputs, expected in golden_cases.weight_cases():
        width = inputs["matrices"][0].shape[0]
        want = expected["similarity"]
        if scope == "cross":
            want = torch.stack([want[:width, m * width : (m + 1) * width] for m in range(1, len(inputs["matrices"]))])
        got = mf.weight_similarity([inputs["matrices"]], scope)
        assert torch.allclose(got, want, atol=3e-6, rtol=0), name


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("width", [1, 2, 7, 8, 15, 16, 17, 31, 47, 48, 49, 97, 101])
def test_widths(isa: str, width: int, dtype: torch.dtype) -> None:
    for models in (2, 3):
        terms: Terms = [[w.to(dtype) for w in matrices(width, 37, models)]]
        for scope in ("full", "cross"):
            assert largest_error(terms, scope) < TOLERANCE[dtype], (models, scope)


@pytest.mark.parametrize("columns", [1, 2, 3, 63, 64, 65, 127, 255, 256, 257, 511, 512, 513, 1100])
def test_columns(isa: str, columns: int) -> None:
    for dtype in (torch.float32, torch.float64):
        terms: Terms = [[w.to(dtype) for w in matrices(20, columns)]]
        assert largest_error(terms) < TOLERANCE[dtype]
        split: Terms = [list(pair) for pair in zip(*(w.split((columns + 2) // 3, 1) for w in terms[0]), strict=True)]
        assert largest_error(split) < TOLERANCE[dtype]


def test_a_wide_space(isa: str) -> None:
    terms: Terms = [[w.float() for w in matrices(401, 90, 2)], [w[:, 0].float() for w in matrices(401, 1, 2, seed=1)]]
    for scope in ("full", "cross"):
        assert largest_error(terms, scope) < TOLERANCE[torch.float32]


# Rows of bf16 whose means are small beside their deviations are multiplied as they are where the CPU can.
@pytest.mark.parametrize("mean", [0.0, 0.6, 0.9, 30.0])
@pytest.mark.parametrize("columns", [(1, 1, 1), (64, 63), (511, 2, 512), (1030,)])
def test_bfloat16(columns: tuple[int, ...], mean: float) -> None:
    generator = torch.Generator().manual_seed(3)
    order = [torch.randperm(c, generator=generator) for c in columns]
    for width, models, scope in ((50, 2, "cross"), (97, 3, "full")):
        plain = [[w.to(torch.bfloat16) for w in matrices(width, c, models, seed=c, mean=mean)] for c in columns]
        plain[0][0][1], plain[-1][1][2] = 0, 0.25  # constant for a while, or altogether
        labelled: Terms = [
            [mf.Term(w, 0, {1: i if m else i.sort().values}) for m, w in enumerate(row)]
            for row, i in zip(plain, order, strict=True)
        ]
        mixed: Terms = [plain[0], *[[w.float() for w in row] for row in plain[1:]]]
        across: Terms = [[mf.Term(w.T.contiguous(), 1) for w in row] for row in plain]
        for terms in (plain, labelled, mixed, across):
            want = mf.reference.weight_similarity(terms, scope)
            for isa in _core.build_info()["isas_usable"]:
                _core.use_isa(isa)
                got = mf.weight_similarity(terms, scope)
                _core.use_isa(None)
                assert float((got - want).abs().max()) < 1e-5, isa


def test_bfloat16_takes_its_own_products(isa: str) -> None:
    """Sums of exact products differ in their last bits from sums of the rounded products of scaled rows."""
    rows = matrices(60, 700)
    bf16 = [w.to(torch.bfloat16) for w in rows]
    same = torch.equal(mf.weight_similarity([bf16]), mf.weight_similarity([[w.float() for w in bf16]]))
    assert same == (isa != "avx512_bf16")


def in_place_layouts(dtype: torch.dtype) -> dict[str, list[mf.Term | Tensor]]:
    """Ways in which a space's tensors lie in memory; 30 units each."""
    generator = torch.Generator().manual_seed(2)

    def two(*shape: int) -> list[Tensor]:
        return [torch.randn(*shape, generator=generator).to(dtype) for _ in range(2)]

    return {
        "rows": list(two(30, 50)),
        "bias": list(two(30)),
        "transposed rows": [w.T for w in two(50, 30)],
        "in axis": [mf.Term(w, 1) for w in two(50, 30)],
        "conv out": [mf.Term(w, 0) for w in two(30, 6, 3, 3)],
        "conv in": [mf.Term(w, 1) for w in two(6, 30, 3, 3)],
        "channels last": [mf.Term(w.contiguous(memory_format=torch.channels_last), -3) for w in two(6, 30, 3, 3)],
        "fused qkv": [mf.Term(w.view(3, 5, 6, 40)[1], (0, 1)) for w in two(90, 40)],
        "two row dims": [mf.Term(w, (2, 0)) for w in two(5, 40, 6)],
        "every second": [w[:, ::2] for w in two(30, 50)],
        "expanded": [w[:, None].expand(30, 4, 20).reshape(30, 80) for w in two(30, 20)],
        "stride 0": [mf.Term(w[:, None].expand(30, 4, 20), 0) for w in two(30, 20)],
        "different strides": [two(30, 20)[0], two(20, 30)[0].T],
    }


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_layouts_are_read_in_place(isa: str, dtype: torch.dtype) -> None:
    layouts = in_place_layouts(dtype)
    for name, entries in layouts.items():
        assert largest_error([entries]) < TOLERANCE[dtype], name
    for scope in ("full", "cross"):
        assert largest_error(list(layouts.values()), scope) < TOLERANCE[dtype]


def labels_of(size: int, merged: int, generator: torch.Generator, kind: str) -> Tensor:
    if kind == "permutation":
        return torch.randperm(size, generator=generator)
    return torch.randint(0, merged, (size,), generator=generator)


@pytest.mark.parametrize("kind", ["permutation", "zip"])
@pytest.mark.parametrize("scaled", [False, True])
def test_labelled_neighbours(isa: str, kind: str, scaled: bool) -> None:
    generator = torch.Generator().manual_seed(7)
    size, merged = 26, 26 if kind == "permutation" else 20
    scale = torch.rand(merged, generator=generator) + 0.5 if scaled else None
    for dtype in TOLERANCE:
        rows: Terms = [[], [], [], []]
        for _ in range(3):
            labels = labels_of(size, merged, generator, kind)
            labels[0] = merged - 1 if kind == "zip" else labels[0]
            linear = torch.randn(18, size, generator=generator).to(dtype)
            rows[0].append(mf.Term(linear, 0, {1: labels}, None if scale is None else {1: scale}))
            rows[1].append(mf.Term(linear.T.contiguous(), 1, {0: labels}, scale))
            rows[2].append(mf.Term(torch.randn(size, 18, 3, 3, generator=generator).to(dtype), 1, {0: labels}, scale))
            viewed = torch.randn(18, 2, size // 2, 5, generator=generator).to(dtype)
            rows[3].append(mf.Term(viewed, 0, {(1, 2): labels}, None if scale is None else {(1, 2): scale}))
        for scope in ("full", "cross"):
            for row in rows:
                assert largest_error([row], scope) < TOLERANCE[dtype]
            assert largest_error(rows, scope) < TOLERANCE[dtype]


def test_two_labelled_factors_and_units_that_one_model_lacks(isa: str) -> None:
    generator = torch.Generator().manual_seed(8)
    row: list[mf.Term | Tensor] = []
    for m in range(2):
        heads, inner = torch.tensor([0, 2, 1, 1]), torch.randint(0, 5, (6,), generator=generator)
        heads[0] += 3 * m
        tensor = torch.randn(9, 4, 6, 3, generator=generator)
        row.append(mf.Term(tensor, 0, {1: heads, -2: inner}, {1: torch.rand(4, generator=generator)}))
    assert largest_error([row]) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("balance", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("kept", ["full", "cross"])
def test_blend(isa: str, balance: float, kept: str) -> None:
    for width in (5, 48, 67):
        for models in (2, 3):
            for dtype in (torch.float32, torch.float64):
                terms: Terms = [[w.to(dtype) for w in matrices(width, 30, models)]]
                generator = torch.Generator().manual_seed(width)
                x = [torch.randn(60, width, generator=generator) for _ in range(models)]
                x[0][:, 2] = 5.0
                activation = mf.Covariance(width, models, kept)
                truth = mf.reference.Covariance(width, models, kept)
                activation.update(x)
                truth.update(x)
                for scope in ("cross", "full") if kept == "full" else ("cross",):
                    got = mf.dual_similarity(terms, activation, balance, scope)
                    want = mf.reference.dual_similarity(terms, truth, balance, scope)
                    assert got.dtype == (torch.float32 if balance == 0 else dtype)
                    assert float((got - want).abs().max()) < TOLERANCE[torch.float32]
                    if scope == "full":
                        assert torch.equal(got, got.T)
                        assert torch.equal(got.diagonal(), torch.ones(width * models, dtype=got.dtype))


def test_weights_or_activations_alone() -> None:
    terms: Terms = [[w.float() for w in matrices(12, 20)]]
    activation = mf.Covariance(12)
    activation.update([torch.randn(30, 12, generator=torch.Generator().manual_seed(0)) for _ in range(2)])
    weights = mf.weight_similarity(terms)
    assert torch.equal(mf.dual_similarity(terms, None, 0.5), weights)
    assert torch.equal(mf.dual_similarity(terms, activation, 1.0), weights)
    seen = activation.correlation()[:12, 12:][None]
    assert torch.equal(mf.dual_similarity(terms, activation, 0.0), seen)
    assert torch.equal(mf.dual_similarity([], activation, 0.7), seen)


def test_pending_samples_are_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    activation, truth = mf.Covariance(4), mf.reference.Covariance(4)
    for _ in range(3):
        batch = [torch.randn(5, 4, generator=generator) for _ in range(2)]
        activation.update(batch)
        truth.update(batch)
        terms: Terms = [[torch.eye(4), torch.eye(4)]]
        got, want = mf.dual_similarity(terms, activation, 0.5), mf.reference.dual_similarity(terms, truth, 0.5)
        assert float((got - want).abs().max()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("mean", [0.0, 10.0, 1000.0])
@pytest.mark.parametrize("size", [1e-20, 1e-4, 1.0, 1e15])
def test_means_and_scales_do_not_matter(isa: str, mean: float, size: float) -> None:
    terms: Terms = [[(w * size).float() for w in matrices(25, 300, mean=mean)]]
    assert largest_error(terms) < 1e-5


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("value", [0.0, 1000.0, 0.1])
def test_dead_rows(isa: str, dtype: torch.dtype, value: float) -> None:
    terms: Terms = [[w.to(dtype) for w in matrices(10, 333)]]
    terms[0][1][4] = value  # type: ignore[index]
    full, cross = mf.weight_similarity(terms, "full"), mf.weight_similarity(terms)
    row = torch.zeros(20, dtype=full.dtype)
    row[14] = 1
    assert torch.equal(full[14], row)
    assert torch.equal(cross[0, :, 4], row[:10])
    assert largest_error(terms) < TOLERANCE[dtype]


def test_threads_do_not_change_a_bit(isa: str) -> None:
    before = torch.get_num_threads()
    activation = mf.Covariance(150)
    activation.update([torch.randn(30, 150, generator=torch.Generator().manual_seed(0)) for _ in range(2)])
    for scope in ("full", "cross"):
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                mf.dual_similarity([matrices(150, 700), [w.float() for w in matrices(150, 90)]], activation, 0.5, scope)
            )
        torch.set_num_threads(before)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


W = torch.ones(4, 3)
BAD = {
    "no terms": (lambda: mf.weight_similarity([]), ValueError, "at least one tensor"),
    "nothing at all": (lambda: mf.dual_similarity([], None, 0.5), ValueError, "at least one tensor"),
    "scope": (lambda: mf.weight_similarity([[W, W]], "half"), ValueError, "scope"),
    "balance above 1": (lambda: mf.dual_similarity([[W, W]], None, 1.5), ValueError, "balance"),
    "balance nan": (lambda: mf.dual_similarity([[W, W]], None, float("nan")), ValueError, "balance"),
    "balance in words": (lambda: mf.dual_similarity([[W, W]], None, "half"), TypeError, "balance: expected a number"),  # type: ignore[arg-type]
    "a number for terms": (lambda: mf.weight_similarity(3), TypeError, "terms: expected a sequence"),  # type: ignore[arg-type]
    "dim in words": (
        lambda: mf.weight_similarity([[mf.Term(W, "rows"), W]]),  # type: ignore[arg-type]
        TypeError,
        r"terms\[0\]\[0\].dim: expected an integer",
    ),
    "bare labels": (
        lambda: mf.weight_similarity([[mf.Term(W, 0, torch.arange(3))] * 2]),  # type: ignore[arg-type]
        TypeError,
        r"terms\[0\]\[0\].labels: expected a mapping",
    ),
    "scale in words": (
        lambda: mf.weight_similarity([[mf.Term(W, 0, {1: torch.arange(3)}, "mean")] * 2]),  # type: ignore[arg-type]
        TypeError,
        r"terms\[0\]\[0\].scale: expected a tensor",
    ),
    "scale of lists": (
        lambda: mf.weight_similarity([[mf.Term(W, 0, {1: torch.arange(3)}, {1: [1.0] * 3})] * 2]),  # type: ignore[dict-item]
        TypeError,
        r"terms\[0\]\[0\].scale: expected a real tensor, got list",
    ),
    "one model": (lambda: mf.weight_similarity([[W]]), ValueError, "one entry for each of 2 models"),
    "a tensor for a row": (lambda: mf.weight_similarity([W, W]), TypeError, r"terms\[0\]"),
    "a model lacks a term": (lambda: mf.weight_similarity([[W, W], [W]]), ValueError, r"terms\[1\]"),
    "units differ": (lambda: mf.weight_similarity([[W, W.T]]), ValueError, r"terms\[0\]\[1\]: expected 4 units"),
    "columns differ": (
        lambda: mf.weight_similarity([[W, W[:, :2]]]),
        ValueError,
        r"terms\[0\]\[1\]: expected 3 columns",
    ),
    "terms differ": (lambda: mf.weight_similarity([[W, W], [W.T, W.T]]), ValueError, r"terms\[1\]\[0\]"),
    "integers": (lambda: mf.weight_similarity([[W, W.long()]]), TypeError, r"terms\[0\]\[1\]"),
    "not a tensor": (lambda: mf.weight_similarity([[W, 3]]), TypeError, r"terms\[0\]\[1\]"),
    "cube": (lambda: mf.weight_similarity([[W[None], W[None]]]), ValueError, "use Term"),
    "nan": (lambda: mf.weight_similarity([[W, W], [W, W * float("nan")]]), ValueError, r"terms\[1\]: expected finite"),
    "inf": (lambda: mf.weight_similarity([[W / 0, W]], "full"), ValueError, r"terms\[0\]: expected finite"),
    "dim": (lambda: mf.weight_similarity([[mf.Term(W, 2), W]]), ValueError, r"terms\[0\]\[0\].dim"),
    "dim twice": (lambda: mf.weight_similarity([[mf.Term(W, (0, 0)), W]]), ValueError, "twice"),
    "label dim": (
        lambda: mf.weight_similarity([[mf.Term(W, 0, {0: torch.arange(4)}), W]]),
        ValueError,
        "twice",
    ),
    "label length": (lambda: mf.weight_similarity([[mf.Term(W, 0, {1: torch.arange(4)})] * 2]), ValueError, "labels"),
    "label type": (lambda: mf.weight_similarity([[mf.Term(W, 0, {1: torch.ones(3)})] * 2]), TypeError, "labels"),
    "label sign": (
        lambda: mf.weight_similarity([[mf.Term(W, 0, {1: torch.tensor([0, -1, 1])})] * 2]),
        ValueError,
        "labels",
    ),
    "labels of one model": (
        lambda: mf.weight_similarity([[mf.Term(W, 0, {1: torch.arange(3)}), W]]),
        ValueError,
        "same dims in every model",
    ),
    "scale length": (
        lambda: mf.weight_similarity([[mf.Term(W, 0, {1: torch.arange(3)}, torch.ones(2))] * 2]),
        ValueError,
        "scale",
    ),
    "scale key": (
        lambda: mf.weight_similarity([[mf.Term(W, 0, {1: torch.arange(3)}, {0: torch.ones(3)})] * 2]),
        ValueError,
        "scale",
    ),
    "bare scale": (lambda: mf.weight_similarity([[mf.Term(W, 0, None, torch.ones(3))] * 2]), ValueError, "scale"),
    "activation type": (lambda: mf.dual_similarity([[W, W]], W, 0.5), TypeError, "activation"),  # type: ignore[arg-type]
    "activation empty": (lambda: mf.dual_similarity([[W, W]], mf.Covariance(4), 0.5), ValueError, "samples"),
    "activation width": (
        lambda: mf.dual_similarity([[W, W]], seen(5), 0.5),
        ValueError,
        "activation: expected 2 models of 4",
    ),
    "activation models": (lambda: mf.dual_similarity([[W, W]], seen(4, 3), 0.5), ValueError, "activation"),
    "activation scope": (lambda: mf.dual_similarity([[W, W]], seen(4, 2, "cross"), 0.5, "full"), ValueError, "scope"),
    "backend": (lambda: mf.weight_similarity([[W, W]], backend="abacus"), ValueError, "abacus"),
}


def seen(width: int, models: int = 2, scope: str = "full") -> mf.Covariance:
    covariance = mf.Covariance(width, models, scope)
    covariance.update([torch.eye(width)] * models)
    return covariance


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input(case: str) -> None:
    call, error, words = BAD[case]
    with pytest.raises(error, match=words):
        call()


def test_the_kernel_guards_its_memory() -> None:
    out, good = torch.empty(1, 2, 2), (torch.ones(2, 3), (0,), [])
    labels = torch.tensor([0, 1, 5])
    for bad, words in (
        ((torch.ones(2, 3), (0,), [((1,), labels, 3, None)]), "labels"),
        ((torch.ones(2, 3), (0,), [((0,), labels[:2], 3, None)]), "twice"),
        ((torch.ones(2, 3), (2,), []), "out of range"),
        ((torch.ones(3, 2), (0,), []), "units"),
        ((torch.ones(2, 2), (0,), []), "columns"),
    ):
        with pytest.raises(ValueError, match=words):
            _core.similarity([[good, bad]], 2, 2, True, 1.0, None, out, 1)


def test_inputs_are_left_alone_and_detached() -> None:
    pair = [w.float().requires_grad_() for w in matrices(6, 9)]
    copies = [w.detach().clone() for w in pair]
    assert not mf.weight_similarity([pair]).requires_grad
    assert all(torch.equal(x, y) for x, y in zip(pair, copies, strict=True))
