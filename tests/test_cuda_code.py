"""Proof B of the CUDA kernels: nvcc compiles them for every chip without a warning or a spill."""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.proof import cuda_code

needs_nvcc = pytest.mark.skipif(cuda_code.why_not() is not None, reason=str(cuda_code.why_not()))


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    """Compiled once for all processes of a test run, and again when a source or this reader changes."""
    digest = hashlib.sha256(cuda_code.version().encode())
    for path in sorted([*(cuda_code.ROOT / "csrc").rglob("*.h"), *(cuda_code.ROOT / "csrc").rglob("*.cu")]):
        digest.update(path.read_bytes())
    digest.update(Path(cuda_code.__file__).read_bytes())
    folder = cuda_code.ROOT / "build" / "prove"
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / f"cuda-code-{digest.hexdigest()[:16]}.json"
    with (folder / "cuda-code.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            for old in folder.glob("cuda-code-????????????????.json"):
                old.unlink()
            unfinished = kept.with_suffix(".part")
            unfinished.write_text(json.dumps(cuda_code.records()), encoding="utf-8")
            unfinished.rename(kept)
    found: list[dict[str, Any]] = json.loads(kept.read_text(encoding="utf-8"))
    return found


@pytest.mark.slow
@needs_nvcc
def test_every_kernel_is_compiled_for_every_chip(records: list[dict[str, Any]]) -> None:
    for chip in cuda_code.CHIPS:
        kernels = {r["kernel"] for r in records if r["arch"] == chip}
        assert kernels == {"vectors_kernel", "lines_kernel", "zip_kernel", "assign_kernel"}
    assert all(r["registers"] > 0 and r["instructions"] > 100 for r in records)


@needs_nvcc
def test_no_record_shows_what_it_must_not(records: list[dict[str, Any]]) -> None:
    wrong = [f"{r['variant']} {r['arch']}: {fault}" for r in records for fault in cuda_code.faults(r)]
    assert not wrong, "\n".join(wrong)


@needs_nvcc
def test_regroup_moves_sixteen_bytes_at_a_time(records: list[dict[str, Any]]) -> None:
    wide = [r for r in records if cuda_code.vector_bytes(r["variant"]) == 16]
    assert len(wide) == 18 * len(cuda_code.CHIPS)
    assert len([r for r in records if cuda_code.vector_bytes(r["variant"]) == 8]) >= 12 * len(cuda_code.CHIPS)
    for r in wide:
        assert r["loads_16"], r["variant"]
        assert r["stores_16"], r["variant"]
        assert r["staged_16"] or r["kernel"] != "lines_kernel", r["variant"]


@needs_nvcc
def test_zip_fits_one_block_on_every_multiprocessor_and_reads_sixteen_bytes(records: list[dict[str, Any]]) -> None:
    # The launcher asks for at most one block a multiprocessor, so one that fits makes the grid cooperative.
    for r in [r for r in records if r["kernel"] == "zip_kernel"]:
        assert r["blocks_an_sm"] >= 1
        assert r["loads_16"] >= 2, r["variant"]


@needs_nvcc
def test_the_document_counts_the_compilations(records: list[dict[str, Any]]) -> None:
    text = (cuda_code.ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    shown = {name: int(n) for name, n in re.findall(r"`(csrc/cuda/\w+\.cu)` \| \d+ \| (\d+) \|", text)}
    assert shown == Counter(r["source"] for r in records)


@needs_nvcc
def test_records_kept_are_those_of_todays_kernels(records: list[dict[str, Any]]) -> None:
    from benchmarks.roofline import CUDA_RECORDS

    kept = json.loads(CUDA_RECORDS.read_text(encoding="utf-8"))
    say = "python -m benchmarks.proof.cuda_code > benchmarks/results/cuda-code.json"
    assert {(r["variant"], r["arch"]) for r in kept} == {(r["variant"], r["arch"]) for r in records}, say
    if kept[0]["nvcc"] == cuda_code.version():
        assert kept == records, say


def test_a_fault_is_seen() -> None:
    good: dict[str, Any] = dict.fromkeys(("spills", "stack", "local_accesses", "shared_bytes"), 0)
    good |= {"kernel": "vectors_kernel", "variant": "vectors_kernel<Move<unsigned int>, 4>", "arch": "sm_90a"}
    good |= {"blocks_an_sm": 5, "registers": 44, "loads_16": 1, "stores_16": 1}
    assert cuda_code.faults(good) == []
    assert [
        cuda_code.vector_bytes(f"lines_kernel<{x}>") for x in ("Add<__nv_bfloat16, float>, 4", "Move<Sixteen>, 1")
    ] == [8, 16]
    assert cuda_code.vector_bytes("zip_kernel<float, true>") == 0
    bad = {"spills": 8, "stack": 8, "local_accesses": 2, "shared_bytes": 300_000}
    for key, value in {**bad, "blocks_an_sm": 0, "loads_16": 0, "stores_16": 0}.items():
        assert cuda_code.faults({**good, key: value}), key


def test_reports_are_read() -> None:
    report = """ptxas info    : Compiling entry function '_Zk' for 'sm_90a'
ptxas info    : Function properties for _Zk
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 4676 bytes smem
"""
    assert cuda_code._usage(report) == {"_Zk": {"registers": 64, "spills": 20, "stack": 16, "shared_bytes": 4676}}
    dump = """\t\tFunction : _Zk
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R4, [R2] ;
        /*0020*/             @!UP0 STL [R1], R2 ;
"""
    assert cuda_code._instructions(dump) == {"_Zk": ["LDC", "LDG.E.128", "STL"]}
