"""Why a row may stay below its target, in a sentence printed beside it; docs/performance.md says more."""

from __future__ import annotations

from .harness import Result

# (op, part of the case, reason); the first that fits.
_REASONS = (
    (
        "regroup",
        "512x512x3x3",
        "the tensor fits the last cache, where a copy is far faster than from memory; a unit of nine elements "
        "costs an index, an unaligned load and an unaligned store of its own",
    ),
    ("regroup", "12x64x768", "the tensor fits the second cache: checking a call in Python takes as long as a copy"),
    (
        "regroup",
        "dim 1 4096x4096 bfloat16",
        "input or result fits the last cache, where a copy is faster than from memory; two transpositions are not",
    ),
    ("regroup", "dim 0 4096x4096 bfloat16", "as large as the last cache: the copy keeps a part of its result there"),
    ("regroup", "dim 1", "two transpositions of each line, which overlap with memory in part only"),
    ("regroup", "dim 0", "rows in any order: each begins where the hardware does not expect it"),
    (
        "similarity",
        "permutation",
        "columns in another order are gathered one by one, twice: for the norms, for the product",
    ),
    ("similarity", "", "narrow: packing and norms, which grow with the columns alone, beside the product"),
    ("covariance", "in batches of 1", "Python's price for a call on each row"),
    ("covariance", "", "one triangle of 48 x 48 blocks computes more than a half at this width"),
    ("pipeline", "", "index arithmetic in Python, a fixed cost for every tensor of a small network"),
)


def reason(result: Result) -> str:
    """One sentence, or that none is known."""
    for op, part, text in _REASONS:
        if result.op == op and part in result.case:
            return text
    return "not explained yet"
