"""What a GPU run measures: every kernel against what there is beside it, with its target where it has one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.gpu.timing import compared, judged, peak_memory, row, timed


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
