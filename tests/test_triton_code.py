"""Proof B of the Triton kernels: machine code for sm_80, sm_90 and sm_100, compiled without a GPU and read back."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton has no wheel for this system"
)
# Another Triton to compile with: a folder that has the package in it.
SECOND = os.environ.get("MUDSC_FAST_SECOND_TRITON", "")


def compiled(cache: Path, *first_on_path: str) -> list[dict[str, Any]]:
    # A fresh process: in this one, kernels may have been compiled or interpreted already. A fresh cache: nothing is
    # stale.
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((*first_on_path, str(ROOT))),
        "TRITON_CACHE_DIR": str(cache),
        "TRITON_DEFAULT_FP_FUSION": "1",
    }
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "benchmarks.proof.triton_code", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    records: list[dict[str, Any]] = json.loads(done.stdout)
    return records


def check(records: list[dict[str, Any]]) -> None:
    from benchmarks.proof import triton_code

    wrong = {f"{r['kernel']} {r['variant']} {r['config']} {r['arch']}": triton_code.faults(r) for r in records}
    assert not {name: said for name, said in wrong.items() if said}
    hopper = [r for r in records if r["arch"] == "sm_90" and r["main_loop"]]
    assert {r["kernel"] for r in hopper} == {"product.add_kernel", "product.blend_kernel", "diagonal.diagonal_kernel"}
    for r in hopper:
        # Both operands from shared memory, transposed there; loads by tensor maps; nothing else of note in the loop.
        assert r["transposed"] == r["wgmma"] > 0, r
        assert r["loop_tma"] == 2, r
        # The tiles near the diagonal also add up 16 entries of each operand a thread and step, and their squares.
        assert r["loop_instructions"] <= (320 if r["kernel"] == "diagonal.diagonal_kernel" else 160), r
    assert {r["arch"] for r in records} == {"sm_80", "sm_90", "sm_100"}


@pytest.mark.slow
def test_machine_code_with_the_installed_triton(tmp_path: Path) -> None:
    check(compiled(tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(not SECOND, reason="MUDSC_FAST_SECOND_TRITON names no other Triton")
def test_machine_code_with_another_triton(tmp_path: Path) -> None:
    check(compiled(tmp_path, SECOND))


def test_faults_are_found() -> None:
    from benchmarks.proof.triton_code import faults

    good = {
        "arch": "sm_90", "spills": 0, "local_accesses": 0, "shared_bytes": 200_000, "registers": 200, "warps": 8,
        "main_loop": True, "descriptors": True, "variant": "bf16", "loop_mma": 4, "wgmma": 4, "transposed": 4,
        "loop_tma": 2,
    }  # fmt: skip
    assert faults(good) == []
    for change, words in (
        ({"spills": 8}, "local memory"),
        ({"local_accesses": 1}, "local memory"),
        ({"shared_bytes": 232_449}, "shared memory"),
        ({"registers": 255, "warps": 16}, "registers"),
        ({"loop_mma": 0}, "no matrix instructions"),
        ({"transposed": 3}, "transposed"),
        ({"wgmma": 0, "transposed": 0}, "wgmma"),
        ({"loop_tma": 0}, "bulk tensor loads"),
    ):
        said = faults(good | change)
        assert len(said) == 1, change
        assert words in said[0]


def test_every_configuration_is_compiled() -> None:
    from benchmarks.proof import triton_code
    from mudsc_fast.backends.triton import configs

    for quick in (True, False):
        made = {(case.chip, case.config) for case in triton_code.cases(quick)}
        for use in configs.TABLES:
            for chip in triton_code.CHIPS:
                assert {(chip, config.name) for config in configs.listed(use, chip)} <= made


def test_the_document_counts_the_compilations() -> None:
    from benchmarks.proof import triton_code

    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    pattern = r"^\|[^|]+\| `(\w+\.\w+_kernel)` \|[^|]+\|[^|]+\| (\d+) \|"
    counted = Counter(case.kernel for case in triton_code.cases())
    shown = {name: int(n) for name, n in re.findall(pattern, text, re.M) if name in counted}
    assert shown == counted


@pytest.mark.parametrize(("name", "version"), [("triton-code.json", "3.9"), ("triton-code-3.6.json", "3.6")])
def test_records_kept_are_those_of_todays_kernels(name: str, version: str) -> None:
    from benchmarks.proof import triton_code
    from benchmarks.roofline import RECORDS

    records = json.loads(RECORDS.with_name(name).read_text(encoding="utf-8"))
    kept = {(r["kernel"], r["variant"], r["config"], r["arch"]) for r in records}
    made = {(c.kernel, c.variant, c.config, f"sm_{c.chip}") for c in triton_code.cases()}
    assert kept == made, f"python -m benchmarks.proof.triton_code > benchmarks/results/{name}"
    assert not [r for r in records if triton_code.faults(r) or not r["triton"].startswith(version)]
