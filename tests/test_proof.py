"""`make prove`: its parts, how their results are joined, and a small run of the CUDA half of proof A."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.proof import __main__ as proof
from benchmarks.proof import cuda_cases, table

DOCUMENT = proof.ROOT / "docs" / "gpu.md"
TRITON = {"kernel": "product.add_kernel", "source": "backends/triton/product.py", "arch": "sm_90", "faults": []}
CUDA = {"kernel": "lines_kernel", "source": "csrc/cuda/regroup.cu", "arch": "sm_90a", "faults": []}


def test_records_carry_the_counts_of_their_kernels_cases() -> None:
    joined = proof.joined(
        {
            "triton_code": [TRITON],
            "triton_cases": {"product.add_kernel": {"cases": 7, "failures": 0, "messages": []}},
            "cuda_code": [CUDA],
            "cuda_cases": {
                "regroup": {"cases": 5, "failures": 1, "messages": ["x"]},
                "zip": {"cases": 3, "failures": 0, "messages": []},
            },
        }
    )
    assert [(r["kernel"], r["cases"], r["failures"]) for r in joined] == [
        ("product.add_kernel", 7, 0),
        ("lines_kernel", 5, 1),
        ("zip", 3, 0),  # not compiled here: proof A alone
    ]
    for record in joined:
        assert {"kernel", "source", "arch", "cases", "failures"} <= set(record)


def a_record_of_each() -> list[dict[str, object]]:
    made: list[dict[str, object]] = []
    for name in table.OPS:
        triton = "." in name
        kernel, compiler = (name, "triton") if triton else (f"{name}_kernel", "nvcc")
        source = f"mudsc_fast/backends/triton/{name.split('.')[0]}.py" if triton else f"csrc/cuda/{name}.cu"
        made.append({"kernel": kernel, "source": source, compiler: "9.9", "cases": 5, "failures": 0})
    return made


def test_the_table_has_every_kernel_and_refuses_what_it_does_not_know() -> None:
    records = a_record_of_each()
    shown = table.table([*records, records[0]])
    assert "| covariance | `product.add_kernel` | `backends/triton/product.py` | 5 | 2 | not yet |" in shown
    assert "| zip | `zip_kernel` | `csrc/cuda/zip.cu` | 5 | 1 | not yet |" in shown
    for wrong in (records[1:], [*records, records[0] | {"kernel": "mine"}], [*records, records[0] | {"failures": 1}]):
        with pytest.raises(ValueError, match="records: "):
            table.table(wrong)


def test_the_document_counts_the_cases_of_the_cuda_sources() -> None:
    shown = re.findall(r"`csrc/cuda/\w+\.cu` \| (\d+) \|", DOCUMENT.read_text(encoding="utf-8"))
    assert [int(n) for n in shown] == [sum(cuda_cases.COUNTS.values())] * 3


def test_without_compilers_proof_a_stands_alone() -> None:
    cases = {"zip": {"cases": 3, "failures": 0, "messages": []}}
    joined = proof.joined({"cuda_code": "nvcc was not found", "cuda_cases": cases, "triton_code": None})
    assert [(r["kernel"], r["arch"], r["cases"]) for r in joined] == [("zip", None, 3)]


def test_a_part_that_crashes_or_hangs_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [
        proof.Part("cuda_code", "raise SystemExit('no disk')"),
        proof.Part("cuda_cases", "import time; time.sleep(100)"),
        proof.Part("triton_code", "print(json.dumps('no triton'))"),
        proof.Part(
            "triton_cases", "print('talk'); print(json.dumps({'k': {'cases': 2, 'failures': 0, 'messages': []}}))"
        ),
    ]
    monkeypatch.setattr(proof, "parts", lambda seed, share: parts)
    monkeypatch.setattr(proof, "run_part", _with_fake_modules(proof.run_part))
    out = tmp_path / "kernels.json"
    assert proof.main(["--limit", "4", "--out", str(out)]) == 1
    said = capsys.readouterr().out
    assert "cuda_code: exit 1: no disk" in said
    assert "cuda_cases: no end after 4 s" in said
    assert "triton_code: skipped: no triton" in said
    assert [r["kernel"] for r in json.loads(out.read_text(encoding="utf-8"))] == ["k"]


def _with_fake_modules(real):  # type: ignore[no-untyped-def]
    """Parts whose module is one that is quick to import, whatever they are called."""

    def run(part: proof.Part, limit: float):  # type: ignore[no-untyped-def]
        return real(proof.Part("cuda_code", part.code), limit)

    return run


@pytest.mark.slow
@pytest.mark.skipif(cuda_cases.why_not() is not None, reason=str(cuda_cases.why_not()))
def test_a_small_run_of_the_cuda_cases() -> None:
    found = cuda_cases.run(12345, share=0.05)
    assert set(found) == {"regroup", "zip", "assign"}
    for kernel, counted in found.items():
        assert counted["cases"] >= 18
        assert counted["failures"] == 0, (kernel, counted["messages"])
