"""Covariance.update against torch's and OpenBLAS's products and the official update."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import mudsc_fast as mf

from .harness import OURS, Contender, Row
from .peers import official_covariance, openblas_ssyrk

MODELS = 2


def _row(width: int, samples: int, dtype: torch.dtype, threads: int = 1, kind: str = "rows", batch: int = 0) -> Row:
    """``width`` counts the units of all models together. Every contender adds the same batch to a running sum."""
    units = width // MODELS
    held: dict[str, Any] = {}

    def make() -> list[Tensor]:
        generator = torch.Generator().manual_seed(width)
        if kind == "channel-first":
            side = math.isqrt(samples // 32)
            return [torch.randn(32, units, side, side, generator=generator).to(dtype) for _ in range(MODELS)]
        return [torch.randn(samples, units, generator=generator).to(dtype) for _ in range(MODELS)]

    def stacked(features: list[Tensor]) -> Tensor:
        flat = [x.movedim(1, -1).reshape(-1, units) if x.dim() == 4 else x for x in features]
        return torch.cat(flat, dim=1)

    def contenders() -> list[Contender]:
        features = make()
        dim = 1 if kind == "channel-first" else -1
        together = stacked(features)
        want = together.double().T @ together.double()
        held["want"], held["scale"] = want, want.diagonal().clamp(min=1e-30).sqrt()
        held["features"], held["dim"] = features, dim
        cov = mf.Covariance(units, MODELS)
        pieces = [x.split(batch) for x in features] if batch else None

        def ours() -> mf.Covariance:
            if pieces is None:
                cov.update(features, dim=dim)
            else:
                for part in zip(*pieces, strict=True):
                    cov.update(list(part))
            return cov

        total = torch.zeros(width, width, dtype=torch.float32)
        found = [Contender(OURS, ours)]
        if dtype == torch.float32:
            found.append(Contender("torch addmm", lambda: total.addmm_(together.T, together)))
            found.append(openblas_ssyrk(together))
        else:
            found.append(Contender("torch bf16 mm", lambda: together.T @ together))
        found.append(Contender("official update", official_covariance(features, dim)))
        return found

    def error(name: str, result: Any) -> float:
        """Largest error of a correlation-like entry."""
        if name == OURS:
            fresh = mf.Covariance(units, MODELS)
            fresh.update(held["features"], dim=held["dim"])
            reference = mf.reference.Covariance(units, MODELS)
            reference.update(held["features"], dim=held["dim"])
            return float((fresh.correlation().double() - reference.correlation()).abs().max())
        got = torch.as_tensor(result).double()
        got = torch.maximum(got.triu().abs(), got.tril().T.abs()) if name == "OpenBLAS ssyrk" else got.triu().abs()
        want = held["want"].triu().abs()
        return float(((got - want) / (held["scale"][:, None] * held["scale"])).abs().max())

    name = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[dtype]
    case = f"{name} {kind}" + (f" in batches of {batch}" if batch else "")
    bf16 = dtype == torch.bfloat16
    return Row(
        "covariance",
        case,
        width,
        contenders,
        error,
        # bf16 products of torch are rounded to bf16; ours and float32 ones are not.
        1e-2 if bf16 else 2e-5,
        target=1.8 if bf16 else 2.3,
        against="torch bf16 mm" if bf16 else "torch addmm",
        work=2.0 * width * width * samples / 2,
        unit="flop bf16" if bf16 else "flop",
        threads=threads,
        rounds=5,
        note="work counts one triangle",
    )


def rows(quick: bool) -> Iterator[Row]:
    """The rows of the suite."""
    widths = (1024, 2048) if quick else (1024, 2048, 4096, 8192)
    for width in widths:
        samples = 4096 if width <= 2048 else 2048
        yield _row(width, samples, torch.float32)
        yield _row(width, samples, torch.bfloat16)
    yield _row(1022, 4096, torch.float32)
    yield _row(1024, 4608, torch.float32, kind="channel-first")
    if not quick:
        yield _row(1022, 4096, torch.bfloat16)
        yield _row(1024, 4608, torch.bfloat16, kind="channel-first")
        for batch in (1, 7, 33):
            yield _row(1024, 1056, torch.float32, batch=batch)
