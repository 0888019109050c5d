"""What every launch needs: the device, the number of programs, the order of tiles, and errors that name the kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mudsc_fast.backends.triton.configs import ProductConfig

INTERPRETED_PROGRAMS = 3  # on CPU tensors, where kernels are interpreted: so that persistent loops have several turns


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; CPU tensors, which only Triton's interpreter takes, follow Hopper's code."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@lru_cache(maxsize=64)
def programs(device: torch.device) -> int:
    """How many programs a persistent grid has: one an SM."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@contextmanager
def launching(kernel: str, device: torch.device) -> Iterator[None]:
    """Launch on this device and its current stream; whatever fails is raised as a RuntimeError that names the
    kernel."""
    try:
        if device.type == "cuda":
            with torch.cuda.device(device):
                yield
        else:
            yield
    except Exception as error:
        raise RuntimeError(f"{kernel} failed on {device}: {type(error).__name__}: {error}") from error


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, what: str, instead: str) -> Tensor:
    """Uninitialised memory, or a MemoryError that says how much is needed and which form needs less."""
    try:
        return torch.empty(shape, dtype=dtype, device=device)
    except torch.OutOfMemoryError as error:
        size = dtype.itemsize
        for length in shape:
            size *= length
        raise MemoryError(f"{what} needs {size / 2**30:.2f} GiB on {device}, which has less free; {instead}") from error


def tile_order(
    rows: int,
    columns: int,
    config: ProductConfig,
    triangle: bool,
    device: torch.device,
    strip: tuple[int, int] | None = None,
    beyond: int = 0,
) -> Tensor:
    """Tiles in the order in which programs take them: (tiles, 2), int32, on the device.

    Tiles that run at the same time lie in a square of `group` tile rows, so that both operands' panels stay in the L2
    cache.
    triangle: only tiles that reach above the diagonal. strip: only rows [first, last), first at a tile's edge. beyond:
    only tiles outside of the squares of this side along the diagonal, a multiple of a tile's sides.
    """
    first, last = strip or (0, rows)
    if first % config.rows:
        raise ValueError(f"strip: expected a first row that is a multiple of {config.rows}, got {first}")
    return _tile_order(first, last, columns, config.rows, config.columns, config.group, triangle, device, beyond)


@lru_cache(maxsize=64)
def _tile_order(
    first: int, last: int, columns: int, tall: int, wide: int, group: int, triangle: bool, device: torch.device,
    beyond: int,
) -> Tensor:  # fmt: skip
    i = torch.arange(first // tall, -(-last // tall), dtype=torch.int32)
    j = torch.arange(-(-columns // wide), dtype=torch.int32)
    pairs = torch.cartesian_prod(i, j).reshape(-1, 2)
    if triangle:
        pairs = pairs[(pairs[:, 1] + 1) * wide > pairs[:, 0] * tall]
    if beyond:
        pairs = pairs[pairs[:, 1] * wide // beyond != pairs[:, 0] * tall // beyond]
    key = (pairs[:, 0].long() // group * len(j) + pairs[:, 1]) * group + pairs[:, 0] % group
    return pairs[key.argsort()].contiguous().to(device)
