"""Parents of different tasks on one encoder: class, rotation, reconstruction, edges, each with its own head."""

from __future__ import annotations

from pathlib import Path

import torch
from networks import MLP
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from fashion_mnist.data import Fashion
from fashion_mnist.parents import load, save

TASKS = {"class": 10, "rotation": 4, "reconstruction": 784, "edges": 196}  # outputs of each task's head
EPOCHS, BATCH, FEATURES = 3, 128, 128


class TaskNetwork(nn.Module):
    """An MLP encoder and one linear head that reads its ReLU features."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.encoder = MLP(784, (256, 256), FEATURES)
        self.head = nn.Linear(FEATURES, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.encoder(x)))


def pose(task: str, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(inputs, targets) of a task: labels, quarter turns, the image itself, its Sobel edges at half size."""
    if task == "class":
        return images, labels
    if task == "rotation":
        turns = torch.randint(0, 4, (len(images),), generator=generator)
        turned = torch.stack([x.rot90(int(k), (1, 2)) for x, k in zip(images, turns, strict=True)])
        return turned, turns
    if task == "reconstruction":
        return images, images.flatten(1)
    sobel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]) / 4
    gradients = F.conv2d(images, torch.stack((sobel, sobel.T)).unsqueeze(1), padding=1)
    return images, F.avg_pool2d(gradients.norm(dim=1, keepdim=True), 2).flatten(1)


def score(task: str, outputs: Tensor, targets: Tensor) -> float:
    """Accuracy of class and rotation; explained variance of reconstruction and edges. Both are 1 at best."""
    if task in ("class", "rotation"):
        return (outputs.argmax(1) == targets).double().mean().item()
    return 1 - (outputs - targets).square().sum().item() / (targets - targets.mean(0)).square().sum().item()


def path_of(task: str, seed: int, folder: Path) -> Path:
    """Where this parent's checkpoint lies."""
    return folder / f"heterogeneous-{task}-{seed}.safetensors"


def train(task: str, seed: int, data: Fashion, folder: Path) -> float:
    """Trains one parent and writes its checkpoint, if it is not there yet. Returns its score on test images."""
    path = path_of(task, seed, folder)
    if path.exists():
        return load(path)[1]["score"]
    torch.manual_seed(4000 + 10 * seed + list(TASKS).index(task))
    model, generator = TaskNetwork(TASKS[task]), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    steps = max(1, EPOCHS * len(data.training.labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    order: list[Tensor] = []
    for _ in track(range(steps), f"training {task} {seed}"):
        if not order:
            order = list(torch.randperm(len(data.training.labels), generator=generator).split(BATCH))
        chosen = order.pop()
        inputs, targets = pose(task, data.training.images[chosen], data.training.labels[chosen], generator)
        outputs = model(inputs)
        loss = F.cross_entropy(outputs, targets) if targets.dtype == torch.int64 else F.mse_loss(outputs, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        inputs, targets = pose(task, data.test.images, data.test.labels, torch.Generator().manual_seed(1))
        result = score(task, model.eval()(inputs), targets)
    save(path, model.state_dict(), {"score": result})
    return result
