"""Why a row may stay below its target, in a sentence printed beside it; docs/performance.md says more."""

from __future__ import annotations

# (op, part of the case, reason); the first that fits.
_REASONS = (
    (
        "regroup",
        "segment mean dim 1 512x512x3x3 bfloat16",
        "three units of nine are summed at once, 31 instructions: 0.94 ns a unit in L1 alone and 1.2 in the "
        "second cache, where a copy moves its two members in 0.8 to 1.1",
    ),
    (
        "regroup",
        "512x512x3x3 bfloat16",
        "units of 18 bytes, read in any order: what is asked for ahead reaches 0.62 to 0.89 of a copy where nothing is "
        "in a cache; where all is, three units at a time take 0.40 ns a unit in L1 alone, beside a copy's 0.38",
    ),
    (
        "regroup",
        "512x512x3x3",
        "units of 36 bytes, read in any order: 0.73 to 0.95 of a copy as the last cache is free or not",
    ),
    (
        "regroup",
        "segment mean dim 1 12x64x768",
        "28 us for the kernel in the second cache (0.84 of a copy) and 1.7 for the call, beside a copy of 24; 0.67 to "
        "0.81 of a copy where nothing is in a cache",
    ),
    (
        "regroup",
        "12x64x768",
        "27 us for the kernel in the second cache (0.90 of a copy) and 1.3 for the call, beside a copy of 24; 0.71 to "
        "0.99 of a copy where nothing is in a cache",
    ),
    ("regroup", "dim 0 4096x4096 bfloat16", "as large as the last cache: the copy keeps a part of its result there"),
    (
        "regroup",
        "segment mean dim 1",
        "a tile is read and then stored, each at memory's speed as in a copy; between them its lines are written to "
        "the second cache and summed from there in any order (float64 13 of 44 ms, 16 bits 5 of 13)",
    ),
    *(
        (
            "regroup",
            f"gather dim 1 4096x14336 {dtype}",
            f"ours takes {ours} ms by run, the copy {copy}, presumably as its pages lie; "
            f"in pages of 2 MiB {large}, so what a tile does between reading and storing is the rest",
        )
        for dtype, ours, copy, large in (
            ("bfloat16", "13.1 to 14.5", "8.4 to 12.4", "12.6 and 8.1"),
            ("float16", "13.1 to 14.5", "8.4 to 12.4", "12.6 and 8.1"),
            ("int8", "8.9 to 9.6", "5.9 to 7.4", "8.3 and 5.2"),
        )
    ),
    (
        "regroup",
        "dim 1",
        "a tile is read and then stored, each at memory's speed as in a copy; between them its lines are written to "
        "the second cache (float64 5 ms) and gathered from there in any order (8.6 of 48 ms; 16 bits 3.4 of 13, int8 "
        "2.4 of 8)",
    ),
    (
        "regroup",
        "dim 0",
        "rows in any order: each begins where the hardware does not expect it; 16-bit means reach 0.93 to 1.0 of a "
        "copy in a process of its own",
    ),
    (
        "similarity",
        "permutation",
        "columns in another order are gathered one by one",
    ),
    (
        "similarity",
        "second core",
        "no page faults, but where the host has put the two virtual cores: a cache line goes from one to the other and "
        "back in 52 ns or, for tens of seconds, in 300; two threads, which share panels and result, then take 27.9 ms "
        "a call instead of 23.0, beside two processes' 22.5",
    ),
    (
        "similarity",
        "",
        "narrow: of 5.7 ms at 512 the product takes 4.65, 98 % of the ceiling; packing 0.49, blending 0.24, starting "
        "values 0.07 and Python 0.04 grow with the columns alone; in memory, panels of 512 columns (16 MiB at 4096 "
        "units, beside a result of 64) come on top where the heap holds no free pages",
    ),
    (
        "covariance",
        "in batches of",
        "a call that adds one row takes 2.9 us, of which packing the row is 2.3 (best of 3000 times ten calls)",
    ),
    (
        "covariance",
        "OpenBLAS",
        "OpenBLAS computes one triangle too, at 76 to 90 % of the ceiling from run to run; 1.1 times 89 % is 98 % of "
        "it, packing, the sums in float64 and the tiles that the diagonal cuts included, which take 3 % at 4096 units: "
        "ours has 95 to 96 %",
    ),
    (
        "covariance",
        "float32 rows",
        "torch ran at 76 to 86 % of the ceiling from run to run (its share stands in the row's JSON); at 83 to 86 %, "
        "2.3 asks for 95 to 99 % of it, and packing at the speed of a copy takes 4 % at 1024 units, 2 at 2048 and 1 at "
        "4096, the tiles that the diagonal cuts 1.4, 0.7 and 0.4, sums in float64 1 to 2",
    ),
    (
        "pipeline",
        "width 64 zip",
        "the official side takes 6.5 to 7.4 s from run to run; of ours, 63 ms, products between models are 34, at the "
        "speed of the FMA units, packing 8, bounds of those inside models 6 with 2 for rounding, the merge 6",
    ),
    (
        "zip",
        "32 blocks, second core",
        "three quarters of the call are the 1024 assignments that pair the blocks, which read 64 MiB from memory once; "
        "0.83 to 1.04 of two processes from run to run",
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
    (
        "assign",
        "refused",
        "the look at every entry is part of the pass that makes the lists: 2.8 % of 1024 related units over 1,100 "
        "turns, 1 of unrelated ones; a row's own turns spread by 7 to 14 %",
    ),
    ("assign", "planted", "at 64 units a call costs 1 us in Python, beside a solve of 2 us"),
    ("assign", "dead", "at 64 units a call costs 1 us in Python, beside a solve of 4 us"),
    ("assign", "related", "at 64 units a call costs 1 us in Python, beside a solve of 2 us"),
    (
        "pipeline",
        "width 16 zip",
        "run again and again it takes 3.0 ms; right after the official code, which leaves the caches cold, 4.0 to 4.4, "
        "of which 2.7 are visits, half of that packing and products that wait for memory",
    ),
    (
        "pipeline",
        "width 16 align",
        "run again and again it takes 2.0 ms, right after the official code, which leaves the caches cold, 2.8 to 3.9",
    ),
    ("pipeline", "", "similarities and zips of a few dozen units: packing and checks beside little arithmetic"),
)


def reason(op: str, case: str) -> str:
    """One sentence, or that none is known."""
    for about, part, text in _REASONS:
        if about == op and part in case:
            return text
    return "not explained yet"
