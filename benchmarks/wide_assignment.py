"""Alignments whose similarity would not fit in memory: python -m benchmarks.wide_assignment --json FILE.

First one space of full width, matched by ``mf.match`` under a limit of memory that its similarity alone exceeds. Then
problems of several kinds at a width where the dense solver can check the value: the same one is expected, and how often
the rows had to be made for it is counted.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mudsc_fast as mf
from mudsc_fast import rematch
from mudsc_fast.tiled_assignment import TiledRound
from mudsc_fast.workplan import TensorShape, plan_work

from .harness import peak_rss_mib

# What the second model's units are: the first's in another order, with noise of this many deviations; "low rank": of a
# few directions and little else, in the first's order with noise, or of other units in the same directions.
KINDS = {
    "related, noise 1": (1.0, None),
    "related, noise 3": (3.0, None),
    "low rank, related": (0.3, 6),
    "low rank, other units": (None, 6),
    "unrelated": (None, None),
    "related, one unit in ten dead": (1.0, None),
}


def source(width: int, columns: int, samples: int, kind: str) -> tuple[mf.SimilarityTiles, Tensor]:
    """Weights (width, columns) and activations (samples, width) of two models, and the second's order."""
    noise, rank = KINDS[kind]
    generator = torch.Generator().manual_seed(width)
    order = torch.randperm(width, generator=generator)

    def pair(count: int) -> tuple[Tensor, Tensor]:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        mixing = None if rank is None else random(rank, count)

        def units() -> Tensor:
            return random(width, count) if mixing is None else random(width, len(mixing)) @ mixing

        first = units()
        second = units() if noise is None else first[order]
        if rank is not None:
            first, second = first + 0.05 * random(width, count), second + 0.05 * random(width, count)
        if noise is not None:
            second = second + noise * random(width, count)
        if kind.endswith("dead"):
            first[::10], second[3::10] = 0.0, 0.0
        return first, second

    weights, features = pair(columns), pair(samples)
    return mf.SimilarityTiles([list(weights)], [x.T.contiguous() for x in features], 0.5), order


def compare(width: int, columns: int, samples: int, kind: str) -> dict[str, Any]:
    """One problem by rows, and by the dense solver."""
    tiles, order = source(width, columns, samples, kind)
    rounds: list[TiledRound] = []
    start = time.perf_counter()
    found = mf.assign_tiled(tiles, watch=rounds.append)
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    similarity = tiles.tile(torch.arange(width))
    made = time.perf_counter() - start
    start = time.perf_counter()
    whole = mf.assign(similarity)
    dense = time.perf_counter() - start
    back = torch.empty_like(order)
    back[order] = torch.arange(width)
    return {
        "kind": kind,
        "width": width,
        "columns": columns,
        "samples": samples,
        "seconds": seconds,
        "dense_seconds": made + dense,
        "rounds": len(rounds),
        "rows_made_of_width": (rounds[-1].rows_read + width) / width,
        "candidates_a_row": rounds[-1].candidates / width,
        "value": float(found.value),
        "dense_value": float(whole.value),
        "differs_from_dense": abs(float(found.value) - float(whole.value)) / max(abs(float(whole.value)), 1e-9),
        "gap": float(found.gap),
        "gap_of_sum_taken": float(found.gap) / max(abs(float(found.value)) * width, 1e-9),
        "planted_found": float((found.indices == back).double().mean()) if KINDS[kind][0] is not None else None,
    }


