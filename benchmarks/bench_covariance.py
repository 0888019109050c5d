"""Covariance.update against torch's and OpenBLAS's products and the official update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import mudsc_fast as mf
from mudsc_fast import _core

from . import second_core
from .harness import OURS, Contender, Result, Row
from .peers import official_covariance, openblas_ssyrk

MODELS = 2
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
ADDMM, SSYRK, MM16, OFFICIAL, PLAIN = "torch addmm", "OpenBLAS ssyrk", "torch bf16 mm", "official update", "plain batch"
WHOLE = "the whole update"
TARGETS = {ADDMM: 2.3, SSYRK: 1.1, MM16: 1.8, OFFICIAL: 4.0}
# What is left of the plain batch's speed, at least. Batches of one row pay Python's price for a call on each.
NO_CLIFF = {"odd width": 0.8, "channel-first": 0.8, "channels-last": 0.8, "transposed": 0.8, 1: 0.35, 7: 0.75, 33: 0.85}

# Wider results are checked in so many of their columns, evenly spread: every panel of units and every place in it.
CHECKED_COLUMNS = 512


def _columns(width: int) -> Tensor:
    """The columns of a result that are checked."""
    count = min(width, CHECKED_COLUMNS if width > 2048 else width)
    return torch.arange(count) * width // count


def _features(kind: str, units: int, samples: int, dtype: torch.dtype, seed: int) -> tuple[list[Tensor], int]:
    """One tensor a model, and the unit axis."""
    generator = torch.Generator().manual_seed(seed)
    if "channel" in kind:
        made = [torch.randn(samples // 144, units, 12, 12, generator=generator).to(dtype) for _ in range(MODELS)]
        if kind == "channels-last":
            made = [x.contiguous(memory_format=torch.channels_last) for x in made]
        return made, 1
    made = [torch.randn(samples, units, generator=generator).to(dtype) for _ in range(MODELS)]
    return ([x.T.contiguous().T for x in made] if kind == "transposed" else made), -1


def _updates(features: list[Tensor], dim: int, batch: int = 0, isa: str | None = None) -> Callable[[], mf.Covariance]:
    """Adds the features to a running covariance, at once or in batches of rows, on one instruction set."""
    covariance = mf.Covariance(features[0].shape[dim], len(features))
    batches = [list(part) for part in zip(*(x.split(batch or len(x)) for x in features), strict=True)]

    def run() -> mf.Covariance:
        _core.use_isa(isa)
        for part in batches:
            covariance.update(part, dim)
        _core.use_isa(None)
        return covariance

    return run


def prepared(width: int, samples: int, dtype: str) -> Callable[[], mf.Covariance]:
    """One plain update, for the second core's processes."""
    return _updates(*_features("rows", width // MODELS, samples, getattr(torch, dtype), width))


def _row(
    width: int,
    samples: int,
    dtype: torch.dtype,
    against: str,
    kind: str = "rows",
    batch: int = 0,
    isa: str | None = None,
    target: float | None = None,
) -> Row:
    """``width`` counts the units of all models together. Every contender adds the same batch to a running sum."""
    units = width // MODELS
    held: dict[str, Any] = {}

    def contenders() -> list[Contender]:
        features, dim = _features(kind, units, samples, dtype, width)
        held["features"], held["dim"] = features, dim
        found = [Contender(OURS, _updates(features, dim, batch, isa))]
        if against == PLAIN:
            plain = _features("rows", units - units % 16, samples, dtype, width)
            return [*found, Contender(PLAIN, _updates(*plain))]
        together = torch.cat([x.movedim(dim, -1).reshape(-1, units) for x in features], dim=1)
        wide, columns = together.double(), _columns(width)
        held["columns"], held["want"] = columns, wide.T @ wide[:, columns]
        scale = wide.norm(dim=0).clamp(min=1e-15)
        held["scale"] = scale[:, None] * scale[columns]
        centred = wide - wide.mean(0)
        centred /= centred.norm(dim=0)
        held["correlation"] = centred.T @ centred[:, columns]
        if dtype == torch.float32:
            total = torch.zeros(width, width)
            found.append(Contender(ADDMM, lambda: total.addmm_(together.T, together)))
            found.append(openblas_ssyrk(together))
        else:
            found.append(Contender(MM16, lambda: together.T @ together))
        found.append(Contender(OFFICIAL, official_covariance(features, dim)))
        return found

    def error(name: str, result: Any) -> float:
        """Largest error of a correlation-like entry."""
        if name == PLAIN:
            return 0.0
        if name == OURS:
            fresh = _updates(held["features"], held["dim"], batch, isa)().correlation()
            if against == PLAIN:
                reference = mf.reference.Covariance(units, MODELS)
                reference.update(held["features"], dim=held["dim"])
                return float((fresh.double() - reference.correlation()).abs().max())
            return float((fresh[:, held["columns"]].double() - held["correlation"]).abs().max())
        got = torch.as_tensor(result)
        if name == SSYRK:  # the upper triangle
            got = got.triu()
            got += got.triu(1).T
        return float(((got[:, held["columns"]].double() - held["want"]) / held["scale"]).abs().max())

    bf16 = dtype == torch.bfloat16
    case = f"{NAMES[dtype]} {kind}" + (f" in batches of {batch}" if batch else "") + (f", {isa}" if isa else "")
    triangle = 1.0 * width * width * samples
    second = {ADDMM: SSYRK, MM16: OFFICIAL}.get(against)
    return Row(
        "covariance",
        case,
        width,
        contenders,
        error,
        # bf16 products of torch are rounded to bf16; ours and float32 ones are not.
        1e-2 if bf16 else 2e-5,
        target=None if isa else TARGETS.get(against) if target is None else target,
        against=against,
        work=triangle,
        unit="flop bf16" if bf16 else "flop",
        rounds=5,
        note="work counts one triangle; torch computes both, OpenBLAS one",
        work_of={ADDMM: 2.0 * width * width * samples, MM16: 2.0 * width * width * samples, SSYRK: triangle},
        also=() if isa or second is None else ((f"{case}, against {second}", second, TARGETS[second]),),
    )


def rows(quick: bool) -> Iterator[Row]:
    """The rows of the suite."""
    for width in (1024, 2048) if quick else (1024, 2048, 4096, 8192):
        yield _row(width, 4096, torch.float32, ADDMM)
        yield _row(width, 4096, torch.bfloat16, MM16)
    for dtype in (torch.float32,) if quick else (torch.float32, torch.bfloat16):
        yield _row(1022, 4608, dtype, PLAIN, "odd width", target=NO_CLIFF["odd width"])
        yield _row(1024, 4608, dtype, PLAIN, "channel-first", target=NO_CLIFF["channel-first"])
        if quick:
            continue
        for kind in ("channels-last", "transposed"):
            yield _row(1024, 4608, dtype, PLAIN, kind, target=NO_CLIFF[kind])
        for batch in (1, 7, 33):
            yield _row(1024, 1056, dtype, PLAIN, batch=batch, target=NO_CLIFF[batch])
    if quick:
        return
    usable = _core.build_info()["isas_usable"]
    for isa in usable[:-1]:
        yield _row(1024, 2048, torch.float32, ADDMM, isa=isa)
    for dtype in ("float32", "bfloat16"):
        yield second_core.row("covariance", f"{dtype} rows", 2048, prepared, (2048, 2048, dtype))


def summaries(results: Sequence[Result]) -> Iterator[Result]:
    """What of an update is no product: the part of its time that grows with the width alone, not with its square.

    It is packing, and what the tiles on the diagonal compute in vain; told by two widths with as many samples.
    """
    taken = {r.size: r.seconds[OURS] for r in results if r.op == "covariance" and r.case == "float32 rows"}
    narrow, wide = 1024, 2048
    if narrow not in taken or wide not in taken:
        return
    linear = (4 * taken[narrow] - taken[wide]) / 2
    found = Result("covariance", "float32 rows, what grows with the width alone", narrow, 1, against=WHOLE)
    found.seconds[OURS], found.spread[OURS] = max(linear, 0.0), 0.0
    if linear > 0:
        found.measured = found.ratios[WHOLE] = taken[narrow] / linear
    found.note = f"from {narrow} and {wide} units"
    yield found
