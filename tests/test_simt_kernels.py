"""Proof A of the CUDA kernels: their sources run on the emulator, under several schedules and the sanitizers."""

from __future__ import annotations

import pytest
import torch
from simt import cases, driver
from simt.cases import Checked

pytestmark = pytest.mark.skipif(driver.why_not() is not None, reason=str(driver.why_not()))

KERNELS = tuple(cases.RANDOM)
LARGEST = {"regroup": 40, "zip": 70, "assign": 40}
LARGEST_FOR_TSAN = {"regroup": 20, "zip": 24, "assign": 24}


def check(mode: str, checked: list[Checked]) -> None:
    run = driver.run(driver.build(mode), [c.case for c in checked])
    assert run.ok, run.output[:4000]
    wrong = [
        f"{c.kernel} {c.note} (seed {c.case.seed}, policy {c.case.policy}): {v}" for c in checked if (v := c.verdict())
    ]
    assert not wrong, "\n".join(wrong)


def drawn(kernel: str, count: int, most: int, seed: int, **options: int) -> list[Checked]:
    generator = torch.Generator().manual_seed(seed)
    policies = len(driver.POLICIES)
    return [cases.RANDOM[kernel](generator, most, seed=seed + k, policy=k % policies, **options) for k in range(count)]


@pytest.mark.parametrize("kernel", KERNELS)
def test_random_cases_under_every_schedule(kernel: str) -> None:
    check("plain", drawn(kernel, 48, LARGEST[kernel], 1))


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_case_gives_one_result_under_all_schedules(kernel: str) -> None:
    for seed in (21, 22):
        same = [
            cases.RANDOM[kernel](torch.Generator().manual_seed(seed), LARGEST[kernel], seed=s, policy=s)
            for s in range(len(driver.POLICIES))
        ]
        check("plain", same)
        for other in same[1:]:
            assert [a.tobytes() for a in other.case.arrays] == [a.tobytes() for a in same[0].case.arrays]


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_step_beyond_memory(kernel: str) -> None:
    check("asan", drawn(kernel, 36, LARGEST[kernel], 2))


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_race(kernel: str) -> None:
    check("tsan", drawn(kernel, 10, LARGEST_FOR_TSAN[kernel], 3, multiprocessors=1))


# ---- regroup ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8], ids=str)
def test_regroup_every_axis_one_past_each_vector(dtype: torch.dtype) -> None:
    found = []
    generator = torch.Generator().manual_seed(4)
    for inner in (15, 16, 17, 32):
        tensor = (torch.randn(6, 5, inner, generator=generator) * 20).to(dtype)
        for dim in range(3):
            length = tensor.shape[dim]
            found.append(cases.regroup(tensor, torch.randperm(length, generator=generator), dim, length))
            if dtype in cases.DTYPES:
                labels = torch.randint(3, (length,), generator=generator)
                found.append(cases.regroup(tensor, labels, dim, 3, torch.tensor([0.5, 2.0, 0.75])))
            offsets = (1, 2)
            found.append(
                cases.regroup(tensor, torch.randperm(length, generator=generator), dim, length, offsets=offsets)
            )
    for k, checked in enumerate(found):
        checked.case.policy, checked.case.seed = k % 6, k
    check("asan", found)


