"""python -m fashion_mnist train: trains the parents that have no checkpoint yet; can be stopped and started again."""

from __future__ import annotations

from pathlib import Path

import click

from fashion_mnist import heterogeneous
from fashion_mnist.data import DEBIAN, SPLITS, class_vectors, load
from fashion_mnist.parents import NETWORKS, Parent, train

CACHE = Path("out/fashion_mnist")


def plan(networks: tuple[str, ...], seeds: int, splits: tuple[str, ...]) -> list[Parent]:
    """Every parent of the study, in the order of training: all networks with seed 0 first."""
    separate = [
        Parent(network, split, seed, half)
        for seed in range(seeds)
        for split in splits
        for network in networks
        for half in (0, 1)
    ]
    based = [
        Parent(network, "halves", seed, half, base=True)
        for network in networks
        for seed in range(seeds)
        for half in (0, 1)
    ]
    return separate + based


@click.command("train")
@click.option("--data", type=click.Path(path_type=Path), default=DEBIAN, show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), default=CACHE, show_default=True, help="Checkpoints go here.")
@click.option("--network", "networks", multiple=True, type=click.Choice(list(NETWORKS)), help="Default: all.")
@click.option("--split", "splits", multiple=True, type=click.Choice(list(SPLITS)), help="Default: all.")
@click.option("--seeds", default=3, show_default=True)
@click.option(
    "--heterogeneous/--no-heterogeneous", "other_tasks", default=True, help="Parents with tasks of their own."
)
def main(
    data: Path, cache: Path, networks: tuple[str, ...], splits: tuple[str, ...], seeds: int, other_tasks: bool
) -> None:
    """Train the parents that have no checkpoint yet."""
    fashion, vectors = load(data), class_vectors()
    parents = plan(networks or tuple(NETWORKS), seeds, splits or tuple(SPLITS))
    for k, parent in enumerate(parents, 1):
        facts = train(parent, fashion, vectors, cache)
        click.echo(f"{k}/{len(parents)} {parent.name}: {facts['accuracy']:.1f} % on its own classes")
    for seed in range(seeds if other_tasks else 0):
        for task in heterogeneous.TASKS:
            score = heterogeneous.train(task, seed, fashion, cache)
            click.echo(f"heterogeneous seed {seed}, {task}: {score:.3f}")
