"""Deliberate faults in the CUDA sources, each of which the emulator must find.

Every barrier of every kernel is one, and the list below adds masks, offsets and conditions. All faults of a file are
compiled in at once, each behind a switch: ``if (!simt::mutant(7)) __syncthreads();``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_BARRIER = re.compile(r"^(\s*)((?:__syncthreads|__syncwarp|team_barrier)\(\);)", re.MULTILINE)

# Per kernel: what is replaced (it stands once in the file), by what, where "@" is the switch, and what then goes wrong.
EDITS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "regroup": (
        ("(p, first + r).in", "(p, @ ? first : first + r).in", "every line of a stage is the first"),
        ("c < p.length;", "c < p.length - @;", "the last element behind the whole vectors is not staged"),
        ("m < own.end; ++m) {", "m < own.end - @; ++m) {", "the last member is left out of a sum"),
        ("v < p.total;", "v < p.total + @;", "one vector too many"),
        ("p.total - first < p.lines ?", "!@ && p.total - first < p.lines ?", "lines beyond the last"),
        (
            "p.axes[d].out % lanes != 0",
            "(!@ && p.axes[d].out % lanes != 0)",
            "vectors at addresses that are not theirs",
        ),
    ),
    "zip": (
        ("(k + 1) / kLanes + thread;", "(k + 1) / kLanes + thread + @;", "a search that begins one vector late"),
        (
            "x.lane[l] > found.value)",
            "(x.lane[l] > found.value || (@ && x.lane[l] == found.value)))",
            "the last of equal entries instead of the first",
        ),
        ("[thread / 32] = mask;", "[thread / 32] = mask & (@ ? 0xffffu : kAll);", "half a warp is not asked"),
        ("(step & 1) * 2 * team", "(@ ? 0 : step & 1) * 2 * team", "one set of published pairs, not two by turns"),
        ("k == last ||", "(k == last && !@) ||", "the old maximum of the row merged last"),
        ("(lost || i < with)", "(lost || (i < with && !@))", "ties go to the partner that was first found"),
        ("better(row, top) ?", "!@ && better(row, top) ?", "the row merged last is never chosen"),
        (
            "resume(p.check[problem].last);",
            "resume(@ ? -1 : p.check[problem].last);",
            "a row's maximum is not found again",
        ),
        ("total = p.total[problem];", "total = @ ? 0 : p.total[problem];", "the sum of the launches before is lost"),
        (
            "p.first_step = static_cast<int>(first);",
            "p.first_step = static_cast<int>(first + @);",
            "a merge is left out",
        ),
        ("if (model[c] == m) work", "if ((model[c] == m) != @) work", "the other models' pairs are barred"),
    ),
    "assign": (
        (
            "mine.rank != top.rank &&",
            "!@ && mine.rank != top.rank &&",
            "a second best that is too low: prices too high",
        ),
        ("+= reached - shared.distance[j];", "+= reached - (@ ? 0 : shared.distance[j]);", "prices raised too far"),
        (
            "return __all_sync(kAll, all);",
            "return @ ? all : __all_sync(kAll, all);",
            "a lane asks its own columns only",
        ),
        ("= __shfl_xor_sync(kAll, mine.rank, by);", "= __shfl_xor_sync(kAll, mine.rank, @ ? 0 : by);", "a rank stays"),
        (
            "shared.row_of[j] >= 0 ? j + kMost : j",
            "(shared.row_of[j] >= 0 && !@) ? j + kMost : j",
            "taken columns come first",
        ),
    ),
}

# Faults that change neither a result nor an order, by their note, and why; they are not run.
EQUIVALENT: dict[str, str] = {
    "taken columns come first": "among equally near columns the order decides how long a search takes, not its value",
}


@dataclass(frozen=True)
class Mutant:
    """One fault: its switch, its kernel, and what it changes."""

    number: int
    kernel: str
    note: str


def _edits(kernel: str) -> list[tuple[str, str, str]]:
    return [edit for edit in EDITS[kernel] if edit[2] not in EQUIVALENT]


def mutants_of(kernel: str, text: str) -> list[Mutant]:
    """The faults of one source, numbered as in ``with_switches``."""
    found = [f"{m.group(2)} of line {text.count(chr(10), 0, m.start(2)) + 1} removed" for m in _BARRIER.finditer(text)]
    found += [note for _, _, note in _edits(kernel)]
    return [Mutant(number, kernel, note) for number, note in enumerate(found)]


def with_switches(kernel: str, text: str) -> str:
    """The source with every fault in it behind a switch; line numbers stay."""
    numbers = iter(range(1000))
    text = _BARRIER.sub(lambda m: f"{m.group(1)}if (!simt::mutant({next(numbers)})) {m.group(2)}", text)
    for old, new, _ in _edits(kernel):
        if text.count(old) != 1:
            raise ValueError(f"{kernel}.cu: expected {old!r} once, found it {text.count(old)} times")
        text = text.replace(old, new.replace("@", f"simt::mutant({next(numbers)})"))
    return f'#include "simt.h"\n#line 1 "{kernel}.cu"\n{text}'
