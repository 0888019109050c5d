"""regroup against a memory copy of the same tensor, and against torch's own gather."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import mudsc_fast as mf

from .harness import OURS, Contender, Row


def _row(shape: tuple[int, ...], dim: int, dtype: torch.dtype, kind: str, threads: int = 1) -> Row:
    def make() -> tuple[Tensor, Tensor, int]:
        generator = torch.Generator().manual_seed(0)
        tensor = torch.randn(shape, generator=generator).to(dtype)
        labels = torch.randperm(shape[dim], generator=generator)
        if kind == "segment mean":
            labels = labels // 2
        return tensor, labels, int(labels.max()) + 1

    tensor_bytes = torch.Size(shape).numel() * dtype.itemsize
    out_bytes = tensor_bytes // (2 if kind == "segment mean" else 1)
    state: dict[str, Tensor] = {}

    def contenders() -> list[Contender]:
        tensor, labels, size = make()
        scale = torch.full((size,), 0.5) if kind == "segment mean" else None
        out_shape = [size if d == dim else n for d, n in enumerate(shape)]
        out, copied = torch.empty(out_shape, dtype=dtype), torch.empty_like(tensor)
        state["want"] = mf.reference.regroup(tensor, labels, dim, size, scale)
        found = [
            Contender(OURS, lambda: mf.regroup(tensor, labels, dim, size, scale, out=out)),
            Contender("copy of the input", lambda: copied.copy_(tensor)),
        ]
        if kind == "gather":
            index = labels.argsort()
            gathered = torch.empty_like(tensor)
            run = lambda: torch.index_select(tensor, dim, index, out=gathered)  # noqa: E731
        else:
            summed = torch.empty(out_shape, dtype=dtype)
            run = lambda: summed.zero_().index_add_(dim, labels, tensor).mul_(0.5)  # noqa: E731
        return [*found, Contender("torch", run)]

    def error(name: str, result: Tensor) -> float:
        if name.startswith("copy"):
            return 0.0
        return float((result.double() - state["want"]).abs().max())

    name = f"{kind} dim {dim} {'x'.join(map(str, shape))} {str(dtype).split('.')[1]}"
    tolerance = 0.0 if kind == "gather" else (3e-2 if dtype == torch.bfloat16 else 1e-6)
    return Row(
        "regroup",
        name,
        shape[dim],
        contenders,
        error,
        tolerance,
        target=0.8,
        against="copy of the input",
        work=tensor_bytes + out_bytes,
        unit="byte",
        threads=threads,
        rounds=9,
    )


def rows(quick: bool) -> Iterator[Row]:
    """The rows of the suite."""
    shapes: list[tuple[tuple[int, ...], int]] = [((4096, 4096), 0), ((4096, 4096), 1), ((512, 512, 3, 3), 1)]
    if not quick:
        shapes += [((14336, 4096), 0), ((4096, 14336), 1), ((12, 64, 768), 1)]
    for shape, dim in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            yield _row(shape, dim, dtype, "gather")
        yield _row(shape, dim, torch.float32, "segment mean")
