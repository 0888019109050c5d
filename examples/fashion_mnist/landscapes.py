"""python -m fashion_mnist landscape: both tasks' losses on the plane through two parents and their merge."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
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
from fashion_mnist.parents import LOGIT_SCALE, NETWORKS, features_of, save
from fashion_mnist.parents import load as load_checkpoint
from mudsc_fast.evaluation import Landscape, Path1D, landscape, loss_path
from mudsc_fast.evaluation.plane import fingerprint

FIGURES = Path("docs/images/quality")
ENDS = ("as trained", "after MuDSC align")  # of the second parent
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


def kept(path: Path, pair: Pair, make: Callable[[], dict[str, State]]) -> dict[str, State]:
    """A figure's networks, made once: made again they may differ in the last bit, and losses are of these alone."""
    about = {"parents": fingerprint(pair.states), "images": sum(map(len, pair.calibration))}
    if path.exists():
        tensors, known = load_checkpoint(path)
        if known == about:
            found: dict[str, State] = {}
            for name, tensor in tensors.items():
                network, _, rest = name.partition("/")
                found.setdefault(network, {})[rest] = tensor
            return found
    networks = {name: {k: x.detach().clone() for k, x in state.items()} for name, state in make().items()}
    save(path, {f"{name}/{k}": x for name, state in networks.items() for k, x in state.items()}, about)
    return networks


def measure(
    network: str, merge: str, pair: Pair, data: Fashion, folder: Path, resolution: int, every: int
) -> Landscape:
    """The landscape of one merge; its grid is kept in `folder` and an interrupted one goes on."""
    images, labels, vectors = data.test.images[::every], data.test.labels[::every], class_vectors()

    def losses(state: State) -> dict[str, float]:
        net = pair.reset(mf.installed(pair.models[0], state))
        return own_losses(features_of(net, images), labels, vectors)

    def made() -> dict[str, State]:
        net: nn.Module = METHODS[MERGES[merge]](pair)
        merged = net.state_dict()
        parents = [in_order_of(merged, state, pair.spec) for state in pair.states]
        return dict(zip("AB", parents, strict=True)) | {"merged": merged}

    file = folder / f"{network}-{merge}.json"
    states = kept(file.with_suffix(".safetensors"), pair, made)
    names = ("A", "B", "merged")
    return landscape([states[name] for name in names], losses, names, resolution, path=file)


def paths(network: str, pair: Pair, data: Fashion, folder: Path, steps: int, every: int) -> dict[str, Path1D]:
    """Both tasks' losses from parent A to parent B: as trained, and with B in the order of MuDSC align."""
    images, labels, vectors = data.test.images[::every], data.test.labels[::every], class_vectors()

    def losses(state: State) -> dict[str, float]:
        net = pair.reset(mf.installed(pair.models[0], state))
        return own_losses(features_of(net, images), labels, vectors)

    first, second = pair.states

    def made() -> dict[str, State]:
        plan = pair.searched("align")
        order = {name: rows[1].argsort() for name, rows in plan.labels.items()}
        return dict(zip(ENDS, (second, pair.spec.permute(second, order)), strict=True))

    ends = kept(folder / f"{network}-path.safetensors", pair, made)
    return {
        name: loss_path(first, ends[name], losses, steps, folder / f"{network}-path-{k}.json")
        for k, name in enumerate(ENDS)
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
