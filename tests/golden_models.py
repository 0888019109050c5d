"""Small float64 models and their specs, which between them use every feature of the spec algebra."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu_

from mudsc_fast.spaces import Axis, Space, Tap
from mudsc_fast.spec import PermutationSpec

CHANNELS, HEADS, HEAD_DIM, KV, GROUP = 5, 4, 3, 2, 3


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class FusedAttention(nn.Module):
    """Multi-head attention with one fused qkv layer; input and output channels belong to no space."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.qkv = nn.Linear(CHANNELS, 3 * HEADS * HEAD_DIM, dtype=torch.float64)
        self.proj = nn.Linear(HEADS * HEAD_DIM, CHANNELS, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (_split(t, HEADS) for t in self.qkv(x).chunk(3, dim=-1))
        mixed = (3.0 * q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.proj(mixed.transpose(1, 2).flatten(2))


def fused_spec(tied: bool = True, both_taps: bool = True) -> PermutationSpec:
    """q/k and v dimensions of FusedAttention; untied, or tapped at k alone, as the official code has it."""
    view, tie = (3, HEADS, HEAD_DIM), "attention" if tied else None
    width = HEADS * HEAD_DIM

    def qkv(k: int) -> tuple[Axis, Axis]:
        return (
            Axis("qkv.weight", 0, "out", view, (1, 2), (0, k)),
            Axis("qkv.bias", 0, "out", view, (1, 2), (0, k)),
        )

    def tap(k: int) -> Tap:
        return Tap("qkv", "output", -1, view, (1, 2), (0, k))

    return PermutationSpec(
        (
            Space("qk", width, (*qkv(0), *qkv(1)), (tap(0) if both_taps else tap(1), tap(1)), HEADS, tie=tie),
            Space("v", width, (*qkv(2), Axis("proj.weight", 1, "in")), (tap(2),), HEADS, tie=tie),
        )
    )


class GroupedAttention(nn.Module):
    """Grouped-query attention: KV key/value heads, each read by GROUP query heads."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.q = nn.Linear(CHANNELS, KV * GROUP * HEAD_DIM, dtype=torch.float64)
        self.k = nn.Linear(CHANNELS, KV * HEAD_DIM, dtype=torch.float64)
        self.v = nn.Linear(CHANNELS, KV * HEAD_DIM, dtype=torch.float64)
        self.o = nn.Linear(KV * GROUP * HEAD_DIM, CHANNELS, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        q = _split(self.q(x), KV * GROUP)
        k, v = (_split(layer(x), KV).repeat_interleave(GROUP, dim=1) for layer in (self.k, self.v))
        mixed = (3.0 * q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.o(mixed.transpose(1, 2).flatten(2))


def grouped_spec(within: str = "free") -> PermutationSpec:
    """q/k dimensions, values and query heads of GroupedAttention, all tied."""
    view = (KV, GROUP, HEAD_DIM)
    width = KV * HEAD_DIM

    def linear(name: str, at: tuple[int, int] | None = None) -> list[Axis]:
        return [Axis(f"{name}.{part}", 0, "out", view if at else None, at) for part in ("weight", "bias")]

    return PermutationSpec(
        (
            Space(
                "qk",
                width,
                (*linear("q", (0, 2)), *linear("k")),
                (Tap("q", "output", -1, view, (0, 2)), Tap("k", "output", -1)),
                KV,
                within,
                "attention",
            ),
            Space(
                "v",
                width,
                (*linear("v"), Axis("o.weight", 1, "in", view, (0, 2))),
                (Tap("v", "output", -1),),
                KV,
                tie="attention",
            ),
            Space(
                "queries",
                KV * GROUP,
                (*linear("q", (0, 1)), Axis("o.weight", 1, "in", view, (0, 1))),
                (Tap("o", "input", -1, view, (0, 1)),),
                KV,
                tie="attention",
            ),
        )
    )


class Block(nn.Module):
    """A residual block; in-place activations, so that taps have to copy."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, inner, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(leaky_relu_(self.bn1(self.conv1(x)), 0.1)))
        return leaky_relu_(y.add_(x), 0.1)


class ConvNet(nn.Module):
    """A tiny residual network with a square layer whose two axes are one space."""

    def __init__(self, seed: int, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(2, width, 3, padding=1)
        self.block = Block(width, 2 * width)
        self.head = nn.Linear(width, 4)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.conv(x)).mean((2, 3)))


def conv_spec(width: int = 6) -> PermutationSpec:
    """The residual stream and the inner channels of ConvNet."""

    def norm(name: str) -> tuple[Axis, ...]:
        return (
            Axis(f"{name}.weight", 0, "out"),
            Axis(f"{name}.bias", 0, "out"),
            Axis(f"{name}.running_mean", 0, "out", compare=False),
            Axis(f"{name}.running_var", 0, "out", compare=False),
        )

    stream = (
        Axis("conv.weight", 0, "out"),
        Axis("conv.bias", 0, "out"),
        Axis("block.conv1.weight", 1, "in"),
        Axis("block.conv2.weight", 0, "out"),
        *norm("block.bn2"),
        Axis("head.weight", 1, "in"),
    )
    inner = (Axis("block.conv1.weight", 0, "out"), *norm("block.bn1"), Axis("block.conv2.weight", 1, "in"))
    return PermutationSpec(
        (
            Space("stream", width, stream, (Tap("block", "output", 1),)),
            Space("inner", 2 * width, inner, (Tap("block.conv2", "input", 1),)),
        )
    )


def odd_spec() -> PermutationSpec:
    """Tensors no model has: parts of a concatenation, experts over two dims, a space on two dims of one tensor."""
    return PermutationSpec(
        (
            Space("a", 4, (Axis("joined", 0, "out", part=(1, 4)), Axis("square", 0, "out"), Axis("square", 1, "in"))),
            Space("b", 6, (Axis("joined", 0, "out", view=(2, 3), at=(0, 1), part=(5, 6)),), blocks=2),
            Space(
                "experts",
                6,
                (
                    Axis("up", (0, 2), "out", view=(2, 2, 3), at=(0, 2), pick=(1, 0)),
                    Axis("up", (0, 2), "out", view=(2, 2, 3), at=(0, 2), pick=(1, 1)),
                    Axis("down", (0, 1), "in", view=(2, 3), at=(0, 1)),
                ),
                blocks=2,
            ),
            Space("still", 4, (Axis("rope", 0, "out"),), blocks=2, within="fixed"),
        )
    )


def odd_tensors(seed: int) -> dict[str, Tensor]:
    """A state dict for odd_spec."""
    torch.manual_seed(seed)
    shapes = {"joined": (12, 2), "square": (4, 4, 3), "up": (2, 5, 6), "down": (2, 3, 5), "rope": (4,), "free": (3,)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
