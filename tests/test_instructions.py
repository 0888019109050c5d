"""Kernels may not need more instructions than recorded: counted by callgrind, so a busy machine changes nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.instructions import counting

ROOT = Path(__file__).resolve().parents[1]


def test_flags_are_those_of_the_build() -> None:
    cmake = (ROOT / "CMakeLists.txt").read_text()
    kernel = re.search(r"set\(kernel_flags ([^)]*)\)", cmake)
    avx2 = re.search(r"set\(flags_avx2 ([^)]*)\)", cmake)
    assert kernel is not None
    assert avx2 is not None
    assert kernel.group(1).split() == list(counting.KERNEL_FLAGS)
    assert avx2.group(1).split() == list(counting.ISA_FLAGS)


def test_more_instructions_are_named() -> None:
    before = {"zip": 1000, "assign": 1000}
    assert counting.worse({"zip": 1049, "assign": 900}, before) == []
    found = counting.worse({"zip": 1051, "new": 5}, before)
    assert len(found) == 2
    assert found[0].startswith("zip: 1,051 instructions, 5.1% more than 1,000")
    assert "--update" in found[1]


@pytest.mark.slow
def test_kernels_need_no_more_instructions_than_recorded() -> None:
    reason = counting.why_not()
    if reason is None and counting.compiler_version() not in counting.recorded():
        reason = f"nothing is recorded for {counting.compiler_version()}"
    if reason is not None:
        pytest.skip(reason)
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.instructions"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
