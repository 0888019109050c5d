"""What the parts of a GPU run do. `python -m benchmarks.gpu.tasks NAME` prints one line "ROW {...}" for each result."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.benches import (
    bench_align,
    bench_assign,
    bench_covariance,
    bench_lists,
    bench_regroup,
    bench_similarity,
    bench_zip,
)
from benchmarks.gpu.timing import row

ROOT = Path(__file__).resolve().parents[2]
BENCHES = (bench_align, bench_assign, bench_covariance, bench_lists, bench_regroup, bench_similarity, bench_zip)


# ---- the machine and the build ----


def describe() -> None:
    """Device and versions."""
    import torch

    about: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    for module in ("triton", "cupy", "scipy", "numpy"):
        try:
            about[module] = __import__(module).__version__
        except ImportError:
            about[module] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        about |= {
            "device": properties.name,
            "capability": list(torch.cuda.get_device_capability(0)),
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
    else:
        about["device"] = "none"
    for tool, key in (
        ("nvidia-smi --query-gpu=driver_version --format=csv,noheader", "driver"),
        ("nvcc --version", "nvcc"),
    ):
        try:
            done = subprocess.run(tool.split(), capture_output=True, text=True, check=False, timeout=20)
            about[key] = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else None
        except (OSError, subprocess.TimeoutExpired):
            about[key] = None
    row(**about)


def build() -> None:
    """The extension, for the chip that is here, with nothing but what is installed."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}" + ("a" if major >= 9 else "")
    environment = {**os.environ, "PYTHON": sys.executable}
    environment["PATH"] = os.pathsep.join(
        [str(Path(sys.executable).parent), environment["PATH"], "/usr/local/cuda/bin"]
    )
    # A newer compiler's warnings must not cost the whole run.
    options = ["-DMUDSC_FAST_CUDA=ON", f"-DMUDSC_FAST_CUDA_ARCHS={arch}-real", "-DMUDSC_FAST_WERROR=OFF"]
    wrong = ""
    if _built(options, environment):
        # Without its CUDA kernels the Triton half can still be measured.
        wrong = "the CUDA kernels do not build"
        if code := _built(["-DMUDSC_FAST_CUDA=OFF", "-DMUDSC_FAST_WERROR=OFF"], environment):
            sys.exit(code)
    import mudsc_fast

    row(case="build", arch=arch, config=str(mudsc_fast.build_config()), wrong=wrong)


def _built(options: list[str], environment: dict[str, str]) -> int:
    command = ["sh", "scripts/build_inplace.sh", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def check() -> None:
    """Every op on every backend of this machine against the float64 reference."""
    from mudsc_fast import checking

    for outcome in checking.run_checks(("cuda",)):
        wrong = "" if outcome.ok else f"error {outcome.error:g} over {outcome.tolerance:g} {outcome.note}"
        row(case=f"{outcome.op}: {outcome.case}, {outcome.backend} {outcome.isa}", error=outcome.error, wrong=wrong)


# ---- tuning ----


def tune() -> None:
    """The fastest of the listed Triton configurations for each use; the driver collects them under "tuned"."""
    import torch

    from benchmarks import gpu_triton

    for use in ("add", "blend"):  # one after the other, so that a hang in the second costs it alone
        found = gpu_triton.tune(torch.device("cuda", torch.cuda.current_device()), rounds=5, uses=(use,))
        for tried in found["tried"]:
            row(
                case=f"{use} {tried['config']}",
                seconds=tried.get("seconds"),
                error=tried.get("error"),
                wrong=tried.get("failed", "")[:300],
            )
        row(case=use, tuned=found["tuned"])


# ---- small runs for compute-sanitizer ----


def small_regroup() -> None:
    """Both kernels of regroup, vectors and single elements, gathers and sums."""
    import torch

    import mudsc_fast as mf

    for shape, dtype in (((37, 48), torch.float32), ((33, 35), torch.bfloat16), ((5, 9, 16), torch.float64)):
        x = torch.randn(shape, device="cuda").to(dtype)
        for dim, length in enumerate(shape):
            for labels, size in ((torch.randperm(length), length), (torch.arange(length) // 2, (length + 1) // 2)):
                got = mf.regroup(x, labels, dim, size, backend="cuda").cpu()
                if not torch.equal(got, mf.regroup(x.cpu(), labels, dim, size)):
                    row(case=f"regroup {shape} {dim}", wrong="differs from the CPU kernel")
    row(case="regroup, small", wrong="")


def small_zip() -> None:
    """A cooperative zip and one in blocks."""
    import torch

    import mudsc_fast as mf

    for d, blocks, budget in ((150, 1, 1.0), (96, 3, 0.5)):
        s = torch.corrcoef(torch.randn(2 * d, 40))
        s = (s + s.T) / 2
        pairing = torch.arange(blocks).repeat(2, 1)
        options: dict[str, Any] = {"blocks": blocks, "block_indices": pairing if blocks > 1 else None, "budget": budget}
        got = mf.zip_units(s.cuda(), backend="cuda", **options).labels.cpu()
        wrong = "" if torch.equal(got, mf.zip_units(s, **options).labels) else "differs from the CPU kernel"
        row(case=f"zip {d} in {blocks} blocks", wrong=wrong)


def small_assign() -> None:
    """A few assignments, with and without starting duals."""
    import torch

    import mudsc_fast as mf

    s = torch.randn(5, 45, 45)
    first = mf.assign(s.cuda(), backend="cuda")
    again = mf.assign(s.cuda(), first.duals, backend="cuda")
    best = mf.assign(s).value
    error = max(float((x.value.cpu() - best).abs().max()) for x in (first, again))
    row(case="assign 5 x 45", wrong="" if error <= 1e-9 else f"error {error:g}")


if __name__ == "__main__":
    globals()[sys.argv[1]]()
