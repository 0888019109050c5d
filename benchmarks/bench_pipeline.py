"""Whole merges, match and merged tensors, against the published pipeline, re-stated plainly, with the same sweeps.

Both begin with the statistics of the activations: the published side with finished correlations, ours with sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import mudsc_fast as mf

from . import models
from .harness import OURS, Contender, Row
from .official import OfficialMatch

OFFICIAL = "official algorithm"
WHOLE = 100  # sweeps at most: both stop by themselves, the official code after five without a better value


Merged = tuple[dict[str, Tensor], dict[str, Tensor]]


def _joined(merged: dict[str, Tensor], name: str) -> Tensor:
    """A tensor that may have been cut into parts, as the published code cuts fused ones before it starts."""
    parts = [merged[f"{name}_{k}"] for k in range(3) if f"{name}_{k}" in merged]
    return torch.cat(parts) if parts else merged[name]


def _near(x: Tensor, y: Tensor) -> bool:
    # The published normalisation adds 1e-5 to the number of members of each axis.
    return torch.allclose(x, y, rtol=1e-4, atol=1e-5)


def _row(name: str, shapes: models.Shapes, method: str, sweeps: int, target: float, **hints: int) -> Row:
    held: dict[str, Any] = {}

    def contenders() -> list[Contender]:
        spec, states = models.pair(shapes, **hints)
        stats = models.statistics(spec)
        narrow = stats if method == "zip" else models.statistics(spec, scope="cross")
        correlations = {space: stats[space].correlation() for space in stats}
        options = {"method": method, "max_sweeps": sweeps, "progress": False}

        def ours() -> Merged:
            plan = mf.match(states, spec, activations=narrow, **options)
            return plan.labels, plan.merge(states)

        def official() -> Merged:
            match = OfficialMatch(states, spec, correlations, method, 0.5)
            return match.run(sweeps), match.merge()

        return [Contender(OURS, ours), Contender(OFFICIAL, official)]

    def error(who: str, found: Merged) -> float:
        """Share of units whose label differs from ours; 1 if a merged tensor does."""
        if who == OURS:
            held["labels"], held["merged"] = found
            return 0.0
        labels, merged = found
        far = [name for name, x in held["merged"].items() if not _near(_joined(merged, name), x)]
        differ = [(held["labels"][space] != labels[space]).double().mean() for space in labels]
        return 1.0 if far else float(max(differ))

    width = max(max(shape) for shape in shapes.values())
    case = f"{name} {method}, " + ("to the end" if sweeps == WHOLE else f"{sweeps} sweep")
    return Row("pipeline", case, width, contenders, error, 0.0, target=target, against=OFFICIAL, rounds=3)


def rows(quick: bool) -> Iterator[Row]:
    """The rows of the suite; the last four networks are those of the published figures."""
    yield _row("ResNet-20 width 16", models.resnet20(), "align", WHOLE, 20.0)
    yield _row("ResNet-20 width 16", models.resnet20(), "zip", WHOLE, 100.0)
    yield _row("ViT 96x2", models.vit(96, 2), "zip", 1, 100.0, heads=3)
    if quick:
        return
    # What takes the published side longest comes last.
    yield _row("MLP 512x3", models.mlp(), "align", WHOLE, 20.0)
    yield _row("ResNet-20 width 64", models.resnet20(64), "align", WHOLE, 20.0)
    yield _row("ViT 192x6", models.vit(), "align", WHOLE, 20.0, heads=3)
    yield _row("ResNet-20 width 64", models.resnet20(64), "zip", WHOLE, 100.0)
    yield _row("MLP 512x3", models.mlp(), "zip", WHOLE, 100.0)
    # One sweep on both sides: to its end the official algorithm takes ten minutes.
    yield _row("ViT 192x6", models.vit(), "zip", 1, 100.0, heads=3)
