"""python -m fashion_mnist landscape: both tasks' losses on the plane through two parents and their merge."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mudsc_fast as mf
from fashion_mnist.data import DEBIAN, SPLITS, Fashion, class_vectors, load
from fashion_mnist.evaluate import CACHE, study_pair
from fashion_mnist.methods import METHODS, Pair
from fashion_mnist.parents import LOGIT_SCALE, NETWORKS, features_of
from mudsc_fast.evaluation import Landscape, Path1D, landscape, loss_path

FIGURES = Path("docs/images/quality")
MERGES = {"zip": "MuDSC zip", "best": "best, heads known"}
SPLIT, SEED = "halves", 0
State = dict[str, Tensor]


def own_losses(features: Tensor, labels: Tensor, vectors: Tensor) -> dict[str, float]:
    """{task: cross-entropy among the task's own classes}, as the parents were trained."""
    cosines = F.normalize(features, dim=1) @ vectors.T
    losses = {}
    for classes in SPLITS[SPLIT]:
        own = torch.tensor(classes)
        mine = torch.isin(labels, own)
        loss = F.cross_entropy(LOGIT_SCALE * cosines[mine][:, own], torch.searchsorted(own, labels[mine]))
        losses[f"classes {classes[0]}-{classes[-1]}"] = float(loss)
    return losses


def in_order_of(merged: State, parent: State, spec: mf.PermutationSpec) -> State:
    """The parent in the unit order in which its weights are most like the merged net's; its function is the same."""
    plan = mf.match([merged, parent], spec, method="align", balance=1.0, progress=False)
    return spec.permute(parent, {name: labels[1].argsort() for name, labels in plan.labels.items()})


def measure(
    network: str, merge: str, pair: Pair, data: Fashion, folder: Path, resolution: int, every: int
) -> Landscape:
    """The landscape of one merge; its grid is kept in `folder` and an interrupted one goes on."""
    images, labels, vectors = data.test.images[::every], data.test.labels[::every], class_vectors()

    def losses(state: State) -> dict[str, float]:
        net = pair.reset(mf.installed(pair.models[0], state))
        return own_losses(features_of(net, images), labels, vectors)

    net: nn.Module = METHODS[MERGES[merge]](pair)
    merged = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    parents = [in_order_of(merged, state, pair.spec) for state in pair.states]
    file = folder / f"{network}-{merge}.json"
    return landscape([*parents, merged], losses, ("A", "B", "merged"), resolution, path=file)


def paths(network: str, pair: Pair, data: Fashion, folder: Path, steps: int, every: int) -> dict[str, Path1D]:
    """Both tasks' losses from parent A to parent B: as trained, and with B in the order of MuDSC align."""
    images, labels, vectors = data.test.images[::every], data.test.labels[::every], class_vectors()

    def losses(state: State) -> dict[str, float]:
        net = pair.reset(mf.installed(pair.models[0], state))
        return own_losses(features_of(net, images), labels, vectors)

    plan = pair.searched("align")
    first, second = pair.states
    aligned = pair.spec.permute(second, {name: rows[1].argsort() for name, rows in plan.labels.items()})
    ends = {"as trained": second, "after MuDSC align": aligned}
    return {
        name: loss_path(first, end, losses, steps, folder / f"{network}-path-{k}.json")
        for k, (name, end) in enumerate(ends.items())
    }


def summary(found: Landscape) -> dict[str, Any]:
    """What the document says of a landscape: losses at the three networks, what counts as low, the merge."""
    return {
        "losses": found.at_points,
        "low": {task: found.low(task) for task in found.losses},
        "share": found.needed_share("merged"),
        "inside": found.in_overlap("merged"),
    }


@click.command("landscape")
@click.option("--data", type=click.Path(path_type=Path), default=DEBIAN, show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), default=CACHE, show_default=True)
@click.option("--network", "networks", multiple=True, type=click.Choice(list(NETWORKS)), help="Default: all.")
@click.option("--images", default=1024, show_default=True, help="Calibration images.")
@click.option("--every", default=10, show_default=True, help="Every how many-th test image is used.")
@click.option("--resolution", default=15, show_default=True, help="Points a side.")
@click.option("--figures", type=click.Path(path_type=Path), default=FIGURES, show_default=True)
def main(
    data: Path, cache: Path, networks: tuple[str, ...], images: int, every: int, resolution: int, figures: Path
) -> None:
    """Landscapes and barriers of seed 0's parents, as numbers and as pictures; goes on where it was stopped."""
    from mudsc_fast.evaluation.landscape_figures import draw_landscape, draw_paths

    fashion, folder = load(data), cache / "landscapes"
    folder.mkdir(parents=True, exist_ok=True)
    figures.mkdir(parents=True, exist_ok=True)
    for network in networks or tuple(NETWORKS):
        try:
            pair, _ = study_pair(network, SPLIT, SEED, False, fashion, cache, images)
        except FileNotFoundError as missing:
            click.echo(f"left out: {missing}", err=True)
            continue
        record: dict[str, Any] = {"landscapes": {}, "barriers": {}}
        for merge in MERGES:
            found = measure(network, merge, pair, fashion, folder, resolution, every)
            draw_landscape(found, figures / f"landscape-{network}-{merge}")
            record["landscapes"][MERGES[merge]] = summary(found)
        lines = paths(network, pair, fashion, folder, resolution, every)
        draw_paths(lines, figures / f"paths-{network}")
        record["barriers"] = {name: {task: line.barrier(task) for task in line.losses} for name, line in lines.items()}
        path = folder / f"{network}.summary.json"
        temporary = path.with_suffix(f".{os.getpid()}.part")
        temporary.write_text(json.dumps(record, indent=1))
        os.replace(temporary, path)
        click.echo(f"{network}: {record['barriers']}")
