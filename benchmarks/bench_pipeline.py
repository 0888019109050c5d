"""Whole matches against the published pipeline, re-stated plainly, with the same sweeps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mudsc_fast as mf

from . import models
from .harness import OURS, Contender, Row
from .official import OfficialMatch


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
            Contender("official algorithm", lambda: OfficialMatch(states, spec, correlations, method, 0.5).run(sweeps)),
        ]

    def error(who: str, labels: Any) -> float:
        """Share of units whose label differs from ours."""
        if who == OURS:
            held["labels"] = labels
            return 0.0
        differ = [(held["labels"][space] != labels[space]).double().mean() for space in labels]
        return float(max(differ))

    width = max(max(shape) for shape in shapes.values())
    case = f"{name} {method}, {sweeps} sweeps at most"
    return Row("pipeline", case, width, contenders, error, 0.0, target=target, against="official algorithm", rounds=3)


def rows(quick: bool) -> Iterator[Row]:
    """The rows of the suite."""
    yield _row("ResNet-20 width 16", models.resnet20(), "align", 3, 20.0)
    yield _row("ResNet-20 width 16", models.resnet20(), "zip", 3, 100.0)
    yield _row("ViT 96x2", models.vit(96, 2), "zip", 2, 100.0, heads=3)
    if not quick:
        yield _row("MLP 512x3", models.mlp(), "align", 10, 20.0)
        yield _row("MLP 512x3", models.mlp(), "zip", 3, 100.0)
        yield _row("ViT 192x6", models.vit(), "align", 5, 20.0, heads=3)
        yield _row("ViT 192x6", models.vit(), "zip", 1, 100.0, heads=3)
