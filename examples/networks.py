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


class VGG(nn.Module):
    """A VGG with torchvision's names. config: channels of the 3x3 convolutions, "M" for a 2x2 max pool.

    hidden: units of the classifier's hidden layers. image: height and width of the input.
    """

    def __init__(
        self,
        config: Sequence[int | str] = (32, 32, "M", 64, 64, "M"),
        batch_norm: bool = True,
        hidden: Sequence[int] = (64,),
        image: int = 32,
        channels: int = 3,
        num_outputs: int = 10,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before, size = channels, image
        for c in config:
            if isinstance(c, int):
                layers.append(nn.Conv2d(before, c, 3, padding=1))
                layers += [nn.BatchNorm2d(c)] if batch_norm else []
                layers.append(nn.ReLU())
                before = c
            else:
                layers.append(nn.MaxPool2d(2))
                size //= 2
        self.features = nn.Sequential(*layers)
        layers, before = [], before * size * size
        for units in hidden:
            layers += [nn.Linear(before, units), nn.ReLU(), nn.Dropout(dropout)]
            before = units
        self.classifier = nn.Sequential(*layers, nn.Linear(before, num_outputs))
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(m.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class Attention(nn.Module):
    """Multi-head attention with timm's names; fused: one qkv layer. qk_norm: LayerNorm over each head's q and k."""

    def __init__(self, width: int, num_heads: int, fused: bool, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads, self.fused, size = num_heads, fused, width // num_heads
        if fused:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.q_norm = nn.LayerNorm(size) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(size) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            q, k, v = self.qkv(x).chunk(3, -1)  # taken apart in one statement, which torch.fx can follow
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (p.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in (q, k, v))
        y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class ViTLayer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int, num_heads: int, hidden: int, fused: bool, qk_norm: bool) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, num_heads, fused, qk_norm)
        self.norm2, self.mlp = nn.LayerNorm(width), FeedForward(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A vision transformer with timm's names. pool: "token" reads the class token, "mean" the mean over patches."""

    def __init__(
        self,
        image: int = 32,
        patch: int = 4,
        channels: int = 3,
        width: int = 64,
        depth: int = 4,
        num_heads: int = 4,
        hidden: int | None = None,
        num_outputs: int = 10,
        fused: bool = True,
        qk_norm: bool = False,
        class_token: bool = True,
        pool: str = "token",
    ) -> None:
        super().__init__()
        if pool == "token" and not class_token:
            raise ValueError("pool: 'token' needs class_token=True")
        self.pool = pool
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(channels, width, patch, patch)
        tokens = (image // patch) ** 2 + class_token
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02) if class_token else None
        self.pos_embed = nn.Parameter(torch.randn(1, tokens, width) * 0.02)
        self.blocks = nn.Sequential(
            *(ViTLayer(width, num_heads, hidden or 4 * width, fused, qk_norm) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width) if pool == "token" else nn.Identity()
        self.fc_norm = nn.LayerNorm(width) if pool == "mean" else nn.Identity()
        self.head = nn.Linear(width, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        skip = 0
        if self.cls_token is not None:
            x, skip = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), 1), 1
        x = self.norm(self.blocks(x + self.pos_embed))
        return self.head(self.fc_norm(x[:, 0] if self.pool == "token" else x[:, skip:].mean(1)))


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
