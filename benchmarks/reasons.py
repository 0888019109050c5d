"""Why a row may stay below its target, in a sentence printed beside it; docs/performance.md says more."""

from __future__ import annotations

# (op, part of the case, reason); the first that fits.
_REASONS = (
    (
        "regroup",
        "512x512x3x3",
        "the tensor fits the last cache, where a copy moves a unit's bytes in 2.0 (16 bits) or 6.5 cycles (32 bits); "
        "an index, an unaligned load and an unaligned store take 1.7 or 3.0 in L1 alone",
    ),
    (
        "regroup",
        "12x64x768",
        "the tensor fits the second cache: some microseconds of each call beside a copy of 27",
    ),
    (
        "regroup",
        "dim 1 4096x4096 bfloat16",
        "transposing twice through L2 takes as long as the copy and overlaps with memory in part only",
    ),
    ("regroup", "dim 0 4096x4096 bfloat16", "as large as the last cache: the copy keeps a part of its result there"),
    ("regroup", "dim 1", "two transpositions of each line through L2, which overlap with memory in part only"),
    ("regroup", "dim 0", "rows in any order: each begins where the hardware does not expect it"),
    (
        "similarity",
        "permutation",
        "columns in another order are gathered one by one",
    ),
    ("similarity", "", "narrow: packing and norms, which grow with the columns alone, beside the product"),
    (
        "covariance",
        "in batches of",
        "each call costs 12 us of checks and Python; a row takes 5",
    ),
    (
        "covariance",
        "OpenBLAS",
        "OpenBLAS computes one triangle too, at 8192 at 89 % of the ceiling where ours has 93 %: 1.1 asks for 98 %",
    ),
    (
        "covariance",
        "float32 rows",
        "torch itself runs at 85 % of the ceiling, so a triangle at all of it would reach 2.35x; packing and the tiles "
        "that the diagonal cuts take the rest",
    ),
    (
        "pipeline",
        "width 64 zip",
        "the products of its weights, 7.5 GFLOP, take two thirds of the time, at nine tenths of this core's peak",
    ),
    (
        "zip",
        "second core",
        "copying and mirroring run on both cores; merges wait for each other, and blocks are taken one by one",
    ),
    (
        "assign",
        "second core",
        "lists are made on both cores; searches for paths wait for each other",
    ),
    (
        "assign",
        "product",
        "the limit is what the quickest peer took at 2048 units, the last size at which one was run",
    ),
    ("assign", "related", "at 64 units a call costs 2.7 us in Python, beside a solve of 2 to 3 us"),
    ("pipeline", "", "similarities and zips of a few dozen units: packing and checks beside little arithmetic"),
)


def reason(op: str, case: str) -> str:
    """One sentence, or that none is known."""
    for about, part, text in _REASONS:
        if about == op and part in case:
            return text
    return "not explained yet"
