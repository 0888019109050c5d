"""Zips on several threads under ThreadSanitizer: what threads share is handed over in an order that it can follow."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from simt.driver import FOUND_RACE, compiler

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ["tests/zip_threads.cpp", "csrc/cpu/kernels/zip.cpp", "csrc/cpu/unions.cpp", "csrc/cpu/parallel.cpp"]
FLAGS = ["-std=c++17", "-O1", "-g1", "-fsanitize=thread", "-DMUDSC_ISA=plain", "-pthread"]

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or shutil.which(compiler()) is None, reason="needs Linux and a C++ compiler"
)


# On a busy machine the first thread may do all of a step before another one is awake: then there is nothing to find.
TRIES = 8


def _run(folder: Path, *includes: Path, tries: int = 1) -> subprocess.CompletedProcess[str]:
    """Build and run; again, up to so many times, as long as nothing is found."""
    binary = folder / "zip_threads"
    paths = [f"-I{path}" for path in (*includes, ROOT / "csrc")]
    build = subprocess.run(
        [compiler(), *FLAGS, *paths, *SOURCES, "-o", str(binary)], cwd=ROOT, capture_output=True, text=True
    )
    if "tsan" in build.stderr and build.returncode != 0:
        pytest.skip("the compiler has no ThreadSanitizer")
    assert build.returncode == 0, build.stderr
    # Its shadow memory wants a fixed layout.
    fixed = ["setarch", platform.machine(), "-R"] if shutil.which("setarch") is not None else []
    for _ in range(tries):
        ran = subprocess.run([*fixed, str(binary)], capture_output=True, text=True, timeout=300)
        if ran.returncode != 0:
            break
    return ran


def test_zips_on_several_threads_share_nothing_unseen(tmp_path: Path) -> None:
    ran = _run(tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr[:4000]
    assert "28 calls on several threads, 0 with other merges" in ran.stdout


def test_a_step_that_is_not_handed_over_is_found(tmp_path: Path) -> None:
    crew = (ROOT / "csrc/cpu/kernels/crew.h").read_text()
    handed_over = "static_cast<uint64_t>(parts), __ATOMIC_RELEASE"
    assert crew.count(handed_over) == 1
    changed = tmp_path / "cpu" / "kernels" / "crew.h"
    changed.parent.mkdir(parents=True)
    changed.write_text(crew.replace(handed_over, handed_over.replace("RELEASE", "RELAXED")))
    assert _run(tmp_path, tmp_path, tries=TRIES).returncode == FOUND_RACE
