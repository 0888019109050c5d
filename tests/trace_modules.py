"""Small plain torch networks with what the Hugging Face models lack: grouped convolutions, concatenation, LSTMs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResNeXtBlock(nn.Module):
    """1x1, grouped 3x3 and 1x1 convolutions with a shortcut."""

    def __init__(self, width: int, inner: int, groups: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(x + self.bn3(self.conv3(y)))


class Inverted(nn.Module):
    """MobileNetV3's block: expansion, depthwise convolution, squeeze and excitation, projection."""

    def __init__(self, width: int, hidden: int, squeeze: int) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(width, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.se1, self.se2 = nn.Conv2d(hidden, squeeze, 1), nn.Conv2d(squeeze, hidden, 1)
        self.project, self.bn3 = nn.Conv2d(hidden, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.bn1(self.expand(x)))
        y = F.hardswish(self.bn2(self.depthwise(y)))
        gate = F.hardsigmoid(self.se2(F.relu(self.se1(F.adaptive_avg_pool2d(y, 1)))))
        return x + self.bn3(self.project(y * gate))


class Dense(nn.Module):
    """DenseNet's layer: what it makes is put beside what it reads."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, 2 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * growth)
        self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return torch.cat((x, y), 1)


class Shuffle(nn.Module):
    """ShuffleNet's block: grouped convolutions with the channels dealt out between them."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.conv1, self.bn1 = nn.Conv2d(width, width, 1, groups=groups), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 1, groups=groups), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = y.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)
        return x + self.bn2(self.conv2(y))


class Padded(nn.Module):
    """The shortcut without weights of CIFAR ResNets: every second position, and channels of zeros."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width)
        self.conv2, self.bn2 = nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width)

    def forward(self, x: Tensor) -> Tensor:
        extra = x.shape[1] // 2
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, extra, extra))
        return F.relu(short + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def conv_net(*blocks: nn.Module, width: int, last: int) -> nn.Module:
    """A stem, blocks, pooling and a linear layer."""
    stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, 5))


class Mixer(nn.Module):
    """An MLP-Mixer: tokens mixed by one MLP, channels by another."""

    def __init__(self, width: int = 24, tokens: int = 16, depth: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width),
                    "token": nn.Sequential(nn.Linear(tokens, 10), nn.GELU(), nn.Linear(10, tokens)),
                    "norm2": nn.LayerNorm(width),
                    "channel": nn.Sequential(nn.Linear(width, 20), nn.GELU(), nn.Linear(20, width)),
                }
            )
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = x + layer["token"](layer["norm1"](x).transpose(1, 2)).transpose(1, 2)
            x = x + layer["channel"](layer["norm2"](x))
        return self.head(x.mean(1))


class Encoder(nn.Module):
    """torch's own transformer layers."""

    def __init__(self, norm_first: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 24)
        layer = nn.TransformerEncoderLayer(24, 3, 20, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)))


class Recurrent(nn.Module):
    """An embedding, LSTM or GRU layers and a linear layer."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU], layers: int = 2, bidirectional: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 10)
        self.rnn = kind(10, 12, layers, batch_first=True, bidirectional=bidirectional)
        self.head = nn.Linear(12 * (1 + bidirectional), 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(x))[0])


class Autoencoder(nn.Module):
    """Convolutions down, transposed ones up."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 12, 3, 2, 1)
        self.up1, self.up2 = nn.ConvTranspose2d(12, 6, 2, 2), nn.ConvTranspose2d(6, 3, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up2(F.relu(self.up1(F.relu(self.down2(F.relu(self.down1(x)))))))


class WeightNormed(nn.Module):
    """Two convolutions whose weights are directions and lengths, the first one in groups, with a shortcut."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        normed = nn.utils.parametrizations.weight_norm
        self.first = normed(nn.Conv2d(width, 2 * width, 3, padding=1, groups=groups))
        self.second = normed(nn.Conv2d(2 * width, width, 1), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))


class PixelShuffled(nn.Module):
    """Channels that become positions, and positions that become channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(width, 4 * 6, 1), nn.Conv2d(6 * 4, width, 1)
        self.inner = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.inner(F.pixel_shuffle(F.relu(self.up(x)), 2)))
        return x + self.down(F.pixel_unshuffle(y, 2))


class Einsum(nn.Module):
    """Attention written as einsums, one of them of three operands."""

    def __init__(self, width: int = 24, heads: int = 3, inner: int = 8) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(40, width), nn.Linear(width, 5)
        self.q, self.k, self.v = (nn.Parameter(torch.randn(width, heads, inner) / 4) for _ in range(3))
        self.o = nn.Parameter(torch.randn(heads, inner, width) / 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        q, k, v = (torch.einsum("btd,dhk->bhtk", h, w) for w in (self.q, self.k, self.v))
        weights = torch.einsum("bhik,bhjk->bhij", q, k).softmax(-1)
        return self.head(h + torch.einsum("bhij,bhjk,hkd->bid", weights, v, self.o))
