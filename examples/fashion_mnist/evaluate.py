"""python -m fashion_mnist evaluate: every method on every pair of trained parents; goes on where it was stopped."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import click
import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from fashion_mnist import heterogeneous_evaluation
from fashion_mnist.data import DEBIAN, SPLITS, Fashion, class_vectors, load
from fashion_mnist.methods import METHODS, ROTATED, Pair
from fashion_mnist.parents import NETWORKS, Parent, features_of, own_accuracy, trained
from fashion_mnist.train import CACHE

Row = dict[str, float]


def scores(features: Tensor, labels: Tensor, vectors: Tensor, split: str) -> Row:
    """mean: % right among each task's own classes, averaged over the two tasks; joint: among all ten classes."""
    features = F.normalize(features, dim=1)
    tasks = [own_accuracy(features, labels, vectors, classes) for classes in SPLITS[split]]
    joint = 100 * ((features @ vectors.T).argmax(1) == labels).double().mean().item()
    return {"mean": sum(tasks) / 2, "joint": joint, "first": tasks[0], "second": tasks[1]}


def study_pair(
    network: str, split: str, seed: int, base: bool, data: Fashion, cache: Path, images: int
) -> tuple[Pair, list[Parent]]:
    """The two parents, calibrated on `images` images drawn by the seed, judged on 1,000 held-out training images."""
    parents = [Parent(network, split, seed, half, base) for half in (0, 1)]
    vectors = class_vectors()
    chosen = slice(0, 1000)

    def judge(net: nn.Module) -> float:
        features = features_of(net, data.held_out.images[chosen])
        return scores(features, data.held_out.labels[chosen], vectors, split)["mean"]

    heads = [vectors[list(parent.classes)] for parent in parents]
    models = [trained(parent, cache) for parent in parents]
    return Pair(models, heads, data.calibration(images, seed, batch=128), judge), parents


def evaluate_pair(pair: Pair, split: str, data: Fashion, every: int, path: Path, only: tuple[str, ...]) -> None:
    """Add the rows that the pair's file lacks, one at a time."""
    known = json.loads(path.read_text()) if path.exists() else {"rows": {}, "seconds": {}}
    images, labels, vectors = data.test.images[::every], data.test.labels[::every], class_vectors()
    if "parents" not in known["rows"]:
        each = [features_of(model, images) for model in pair.models]
        own = [own_accuracy(f, labels, vectors, c) for f, c in zip(each, SPLITS[split], strict=True)]
        known["rows"]["parents"] = {"mean": sum(own) / 2, "first": own[0], "second": own[1]}
        together = torch.stack([F.normalize(f, dim=1) for f in each]).sum(0)
        known["rows"]["ensemble"] = scores(together, labels, vectors, split)
    possible = [name for name in METHODS if name not in ROTATED or pair.can_rotate]
    left = [name for name in possible if name not in known["rows"] and (not only or name in only)]
    for name in track(left, path.stem):
        known = json.loads(path.read_text()) if path.exists() else known  # another process may work on the same pair
        if name in known["rows"]:
            continue
        begin = time.process_time()
        net = METHODS[name](pair)
        seconds = time.process_time() - begin
        row = scores(features_of(net, images), labels, vectors, split)
        known = json.loads(path.read_text()) if path.exists() else known
        known["rows"][name] = row
        known["seconds"][name] = round(seconds, 2)
        known["balances"] = {**known.get("balances", {}), **pair.chosen}
        known["images"] = {"calibration": sum(map(len, pair.calibration)), "test": len(labels)}
        temporary = path.with_suffix(f".{os.getpid()}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(known, indent=1))
        os.replace(temporary, path)


@click.command("evaluate")
@click.option("--data", type=click.Path(path_type=Path), default=DEBIAN, show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), default=CACHE, show_default=True)
@click.option("--network", "networks", multiple=True, type=click.Choice(list(NETWORKS)), help="Default: all.")
@click.option("--split", "splits", multiple=True, type=click.Choice(list(SPLITS)), help="Default: all.")
@click.option("--method", "methods", multiple=True, type=click.Choice(list(METHODS)), help="Default: all.")
@click.option("--seed", "seeds", multiple=True, type=int, help="Default: 0, 1, 2.")
@click.option("--images", default=1024, show_default=True, help="Calibration images.")
@click.option("--every", default=5, show_default=True, help="Every how many-th test image is used.")
@click.option("--base/--no-base", default=True, help="Also parents fine-tuned from one base.")
def main(
    data: Path,
    cache: Path,
    networks: tuple[str, ...],
    splits: tuple[str, ...],
    methods: tuple[str, ...],
    seeds: tuple[int, ...],
    images: int,
    every: int,
    base: bool,
) -> None:
    """Measure every method on every pair of parents that is trained."""
    fashion = load(data)
    todo = [
        (network, split, seed, False)
        for seed in seeds or (0, 1, 2)
        for split in splits or tuple(SPLITS)
        for network in networks or tuple(NETWORKS)
    ]
    if base:
        todo += [(n, "halves", s, True) for s in seeds or (0, 1, 2) for n in networks or NETWORKS]
    for network, split, seed, based in todo:
        name = f"{network}-{split}{'-base' if based else ''}-{seed}"
        try:
            pair, _ = study_pair(network, split, seed, based, fashion, cache, images)
        except FileNotFoundError as missing:
            click.echo(f"left out: {missing}", err=True)
            continue
        evaluate_pair(pair, split, fashion, every, cache / "results" / f"{name}.json", methods)
        click.echo(f"{name}: done")
    for seed in (seeds or (0, 1, 2)) if not networks else ():
        try:
            done = heterogeneous_evaluation.evaluate(seed, fashion, cache, images, every)
        except FileNotFoundError as missing:
            click.echo(f"left out: {missing}", err=True)
            continue
        click.echo(f"{done.stem}: done")
