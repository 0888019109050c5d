"""Whole matches against the published pipeline, re-stated plainly, with the same sweeps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mudsc_fast as mf

from . import models
from .harness import OURS, Contender, Row
from .official import OfficialMatch

OFFICIAL = "official algorithm"
WHOLE = 100  # sweeps at most: both stop by themselves, the official code after five without a better value


def _row(name: str, shapes: models.Shapes, method: str, sweeps: int, target: float, **hints: int) -> Row:
    held: dict[str, Any] = {}

    def contenders() -> list[Contender]:
        spec, states = models.pair(shapes, **hints)
        stats = models.statistics(spec)
        narrow = stats if method == "zip" else models.statistics(spec, scope="cross")
        correlations = {space: stats[space].correlation() for space in stats}
        options = {"method": method, "max_sweeps": sweeps, "progress": False}
        return [
            Contender(OURS, lambda: mf.match(states, spec, activations=narrow, **options).labels),
            Contender(OFFICIAL, lambda: OfficialMatch(states, spec, correlations, method, 0.5).run(sweeps)),
        ]

    def error(who: str, labels: Any) -> float:
        """Share of units whose label differs from ours."""
        if who == OURS:
            held["labels"] = labels
            return 0.0
        differ = [(held["labels"][space] != labels[space]).double().mean() for space in labels]
        return float(max(differ))

    width = max(max(shape) for shape in shapes.values())
    case = f"{name} {method}, " + ("to the end" if sweeps == WHOLE else f"{sweeps} sweep")
    return Row("pipeline", case, width, contenders, error, 0.0, target=target, against=OFFICIAL, rounds=3)


def rows(quick: bool) -> Iterator[Row]:
    """The rows of the suite; the last four networks are those of the published figures."""
    yield _row("ResNet-20 width 16", models.resnet20(), "align", WHOLE, 20.0)
    yield _row("ResNet-20 width 16", models.resnet20(), "zip", WHOLE, 100.0)
    yield _row("ViT 96x2", models.vit(96, 2), "zip", 1 if quick else WHOLE, 100.0, heads=3)
    if quick:
        return
    for method, target in (("align", 20.0), ("zip", 100.0)):
        yield _row("MLP 512x3", models.mlp(), method, WHOLE, target)
        yield _row("ResNet-20 width 64", models.resnet20(64), method, WHOLE, target)
    yield _row("ViT 192x6", models.vit(), "align", WHOLE, 20.0, heads=3)
    # One sweep on both sides: to its end the official algorithm takes ten minutes.
    yield _row("ViT 192x6", models.vit(), "zip", 1, 100.0, heads=3)
