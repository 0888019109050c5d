"""Weight and dual similarity against the official correlation and blend."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import mudsc_fast as mf

from .harness import OURS, Contender, Row
from .peers import official_similarity


def _row(width: int, columns: int, dtype: torch.dtype, target: float | None, threads: int = 1) -> Row:
    held: dict[str, Tensor] = {}

    def contenders() -> list[Contender]:
        generator = torch.Generator().manual_seed(width)
        half = columns // 2
        # Two tensors of a hidden layer: the one that produces its units, and the one that reads them.
        out = [torch.randn(width, half, generator=generator).to(dtype) for _ in range(2)]
        read = [torch.randn(columns - half, width, generator=generator).to(dtype) for _ in range(2)]
        activation = mf.Covariance(width, scope="cross")
        activation.update([torch.randn(512, width, generator=generator) for _ in range(2)])
        recorded = mf.Covariance(width, scope="full")
        recorded.update([torch.randn(512, width, generator=torch.Generator().manual_seed(1)) for _ in range(2)])
        full_activation = torch.eye(2 * width)
        full_activation[:width, width:] = activation.correlation()[0]
        full_activation[width:, :width] = activation.correlation()[0].T
        terms: list[list[Tensor | mf.Term]] = [list(out), [mf.Term(x, 1) for x in read]]
        weights = [torch.cat([a.double(), b.double().T], dim=1) for a, b in zip(out, read, strict=True)]
        weights = [w - w.mean(1, keepdim=True) for w in weights]
        weights = [w / w.norm(dim=1, keepdim=True) for w in weights]
        held["want"] = 0.5 * (weights[0] @ weights[1].T) + 0.5 * activation.correlation()[0].double()
        return [
            Contender(OURS, lambda: mf.dual_similarity(terms, activation, 0.5)),
            Contender("official algorithm", lambda: official_similarity(out, read, full_activation, 0.5)),
        ]

    def error(name: str, result: Tensor) -> float:
        got = result[0] if name == OURS else result[:width, width:]
        return float((got.double() - held["want"]).abs().max())

    name = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[dtype]
    return Row(
        "similarity",
        f"dual, align scope, {columns} columns, {name}",
        width,
        contenders,
        error,
        2e-5,
        target=target,
        against="official algorithm",
        work=2.0 * width * width * columns,
        unit="flop",
        threads=threads,
        rounds=5,
    )


def rows(quick: bool) -> Iterator[Row]:
    """The rows of the suite."""
    for width in (512, 1024) if quick else (512, 1024, 2048, 4096):
        yield _row(width, 2 * width, torch.float32, 4.0)
    yield _row(1024, 2048, torch.bfloat16, 4.0)
