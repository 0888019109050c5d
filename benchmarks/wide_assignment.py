"""One assignment whose similarity would not fit in memory: python -m benchmarks.wide_assignment --json FILE.

First at a width where the dense solver can check the value, then at full width, where only rows are ever made. The
second model's units are the first's in another order, with noise, so the answer is known too.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

import mudsc_fast as mf
from mudsc_fast.tiled_assignment import TiledRound

from .harness import peak_rss_mib


def source(width: int, columns: int, samples: int, noise: float | None) -> tuple[mf.SimilarityTiles, torch.Tensor]:
    """Weights (width, columns) and activations (samples, width) of two models; noise None: they are unrelated."""
    generator = torch.Generator().manual_seed(width)
    weights, features = (
        torch.randn(width, columns, generator=generator),
        torch.randn(samples, width, generator=generator),
    )
    order = torch.randperm(width, generator=generator)

    def other(x: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
        fresh = torch.randn(x.shape, generator=generator)
        return fresh if noise is None else moved + noise * fresh

    pairs = [[weights, other(weights, weights[order])]]
    return mf.SimilarityTiles(pairs, [features, other(features, features[:, order])], 0.5), order


def run(width: int, columns: int, samples: int, noise: float | None, dense: bool) -> dict[str, Any]:
    """Solve one problem; with the dense solver's value where asked for."""
    tiles, order = source(width, columns, samples, noise)
    rounds: list[TiledRound] = []
    start = time.perf_counter()
    found = mf.assign_tiled(tiles, watch=rounds.append)
    seconds = time.perf_counter() - start
    size = abs(float(found.value)) * width
    result = {
        "width": width,
        "columns": columns,
        "samples": samples,
        "noise": noise,
        "seconds": seconds,
        "rounds": len(rounds),
        "rows_read_of_width": (rounds[-1].rows_read + width) / width,
        "value": float(found.value),
        "gap": float(found.gap),
        "gap_of_sum_taken": float(found.gap) / size,
        "peak_rss_mib": peak_rss_mib(),
    }
    if noise is not None:
        back = torch.empty_like(order)
        back[order] = torch.arange(width)
        result["planted_found"] = float((found.indices == back).double().mean())
    if dense:
        whole = mf.assign(tiles.tile(torch.arange(width)))
        result["dense_value"] = float(whole.value)
        result["differs_from_dense"] = abs(float(found.value) - float(whole.value)) / abs(float(whole.value))
    return result


def main() -> None:
    """Run both widths and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--width", type=int, default=57344)
    parser.add_argument("--dense-width", type=int, default=8192)
    parser.add_argument("--columns", type=int, default=96)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--noise", type=float, default=1.0)
    args = parser.parse_args()
    # Wide first: the peak of the process is then its own, not the dense solver's.
    rows = [run(args.width, args.columns, args.samples, args.noise, dense=False)]
    for noise in (args.noise, None):
        rows.append(run(args.dense_width, args.columns, args.samples, noise, dense=True))
    about = {
        "config": mf.build_config(),
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rows": rows,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    partial = args.json.with_suffix(".partial")
    partial.write_text(json.dumps(about, indent=1, default=str) + "\n")
    partial.replace(args.json)


if __name__ == "__main__":
    main()
