"""What all cases in Triton's interpreter share: import this before anything else of the package's Triton code, with
TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("these kernels run in Triton's interpreter: set TRITON_INTERPRET=1 before Python starts")

import interpreter_fixes
import torch
from torch import Tensor

from mudsc_fast import backends
from mudsc_fast.backends.triton import candidates, configs
from mudsc_fast.backends.triton.configs import ProductConfig

interpreter_fixes.apply()


def _spoiled(*arguments: Any, **options: Any) -> Tensor:
    """What `torch.empty` gives, with entries that are wrong wherever they are read: memory that was freed may hold what
    belongs there. Small, so that sums with them are believed: for those that are not, a second pass makes good ones."""
    return _empty(*arguments, **options).fill_(13)


_empty = torch.empty
torch.empty = _spoiled  # type: ignore[assignment]
# The launchers with CPU tensors: in this process alone.
backends.BACKENDS = (
    *backends.BACKENDS,
    backends.Backend("triton", "cpu", frozenset({"covariance", "similarity", "assign_tile"})),
)

CORRELATION = 1e-5  # docs/method.md; usual errors are a hundredth of it
USUAL = 1e-6  # where float32 and its planes lose nothing systematically
SMALL = ProductConfig(32, 32, 32, 4, 2, True, "small tiles: all edges at little cost", chunk=64)
POINTERS = ProductConfig(32, 32, 32, 4, 2, False, "no descriptors", chunk=64, slices=2)
OBLONG = ProductConfig(32, 64, 32, 4, 2, True, "squares along the diagonal of several small tiles", chunk=64)
CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Error = Callable[[int], float]
RAW = ("product.add_kernel", "diagonal.diagonal_kernel", "correlation.correlation_kernel")
ADD = ("product.add_kernel", "split.split_kernel", "correlation.correlation_kernel")
JUDGED = (*ADD, "diagonal.diagonal_kernel")  # raw products that are given up, or moments by a pass of their own
BLENDED = ("product.blend_kernel", "split.split_kernel")
LISTED = ("candidates.collect_kernel", "candidates.order_kernel")


@dataclass(frozen=True)
class Case:
    """One comparison: which kernels take part, and how far the result may be from the reference."""

    name: str
    kernels: tuple[str, ...]
    error: Error
    tolerance: float = CORRELATION
    extra: bool = False  # left to `make prove`: another of its kind is among the tests


@contextmanager
def cut_as(config: ProductConfig, near: ProductConfig | None = None) -> Iterator[None]:
    """Take this configuration for all products, and `near`, or its square tiles, for those near the diagonal."""
    before = {use: dict(configs.TABLES[use]) for use in ("add", "blend", "diagonal")}
    side = min(config.rows, config.columns)
    near = near or replace(config, rows=side, columns=side, add_descriptors=False, held=1)
    for use in before:
        configs.TABLES[use] = dict.fromkeys((80, 90, 100), (near if use == "diagonal" else config,))
    try:
        yield
    finally:
        configs.TABLES.update(before)


def features(samples: int, width: int, models: int = 2, ratio: float = 0.0, seed: int = 0) -> list[Tensor]:
    """Correlated units of standard deviation about 1 and mean `ratio`, float64."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(samples, width, generator=generator, dtype=torch.float64)
    made = []
    for m in range(models):
        mixed = shared.roll(m, 1) + 0.7 * torch.randn(samples, width, generator=generator, dtype=torch.float64)
        made.append(mixed / 1.22 + ratio * (1 if m % 2 == 0 else -1))
    return made


def matrices(width: int, columns: int, models: int = 2, seed: int = 0) -> list[Tensor]:
    """Related weights, (width, columns) a model, float64."""
    generator = torch.Generator().manual_seed(1000 * width + columns + seed)
    shared = torch.randn(width, columns, generator=generator, dtype=torch.float64)
    noise = torch.randn(models, width, columns, generator=generator, dtype=torch.float64)
    return [shared.roll(m, 0) + 0.5 * noise[m] for m in range(models)]


def distance(found: Tensor, wanted: Tensor) -> float:
    """Largest absolute difference; infinity where shapes differ or anything is NaN."""
    if found.shape != wanted.shape:
        return float("inf")
    gap = (found.double() - wanted.double()).abs()
    return float("inf") if bool(gap.isnan().any()) else float(gap.max())


@contextmanager
def few_columns() -> Iterator[None]:
    """Blocks of few columns, so that a row has several."""
    before = candidates.BLOCK
    candidates.BLOCK = 32
    try:
        yield
    finally:
        candidates.BLOCK = before
