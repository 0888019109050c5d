"""The Triton kernels on a GPU: configurations tried, and rows against cuBLAS and the unfused torch path.

python -m benchmarks.gpu_triton [--tune] [--json FILE]   prints {"tuned": ..., "rows": [...], "failures": [...]}

Not run by anything without a GPU, except at toy sizes in Triton's interpreter, where the times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mudsc_fast as mf

Run = Callable[[], object]
ROUNDS = 7


def clock(run: Run, device: torch.device, rounds: int = ROUNDS) -> list[float]:
    """Seconds of each of some rounds, after two that compile and warm up."""
    found = []
    for k in range(rounds + 2):
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            stop.synchronize()
            seconds = start.elapsed_time(stop) / 1e3
        else:
            before = time.perf_counter()
            run()
            seconds = time.perf_counter() - before
        if k >= 2:
            found.append(seconds)
    return found


def peak(run: Run, device: torch.device) -> int:
    """Bytes allocated at most while it runs, beyond those before."""
    if device.type != "cuda":
        return 0
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _batch(width: int, samples: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device=device).manual_seed(0)
    shared = torch.randn(samples, width, generator=generator, device=device)
    return [(shared + torch.randn(shared.shape, generator=generator, device=device)).to(dtype) for _ in range(2)]


@contextmanager
def _config(use: str, config: Any) -> Iterator[None]:
    from mudsc_fast.backends.triton import configs

    before = configs.TABLES[use]
    configs.TABLES[use] = dict.fromkeys(before, (config,))
    try:
        yield
    finally:
        configs.TABLES[use] = before


def _wrong(use: str, covariance: mf.Covariance, batch: list[Tensor], weights: list[list[Tensor]]) -> float:
    """Largest error of some units' correlations under the configuration in force."""
    width = batch[0].shape[1]
    some = torch.arange(0, width, max(1, width // 64), device=batch[0].device)
    if use == "add":
        pairs = torch.cat([x[:, some] for x in batch], dim=1).double()
        found = covariance.correlation()[torch.cat((some, some + width))][:, torch.cat((some, some + width))]
        return float((found - torch.corrcoef(pairs.T)).abs().max())
    pairs = torch.cat([w[some] for w in weights[0]]).double()
    found = mf.weight_similarity(weights, backend="triton")[0][some][:, some]
    return float((found - torch.corrcoef(pairs)[: len(some), len(some) :]).abs().max())


def tune(
    device: torch.device,
    width: int = 8192,
    samples: int = 16_384,
    rounds: int = ROUNDS,
    uses: Sequence[str] = ("add", "blend"),
) -> dict[str, Any]:
    """Time every configuration of this chip; {"tuned": {use: {chip: name}}, "tried": [...]}.

    One that fails, or whose results are off by more than 1e-5, is a row with "failed" and is never the winner.
    """
    from mudsc_fast.backends.triton import configs
    from mudsc_fast.backends.triton.launching import capability

    chip = configs.chip_of(capability(device))
    tried: list[dict[str, Any]] = []
    tuned: dict[str, dict[str, str]] = {}
    batch = _batch(width, samples, torch.bfloat16, device)
    weights = [[x[: samples // 4].T.float() for x in batch]]
    for use in uses:
        best = float("inf")
        for config in configs.listed(use, chip):
            row: dict[str, Any] = {"use": use, "config": config.name}
            try:
                with _config(use, config):
                    covariance = mf.Covariance(width, device=device, backend="triton")
                    runs: dict[str, Run] = {
                        "add": lambda c=covariance: c.update(batch),
                        "blend": lambda: mf.weight_similarity(weights, backend="triton"),
                    }
                    seconds = clock(runs[use], device, rounds)
                    row["error"] = _wrong(use, covariance, batch, weights)
                    if not row["error"] <= 1e-5:
                        raise ValueError(f"error {row['error']:g}")
                row["seconds"] = statistics.median(seconds)
                row["spread"] = (max(seconds) - min(seconds)) / row["seconds"]
                if row["seconds"] < best:
                    best = row["seconds"]
                    tuned[use] = {str(chip): config.name}
            except Exception as error:  # noqa: BLE001 (one that fails is a row, and the others go on)
                row["failed"] = f"{type(error).__name__}: {error}"
            tried.append(row)
    return {"tuned": tuned, "tried": tried}


def _compared(name: str, ours: Run, theirs: Run, device: torch.device, rounds: int, target: float) -> dict[str, Any]:
    mine, other = clock(ours, device, rounds), clock(theirs, device, rounds)
    seconds, against = statistics.median(mine), statistics.median(other)
    return {
        "case": name,
        "seconds": seconds,
        "spread": (max(mine) - min(mine)) / seconds,
        "against_seconds": against,
        "ratio": against / seconds,
        "target": target,
        "met": against / seconds >= target,
        "peak_bytes": peak(ours, device),
        "against_peak_bytes": peak(theirs, device),
    }


def covariance_row(width: int, samples: int, dtype: torch.dtype, device: torch.device, rounds: int) -> dict[str, Any]:
    """An update of 2 x width units against cuBLAS's full product of the same batch, stacked beforehand."""
    batch = _batch(width, samples, dtype, device)
    covariance = mf.Covariance(width, device=device, backend="triton")
    stacked = torch.cat(batch, dim=1)
    target = 1.7 if dtype == torch.bfloat16 else 2.0
    name = f"covariance, {dtype}, 2 x {width}, {samples} samples, against torch's x.T @ x".replace("torch.", "")
    row = _compared(name, lambda: covariance.update(batch), lambda: stacked.T @ stacked, device, rounds, target)
    row["full_flops"] = 2.0 * (2 * width) ** 2 * samples / row["seconds"]
    units = torch.arange(0, 2 * width, max(1, width // 128), device=device)
    wanted = torch.corrcoef(stacked[:, units].double().T)
    row["error"] = float((covariance.correlation()[units][:, units] - wanted).abs().max())
    return row


def similarity_row(width: int, columns: int, dtype: torch.dtype, device: torch.device, rounds: int) -> dict[str, Any]:
    """Weights blended with activations, against concatenation, centring, norms, two products and a blend in torch."""
    weights = [x.T.contiguous() for x in _batch(width, columns, dtype, device)]
    activation = mf.Covariance(width, scope="cross", device=device, backend="triton")
    features = _batch(width, 2 * width, torch.bfloat16, device)
    activation.update(features)
    terms = [[w[:, : columns // 2] for w in weights], [w[:, columns // 2 :] for w in weights]]

    def unfused() -> Tensor:
        made = []
        for m in range(2):
            x = torch.cat([term[m] for term in terms], dim=1).float()
            x = x - x.mean(dim=1, keepdim=True)
            made.append(x / x.norm(dim=1, keepdim=True))
        return 0.5 * (made[0] @ made[1].T) + 0.5 * activation.correlation()[0]

    name = f"similarity, {dtype}, {width} units, {columns} columns, against torch unfused".replace("torch.", "", 1)

    def ours() -> Tensor:
        return mf.dual_similarity(terms, activation, 0.5, backend="triton")

    row = _compared(name, ours, unfused, device, rounds, 1.5)
    row["error"] = float((ours()[0] - unfused()).abs().max())
    return row


def rows(device: torch.device, small: bool = False, rounds: int = ROUNDS) -> dict[str, list[Any]]:
    """All rows, and what failed, last; a row that fails costs only itself."""
    made: list[Callable[[], dict[str, Any]]] = []
    for width in (48,) if small else (2048, 8192, 14_336):
        for dtype in (torch.bfloat16, torch.float32):
            samples = 64 if small else 16_384
            made.append(lambda w=width, t=dtype, s=samples: covariance_row(w, s, t, device, rounds))
    for width, columns in ((48, 64),) if small else ((4096, 24_576), (8192, 16_384)):
        for dtype in (torch.bfloat16, torch.float32):
            made.append(lambda w=width, k=columns, t=dtype: similarity_row(w, k, t, device, rounds))
    found: list[dict[str, Any]] = []
    failures: list[str] = []
    for make in made:
        try:
            found.append(make())
        except Exception as error:  # noqa: BLE001 (goes on, and is listed)
            failures.append(f"{type(error).__name__}: {error}")
    return {"rows": found, "failures": failures}


def main() -> None:
    """Print what was measured as JSON, or write it to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    torch.backends.cuda.matmul.allow_tf32 = False
    result = {"device": torch.cuda.get_device_name(device), "torch": torch.__version__}
    result |= tune(device) if options.tune else {}
    result |= rows(device)
    text = json.dumps(result, indent=1)
    if options.json is None:
        print(text)
        return
    part = options.json.with_suffix(".part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(options.json)


if __name__ == "__main__":
    main()
