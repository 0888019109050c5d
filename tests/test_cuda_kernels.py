"""The CUDA C++ kernels on a GPU, held against the CPU kernels and the float64 reference. Part of `make gpu`."""

from __future__ import annotations

import signal

import pytest
import torch
from test_zip import similarity_of
from torch import Tensor

import mudsc_fast as mf

pytestmark = pytest.mark.cuda


def correlated(d: int, dtype: torch.dtype, seed: int, ties: bool = False) -> Tensor:
    s = similarity_of(d, 2, seed)
    return ((s * 4).round() / 4 if ties else s).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("d", [1, 2, 31, 32, 33, 127, 300, 700])
def test_zip_gives_the_labels_of_the_cpu(d: int, dtype: torch.dtype) -> None:
    for ties in (False, True):
        for options in ({}, {"budget": 0.25}, {"attenuation": 1.0}, {"attenuation": 0.0, "width": d + d // 2}):
            s = correlated(d, dtype, d, ties)
            try:
                want = mf.zip_units(s, **options)
            except ValueError as error:
                with pytest.raises(ValueError, match=str(error)[:40]):
                    mf.zip_units(s.cuda(), backend="cuda", **options)
                continue
            got = mf.zip_units(s.cuda(), backend="cuda", **options)
            assert got.labels.is_cuda
            assert torch.equal(got.labels.cpu(), want.labels)
            assert float(got.value) == float(want.value)


@pytest.mark.parametrize("budget", [1.0, 0.5, 0.1])
@pytest.mark.parametrize(("d", "blocks"), [(48, 4), (96, 12), (300, 3), (260, 260)])
def test_zip_in_blocks_side_by_side(d: int, blocks: int, budget: float) -> None:
    s = correlated(d, torch.float32, blocks)
    want = mf.zip_units(s, blocks=blocks, budget=budget)
    got = mf.zip_units(s.cuda(), blocks=blocks, budget=budget, backend="cuda")
    assert torch.equal(got.labels.cpu(), want.labels)
    assert float(got.value) == pytest.approx(float(want.value), rel=1e-12)


def test_zip_of_strided_and_half_inputs_and_of_three_models() -> None:
    s = similarity_of(60, 3, 5)
    wide = torch.zeros(180, 540, dtype=torch.float64)[:, ::3].copy_(s)
    want = mf.zip_units(s, 3)
    for x in (wide.cuda(), s.t().cuda().t(), s.cuda()):
        assert torch.equal(mf.zip_units(x, 3, backend="cuda").labels.cpu(), want.labels)
    half = s.half()
    assert torch.equal(mf.zip_units(half.cuda(), 3, backend="cuda").labels.cpu(), mf.zip_units(half.float(), 3).labels)


def test_a_zip_can_be_stopped() -> None:
    x = torch.rand(16384, 16384, device="cuda")
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            [mf.zip_units(x + x.T, backend="cuda") for _ in range(100)]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    s = correlated(40, torch.float32, 3)
    assert torch.equal(mf.zip_units(s.cuda(), backend="cuda").labels.cpu(), mf.zip_units(s).labels)


def test_zip_refuses_what_the_cpu_refuses() -> None:
    s = correlated(40, torch.float32, 1)
    for change, message in (((3, 70), "finite"), ((70, 3), "finite")):
        broken = s.clone()
        broken[change] = torch.nan
        with pytest.raises(ValueError, match=message):
            mf.zip_units(broken.cuda(), backend="cuda")
    s[3, 70] += 0.1
    with pytest.raises(ValueError, match="symmetric"):
        mf.zip_units(s.cuda(), backend="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 64, 100, 128, 255, 256])
def test_assign_is_optimal_and_proven(n: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(n)
    random = torch.randn(7, n, n, generator=generator).to(dtype)
    related = random.clone()
    related[:, torch.arange(n), torch.randperm(n, generator=generator)] += 4
    products = (torch.arange(n)[:, None] * torch.arange(n)).to(dtype).expand(2, n, n)
    for s in (random, related, products, torch.zeros(3, n, n, dtype=dtype), random.transpose(1, 2)):
        got, want = mf.assign(s.cuda(), backend="cuda"), mf.assign(s)
        assert got.indices.is_cuda
        assert torch.equal(got.indices.sort(-1).values.cpu(), torch.arange(n).expand(len(s), n))
        scale = float(s.abs().max()) + 1e-30
        torch.testing.assert_close(got.value.cpu(), want.value, rtol=0, atol=1e-9 * scale)
        u, v = got.duals
        assert bool((u[..., :, None] + v[..., None, :] >= s.double().cuda() - 1e-12 * scale).all())
        assert float(got.gap.abs().max()) <= 1e-9 * n * scale
        again = mf.assign(s.cuda(), got.duals, backend="cuda")
        torch.testing.assert_close(again.value, got.value, rtol=0, atol=1e-9 * scale)


def test_assign_of_blocks_and_of_too_many_rows() -> None:
    s = torch.randn(96, 96)
    got, want = mf.assign_blocks(s.cuda(), 8), mf.assign_blocks(s, 8)
    assert float(got.value) == pytest.approx(float(want.value), abs=1e-9)
    with pytest.raises(ValueError, match="does not run 'assign'"):
        mf.assign(torch.randn(257, 257).cuda(), backend="cuda")
    broken = torch.randn(3, 9, 9)
    broken[1, 4, 4] = torch.inf
    with pytest.raises(ValueError, match="finite"):
        mf.assign(broken.cuda(), backend="cuda")


def test_kernels_run_on_the_callers_stream() -> None:
    x = torch.randn(512, 512, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = x.clone()
        for _ in range(50):
            late = late @ x / 512
        moved = mf.regroup(late, torch.arange(511, -1, -1), 0, 512, backend="cuda")
        expected = late.flip(0)
    stream.synchronize()
    assert torch.equal(moved, expected)


def test_too_little_memory_says_how_much_is_needed() -> None:
    s = torch.zeros(1, 1, device="cuda").expand(400_000, 400_000)
    with pytest.raises(torch.OutOfMemoryError, match=r"needs \d+\.\d+ GiB of scratch memory"):
        mf.zip_units(s, backend="cuda")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_gpu_than_the_current_one() -> None:
    s = correlated(50, torch.float32, 2)
    got = mf.zip_units(s.to("cuda:1"), backend="cuda")
    assert got.labels.device == torch.device("cuda:1")
    assert torch.equal(got.labels.cpu(), mf.zip_units(s).labels)
    assert torch.cuda.current_device() == 0
