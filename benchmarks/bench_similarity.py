"""Weight and dual similarity against the official correlation and blend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import mudsc_fast as mf
from mudsc_fast import _core

from . import second_core
from .harness import OURS, Contender, Row
from .peers import official_similarity

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
OFFICIAL = "official algorithm"


def _layer(width: int, columns: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Two models' tensors of a hidden layer, the one that makes its units and the one that reads them; its features."""
    generator = torch.Generator().manual_seed(width)
    half = columns // 2
    out = [torch.randn(width, half, generator=generator).to(dtype) for _ in range(2)]
    read = [torch.randn(columns - half, width, generator=generator).to(dtype) for _ in range(2)]
    return out, read, [torch.randn(512, width, generator=generator) for _ in range(2)]


def _labels(kind: str, size: int) -> list[Tensor]:
    """Labels of a neighbour: model 0's own order and another's, or a zip's."""
    generator = torch.Generator().manual_seed(size)
    if kind == "zip":
        return [torch.randint(0, size, (size,), generator=generator) for _ in range(2)]
    return [torch.arange(size), torch.randperm(size, generator=generator)]


def prepared(width: int, columns: int) -> Callable[[], Tensor]:
    """One call, for the second core's processes."""
    out, read, features = _layer(width, columns, torch.float32)
    activation = mf.Covariance(width, scope="cross")
    activation.update(features)
    terms: list[list[Tensor | mf.Term]] = [list(out), [mf.Term(x, 1) for x in read]]
    return lambda: mf.dual_similarity(terms, activation, 0.5)


def _row(width: int, columns: int, dtype: torch.dtype, kind: str = "", isa: str | None = None) -> Row:
    """``kind`` "permutation" or "zip": the neighbours are labelled, which the official code gets in order already."""
    held: dict[str, Tensor] = {}

    def contenders() -> list[Contender]:
        out, read, features = _layer(width, columns, dtype)
        activation = mf.Covariance(width, scope="cross")
        activation.update(features)
        terms: list[list[Any]] = [list(out), [mf.Term(x, 1) for x in read]]
        if kind:
            out_labels, read_labels = _labels(kind, out[0].shape[1]), _labels(kind, read[0].shape[0])
            terms = [
                [mf.Term(x, 0, {1: i}) for x, i in zip(out, out_labels, strict=True)],
                [mf.Term(x, 1, {0: i}) for x, i in zip(read, read_labels, strict=True)],
            ]
            size = max(int(i.max()) + 1 for i in out_labels)
            out = [mf.regroup(x.float(), i, 1, size) for x, i in zip(out, out_labels, strict=True)]
            size = max(int(i.max()) + 1 for i in read_labels)
            read = [mf.regroup(x.float(), i, 0, size) for x, i in zip(read, read_labels, strict=True)]
        seen = activation.correlation()[0]
        full_activation = torch.eye(2 * width)
        full_activation[:width, width:], full_activation[width:, :width] = seen, seen.T
        weights = [torch.cat([a.double(), b.double().T], dim=1) for a, b in zip(out, read, strict=True)]
        weights = [w - w.mean(1, keepdim=True) for w in weights]
        weights = [w / w.norm(dim=1, keepdim=True) for w in weights]
        held["want"] = 0.5 * (weights[0] @ weights[1].T) + 0.5 * seen.double()

        def ours() -> Tensor:
            _core.use_isa(isa)
            found = mf.dual_similarity(terms, activation, 0.5)
            _core.use_isa(None)
            return found

        return [
            Contender(OURS, ours),
            Contender(OFFICIAL, lambda: official_similarity(out, read, full_activation, 0.5)),
        ]

    def error(name: str, result: Tensor) -> float:
        got = result[0] if name == OURS else result[:width, width:]
        return float((got.double() - held["want"]).abs().max())

    return Row(
        "similarity",
        f"dual, align scope, {columns // width} columns a unit, {NAMES[dtype]}"
        + (f", {kind}" if kind else "")
        + (f", {isa}" if isa else ""),
        width,
        contenders,
        error,
        2e-5,
        target=4.0 if isa is None else None,  # older instruction sets: a speed, not a judgement
        memory_at_most=max(width * width * 4 / 2**20, 1.0) + 1,  # no temporary larger than the result
        against=OFFICIAL,
        work=2.0 * width * width * columns,
        unit="flop bf16" if dtype == torch.bfloat16 else "flop",
        rounds=5,
    )


def rows(quick: bool) -> Iterator[Row]:
    """The rows of the suite."""
    for width in (512, 1024) if quick else (512, 1024, 2048, 4096):
        yield _row(width, 2 * width, torch.float32)
    yield _row(1024, 2048, torch.bfloat16)
    yield _row(1024, 2048, torch.float32, "permutation")
    if not quick:
        yield _row(1024, 2048, torch.float32, "zip")
        yield _row(1024, 9216, torch.float32)
        for isa in _core.build_info()["isas_usable"][:-1]:
            yield _row(1024, 2048, torch.float32, isa=isa)
        yield second_core.row("similarity", "dual, align scope", 1024, prepared, (1024, 2048))
