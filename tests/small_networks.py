"""Small random networks of the study's kinds, and batches for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from networks import MLP, VGG, ResNet, ViT, randomise_norms
from torch import Tensor, nn

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: MLP(30, (24, 20), 6),
    "vgg": lambda: VGG((8, "M", 12, "M"), hidden=(20,), image=8, channels=1, num_outputs=6),
    "resnet": lambda: ResNet((2, 1), 8, channels=1, num_outputs=6),
    "resnet, groups": lambda: ResNet((1, 1), 8, norm="group", groups=4, channels=1, num_outputs=6),
    "bottleneck": lambda: ResNet((1, 1), 4, block="bottleneck", channels=1, num_outputs=6),
    "vit": lambda: ViT(8, 4, 1, width=16, depth=2, num_heads=4, hidden=24, num_outputs=6),
    "vit, not fused": lambda: ViT(8, 4, 1, width=16, depth=1, num_heads=4, hidden=24, num_outputs=6, fused=False),
    "vit, mean": lambda: ViT(8, 4, 1, width=16, depth=1, num_heads=2, num_outputs=6, class_token=False, pool="mean"),
}


def small_network(name: str, seed: int) -> nn.Module:
    """A network by name, its norms random too, in eval mode."""
    torch.manual_seed(seed)
    return randomise_norms(NETWORKS[name](), seed).eval()


def small_batches(name: str, samples: int) -> list[Tensor]:
    """Three batches for it."""
    generator = torch.Generator().manual_seed(9)
    shape = (30,) if name == "mlp" else (1, 8, 8)
    return [torch.randn(samples, *shape, generator=generator) for _ in range(3)]
