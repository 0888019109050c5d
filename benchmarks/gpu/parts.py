"""The parts of a GPU run, in order, with their limits in seconds.

The limits add up to more than the whole run may take: most parts end early, and what does not fit is listed as not run.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

PYTHON = sys.executable
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        name, what: how it is called and what it does.
        command: what is run, from the root of the source tree.
        limit: seconds after which it is ended.
        needs: parts without which it is not tried.
        environment: variables beside the inherited ones.
    """

    name: str
    command: list[str]
    limit: float
    what: str = ""
    needs: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def _task(name: str) -> list[str]:
    return [PYTHON, "-m", "benchmarks.gpu.tasks", name]


def _sanitized(tool: str, kernel: str) -> Part:
    command = [
        "compute-sanitizer",
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        "--print-limit",
        "5",
        *_task(f"small_{kernel}"),
    ]
    what = f"the {kernel} kernel under compute-sanitizer's {tool}, small sizes"
    # torch's caching allocator would hide steps beyond a tensor inside its larger blocks.
    return Part(f"{tool}_{kernel}", command, 45.0, what, ("build",), {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def marked_files() -> list[str]:
    """The test files with something marked for a GPU: no other needs to be imported, or what it imports installed."""
    tests = sorted((ROOT / "tests").glob("test_*.py"))
    return [f"tests/{path.name}" for path in tests if "pytest.mark.cuda" in path.read_text(encoding="utf-8")]


_PYTEST = [PYTHON, "-m", "pytest", "-m", "cuda", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
KERNELS = ("regroup", "zip", "assign")
PARTS: tuple[Part, ...] = (
    Part("build", _task("build"), 150.0, "the extension, in place, for this chip"),
    Part("check", _task("check"), 90.0, "every op and backend against the reference", ("build",)),
    Part("tune", _task("tune"), 75.0, "the listed Triton configurations; the parts behind take the best", ("build",)),
    Part("bench_assign", _task("bench_assign"), 30.0, "1024 assignments of 128 x 128, and other batches", ("build",)),
    Part("bench_zip", _task("bench_zip"), 40.0, "zips up to 14336 units a model, and in blocks", ("build",)),
    Part("bench_regroup", _task("bench_regroup"), 25.0, "gathers and sums against a copy", ("build",)),
    Part("bench_covariance", _task("bench_covariance"), 45.0, "updates against cuBLAS", ("build",)),
    Part("bench_similarity", _task("bench_similarity"), 40.0, "fused against unfused torch", ("build",)),
    Part("bench_lists", _task("bench_lists"), 25.0, "lists of candidates against torch.topk", ("build",)),
    Part("bench_align", _task("bench_align"), 60.0, "alignments at width 28672", ("build",)),
    *(_sanitized("memcheck", kernel) for kernel in KERNELS),
    *(_sanitized("racecheck", kernel) for kernel in KERNELS),
    Part("tests", [*_PYTEST, *marked_files()], 120.0, "all tests marked cuda", ("build",)),
)
