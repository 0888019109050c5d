"""The merging study in small: two kinds of networks on the digits, three pairs of parents each: `make quality-quick`.

Trains the parents, merges them without a refit and with one, prints the table and checks the orderings that the study
on Fashion-MNIST shows to be stable; exits with 1 where one does not hold.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import digits_task as task
import torch
from fashion_mnist.methods import METHODS, Pair
from networks import MLP, ResNet
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

FEATURES = 64
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: MLP(64, (128, 128), FEATURES),
    "resnet": lambda: ResNet((1, 1, 1), 16, channels=1, num_outputs=FEATURES),
}
ROWS = (
    "average",
    "weight align",
    "activation align",
    "MuDSC align",
    "weight zip",
    "activation zip (ZipIt)",
    "MuDSC zip",
    "zip + decoder + rescaling",
    "selection + decoder + rescaling",
    "selection + refit, heads",
    "control: first body, last layer solved, heads",
    "control: random halves + refit, heads",
    "best, without heads",
    "best, heads known",
)
# (better, worse, points): mean over the pairs, mean of both tasks. Only what holds for every network of the study on
# Fashion-MNIST, by its means over seeds (docs/quality.md). Nothing about one zip against another: these change places.
STABLE = (
    ("MuDSC zip", "average", 5.0),
    ("zip + decoder + rescaling", "MuDSC zip", 0.0),
    ("best, heads known", "MuDSC zip", 0.0),
    ("best, heads known", "best, without heads", -1.0),
    ("best, heads known", "control: first body, last layer solved, heads", 0.0),
)
WITHIN = 5.0  # points that `best` with heads may stay below its parents


def measure(build: Callable[[], nn.Module], seed: int, epochs: int, digits: task.Digits) -> dict[str, float]:
    """{row: mean of both tasks, %} for one pair of parents."""
    vectors = task.class_vectors(FEATURES)
    models = []
    for half, classes in enumerate(task.TASKS):
        torch.manual_seed(10 * seed + half)
        models.append(task.train(build(), digits, classes, vectors, epochs, 10 * seed + half).requires_grad_(False))

    def judge(net: nn.Module) -> float:
        held = digits.train_images[-200:], digits.train_labels[-200:]
        return task.accuracy(net.eval(), task.Digits(*held, *held), vectors).mean

    heads: list[Tensor] = [vectors[list(classes)] for classes in task.TASKS]
    pair = Pair(models, heads, digits.calibration(1024), judge)
    rows = {"parents": statistics.mean(task.accuracy(m, digits, vectors).tasks[h] for h, m in enumerate(models))}
    rows["ensemble"] = task.accuracy(task.ensemble(models), digits, vectors).mean
    for name in ROWS:
        rows[name] = task.accuracy(METHODS[name](pair).eval(), digits, vectors).mean
    return rows


def broken(means: dict[str, float]) -> list[str]:
    """The stable orderings that do not hold."""
    found = [
        f"{better} ({means[better]:.1f}) is not {points:g} above {worse} ({means[worse]:.1f})"
        for better, worse, points in STABLE
        if means[better] < means[worse] + points
    ]
    if means["best, heads known"] < means["parents"] - WITHIN:
        found.append(f"best, heads known ({means['best, heads known']:.1f}) is not near {means['parents']:.1f}")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, help="also write the numbers to this JSON file")
    options = parser.parse_args(arguments)
    console, digits, begin = Console(), task.load(), time.perf_counter()
    results: dict[str, list[dict[str, float]]] = {name: [] for name in NETWORKS}
    for name, seed in track([(n, s) for n in NETWORKS for s in range(options.pairs)], "digits"):
        results[name].append(measure(NETWORKS[name], seed, options.epochs, digits))
    table = Table(title=f"mean of both tasks, %; {options.pairs} pairs", title_justify="left")
    table.add_column("")
    for name in NETWORKS:
        table.add_column(name, justify="right")
    means = {n: {row: statistics.mean(r[row] for r in rows) for row in rows[0]} for n, rows in results.items()}
    for row in means["mlp"]:
        spreads = [statistics.pstdev(r[row] for r in results[n]) for n in NETWORKS]
        table.add_row(row, *(f"{means[n][row]:.1f} ± {s:.1f}" for n, s in zip(NETWORKS, spreads, strict=True)))
    console.print(table)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    problems = [f"{name}: {text}" for name in NETWORKS for text in broken(means[name])]
    for text in problems:
        console.print(f"[red]{text}")
    console.print(f"{time.perf_counter() - begin:.0f} s")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
