"""Widths and weight shapes of real architectures, as the kernels meet them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """One space: its width, the number of blocks, and the columns that its weight matrices add up to."""

    model: str
    space: str
    width: int
    columns: int
    blocks: int = 1


LAYERS = (
    Layer("ResNet-20", "stage 3", 64, 64 * 9 * 13),
    Layer("ResNet-50", "layer4 hidden", 512, 2048 + 512 * 9 + 512 * 9 + 2048),
    Layer("ViT-S", "mlp", 1536, 384 * 2 + 1),
    Layer("ViT-S", "residual", 384, 384 * 12 * 12),
    Layer("ViT-B", "mlp", 3072, 768 * 2 + 1),
    Layer("ViT-B", "heads", 768, 768 * 2 + 1, 12),
    Layer("ViT-L", "mlp", 4096, 1024 * 2 + 1),
    Layer("CLIP ViT-L text", "mlp", 3072, 768 * 2 + 1),
    Layer("Llama-3-8B", "mlp", 14336, 4096 * 3),
    Layer("Llama-3-70B", "mlp", 28672, 8192 * 3),
    Layer("Mixtral-8x7B", "expert", 14336, 4096 * 3),
)
