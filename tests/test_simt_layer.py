"""The CUDA emulator keeps its word: right kernels give what CUDA gives, and each kind of mistake is reported."""

from __future__ import annotations

import numpy as np
import pytest
from simt import driver
from simt.driver import FOUND_FAULT, FOUND_RACE, REFUSED, TOY, Case, Run

pytestmark = pytest.mark.skipif(driver.why_not() is not None, reason=str(driver.why_not()))

COLLECTIVES, NEIGHBOURS, WHOLE_GRID = 0, 1, 2


def play(mode: str, toy: int, policy: int = 0) -> tuple[Run, Case]:
    case = Case(TOY, [toy], [np.zeros(64 * 16, dtype=np.int32)], seed=5, policy=policy)
    return driver.run(driver.build(mode), [case]), case


def bits(x: int) -> int:
    return x - 2**32 if x >= 2**31 else x


@pytest.mark.parametrize("policy", range(len(driver.POLICIES)), ids=driver.POLICIES)
def test_warp_collectives_are_those_of_cuda(policy: int) -> None:
    run, case = play("plain", COLLECTIVES, policy)
    assert run.ok, run.output
    got = case.arrays[0].reshape(64, 16)
    for t in range(64):
        first, lane = t // 32 * 32, t % 32
        assert got[t].tolist() == [
            first + 5,
            t - 1 if lane else t,
            t + 2 if lane < 30 else t,
            t ^ 7,
            bits(sum(1 << k for k in range(0, 32, 3))),
            1,
            0,
            31 * 16,
            first + 31,
            -(first + 31),
            t.bit_count() if hasattr(int, "bit_count") else bin(t).count("1"),
            t ^ 1,
            t ^ 8 if lane < 16 else t ^ 4,
            (t & -t).bit_length(),
            32 - t.bit_length(),
            0,
        ]


@pytest.mark.parametrize("policy", range(len(driver.POLICIES)), ids=driver.POLICIES)
def test_barriers_hold_back_every_thread(policy: int) -> None:
    run, case = play("plain", NEIGHBOURS, policy)
    assert run.ok, run.output
    assert case.arrays[0][:64].tolist() == [sum((t + 1) % 64 + r for r in range(4)) for t in range(64)]
    run, case = play("plain", WHOLE_GRID, policy)
    assert run.ok, run.output
    assert case.arrays[0][:192].tolist() == [(t + 65) % 192 for t in range(192)]


MISTAKES = {
    "barriers in both branches": ("plain", 3, REFUSED, "threads of one block wait at barriers of lines"),
    "return before a barrier": ("plain", 4, REFUSED, "ended"),
    "a lane that has left": ("plain", 5, REFUSED, "names lane 3, which has ended"),
    "a mask without the caller": ("plain", 6, REFUSED, "lane 0 is not in the mask"),
    "waits that never meet": ("plain", 7, REFUSED, "deadlock"),
    "a grid barrier in a plain launch": ("plain", 8, REFUSED, "not cooperative"),
    "beyond shared memory": ("asan", 9, FOUND_FAULT, "heap-buffer-overflow"),
    "a misaligned vector": ("asan", 10, FOUND_FAULT, "misaligned address"),
    "beyond global memory": ("asan", 11, FOUND_FAULT, "heap-buffer-overflow"),
    "a race that no schedule shows": ("tsan", 12, FOUND_RACE, "data race"),
    "a race between blocks": ("tsan", 13, FOUND_RACE, "data race"),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_each_mistake_is_reported(mistake: str) -> None:
    mode, toy, code, message = MISTAKES[mistake]
    run, _ = play(mode, toy)
    assert run.code == code, run.output
    assert message in run.output


@pytest.mark.parametrize("toy", [COLLECTIVES, NEIGHBOURS, WHOLE_GRID])
@pytest.mark.parametrize("mode", ["asan", "tsan"])
def test_right_kernels_are_not_accused(mode: str, toy: int) -> None:
    run, _ = play(mode, toy)
    assert run.ok, run.output


@pytest.mark.parametrize(
    ("toy", "message"),
    [(14, "too many blocks in cooperative launch"), (15, "invalid configuration"), (16, "invalid argument")],
)
def test_launches_that_a_gpu_refuses_are_refused(toy: int, message: str) -> None:
    run, case = play("plain", toy)
    assert run.ok, run.output
    assert case.error == f"toy: {message}" or message in case.error