def test_regroup_stages_long_lines_and_steps_past_one_grid() -> None:
    generator = torch.Generator().manual_seed(5)
    long = torch.randn(3, 26_000, generator=generator)  # more than 48 KiB a line: asks for more shared memory
    longer = torch.randn(2, 60_000, generator=generator)  # more than a block has: gathered from global memory
    many = torch.randn(150, 7, generator=generator)
    check(
        "plain",
        [
            cases.regroup(long, torch.randperm(26_000, generator=generator), 1, 26_000, multiprocessors=1),
            cases.regroup(longer, torch.randperm(60_000, generator=generator), 1, 60_000, multiprocessors=1),
            cases.regroup(many, torch.randperm(7, generator=generator), 1, 7, multiprocessors=1),
            cases.regroup(many.t(), torch.arange(150) // 3, 1, 50, multiprocessors=1),
        ],
    )


# ---- zip ----


@pytest.mark.parametrize("n", [1, 2, 3, 31, 32, 33, 63, 64, 65, 129, 150])
def test_zip_sizes_around_tiles_and_teams(n: int) -> None:
    similarity = cases.similarity_of(n, torch.Generator().manual_seed(n), torch.float32)
    units, model_of = torch.arange(n)[None], (torch.arange(n) * 2 // n)[None]
    budget = torch.full((1, 2), n // 3)
    checked = [
        cases.zip_problems(
            similarity, units, model_of, 2, n // 2, 0.5, budget, budget + 1, seed=s, policy=s, multiprocessors=4
        )
        for s in range(5)
    ]
    check("plain", checked)


def test_zip_refuses_what_the_cpu_refuses() -> None:
    n = 40
    base = cases.similarity_of(n, torch.Generator().manual_seed(8), torch.float64)
    units, model_of, budget = torch.arange(n)[None], (torch.arange(n) // 20)[None], torch.full((1, 2), n)
    found = []
    for value in (torch.nan, torch.inf, -torch.inf):
        for place in ((3, 37), (37, 3)):
            broken = base.clone()
            broken[place] = value
            found.append(cases.zip_problems(broken, units, model_of, 2, 20, 0.5, budget, budget))
    lopsided = base.clone()
    lopsided[33, 2] += 0.1
    diagonal = base.clone().fill_diagonal_(torch.nan)
    for s in (lopsided, diagonal):
        found.append(cases.zip_problems(s, units, model_of, 2, 20, 0.5, budget, budget))
    # No budget and one model: nothing is allowed.
    found.append(
        cases.zip_problems(base, units, model_of * 0, 1, 5, 0.5, torch.zeros(1, 1, dtype=torch.int64), budget[:, :1])
    )
    check("asan", found)
    assert [int(c.case.arrays[8][0]) for c in found] == [1, 1, 1, 1, 1, 1, 2, 0, 3]


def test_zip_by_an_attenuation_that_float32_does_not_have() -> None:
    # 1e-50 is 0 in float32: merged units are still merged again, and barred pairs stay barred.
    found = []
    for n, budget in ((6, 1), (40, 5), (70, 40)):
        similarity = 1 + cases.similarity_of(n, torch.Generator().manual_seed(n), torch.float32)
        units, model_of, left = torch.arange(n)[None], (torch.arange(n) * 2 // n)[None], torch.full((1, 2), budget)
        for attenuation in (1e-50, 1e-42):
            found.append(
                cases.zip_problems(similarity, units, model_of, 2, n - 2, attenuation, left, left, policy=n % 6)
            )
    check("plain", found)
    assert [int(c.case.arrays[7][0]) for c in found][-2:] == [68, 68]  # fewer than 70 / 2 units are left


def test_zip_stops_between_two_launches_and_not_before() -> None:
    n = 50
    similarity = cases.similarity_of(n, torch.Generator().manual_seed(14), torch.float32)
    units, model_of, budget = torch.arange(n)[None], (torch.arange(n) // 25)[None], torch.full((1, 2), n)
    found = [
        cases.zip_problems(
            similarity, units, model_of, 2, 21, 0.5, budget, budget, steps_a_launch=steps, stop_at_poll=stop
        )
        for steps, stop in ((5, 1), (5, 4), (5, 5), (21, 1), (7, 3))
    ]
    check_stopped = [True, True, False, False, False]  # 21 merges: four polls between launches of 5, two between 7
    run = driver.run(driver.build("asan"), [c.case for c in found])
    assert run.ok, run.output[:4000]
    for checked, stopped in zip(found, check_stopped, strict=True):
        assert checked.case.error == ("zip_kernel: interrupted" if stopped else "")
        assert stopped or not checked.verdict()
        assert not stopped or torch.equal(torch.from_numpy(checked.case.arrays[3]), budget)  # as it was


def test_zip_ends_where_the_device_fails_between_launches() -> None:
    n = 20
    similarity = cases.similarity_of(n, torch.Generator().manual_seed(15), torch.float32)
    units, model_of, budget = torch.arange(n)[None], (torch.arange(n) // 10)[None], torch.full((1, 2), n)
    case = cases.zip_problems(similarity, units, model_of, 2, 9, 0.5, budget, budget, steps_a_launch=4).case
    case.fail_call, case.fail_code = "cudaStreamSynchronize", 701
    assert driver.run(driver.build("asan"), [case]).ok
    assert case.error == "zip_kernel: too many resources requested for launch"


# ---- assign ----


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 65, 128])
def test_assign_sizes_around_a_warp(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    found = [cases.assignments(torch.randn(1, 2, n, n, generator=generator), seed=s, policy=s) for s in range(2)]
    found.append(cases.assignments(torch.zeros(1, 1, n, n), policy=2))
    check("plain", found)


def test_assign_takes_256_and_no_more() -> None:
    generator = torch.Generator().manual_seed(9)
    s = torch.randn(1, 1, 256, 256, generator=generator)
    s[0, 0, torch.arange(256), torch.randperm(256, generator=generator)] += 5
    check("plain", [cases.assignments(s)])
    case = cases.assignments(torch.zeros(1, 1, 257, 257)).case
    assert driver.run(driver.build("plain"), [case]).ok
    assert case.error == "assign_kernel: expected at most 256 rows, got 257"


# ---- errors of the runtime ----

CALLS = {
    "cudaGetDevice": (35, "CUDA driver version is insufficient for CUDA runtime version; update the NVIDIA driver"),
    "cudaSetDevice": (101, "invalid device ordinal"),
    "cudaLaunchKernelEx": (209, "no kernel image is available for execution on the device; build mudsc_fast with"),
}


@pytest.mark.parametrize("call", list(CALLS))
@pytest.mark.parametrize("kernel", KERNELS)
def test_an_error_of_the_runtime_names_the_kernel(kernel: str, call: str) -> None:
    code, message = CALLS[call]
    case = drawn(kernel, 1, 8, 12)[0].case
    case.fail_call, case.fail_code = call, code
    run = driver.run(driver.build("asan"), [case])
    assert run.ok, run.output
    assert kernel in case.error
    assert message in case.error


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_launch_on_another_device_than_the_current_one(kernel: str) -> None:
    check("plain", drawn(kernel, 2, 20, 16, device=1))  # the emulator refuses one on the wrong device, or left in use
    case = drawn(kernel, 1, 8, 17, device=5)[0].case
    assert driver.run(driver.build("plain"), [case]).ok
    assert kernel in case.error
    assert "invalid device ordinal" in case.error


def test_zip_asks_for_the_scratch_memory_it_needs() -> None:
    checked = drawn("zip", 1, 40, 13)[0]
    checked.case.integers = [*list(checked.case.integers)[:-1], 1024]
    run = driver.run(driver.build("asan"), [checked.case])
    assert run.ok, run.output
    assert "bytes of scratch memory" in checked.case.error
