"""The table of docs/gpu.md: each kernel, and how many tests it stands on in each layer of proof.

python -m benchmarks.proof.table [--records build/prove/kernels.json] [--write docs/gpu.md]

The records are those of `make prove`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import marked
from benchmarks.proof.__main__ import RESULT, ROOT

# What each kernel is part of; those of one CUDA source share their cases.
OPS = {
    "product.add_kernel": "covariance",
    "diagonal.diagonal_kernel": "covariance",
    "split.split_kernel": "covariance, similarity",
    "correlation.correlation_kernel": "covariance",
    "correlation.mirror_kernel": "covariance",
    "product.blend_kernel": "similarity, candidates, reduced costs",
    "candidates.collect_kernel": "assign_tile, candidates",
    "candidates.order_kernel": "assign_tile, candidates",
    "regroup": "regroup",
    "zip": "zip",
    "assign": "assign_small",
}


def table(records: list[dict[str, Any]]) -> str:
    """One line for each Triton kernel and each CUDA source.

    Raises:
        ValueError: a record of a kernel that is not in the list, a kernel without records, or a failed case.
    """
    groups: dict[str, list[dict[str, Any]]] = {name: [] for name in OPS}
    for record in records:
        name = record["kernel"] if "triton" in record else Path(record["source"]).stem
        if name not in groups or record["failures"]:
            raise ValueError(f"records: {record['failures']} failures of {name}, known are {list(groups)}")
        groups[name].append(record)
    lines = ["| op | kernel | source | A: cases | B: compilations | C |", "|---|---|---|---|---|---|"]
    for name, found in groups.items():
        if not found:
            raise ValueError(f"records: none of {name}; run `make prove` where both compilers are")
        kernels = sorted({record["kernel"] for record in found}, reverse=True)
        source = found[0]["source"].removeprefix("mudsc_fast/")
        shown = ", ".join(f"`{kernel}`" for kernel in kernels)
        lines.append(f"| {OPS[name]} | {shown} | `{source}` | {found[0]['cases']} | {len(found)} | not yet |")
    return "\n".join(lines)


def main() -> None:
    """Print the table, or write it into a document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=RESULT)
    parser.add_argument("--write", type=Path, default=None)
    options = parser.parse_args()
    text = table(json.loads(options.records.read_text(encoding="utf-8")))
    if options.write is None:
        print(text)
    else:
        marked.write(ROOT / options.write, {"proofs": text})


if __name__ == "__main__":
    main()
