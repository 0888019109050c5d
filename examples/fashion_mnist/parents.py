"""The parents of the study: what they are, how they are trained, where their checkpoints lie."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from networks import MLP, VGG, ResNet20, ViT
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fashion_mnist.data import FEATURES, SPLITS, Fashion, Images

LOGIT_SCALE = 16.0  # cosines are at most 1; without a scale cross-entropy cannot fall
BATCH = 128


@dataclass(frozen=True)
class Network:
    """build: a fresh network. epochs, rate, adam: its training. bfloat16: autocast, where that is faster on CPUs."""

    build: Callable[[], nn.Module]
    epochs: float
    rate: float
    adam: bool = False
    bfloat16: bool = False


NETWORKS = {
    "mlp": Network(lambda: MLP(784, (512, 512, 512), FEATURES), 8, 0.05, bfloat16=True),
    "vgg11": Network(
        lambda: VGG(
            (16, "M", 32, "M", 64, 64, "M", 128, 128, "M", 128, 128), hidden=(128,), image=28, channels=1,
            num_outputs=FEATURES,
        ),
        2, 0.05, bfloat16=True,
    ),
    "vit": Network(
        lambda: ViT(28, 7, 1, width=96, depth=4, num_heads=4, hidden=192, num_outputs=FEATURES), 4, 2e-3, adam=True
    ),
    "resnet20": Network(lambda: ResNet20(16, channels=1, num_outputs=FEATURES), 1.5, 0.1, bfloat16=True),
    "resnet20gn": Network(lambda: ResNet20(16, norm="group", channels=1, num_outputs=FEATURES), 1, 2e-3, adam=True),
}  # fmt: skip


@dataclass(frozen=True)
class Parent:
    """One parent: network, split of the classes, seed, and which half (0, 1) it knows.

    base: fine-tuned from a network that was first trained to tell by which quarter turn an image is rotated.
    """

    network: str
    split: str
    seed: int
    half: int
    base: bool = False

    @property
    def name(self) -> str:
        return f"{self.network}-{self.split}{'-base' if self.base else ''}-{self.seed}-{self.half}"

    @property
    def classes(self) -> tuple[int, ...]:
        return SPLITS[self.split][self.half]


def own_accuracy(features: Tensor, labels: Tensor, vectors: Tensor, classes: tuple[int, ...]) -> float:
    """% of the images of these classes whose feature is closest, among these classes' vectors, to its own."""
    mine = torch.isin(labels, torch.tensor(classes))
    guess = torch.tensor(classes)[(features[mine] @ vectors[list(classes)].T).argmax(1)]
    return 100 * (guess == labels[mine]).double().mean().item()


@torch.no_grad()
def features_of(model: nn.Module, images: Tensor, batch: int = 500) -> Tensor:
    """The features of all images, in eval mode."""
    model.eval()
    return torch.cat([model(x) for x in images.split(batch)])


def _fit(
    model: nn.Module,
    network: Network,
    epochs: float,
    images: Tensor,
    targets: Tensor,
    vectors: Tensor,
    seed: int,
    what: str,
) -> None:
    """Trains `model` in place so that the features of images[i] point at vectors[targets[i]]."""
    generator = torch.Generator().manual_seed(seed)
    steps = max(1, int(epochs * len(images) / BATCH))
    if network.adam:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=network.rate, weight_decay=0.02)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=network.rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=network.rate, total_steps=steps, pct_start=0.2)
    order: list[Tensor] = []
    model.train()
    for _ in track(range(steps), f"training {what}"):
        if not order:
            order = list(torch.randperm(len(images), generator=generator).split(BATCH))
        chosen = order.pop()
        with torch.autocast("cpu", torch.bfloat16, enabled=network.bfloat16):
            features = model(images[chosen])
        cosines = F.normalize(features.float(), dim=1) @ vectors.T
        loss = F.cross_entropy(LOGIT_SCALE * cosines, targets[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _rotated(data: Images, seed: int) -> tuple[Tensor, Tensor]:
    """Every image turned by a random number of quarters, and that number."""
    turns = torch.randint(0, 4, (len(data.labels),), generator=torch.Generator().manual_seed(seed))
    images = data.images.clone()
    for k in (1, 2, 3):
        images[turns == k] = data.images[turns == k].rot90(k, (2, 3))
    return images, turns


def _base(parent: Parent, data: Fashion, vectors: Tensor, folder: Path) -> dict[str, Tensor]:
    """The state of the common base of both halves; trained once, then read from its checkpoint."""
    path = folder / f"{parent.network}-base-{parent.seed}.safetensors"
    network = NETWORKS[parent.network]
    if not path.exists():
        torch.manual_seed(3000 + parent.seed)
        model = network.build()
        images, turns = _rotated(data.training, parent.seed)
        _fit(model, network, network.epochs / 2, images, turns, -vectors[:4], parent.seed, path.stem)
        save(path, model.state_dict(), {})
    return load(path)[0]


def save(path: Path, state: dict[str, Tensor], about: dict[str, object]) -> None:
    """A checkpoint with its facts in the header; whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.part")
    save_file({k: v.contiguous() for k, v in state.items()}, temporary, {"about": json.dumps(about)})
    os.replace(temporary, path)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """(state dict, facts) of a checkpoint that `save` wrote."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["about"])  # noqa: SIM118


def train(parent: Parent, data: Fashion, vectors: Tensor, folder: Path) -> dict[str, float]:
    """Trains one parent and writes its checkpoint, if it is not there yet. Returns its facts: accuracy, seconds."""
    path = folder / f"{parent.name}.safetensors"
    if path.exists():
        return load(path)[1]
    network = NETWORKS[parent.network]
    begin = time.process_time()
    torch.manual_seed(100 * parent.seed + parent.half)
    model = network.build()
    epochs = network.epochs
    if parent.base:
        model.load_state_dict(_base(parent, data, vectors, folder))
        epochs /= 2
    mine = data.training.of(parent.classes)
    targets = torch.searchsorted(torch.tensor(parent.classes), mine.labels)
    _fit(model, network, epochs, mine.images, targets, vectors[list(parent.classes)], parent.seed, parent.name)
    features = features_of(model, data.test.images)
    accuracy = own_accuracy(features, data.test.labels, vectors, parent.classes)
    about = {"accuracy": accuracy, "seconds": time.process_time() - begin, "torch": torch.__version__}
    save(path, model.state_dict(), about)
    return about


def trained(parent: Parent, folder: Path) -> nn.Module:
    """The trained network, in eval mode; FileNotFoundError says how to train it."""
    path = folder / f"{parent.name}.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{path}: not trained yet: python -m fashion_mnist train --network {parent.network}")
    model = NETWORKS[parent.network].build()
    model.load_state_dict(load(path)[0])
    return model.eval().requires_grad_(False)
