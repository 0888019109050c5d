"""regroup against the float64 reference: every type, axis, stride pattern, instruction set and thread count."""

from __future__ import annotations

import sys

import golden_cases
import pytest
import torch
import torch_versions
from torch import Tensor

import mudsc_fast as mf
from mudsc_fast import _core

# Sums of a handful of values: one rounding of the result's type for each member, and one of the scale.
TOLERANCE = {torch.float64: 1e-15, torch.float32: 4e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}
MOVED = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64)
SHAPES = ((7,), (5, 9), (33, 17), (4, 6, 5), (16, 3, 3, 3), (2, 3, 4, 5, 2), (1, 1), (257, 130))


def tensors_of(shape: tuple[int, ...], dtype: torch.dtype) -> list[tuple[str, Tensor]]:
    """The same shape in several memory layouts."""
    generator = torch.Generator().manual_seed(len(shape))
    base = torch.randn(shape, generator=generator)
    if dtype.is_complex:
        dense = torch.complex(base, base.flip(0))
    else:
        dense = base.to(dtype) if dtype.is_floating_point else (base * 50).to(dtype)
    reversed_axes = tuple(reversed(range(len(shape))))
    wide = torch.zeros([2 * n + 1 for n in shape], dtype=dtype)
    strided = wide[tuple(slice(1, None, 2) for _ in shape)]
    strided.copy_(dense)
    return [
        ("dense", dense),
        ("transposed", dense.permute(reversed_axes).contiguous().permute(reversed_axes)),
        ("strided", strided),
        ("expanded", dense[:1].expand(shape)),
    ]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_sums_agree_with_the_reference(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    for layout, tensor in tensors_of(shape, dtype):
        for dim in range(-1, len(shape)):
            size = max(1, 2 * shape[dim] // 3)
            labels = torch.randint(size, (shape[dim],), generator=generator)
            scale = torch.rand(size, generator=generator) + 0.5
            for by in (None, scale):
                got = mf.regroup(tensor, labels, dim, size, by)
                want = mf.reference.regroup(tensor, labels, dim, size, by)
                magnitude = mf.reference.regroup(tensor.abs(), labels, dim, size, by)
                assert got.dtype == dtype
                assert got.shape == want.shape
                allowed = TOLERANCE[dtype] * magnitude + (1e-7 if dtype == torch.float16 else 0)
                assert bool(((got.double() - want).abs() <= allowed).all()), (layout, dim, by is None)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [*TOLERANCE, *MOVED], ids=str)
def test_permutations_are_exact_gathers(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    for layout, tensor in tensors_of(shape, dtype):
        for dim in range(len(shape)):
            indices = torch.randperm(shape[dim], generator=generator)
            labels = torch.empty_like(indices)
            labels[indices] = torch.arange(shape[dim])
            got = mf.regroup(tensor, labels, dim, shape[dim])
            assert torch.equal(got, tensor.index_select(dim, indices)), (layout, dim)


def test_float8_can_be_moved(isa: str) -> None:
    tensor = torch.randn(6, 10).to(torch.float8_e4m3fn)
    got = mf.regroup(tensor, torch.arange(9, -1, -1), 1, 10)
    assert torch.equal(got.float(), tensor.float().flip(1))
    with pytest.raises(TypeError, match="can only be moved"):
        mf.regroup(tensor, torch.zeros(10, dtype=torch.int64), 1, 1)


def test_units_without_members_are_zero(isa: str) -> None:
    tensor = torch.randn(4, 6)
    got = mf.regroup(tensor, torch.tensor([0, 2, 5, 7, 8, 9]), 1, 11)
    assert torch.equal(got[:, [1, 3, 4, 6, 10]], torch.zeros(4, 5))
    assert torch.equal(got[:, [0, 2, 5, 7, 8, 9]], tensor)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (3, 0, 2)], ids=str)
def test_empty_tensors(isa: str, shape: tuple[int, ...]) -> None:
    tensor = torch.zeros(shape)
    for dim in range(len(shape)):
        got = mf.regroup(tensor, torch.zeros(shape[dim], dtype=torch.int64), dim, 2)
        assert torch.equal(got, torch.zeros([2 if d == dim else n for d, n in enumerate(shape)]))


