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
        "the tensor fits the second cache: two to three microseconds of each call beside a copy of 27",
    ),
    (
        "regroup",
        "dim 1 4096x4096 bfloat16",
        "two transpositions through L2 overlap with memory in part only; the copy leaves its result's end in the cache",
    ),
    ("regroup", "dim 0 4096x4096 bfloat16", "as large as the last cache: the copy keeps a part of its result there"),
    (
        "regroup",
        "dim 1",
        "a tile takes half of L2 and its lines are read in any order; a copy leaves its result's end in the cache",
    ),
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
        "a call that adds one row takes 2.9 us, of which packing the row is 2.3 (best of 3000 times ten calls)",
    ),
    (
        "covariance",
        "OpenBLAS",
        "OpenBLAS computes one triangle too, at 8192 at 89 % of the ceiling where ours has 93 %: 1.1 asks for 98 %",
    ),
    (
        "covariance",
        "float32 rows",
        "torch itself runs at 85 % of the ceiling (its share stands in the row), so a triangle at all of it would "
        "reach 2.35x; what grows with the width alone, packing and cut tiles, has a row of its own",
    ),
    (
        "pipeline",
        "width 64 zip",
        "of the time in kernels (perf, cpu-clock) products between models are 43 %, bounds of those inside models 19 % "
        "with their rounding, packing 18 %; what is left beside these two grows with the units alone or is memory",
    ),
    (
        "zip",
        "second core",
        "of one block of 4096 units, copying takes 183 ms on one thread and 109 on two, merges 103 and 62: each merge "
        "is three steps on which threads wait for each other",
    ),
    (
        "assign",
        "second core",
        "of 50 ms on one thread, lists take 21, which a second halves; bids (7.5) and 45 shortest paths (21) are steps "
        "that wait for the one before: 39 ms are left, 0.65 of two processes",
    ),
    (
        "assign",
        "product",
        "all rows want the same columns: at 4096 units 82 % of the time are lists made anew (rdtsc), 95 a row",
    ),
    ("assign", "related", "at 64 units a call costs 2.7 us in Python, beside a solve of 2 to 3 us"),
    (
        "pipeline",
        "width 16 zip",
        "of 4.4 ms, run again and again, 2.5 are kernels of visits (a quarter of that products and bounds, a fifth "
        "packing, a fifth zips), 0.2 the merge's and 1.7 Python; 100x allows 4.1",
    ),
    (
        "pipeline",
        "width 16 align",
        "of 2.9 ms, run again and again, 1.3 are kernels of 24 visits, 0.2 the merge's and 1.4 Python; 20x allows 4.1, "
        "but right after the official code a run takes a fifth longer",
    ),
    ("pipeline", "", "similarities and zips of a few dozen units: packing and checks beside little arithmetic"),
)


def reason(op: str, case: str) -> str:
    """One sentence, or that none is known."""
    for about, part, text in _REASONS:
        if about == op and part in case:
            return text
    return "not explained yet"
