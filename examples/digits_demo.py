"""Two networks into one: a ResNet that knows the digits 0-4 and one that knows 5-9, merged without training.

Run by `make demo`. Trains both parents, streams the training images through them once, merges them in seven ways,
measures each on held-out images, draws out/demo/digits.png, and ends by doing one of the merges again through the
command line.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import digits_task as task
import torch
from digits_figure import Row, draw
from networks import ResNet
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mudsc_fast as mf

FEATURES = 64
BALANCE = 0.5  # fixed beforehand: nothing was chosen by looking at test images
COMPARED = {"weights": 1.0, "activations": 0.0, "both": BALANCE}
OWN_TASK_AT_LEAST = 97.0
SHOWN_SPACE = "layer2.0"  # the residual stream of the second stage: few enough units to see each of them


@dataclass(frozen=True)
class Settings:
    """How large the networks are and how long they train."""

    width: int = 32
    epochs: int = 20
    calibration_images: int = 1024


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    name: str
    kind: str
    accuracy: task.Accuracy
    seconds: float | None = None


def new_model(settings: Settings, seed: int) -> nn.Module:
    """A small ResNet with BatchNorm that turns an 8 x 8 image into 64 features, initialised by its own seed."""
    torch.manual_seed(seed)
    return ResNet(blocks=(1, 1, 1), width=settings.width, channels=1, num_outputs=FEATURES)


def train_parents(
    settings: Settings, seed: int, digits: task.Digits, vectors: Tensor, console: Console
) -> list[nn.Module]:
    """One parent for each half of the digits, each from an initialisation and an order of images of its own."""
    parents = []
    for index, classes in enumerate(task.TASKS):
        start = time.perf_counter()
        own_seed = 2 * seed + index
        model = new_model(settings, own_seed)
        parents.append(task.train(model, digits, classes, vectors, settings.epochs, own_seed))
        seconds = time.perf_counter() - start
        console.print(f"trained parent {'AB'[index]} on the digits {classes[0]}-{classes[-1]}: {seconds:.1f} s")
    return parents


def loaded(settings: Settings, state: Mapping[str, Tensor], batches: Sequence[Tensor]) -> nn.Module:
    """A network with these weights, its BatchNorm statistics recomputed on the calibration images."""
    model = new_model(settings, seed=0)
    model.load_state_dict(dict(state))
    mf.reset_batchnorm(model, batches)
    return model.eval()


def plain_average(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of the parents' tensors, unit by unit as they happen to be numbered."""
    first = states[0]
    return {
        name: torch.stack([state[name] for state in states]).mean(0) if tensor.is_floating_point() else tensor
        for name, tensor in first.items()
    }


def show(results: Sequence[Result], console: Console) -> None:
    """Prints the table and who won, whoever it is."""
    caption = "Test accuracy, %. 0-9: all ten digits at once; 0-4, 5-9: one task alone; mean: of both tasks."
    table = Table(caption=f"{caption} seconds: match and merge.", caption_justify="left")
    for heading in ("network", "0-9", "0-4", "5-9", "mean", "seconds"):
        table.add_column(heading, justify="left" if heading == "network" else "right")
    merges = [result for result in results if result.kind != "parent"]
    best = max(result.accuracy.joint for result in merges)
    winners = [result for result in merges if result.accuracy.joint == best]
    for index, result in enumerate(results):
        cells = [f"{value:.1f}" for value in (result.accuracy.joint, *result.accuracy.tasks, result.accuracy.mean)]
        seconds = "" if result.seconds is None else f"{result.seconds:.2f}"
        last = index + 1 == len(results) or results[index + 1].kind != result.kind
        table.add_row(result.name, *cells, seconds, end_section=last, style="bold" if result in winners else "")
    console.print(table)
    console.print(f"Best merged network over ten digits: [bold]{' and '.join(r.name for r in winners)}[/bold].")
    if not any(result.name.endswith("both") for result in winners):
        console.print("MuDSC, which compares both spaces, did not win this run.")
    noise = 100 * (best / 100 * (1 - best / 100) / task.TEST_IMAGES) ** 0.5
    console.print(f"With {task.TEST_IMAGES} test images the standard error of such a figure is {noise:.1f} points.")
    for result in results[:2]:
        if max(result.accuracy.tasks) < OWN_TASK_AT_LEAST:
            console.print(f"[yellow]{result.name} is below {OWN_TASK_AT_LEAST:.0f} % on its own task.[/yellow]")