def match(width: int, inputs: int, outputs: int, noise: float, limit: int) -> dict[str, Any]:
    """One hidden layer matched by ``mf.match`` below a limit: the second model's is the first's, moved, with noise."""
    generator = torch.Generator().manual_seed(width)
    shapes = {"fc1.weight": (width, inputs), "fc1.bias": (width,), "fc2.weight": (outputs, width)}
    axes = (mf.Axis("fc1.weight", 0, "out"), mf.Axis("fc1.bias", 0, "out"), mf.Axis("fc2.weight", 1, "in"))
    spec = mf.PermutationSpec((mf.Space("hidden", width, axes),))
    first = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    order = spec.random_permutation(1)
    second = {
        name: x + noise * torch.randn(x.shape, generator=generator) for name, x in spec.permute(first, order).items()
    }
    layout = {name: TensorShape(shape, torch.float32) for name, shape in shapes.items()}
    step = plan_work(spec, layout, 2, max_memory=limit, merging=False).step_of("hidden")
    gaps: list[float] = []
    solve = rematch.assign_tiled

    def watched(*arguments: Any, **options: Any) -> mf.Assignment:
        found = solve(*arguments, **options, watch=lambda now: sys.stderr.write(f"{now}\n"))
        gaps.append(float(found.gap))
        return found

    rematch.assign_tiled = watched
    start = time.perf_counter()
    plan = mf.match([first, second], spec, max_memory=limit, progress=False)
    seconds = time.perf_counter() - start
    rematch.assign_tiled = solve
    return {
        "width": width,
        "columns": inputs + 1 + outputs,
        "noise": noise,
        "limit_mib": limit / 2**20,
        "similarity_mib": 4 * width**2 / 2**20,
        "way": step.way,
        "planned_mib": step.memory / 2**20,
        "peak_rss_mib": peak_rss_mib(),
        "seconds": seconds,
        "value": plan.values["hidden"],
        "gaps": gaps,
        "planted_found": float((plan.labels["hidden"][1] == order["hidden"]).double().mean()),
    }


def tables(result: dict[str, Any]) -> list[str]:
    """What docs/scale.md says of a results file, line by line."""
    wide = result["wide"]
    lines = [
        "| width | similarity | limit | peak, resident | time | gap | planted units found |",
        "|---|---|---|---|---|---|---|",
        f"| {wide['width']} | {wide['similarity_mib'] / 1024:.1f} GiB | {wide['limit_mib'] / 1024:.1f} GiB | "
        f"{wide['peak_rss_mib'] / 1024:.2f} GiB | {wide['seconds']:.0f} s | {max(wide['gaps']):.1g} | "
        f"{100 * wide['planted_found']:.0f} % |",
        f"| width {result['rows'][0]['width']} | value | differs from the dense solver's | gap, of the sum | rounds | "
        "rows made, of the width | time | dense |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['kind']} | {row['value']:.6f} | {row['differs_from_dense']:.1g} | {row['gap_of_sum_taken']:.1g} | "
        f"{row['rounds']} | {row['rows_made_of_width']:.3f} | {row['seconds']:.1f} s | {row['dense_seconds']:.1f} s |"
        for row in result["rows"]
    ]
    return lines


def main() -> int:
    """Run the wide match and the comparisons, and write one JSON file; 1 where a value is not the dense one's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--width", type=int, default=57344)
    parser.add_argument("--limit", type=int, default=8 * 10**9, help="bytes of memory of the wide match")
    parser.add_argument("--dense-width", type=int, default=8192)
    parser.add_argument("--columns", type=int, default=96)
    parser.add_argument("--samples", type=int, default=64)
    args = parser.parse_args()
    # Wide first: the peak of the process is then its own, not the dense solver's.
    wide = match(args.width, args.columns, args.samples, 1.0, args.limit)
    rows = []
    for kind in KINDS:
        rows.append(compare(args.dense_width, args.columns, args.samples, kind))
        sys.stderr.write(f"{rows[-1]}\n")
    about = {
        "command": "python -m benchmarks.wide_assignment "
        + " ".join(f"--{k} {v}" for k, v in vars(args).items() if k != "json").replace("dense_", "dense-"),
        "config": mf.build_config(),
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "wide": wide,
        "rows": rows,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    partial = args.json.with_suffix(".partial")
    partial.write_text(json.dumps(about, indent=1, default=str) + "\n")
    partial.replace(args.json)
    same = all(row["differs_from_dense"] <= 1e-6 for row in rows)
    return 0 if same and wide["peak_rss_mib"] * 2**20 <= args.limit else 1


if __name__ == "__main__":
    sys.exit(main())
