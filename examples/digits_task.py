"""The two halves of scikit-learn's digits: data, CLIP-style training, and what accuracy means in the demo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

TASKS = ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9))
TEST_IMAGES = 500
LOGIT_SCALE = 16.0  # cosine logits are at most 1; without a scale cross-entropy cannot fall


@dataclass(frozen=True)
class Digits:
    """Normalised images (n, 1, 8, 8) float32 and labels (n,) int64, split once into training and test images."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def calibration(self, images: int, batch: int = 128) -> list[Tensor]:
        """Batches of the first training images of both tasks, without their labels."""
        return list(self.train_images[:images].split(batch))


def load(seed: int = 0) -> Digits:
    """All 1,797 digits that scikit-learn ships, split at random into training images and 500 test images."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)
    targets = torch.tensor(labels)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    test, train = order[:TEST_IMAGES], order[TEST_IMAGES:]
    images = (images - images[train].mean()) / images[train].std()
    return Digits(images[train], targets[train], images[test], targets[test])


def class_vectors(features: int, seed: int = 7) -> Tensor:
    """Ten fixed orthonormal vectors (10, features): the stand-in for the text embeddings of CLIP."""
    square = torch.randn(features, 10, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(square)[0].T.contiguous()


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """The batch moved by up to one pixel in each direction; background comes in at the edges."""
    down, right = torch.randint(0, 3, (2,), generator=generator).tolist()
    padded = functional.pad(images, (1, 1, 1, 1), value=images.min().item())
    return padded[:, :, down : down + 8, right : right + 8]


def train(
    model: nn.Module, digits: Digits, classes: Sequence[int], vectors: Tensor, epochs: int, seed: int
) -> nn.Module:
    """Trains `model` on the images of `classes` alone, to point at its classes' vectors. Returns it in eval mode."""
    mine = torch.isin(digits.train_labels, torch.tensor(classes))
    images, targets = digits.train_images[mine], digits.train_labels[mine] - classes[0]
    own_vectors = vectors[list(classes)]
    generator = torch.Generator().manual_seed(seed)
    batch = 64
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # networks this small gain little from a second thread, and lose much on a busy machine
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for chosen in order[: len(images) // batch * batch].split(batch):
            features = functional.normalize(model(shifted(images[chosen], generator)), dim=1)
            loss = functional.cross_entropy(LOGIT_SCALE * features @ own_vectors.T, targets[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    torch.set_num_threads(threads)
    return model.eval()


@dataclass(frozen=True)
class Accuracy:
    """Per cent of the test images: all ten digits against all ten vectors, and each half against its own five."""

    joint: float
    tasks: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.tasks) / len(self.tasks)


@torch.no_grad()
def accuracy(network: Callable[[Tensor], Tensor], digits: Digits, vectors: Tensor) -> Accuracy:
    """Measures `network`, which turns images into features, on the held-out test images."""
    cosines = functional.normalize(network(digits.test_images), dim=1) @ vectors.T
    labels = digits.test_labels
    joint = (cosines.argmax(1) == labels).double().mean().item()
    own = []
    for classes in TASKS:
        mine = torch.isin(labels, torch.tensor(classes))
        guess = cosines[mine][:, list(classes)].argmax(1) + classes[0]
        own.append((guess == labels[mine]).double().mean().item())
    return Accuracy(100 * joint, tuple(100 * value for value in own))


def ensemble(models: Sequence[nn.Module]) -> Callable[[Tensor], Tensor]:
    """The mean of the models' unit-length features, and so of their logits: as many networks to run as models."""
    return lambda images: torch.stack([functional.normalize(model(images), dim=1) for model in models]).mean(0)