def merge_by_command(
    states: Sequence[Mapping[str, Tensor]], stats: mf.ActivationStats, out: Path, console: Console
) -> Path:
    """Saves both parents and the statistics, then lets `mudsc-fast merge` do it; returns where the result lies."""
    names = [out / "digits_0-4.safetensors", out / "digits_5-9.safetensors"]
    for name, state in zip(names, states, strict=True):
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, name)
    stats.save(out / "statistics.safetensors")
    merged = out / "merged.safetensors"
    arguments = ["merge", *map(str, names), "-o", str(merged), "--method", "zip", "--balance", str(BALANCE)]
    arguments += ["--stats", str(out / "statistics.safetensors"), "--seed", "0", "--force"]
    console.print("\n$ mudsc-fast " + " ".join(arguments), soft_wrap=True, highlight=False)
    subprocess.run([sys.executable, "-m", "mudsc_fast", *arguments], check=True)
    return merged


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the picture and the checkpoints")
    parser.add_argument("--quick", action="store_true", help="tiny networks, hardly trained: seconds, and poor numbers")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another pair of parents")
    options = parser.parse_args(arguments)
    settings = Settings(width=8, epochs=2, calibration_images=256) if options.quick else Settings()
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    begin = time.perf_counter()

    digits = task.load()
    vectors = task.class_vectors(FEATURES)
    parents = train_parents(settings, options.seed, digits, vectors, console)
    states = [model.state_dict() for model in parents]
    batches = digits.calibration(settings.calibration_images)
    spec = mf.spec_for(parents[0])

    start = time.perf_counter()
    stats = mf.calibrate(parents, batches, spec)
    console.print(
        f"calibrated {len(spec.spaces)} spaces on {settings.calibration_images} training images of all ten digits, "
        f"labels unused: {time.perf_counter() - start:.1f} s"
    )

    results = [
        Result("parent A, digits 0-4", "parent", task.accuracy(parents[0], digits, vectors)),
        Result("parent B, digits 5-9", "parent", task.accuracy(parents[1], digits, vectors)),
        Result("ensemble (two networks)", "parent", task.accuracy(task.ensemble(parents), digits, vectors)),
    ]
    start = time.perf_counter()
    average = plain_average(states)
    seconds = time.perf_counter() - start
    results.append(
        Result("plain average", "average", task.accuracy(loaded(settings, average, batches), digits, vectors), seconds)
    )
    plans, merges = {}, {}
    for method in ("align", "zip"):
        for compared, balance in COMPARED.items():
            start = time.perf_counter()
            plan = mf.match(states, spec, activations=stats, method=method, balance=balance, seed=0, progress=False)
            merged = plan.merge(states)
            seconds = time.perf_counter() - start
            plans[method, compared], merges[method, compared] = plan, merged
            measured = task.accuracy(loaded(settings, merged, batches), digits, vectors)
            results.append(Result(f"{method}, {compared}", method, measured, seconds))
    show(results, console)
    console.print(f"BatchNorm statistics were recomputed after every merge. Balance of 'both': {BALANCE}, not tuned.")

    picture = options.out / "digits.png"
    before, after = unit_similarity(stats, plans["align", "both"], SHOWN_SPACE)
    draw([Row(r.name, r.kind, r.accuracy.joint, r.accuracy.mean) for r in results], before, after, SHOWN_SPACE, picture)
    console.print(f"picture: {picture}")

    by_command = load_file(merge_by_command(states, stats, options.out, console))
    ours = merges["zip", "both"]
    difference = max((by_command[name].double() - ours[name].double()).abs().max().item() for name in ours)
    same = by_command.keys() == ours.keys() and difference == 0.0
    console.print(f"largest difference from the same merge in Python: {difference:g}")
    console.print(f"all of it: {time.perf_counter() - begin:.0f} s")
    if not same:
        sys.exit("the command line's result differs from Python's")


def unit_similarity(stats: mf.ActivationStats, plan: mf.MergePlan, space: str) -> tuple[Tensor, Tensor]:
    """Correlations (units, units) of parent A's units with parent B's as they were numbered, and in matched order.

    Both show parent A's units from the best matched to the worst.
    """
    width = plan.labels[space].shape[1]
    cross = stats[space].correlation()[:width, width:]
    partner = plan.labels[space][1].argsort()
    order = cross[torch.arange(width), partner].argsort(descending=True)
    return cross[order], cross[order][:, partner[order]]


if __name__ == "__main__":
    main()
