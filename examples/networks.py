"""Small plain torch networks for tests, the demo and studies: MLP, VGG, ResNet and ViT.

The last layer gives `num_outputs` numbers: logits, or the features of a CLIP-style head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MLP(nn.Module):
    """Linear layers fc1, fc2, ..., head with ReLU between; widths: the hidden layers."""

    def __init__(self, inputs: int = 64, widths: Sequence[int] = (48, 48, 48), num_outputs: int = 10) -> None:
        super().__init__()
        self.depth = len(widths)
        before = inputs
        for i, width in enumerate(widths):
            self.add_module(f"fc{i + 1}", nn.Linear(before, width))
            before = width
        self.head = nn.Linear(before, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for i in range(self.depth):
            x = F.relu(self.get_submodule(f"fc{i + 1}")(x))
        return self.head(x)


def _norm(kind: str, width: int, groups: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(width)
    if kind == "group":
        return nn.GroupNorm(groups, width)
    raise ValueError(f"norm: expected 'batch' or 'group', got {kind!r}")


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, named as in torchvision."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, norm: str, groups: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, width, 3, stride), _norm(norm, width, groups)
        self.conv2, self.bn2 = _conv(width, width, 3), _norm(norm, width, groups)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != width:
            self.downsample = nn.Sequential(_conv(inputs, width, 1, stride), _norm(norm, width, groups))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut, named as in torchvision."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, norm: str, groups: int) -> None:
        super().__init__()
        out = width * self.expansion
        self.conv1, self.bn1 = _conv(inputs, width, 1), _norm(norm, width, groups)
        self.conv2, self.bn2 = _conv(width, width, 3, stride), _norm(norm, width, groups)
        self.conv3, self.bn3 = _conv(width, out, 1), _norm(norm, out, groups)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != out:
            self.downsample = nn.Sequential(_conv(inputs, out, 1, stride), _norm(norm, out, groups))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """A ResNet with torchvision's names; stages double their width and halve the image.

    blocks: residual blocks of each stage. block: "basic" or "bottleneck". norm: "batch" or "group" (named bn as well).
    stem: "cifar" (3x3) or "imagenet" (7x7, stride 2, max pool).
    """

    def __init__(
        self,
        blocks: Sequence[int] = (2, 2, 2, 2),
        width: int = 64,
        block: str = "basic",
        norm: str = "batch",
        groups: int = 8,
        stem: str = "cifar",
        channels: int = 3,
        num_outputs: int = 10,
    ) -> None:
        super().__init__()
        kind = {"basic": BasicBlock, "bottleneck": Bottleneck}[block]
        small = stem == "cifar"
        self.conv1 = _conv(channels, width, 3) if small else _conv(channels, width, 7, 2)
        self.bn1 = _norm(norm, width, groups)
        self.pool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        self.stages = len(blocks)
        before = width
        for s, count in enumerate(blocks):
            layers = []
            for i in range(count):
                layers.append(kind(before, width * 2**s, 2 if s and not i else 1, norm, groups))
                before = width * 2**s * kind.expansion
            self.add_module(f"layer{s + 1}", nn.Sequential(*layers))
        self.fc = nn.Linear(before, num_outputs)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        for s in range(self.stages):
            x = self.get_submodule(f"layer{s + 1}")(x)
        return self.fc(x.mean((2, 3)))


def ResNet20(width: int = 16, **options: object) -> ResNet:
    """The CIFAR ResNet-20: three stages of three basic blocks."""
    return ResNet(blocks=(3, 3, 3), width=width, **options)  # type: ignore[arg-type]


def randomise_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every norm layer random weights, biases and running statistics, in place: a fresh one hides mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)):
            for tensor, low, high in (
                (m.weight, 0.5, 1.5),
                (m.bias, -0.5, 0.5),
                (getattr(m, "running_mean", None), -0.5, 0.5),
                (getattr(m, "running_var", None), 0.5, 1.5),
            ):
                if tensor is not None:
                    values = torch.rand(tensor.shape, generator=generator) * (high - low) + low
                    tensor.data.copy_(values)
    return model
