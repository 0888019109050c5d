"""Every case of `kernels`, one test each. Run by tests/test_triton_interpreted.py in a process with
TRITON_INTERPRET=1."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import interpreted_kernels as kernels
import interpreted_setup as setup
import interpreter_fixes
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from interpreted_covariances import covariance_error

import mudsc_fast as mf
from mudsc_fast.backends.triton import candidates, covariance_sums, similarity_tiles
from mudsc_fast.similarity import checked_tables


@pytest.mark.parametrize("case", [c for c in kernels.CASES if not c.extra], ids=lambda case: case.name)
def test_case(case: kernels.Case) -> None:
    assert case.error(0) <= case.tolerance


@triton.jit
def _round_trip(x, y, z, N: tl.constexpr):
    at = tl.arange(0, N)
    half = tl.load(x + at).to(tl.bfloat16)
    tl.store(y + at, half)
    tl.store(z + at, half.to(tl.float32))


@triton.jit
def _product(a, b, c, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)))


def test_bfloat16_rounds_as_hardware_does() -> None:
    # To nearest, ties to even (PTX cvt.rn.bf16.f32): the neighbours of ties, subnormals, overflow, signed zeros, NaN.
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    ties = (torch.arange(0x3F00, 0x4100, dtype=torch.int32)[:, None] << 16) + torch.tensor([0x7FFF, 0x8000, 0x8001])
    special = torch.tensor([0x0, -(2**31), 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x1, 0x8000, 0x18000, 0x7F7F8000])
    x = torch.cat((bits, ties.flatten().to(torch.int32), special.to(torch.int32)))
    x = torch.cat((x, x.new_zeros(8192 - len(x)))).view(torch.float32)
    y, z = torch.empty(8192, dtype=torch.bfloat16), torch.empty(8192)
    _round_trip[(1,)](x, y, z, N=8192)
    wanted = x.to(torch.bfloat16)
    assert torch.equal(y.isnan(), x.isnan())
    kept = ~x.isnan()
    assert torch.equal(y[kept].view(torch.int16), wanted[kept].view(torch.int16))
    assert torch.equal(z[kept], wanted[kept].float())
    # By hand: 1 + 2**-8 is a tie between 1 and 1 + 2**-7, and goes to the even one; a little more goes up.
    assert interpreter_fixes.rounded(np.float32([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20])).tolist() == [
        0x3F80, 0x3F82, 0x3F81
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_are_exact_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randint(-8, 9, (32, 32), generator=generator).to(dtype) / 8 for _ in range(2))
    c = torch.empty(32, 32)
    _product[(1,)](a, b, c, N=32)
    assert torch.equal(c, a.float() @ b.float())


def test_the_rule_chooses_by_mean_over_deviation() -> None:
    for ratio, raw in ((0.0, True), (1.6, True), (3.0, False), (100.0, False)):
        batch = [x.bfloat16() for x in setup.features(300, 9, 2, ratio)]
        assert covariance_error([batch], raw=raw) <= setup.CORRELATION, ratio


def _passes_of_their_own(*args: object, **options: object) -> None:
    raise AssertionError("a batch that is read in place was read for its sums alone")


@pytest.mark.parametrize("scope", ["full", "cross"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_of_raw_batches_come_with_their_product(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, scope: str
) -> None:
    monkeypatch.setattr(covariance_sums, "split", _passes_of_their_own)
    whole = [x.to(dtype) for x in setup.features(301, 97, 3, 0.3)]
    whole[1][:, 5] = 0.0
    made = []
    for _ in range(2):
        with setup.cut_as(setup.OBLONG, setup.SMALL):
            made.append(mf.Covariance(97, 3, scope, backend="triton"))
            for part in (slice(0, 150), slice(150, 301)):
                made[-1].update([x[part] for x in whole])
    x = torch.cat(whole, dim=1).double()
    sums, squares = made[0]._sums.vectors[2:]
    assert made[0]._sums.raw
    assert float(((sums - x.sum(dim=0)).abs() / x.abs().sum(dim=0).clamp(min=1e-300)).max()) <= 2**-21
    assert float(((squares - x.square().sum(dim=0)).abs() / x.square().sum(dim=0).clamp(min=1e-300)).max()) <= 2**-21
    assert float(squares[102]) == float(sums[102]) == 0.0
    # Chunks shared out or not, each sum is written once and added up in one order.
    assert torch.equal(made[0]._sums.vectors, made[1]._sums.vectors)


def test_a_column_that_float32_cannot_judge_is_judged_by_a_pass_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    one = covariance_sums.split
    monkeypatch.setattr(covariance_sums, "split", lambda *args: seen.append(len(seen)) or one(*args))
    for value, passes in ((0.0, 0), (0.1, 2), (float("nan"), 4)):
        batch = [x.half() for x in setup.features(200, 40)]
        batch[0][:, 7] = value
        wanted = mf.reference.Covariance(40)
        with setup.cut_as(setup.SMALL):
            found = mf.Covariance(40, backend="triton")
            found.update(batch)
        wanted.update(batch)
        assert len(seen) == passes, value
        assert found._sums.raw
        assert setup.distance(found.correlation(), wanted.correlation()) <= setup.CORRELATION
        seen.clear()


def test_chunks_near_the_diagonal_are_as_short_as_the_batch_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    # Guessed from the batch before, and multiplied again where that was too long; the rest follows the batch itself.
    lengths: list[int] = []
    one = covariance_sums.diagonal_products
    monkeypatch.setattr(covariance_sums, "diagonal_products", lambda *args: lengths.append(args[-1]) or one(*args))
    found, wanted = mf.Covariance(40, 2, "cross", backend="triton"), mf.reference.Covariance(40, 2, "cross")
    with setup.cut_as(setup.SMALL):
        for samples, ratio in ((100, 0.0), (100, 0.0), (900, 1.5), (100, 1.5)):
            batch = [x.bfloat16() for x in setup.features(samples, 40, 2, ratio)]
            found.update(batch)
            wanted.update(batch)
    assert found._sums.raw
    assert lengths == [1, 4, 4, 2, 2]
    assert setup.distance(found.correlation(), wanted.correlation()) <= setup.CORRELATION


def test_the_op_takes_the_sums_along_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(covariance_sums, "split", _passes_of_their_own)
    for scope in ("full", "cross"):
        batch = [x.bfloat16() for x in setup.features(130, 40, 3)]
        sums = mf.Covariance(40, 3, scope, backend="triton")._sums
        with setup.cut_as(setup.SMALL):
            for _ in range(2):
                covariance_sums.add_to(sums.gram, sums.vectors, batch, -1, 1, 40, 3, scope == "cross")
        x = torch.cat(batch, dim=1).double()
        wanted = 2 * (x.T @ x)[sums._rows, sums._columns]
        got = sums.gram.double()
        if scope == "full":
            wanted, got = wanted.triu(), got.triu()
        assert float((got - wanted).abs().max()) <= 1e-6 * 260
        assert float((sums.vectors[2] - 2 * x.sum(dim=0)).abs().max()) <= 1e-6 * 260
        assert float((sums.vectors[3] - 2 * x.square().sum(dim=0)).abs().max()) <= 1e-6 * 260


def test_squares_along_the_diagonal_are_refused_where_they_do_not_fit() -> None:
    from mudsc_fast.backends.triton.diagonal import diagonal_products
    from mudsc_fast.backends.triton.product import Operand

    x = Operand(torch.ones(40, 40, dtype=torch.bfloat16))
    for config, band in ((setup.OBLONG, 64), (setup.SMALL, 48)):
        with pytest.raises(ValueError, match="config: expected square tiles"):
            diagonal_products(x, x, config, band, True, False)


def test_three_planes_are_as_exact_as_a_float32_product() -> None:
    x = setup.features(300, 17)
    batch = [y.float() for y in x]
    stacked = torch.cat([y - y.mean(dim=0) for y in batch], dim=1)
    wanted = stacked.double().T @ stacked.double()
    size = stacked.double().abs().T @ stacked.double().abs()
    theirs = float(((stacked.T @ stacked - wanted).abs() / size).max())
    with setup.cut_as(setup.SMALL):
        found = mf.Covariance(17, backend="triton")
        found.update(batch)
    sums = found._sums
    scale = sums.vectors[1]
    gram = (sums.gram.double() / scale[:, None] / scale).triu()
    ours = float(((gram - wanted.triu()).abs() / size).max())
    assert ours <= 2 * theirs, (ours, theirs)


def test_a_failed_launch_leaves_the_sums_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    covariance = mf.Covariance(8, backend="triton")
    batch = [x.bfloat16() for x in setup.features(20, 8)]
    covariance.update(batch)
    monkeypatch.setattr(covariance_sums, "add_product", _broken)
    with pytest.raises(RuntimeError, match="add_kernel"):
        covariance.update(batch)
    monkeypatch.undo()
    for use in (covariance.correlation, covariance.state_dict, lambda: covariance.update(batch)):
        with pytest.raises(RuntimeError, match=r"unusable.*add_kernel"):
            use()


def test_a_batch_that_fails_before_the_sums_are_touched_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    covariance = mf.Covariance(8, backend="triton")
    batch = [x.bfloat16() for x in setup.features(20, 8)]
    covariance.update(batch)
    before = covariance.correlation()
    for step, given in (("diagonal_products", batch), ("split", [x.float() for x in batch])):
        monkeypatch.setattr(covariance_sums, step, _broken)
        with pytest.raises(RuntimeError, match="add_kernel"):
            covariance.update(given)
        monkeypatch.undo()
        assert covariance.count == 20
        assert torch.equal(covariance.correlation(), before)


def test_the_document_counts_the_cases() -> None:
    text = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text(encoding="utf-8")
    shown = {name: int(n) for name, n in re.findall(r"^\|[^|]+\| `(\w+\.\w+_kernel)` \|[^|]+\| (\d+) \|", text, re.M)}
    counted = Counter(kernel for case in kernels.CASES for kernel in case.kernels)
    assert {name: n for name, n in shown.items() if name in counted} == counted


def _broken(*args: object, **options: object) -> None:
    raise RuntimeError("product.add_kernel failed on cpu: OutOfResources")


def test_too_little_memory_says_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(MemoryError, match=r'1\.00 GiB.*scope="cross" needs less'):
        mf.Covariance(8192, backend="triton")


def test_weights_that_are_not_finite_are_named() -> None:
    good = [torch.ones(4, 3), torch.eye(4)[:, :3]]
    bad = [torch.ones(4, 2), torch.full((4, 2), float("nan"))]
    with pytest.raises(ValueError, match=r"terms\[1\].*NaN"):
        mf.weight_similarity([good, bad], backend="triton")


def test_what_is_not_finite_is_named_by_its_row() -> None:
    tile, prices = torch.randn(7, 20), torch.zeros(20, dtype=torch.float64)
    for bad in ("nan", "inf", "-inf"):
        tile[2, 1] = float(bad)
        for room in (0, 5):
            for one in (tile, tile.double()):
                with setup.few_columns(), pytest.raises(ValueError, match="row 5"):
                    candidates.assign_tile(one, 3, prices, room)


def test_rows_come_out_the_same_with_whatever_others(monkeypatch: pytest.MonkeyPatch) -> None:
    # Several pieces, strips of one tile row or more: the bits of a row do not depend on its company.
    monkeypatch.setattr(similarity_tiles, "WORKSPACE", 1)
    monkeypatch.setattr(similarity_tiles, "STRIP", 64)
    terms = [[w.float() for w in setup.matrices(70, 150, 2)]]
    with setup.cut_as(setup.SMALL):
        tiles = similarity_tiles.Similarities(checked_tables(terms)[0], 70, 2, 1.0, None, setup.CPU)
        whole = tiles.rows(torch.arange(70))
        for some in (torch.tensor([69]), torch.tensor([3, 40, 66, 3]), torch.arange(31, 69)):
            assert torch.equal(tiles.rows(some), whole[some])


def test_candidates_check_what_they_are_given() -> None:
    tiles = similarity_tiles.Similarities(checked_tables([[torch.eye(4), torch.eye(4)]])[0], 4, 2, 1.0, None, setup.CPU)
    for call, words in (
        (lambda: tiles.candidates(5), "k: expected 1..4"),
        (lambda: tiles.candidates(2, m=2), "m: expected 1..1"),
        (lambda: tiles.candidates(2, torch.zeros(3)), "prices: expected shape"),
        (lambda: tiles.rows(torch.tensor([4])), r"wanted: expected units 0\.\.3"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_the_gpu_benchmark_runs() -> None:
    # At toy sizes: that it runs and checks its results; the times mean nothing here.
    from benchmarks import gpu_triton

    with setup.cut_as(setup.SMALL):
        found = gpu_triton.rows(setup.CPU, small=True, rounds=1)
        assert found["failures"] == []
        assert len(found["rows"]) == 4
        assert all(row["error"] <= setup.CORRELATION for row in found["rows"])
        tuned = gpu_triton.tune(setup.CPU, 40, 64, rounds=1)
    assert tuned["tuned"] == {use: {"90": setup.SMALL.name} for use in ("add", "blend")}
    assert not [row for row in tuned["tried"] if "failed" in row]
