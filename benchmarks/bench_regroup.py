"""regroup against a memory copy of the same tensor, and against torch's own gather.

A merge regroups each tensor once, so neither contender finds it in the caches; what small tensors take that stay there
is a row of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import mudsc_fast as mf
from mudsc_fast import _core

from . import second_core
from .harness import OURS, Contender, Row

# Values reach 100; a mean of two of them is off by one rounding of the type.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 7e-2, torch.bfloat16: 5e-1}


def prepared(shape: tuple[int, ...], dim: int, dtype: str) -> Callable[[], Tensor]:
    """One gather, for the second core's processes."""
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    labels, out = torch.randperm(shape[dim], generator=torch.Generator().manual_seed(1)), torch.empty_like(tensor)
    return lambda: mf.regroup(tensor, labels, dim, shape[dim], out=out)


def _ends(tensor: Tensor, dim: int, most: int = 64) -> Tensor:
    """The first and last rows across the unit axis, which are checked: all take the same way as these."""
    across = 1 - dim if tensor.dim() == 2 else 0
    if tensor.shape[across] <= 2 * most:
        return tensor
    return torch.cat([tensor.narrow(across, 0, most), tensor.narrow(across, tensor.shape[across] - most, most)], across)


def _row(
    shape: tuple[int, ...], dim: int, dtype: torch.dtype, kind: str, isa: str | None = None, cold: bool = True
) -> Row:
    def make() -> tuple[Tensor, Tensor, int]:
        generator = torch.Generator().manual_seed(0)
        tensor = (20 * torch.randn(shape, generator=generator)).to(dtype)
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
        state["want"] = _ends(mf.reference.regroup(_ends(tensor, dim), labels, dim, size, scale), dim)

        def ours() -> Tensor:
            _core.use_isa(isa)
            mf.regroup(tensor, labels, dim, size, scale, out=out)
            _core.use_isa(None)
            return out

        found = [
            Contender(OURS, ours),
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
        return float((_ends(result, dim).double() - state["want"]).abs().max())

    name = (
        f"{kind} dim {dim} {'x'.join(map(str, shape))} {str(dtype).split('.')[1]}"
        + (f", {isa}" if isa else "")
        + ("" if cold else ", in the caches")
    )
    tolerance = 0.0 if kind == "gather" else TOLERANCE[dtype]
    return Row(
        "regroup",
        name,
        shape[dim],
        contenders,
        error,
        tolerance,
        # Older instruction sets, and calls again and again on the same small tensors: a speed, not a judgement.
        target=0.8 if isa is None and cold else None,
        against="copy of the input",
        work=tensor_bytes + out_bytes,
        unit="byte",
        rounds=9,
        cold=cold,
        note="both into memory that is there already",
    )


def rows(quick: bool) -> Iterator[Row]:
    """The rows of the suite."""
    shapes: list[tuple[tuple[int, ...], int]] = [((4096, 4096), 0), ((4096, 4096), 1), ((512, 512, 3, 3), 1)]
    if not quick:
        shapes += [((14336, 4096), 0), ((4096, 14336), 1), ((12, 64, 768), 1)]
    for shape, dim in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            yield _row(shape, dim, dtype, "gather")
            yield _row(shape, dim, dtype, "segment mean")
    for kind in ("gather", "segment mean"):
        for dtype in (torch.float32, torch.bfloat16):
            yield _row((512, 512, 3, 3), 1, dtype, kind, cold=False)
    if quick:
        return
    for kind in ("gather", "segment mean"):
        for dtype in (torch.float32, torch.bfloat16):
            yield _row((12, 64, 768), 1, dtype, kind, cold=False)
    for shape, dim in (((14336, 4096), 0), ((4096, 14336), 1)):
        for dtype in (torch.float64, torch.float16):
            yield _row(shape, dim, dtype, "gather")
            yield _row(shape, dim, dtype, "segment mean")
        yield _row(shape, dim, torch.int8, "gather")
    for isa in _core.build_info()["isas_usable"][:-1]:
        for dim in (0, 1):
            yield _row((4096, 4096), dim, torch.float32, "gather", isa)
            yield _row((4096, 4096), dim, torch.bfloat16, "segment mean", isa)
    for dim in (0, 1):
        yield second_core.row("regroup", f"gather dim {dim} float32", 4096, prepared, ((4096, 4096), dim, "float32"))
