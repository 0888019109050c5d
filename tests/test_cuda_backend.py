"""What backends/cuda.py does around the kernels: shared budgets, statuses, memory. The kernels are stand-ins."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mudsc_fast import _core
from mudsc_fast.backends import cpu, cuda


class FakeCore:
    """The compiled module with CPU kernels behind the names of the CUDA ones; counts launches."""

    def __init__(self) -> None:
        self.launches = 0
        self.status = 0
        self.asked: list[tuple[Any, ...]] = []

    def zip_scratch_cuda(self, n: int, problems: int, models: int, wide: bool) -> int:
        self.asked.append((n, problems, models, wide))
        return 64

    def zip_cuda(self, similarity: Tensor, units: Tensor, model_of: Tensor, merges: int, attenuation: float,
                 budget: Tensor, block_budget: Tensor, owner: Tensor, total: Tensor, made: Tensor, status: Tensor,
                 scratch: Tensor, stream: int) -> None:  # fmt: skip
        self.launches += 1
        assert scratch.numel() == 64
        for q in range(len(units)):
            taken, count = _core.zip(
                similarity, units[q], model_of[q], merges, attenuation, budget[q], block_budget[q], owner[q], 1
            )
            total[q], made[q] = taken, count
            status[q] = self.status or (0 if count == merges else 3)

    def assign_cuda(self, similarity: Tensor, start: Tensor | None, indices: Tensor, out: Tensor, status: Tensor,
                    stream: int) -> None:  # fmt: skip
        status.fill_(self.status)


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> FakeCore:
    fake = FakeCore()
    monkeypatch.setattr(cuda, "_core", fake)
    monkeypatch.setattr(cuda, "_stream", lambda device: 0)
    return fake


def problem(seed: int) -> tuple[Any, ...]:
    """Arguments of a zip in several unions, without the vectors that it changes."""
    generator = torch.Generator().manual_seed(seed)
    unions, n, models = 2 + seed % 4, 2 * (3 + seed % 5), 2
    x = torch.randn(6 + unions * n, unions * n, generator=generator, dtype=torch.float64)
    x[:, unions * n // 2 :] += 0.5 * x[:, : unions * n - unions * n // 2]
    s = torch.corrcoef(x.T)
    units = torch.randperm(unions * n, generator=generator).view(unions, n)
    model_of = (torch.arange(n) // (n // models)).to(torch.int32).expand(unions, n).contiguous()
    return (s + s.T) / 2, units, model_of, n - 1 - seed % 3


@pytest.mark.parametrize("block_budget", [1, 3, 100])
def test_unions_share_a_budget_as_if_one_came_after_the_other(core: FakeCore, block_budget: int) -> None:
    repeated = 0
    for seed in range(40):
        s, units, model_of, merges = problem(seed)
        given = torch.tensor([seed % 7, (3 * seed) % 11])
        left, owner = given.clone(), torch.full_like(units, -1)
        want_left, want_owner = given.clone(), torch.full_like(units, -1)
        core.launches = 0
        got = cuda.zip(s, units, model_of, merges, 0.5, left, block_budget, owner)
        want = cpu.zip(s, units, model_of, merges, 0.5, want_left, block_budget, want_owner)
        assert got == want
        assert torch.equal(left, want_left)
        for k in range(len(want)):
            assert torch.equal(owner[k], want_owner[k])
        repeated += core.launches > 1
    assert repeated > 0 or block_budget == 1


def test_a_budget_that_no_union_can_end_takes_one_launch(core: FakeCore) -> None:
    s, units, model_of, merges = problem(3)
    cuda.zip(s, units, model_of, merges, 0.5, torch.full((2,), 100), 100 // len(units), torch.empty_like(units))
    assert core.launches == 1
    assert core.asked == [(units.shape[1], len(units), 2, True)]


@pytest.mark.parametrize(("status", "message"), [(1, "expected finite values"), (2, "expected a symmetric matrix")])
def test_statuses_of_zip_become_the_errors_of_the_cpu(core: FakeCore, status: int, message: str) -> None:
    core.status = status
    s, units, model_of, merges = problem(1)
    with pytest.raises(ValueError, match=message):
        cuda.zip(s, units, model_of, merges, 0.5, torch.tensor([9, 9]), 9, torch.empty_like(units))


def test_statuses_of_assign(core: FakeCore) -> None:
    arguments = torch.zeros(2, 3, 3), None, torch.zeros(6, dtype=torch.int64), torch.zeros(16, dtype=torch.float64)
    cuda.assign(*arguments)
    for status, error, message in ((1, ValueError, "finite"), (2, RuntimeError, "proven optimal")):
        core.status = status
        with pytest.raises(error, match=message):
            cuda.assign(*arguments)


def test_too_little_memory_names_the_need_and_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*sizes: int, **options: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(
        cuda, "torch", SimpleNamespace(empty=full, uint8=torch.uint8, OutOfMemoryError=torch.OutOfMemoryError)
    )
    with pytest.raises(
        torch.OutOfMemoryError, match=r"zip of 1 x 9 units needs 3\.50 GiB of scratch memory on cuda.*'host'"
    ):
        cuda._scratch(int(3.5 * 2**30), torch.device("cuda"), "zip of 1 x 9 units")
