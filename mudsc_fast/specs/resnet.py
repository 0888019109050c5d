"""ResNets: basic and bottleneck blocks, BatchNorm or GroupNorm, torchvision or Hugging Face names.

The stream of a stage is one space: all of its blocks add to it. A block whose shortcut is a convolution starts a new
one. The inner convolutions of a block are a space each. GroupNorm's groups are blocks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from mudsc_fast.spaces import Axis, Space, Tap
from mudsc_fast.spec import PermutationSpec
from mudsc_fast.specs.family import Family, Shapes, covers, norm_axes, norm_blocks, produced

_EXPANSION = {"basic": 1, "bottleneck": 4}


@dataclass(frozen=True)
class _Block:
    """Names of a residual block: convolutions and norms in order, the shortcut's pair if it has one."""

    name: str
    convs: tuple[str, ...]
    norms: tuple[str, ...]
    shortcut: tuple[str, str] | None


@dataclass(frozen=True)
class _Names:
    """Names of a ResNet: stem convolution and norm, blocks in order, the last linear layer."""

    stem: tuple[str, str]
    blocks: tuple[_Block, ...]
    head: str


def _torchvision_block(name: str, depth: int, shortcut: bool, downsample: str) -> _Block:
    convs = tuple(f"{name}.conv{k}" for k in range(1, depth + 1))
    norms = tuple(f"{name}.bn{k}" for k in range(1, depth + 1))
    return _Block(name, convs, norms, (f"{name}.{downsample}.0", f"{name}.{downsample}.1") if shortcut else None)


def _huggingface_block(name: str, depth: int, shortcut: bool, prefix: str) -> _Block:
    convs = tuple(f"{name}.layer.{k}.convolution" for k in range(depth))
    norms = tuple(f"{name}.layer.{k}.normalization" for k in range(depth))
    pair = (f"{name}.shortcut.convolution", f"{name}.shortcut.normalization")
    return _Block(name, convs, norms, pair if shortcut else None)


def resnet(
    blocks: Sequence[int] = (2, 2, 2, 2),
    width: int = 64,
    block: str = "basic",
    norm: str = "batch",
    groups: int = 32,
    stem: str = "imagenet",
    names: str = "torchvision",
    downsample: str = "downsample",
    head: str = "fc",
) -> PermutationSpec:
    """The spec of a ResNet whose stages double their width.

    blocks: residual blocks of each stage. width: channels of the first stage (of a bottleneck's inner convolutions).
    block: "basic" or "bottleneck" (expansion 4). norm: "batch" or "group", with `groups` groups everywhere. stem:
    "cifar" or "imagenet" (both the same spaces: the stem's tensors have the same names). names: "torchvision" (with
    `downsample` the shortcut's name and `head` the last linear layer's) or "huggingface"
    (ResNetForImageClassification).
    """
    for what, value, allowed in (
        ("block", block, ("basic", "bottleneck")),
        ("norm", norm, ("batch", "group")),
        ("stem", stem, ("cifar", "imagenet")),
        ("names", names, ("torchvision", "huggingface")),
    ):
        if value not in allowed:
            raise ValueError(f"{what}: expected one of {', '.join(allowed)}, got {value!r}")
    depth, expansion = (2, 1) if block == "basic" else (3, _EXPANSION[block])
    widths: dict[str, int] = {}
    found, stream = [], width
    for s, count in enumerate(blocks):
        inner, out = width * 2**s, width * 2**s * expansion
        for i in range(count):
            shortcut = i == 0 and (s > 0 or stream != out)
            if names == "torchvision":
                b = _torchvision_block(f"layer{s + 1}.{i}", depth, shortcut, downsample)
            else:
                b = _huggingface_block(f"resnet.encoder.stages.{s}.layers.{i}", depth, shortcut, "")
            found.append(b)
            widths.update(dict.fromkeys(b.convs[:-1], inner) | {b.convs[-1]: out})
            stream = out
    huggingface = ("resnet.embedder.embedder.convolution", "resnet.embedder.embedder.normalization")
    stem_names = ("conv1", "bn1") if names == "torchvision" else huggingface
    widths[stem_names[0]] = width
    all_names = _Names(stem_names, tuple(found), head if names == "torchvision" else "classifier.1")
    convs = {f"{c}.bias" for c in widths} | {f"{b.shortcut[0]}.bias" for b in found if b.shortcut}

    def has(name: str) -> bool:
        return name not in convs and (norm == "batch" or "running_" not in name)

    return _build(all_names, widths, has, None, groups)


