"""python -m fashion_mnist elastic: widths chosen by a budget against uniform ones of the same number of parameters."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.progress import track

import mudsc_fast as mf
from fashion_mnist.data import DEBIAN, SPLITS, class_vectors, load
from fashion_mnist.evaluate import scores, study_pair
from fashion_mnist.methods import Pair
from fashion_mnist.parents import NETWORKS, features_of
from fashion_mnist.table import write
from fashion_mnist.train import CACHE

BUDGETS = (0.5, 1.0, 1.5)
WIDTHS = ("uniform", "elastic")
METHODS = {
    "zip + decoder + rescaling": ("zip", False),
    "selection + decoder + rescaling": ("select", False),
    "selection + refit, heads": ("select", True),
}


def uniform_widths(pair: Pair, budget: float) -> dict[str, int]:
    """The largest share of all widths at once that fits the budget, of the spaces that elastic widths may change."""
    spaces = [space for space in pair.spec.spaces if space.within == "free" and space.tie is None]
    size = mf.merged_parameters(pair.states[0], pair.spec, {})
    shares = sorted({k / (s.width // s.blocks) for s in spaces for k in range(1, 2 * s.width // s.blocks + 1)})
    best: dict[str, int] = {}
    for share in shares:
        widths = {s.name: max(1, int(share * (s.width // s.blocks) + 1e-9)) * s.blocks for s in spaces}
        if mf.merged_parameters(pair.states[0], pair.spec, widths) > budget * size:
            break
        best = widths
    return best


def widths_of(pair: Pair, kind: str, budget: float, method: str) -> dict[str, int]:
    """Of one kind, for the match method."""
    if kind == "uniform":
        return uniform_widths(pair, budget)
    return mf.elastic_widths(pair.states, pair.spec, pair.stats, budget, method, progress=False)


@click.command("elastic")
@click.option("--data", type=click.Path(path_type=Path), default=DEBIAN, show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), default=CACHE, show_default=True)
@click.option("--network", "networks", multiple=True, type=click.Choice(list(NETWORKS)), help="Default: all.")
@click.option("--split", "splits", multiple=True, type=click.Choice(list(SPLITS)), help="Default: halves.")
@click.option("--seed", "seeds", multiple=True, type=int, help="Default: 0, 1, 2.")
@click.option("--images", default=1024, show_default=True, help="Calibration images.")
@click.option("--every", default=5, show_default=True, help="Every how many-th test image is used.")
def main(
    data: Path,
    cache: Path,
    networks: tuple[str, ...],
    splits: tuple[str, ...],
    seeds: tuple[int, ...],
    images: int,
    every: int,
) -> None:
    """Measure merges to several budgets of parameters; goes on where it was stopped."""
    fashion, vectors = load(data), class_vectors()
    test, labels = fashion.test.images[::every], fashion.test.labels[::every]
    rows = [(budget, kind, method) for budget in BUDGETS for kind in WIDTHS for method in METHODS]
    for seed in seeds or (0, 1, 2):
        for network in networks or tuple(NETWORKS):
            for split in splits or ("halves",):
                path = cache / "elastic" / f"{network}-{split}-{seed}.json"
                known = json.loads(path.read_text()) if path.exists() else {}
                if len(known) == len(rows):
                    continue
                try:
                    pair, _ = study_pair(network, split, seed, False, fashion, cache, images)
                except FileNotFoundError as missing:
                    click.echo(f"left out: {missing}", err=True)
                    continue
                for budget, kind, name in track(rows, path.stem):
                    key = f"{name}, {kind} widths, {budget}"
                    if key in known:
                        continue
                    method, refitted = METHODS[name]
                    widths = widths_of(pair, kind, budget, method)
                    plan = mf.match(pair.states, pair.spec, pair.stats, method, 0.0, widths, progress=False)
                    net = pair.refitted(plan, "heads") if refitted else pair.repaired(pair.decoded(plan), plan)
                    row = scores(features_of(net, test), labels, vectors, split)
                    row["size"] = mf.merged_parameters(pair.states[0], pair.spec, widths)
                    row["size"] /= mf.merged_parameters(pair.states[0], pair.spec, {})
                    known[key] = {**row, "widths": widths}
                    write(json.dumps(known, indent=1), path)
                click.echo(f"{path.stem}: done")
