"""Covariance against the float64 reference and the recorded outputs, on every instruction set."""

from __future__ import annotations

import golden_cases
import pytest
import torch
from torch import Tensor

import mudsc_fast as mf
from mudsc_fast import _core

# Largest error of a correlation. float32: products are rounded to 6e-8 of sums that reach about 1000 samples times the
# variance; what is promised is 1e-5. float64: sums of that length. 16-bit inputs are compared on their own values.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5, torch.float64: 1e-12}
FLOAT32_USUAL = 2e-6

PANEL = _core.gram_panel
DEPTH = _core.gram_depth


def features(samples: int, width: int, models: int = 2, ratio: float = 0.0, seed: int = 0) -> list[Tensor]:
    """Correlated units of standard deviation about 1 and mean `ratio`, float64."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    shared = torch.randn(samples, width, generator=generator, dtype=torch.float64)
    for m in range(models):
        mixed = shared.roll(m, 1) + 0.7 * torch.randn(samples, width, generator=generator, dtype=torch.float64)
        made.append(mixed / 1.22 + ratio * (1 if m % 2 == 0 else -1))
    return made


def reference_of(batches: list[list[Tensor]], width: int, scope: str = "full", dim: int = -1) -> Tensor:
    """Correlation by the reference, float64."""
    models = len(batches[0])
    reference = mf.reference.Covariance(width, models, scope)
    for batch in batches:
        reference.update(batch, dim)
    return reference.correlation()


def largest_error(batches: list[list[Tensor]], width: int, scope: str = "full", dim: int = -1) -> float:
    covariance = mf.Covariance(width, len(batches[0]), scope)
    for batch in batches:
        covariance.update(batch, dim)
    return float((covariance.correlation() - reference_of(batches, width, scope, dim)).abs().max())


def split(batch: list[Tensor], sizes: list[int]) -> list[list[Tensor]]:
    return [list(parts) for parts in zip(*(x.split(sizes) for x in batch), strict=True)]


@pytest.mark.parametrize("scope", ["full", "cross"])
def test_goldens(isa: str, scope: str) -> None:
    for name, inputs, expected in golden_cases.covariance_cases():
        covariance = mf.Covariance(inputs["width"], 2, scope)
        for batch in inputs["batches"]:
            covariance.update(batch, inputs["dim"])
        want = expected["correlation"]
        if scope == "cross":
            want = want[: inputs["width"], inputs["width"] :][None]
        got = covariance.correlation()
        assert got.dtype == torch.float32
        assert torch.allclose(got.double(), want, atol=FLOAT32_USUAL, rtol=0), name


@pytest.mark.parametrize("scope", ["full", "cross"])
@pytest.mark.parametrize("models", [2, 3])
@pytest.mark.parametrize("width", [1, 2, 5, 7, 8, 15, 16, 17, 23, 24, 25, 47, 48, 49, 97, 131])
def test_widths_around_the_kernels_tiles(isa: str, width: int, models: int, scope: str) -> None:
    batches = [features(70, width, models, seed=width)]
    batches = [[x.float() for x in batch] for batch in batches]
    assert largest_error(batches, width, scope) < FLOAT32_USUAL
    assert largest_error([[x.double() for x in batch] for batch in batches], width, scope) < 1e-12


@pytest.mark.parametrize("width", [200, 389])
def test_widths_past_a_task(isa: str, width: int) -> None:
    batches = [[x.float() for x in features(64, width, 2, seed=1)]]
    for scope in ("full", "cross"):
        assert largest_error(batches, width, scope) < FLOAT32_USUAL


@pytest.mark.parametrize("samples", [1, 2, 3, 63, 64, 65, 255, 256, 257, DEPTH - 1, DEPTH, DEPTH + 1, 2 * DEPTH + 3])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_numbers_of_samples(isa: str, samples: int, dtype: torch.dtype) -> None:
    batch = [x.to(dtype) for x in features(samples, 19, seed=samples)]
    tolerance = 1e-12 if dtype == torch.float64 else FLOAT32_USUAL
    assert largest_error([batch], 19) < tolerance


@pytest.mark.parametrize("ratio", [0, 1, 2, 3, 10, 100, 1000])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_any_splitting_at_any_mean(isa: str, ratio: float, dtype: torch.dtype) -> None:
    samples, width = 1400, 29
    batch = [x.to(dtype) for x in features(samples, width, ratio=ratio)]
    want = reference_of([batch], width)
    splits = [[samples], [1, *[7] * 9, *[33] * 20, 676], [1, 511, 512, 376], [1] * samples]
    for sizes in splits if isa == _core.isa() else splits[:2]:
        covariance = mf.Covariance(width)
        for part in split(batch, sizes):
            covariance.update(part)
        assert float((covariance.correlation() - want).abs().max()) < TOLERANCE[dtype], sizes[:3]
        assert covariance.count == samples


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("sizes", [[1, 2, 3, 500, 94], [300, 300], [100] * 6])
def test_reading_between_batches_changes_nothing(isa: str, dtype: torch.dtype, sizes: list[int]) -> None:
    batch = [x.to(dtype) for x in features(600, 21, ratio=100)]
    covariance = mf.Covariance(21)
    for part in split(batch, sizes):
        covariance.update(part)
        first = covariance.correlation()
        assert torch.equal(first, covariance.correlation())
    assert float((covariance.correlation() - reference_of([batch], 21)).abs().max()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_drifting_means(isa: str, dtype: torch.dtype) -> None:
    batches = []
    for b in range(40):
        drift = (b - 10) * torch.linspace(-50, 50, 24, dtype=torch.float64)
        batches.append([(x + drift).to(dtype) for x in features(40, 24, seed=b)])
    batches.append([(x + 1e4).to(dtype) for x in features(3, 24, seed=99)])
    assert largest_error(batches, 24) < 1e-5


def test_an_outlier_in_front() -> None:
    batch = [x.float() for x in features(20000, 16)]
    for x in batch:
        x[0] = 1e4
    assert largest_error(split(batch, [1, 19999]), 16) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ratio", [0.0, 2.0, 1000.0])
def test_a_million_samples(dtype: torch.dtype, ratio: float) -> None:
    width, piece = 12, 50_000
    covariance, reference = mf.Covariance(width), mf.reference.Covariance(width)
    for b in range(20):
        batch = [x.to(dtype) for x in features(piece, width, ratio=ratio, seed=b)]
        covariance.update(batch)
        reference.update(batch)
    assert covariance.count == 1_000_000
    assert float((covariance.correlation() - reference.correlation()).abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_layouts_are_read_in_place(isa: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    width = 50
    image = torch.randn(3, width, 5, 7, generator=generator).to(dtype)
    layouts = {
        "channels first": (image, 1),
        "channels last": (image.contiguous(memory_format=torch.channels_last), 1),
        "transposed": (image.transpose(2, 3), 1),
        "every second": (torch.randn(3, 2 * width, 5, 7, generator=generator).to(dtype)[:, ::2], 1),
        "tokens": (torch.randn(4, 9, width, generator=generator).to(dtype), -1),
        "token slice": (torch.randn(4, 9, 3 * width, generator=generator).to(dtype)[:, 1:, width : 2 * width], 2),
        "expanded": (torch.randn(1, 9, width, generator=generator).to(dtype).expand(3, 9, width), -1),
        "columns": (torch.randn(width, 40, generator=generator).to(dtype), 0),
        "vector": (torch.randn(width, generator=generator).to(dtype), 0),
    }
    for name, (x, dim) in layouts.items():
        other = x.flip(dim).contiguous() * 2 + x.roll(1, dim)
        covariance = mf.Covariance(width)
        covariance.update([x, other], dim)
        want = reference_of([[x, other]], width, dim=dim)
        assert float((covariance.correlation() - want).abs().max()) < TOLERANCE[dtype], name


def test_models_may_differ_in_strides_and_types(isa: str) -> None:
    a, b, c = features(100, 33, 3, ratio=3)
    mixed = [a.bfloat16(), b.half().T.contiguous().T, c.float()[:, None].expand(100, 2, 33)[:, 1]]
    assert largest_error([mixed, [a.bfloat16(), b.bfloat16(), c.bfloat16()], mixed], 33) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_usual_batches_are_checked_in_one_step(dtype: torch.dtype) -> None:
    x, y = (part.to(dtype) for part in features(24, 6))
    quick, plain = mf.Covariance(6), mf.Covariance(6)
    for batch, dim in (([x, y], -1), ((x[:1], y[:1]), 1), ([x.T, y.T.contiguous()], 0), ([x.view(2, 12, 6)] * 2, -1)):
        assert quick._sums.update_plain(batch, dim)
        plain._sums.update([part.detach() for part in batch], dim % batch[0].dim())
    assert quick.count == plain.count == 24 + 1 + 24 + 24
    assert torch.equal(quick.correlation(), plain.correlation())
    leaf = x.float().requires_grad_()
    assert quick._sums.update_plain([leaf, y], -1)
    negated = torch.complex(x.float(), x.float()).conj().imag
    assert negated.is_neg()
    shared = [x, y, x]
    for refused, dim in (
        ([x], -1), (shared, -1), ([x, y[:3]], -1), ([x, y[:, :5]], -1), ([x, y.double()], -1), ([x, y.long()], -1),
        ([x, y.float().to_sparse()], -1), ([x, negated], -1), ([x, torch.nn.Parameter(y)], -1), ([x[:0], y[:0]], -1),
        ([x, y[None]], 1), ([x, y], 2), ([x, y], 0), (iter([x, y]), -1), ([x, y.tolist()], -1), (x, -1),
    ):  # fmt: skip
        before = quick.count
        assert not quick._sums.update_plain(refused, dim), dim
        assert quick.count == before
    for wrong in (2**40, -(2**70), 3):
        with pytest.raises(ValueError, match="dim"):
            quick.update([x, y], wrong)


def every_dtype() -> list[torch.dtype]:
    found = [getattr(torch, name) for name in dir(torch)]
    return sorted({x for x in found if isinstance(x, torch.dtype)}, key=str)


@pytest.mark.filterwarnings("ignore")
def test_the_quick_ways_leave_types_alone_that_dlpack_may_not_know() -> None:
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    for dtype in every_dtype():
        try:
            x = torch.empty(4, 4, dtype=dtype)
        except RuntimeError:  # no tensor has it
            continue
        assert (_core.describe([x, x], 2) is not None) == (dtype in floats), dtype
        covariance = mf.Covariance(4)
        assert covariance._sums.update_plain([x, x], -1) == (dtype in floats and dtype != torch.float64), dtype
        if not x.is_floating_point():
            with pytest.raises(TypeError, match=r"features\[0\]"):
                covariance.update([x, x])


def test_types_may_change_between_batches(isa: str) -> None:
    batch = features(90, 20, ratio=1)
    parts = split(batch, [30, 30, 30])
    for order in ([torch.bfloat16, torch.float32, torch.bfloat16], [torch.float16, torch.bfloat16, torch.float32]):
        mixed = [[x.to(t) for x in part] for part, t in zip(parts, order, strict=True)]
        assert largest_error(mixed, 20) < 1e-5
    covariance = mf.Covariance(20)
    covariance.update([x.float() for x in parts[0]])
    covariance.update(parts[1])
    assert covariance.correlation().dtype == torch.float64
    want = reference_of([[x.float() for x in parts[0]], parts[1]], 20)
    assert float((covariance.correlation() - want).abs().max()) < 1e-6


def test_threads_do_not_change_a_bit(isa: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        batch = [x.to(dtype) for x in features(300, 250, ratio=1)]
        results = []
        before = torch.get_num_threads()
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            covariance = mf.Covariance(250)
            for part in split(batch, [1, 77, 222]):
                covariance.update(part)
            results.append(covariance.correlation())
        torch.set_num_threads(before)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


def test_full_is_exactly_symmetric_with_diagonal_1(isa: str) -> None:
    covariance = mf.Covariance(61)
    covariance.update([x.float() for x in features(100, 61)])
    correlation = covariance.correlation()
    assert torch.equal(correlation, correlation.T)
    assert torch.equal(correlation.diagonal(), torch.ones(122))
    assert float(correlation.abs().max()) <= 1


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("value", [0.0, 1000.0, 0.1, -3e-5])
def test_dead_units(isa: str, dtype: torch.dtype, value: float) -> None:
    for sizes in ([200], [1, 199], [50, 70, 80], [1] * 200):
        batch = [x.to(dtype) for x in features(200, 18)]
        batch[0][:, 5] = value
        batch[1][:, 0] = value
        covariance = mf.Covariance(18)
        for part in split(batch, sizes):
            covariance.update(part)
        got = covariance.correlation()
        for dead in (5, 18):
            row = torch.zeros(36, dtype=got.dtype)
            row[dead] = 1
            assert torch.equal(got[dead], row)
        assert float((got - reference_of([batch], 18)).abs().max()) < 1e-5
        assert covariance.variance[0, 5] <= 1e-12 * max(value * value, 1e-12)


@pytest.mark.parametrize("size", [1e-25, 1e-12, 1e-4, 1e4, 1e18])
def test_scales_do_not_matter(isa: str, size: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        batch = [(x * size).to(dtype) for x in features(150, 20, ratio=2)]
        assert largest_error(split(batch, [1, 149]), 20) < 1e-5
        assert largest_error([batch], 20, "cross") < 1e-5


def test_sums_past_float32_are_refused() -> None:
    covariance = mf.Covariance(3)
    covariance.update([torch.zeros(2, 3)] * 2)
    covariance.update([torch.randn(5, 3) * 1e25] * 2)
    with pytest.raises(ValueError, match="float64"):
        covariance.correlation()


def test_non_finite_entries_count_as_zero(isa: str) -> None:
    for dtype in TOLERANCE:
        batch = [x.to(dtype) for x in features(120, 14, ratio=1)]
        batch[0][3, 2] = float("nan")
        batch[0][0, 1] = float("inf")
        batch[1][7, 13] = -float("inf")
        assert largest_error([batch], 14) < TOLERANCE[dtype]


def test_moments() -> None:
    batch = features(333, 9, ratio=100)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-7), (torch.bfloat16, 2e-7)):
        typed = [x.to(dtype) for x in batch]
        covariance, reference = mf.Covariance(9), mf.reference.Covariance(9)
        for part in split(typed, [1, 32, 300]):
            covariance.update(part)
        reference.update(typed)
        assert covariance.count == 333
        assert covariance.mean.shape == covariance.variance.shape == (2, 9)
        assert torch.allclose(covariance.mean.double(), reference.mean, rtol=tolerance, atol=0)
        assert torch.allclose(covariance.variance.double(), reference.variance, rtol=10 * tolerance, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_stream_that_repeats_itself(isa: str, dtype: torch.dtype) -> None:
    # The same rows over and over are rounded the same way each time: errors add up instead of cancelling out.
    repeats = 2**14 if isa == _core.isa() else 2**11
    for ratio in (0.0, 1.5):
        x = features(64, 5, 1, ratio=ratio)[0].to(dtype)
        two = x[torch.arange(64) // 16 * 16]  # four different rows, each many times
        for rows in (x, two):
            big = rows.as_strided((repeats, 64, 5), (0, 5, 1))
            assert largest_error([[big, big.roll(1, 2)]], 5) < 1e-5


@pytest.mark.parametrize("ratio", [0.0, 0.7, 1.2])
def test_bfloat16_is_multiplied_as_it_is_while_means_are_small(ratio: float) -> None:
    if _core.isa() != "avx512_bf16":
        pytest.skip("this machine has no bfloat16 dot products")
    covariance = mf.Covariance(100)
    parts = [[x.bfloat16() for x in features(600, 100, ratio=ratio, seed=b)] for b in range(3)]
    parts[0][0][:, 3] += 40  # one unit in the first of five panels: only that panel is shifted
    for part in parts[1:]:
        part[0][:, 3] += 40
    for part in parts:
        covariance.update(part)
    shifted = covariance.state_dict()["vectors"][0].reshape(-1, PANEL) != 0
    assert shifted.any(dim=1).tolist() == [True, False, False, False, False]
    assert float((covariance.correlation() - reference_of(parts, 100)).abs().max()) < 1e-5


@pytest.mark.parametrize("ratio", [2.0, 8.0])
def test_bfloat16_is_shifted_where_means_are_large(isa: str, ratio: float) -> None:
    parts = [[x.bfloat16() for x in features(600, 50, ratio=ratio, seed=b)] for b in range(3)]
    covariance = mf.Covariance(50)
    for part in parts:
        covariance.update(part)
    assert bool((covariance.state_dict()["vectors"][0, :100] != 0).all())
    assert float((covariance.correlation() - reference_of(parts, 50)).abs().max()) < 1e-5


def test_a_mean_that_grows_past_the_bound(isa: str) -> None:
    parts = [[(x + 0.3 * b).bfloat16() for x in features(500, 20, seed=b)] for b in range(20)]
    assert largest_error(parts, 20) < 1e-5


def test_strides_past_32_bits(isa: str) -> None:
    # Only the pages that are touched take memory.
    store = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    for dims, step in (((40, 6), (2**31 // 39, 1)), ((40, 6), (1, 2**31 // 5))):
        x = store.as_strided(dims, step)
        x.copy_(features(40, 6, 1)[0])
        assert largest_error([[x, x.flip(1)]], 6) < 1e-5