def _build(
    names: _Names, widths: dict[str, int], has: Callable[[str], bool], module: nn.Module | None, groups: int
) -> PermutationSpec:
    """All spaces, in the order of the forward pass; widths: output channels of each convolution."""
    spaces: list[Space] = []

    def add(name: str, width: int, pairs: Sequence[tuple[str, str]], readers: Sequence[str], tap: Tap) -> None:
        axes = []
        for conv, norm in pairs:
            axes += [Axis(f"{conv}.weight", 0, "out"), *produced([f"{conv}.bias"], has), *norm_axes(norm, has)]
        axes += [Axis(f"{reader}.weight", 1, "in") for reader in readers]
        blocks = norm_blocks([norm for _, norm in pairs], has, module, groups)
        spaces.append(Space(name, width, tuple(axes), (tap,), blocks=blocks))

    # The stream in progress: its name, the pairs that write to it, the layers that read it, where it is seen last.
    name, width, pairs, readers = "stem", widths[names.stem[0]], [names.stem], list[str]()
    tap = Tap(names.blocks[0].name, "input", 1)
    for b in names.blocks:
        readers.append(b.convs[0])
        if b.shortcut is not None:
            readers.append(b.shortcut[0])
            add(name, width, pairs, readers, tap)
            name, width, pairs, readers = b.name, widths[b.convs[-1]], [b.shortcut], []
        for k, conv in enumerate(b.convs[:-1]):
            after = b.convs[k + 1]
            add(conv, widths[conv], [(conv, b.norms[k])], [after], Tap(after, "input", 1))
        pairs.append((b.convs[-1], b.norms[-1]))
        tap = Tap(b.name, "output", 1)
    add(name, width, pairs, [*readers, names.head], tap)
    return PermutationSpec(tuple(spaces))


def _blocks_of(shapes: Shapes, pattern: str) -> list[str]:
    """Names of the blocks that match, in the order of their numbers."""
    found = {m.group(1) for name in shapes if (m := re.match(pattern, name))}
    return sorted(found, key=lambda n: [int(d) for d in re.findall(r"\d+", n)])


def _torchvision_names(shapes: Shapes) -> _Names | None:
    heads = [n.removesuffix(".weight") for n, s in shapes.items() if n.endswith(".weight") and len(s) == 2]
    blocks = _blocks_of(shapes, r"(layer\d+\.\d+)\.conv1\.weight$")
    if "conv1.weight" not in shapes or "bn1.weight" not in shapes or len(heads) != 1 or not blocks:
        return None
    made = []
    for name in blocks:
        depth = 3 if f"{name}.conv3.weight" in shapes else 2
        shortcut = [d for d in ("downsample", "shortcut") if f"{name}.{d}.0.weight" in shapes]
        made.append(_torchvision_block(name, depth, bool(shortcut), shortcut[0] if shortcut else ""))
    return _Names(("conv1", "bn1"), tuple(made), heads[0])


def _huggingface_names(shapes: Shapes) -> _Names | None:
    stem = next((n for n in shapes if n.endswith("embedder.embedder.convolution.weight")), None)
    head = next((n for n, s in shapes.items() if n.endswith(".weight") and len(s) == 2), None)
    if stem is None or head is None:
        return None
    prefix = stem.removesuffix("embedder.embedder.convolution.weight")
    pattern = rf"({re.escape(prefix)}encoder\.stages\.\d+\.layers\.\d+)\.layer\.0\.convolution\.weight$"
    blocks = _blocks_of(shapes, pattern)
    made = []
    for name in blocks:
        depth = 3 if f"{name}.layer.2.convolution.weight" in shapes else 2
        made.append(_huggingface_block(name, depth, f"{name}.shortcut.convolution.weight" in shapes, prefix))
    stem_names = (f"{prefix}embedder.embedder.convolution", f"{prefix}embedder.embedder.normalization")
    return _Names(stem_names, tuple(made), head.removesuffix(".weight")) if made else None


def recognise(shapes: Shapes, module: nn.Module | None, hints: Mapping[str, int]) -> PermutationSpec | None:
    """A ResNet by its names, if every tensor is accounted for and no convolution is grouped."""
    names = _torchvision_names(shapes) or _huggingface_names(shapes)
    if names is None:
        return None
    pairs = [names.stem, *((c, n) for b in names.blocks for c, n in zip(b.convs, b.norms, strict=True))]
    pairs += [b.shortcut for b in names.blocks if b.shortcut is not None]
    known = {names.head, *(name for pair in pairs for name in pair)}
    if any(n.rpartition(".")[0] not in known for n in shapes) or any(f"{c}.weight" not in shapes for c, _ in pairs):
        return None
    widths = {conv: shapes[f"{conv}.weight"][0] for conv, _ in pairs}
    spec = _build(names, widths, shapes.__contains__, module, hints.get("groups", 0))
    # A grouped convolution or a pre-activation block is another architecture under the same names.
    return spec if covers(spec, shapes, [names.head]) else None


FAMILY = Family(
    "resnet",
    "conv1.weight, bn1.weight, layer1.0.conv1.weight, ..., downsample.0 or shortcut.0, one linear layer (torchvision), "
    "or embedder.embedder.convolution.weight, encoder.stages.0.layers.0.layer.0.convolution.weight, ... (Hugging Face)",
    recognise,
)
