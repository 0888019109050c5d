"""The small cases on which every deliberate fault must show, and the search for one that does not."""

from __future__ import annotations

from pathlib import Path

import torch

from simt import cases, driver, mutants
from simt.cases import Checked


def small_cases(kernel: str, schedules: int, tiny: bool) -> list[list[Checked]]:
    """The cases of a kernel, once for each schedule; ``tiny`` for TSan, to which every thread costs milliseconds."""
    return [_cases(kernel, {"seed": 11 + s, "policy": s % len(driver.POLICIES)}, tiny) for s in range(schedules)]


def _cases(kernel: str, options: dict[str, int], tiny: bool) -> list[Checked]:
    generator = torch.Generator().manual_seed(7)
    if kernel == "regroup":
        return _regroups(generator, options)[tiny:]  # the first takes 2,048 threads
    if kernel == "zip":
        return _zips(generator, options, tiny)
    return _assigns(generator, options)


def _regroups(generator: torch.Generator, options: dict[str, int]) -> list[Checked]:
    options = {**options, "multiprocessors": 1}
    wide, narrow = torch.randn(3, 9, 37, generator=generator), torch.randn(67, 13, generator=generator)
    padded = torch.zeros(3, 19)[:, :16]
    # Lines of whole vectors and a rest behind them.
    long, target = torch.randn(2, 40, generator=generator)[:, :39], torch.zeros(2, 40)[:, :39]
    return [
        # Lines, unaligned, more stages than blocks.
        cases.regroup(narrow, torch.randperm(13, generator=generator), 1, 13, **options),
        cases.regroup(narrow[:9], torch.arange(13) // 2, 1, 7, **options),
        cases.regroup(long, torch.randperm(39, generator=generator), 1, 39, None, target, **options),
        cases.regroup(wide, torch.randint(5, (9,), generator=generator), 1, 5, torch.rand(5) + 0.5, **options),
        # The result's rows lie 19 elements apart, the input's 20: no vectors, although both begin at one.
        cases.regroup(torch.randn(6, 20)[:, :16], torch.arange(6) // 2, 0, 3, None, padded, **options),
    ]


def _zips(generator: torch.Generator, options: dict[str, int], tiny: bool) -> list[Checked]:
    found = []
    for n, problems, ties, attenuation in ((70, 1, False, 0.5), (68, 2, True, 1.0)):
        dtype = torch.float64 if ties else torch.float32
        similarity = cases.similarity_of(problems * n, generator, dtype, ties)
        units = torch.arange(problems * n).view(problems, n)
        model_of = (torch.arange(n) * 2 // n).expand(problems, n).contiguous()
        budget = torch.tensor([[3, 2]]).repeat(problems, 1)  # both come to their end
        merges = 12 if tiny else n // 2
        full = torch.full_like(budget, n)
        options = {**options, "steps_a_launch": 5}
        found.append(cases.zip_problems(similarity, units, model_of, 2, merges, attenuation, budget, full, **options))
    return found if tiny else [*found, _negative(options)]


def _negative(options: dict[str, int]) -> Checked:
    """Negative entries rise when they are attenuated, so that a merged row can be chosen at once, and at a tie."""
    blocks = []
    for seed in (25, 61, 205, 229):  # problems in which such ties decide
        drawn = torch.randint(0, 6, (12, 12), generator=torch.Generator().manual_seed(seed))
        values = -(2.0**-drawn).double()
        blocks.append(values.triu() + values.triu(1).t())
    units = torch.arange(48).view(4, 12)
    model_of = (torch.arange(12) // 6).expand(4, 12).contiguous()
    budget = torch.full((4, 2), 12)
    return cases.zip_problems(torch.block_diag(*blocks), units, model_of, 2, 10, 0.5, budget, budget.clone(), **options)


def _assigns(generator: torch.Generator, options: dict[str, int]) -> list[Checked]:
    related = torch.randn(1, 2, 37, 37, generator=generator)
    related[..., torch.arange(37), torch.randperm(37, generator=generator)] += 2
    products = (torch.arange(1.0, 34)[:, None] * torch.arange(1.0, 34)).expand(1, 1, 33, 33).contiguous()
    broken = torch.randn(1, 2, 40, 40, generator=generator)
    broken[0, 1, 3, 33] = torch.nan
    start = torch.randn(1, 2, 2, 37, generator=generator, dtype=torch.float64) * 3
    return [
        # More problems than resident blocks, so that a block solves several, one after another.
        cases.assignments(torch.randn(35, 1, 7, 7, generator=generator), **{**options, "multiprocessors": 1}),
        cases.assignments(related, **options),
        cases.assignments(related, start, **options),
        cases.assignments(products, **options),
        cases.assignments(broken, **options),
    ]


def verdicts(binary: Path, checked: list[Checked], mutant: int = -1) -> str:
    """What a run of the cases with one fault shows; "" when nothing."""
    for c in checked:
        c.case.mutant = mutant
    run = driver.run(binary, [c.case for c in checked], cpu_seconds=6 if mutant >= 0 else 0)
    if not run.ok:
        return f"exit {run.code}: {run.output.strip().splitlines()[0] if run.output.strip() else ''}"
    return next((f"{c.note}: {c.verdict()}" for c in checked if c.verdict()), "")


def caught(kernel: str, mutant: mutants.Mutant, schedules: int = 5) -> str:
    """How a fault shows: under a few schedules, else under ThreadSanitizer; or ""."""
    for k, checked in enumerate(small_cases(kernel, schedules, tiny=False)):
        found = verdicts(driver.build("plain-mutants"), checked, mutant.number)
        if found:
            return f"schedule {k}: {found}"
    found = verdicts(driver.build("tsan-mutants"), small_cases(kernel, 1, tiny=True)[0], mutant.number)
    return f"race: {found}" if found else ""
