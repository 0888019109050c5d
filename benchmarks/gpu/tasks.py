"""What the parts of a GPU run do. `python -m benchmarks.gpu.tasks NAME` prints one line "ROW {...}" for each result."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def row(**values: Any) -> None:
    """One result, printed at once so that a later hang does not lose it."""
    print("ROW " + json.dumps(values), flush=True)


def judged(measured: float, target: float, at_most: bool = False) -> dict[str, Any]:
    """A figure beside its target; ratios must reach it, seconds must not pass it."""
    return {"measured": measured, "target": target, "met": measured <= target if at_most else measured >= target}


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


# ---- timing ----


def timed(run: Callable[[], Any], rounds: int = 9, warm: int = 2) -> tuple[float, float]:
    """Median seconds of a call, its work on the GPU included, and the interquartile range over the median."""
    import torch

    for _ in range(warm):
        run()
    seconds = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4)
    return median, (high - low) / median


def compared(runs: dict[str, Callable[[], Any]], rounds: int = 9) -> dict[str, Any]:
    """Median seconds and spreads of several ways, taken in turn."""
    seconds: dict[str, float] = {}
    spreads: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name, run in runs.items():
        try:
            seconds[name], spreads[name] = timed(run, rounds)
        except Exception as error:  # noqa: BLE001 (one contender must not cost the others their row)
            missing[name] = f"{type(error).__name__}: {error}"[:300]
    return {"seconds": seconds, "spread": spreads, "missing": missing}


def peak_memory(run: Callable[[], Any]) -> int:
    """Bytes that a call holds at most, beyond what there is before it."""
    import torch

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = run()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


# ---- benchmarks ----


def bench_covariance() -> None:
    """One update of a covariance against the full product by cuBLAS."""
    import torch

    import mudsc_fast as mf

    torch.backends.cuda.matmul.allow_tf32 = False
    for dtype, width, samples, target in (
        (torch.bfloat16, 8192, 16384, 1.7),
        (torch.bfloat16, 4096, 32768, None),
        (torch.bfloat16, 14336, 16384, 1.7),
        (torch.float32, 8192, 4096, 2.0),
        (torch.float32, 4096, 8192, None),
    ):
        x = torch.randn(samples, width, device="cuda", dtype=dtype)
        # As two models of half the width each, so that one product of the whole is what is compared with.
        cov, pair = mf.Covariance(width // 2, device="cuda"), list(x.split(width // 2, dim=1))
        found = compared({"mudsc_fast": lambda c=cov, p=pair: c.update(p), "cuBLAS": lambda a=x: a.T @ a}, 7)
        ours, theirs = found["seconds"].get("mudsc_fast"), found["seconds"].get("cuBLAS")
        extra: dict[str, Any] = {}
        if ours and theirs:
            flop = 2.0 * width * width * samples
            extra = {"tflops_as_full_product": flop / ours / 1e12, "cublas_tflops": flop / theirs / 1e12}
            extra |= judged(theirs / ours, target) if target else {"measured": theirs / ours}
        y = x[:4096, :512].double()
        small = mf.Covariance(256, device="cuda")
        small.update([x[:4096, :256], x[:4096, 256:512]])
        error = float((small.correlation().double() - torch.corrcoef(y.T)).abs().max())
        wrong = "" if error <= 1e-5 else f"error {error:g}"
        row(case=f"{dtype} width {width} samples {samples}", **found, **extra, error=error, wrong=wrong)
        if ours and dtype == torch.bfloat16 and target:
            rate = judged(extra["tflops_as_full_product"], 1300.0)
            row(case=f"{dtype} width {width}: TFLOP/s counted as a full product", **rate)
        del x, cov, pair
        torch.cuda.empty_cache()


def bench_similarity() -> None:
    """Weights and activations blended: one fused op against torch, step by step."""
    import torch

    import mudsc_fast as mf

    for n, columns in ((4096, 4096), (8192, 8192)):
        terms = [[torch.randn(n, columns, device="cuda") for _ in range(2)] for _ in range(2)]
        cov = mf.Covariance(n, models=2, device="cuda")
        cov.update([torch.randn(4096, n, device="cuda") for _ in range(2)])

        def unfused(terms: Any = terms, cov: Any = cov) -> torch.Tensor:
            stacked = [torch.cat([row[m] for row in terms], dim=1) for m in range(2)]
            centred = [s - s.mean(1, keepdim=True) for s in stacked]
            unit = [c / c.norm(dim=1, keepdim=True) for c in centred]
            return 0.5 * (unit[0] @ unit[1].T) + 0.5 * cov.correlation()[: len(unit[0]), len(unit[0]) :]

        def fused(terms: Any = terms, cov: Any = cov) -> torch.Tensor:
            return mf.dual_similarity(terms, cov, 0.5, "cross")

        found = compared({"mudsc_fast": fused, "torch": unfused}, 7)
        error = float((fused()[0] - unfused()).abs().max())
        memory = {"mudsc_fast": peak_memory(fused), "torch": peak_memory(unfused)}
        extra: dict[str, Any] = {"peak_bytes": memory, "memory_ratio": memory["mudsc_fast"] / memory["torch"]}
        if {"mudsc_fast", "torch"} <= set(found["seconds"]):
            extra["tflops"] = 2.0 * n * n * 2 * columns / found["seconds"]["mudsc_fast"] / 1e12
            extra |= judged(found["seconds"]["torch"] / found["seconds"]["mudsc_fast"], 1.5)
        row(
            case=f"n {n}, 2 terms of {columns}",
            **found,
            **extra,
            error=error,
            wrong="" if error <= 2e-5 else f"error {error:g}",
        )
        row(case=f"n {n}: peak memory over torch's", **judged(extra["memory_ratio"], 0.5, at_most=True))


def bench_assign() -> None:
    """Many small assignments, the whole call and the kernel alone."""
    import torch

    import mudsc_fast as mf
    from mudsc_fast.backends import cuda

    for problems, n, target in ((1024, 128, 0.003), (4096, 64, None), (256, 256, None)):
        s = torch.randn(problems, n, n, device="cuda")
        indices = torch.empty(problems * n, dtype=torch.int64, device="cuda")
        out = torch.empty(problems * (2 * n + 2), dtype=torch.float64, device="cuda")
        runs: dict[str, Callable[[], Any]] = {
            "mudsc_fast": lambda s=s: mf.assign(s, backend="cuda"),
            "kernel": lambda s=s, i=indices, o=out: cuda.assign(s, None, i, o),
        }
        found = compared(runs)
        host = s.cpu()
        best = mf.assign(host).value
        error = float((mf.assign(s, backend="cuda").value.cpu() - best).abs().max())
        extra = judged(found["seconds"]["mudsc_fast"], target, at_most=True) if target else {}
        row(
            case=f"{problems} x {n} x {n}",
            **found,
            **extra,
            error=error,
            wrong="" if error <= 1e-9 else f"error {error:g}",
        )
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        return
    import time

    host = torch.randn(1024, 128, 128).numpy()
    start = time.perf_counter()
    for matrix in host:
        linear_sum_assignment(matrix, maximize=True)
    row(case="1024 x 128 x 128 on the CPU", seconds={"scipy": time.perf_counter() - start})


def _correlated(d: int) -> Any:
    """The correlation of two models' features, related and noisy, in float32."""
    import torch

    shared = torch.randn(2048, d, device="cuda")
    x = torch.cat(
        [shared + 0.5 * torch.randn_like(shared), shared[:, torch.randperm(d)] + 0.5 * torch.randn_like(shared)], 1
    )
    x -= x.mean(0)
    x /= x.norm(dim=0)
    s = x.T @ x
    return torch.maximum(s, s.T).clamp_(-1, 1)


