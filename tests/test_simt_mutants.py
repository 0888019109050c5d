"""A test of the tests: every barrier of the CUDA kernels removed in turn, masks and offsets spoiled; each must show."""

from __future__ import annotations

import pytest
from simt import driver, mutant_cases, mutants

pytestmark = pytest.mark.skipif(driver.why_not() is not None, reason=str(driver.why_not()))


def text_of(kernel: str) -> str:
    return (driver.ROOT / "csrc" / "cuda" / f"{kernel}.cu").read_text(encoding="utf-8")


MUTANTS = [mutant for kernel in driver.KERNELS for mutant in mutants.mutants_of(kernel, text_of(kernel))]


@pytest.mark.parametrize("kernel", driver.KERNELS)
def test_without_a_fault_nothing_shows(kernel: str) -> None:
    for checked in mutant_cases.small_cases(kernel, 2, tiny=False):
        assert mutant_cases.verdicts(driver.build("plain-mutants"), checked) == ""
    assert mutant_cases.verdicts(driver.build("tsan-mutants"), mutant_cases.small_cases(kernel, 1, tiny=True)[0]) == ""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.kernel}-{m.number}")
def test_every_fault_shows(mutant: mutants.Mutant) -> None:
    assert mutant_cases.caught(mutant.kernel, mutant), f"{mutant.kernel}: {mutant.note}: not found"


def test_every_barrier_is_among_the_faults() -> None:
    for kernel in driver.KERNELS:
        text = text_of(kernel)
        calls = sum(text.count(f"{name}();") for name in ("__syncthreads", "__syncwarp", "team_barrier"))
        assert len([m for m in mutants.mutants_of(kernel, text) if m.note.endswith("removed")]) == calls
    assert all(reason for reason in mutants.EQUIVALENT.values())
