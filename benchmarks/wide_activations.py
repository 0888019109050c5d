"""A space whose sums of activations do not fit in memory: python -m benchmarks.wide_activations --json FILE.

Two one-layer networks, the second the first in another order with noise, are calibrated and matched by weights and
activations under limits that the sums exceed, and once more without limits: the same labels are expected.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mudsc_fast as mf
from mudsc_fast.stats_files import StatsFile, calibrate_to_file
from mudsc_fast.workplan import MARGIN, TensorShape, accumulator_bytes, plan_work, resident_bytes

from .harness import peak_rss_mib

INPUTS, OUTPUTS, NOISE = 96, 64, 0.5
BATCHES, BATCH = 8, 64


def measure(width: int, room: int, folder: Path) -> dict[str, Any]:
    """Calibrate and match one hidden layer with `room` bytes beside what the process holds."""
    torch.manual_seed(width)
    nets = [nn.Sequential(nn.Linear(INPUTS, width), nn.ReLU(), nn.Linear(width, OUTPUTS)) for _ in range(2)]
    axes = (mf.Axis("0.weight", 0, "out"), mf.Axis("0.bias", 0, "out"), mf.Axis("2.weight", 1, "in"))
    spec = mf.PermutationSpec((mf.Space("hidden", width, axes, (mf.Tap("2", "input", 1),)),))
    first = {name: x.clone() for name, x in nets[0].state_dict().items()}
    order = spec.random_permutation(1)
    second = {n: x + NOISE * x.std() * torch.randn(x.shape) for n, x in spec.permute(first, order).items()}
    nets[1].load_state_dict(second)
    batches = [torch.randn(BATCH, INPUTS) for _ in range(BATCHES)]
    path = folder / "stats.safetensors"
    start = time.perf_counter()
    limit = resident_bytes() + MARGIN + room
    _, passes = calibrate_to_file(nets, batches, spec, path, limit, "cross")
    calibrated = {"limit_mib": limit / 2**20, "peak_rss_mib": peak_rss_mib(), "passes": passes}
    calibrated["seconds"] = time.perf_counter() - start
    limit = resident_bytes() + MARGIN + room
    layout = {name: TensorShape(tuple(x.shape), x.dtype) for name, x in first.items()}
    way = plan_work(spec, layout, 2, max_memory=limit, balance=0.5, merging=False).step_of("hidden").way
    start = time.perf_counter()
    plan = mf.match([first, second], spec, StatsFile(path), max_memory=limit, progress=False)
    matched: dict[str, Any] = {"limit_mib": limit / 2**20, "peak_rss_mib": peak_rss_mib(), "way": way}
    matched["seconds"] = time.perf_counter() - start
    start = time.perf_counter()
    whole = mf.match([first, second], spec, mf.calibrate(nets, batches, spec, scope="cross"), progress=False)
    return {
        "width": width,
        "samples": BATCHES * BATCH,
        "columns": INPUTS + 1 + OUTPUTS,
        "sums_mib": accumulator_bytes(width, 2, False) / 2**20,
        "similarity_mib": 4 * width**2 / 2**20,
        "calibrated": calibrated,
        "matched": matched,
        "whole_seconds": time.perf_counter() - start,
        "value": plan.values["hidden"],
        "whole_value": whole.values["hidden"],
        "labels_equal": torch.equal(plan.labels["hidden"], whole.labels["hidden"]),
        "planted_found": float((plan.labels["hidden"][1] == order["hidden"]).double().mean()),
    }


def table(result: dict[str, Any]) -> list[str]:
    """What docs/scale.md says of a results file, line by line."""
    gib = 1024
    lines = [f"| width {result['width']:,} | limit | peak of the process | time | |", "|---|---|---|---|---|"]
    made, found = result["calibrated"], result["matched"]
    same = "the labels of the whole" if result["labels_equal"] else "other labels than the whole's"
    lines += [
        f"| {result['sums_mib'] / gib:.1f} GiB of sums recorded | {made['limit_mib'] / gib:.2f} GiB | "
        f"{made['peak_rss_mib'] / gib:.2f} GiB | {made['seconds']:.1f} s | {made['passes']} passes |",
        f"| matched, weights and activations | {found['limit_mib'] / gib:.2f} GiB | "
        f"{found['peak_rss_mib'] / gib:.2f} GiB | {found['seconds']:.1f} s | {same}; "
        f"{100 * result['planted_found']:.0f} % of the planted units |",
        f"| both, without limits | | | {result['whole_seconds']:.1f} s | |",
    ]
    return lines


def main() -> int:
    """Measure, and write one JSON file; 1 where a limit or the labels of the whole are missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--width", type=int, default=8192)
    parser.add_argument("--room", type=int, default=350 * 10**6, help="bytes beside what the process holds")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args.width, args.room, Path(folder))
    result = {"command": "python -m benchmarks.wide_activations", "threads": torch.get_num_threads(), **result}
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    steps = (result["calibrated"], result["matched"])
    return 0 if result["labels_equal"] and all(s["peak_rss_mib"] <= s["limit_mib"] for s in steps) else 1


if __name__ == "__main__":
    sys.exit(main())