def bench_zip() -> None:
    """Whole zips of two models."""
    import torch

    import mudsc_fast as mf

    for d, blocks, target in ((1024, 1, None), (768, 12, None), (4096, 1, None), (14336, 1, 1.0)):
        s = _correlated(d)
        pairing = torch.arange(blocks).repeat(2, 1) if blocks > 1 else None

        def run(s: Any = s, blocks: int = blocks, pairing: Any = pairing) -> Any:
            return mf.zip_units(s, blocks=blocks, block_indices=pairing, backend="cuda")

        found = compared({"mudsc_fast": run}, 3)
        extra: dict[str, Any] = {}
        if d <= 1024:
            same = torch.equal(run().labels.cpu(), mf.zip_units(s.cpu(), blocks=blocks, block_indices=pairing).labels)
            extra["wrong"] = "" if same else "other labels than the CPU kernel's"
        if target and "mudsc_fast" in found["seconds"]:
            extra |= judged(found["seconds"]["mudsc_fast"], target, at_most=True)
        row(case=f"d {d}, {blocks} blocks", **found, **extra)
        del s
        torch.cuda.empty_cache()


def bench_regroup() -> None:
    """Gathers and pair sums on both axes; bytes are those that must be read and written."""
    import torch

    import mudsc_fast as mf
    from mudsc_fast.backends import cuda
    from mudsc_fast.regrouping import segments

    d, columns = 14336, 8192
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(d, columns, device="cuda").to(dtype)
        copy, _ = timed(lambda x=x: x.clone())
        copied = 2 * x.numel() * x.element_size() / copy
        for dim in (0, 1):
            length = x.shape[dim]
            for name, labels, size in (
                ("permutation", torch.randperm(length), length),
                ("pairs", torch.randperm(length) // 2, length // 2),
            ):
                shape = [size if k == dim else n for k, n in enumerate(x.shape)]
                out = torch.empty(shape, device="cuda", dtype=dtype)
                ptr, members = segments(labels, length, size)[:2]
                runs = {
                    "mudsc_fast": lambda x=x, out=out, dim=dim, p=ptr, m=members: cuda.regroup(x, out, dim, p, m, None),
                }
                if name == "permutation":
                    index = labels.argsort().cuda()
                    runs["torch.index_select"] = lambda x=x, dim=dim, i=index: x.index_select(dim, i)
                    try:
                        import cupy

                        if dtype == torch.float32:
                            array, places = cupy.from_dlpack(x), cupy.from_dlpack(index)
                            runs["cupy.take"] = lambda a=array, i=places, dim=dim: cupy.take(a, i, axis=dim)
                    except ImportError:
                        pass
                found = compared(runs)
                moved = (x.numel() + out.numel()) * x.element_size()
                wanted = mf.regroup(x[:, :64].cpu() if dim == 0 else x[:64].cpu(), labels, dim, size)
                got = (out[:, :64] if dim == 0 else out[:64]).cpu()
                wrong = "" if torch.equal(got, wanted) else "differs from the CPU kernel"
                rate = moved / found["seconds"]["mudsc_fast"]
                row(
                    case=f"{dtype} {d} x {columns} dim {dim} {name}",
                    **found,
                    bytes=moved,
                    tbps=rate / 1e12,
                    copy_tbps=copied / 1e12,
                    wrong=wrong,
                    **judged(rate / copied, 0.8),
                )


def bench_lists() -> None:
    """Lists of candidates of a tile of similarities, and the largest of each row, against torch.topk."""
    import torch

    from mudsc_fast.backends.triton.candidates import worth_most

    tile = torch.rand(2048, 28672, device="cuda")
    prices = torch.rand(28672, device="cuda", dtype=torch.float64)
    for room in (0, 16, 64, 128):
        found = compared(
            {
                "mudsc_fast": lambda k=room: worth_most(tile, 0, prices, k),
                "torch.topk": lambda k=room: (tile.double() - prices).topk(max(k, 1), dim=1),
            }
        )
        columns, _, threshold, maxima = worth_most(tile, 0, prices, room)
        worth = tile.double() - prices
        wrong = "" if torch.equal(maxima, worth.amax(dim=1)) else "other maxima"
        if room and not torch.equal(threshold, worth.scatter(1, columns.long(), -torch.inf).amax(dim=1)):
            wrong = "a bound that is not the largest of what is left out"
        moved = tile.numel() * tile.element_size()
        rate = moved / found["seconds"]["mudsc_fast"] / 1e12 if "mudsc_fast" in found["seconds"] else None
        row(case=f"2048 x 28672, {room} kept", **found, bytes=moved, tbps=rate, wrong=wrong)


def bench_align() -> None:
    """Two models of one wide layer aligned: tiles, lists and proof on the GPU with a solver on the CPU; and without."""
    import time

    import torch

    import mudsc_fast as mf

    n = 28672
    base = torch.randn(n, 4096, device="cuda")
    order = torch.randperm(n, device="cuda")
    terms = [[base, base[order] + 0.3 * torch.randn_like(base)]]

    def aligned(case: str, run: Callable[[], mf.Assignment], **judge: Any) -> None:
        torch.cuda.synchronize()
        start = time.perf_counter()
        found = run()
        seconds = time.perf_counter() - start
        right = float((found.indices.cpu() == order.argsort().cpu()).float().mean())
        row(
            case=f"{case} at width {n}",
            seconds={"mudsc_fast": seconds},
            gap=float(found.gap),
            found_share=right,
            wrong="" if right > 0.99 else f"only {right:.3f} of the units found their partner",
            **(judged(seconds, 30.0, at_most=True) if judge else {}),
        )

    small = [[w[:1024] for w in terms[0]]]
    mf.assign_tiled(mf.SimilarityTiles(small), backend="triton")  # compiles
    aligned("align in tiles", lambda: mf.assign_tiled(mf.SimilarityTiles(terms), backend="triton"), target=True)
    start = time.perf_counter()
    similarity = mf.weight_similarity(terms)[0]
    torch.cuda.synchronize()
    row(case=f"similarity at width {n}", seconds={"mudsc_fast": time.perf_counter() - start})
    aligned("lists of a similarity that is there", lambda: mf.assign_tiled(mf.MatrixTiles(similarity)))
    aligned("copied to the CPU's solver", lambda: mf.assign(similarity))


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
