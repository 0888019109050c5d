"""State dicts and activation statistics of two related models, made from shapes alone: no training, no model code."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import mudsc_fast as mf

Shapes = dict[str, tuple[int, ...]]


def mlp(inputs: int = 784, widths: tuple[int, ...] = (512, 512, 512), outputs: int = 10) -> Shapes:
    """Linear layers fc1, fc2, ..., head."""
    shapes: Shapes = {}
    sizes = [inputs, *widths, outputs]
    names = [f"fc{k + 1}" for k in range(len(widths))] + ["head"]
    for name, before, after in zip(names, sizes, sizes[1:], strict=False):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (after, before), (after,)
    return shapes


def _norm(name: str, width: int, batch: bool) -> Shapes:
    kinds = ("weight", "bias", "running_mean", "running_var") if batch else ("weight", "bias")
    return {f"{name}.{kind}": (width,) for kind in kinds}


def resnet20(width: int = 16, outputs: int = 10) -> Shapes:
    """ResNet-20 with batch norm, torchvision's names; widths width, 2 width, 4 width."""
    shapes: Shapes = {"conv1.weight": (width, 3, 3, 3), **_norm("bn1", width, True)}
    before = width
    for stage in range(3):
        after = width << stage
        for block in range(3):
            name = f"layer{stage + 1}.{block}"
            shapes |= {f"{name}.conv1.weight": (after, before, 3, 3), **_norm(f"{name}.bn1", after, True)}
            shapes |= {f"{name}.conv2.weight": (after, after, 3, 3), **_norm(f"{name}.bn2", after, True)}
            if before != after:
                shapes |= {f"{name}.downsample.0.weight": (after, before, 1, 1)}
                shapes |= _norm(f"{name}.downsample.1", after, True)
            before = after
    return shapes | {"fc.weight": (outputs, before), "fc.bias": (outputs,)}


def vit(width: int = 192, layers: int = 6, tokens: int = 65, patch: int = 4, outputs: int = 10) -> Shapes:
    """A vision transformer with fused qkv, timm's names."""
    shapes: Shapes = {"cls_token": (1, 1, width), "pos_embed": (1, tokens, width)}
    shapes |= {"patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,)}
    for layer in range(layers):
        name = f"blocks.{layer}"
        for part, rows, columns in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):
            shapes |= {f"{name}.{part}.weight": (rows, columns), f"{name}.{part}.bias": (rows,)}
        shapes |= {**_norm(f"{name}.norm1", width, False), **_norm(f"{name}.norm2", width, False)}
    shapes |= _norm("norm", width, False)
    return shapes | {"head.weight": (outputs, width), "head.bias": (outputs,)}


def pair(
    shapes: Shapes, noise: float = 0.3, seed: int = 0, **hints: int
) -> tuple[mf.PermutationSpec, list[dict[str, Tensor]]]:
    """A random model, and a copy of it in another unit order with noise; the spec without ties, as published."""
    generator = torch.Generator().manual_seed(seed)
    first = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    found = mf.spec_for(first, **hints)
    spec = mf.PermutationSpec(tuple(replace(space, tie=None) for space in found.spaces))
    second = found.permute(first, found.random_permutation(seed))
    for tensor in second.values():
        tensor += noise * 0.1 * torch.randn(tensor.shape, generator=generator)
    return spec, [first, second]


def statistics(spec: mf.PermutationSpec, samples: int = 512, scope: str = "full") -> dict[str, mf.Covariance]:
    """Covariances of two models' made-up activations in every space: shared features, noise, another order."""
    stats = {}
    for k, space in enumerate(spec.spaces):
        generator = torch.Generator().manual_seed(k)
        shared = torch.randn(samples, space.width, generator=generator)
        other = shared.roll(k + 1, dims=1) if space.blocks == 1 else shared
        noisy = [x + 0.5 * torch.randn(x.shape, generator=generator) for x in (shared, other)]
        stats[space.name] = mf.Covariance(space.width, 2, scope)
        stats[space.name].update(noisy)
    return stats