def test_large_results_stream_past_the_cache(isa: str) -> None:
    # 16 MiB and 12 MiB results, past the size from which stores bypass the cache; odd row lengths misalign the rows.
    for shape in ((1021, 4099), (3, 1021, 1023)):
        tensor = torch.randn(shape)
        for dim in range(len(shape)):
            indices = torch.randperm(shape[dim])
            got = mf.regroup(tensor, indices.argsort(), dim, shape[dim])
            assert torch.equal(got, tensor.index_select(dim, indices))
        labels = torch.arange(1021) // 2
        got = mf.regroup(tensor, labels, len(shape) - 2, 511)
        want = mf.reference.regroup(tensor, labels, len(shape) - 2, 511)
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.int8], ids=str)
def test_units_of_every_short_length(isa: str, dtype: torch.dtype) -> None:
    # Runs are moved as wide vectors that go past their end, at the end of a tensor too: 1 to 40 elements, odd counts.
    generator = torch.Generator().manual_seed(3)
    for length in range(1, 41):
        units = 67 - length // 2
        tensor = (20 * torch.randn(3, units, length, generator=generator)).to(dtype)
        indices = torch.randperm(units, generator=generator)
        assert torch.equal(mf.regroup(tensor, indices.argsort(), 1, units), tensor[:, indices]), length
        spread = torch.zeros(3, 2 * units, length, dtype=dtype)
        spread[:, 2 * indices + 1] = tensor
        assert torch.equal(mf.regroup(tensor, 2 * indices + 1, 1, 2 * units), spread), length
        if dtype.is_floating_point:
            got = mf.regroup(tensor, indices // 2, 1, units // 2 + 1, torch.full((units // 2 + 1,), 0.5))
            want = mf.reference.regroup(tensor, indices // 2, 1, units // 2 + 1, torch.full((units // 2 + 1,), 0.5))
            assert bool(((got.double() - want).abs() <= 100 * TOLERANCE[dtype]).all()), length


@pytest.mark.parametrize("shape", [(40, 130, 1), (3, 70, 9), (3, 20, 200)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_means_are_rounded_as_torch_rounds(isa: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    # All bit patterns, so subnormal numbers, infinities and NaN too; members are added in float32, in their order.
    generator = torch.Generator().manual_seed(4)
    bits = torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=torch.int16)
    bits[..., ::3] &= ~0x7F00  # many small ones
    tensor = bits.view(dtype)
    size = (shape[1] + 1) // 2
    pairs, mixed = (
        torch.randperm(shape[1], generator=generator) // 2,
        torch.randint(size, shape[1:2], generator=generator),
    )
    for labels, factor in ((pairs, 1.0), (pairs, 0.5), (pairs, 0.3), (mixed, 0.3)):
        want = torch.zeros(shape[0], size, shape[2]).index_add_(1, labels, tensor.float()).mul_(factor).to(dtype)
        got = mf.regroup(tensor, labels, 1, size, torch.full((size,), factor))
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scaled", ["alike", "each", "none"])
def test_means_of_nine_elements_stay_in_their_rows(isa: str, scaled: str) -> None:
    # Rows of 1 to 40 units of 3 x 3: alone in memory, and in the middle of longer rows that are to stay as they were.
    generator = torch.Generator().manual_seed(5)
    for units in range(1, 41):
        bits = torch.randint(-(2**15), 2**15, (3, 2 * units + 2, 3, 3), generator=generator, dtype=torch.int16)
        bits[::2] = (bits[::2] & 0x3FF) + 0x3F00  # the middle row alone has NaN, infinities and subnormal numbers
        bits[2, -3, 2, 2] = 1
        wide = bits.view(torch.bfloat16)
        labels = torch.randperm(2 * units, generator=generator) // 2
        scale = {"alike": torch.full((units,), 0.5), "each": torch.rand(units, generator=generator), "none": None}[
            scaled
        ]
        for tensor in (wide[:, 1:-1].contiguous(), wide[:, 1:-1], wide[1:2, 1:-1]):
            want = torch.zeros(tensor.shape[0], units, 3, 3).index_add_(1, labels, tensor.float())
            want = (want if scale is None else want * scale[:, None, None]).bfloat16()
            room = torch.full((tensor.shape[0], units + 4, 3, 3), 7.0, dtype=torch.bfloat16)
            mf.regroup(tensor, labels, 1, units, scale, out=room[:, 2:-2])
            for got in (room[:, 2:-2], mf.regroup(tensor, labels, 1, units, scale)):
                torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
            assert bool((room[:, :2] == 7).all())
            assert bool((room[:, -2:] == 7).all())


def test_threads_change_nothing(isa: str) -> None:
    tensor = torch.randn(300, 5000)
    labels = torch.randint(3000, (5000,))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(mf.regroup(tensor, labels, 1, 3000))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(("inputs", "expected"), [c[1:] for c in golden_cases.regroup_cases()])
def test_goldens(isa: str, inputs: dict, expected: dict) -> None:
    # The official code adds 1e-5 to its normalisation.
    torch.testing.assert_close(mf.regroup(**inputs), expected["tensor"], rtol=2e-5, atol=1e-5)


def test_usual_calls_and_checked_ones_agree(isa: str, threads: int) -> None:
    # A plain call takes a shorter way; a named backend is checked argument by argument.
    tensor, labels = torch.randn(5, 40, 6), torch.randint(30, (40,))
    for scale in (None, torch.rand(30), torch.rand(30, dtype=torch.float64)[::1]):
        for source in (tensor, tensor.transpose(0, 2).contiguous().transpose(0, 2)):
            got, want = (mf.regroup(source, labels, 1, 30, scale, backend=name) for name in ("auto", "cpu"))
            assert torch.equal(got, want)
            assert got.stride() == want.stride()


def test_out_is_written_and_returned(isa: str) -> None:
    tensor = torch.randn(5, 8)
    out = torch.full((8, 5), torch.nan).t()
    got = mf.regroup(tensor, torch.arange(8).flip(0), 1, 8, out=out)
    assert got is out
    assert torch.equal(out, tensor.flip(1))


def test_input_is_detached_and_unchanged() -> None:
    tensor = torch.randn(5, 8, requires_grad=True)
    before = tensor.detach().clone()
    got = mf.regroup(tensor, torch.zeros(8, dtype=torch.int64), 1, 1)
    assert not got.requires_grad
    assert torch.equal(tensor.detach(), before)


def test_wider_than_the_kernel_takes_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 12 dimensions"):
        mf.regroup(torch.zeros([1] * 13), torch.zeros(1, dtype=torch.int64), 0, 1)


T = torch.zeros(3, 4)
L = torch.tensor([0, 1, 2, 3])
BAD = {
    "not a tensor": (TypeError, "tensor: expected a torch.Tensor", ([1.0], L, 0, 4), {}),
    "scalar": (ValueError, "at least one axis", (torch.tensor(1.0), L, 0, 4), {}),
    "dim": (ValueError, "dim: expected -2..1", (T, L, 2, 4), {}),
    "dim in words": (TypeError, "dim: expected an integer, got 'rows'", (T, L, "rows", 4), {}),
    "dim of floats": (TypeError, "dim: expected an integer, got 1.0", (T, L, 1.0, 4), {}),
    "sparse": (TypeError, "tensor: expected a dense tensor", (T.to_sparse(), L, 1, 4), {}),
    "size": (ValueError, "size: expected", (T, L, 1, -1), {}),
    "float labels": (TypeError, "labels: expected an integer tensor", (T, L.float(), 1, 4), {}),
    "labels shape": (ValueError, r"labels: expected shape \(3,\)", (T, L, 0, 4), {}),
    "labels range": (ValueError, "labels: expected 0 <= label < 3, got 0..3", (T, L, 1, 3), {}),
    "negative labels": (ValueError, "got -1", (T, L - 1, 1, 4), {}),
    "scale shape": (ValueError, r"scale: expected shape \(4,\)", (T, L, 1, 4, torch.ones(3)), {}),
    "scale type": (TypeError, "scale: expected a real tensor", (T, L, 1, 4, [1.0]), {}),
    "sum of integers": (TypeError, "can only be moved", (T.int(), L // 2, 1, 2), {}),
    "scaled integers": (TypeError, "can only be moved", (T.int(), L, 1, 4, torch.ones(4)), {}),
    "out shape": (ValueError, "out: expected shape", (T, L, 1, 4), {"out": torch.zeros(4, 3)}),
    "out dtype": (ValueError, "out: expected shape", (T, L, 1, 4), {"out": T.double()}),
    "out overlaps itself": (ValueError, "overlapping", (T, L, 1, 4), {"out": torch.zeros(1, 4).expand(3, 4)}),
    "out overlaps tensor": (ValueError, "apart from", (T, L, 1, 4), {"out": T}),
    "out requires grad": (ValueError, "require grad", (T, L, 1, 4), {"out": torch.zeros(3, 4, requires_grad=True)}),
    "backend": (ValueError, "backend: 'abacus' does not run 'regroup'", (T, L, 1, 4), {"backend": "abacus"}),
    "wrong device's backend": (ValueError, "does not run 'regroup' on 'cpu'", (T, L, 1, 4), {"backend": "cuda"}),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_named(case: str) -> None:
    error, message, args, kwargs = BAD[case]
    with pytest.raises(error, match=message):
        mf.regroup(*args, **kwargs)


def test_the_kernel_guards_memory_itself() -> None:
    out = torch.empty(3, 4)
    ptr = torch.arange(5)
    with pytest.raises(ValueError, match="members: out of range"):
        _core.regroup(T, out, 1, ptr, torch.tensor([0, 1, 2, 4]), None, 1)
    with pytest.raises(ValueError, match="ptr: must not fall"):
        _core.regroup(T, out, 1, torch.tensor([0, 2, 1, 3, 4]), L, None, 1)
    with pytest.raises(ValueError, match="differ in shape"):
        _core.regroup(T, torch.empty(2, 4), 1, ptr, L, None, 1)
    with pytest.raises(TypeError, match="tensor: expected a tensor, got list"):
        _core.regroup([1], out, 1, ptr, L, None, 1)


@pytest.mark.cuda
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [*TOLERANCE, *MOVED[:-1]], ids=str)
def test_cuda_agrees_with_the_cpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for _, tensor in tensors_of(shape, dtype):
        for dim in range(len(shape)):
            moved = torch.randperm(shape[dim])
            got = mf.regroup(tensor.cuda(), moved, dim, shape[dim], backend="cuda")
            assert torch.equal(got.cpu(), mf.regroup(tensor, moved, dim, shape[dim]))
            if dtype.is_floating_point:
                labels = moved // 2
                got = mf.regroup(tensor.cuda(), labels, dim, shape[dim], torch.rand(shape[dim]).fill_(0.75))
                want = mf.regroup(tensor, labels, dim, shape[dim], torch.rand(shape[dim]).fill_(0.75))
                assert torch.equal(got.cpu(), want)


TILED = ((16, 33), (65, 129), (31, 300), (7, 21, 3, 3), (5, 37, 3, 3), (4, 50, 5, 5), (3, 40, 2), (2, 19, 17))


@pytest.mark.parametrize("shape", TILED, ids=str)
@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.int8], ids=str)
def test_tiles_of_rows_and_short_runs(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Whole tiles, one row or unit past them, and units of a few elements; nothing outside the result is written."""
    generator = torch.Generator().manual_seed(5)
    tensor = (torch.randn(shape, generator=generator) * 20).to(dtype)
    units = shape[1]
    order = torch.randperm(units, generator=generator)
    around = torch.zeros(shape[0] + 2, *shape[1:], dtype=dtype)
    mf.regroup(tensor, order.argsort(), 1, units, out=around[1:-1])
    assert torch.equal(around[1:-1], tensor.index_select(1, order))
    assert not around[0].any()
    assert not around[-1].any()
    sparse = torch.arange(units) * 3 // 2
    got = mf.regroup(tensor, sparse, 1, int(sparse.max()) + 2)
    assert torch.equal(got.index_select(1, sparse), tensor)
    assert int((got != 0).sum()) == int((tensor != 0).sum())
    if dtype == torch.int8:
        return
    labels = torch.randint(units // 2 + 1, (units,), generator=generator)
    scale = torch.rand(units // 2 + 1, generator=generator) + 0.5
    got = mf.regroup(tensor, labels, 1, units // 2 + 1, scale)
    want = mf.reference.regroup(tensor, labels, 1, units // 2 + 1, scale)
    allowed = TOLERANCE[dtype] * mf.reference.regroup(tensor.abs(), labels, 1, units // 2 + 1, scale) + 1e-7
    assert bool(((got.double() - want).abs() <= allowed).all())


@pytest.mark.parametrize("shape", [(17, 128), (33, 256), (16, 130), (19, 262), (8, 1, 70)], ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_pairs_in_tiles_have_factors_of_their_own(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Rows that are read in turns, whole and with a rest; factors that are no float32; one unit that is no pair."""
    generator = torch.Generator().manual_seed(6)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    tensor = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    size = shape[-1] // 2
    scale = torch.rand(size, generator=generator, dtype=torch.float64) - 0.5
    labels = torch.randperm(shape[-1], generator=generator) // 2
    for uneven in (False, True):
        labels[labels == size - 20] = size - 20 - uneven
        want = torch.zeros(*shape[:-1], size, dtype=acc).index_add_(-1, labels, tensor.to(acc))
        for by, expected in ((scale, want * scale.to(acc)), (None, want)):
            around = torch.full((shape[0] + 2, *shape[1:-1], size + 2), 7, dtype=dtype)
            mf.regroup(tensor, labels, -1, size, by, out=around[1:-1, ..., 1:-1])
            assert torch.equal(around[1:-1, ..., 1:-1], expected.to(dtype)), (uneven, by is None)
            around[1:-1, ..., 1:-1] = 7
            assert bool((around == 7).all())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.float32, torch.float64], ids=str)
def test_gathers_from_a_wider_axis(isa: str, dtype: torch.dtype) -> None:
    # The kernel takes any members, also ones that come twice: of rows in tiles, and of short units.
    generator = torch.Generator().manual_seed(7)
    for shape, dim in (((33, 300), 1), ((18, 256), 1), ((3, 90, 3, 3), 1), ((2, 90, 7), 1)):
        tensor = (torch.randn(shape, generator=generator) * 20).to(dtype)
        for units in (4, 37, 64):
            members = torch.randint(shape[dim], (units,), generator=generator)
            out = torch.empty([units if d == dim else n for d, n in enumerate(shape)], dtype=dtype)
            _core.regroup(tensor, out, dim, torch.arange(units + 1), members, None, 1)
            assert torch.equal(out, tensor.index_select(dim, members)), (shape, units)


def test_moved_units_of_nine_stay_in_their_rows(isa: str) -> None:
    # 1 to 70 units of 3 x 3 with 16 bits: alone in memory, and in the middle of longer rows that are to stay.
    generator = torch.Generator().manual_seed(8)
    for units in range(1, 71):
        wide = torch.randint(-(2**15), 2**15, (3, units + 2, 3, 3), generator=generator, dtype=torch.int16)
        order = torch.randperm(units, generator=generator)
        for tensor in (wide[:, 1:-1].contiguous(), wide[:, 1:-1], wide[1:2, 1:-1]):
            room = torch.full((tensor.shape[0], units + 4, 3, 3), 7, dtype=torch.int16)
            mf.regroup(tensor, order.argsort(), 1, units, out=room[:, 2:-2])
            assert torch.equal(room[:, 2:-2], tensor[:, order]), units
            room[:, 2:-2] = 7
            assert bool((room == 7).all()), units


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(40, 33), (3, 33, 3, 3), (3, 33, 40)], ids=str)
def test_sums_keep_what_is_not_finite(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.ones(shape, dtype=dtype)
    tensor[1, 4] = float("nan")
    tensor[2, 6] = float("inf")
    tensor[0, 8], tensor[0, 9] = float("inf"), -float("inf")
    got = mf.regroup(tensor, torch.arange(33) // 2, 1, 17)
    want = mf.reference.regroup(tensor, torch.arange(33) // 2, 1, 17)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(0.0, 9.0, -9.0).double(), want.nan_to_num(0.0, 9.0, -9.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_factor_that_is_no_number_gives_none(isa: str, dtype: torch.dtype) -> None:
    scale = torch.full((16,), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # rounding its bits would carry over
    for shape in ((40, 32), (3, 32, 3, 3), (3, 32, 40)):
        got = mf.regroup(torch.ones(shape, dtype=dtype), torch.arange(32) // 2, 1, 16, scale)
        assert bool(got.isnan().all()), shape


def test_strides_past_32_bits(isa: str) -> None:
    store = torch.empty(2**31 + 128, dtype=torch.int16)  # 4 GiB of addresses, of which a few pages are touched
    values = torch.randint(-1000, 1000, (3, 40), dtype=torch.int16)
    for shape, steps in (((3, 40), (2**30, 1)), ((40, 3), (1, 2**30))):
        tensor = store.as_strided(shape, steps)
        tensor.copy_(values if shape == (3, 40) else values.T)
        for dim in (0, 1):
            order = torch.randperm(shape[dim])
            got = mf.regroup(tensor, order.argsort(), dim, shape[dim])
            assert torch.equal(got, tensor.index_select(dim, order))


def test_a_torch_that_describes_no_tensor_in_place() -> None:
    # Older ones have no exchange table, or a number in its place: tensors then come in capsules, with the same result.
    code = (
        "x = torch.arange(24.0).reshape(2, 4, 3)\n"
        "out, labels, scale = torch.empty(2, 2, 3), torch.tensor([1, 0, 1, 0]), torch.tensor([0.5, 2.0])\n"
        "mf.regroup(x, labels, 1, 2, scale, out=out)\n"
        "mirrored = torch.complex(x, x).conj().imag\n"
        "print(out.tolist(), mf.regroup(mirrored, labels, 1, 2).tolist())\n"
        "try: mf.regroup(x.to_sparse(), labels, 1, 2, out=out)\n"
        "except RuntimeError as error: print(error)\n"
    )
    shown = torch_versions.printed(code)
    x, labels, scale = torch.arange(24.0).reshape(2, 4, 3), torch.tensor([1, 0, 1, 0]), torch.tensor([0.5, 2.0])
    want = mf.reference.regroup(x, labels, 1, 2, scale).tolist(), mf.reference.regroup(-x, labels, 1, 2).tolist()
    assert shown[0].startswith(f"{want[0]} {want[1]}\n")
    assert shown[1] == shown[2] == shown[0]


def test_calls_keep_no_reference_and_change_none() -> None:
    x, labels, scale = torch.randn(3, 8), torch.arange(8) // 2, torch.rand(4)
    out = torch.empty(3, 4)
    given = (x, labels, scale, out, None, True, False)
    before = [sys.getrefcount(one) for one in given]
    for _ in range(1000):
        assert mf.regroup(x, labels, 1, 4, scale, out=out) is out
        mf.regroup(x, labels, 1, 4, out=out)
        with pytest.raises(ValueError, match=r"labels: expected 0 <= label < 3"):
            mf.regroup(x, labels, 1, 3, scale[:3], out=out[:, :3])
    assert all(abs(sys.getrefcount(one) - count) < 500 for one, count in zip(given, before, strict=True))


@pytest.mark.parametrize("dim", [2**70, -(2**70)])
def test_a_dim_past_64_bits_is_refused_by_name(dim: int) -> None:
    with pytest.raises(ValueError, match=r"dim: expected -2\.\.1"):
        mf.regroup(torch.randn(3, 8), torch.arange(8), dim, 8, out=torch.empty(3, 8))


def test_a_tensor_without_memory_is_refused() -> None:
    labels = torch.tensor([2, 0, 1])
    with pytest.raises(ValueError, match=r"has no memory of its own, as inside torch\.func"):
        torch.func.functionalize(lambda x: mf.regroup(x, labels, 0, 3))(torch.ones(3, 2))
    with pytest.raises(ValueError, match="has no memory of its own"):
        torch.func.functionalize(lambda x: mf.zip_units(x))(torch.ones(4, 4))
    assert mf.regroup(torch.ones(0, 2), torch.ones(0, dtype=torch.int64), 0, 3).shape == (3, 2)
