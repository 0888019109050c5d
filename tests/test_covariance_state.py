"""Covariance's merging, states, errors and side effects."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from test_covariance import TOLERANCE, features, reference_of, split
from torch import Tensor

import mudsc_fast as mf
from mudsc_fast import _core
from mudsc_fast.backends.torch_device import TorchCovariance

PANEL = _core.gram_panel


@pytest.mark.parametrize("scope", ["full", "cross"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_merge(isa: str, scope: str, dtype: torch.dtype) -> None:
    batch = [x.to(dtype) for x in features(700, 30, 3, ratio=1000)]
    batch[2][:100] += 500
    want = reference_of([batch], 30, scope)
    for sizes in ([1, 699], [699, 1], [350, 350]):
        made = []
        for part in split(batch, sizes):
            made.append(mf.Covariance(30, 3, scope))
            made[-1].update(part)
        kept = made[1].correlation()
        made[0].merge(made[1])
        made[0].merge(mf.Covariance(30, 3, scope))
        assert made[0].count == 700
        assert float((made[0].correlation() - want).abs().max()) < TOLERANCE[dtype]
        assert torch.equal(made[1].correlation(), kept)
    empty = mf.Covariance(30, 3, scope)
    empty.merge(made[0])
    assert float((empty.correlation() - want).abs().max()) < TOLERANCE[dtype]


def test_merge_with_itself_and_of_two_precisions() -> None:
    batch = features(50, 8, ratio=10)
    double, single = mf.Covariance(8), mf.Covariance(8)
    double.update(batch)
    single.update([x.float() for x in batch])
    before = double.correlation()
    double.merge(double)
    assert double.count == 100
    assert torch.allclose(double.correlation(), before, atol=1e-13, rtol=0)
    single.merge(double)
    assert single.count == 150
    assert single.correlation().dtype == torch.float64
    assert torch.allclose(single.correlation(), before, atol=1e-6, rtol=0)


@pytest.mark.parametrize("scope", ["full", "cross"])
def test_state_round_trip(scope: str) -> None:
    covariance = mf.Covariance(10, 3, scope)
    batch = [x.float() for x in features(80, 10, 3)]
    for part in split(batch, [30, 50]):
        covariance.update(part)
        restored = mf.Covariance.from_state_dict(covariance.state_dict())
        assert torch.equal(restored.correlation(), covariance.correlation())
        assert torch.equal(copy.deepcopy(covariance).correlation(), covariance.correlation())
    assert all(isinstance(value, (int, Tensor)) for value in covariance.state_dict().values())
    restored.update(batch)
    covariance.update(batch)
    assert torch.equal(restored.correlation(), covariance.correlation())
    assert covariance.count == 160


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_torch_accumulators(cross: bool, dtype: torch.dtype) -> None:
    width, models, scope = 51, 3, "cross" if cross else "full"
    batch = [x.to(dtype) for x in features(200, width, models, ratio=1000)]
    want = reference_of([batch], width, scope)
    sums = TorchCovariance(width, models, cross, torch.device("cpu"))
    other = TorchCovariance(width, models, cross, torch.device("cpu"))
    if dtype == torch.float64:
        sums.widen()
        other.widen()
    first, second, third = split(batch, [1, 120, 79])
    sums.update(first, 1)
    sums.update(second, 1)
    other.update(third, 1)
    sums.merge(other)
    assert float((sums.correlation(cross) - want).abs().max()) < TOLERANCE[dtype]
    if not cross:
        cut = want.reshape(models, width, models, width)[0, :, 1:].permute(1, 0, 2)
        assert float((sums.correlation(True) - cut).abs().max()) < TOLERANCE[dtype]
    # Its state opens on the CPU kernels, and theirs in it.
    moved = mf.Covariance(width, models, scope)
    state = {**moved.state_dict(), "block": 0, "count": sums.count, "gram": sums.gram, "vectors": sums.vectors}
    state["wide"] = int(dtype == torch.float64)
    moved = mf.Covariance.from_state_dict(state)
    assert float((moved.correlation() - want).abs().max()) < TOLERANCE[dtype]
    from mudsc_fast.covariance import relayout

    back = moved.state_dict()
    gram, vectors = relayout(back["gram"], back["vectors"], width, models, cross, PANEL, 0)
    sums.load(gram, vectors, back["count"], dtype)
    assert float((sums.correlation(cross) - want).abs().max()) < TOLERANCE[dtype]


def test_all_reduce_of_one_process(tmp_path: object) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        covariance = mf.Covariance(6)
        covariance.update([x.float() for x in features(40, 6)])
        before = covariance.correlation()
        covariance.all_reduce()
        assert covariance.count == 40
        assert torch.equal(covariance.correlation(), before)
    finally:
        dist.destroy_process_group()


GOOD = [torch.zeros(4, 3), torch.zeros(4, 3)]
BAD_UPDATES = {
    "empty batch": ([torch.zeros(0, 3)] * 2, -1, ValueError, "at least one sample"),
    "wrong width": ([torch.zeros(4, 5), torch.zeros(4, 3)], -1, ValueError, "3 units"),
    "unequal samples": ([torch.zeros(4, 3), torch.zeros(5, 3)], -1, ValueError, "as many samples"),
    "one model": ([torch.zeros(4, 3)], -1, ValueError, "one tensor a model"),
    "a tensor": (torch.zeros(2, 4, 3), -1, TypeError, "sequence"),
    "a list": ([[0.0] * 3, torch.zeros(1, 3)], -1, TypeError, r"features\[0\]"),
    "integers": ([torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.int64)], -1, TypeError, r"features\[1\]"),
    "complex": ([torch.zeros(4, 3, dtype=torch.complex64)] * 2, -1, TypeError, "floating"),
    "sparse": ([torch.zeros(4, 3).to_sparse()] * 2, -1, TypeError, "dense"),
    "no such axis": (GOOD, 2, ValueError, "dim"),
    "an axis in words": (GOOD, "units", TypeError, "dim: expected an integer, got 'units'"),
    "no axis": (GOOD, None, TypeError, "dim: expected an integer, got None"),
    "another device": ([torch.zeros(4, 3), torch.zeros(4, 3, device="meta")], -1, ValueError, "on cpu"),
}


@pytest.mark.parametrize("case", list(BAD_UPDATES))
def test_bad_updates_lose_nothing(case: str) -> None:
    bad, dim, error, words = BAD_UPDATES[case]
    covariance = mf.Covariance(3)
    covariance.update([torch.eye(3), torch.eye(3)])
    before = covariance.correlation()
    with pytest.raises(error, match=words):
        covariance.update(bad, dim)
    assert covariance.count == 3
    assert torch.equal(covariance.correlation(), before)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"width": 0}, "width"),
        ({"width": 3.0}, "width"),
        ({"width": 3, "models": 1}, "models"),
        ({"width": 3, "scope": "half"}, "scope"),
        ({"width": 3, "backend": "abacus"}, "abacus"),
    ],
)
def test_bad_constructions(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        mf.Covariance(**arguments)  # type: ignore[arg-type]


def test_reading_nothing_is_an_error() -> None:
    covariance = mf.Covariance(3)
    for read in (covariance.correlation, lambda: covariance.mean, lambda: covariance.variance):
        with pytest.raises(ValueError, match="at least one sample"):
            read()
    assert covariance.count == 0


def test_bad_merges_and_states() -> None:
    covariance = mf.Covariance(3)
    with pytest.raises(TypeError, match="Covariance"):
        covariance.merge(3)  # type: ignore[arg-type]
    for other in (mf.Covariance(4), mf.Covariance(3, 3), mf.Covariance(3, scope="cross")):
        with pytest.raises(ValueError, match="other: expected"):
            covariance.merge(other)
    state = covariance.state_dict()
    with pytest.raises(ValueError, match="missing"):
        mf.Covariance.from_state_dict({"width": 3})
    with pytest.raises(ValueError, match="shape"):
        mf.Covariance.from_state_dict({**state, "gram": torch.zeros(2, 48, 48)})
    with pytest.raises(TypeError, match="state: expected a mapping"):
        mf.Covariance.from_state_dict(3)  # type: ignore[arg-type]
    for key, value in (
        ("width", "three"),
        ("count", torch.zeros(2)),
        ("gram", [0.0]),
        ("vectors", torch.zeros(4).int()),
    ):
        with pytest.raises(TypeError, match=f"state: expected .* as '{key}'"):
            mf.Covariance.from_state_dict({**state, key: value})


def test_inputs_that_require_grad_are_detached_and_left_alone() -> None:
    batch = [x.float().requires_grad_() for x in features(20, 4)]
    copies = [x.detach().clone() for x in batch]
    covariance = mf.Covariance(4)
    covariance.update(batch)
    assert not covariance.correlation().requires_grad
    assert all(torch.equal(x, y) for x, y in zip(batch, copies, strict=True))


def test_float8_is_taken() -> None:
    batch = [x.to(torch.float8_e4m3fn) for x in features(64, 6)]
    want = reference_of([[x.float() for x in batch]], 6)
    covariance = mf.Covariance(6)
    covariance.update(batch)
    assert float((covariance.correlation() - want).abs().max()) < 1e-5


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no transparent huge pages")
def test_large_sums_lie_in_huge_pages() -> None:
    made = mf.Covariance(1024, 2)
    middle = made._sums.gram.data_ptr() + made._sums.gram.nbytes // 2
    inside, flags = False, []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= middle < int(span[2], 16)
        elif inside and line.startswith("VmFlags:"):
            flags += line.split()[1:]
    assert "hg" in flags
